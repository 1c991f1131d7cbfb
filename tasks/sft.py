"""Supervised fine-tuning: token rows in, Hugging Face checkpoint out.

Promises: the loss is the mean over the learnt tokens of a step, wherever they lie; a run that was interrupted continues at its
last checkpoint with the rows that come next; a run that is finished is not done again; `metrics.jsonl` has one line a step.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import Diverged, UserError
from cluster.training import report, resume, run_workers
from cluster.training_config import TrainingConfig
from tasks.batch import Row, micro_batches, step_rows, steps_per_epoch
from tasks.progress import Progress
from tasks.training_log import TrainingLog, followed, last_line

UNIMPORTANT: dict[str, Any] = {
    **dict.fromkeys(("ranks", "cpus_per_rank", "gpus_per_rank", "save_every_steps", "sync_tolerance", "held_out", "alarm"), True),
    "training": {"logit_tokens", "offload"},
}
"""Fields that leave the result as it is: they may change between an interruption and its continuation."""


class SftConfig(BaseModel):
    """One supervised fine-tuning run."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    epochs: int = Field(2, ge=1, title="Epochs", description="How often every row is seen.")
    capability_ratio: float = Field(
        0.5, ge=0, title="Capability ratio", description="Capability rows mixed in per policy row, as far as there are any."
    )
    rows_per_step: int = Field(32, ge=1, title="Rows a step", description="Rows of one optimiser step, over all ranks together.")
    ranks: int = Field(1, ge=1, title="Ranks", description="Processes that train together; may change when a run goes on.")
    cpus_per_rank: float = Field(1.0, gt=0, title="CPUs a rank", description="What Ray sets aside for each rank.")
    gpus_per_rank: int = Field(0, ge=0, le=1, title="GPUs a rank", description="0 trains on the CPU, 1 on a GPU for each rank.")
    save_every_steps: int = Field(50, ge=1, title="Steps between checkpoints", description="Work that an interruption can cost at most.")
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, title="Training", description="Precision, sharding, optimiser, adapters."
    )


def train_sft(rows_path: str, model_path: str, output: str, config: SftConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Fine-tunes the checkpoint `model_path` on a Parquet file and exports to `output`; returns the last step's metrics.

    Columns: input_ids list<int32> and prompt_length int32, the number of leading tokens that are not learnt. Beside the
    weights `output` gets `metrics.jsonl` and `run.json`; the curves for TensorBoard go next to it. Until then the run lies in
    `.training/<name>` next to `output`, where all nodes must see it. Raises UserError when that place belongs to a run with other
    rows or another configuration.
    """
    target = Path(output).absolute()
    storage = target.parent / ".training"
    identity = json.dumps(_identity(rows_path, model_path, config), indent=1)
    rows = _read_rows(rows_path).num_rows
    if _claims(target, identity):
        return last_line(target / "metrics.jsonl")
    run = storage / target.name
    if not _claims(run, identity):
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text(identity)
    total = config.epochs * steps_per_epoch(rows, config.rows_per_step)
    with followed(run / "metrics.jsonl", total, progress or Progress("sft", "steps")):
        run_workers(
            sft_loop,
            {
                "rows_path": str(Path(rows_path).absolute()),
                "model_path": str(Path(model_path).absolute()),
                "output": str(target),
                "run": str(run),
                "sft": config.model_dump(),
            },
            ranks=config.ranks,
            cpus_per_rank=config.cpus_per_rank,
            gpus_per_rank=config.gpus_per_rank,
            storage=str(storage),
            name=target.name,
        )
    shutil.copytree(run / "tensorboard", target.parent / "tensorboard", dirs_exist_ok=True)
    return last_line(target / "metrics.jsonl")


def sft_loop(config: dict[str, Any]) -> None:
    """What every rank runs; `config` as `train_sft` makes it."""
    from cluster.deepspeed_engine import TrainingEngine
    from tasks.losses import nll

    sft = SftConfig.model_validate(config["sft"])
    training, run = sft.training, Path(config["run"])
    table = _read_rows(config["rows_path"])
    input_ids, prompt_lengths = table["input_ids"], table["prompt_length"]
    total = sft.epochs * steps_per_epoch(table.num_rows, sft.rows_per_step)
    engine = TrainingEngine(config["model_path"], training, total)
    first = (resume(engine) or {"step": 0})["step"]
    metrics_file = run / "metrics.jsonl"
    log = TrainingLog(metrics_file, first) if engine.rank == 0 else None
    for step in range(first, total):
        started = time.perf_counter()
        epoch, indices = step_rows(step, table.num_rows, sft.rows_per_step, training.seed)
        rows = [Row(input_ids[index].as_py(), prompt_lengths[index].as_py()) for index in indices]
        batches = micro_batches(rows, training.micro_batch_tokens, engine.rank, engine.world_size)
        try:
            metrics = engine.step(batches, lambda scores, batch: nll(scores, batch.mask))
        except Diverged as error:
            raise Diverged(f"SFT step {step}, rows {_named(table, indices)}: {error}") from error
        seen = sum(len(row.input_ids) for row in rows)
        line = {"step": step, "epoch": epoch, **metrics, "tokens_per_second": seen / (time.perf_counter() - started)}
        if log:
            log.append(line)
        if (step + 1) % sft.save_every_steps == 0 and step + 1 < total:  # what follows the last step is the export
            report(line, engine, {"step": step + 1})
    engine.export(config["output"], beside=[metrics_file, run / "run.json"])


def _named(table: pa.Table, indices: Sequence[int]) -> str:
    """The rows of a step by their names, where they have any."""
    names = table["row_id"] if "row_id" in table.column_names else None
    return ", ".join(names[index].as_py() if names else f"number {index}" for index in indices)


def _read_rows(path: str) -> pa.Table:
    """The training rows; raises UserError if there are none or one cannot be learnt from."""
    try:
        columns = [name for name in pq.read_schema(path).names if name == "row_id"]
        table = pq.read_table(path, columns=["input_ids", "prompt_length", *columns]).combine_chunks()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: no Parquet file with the columns input_ids and prompt_length ({error}).") from error
    learnt = pc.subtract(pc.list_value_length(table["input_ids"]), table["prompt_length"])
    usable = pc.and_(pc.greater(learnt, 0), pc.greater(table["prompt_length"], 0))
    if not table.num_rows or not pc.all(pc.fill_null(usable, False)).as_py():
        raise UserError(f"{path}: there must be rows, and each needs a prompt token and a token to learn. Rebuild the dataset.")
    return table


def _identity(rows_path: str, model_path: str, config: SftConfig) -> dict[str, Any]:
    """What makes two runs the same: the bytes of the rows, the model, and the configuration that changes the result."""
    if not Path(rows_path).is_file():
        raise UserError(f"{rows_path}: no such file of training rows.")
    with open(rows_path, "rb") as stream:
        rows = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"rows": rows, "model": model_path, "config": config.model_dump(exclude=UNIMPORTANT)}


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
