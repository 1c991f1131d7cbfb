"""Attention of packed rows, each by itself, as transformers calls attention.

Where rows lie end to end, transformers' default gives the whole pack a mask, which costs the square of the pack's length instead of the
sum of the squares of its rows. In bfloat16 on a GPU torch has one kernel for rows of different length; on a CPU rows are taken one after
the other. In float32 on a GPU, and for architectures that are not named here, the default stays.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "packed"
"""What transformers calls it."""

# fmt: off
ARCHITECTURES = {
    "apertus", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode",
    "gpt_neox", "granite", "granitemoe", "helium", "llama", "ministral", "ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmo3",
    "olmoe", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
}
# fmt: on
"""Those that tell their attention everything it needs. Others have a window or what they have learnt in their mask alone."""


def use_packed_attention(model: Any, on_gpu: bool) -> None:
    """Has a Hugging Face model attend row by row, if it is one of ARCHITECTURES, and in bfloat16 or on a CPU."""
    from transformers import AttentionInterface

    known = model.config.model_type in ARCHITECTURES and model.config._attn_implementation == "sdpa"
    if known and (model.dtype == torch.bfloat16 or not on_gpu):
        AttentionInterface.register(NAME, _attend)
        model.set_attn_implementation(NAME)


def row_bounds(model: Any, position_ids: Tensor) -> dict[str, Any]:
    """What the model is told of a pack's rows besides their position ids [T], by the names that transformers has for it."""
    if model.config._attn_implementation != NAME:
        return {}
    begins = (position_ids == 0).nonzero().flatten()
    bounds = torch.cat([begins, begins.new_tensor([len(position_ids)])]).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, D], key and value [1, fewer heads, T, D] -> [1, T, heads, D]."""
    if query.device.type == "cpu":
        lengths = cu_seq_lens_q.diff().tolist()
        rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        return torch.cat([_attend_to_row(*row, scaling, sliding_window) for row in rows], 2).transpose(1, 2).contiguous(), None
    return _attend_to_all(query, key, value, scaling, cu_seq_lens_q, max_length_q, sliding_window), None


def _attend_to_row(query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
    """query [1, heads, R, D], key and value [1, fewer heads, R, D] of one row -> [1, heads, R, D]."""
    length, mask = query.shape[2], None
    if sliding_window and sliding_window < length:
        mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - sliding_window)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=True)


def _attend_to_all(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, bounds: Tensor, longest: int, sliding_window: int | None
) -> Tensor:
    """The same of all rows of a pack by one kernel, query [1, heads, T, D] -> [1, T, heads, D]."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers.integrations.sdpa_attention import repeat_kv

    groups = query.shape[1] // key.shape[1]
    states = [part[0].transpose(0, 1) for part in (query, repeat_kv(key, groups), repeat_kv(value, groups))]
    lengths = (bounds, bounds, longest, longest)
    window = (sliding_window - 1 if sliding_window else -1, 0)
    return cast(Tensor, varlen_attn(states[0], states[1], states[2], *lengths, scale=scaling, window_size=window))[None]
