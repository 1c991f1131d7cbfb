"""The Prefect tasks of training: each takes the checkpoint before it, and makes the next one or finds it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from cluster.chat import chat_of
from flows.checks import check_room
from flows.steps import made_once
from flows.workspace import Workspace
from tasks import checkpoints as ckpt
from tasks import rl
from tasks.checkpoints import Checkpoint
from tasks.collect import Source
from tasks.dataset import Dataset
from tasks.development import Development
from tasks.dpo import Dpo
from tasks.keys import code_version, digest
from tasks.offline import Objective, train_offline
from tasks.progress import Progress, say
from tasks.sft import Sft
from tasks.stage_config import MEMORY_ONLY, OfflineConfig, StageConfig
from tasks.store import Store
from tasks.trackers import mirrored
from tasks.training_rows import preference_rows, training_rows


@task(name="sft", cache_policy=NO_CACHE)
def sft_step(run: Workspace, dataset: Dataset, start: Checkpoint) -> Checkpoint:
    """Supervised fine-tuning on the rows that were selected, mixed with capability rows."""
    config = run.config.sft
    table = training_rows(run.store, dataset.files("data"), run.prompts.capability, chat_of(start.model.path), config)
    return _offline(run, "sft", Sft, config, dataset, table, start, capability=_capability_rows(table))


@task(name="rejection", cache_policy=NO_CACHE)
def rejection_step(run: Workspace, dataset: Dataset, start: Checkpoint) -> Checkpoint:
    """The same on all rows that passed the threshold: rejection sampling."""
    config, files = run.config.rejection, [*dataset.files("data"), *dataset.files("spare")]
    table = training_rows(run.store, files, run.prompts.capability, chat_of(start.model.path), config)
    return _offline(run, "rejection", Sft, config, dataset, table, start, capability=_capability_rows(table))


@task(name="dpo", cache_policy=NO_CACHE)
def dpo_step(run: Workspace, dataset: Dataset, start: Checkpoint) -> Checkpoint:
    """Direct preference optimisation on the pairs of the dataset."""
    table = preference_rows(run.store, dataset.files("preferences"), chat_of(start.model.path))
    return _offline(run, "dpo", Dpo, run.config.dpo, dataset, table, start)


@task(name="rl", cache_policy=NO_CACHE)
def rl_step(run: Workspace, dataset: Dataset, start: Checkpoint) -> Checkpoint:
    """Reinforcement learning, rewarded by the judge that never sees the thought."""
    config, store = run.config, run.store
    prompts = run.split("rl")
    recipe = {
        "start": start.weights,
        "prompts": digest([prompt.model_dump() for prompt in prompts]),
        "specs": {name: spec.hash for name, spec in run.specs.items()},
        "judge": run.judge_hash("blind"),
        "config": config.rl.recipe(),
    }

    def train(id: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        for pool in run.beside("rl").values():
            run.start(pool)
        source = Source(
            job=id,
            model_path=start.model.path,
            config=config.rl,
            prompts=tuple(prompts),
            specs=run.specs,
            policy=run.policy_engine.fleet(),
            judge=run.judge.fleet() if config.rl.asks_judge else None,
            judge_model=run.judge.model,
            judge_config=config.judge,
            held_out=run.held_out.fleet() if run.held_out else None,
        )
        job = rl.RlJob(
            root=store.root,
            id=id,
            start_path=start.model.path,
            output=str(path / "model"),
            weights_file=str(path / ckpt.WEIGHTS),
            config=config.rl,
            source=source,
            sync_tolerance=rl.sync_tolerance(config.rl, config.evaluate.engine.dtype),
        )
        with Progress("rl", "steps") as progress, mirrored(config.trackers, id) as mirror:
            metrics = rl.train_rl(job, ckpt.storage(store, id), progress, mirror)
        return metrics, {"sync_tolerance": job.sync_tolerance}

    found = _trained(run, "rl", recipe, config.rl, start, train)
    run.note(run.label("rl"), steps=config.rl.steps, reused=int(found.reused), trained=int(not found.reused))
    return found


def _capability_rows(table: pa.Table) -> int:
    """Rows of capability in a table of training rows: those whose name is no prompt's with a number."""
    return sum("/" not in name for name in table["row_id"].to_pylist())


STAGES: dict[str, Callable[[Workspace, Dataset, Checkpoint], Checkpoint]] = {
    "sft": sft_step,
    "rejection": rejection_step,
    "dpo": dpo_step,
    "rl": rl_step,
}
"""The entries of `train` in a run file."""


def _offline(
    run: Workspace,
    kind: str,
    objective: type[Objective],
    config: OfflineConfig,
    dataset: Dataset,
    table: pa.Table,
    start: Checkpoint,
    **counts: int,
) -> Checkpoint:
    """A checkpoint that was trained on rows of the dataset, which are written beside it."""
    recipe = {"start": start.weights, "rows": digest(table.to_pylist()), "config": config.recipe()}
    prompts = tuple(run.split("dev")) if config.development else ()
    if prompts:
        recipe["development"] = digest([prompt.model_dump() for prompt in prompts])

    def train(id: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        development = None
        if config.development:
            run.start(run.policy_engine)
            engines = run.policy_engine.fleet()
            development = Development(config.development, prompts, run.policy, start.model.path, engines, str(path / ckpt.WEIGHTS))
        rows = Store(str(path))
        shard = rows.put_table("rows", table)
        with Progress(kind, "steps") as progress, mirrored(run.config.trackers, id) as mirror:
            source, output, storage = rows.path(shard.path), str(path / "model"), ckpt.storage(run.store, id)
            metrics = train_offline(objective, source, start.model.path, output, config, progress, development, mirror, storage)
        return metrics, {"dataset": f"{dataset.name}@{dataset.version}"}

    found = _trained(run, kind, recipe, config, start, train)
    run.note(run.label(kind), rows=table.num_rows, **counts, reused=int(found.reused), trained=int(not found.reused))
    return found


def _trained(
    run: Workspace,
    kind: str,
    recipe: dict[str, Any],
    config: StageConfig,
    start: Checkpoint,
    train: Callable[[str, Path], tuple[dict[str, Any], dict[str, Any]]],
) -> Checkpoint:
    """The checkpoint of a recipe, found or trained. `train` gets its id and folder and returns its last metrics and more of its origin.

    The state of its training stays until the checkpoint is finished, so that it can go on.
    """
    id = f"{kind}-{digest(recipe)[:12]}"

    def make() -> Checkpoint:
        path = ckpt.directory(run.store, id)
        path.mkdir(parents=True, exist_ok=True)
        ckpt.forget_damaged(run.store, id)
        run.make_room(*run.beside(kind).values(), gib=run.ranks_gib(kind), gpus=config.gpus_per_rank > 0)
        check_room(run, kind, run.beside(kind), run.ranks_gib(kind))
        say(f"  starting {config.ranks} x DeepSpeed ZeRO-{config.training.zero_stage}")
        metrics, origin = train(id, path)
        if start.path is None:
            origin["from_model"] = start.model.path
        origin |= {"from": start.id, "code": code_version(), "ranks": config.ranks, "gpus_per_rank": config.gpus_per_rank}
        origin["memory"] = config.training.model_dump(mode="json", include=MEMORY_ONLY)
        return ckpt.finish(run.store, id, kind, recipe | origin, metrics)

    found = made_once(run, f"checkpoints/{id}", lambda: ckpt.find(run.store, id), make)
    ckpt.forget_state(run.store, id)
    return found
