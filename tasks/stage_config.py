"""What all stages of training are told: who trains, how weights are updated, and what of that makes two runs the same. No torch."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.training_config import TrainingConfig, WorkersConfig

MEMORY_ONLY = {"micro_batch_tokens", "logit_tokens", "gradient_checkpointing", "offload", "compile"}
"""Fields of `TrainingConfig` that bound memory and time, and leave the result as it is but for rounding."""


class StageConfig(WorkersConfig):
    """A stage of training: one checkpoint in, another one out."""

    indifferent: ClassVar[frozenset[str]] = frozenset(WorkersConfig.model_fields)
    """Fields that leave the result as it is: they may change between an interruption and its continuation."""

    training: TrainingConfig = Field(
        default_factory=TrainingConfig, title="Training", description="Precision, sharding, optimiser, adapters."
    )

    def recipe(self) -> dict[str, Any]:
        """The fields that make the result."""
        left_out: dict[str, Any] = dict.fromkeys(self.indifferent, True)
        return self.model_dump(mode="json", exclude=left_out | {"training": MEMORY_ONLY})


class DevelopmentConfig(BaseModel):
    """Looks at a model in training: its unguided answers to the prompts of the split `dev`, without a judge."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    every_steps: int = Field(20, ge=1, title="Steps between looks", description="How often; the last step is looked at in any case.")
    measure: Literal["verdict_accuracy", "policy_retrieval", "format_adherence"] = Field(
        "verdict_accuracy", title="Measure", description="The step whose weights are kept is the one that is best by this."
    )
    over_refusal: float = Field(
        0.05, ge=0, le=1, title="Over-refusal", description="So much above its share before training over-refusal may be in what is kept."
    )
    patience: int = Field(3, ge=1, title="Patience", description="Training ends after so many looks in a row that are not the best.")
    max_tokens: int = Field(512, ge=16, title="Answer length", description="Longest answer, in tokens.")
    temperature: float = Field(0.7, gt=0, le=2, title="Temperature", description="Sampling temperature.")
    seed: int = Field(0, ge=0, title="Seed", description="Seed of the answers.")


class OfflineConfig(StageConfig):
    """A stage that learns from rows on disk."""

    epochs: int = Field(2, ge=1, title="Epochs", description="How often every row is seen.")
    rows_per_step: int = Field(
        32, ge=1, title="Rows a step", description="Rows (for DPO pairs) of one optimiser step, over all ranks together."
    )
    length_grouping: bool = Field(
        False, title="Length grouping", description="Rows of a step are of similar length; which step is which stays random."
    )
    development: DevelopmentConfig | None = Field(
        None, title="Development", description="Looks at the model while it trains, keeps the best step and ends early."
    )


class SftConfig(OfflineConfig):
    """Supervised fine-tuning, on the selected rows or on all that passed the threshold."""

    rows: int | None = Field(
        None, ge=1, title="Rows", description="Most policy rows, as many of each category as there are; left out, all of them."
    )

    capability_ratio: float = Field(
        0.5, ge=0, title="Capability ratio", description="Capability rows mixed in per policy row, as far as there are any."
    )


class DpoTrainingConfig(TrainingConfig):
    """How weights are updated in DPO: in smaller steps than in SFT."""

    learning_rate: float = Field(1e-6, gt=0, title="Learning rate", description="Peak learning rate of AdamW.")


class DpoConfig(OfflineConfig):
    """Direct preference optimisation on the pairs of the dataset."""

    epochs: int = Field(1, ge=1, title="Epochs", description="How often every pair is seen.")
    beta: float = Field(
        0.1, gt=0, title="Beta", description="How strongly the policy is held to where it started; smaller lets it go further away."
    )
    nll: float = Field(
        0.2,
        ge=0,
        title="NLL weight",
        description="Weight of the chosen completion's own loss per token, without which both log-probabilities tend to sink.",
    )
    training: DpoTrainingConfig = Field(
        default_factory=DpoTrainingConfig, title="Training", description="Precision, sharding, optimiser, adapters."
    )
