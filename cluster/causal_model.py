"""A causal language model in training: loaded for a ZeRO stage, with adapters, and asked for scores of tokens instead of logits.

Logits of a long thought are larger than the model: 16,000 tokens by 128,000 words are 8 GB in float32, several times over. So they are
computed for some hundred predictions at a time, of which only the scores stay; the backward pass computes them once more.
"""

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cluster.errors import UserError
from cluster.models import check_trainable
from cluster.packed_attention import row_bounds, use_packed_attention
from cluster.training_config import TrainingConfig


class TokenScores(NamedTuple):
    """What a model says of L tokens; float32 [L] each, gradient flows through `logp` alone.

    logp: log-probability of the token, under the distribution that was sampled from. entropy: of that distribution, in nats.
    top: 1 where the token is the first choice.
    """

    logp: Tensor
    entropy: Tensor
    top: Tensor


class ScoredModel(torch.nn.Module):
    """A Hugging Face causal model, with or without adapters, that returns scores of the tokens it is asked about.

    The output layer itself returns scores instead of logits: ZeRO-3 gathers its weights once for a call, and every piece of a call needs
    them, in the forward and the backward pass.
    """

    def __init__(self, model: Any, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.logit_tokens = config.logit_tokens
        head = self.plain.get_output_embeddings()
        head.forward = partial(_scores_in_pieces, head, self.logit_tokens, score)

    def fuse(self) -> None:
        """Has torch's compiler fuse what lies between matrix products, in each layer and in the scores."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):  # as transformers' decoder layers are
                module.forward = torch.compile(module.forward, dynamic=True)
        head = self.plain.get_output_embeddings()
        # the second call compiles for any number of tokens; with `dynamic` the first would, for any vocabulary too, and slower
        head.forward = partial(_scores_in_pieces, head, self.logit_tokens, torch.compile(score))

    @property
    def plain(self) -> Any:
        """The Hugging Face model, without what peft wraps around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, input_ids: Tensor, position_ids: Tensor, learnt: Tensor, targets: Tensor, temperature: float) -> TokenScores:
        """Scores of `targets` [L], which follow the positions `learnt` [L] of `input_ids` [T]; position ids restart with every row."""
        # The one form in which transformers keeps packed rows apart: a mask of ones or a cache would silently mix them.
        bounds = row_bounds(self.plain, position_ids)
        decoder = self.plain.get_decoder()
        states = decoder(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, **bounds).last_hidden_state
        found: TokenScores = self.plain.get_output_embeddings()(states[0, learnt], targets, temperature)
        return found


def _scores_in_pieces(
    head: Any, size: int, score: Callable[..., TokenScores], states: Tensor, targets: Tensor, temperature: float
) -> TokenScores:
    """Scores of targets [L] after states [L, H], with the logits of at most `size` of them in memory."""
    weight, bias = head.weight, head.bias

    def scores(part: Tensor, wanted: Tensor) -> TokenScores:
        return score(F.linear(part, weight, bias), wanted, temperature)

    parts = list(zip(states.split(size), targets.split(size), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        found = [scores(*part) for part in parts]
    else:
        found = [checkpoint(scores, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return TokenScores(*(torch.cat(values) for values in zip(*found, strict=True)))


def score(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenScores:
    """Scores of `targets` [L] under logits [L, V] / temperature, in float32.

    `log_softmax` is what engines take, too: on CPU it is off by up to 1e-4, by the same in both. What stands beside it uses the terms that
    a compiler finds in it, so that the logits are read twice in all: for their maximum and for the sums.
    """
    scaled = logits.float() / temperature
    logp = F.log_softmax(scaled, -1).gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        shifted = scaled - scaled.amax(-1, keepdim=True)
        top = (shifted.gather(-1, targets[:, None]).squeeze(-1) >= 0).float()
        odds = shifted.exp()
        total = odds.sum(-1, keepdim=True)
        mean = shifted.mul_(odds).nan_to_num_().sum(-1, keepdim=True) / total
        entropy = (total.log() - mean).squeeze(-1)
    return TokenScores(logp, entropy, top)


def load(model_path: str, config: TrainingConfig, zero3_settings: dict[str, Any] | None = None, on_gpu: bool = False) -> ScoredModel:
    """The pre-trained model in the training dtype, with fresh adapters if there are to be any.

    With ZeRO-3 settings no rank ever holds all of it. Dropout is off: what draws and what learns are one policy. Packed rows attend one by
    one; on a GPU layers are compiled if the configuration says so. Raises UserError when `model_path` is no checkpoint, or of an
    architecture that cannot be trained (`check_trainable`).
    """
    if not (Path(model_path) / "config.json").exists():
        raise UserError(
            f"model {model_path!r}: this machine ({socket.gethostname()}) has no Hugging Face checkpoint there. All nodes of a cluster "
            "read it from the same place: keep SPECMILL_CACHE and HF_HOME on a shared disk, or name a directory that all of them have."
        )
    check_trainable(model_path)
    model = _pretrained(model_path, config, zero3_settings)
    use_packed_attention(model, on_gpu)
    if config.gradient_checkpointing:
        # ZeRO-3 frees weights between forward and recomputation, which only the re-entrant form survives
        model.gradient_checkpointing_enable({"use_reentrant": config.zero_stage == 3})
        model.enable_input_require_grads()
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        rank = config.lora_rank
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    scored = ScoredModel(model, config)
    if on_gpu and config.compile:
        scored.fuse()
    return scored


def _pretrained(model_path: str, config: TrainingConfig, zero3_settings: dict[str, Any] | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype, model_config = getattr(torch, config.dtype), AutoConfig.from_pretrained(model_path)
    text_config = model_config.get_text_config()
    for name, value in text_config.to_dict().items():
        if name.endswith(("dropout", "pdrop", "layerdrop")) and value:
            setattr(text_config, name, 0.0)
    if zero3_settings is None:
        return AutoModelForCausalLM.from_pretrained(model_path, config=model_config, dtype=dtype)
    from accelerate import init_empty_weights
    from transformers.integrations import HfDeepSpeedConfig

    # transformers shards while it loads for as long as this object lives
    sharding = HfDeepSpeedConfig(zero3_settings)
    model = AutoModelForCausalLM.from_pretrained(model_path, config=model_config, dtype=dtype)
    del sharding
    # DeepSpeed creates every tensor of a sharded model in the training dtype: rotary frequencies in bfloat16 are off by up to
    # 0.4 %, which moves distant tokens. The computed buffers come from a model that has nothing else.
    with init_empty_weights(include_buffers=False):
        exact = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    stored = model.state_dict()
    for name, buffer in exact.named_buffers():
        if name not in stored:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return model
