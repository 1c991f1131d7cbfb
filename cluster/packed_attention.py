"""Attention of packed rows on a GPU: torch's own flash attention over rows of different length, as transformers calls attention.

Where rows lie end to end, transformers' default gives the whole pack a mask, which costs the square of the pack's length instead of the
sum of the squares of its rows. On a CPU, where there is no such kernel, and in float32 the default stays.
"""

from typing import Any, cast

import torch
from torch import Tensor

from cluster.errors import UserError

NAME = "packed"
"""What transformers calls it."""


def use_packed_attention(model: Any) -> None:
    """Has a bfloat16 Hugging Face model that attends by torch's `scaled_dot_product_attention` attend row by row instead."""
    from transformers import AttentionInterface

    if model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa":
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
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, D], key and value [1, fewer heads, T, D] -> [1, T, heads, D].

    Raises UserError for what torch's kernel leaves out.
    """
    if softcap is not None or s_aux is not None:
        raise UserError(
            "this model caps its attention or has sinks in it, which torch's attention by rows leaves out; train it in float32."
        )
    from torch.nn.attention.varlen import varlen_attn
    from transformers.integrations.sdpa_attention import repeat_kv

    groups = query.shape[1] // key.shape[1]
    states = [part[0].transpose(0, 1) for part in (query, repeat_kv(key, groups), repeat_kv(value, groups))]
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    window = (sliding_window - 1 if sliding_window else -1, 0)
    found = cast(Tensor, varlen_attn(states[0], states[1], states[2], *lengths, scale=scaling, window_size=window))
    return found[None], None
