"""The Prefect tasks of the flows, one per stage. They pass handles and keys, never rows; the ledgers, not Prefect, know what is done."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from cluster.chat import chat_of
from cluster.models import weights_digest
from flows.lines import Lines
from flows.workspace import Workspace, survey
from tasks import checkpoints as ckpt
from tasks import complete, evaluate, judge, rl, sft
from tasks.checkpoints import Checkpoint
from tasks.collect import Source
from tasks.dataset import Dataset, candidates, publish
from tasks.evaluate import Evaluation
from tasks.keys import code_version, digest
from tasks.ledger import Ledger
from tasks.progress import Progress, say
from tasks.report import write_report
from tasks.select import funnel, require_kept, select
from tasks.store import Store
from tasks.training_rows import training_rows
from tasks.wanted import NOT_JUDGED
from tasks.work import cost_per_kept

T = TypeVar("T")


@task(name="complete and judge", cache_policy=NO_CACHE)
def complete_and_judge_step(run: Workspace) -> None:
    """Draws the completions of the SFT split that no ledger entry holds and judges, k times, those that pass the gates.

    A completion shard that is finished is judged while the next ones are drawn; without `judge.overlap`, two pools take turns.
    """
    with Progress("complete", "completions") as drawn, Progress("judge", "verdicts") as judged:
        lines = Lines(run, drawn, judged)
        with lines.claimed():
            if run.judge is run.generator or run.config.judge.overlap:
                lines.work_together()
            else:
                lines.work_in_turn()
            lines.balance()
    lines.note()


@task(name="select", cache_policy=NO_CACHE)
def select_step(run: Workspace) -> Dataset:
    """Selects rows and publishes the dataset version; stops with the funnel when too little is left."""
    completions, judgements = Ledger(run.store, complete.STAGE), Ledger(run.store, judge.STAGE)
    wanted, _ = survey(run, completions, judgements)
    found = candidates(wanted)
    select(found, run.config.select)
    table = funnel(found)
    require_kept(table, run.config.select)
    dataset = publish(run.store, run.config.name, run.prompts, wanted, found, _provenance(run))
    kept = dataset.manifest["rows"]
    categories = sum("kept" in counts for counts in table.values())
    runs = int((wanted.scores != NOT_JUDGED).sum())
    run.cost = cost_per_kept([(completions.state, len(wanted)), (judgements.state, runs)], kept)
    agreed = wanted.agreement(run.config.judge, run.limits)
    run.agreement = agreed.as_json()
    run.note("select", completions=len(wanted), kept=kept, dropped=len(wanted) - kept, categories=categories)
    if run.config.judge.k > 1 and agreed.total:
        say(f"  judge      all {run.config.judge.k} runs agree to keep or to drop on {agreed.count} of {agreed.total} audited completions")
    return dataset


@task(name="sft", cache_policy=NO_CACHE)
def sft_step(run: Workspace, dataset: Dataset) -> Checkpoint:
    """Supervised fine-tuning of the base model on the dataset, mixed with capability rows."""
    config, store, base = run.config.sft, run.store, run.base_model
    table = training_rows(store, dataset, run.prompts.capability, chat_of(base.path), config)
    recipe = {
        "rows": digest(table.to_pylist()),
        "base": [base.id, base.revision],
        "config": config.model_dump(exclude=sft.UNIMPORTANT),
    }
    id = f"sft-{digest(recipe)[:12]}"

    def train() -> Checkpoint:
        _clear(store, id)
        shard = store.put_table(f"checkpoints/{id}/rows", table)
        path = ckpt.directory(store, id)
        if config.gpus_per_rank:
            run.free_gpus()
        say(f"  starting {config.ranks} x DeepSpeed ZeRO-{config.training.zero_stage}")
        with Progress("sft", "steps") as progress:
            metrics = sft.train_sft(store.path(shard.path), base.path, str(path / "model"), config, progress)
        origin = {"dataset": f"{dataset.name}@{dataset.version}", "code": code_version()}
        trained = ckpt.finish(store, id, "sft", recipe | origin, metrics)
        shutil.rmtree(path / ".training", ignore_errors=True)
        return trained

    found = _made_once(run, f"checkpoints/{id}", lambda: ckpt.find(store, id), train)
    capability = table.num_rows - dataset.manifest["rows"]
    run.note("sft", rows=table.num_rows, capability=capability, reused=int(found.reused), trained=int(not found.reused))
    return found


@task(name="rl", cache_policy=NO_CACHE)
def rl_step(run: Workspace, start: Checkpoint) -> Checkpoint:
    """Reinforcement learning from the SFT checkpoint, rewarded by the judge that never sees the thought."""
    config, store = run.config, run.store
    prompts = run.split("rl")
    recipe = {
        "start": start.weights,
        "prompts": digest([prompt.model_dump() for prompt in prompts]),
        "specs": {name: spec.hash for name, spec in run.specs.items()},
        "judge": run.judge_hash("blind"),
        "config": config.rl.model_dump(exclude=sft.UNIMPORTANT),
    }
    id = f"rl-{digest(recipe)[:12]}"

    def train() -> Checkpoint:
        _clear(store, id)
        path = ckpt.directory(store, id)
        path.mkdir(parents=True, exist_ok=True)
        judges = [pool for pool in (run.judge if config.rl.asks_judge else None, run.held_out) if pool]
        if config.rl.gpus_per_rank:
            run.free_gpus(run.policy_engine, *judges)
        for pool in (run.policy_engine, *judges):
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
            weights_file=str(path / "weights.safetensors"),
            config=config.rl,
            source=source,
            sync_tolerance=rl.sync_tolerance(config.rl, config.evaluate.engine.dtype),
        )
        say(f"  starting {config.rl.ranks} x DeepSpeed ZeRO-{config.rl.training.zero_stage}")
        with Progress("rl", "steps") as progress:
            metrics = rl.train_rl(job, str(path), progress)
        origin = {"from": start.id, "sync_tolerance": job.sync_tolerance, "code": code_version()}
        origin |= {"ranks": config.rl.ranks, "gpus_per_rank": config.rl.gpus_per_rank}
        trained = ckpt.finish(store, id, "rl", recipe | origin, metrics)
        (path / "weights.safetensors").unlink(missing_ok=True)
        shutil.rmtree(path / "train", ignore_errors=True)
        return trained

    found = _made_once(run, f"checkpoints/{id}", lambda: ckpt.find(store, id), train)
    run.note("rl", steps=config.rl.steps, reused=int(found.reused), trained=int(not found.reused))
    return found


def base_checkpoint(run: Workspace) -> Checkpoint:
    """The untrained model, to compare with."""
    return Checkpoint("base", run.base_model.revision, run.base_model, weights_digest(Path(run.base_model.path)))


@task(name="evaluate", task_run_name="evaluate-{checkpoint.kind}", cache_policy=NO_CACHE)
def evaluate_step(run: Workspace, checkpoint: Checkpoint) -> Evaluation:
    """Unguided answers of a checkpoint on the evaluation split, judged without their thoughts."""
    config, store = run.config, run.store
    prompts = run.split("eval")
    id = evaluate.evaluation_id(checkpoint.weights, prompts, run.specs, run.judge_hash("blind"), config.evaluate)

    def make() -> Evaluation:
        run.start(run.policy_engine)
        run.start(run.judge)
        subject = run.policy_engine.fleet()
        subject.load_weights(checkpoint.model.path, 0)
        with Progress(f"eval-{checkpoint.kind}", "answers and verdicts") as progress:
            return evaluate.evaluate(
                store, id, checkpoint.kind, prompts, run.policy, run.specs, subject, run.base_model,
                run.judge.fleet(), run.judge.model, config.judge, config.evaluate, progress,
            )  # fmt: skip

    found = _made_once(run, f"evaluations/{id}", lambda: evaluate.find(store, id, checkpoint.kind), make)
    run.note(f"eval-{checkpoint.kind}", prompts=len(prompts), reused=int(found.reused), made=int(not found.reused))
    return found


@task(name="report", cache_policy=NO_CACHE)
def report_step(run: Workspace, dataset: Dataset, checkpoints: list[Checkpoint], evaluations: list[Evaluation]) -> str:
    """Writes the run's manifest and report; returns the run's directory."""
    manifest = {
        "version": 1,
        "kind": "run",
        "id": run.run_id,
        "identity": run.identity,
        "dataset": dataset.path,
        "checkpoints": [f"checkpoints/{checkpoint.id}" for checkpoint in checkpoints],
        "evaluations": [f"evaluations/{evaluation.id}" for evaluation in evaluations],
        "stages": run.notes,
        "speeds": run.speeds,
        "cost": run.cost,
        "agreement": run.agreement,
        "quarantined": run.prompts.manifest["quarantined"],
        "provenance": _provenance(run) | {"parameters": run.config.parameters()},
    }
    return write_report(run.store, manifest, dataset, checkpoints, evaluations)


def _provenance(run: Workspace) -> dict[str, Any]:
    config, parameters = run.config, run.config.parameters()
    return {
        "policy": {"id": run.policy.bundle.id, "hash": digest({name: spec.hash for name, spec in run.specs.items()})},
        "prompts": {
            "hash": run.prompts.hash,
            "rows": run.prompts.counts["prompts"],
            "capability": run.prompts.counts["capability"],
            "quarantined": run.prompts.counts["quarantined"],
        },
        "generator": {"id": run.generator.model.id, "revision": run.generator.model.revision},
        "judge": {"id": run.judge.model.id, "revision": run.judge.model.revision, "k": config.judge.k},
        "parameters": {name: parameters[name] for name in ("generate", "gates", "judge", "select")},
        "code": code_version(),
    }


def _made_once(run: Workspace, folder: str, find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What is there already, or is made now. The folder is claimed for that, so that a second run of one identity says so and stops."""
    found = find()
    if found is None:
        with Ledger(run.store, folder).writing(run.config.lease_seconds):
            found = find() or make()
    return found


def _clear(store: Store, id: str) -> None:
    """Removes the model of a checkpoint that was not finished; training state stays, so that it can go on."""
    shutil.rmtree(ckpt.directory(store, id) / "model", ignore_errors=True)
