"""How much of this machine's memory CPU engines and ranks take, and how much is free. Of a cluster's nodes nothing is known here.

Estimates in GiB; 0 for what works on GPUs, on a server elsewhere, on a cluster that `RAY_ADDRESS` names, or without a model.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.engine import EngineConfig
from cluster.errors import UserError
from cluster.models import Model, weight_count
from cluster.training_config import TrainingConfig, WorkersConfig

ENGINE_GIB = 1.5
"""Memory of a CPU engine beside weights and KV cache: two Python processes with torch (measured: 1.3 GiB)."""
RANK_GIB = 1.0
"""Memory of a rank beside its model: a Python process with torch, Ray and DeepSpeed."""
END_SECONDS = 5
"""How long the memory of engines that are ended may take to be free."""


def free_gib() -> float:
    """Memory that is free, or would be if it were asked for."""
    return psutil.virtual_memory().available / 2**30


def require_free(gib: float, told: Callable[[float], str]) -> None:
    """Raises UserError, with what `told` makes of the free memory, when there is less; what is ending gets seconds to free its own."""
    deadline = time.monotonic() + END_SECONDS
    while (free := free_gib()) < gib:
        if time.monotonic() > deadline:
            raise UserError(told(free))
        time.sleep(0.2)


def engines_gib(config: EngineConfig, model: Model) -> float:
    """Memory of the engines of a pool."""
    if config.backend != "vllm" or config.gpus or "RAY_ADDRESS" in os.environ:
        return 0.0
    weights = sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors")) / 2**30
    return config.engines * ((2 if config.dtype == "float32" else 1) * weights + config.kv_cache_gib + ENGINE_GIB)


def ranks_gib(model_path: str, workers: WorkersConfig, training: TrainingConfig, reference: bool = False) -> float:
    """Memory of the ranks of a stage of training. `reference`: whether every rank holds a second, frozen copy.

    Weights, gradients and AdamW's state take 16 bytes a weight, in bfloat16 18, since gradients are summed in float32 (see Rajbhandari et
    al., arXiv 1910.02054, section 3.1); with adapters, all but the weights is next to nothing.
    """
    if workers.gpus_per_rank or "RAY_ADDRESS" in os.environ:
        return 0.0
    size = 4 if training.dtype == "float32" else 2
    parts = {1: 16 - 2 * size, 2: 4, 3: size}  # optimiser, gradients, weights, by the ZeRO stage that shares them out
    held = {stage: part for stage, part in parts.items() if stage == 3 or not training.lora_rank}
    each = sum(part * (1 if training.zero_stage >= stage else workers.ranks) for stage, part in held.items())
    each += size + size * workers.ranks * (reference and not training.lora_rank)  # what is exported, and the reference
    return each * weight_count(model_path) / 2**30 + workers.ranks * (RANK_GIB + _batch_gib(model_path, training))


def _batch_gib(model_path: str, training: TrainingConfig) -> float:
    """What a rank holds between the forward and the backward pass of a micro-batch.

    17 numbers a token and hidden unit in each layer (Korthikanti et al., arXiv 2205.05198, section 4.1; attention writes no scores), or one
    and a layer's, if layers are computed again; and five times the logits in float32 (`cluster.causal_model.score`).
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path).get_text_config()
    layers, tokens = config.num_hidden_layers, training.micro_batch_tokens
    numbers = 17 + layers if training.gradient_checkpointing else 17 * layers
    hidden = tokens * config.hidden_size * numbers * (4 if training.dtype == "float32" else 2)
    return (hidden + 5 * 4 * min(tokens, training.logit_tokens) * config.vocab_size) / 2**30
