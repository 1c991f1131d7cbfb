"""How weights are updated and by whom: the configuration, what DeepSpeed is told of it, the course of the learning rate. No torch."""

import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class WorkersConfig(BaseModel):
    """Who trains together, and how often what they have is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ranks: int = Field(1, ge=1, title="Ranks", description="Processes that train together; may change when a run goes on.")
    cpus_per_rank: float = Field(1.0, gt=0, title="CPUs a rank", description="What Ray sets aside for each rank.")
    gpus_per_rank: int = Field(0, ge=0, le=1, title="GPUs a rank", description="0 trains on the CPU, 1 on a GPU for each rank.")
    max_failures: int = Field(2, ge=0, title="Restarts", description="How often a lost rank may start all of them again.")
    save_every_steps: int = Field(50, ge=1, title="Steps between checkpoints", description="Work that an interruption can cost at most.")


class TrainingConfig(BaseModel):
    """How weights are updated: precision, sharding, optimiser, adapters."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        title="ZeRO stage",
        description="What ranks share out: 0 nothing, 1 optimiser state, 2 also gradients, 3 also weights.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        title="Precision",
        description="Type of weights and activations; gradients are summed in float32. On a CPU float32 makes reinforcement learning "
        "exactly on-policy. In bfloat16 a change by an adapter of less than a weight's last digit is lost in the merged model, not in its "
        "folder `adapter`.",
    )
    learning_rate: float = Field(
        2e-5,
        gt=0,
        title="Learning rate",
        description="Peak learning rate of AdamW; LoRA wants about ten times that of full fine-tuning.",
    )
    weight_decay: float = Field(0.0, ge=0, title="Weight decay", description="AdamW's decoupled weight decay.")
    warmup_ratio: float = Field(
        0.03,
        ge=0,
        lt=1,
        title="Warm-up",
        description="Share of all steps in which the learning rate rises linearly to its peak.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine",
        title="Schedule",
        description="Course of the learning rate after the warm-up; linear and cosine end at zero.",
    )
    gradient_clipping: float = Field(
        1.0, ge=0, title="Gradient clipping", description="Largest norm of the gradient; 0 turns clipping off."
    )
    micro_batch_tokens: int = Field(
        1024,
        ge=2,
        title="Tokens a micro-batch",
        description="Rows are packed up to this many tokens; it bounds memory and does not change the result.",
    )
    logit_tokens: int = Field(
        2048,
        ge=1,
        title="Logits at a time",
        description="Predictions whose logits are in memory at a time; those of longer rows are computed twice. Bounds memory only.",
    )
    offload: bool = Field(
        False,
        title="Offload",
        description="ZeRO 2 and 3 on GPUs: optimiser state, and at ZeRO-3 weights, lie in the memory of the host.",
    )
    lora_rank: int = Field(
        0,
        ge=0,
        title="LoRA rank",
        description="Rank of adapters on all linear layers, with alpha twice the rank; 0 trains all weights.",
    )
    gradient_checkpointing: bool = Field(
        False,
        title="Gradient checkpointing",
        description="Recompute activations in the backward pass: less memory, about a third more time.",
    )
    compile: bool = Field(
        False,
        title="Compile",
        description="ZeRO 0 to 2 on GPUs: fuse a layer's small operations; the first step takes up to a minute, the others less.",
    )
    seed: int = Field(0, title="Seed", description="Seeds adapter initialisation and the order of the data.")

    @model_validator(mode="after")
    def _fits_the_stage(self) -> "TrainingConfig":
        if self.offload and self.zero_stage < 2:
            raise ValueError("offload: needs zero_stage 2 or 3")
        if self.dtype == "bfloat16" and not self.zero_stage:
            raise ValueError("dtype: bfloat16 needs zero_stage 1, 2 or 3, which sum the gradients of micro-batches in float32")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile: needs zero_stage 0, 1 or 2; what ZeRO-3 does to each layer would be compiled anew again and again")
        return self

    def deepspeed_settings(self, on_gpu: bool) -> dict[str, Any]:
        """DeepSpeed's configuration of one rank."""
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # The number of micro-batches differs from step to step, so step() and not a counter ends the accumulation.
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.gradient_clipping,
            "bf16": {"enabled": self.dtype == "bfloat16"},
            # Summed in bfloat16, what the last of many micro-batches add is lost.
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": self._zero(on_gpu),
            # torch's AdamW, with offload too: DeepSpeed's own would be compiled first, on a GPU by nvcc.
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": self.learning_rate, "weight_decay": self.weight_decay, "torch_adam": True, "fused": True},
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }

    def _zero(self, on_gpu: bool) -> dict[str, Any]:
        settings: dict[str, Any] = {"stage": self.zero_stage, "overlap_comm": on_gpu and self.zero_stage >= 2}
        if self.offload:
            host = {"device": "cpu", "pin_memory": on_gpu}
            settings |= {"offload_optimizer": host} | ({"offload_param": host} if self.zero_stage == 3 else {})
        return settings

    def rate_factor(self, total_steps: int) -> Callable[[int], float]:
        """Share of the peak learning rate in step number `step` (from 0): linear warm-up, then the configured course."""
        warmup = math.ceil(self.warmup_ratio * total_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if self.schedule == "constant":
                return 1.0
            progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
            return 1.0 - progress if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

        return factor
