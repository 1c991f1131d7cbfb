"""RL: GRPO with rollouts from a vLLM engine, reward from a judge that never sees the thought, weights pushed and verified each step.

`rl_loop` is the whole job, run by every rank: push weights, draw, judge, write the rollouts, learn. The rollouts of a step are written once
(`rollouts` ledger); a run that is started again reads them and draws nothing twice.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from pydantic import Field

from cluster.deepspeed_engine import TrainingEngine
from cluster.errors import SpecmillError
from cluster.fleet import Fleet
from cluster.models import Model
from cluster.training import report, resume, run_workers
from cluster.training_config import TrainingConfig
from cluster.weight_transfer import write_weights
from tasks import tables
from tasks.batch import MicroBatch, Row, micro_batches
from tasks.judge import JudgeConfig
from tasks.keys import KEY_BYTES, digest
from tasks.ledger import Ledger
from tasks.losses import AdvantageKind, TokenLoss, group_advantages, policy_gradient, reference_kl, token_logprobs
from tasks.policy import Spec
from tasks.progress import Progress
from tasks.prompts import Prompt
from tasks.rollout import DRAW, Drawn, DrawShard, blind_shards, in_parts, reward, verdicts_of
from tasks.store import Store
from tasks.thoughts import Malformed
from tasks.training_log import append_line, followed, keep_lines, last_line
from tasks.validation import Strict

STAGE = "rollouts"
FLOOR = 0.0
"""Reward of a completion that no judge is shown: truncated, or without exactly one closed thought."""
PROBE_TOKENS = 16
"""How many tokens of each engine tell whether it took the last weights."""


class RlTrainingConfig(TrainingConfig):
    """How weights are updated in RL: in far smaller steps than in SFT."""

    learning_rate: float = Field(1e-6, gt=0, title="Learning rate", description="Peak learning rate of AdamW.")


class RlConfig(Strict):
    """How the policy learns from its own answers."""

    steps: int = Field(2, ge=1, title="Steps", description="Optimiser steps; each draws fresh rollouts.")
    prompts_per_step: int = Field(8, ge=1, title="Prompts per step", description="Groups of a step.")
    rollouts_per_prompt: int = Field(4, ge=2, title="Rollouts per prompt", description="Size of a group; advantages compare within it.")
    max_tokens: int = Field(1024, ge=16, title="Rollout length", description="Longest rollout, in tokens; a cut one gets the floor.")
    temperature: float = Field(1.0, gt=0, le=2, title="Temperature", description="Sampling temperature of rollouts.")
    judge_runs: int = Field(1, ge=1, title="Judge runs", description="Blind judge runs per answer; the reward is their mean.")
    kl: float = Field(0.02, ge=0, title="KL weight", description="Weight of the ratio-weighted KL to the checkpoint RL starts from.")
    clip_low: float = Field(0.2, gt=0, lt=1, title="Lower clip", description="Lower bound of the ratio.")
    clip_high: float = Field(0.28, gt=0, title="Upper clip", description="Upper bound of the ratio (clip-higher).")
    advantage: AdvantageKind = Field(
        "grpo", title="Advantage", description="grpo: spread of the group divided out; dr_grpo: not; rloo: against the mean of the others."
    )
    sync_tolerance: float | None = Field(
        None,
        gt=0,
        title="Sync tolerance",
        description="Largest mean difference of log-probabilities between trainer and engine; by default that of their precision.",
    )
    seed: int = Field(0, ge=0, title="Seed", description="Seed of prompt order and rollouts.")
    ranks: int = Field(1, ge=1, title="Ranks", description="Processes that train together; fixed for the life of a run.")
    cpus_per_rank: float = Field(1.0, gt=0, title="CPUs a rank", description="What Ray sets aside for each rank.")
    gpus_per_rank: int = Field(0, ge=0, le=1, title="GPUs a rank", description="0 trains on the CPU, 1 on a GPU for each rank.")
    training: RlTrainingConfig = Field(RlTrainingConfig(), title="Training", description="DeepSpeed settings.")


@dataclass(frozen=True)
class RlJob:
    """Everything that a rank needs. `policy` receives weights and never judges; `judge` keeps its weights for the whole run."""

    root: str
    id: str
    start_path: str
    output: str
    weights_file: str
    config: RlConfig
    prompts: tuple[Prompt, ...]
    specs: dict[str, Spec]
    policy: Fleet
    judge: Fleet
    judge_model: Model
    judge_config: JudgeConfig
    sync_tolerance: float


def sync_tolerance(config: RlConfig, engine_dtype: str) -> float:
    """The configured tolerance, or what the precisions of trainer and engine allow (measured: 5e-6 and 0.04)."""
    exact = config.training.dtype == engine_dtype == "float32"
    return config.sync_tolerance or (5e-5 if exact else 0.1)


def train_rl(job: RlJob, storage: str, progress: Progress | None = None) -> dict[str, Any]:
    """Runs the job on Ray Train; the same storage continues an interrupted one. Returns the last step's metrics."""
    config = job.config
    with followed(_log(job), config.steps, progress or Progress("rl", "steps")):
        run_workers(
            rl_loop,
            {"job": job},
            ranks=config.ranks,
            cpus_per_rank=config.cpus_per_rank,
            gpus_per_rank=config.gpus_per_rank,
            storage=storage,
            name="train",
        )
    return last_line(_log(job))


def rl_loop(config: dict[str, Any]) -> None:
    """The SPMD loop: every rank runs it; rank 0 also talks to the engines."""
    job: RlJob = config["job"]
    settings = job.config
    engine = TrainingEngine(job.start_path, settings.training, settings.steps)
    first = (resume(engine) or {"step": 0})["step"]
    store = Store(job.root)
    if engine.rank == 0:
        keep_lines(_log(job), first)
    for step in range(first, settings.steps):
        started = time.monotonic()
        rows = _agree(_committed(store, job.id, step) if engine.rank == 0 else None)
        if rows is None:
            write_weights(job.weights_file, engine.named_weights(), engine.rank)
            rows = _collect(store, job, step) if engine.rank == 0 else _await(store, job.id, step)
        collected = time.monotonic()
        batches, signal = _batches(rows, settings, engine)
        metrics = engine.step(batches, _loss(engine, batches, settings))
        _verify_sync(metrics["rollout_mismatch"], job.sync_tolerance, step)
        scores = [row["reward"] for row in rows if row["reward"] is not None]
        metrics |= signal | {
            "step": step,
            "reward": sum(scores) / max(1, len(scores)),
            "rollout_seconds": collected - started,
            "train_seconds": time.monotonic() - collected,
        }
        if step + 1 == settings.steps:
            metrics["last_push_mismatch"] = _last_push(job, engine)
            _verify_sync(metrics["last_push_mismatch"], job.sync_tolerance, step + 1)
        if engine.rank == 0:
            append_line(_log(job), metrics)
        if step + 1 < settings.steps:  # what follows the last step is the export
            report(metrics, engine, {"step": step + 1})
    engine.export(job.output)


def step_prompts(prompts: Sequence[Prompt], step: int, count: int, seed: int) -> list[Prompt]:
    """The prompts of a step: whole passes over a shuffle that the seed fixes, one after the other."""
    ranked = sorted(prompts, key=lambda prompt: digest([seed, prompt.id]))
    return [ranked[(step * count + number) % len(ranked)] for number in range(count)]


def rollout_key(job: str, step: int, prompt: str, sample: int) -> bytes:
    """The key of a rollout: which job, step, prompt and sample."""
    return bytes.fromhex(digest([STAGE, job, step, prompt, sample]))[:KEY_BYTES]


def _log(job: RlJob) -> Path:
    """The metrics of the job, one line a step."""
    return Path(job.output).parent / "metrics.jsonl"


def _collect(store: Store, job: RlJob, step: int) -> list[dict[str, Any]]:
    """Draws and judges the rollouts of a step under policy version `step`, writes them, returns their rows."""
    settings = job.config
    job.policy.load_weights(job.weights_file, step)
    prompts = step_prompts(job.prompts, step, settings.prompts_per_step, settings.seed)
    by_id = {prompt.id: prompt for prompt in prompts}
    seed = settings.seed + 7919 * step
    shards = [
        DrawShard(job.start_path, part, settings.rollouts_per_prompt, settings.max_tokens, settings.temperature, seed)
        for part in in_parts(prompts, len(job.policy.actors))
    ]
    drawn = [answer for done in job.policy.map(DRAW, shards) for answer in done.result]
    drawn.sort(key=lambda answer: (answer.prompt_id, answer.sample))
    runs = job.judge_config.model_copy(update={"k": settings.judge_runs})
    judged = blind_shards([answer for answer in drawn if answer.earns], by_id, job.specs, runs)
    verdicts = verdicts_of(job.judge, judged)
    rows = [_row(job, step, answer, by_id[answer.prompt_id], verdicts.get(answer.name, [])) for answer in drawn]
    table = pa.Table.from_pylist(rows, schema=tables.ROLLOUTS)
    Ledger(store, f"{STAGE}/{job.id}").commit([store.put_table(_folder(job.id, step), table)])
    return table.to_pylist()


def _row(job: RlJob, step: int, answer: Drawn, prompt: Prompt, verdicts: list) -> dict[str, Any]:
    malformed = answer.parts.reason if isinstance(answer.parts, Malformed) else None
    earned = reward(verdicts) if answer.earns else FLOOR
    return {
        "key": rollout_key(job.id, step, prompt.id, answer.sample),
        "prompt_id": prompt.id,
        "category": prompt.category,
        "ideal_verdict": prompt.ideal_verdict,
        "step": step,
        "sample": answer.sample,
        "seed": answer.seed,
        "policy_version": step,
        "prompt_ids": answer.prompt_ids,
        "token_ids": answer.completion.token_ids,
        "logprobs": answer.completion.logprobs,
        "finish_reason": answer.completion.finish_reason,
        "thought_tokens": 0 if malformed else answer.parts.thought_tokens,  # type: ignore[union-attr]
        "malformed": malformed,
        "verdicts": [verdict.raw for verdict in verdicts],
        "spec_hash": job.specs[prompt.category].hash,
        "judge": job.judge_model.id,
        "judge_revision": job.judge_model.revision,
        "reward": earned,
        "quarantined": "no verdict could be parsed" if earned is None else None,
    }


def _batches(rows: list[dict[str, Any]], settings: RlConfig, engine: TrainingEngine) -> tuple[list[MicroBatch], dict[str, float]]:
    """This rank's micro-batches of a step, and what the rewards say: groups with a spread, share of the floor."""
    size = settings.rollouts_per_prompt
    rewards = torch.tensor([math.nan if row["reward"] is None else row["reward"] for row in rows]).view(-1, size)
    advantages = group_advantages(rewards, settings.advantage)
    learnt = [
        Row(
            [*row["prompt_ids"], *row["token_ids"]],
            len(row["prompt_ids"]),
            {"rollout": row["logprobs"], "advantage": [value] * len(row["token_ids"])},
        )
        for row, value in zip(rows, advantages.values.flatten().tolist(), strict=True)
    ]
    judged = sum(1 for row in rows if not row["malformed"] and row["finish_reason"] == "stop")
    signal = {"effective_groups": float(advantages.effective_groups), "judged_share": judged / len(rows)}
    return micro_batches(learnt, settings.training.micro_batch_tokens, engine.rank, engine.world_size), signal


def _loss(engine: TrainingEngine, batches: list[MicroBatch], settings: RlConfig) -> Any:
    """The loss of a micro-batch: clipped policy gradient plus KL to the checkpoint that RL starts from."""
    kept: dict[int, torch.Tensor] = {}
    if settings.kl:
        logprobs = engine.evaluate(
            batches, lambda logits, batch: token_logprobs(logits, batch.targets, settings.temperature), reference=True
        )
        kept = {id(batch): value for batch, value in zip(batches, logprobs, strict=True)}
    order = iter(batches)

    def loss(logits: torch.Tensor, batch: MicroBatch) -> TokenLoss:
        reference = kept.get(id(next(order)))
        logp = token_logprobs(logits, batch.targets, settings.temperature)
        values = batch.values
        clip = (settings.clip_low, settings.clip_high)
        result = policy_gradient(logp, logp.detach(), values["rollout"], values["advantage"], batch.mask, clip)
        if reference is None:
            return result
        return result.plus(reference_kl(logp, logp.detach(), reference, batch.mask), settings.kl)

    return loss


def _last_push(job: RlJob, engine: TrainingEngine) -> float:
    """Pushes the final weights and returns the mean difference of log-probabilities on a few tokens of each engine.

    No step draws rollouts under these weights, so no step would notice that the engines did not take them.
    """
    write_weights(job.weights_file, engine.named_weights(), engine.rank)
    rows: list[Row] = _agree(_probe(job) if engine.rank == 0 else None)
    batches = micro_batches(rows, job.config.training.micro_batch_tokens, engine.rank, engine.world_size)

    def difference(logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        logp = token_logprobs(logits, batch.targets, job.config.temperature)
        return torch.stack([((logp - batch.values["rollout"]).abs() * batch.mask).sum(), batch.mask.sum()]).double()

    total = torch.stack(engine.evaluate(batches, difference)).sum(0)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _probe(job: RlJob) -> list[Row]:
    """What each engine draws, with its log-probabilities, under the weights that lie in the file."""
    settings = job.config
    job.policy.load_weights(job.weights_file, settings.steps)
    length = min(PROBE_TOKENS, settings.max_tokens)
    shards = [
        DrawShard(job.start_path, (prompt,), 1, length, settings.temperature, settings.seed)
        for prompt in step_prompts(job.prompts, settings.steps, len(job.policy.actors), settings.seed)
    ]
    drawn = [answer for done in job.policy.map(DRAW, shards) for answer in done.result]
    return [
        Row([*answer.prompt_ids, *answer.completion.token_ids], len(answer.prompt_ids), {"rollout": answer.completion.logprobs})
        for answer in drawn
    ]


def _verify_sync(mismatch: float, tolerance: float, step: int) -> None:
    """The engine must have sampled with the trainer's weights: a stale or half-loaded engine shows in the log-probabilities."""
    if not mismatch <= tolerance:  # a NaN is no agreement either
        raise SpecmillError(
            f"RL weights of version {step}: engine and trainer disagree by {mismatch:.2e} per token (rl.sync_tolerance: {tolerance:.0e}). "
            "The engine did not take the weights, or its precision is lower than the trainer's."
        )


def _committed(store: Store, job: str, step: int) -> list[dict[str, Any]] | None:
    """The rows of a step that an earlier attempt wrote, or None."""
    for shard in Ledger(store, f"{STAGE}/{job}").shards():
        if shard.path.startswith(_folder(job, step)) and store.exists(shard.path):
            return list(store.read_table(shard.path).to_pylist())
    return None


def _folder(job: str, step: int) -> str:
    """Where the rollouts of a step lie."""
    return f"{STAGE}/{job}/step-{step:06d}"


def _await(store: Store, job: str, step: int) -> list[dict[str, Any]]:
    """The rows that rank 0 is collecting. Waits on the store: a collective would time out while engines and judges work."""
    while (rows := _committed(store, job, step)) is None:
        time.sleep(1)
    return rows


def _agree(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
