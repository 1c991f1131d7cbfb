"""Training on rows from disk: a checkpoint and a Parquet file in, a Hugging Face checkpoint out. What is learnt is an `Objective`.

Promises: a run that was interrupted continues at its last checkpoint with the rows that come next; a run that is finished is not
done again; `metrics.jsonl` has one line a step.
"""

import hashlib
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import Diverged, UserError
from cluster.models import context_length
from cluster.training import report, resume, run_workers
from tasks.batch import MicroBatch, RowOrder, steps_per_epoch
from tasks.development import Development, Watch
from tasks.losses import TokenLoss
from tasks.progress import Progress
from tasks.stage_config import OfflineConfig
from tasks.trackers import Mirror
from tasks.training_log import FILES, TrainingLog, followed, last_line, replace_text

if TYPE_CHECKING:
    from cluster.causal_model import TokenScores
    from cluster.deepspeed_engine import TrainingEngine


class Objective(ABC):
    """What is learnt from a table of rows. Every rank has one of its own."""

    name: ClassVar[str]
    remedy: ClassVar[str]
    """What to do when there are no rows."""
    columns: ClassVar[tuple[str, ...]]
    """What the rows must have beside `row_id`, which names them in messages."""

    def __init__(self, table: pa.Table, config: OfflineConfig) -> None:
        self.table = table
        self.config = config

    @classmethod
    @abstractmethod
    def usable(cls, table: pa.Table) -> pa.ChunkedArray:
        """Which rows can be learnt from."""

    @classmethod
    @abstractmethod
    def longest(cls, table: pa.Table) -> pa.ChunkedArray:
        """Tokens of each row's longest sequence."""

    @property
    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Tokens of each row."""

    def begin(self, engine: "TrainingEngine", run: Path) -> None:  # noqa: B027  (most objectives have nothing to prepare)
        """What has to be known of the weights before the first step; `run` outlives an interruption. All ranks call it together."""

    @abstractmethod
    def batches(self, indices: Sequence[int], rank: int, ranks: int) -> list[MicroBatch]:
        """This rank's micro-batches of the rows of a step."""

    @abstractmethod
    def loss(self, scores: "TokenScores", batch: MicroBatch) -> TokenLoss:
        """The loss of a micro-batch."""


@dataclass(frozen=True)
class OfflineJob:
    """Everything that a rank needs; all paths are absolute."""

    objective: type[Objective]
    config: OfflineConfig
    rows_path: str
    model_path: str
    output: str
    run: str
    development: Development | None


def train_offline(
    objective: type[Objective],
    rows_path: str,
    model_path: str,
    output: str,
    config: OfflineConfig,
    progress: Progress | None = None,
    development: Development | None = None,
    mirror: Mirror | None = None,
    storage: str | None = None,
) -> dict[str, Any]:
    """Trains the checkpoint `model_path` on a Parquet file and exports to `output`; returns the last step's metrics.

    Beside the weights `output` gets `metrics.jsonl` and `run.json`; the curves for TensorBoard go next to it. Until then the run lies in
    `.training/<name>` next to `output`, where all nodes must see it; its checkpoints lie there too, or by the same name under `storage`,
    any fsspec URL. Raises UserError when that place belongs to a run with other rows or another configuration, and for rows that cannot be
    learnt from.
    """
    target = Path(output).absolute()
    table = read_rows(objective, rows_path)
    _check_lengths(objective, table, model_path)
    identity = json.dumps(_identity(objective, rows_path, model_path, config), indent=1)
    run = target.parent / ".training" / target.name
    if _claims(target, identity):
        _keep_curves(run, target)
        return last_line(target / "metrics.jsonl")
    if not _claims(run, identity):
        run.mkdir(parents=True, exist_ok=True)
        replace_text(run / "run.json", identity)
    total = config.epochs * steps_per_epoch(table.num_rows, config.rows_per_step)
    job = OfflineJob(
        objective, config, str(Path(rows_path).absolute()), str(Path(model_path).absolute()), str(target), str(run), development
    )
    with followed(run / "metrics.jsonl", total, progress or Progress(objective.name, "steps"), mirror or Mirror({})):
        run_workers(offline_loop, {"job": job}, config, storage=f"{storage or target.parent}/.training", name=target.name)
    _keep_curves(run, target)
    return last_line(target / "metrics.jsonl")


def offline_loop(settings: dict[str, Any]) -> None:
    """What every rank runs."""
    from cluster.deepspeed_engine import TrainingEngine

    job: OfflineJob = settings["job"]
    config, run = job.config, Path(job.run)
    table = read_rows(job.objective, job.rows_path)
    objective = job.objective(table, config)
    total = config.epochs * steps_per_epoch(table.num_rows, config.rows_per_step)
    engine = TrainingEngine(job.model_path, config.training, total)
    objective.begin(engine, run)
    state = resume(engine, run) or {"step": 0, "development": None}
    first, before = state["step"], dict[str, float]()
    watch = Watch(job.development, run, state["development"]) if job.development else None
    if watch and not state["development"]:
        before = {f"{name}_before": value for name, value in watch.begin(engine).items()}
    metrics_file = run / "metrics.jsonl"
    log = TrainingLog(metrics_file, first) if engine.rank == 0 else None
    lengths = objective.lengths
    order = RowOrder(lengths, config.rows_per_step, config.training.seed, config.length_grouping)
    for step in range(first, total):
        started = time.perf_counter()
        epoch, indices = order.at(step)
        batches = objective.batches(indices, engine.rank, engine.world_size)
        try:
            metrics = engine.step(batches, objective.loss)
        except Diverged as error:
            raise Diverged(f"{objective.name} step {step}, rows {_named(table, indices)}: {error}") from error
        seen = sum(lengths[index] for index in indices)
        line = {"step": step, "epoch": epoch, **metrics, "tokens_per_second": seen / (time.perf_counter() - started)}
        line |= (before if step == 0 else {}) | (watch.after(engine, step + 1, total) if watch else {})
        if log:
            log.append(line)
        if watch and watch.over:
            break
        if (step + 1) % config.save_every_steps == 0 and step + 1 < total:  # what follows the last step is the export
            beside = [*FILES, *(watch.kept if watch else ())]
            report(line, engine, {"step": step + 1, "development": watch.state if watch else None}, run, beside)
            if watch:
                watch.forget(engine)
    records = [metrics_file, run / "run.json"]
    if watch:
        watch.publish(engine, Path(job.output), records)
    else:
        engine.export(job.output, records)


def read_rows(objective: type[Objective], path: str) -> pa.Table:
    """The rows of an objective; raises UserError if there are none or one cannot be learnt from."""
    try:
        names = [name for name in pq.read_schema(path).names if name == "row_id"]
        table = pq.read_table(path, columns=[*objective.columns, *names]).combine_chunks()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file of training rows.") from error
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: no Parquet file with the columns {', '.join(objective.columns)} ({error}).") from error
    if not table.num_rows:
        raise UserError(f"{path}: {objective.name} needs rows, and there are none. {objective.remedy}")
    good = objective.usable(table).fill_null(False).to_pylist()
    if not all(good):
        name = _named(table, [good.index(False)])
        raise UserError(f"{path}: row {name} cannot be learnt from: each needs a prompt token and a token to learn. Rebuild the dataset.")
    return table


def _check_lengths(objective: type[Objective], table: pa.Table, model_path: str) -> None:
    """Raises UserError for a row that the model has no positions for."""
    lengths = objective.longest(table)
    limit, longest = context_length(model_path), pc.max(lengths).as_py()
    if limit and longest > limit:
        name = _named(table, [lengths.to_pylist().index(longest)])
        raise UserError(
            f"row {name} has {longest} tokens, the model {model_path} positions for {limit}. Take it out, or take another model."
        )


def _keep_curves(run: Path, target: Path) -> None:
    """Copies the curves of a run to where its model is."""
    if (run / "tensorboard").exists():
        shutil.copytree(run / "tensorboard", target.parent / "tensorboard", dirs_exist_ok=True)


def _named(table: pa.Table, indices: Sequence[int]) -> str:
    """Rows by their names, where they have any."""
    names = table["row_id"] if "row_id" in table.column_names else None
    return ", ".join(names[index].as_py() if names else f"number {index}" for index in indices)


def _identity(objective: type[Objective], rows_path: str, model_path: str, config: OfflineConfig) -> dict[str, Any]:
    """What makes two runs the same: the bytes of the rows, the model, and the configuration that changes the result."""
    with open(rows_path, "rb") as stream:
        rows = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"objective": objective.name, "rows": rows, "model": model_path, "config": config.recipe()}


def _claims(directory: Path, identity: str) -> bool:
    """Whether this very run was begun (or finished) in `directory`; another run there is the user's mistake."""
    record = directory / "run.json"
    if not record.exists():
        return False
    if record.read_text() != identity:
        raise UserError(
            f"{directory} belongs to a run with other rows, another model or another configuration. Choose another output, or "
            "delete it to start again."
        )
    return True
