"""How the policy learns from its own answers: the configuration of RL. No torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.engine import EngineConfig
from cluster.training_config import TrainingConfig
from tasks.prompts import Cell
from tasks.rewards import RewardConfig
from tasks.stage_config import StageConfig

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]
NoiseRule = Literal["shrink", "drop", "keep"]
Target = Literal["all", "answer"]


class RlTrainingConfig(TrainingConfig):
    """How weights are updated in RL: in far smaller steps than in SFT."""

    learning_rate: float = Field(1e-6, gt=0, title="Learning rate", description="Peak learning rate of AdamW.")


class RlConfig(StageConfig):
    """How the policy learns from its own answers."""

    indifferent = StageConfig.indifferent | {"sync_tolerance", "held_out", "alarm"}

    steps: int = Field(2, ge=1, title="Steps", description="Optimiser steps; each draws fresh rollouts.")
    prompts_per_step: int = Field(8, ge=1, title="Prompts per step", description="Groups of a step.")
    rollouts_per_prompt: int = Field(4, ge=2, title="Rollouts per prompt", description="Size of a group; advantages compare within it.")
    refills: int = Field(
        1,
        ge=0,
        title="Refills",
        description="How often, at most, groups whose rewards teach nothing are replaced by groups of further prompts in a step.",
    )
    mix: dict[Cell, Annotated[float, Field(gt=0)]] = Field(
        {},
        title="Mix",
        description="Cell -> weight of its prompts in a step; cells that are not named are not drawn. Left out, all cells weigh the same: "
        "harmful prompts alone teach a model to refuse without a thought.",
    )
    max_tokens: int = Field(1024, ge=16, title="Rollout length", description="Longest rollout, in tokens; a cut one gets the floor.")
    temperature: float = Field(1.0, gt=0, le=2, title="Temperature", description="Sampling temperature of rollouts.")
    one_step_off: bool = Field(
        False,
        title="One step off",
        description="Draw the rollouts of the next step while this one trains, with the weights of before it.",
    )
    reward: RewardConfig = Field(RewardConfig(), title="Reward")
    judge_runs: int = Field(
        1,
        ge=1,
        title="Judge runs",
        description="Blind judge runs per answer; the reward is their mean, two or more tell the judge's noise.",
    )
    noise: NoiseRule = Field(
        "shrink",
        title="Judge's noise",
        description="Groups whose rewards spread no more than the judge's own noise teach nothing; shrink: the others by how much of their "
        "spread is noise; drop: they stay as they are; keep: noise is ignored.",
    )
    held_out: EngineConfig | None = Field(
        None, title="Held-out judge", description="A judge that rewards nothing: its grades show whether the first one is being deceived."
    )
    target: Target = Field(
        "all",
        title="Reward target",
        description="all: the reward moves thought and answer; answer: the answer alone (arXiv 2511.11584), but one without a closed "
        "thought as a whole.",
    )
    kl: float = Field(
        0.02,
        ge=0,
        title="KL weight",
        description="Weight of the ratio-weighted KL to the checkpoint RL starts from; at 0 it is not measured. Without adapters each rank "
        "holds a second copy of the weights for it, whatever the ZeRO stage.",
    )
    kl_target: float | None = Field(
        None, gt=0, title="KL target", description="Nats a token that the weight of the KL is steered towards; left out, it stays."
    )
    clip_low: float = Field(
        0.2,
        gt=0,
        lt=1,
        title="Lower clip",
        description="One step off, the ratio to the policy that drew is clipped this far below 1. On fresh rollouts it is 1.",
    )
    clip_high: float = Field(0.28, gt=0, title="Upper clip", description="The same above 1 (clip-higher).")
    tis_cap: float = Field(
        2.0, ge=1, title="Correction cap", description="Fresh rollouts: largest importance weight of a token for the engine's numerics."
    )
    advantage: AdvantageKind = Field(
        "grpo", title="Advantage", description="grpo: spread of the group divided out; dr_grpo: not; rloo: against the mean of the others."
    )
    sync_tolerance: float | None = Field(
        None,
        gt=0,
        title="Sync tolerance",
        description="Largest mean difference of log-probabilities between trainer and engine; by default that of their precision.",
    )
    alarm: Literal["say", "stop"] = Field(
        "say",
        title="Alarm",
        description="What a sign of collapse or of a deceived judge does: a line on terminal and in the metrics, or the end of the run.",
    )
    seed: int = Field(0, ge=0, title="Seed", description="Seed of prompt order and rollouts.")
    save_every_steps: int = Field(
        5,
        ge=1,
        title="Steps between checkpoints",
        description="Training that an interruption can cost at most; rollouts are kept in any case.",
    )
    training: RlTrainingConfig = Field(RlTrainingConfig(), title="Training", description="DeepSpeed settings.")

    @model_validator(mode="after")
    def _steers_what_there_is(self) -> "RlConfig":
        if self.kl_target and not self.kl:
            raise ValueError("kl_target: needs a `kl` above 0 to steer")
        return self

    @property
    def asks_judge(self) -> bool:
        """Whether rewards need a judge."""
        return self.reward.source != "rules"
