"""RL: GRPO and its relatives on rollouts from vLLM engines, rewarded by a judge that never sees the thought.

`rl_loop` is the whole job, run by every rank: push weights, draw and judge, write the rollouts, learn. The rollouts of a step are written
once (`rollouts` ledger); a run that is started again reads them and draws nothing twice, and `replay` trains from them without an engine.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from cluster.causal_model import TokenScores
from cluster.deepspeed_engine import TrainingEngine
from cluster.errors import Diverged, SpecmillError
from cluster.training import agreed, report, resume, run_workers
from tasks import tables
from tasks.advantages import spread_over_tokens
from tasks.batch import MicroBatch, Row, micro_batches
from tasks.collect import Collected, PromptOrder, Source, collect, prompt_seed, trained
from tasks.ledger import Ledger
from tasks.losses import TokenLoss, policy_gradient, reference_kl
from tasks.progress import Progress
from tasks.rl_config import RlConfig
from tasks.rl_metrics import alarms, describe
from tasks.rollout import DRAW, DrawShard
from tasks.store import Store
from tasks.trackers import Mirror
from tasks.training_log import FILES, TrainingLog, followed, last_line

STAGE = "rollouts"
PROBE_TOKENS = 16
"""How many tokens of each engine tell whether it took the last weights."""
KL_STEP, KL_BOUND = 0.1, 0.2
"""How fast the weight of the KL follows its target, and the largest error that counts (Ziegler et al., arXiv 1909.08593, section 2.2)."""


@dataclass(frozen=True)
class RlJob:
    """Everything that a rank needs. Without a `source` of rollouts they are those that lie under the root: a replay."""

    root: str
    id: str
    start_path: str
    output: str
    weights_file: str
    config: RlConfig
    source: Source | None
    sync_tolerance: float


def sync_tolerance(config: RlConfig, engine_dtype: str) -> float:
    """The configured tolerance, or what the precisions of trainer and engine allow (measured: 5e-6 and 0.04)."""
    exact = config.training.dtype == engine_dtype == "float32"
    return config.sync_tolerance or (5e-5 if exact else 0.1)


def train_rl(job: RlJob, storage: str, progress: Progress | None = None, mirror: Mirror | None = None) -> dict[str, Any]:
    """Runs the job on Ray Train; the same storage continues an interrupted one. Returns the last step's metrics."""
    config = job.config
    with followed(_log(job), config.steps, progress or Progress("rl", "steps"), mirror or Mirror({})):
        run_workers(rl_loop, {"job": job}, config, storage=storage, name="train")
    return last_line(_log(job))


def rl_loop(config: dict[str, Any]) -> None:
    """The SPMD loop: every rank runs it; rank 0 also talks to the engines."""
    job: RlJob = config["job"]
    settings = job.config
    engine = TrainingEngine(job.start_path, settings.training, settings.steps)
    state = resume(engine, _log(job).parent) or {"step": 0, "kl": settings.kl, "groups": 0}
    rollouts = Rollouts(job, engine, state["groups"])
    log = TrainingLog(_log(job), state["step"]) if engine.rank == 0 else None
    kl, saving, ended = state["kl"], 0.0, time.monotonic()
    for step in range(state["step"], settings.steps):
        rows, seconds = rollouts.of(step)
        on_policy = "rollout_seconds" in seconds and rows[0]["policy_version"] == step
        started = time.monotonic()
        batches = _batches(trained(rows), settings, engine)
        try:
            metrics = engine.step(batches, _loss(engine, batches, settings, kl), settings.temperature)
        except Diverged as error:
            prompts = ", ".join(sorted({row["prompt_id"] for row in trained(rows)}))
            raise Diverged(f"RL step {step}, rollouts of {prompts}: {error}") from error
        if on_policy:
            rollouts.verify(step, metrics["rollout_mismatch"])
        metrics |= describe(rows) | seconds | {"step": step, "kl_weight": kl, "train_seconds": time.monotonic() - started}
        kl = _steered(kl, metrics.get("reference_kl"), settings.kl_target)
        if step + 1 == settings.steps:
            measuring = time.monotonic()
            metrics |= rollouts.forward_kl()
            metrics["forward_kl_seconds"] = time.monotonic() - measuring
            if job.source:
                metrics["last_push_mismatch"] = rollouts.push(step + 1, metrics)
        whole, ended = time.monotonic() - ended, time.monotonic()
        metrics |= {"step_seconds": whole, "checkpoint_seconds": saving, "tokens_per_second": metrics["rollout_tokens"] / whole}
        if log:
            found = alarms([*log.lines, metrics])
            log.append(metrics | ({"alarms": [[alarm.name, alarm.text] for alarm in found]} if found else {}))
            if found and settings.alarm == "stop":
                raise Diverged(f"RL step {step}: {found[0].text} (rl.alarm: stop; with `say` the run goes on from its rollouts)")
        due = (step + 1) % settings.save_every_steps == 0 and step + 1 < settings.steps  # what follows the last step is the export
        state = {"step": step + 1, "kl": kl, "groups": rollouts.groups}
        saving = report(metrics, engine, state, _log(job).parent, FILES) if due else 0.0
    engine.export(job.output)


class Rollouts:
    """The rollouts of each step for all ranks: rank 0 has them drawn, writes them and reads them; the others read what it wrote."""

    def __init__(self, job: RlJob, engine: TrainingEngine, groups: int) -> None:
        self._job, self._engine = job, engine
        self.groups = groups
        """Groups that were drawn so far: the next one's number."""
        self._store = Store(job.root)
        self._ledger = Ledger(self._store, f"{STAGE}/{job.id}")
        self._ahead: Future[Collected] | None = None
        self._thread = ThreadPoolExecutor(1)

    def of(self, step: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The rows of a step, from the ledger or from the engines, and the seconds that they took. All ranks call it together."""
        seconds: dict[str, float] = {}
        rows = self._agreed(step)
        if rows is None:
            if self._job.source is None:
                raise SpecmillError(f"{self._job.root}: no rollouts of step {step} are recorded; there is nothing to replay from there on.")
            if self._ahead is None:
                self.push(step, seconds)
            made = Collected()
            if self._engine.rank == 0:
                made = self._ahead.result() if self._ahead else self._collect(step, step)
            rows = self._await(step)
            seconds |= {"rollout_seconds": made.rollout_seconds, "judge_seconds": made.judge_seconds}
        self._ahead = None
        self.groups = 1 + max(row["group"] for row in rows)
        if self._job.config.one_step_off and self._job.source and step + 1 < self._job.config.steps and self._agreed(step + 1) is None:
            self.push(step, seconds)
            self._ahead = self._thread.submit(self._collect, step + 1, step) if self._engine.rank == 0 else Future()
        return rows, seconds

    def verify(self, step: int, mismatch: float) -> None:
        """Raises SpecmillError when the rollouts of a step were not drawn with its weights; they are thrown away then."""
        if self._engine.rank == 0 and not mismatch <= self._job.sync_tolerance:
            self._ledger.commit(lost=self._shards(step))
        _verify_sync(mismatch, self._job.sync_tolerance, step)

    def push(self, version: int, seconds: dict[str, float]) -> float:
        """Gives the engines the trainer's weights; returns the mean difference of log-probabilities on a few tokens of each engine.

        Adds the time to `sync_seconds`.
        """
        started = time.monotonic()
        self._engine.write_weights(self._job.weights_file, version)
        if self._engine.rank == 0 and self._job.source:
            self._job.source.policy.load_weights(self._job.weights_file, version)
        rows = agreed(self._probe(version) if self._engine.rank == 0 else [])
        mismatch = _token_mean(self._engine, rows, self._job.config, lambda logp, drawn: (logp - drawn).abs())
        _verify_sync(mismatch, self._job.sync_tolerance, version)
        seconds["sync_seconds"] = seconds.get("sync_seconds", 0.0) + time.monotonic() - started
        return mismatch

    def forward_kl(self) -> dict[str, float]:
        """KL of the policy to where RL began, in nats a token, on what it drew then: it foretells what is forgotten (arXiv 2509.04259).

        Nothing where those rollouts are gone.
        """
        first = self._agreed(0)
        if first is None:
            return {}
        rows = [_row(row["prompt_ids"], row["token_ids"], rollout=row["logprobs"]) for row in first]
        return {"forward_kl": _token_mean(self._engine, rows, self._job.config, lambda logp, drawn: drawn - logp)}

    def _collect(self, step: int, version: int) -> Collected:
        assert self._job.source
        made = collect(self._job.source, step, version, self.groups)
        table = pa.Table.from_pylist(made.rows, schema=tables.ROLLOUTS)
        self._ledger.commit([self._store.put_table(_folder(self._job.id, step), table)], lost=self._shards(step))
        return made

    def _shards(self, step: int) -> list[str]:
        """Files of a step's rollouts that the ledger names."""
        return [shard.path for shard in self._ledger.shards() if shard.path.startswith(f"{_folder(self._job.id, step)}/")]

    def _agreed(self, step: int) -> list[dict[str, Any]] | None:
        """The rows of a step that lie there, the same on every rank."""
        there = agreed(self._committed(step) is not None if self._engine.rank == 0 else None)
        return self._await(step) if there else None

    def _committed(self, step: int) -> list[dict[str, Any]] | None:
        for path in self._shards(step):
            if self._store.exists(path):
                return list(self._store.read_table(path).to_pylist())
        return None

    def _await(self, step: int) -> list[dict[str, Any]]:
        """The rows that rank 0 is collecting. Waits on the store: a collective would time out while engines and judges work."""
        while (rows := self._committed(step)) is None:
            time.sleep(1)
        return rows

    def _probe(self, version: int) -> list[Row]:
        """What each engine draws, with its log-probabilities, under the weights that it was given last."""
        source, config = self._job.source, self._job.config
        assert source
        order, length = PromptOrder(source.prompts, config.mix, config.seed), min(PROBE_TOKENS, config.max_tokens)
        shards = [
            DrawShard(source.model_path, (order.at(number),), 1, length, config.temperature, prompt_seed(config, number))
            for number in range(len(source.policy.actors))
        ]
        drawn = [answer for done in source.policy.map(DRAW, shards) for answer in done.result]
        return [_row(answer.prompt_ids, answer.completion.token_ids, rollout=answer.completion.logprobs) for answer in drawn]


def _token_mean(
    engine: TrainingEngine, rows: list[Row], config: RlConfig, measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> float:
    """Mean over the learnt tokens of all rows of a measure of two log-probabilities: the trainer's and those that came with the rows."""
    batches = micro_batches(rows, config.training.micro_batch_tokens, engine.rank, engine.world_size)

    def sums(scores: TokenScores, batch: MicroBatch) -> torch.Tensor:
        return torch.stack([(measure(scores.logp, batch.values["rollout"]) * batch.mask).sum(), batch.mask.sum()]).double()

    total = torch.stack(engine.evaluate(batches, sums, config.temperature)).sum(0)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _log(job: RlJob) -> Path:
    """The metrics of the job, one line a step."""
    return Path(job.output).parent / "metrics.jsonl"


def _row(prompt_ids: list[int], token_ids: list[int], **values: list[float]) -> Row:
    return Row([*prompt_ids, *token_ids], len(prompt_ids), values)


def _batches(rows: list[dict[str, Any]], settings: RlConfig, engine: TrainingEngine) -> list[MicroBatch]:
    """This rank's micro-batches of a step."""
    learnt = [
        _row(
            row["prompt_ids"],
            row["token_ids"],
            rollout=row["logprobs"],
            advantage=spread_over_tokens(row["advantage"], row["thought_tokens"], len(row["token_ids"]), settings.target),
        )
        for row in rows
    ]
    return micro_batches(learnt, settings.training.micro_batch_tokens, engine.rank, engine.world_size)


def _loss(
    engine: TrainingEngine, batches: list[MicroBatch], settings: RlConfig, kl: float
) -> Callable[[TokenScores, MicroBatch], TokenLoss]:
    """The loss of a micro-batch: clipped policy gradient plus KL to the checkpoint that RL starts from."""
    kept: list[torch.Tensor] = []
    if settings.kl:
        kept = engine.evaluate(batches, lambda scores, batch: scores.logp, settings.temperature, reference=True)
    references = iter(kept)

    def loss(scores: TokenScores, batch: MicroBatch) -> TokenLoss:
        values, logp = batch.values, scores.logp
        # one step off, the ratio is taken to the policy that drew; fresh rollouts are this one's, but for the engine's numerics
        old = values["rollout"] if settings.one_step_off else logp.detach()
        clip = (settings.clip_low, settings.clip_high)
        result = policy_gradient(logp, old, values["rollout"], values["advantage"], batch.mask, clip, settings.tis_cap)
        result = TokenLoss(result.loss, {**result.stats, "entropy": scores.entropy * batch.mask})
        return result.plus(reference_kl(logp, old, next(references), batch.mask), kl) if kept else result

    return loss


def _steered(kl: float, measured: float | None, target: float | None) -> float:
    """The next step's weight of the KL: larger where the policy is further away than it should be."""
    if target is None or measured is None:
        return kl
    return kl * (1 + KL_STEP * max(-KL_BOUND, min(KL_BOUND, measured / target - 1)))


def _verify_sync(mismatch: float, tolerance: float, version: int) -> None:
    """The engine must have sampled with the trainer's weights: a stale or half-loaded engine shows in the log-probabilities."""
    if not mismatch <= tolerance:  # a NaN is no agreement either
        raise SpecmillError(
            f"RL weights of version {version}: engine and trainer disagree by {mismatch:.2e} per token "
            f"(rl.sync_tolerance: {tolerance:.0e}). The engine did not take the weights, or its precision is lower than the trainer's."
        )


def _folder(job: str, step: int) -> str:
    """Where the rollouts of a step lie."""
    return f"{STAGE}/{job}/step-{step:06d}"
