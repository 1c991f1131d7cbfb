"""The Prefect tasks of the flows, one per stage. They pass handles and keys, never rows; the ledgers, not Prefect, know what is done."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from cluster.models import weights_digest
from cluster.pool import Pool
from flows.workspace import Workspace
from tasks import checkpoints as ckpt
from tasks import complete, evaluate, judge, rl, sft
from tasks.checkpoints import Checkpoint
from tasks.dataset import Dataset, candidates, gather, publish
from tasks.evaluate import Evaluation
from tasks.keys import code_version, digest
from tasks.progress import Progress, say
from tasks.report import write_report
from tasks.select import funnel, require_kept, select
from tasks.store import Ledger, Store
from tasks.training_rows import training_rows
from tasks.work import run_shards


@task(name="complete", cache_policy=NO_CACHE)
def complete_step(run: Workspace) -> None:
    """Draws the completions of the SFT split that no ledger entry holds."""
    config, store = run.config.generate, run.store
    ledger = Ledger(store, complete.STAGE)
    wanted = complete.wanted(run.split("sft"), run.requests, config.n)
    here, lost = ledger.survey()
    done = store.keys(here, set(wanted))
    missing = [item for key, item in wanted.items() if key not in done]
    shards = complete.cut(missing, run.requests, store.root, run.generator.model, config)
    _announce(run.generator, needed=bool(shards))
    with Progress("complete", "completions") as progress:
        run_shards(run.generator, ledger, complete.COMPLETE, shards, lost, progress)
    run.note("complete", wanted=len(wanted), reused=len(wanted) - len(missing), made=len(missing), lost_shards=len(lost))


@task(name="judge", cache_policy=NO_CACHE)
def judge_step(run: Workspace) -> None:
    """Judges, k times, the completions that pass the gates."""
    config, store = run.config.judge, run.store
    rows, dropped = _completions(run)
    ledger = Ledger(store, judge.STAGE)
    passed = [row for row in rows if row["key"] not in dropped]
    wanted = judge.wanted([row["key"] for row in passed], run.judge_hash("full"), config.k)
    here, lost = ledger.survey()
    limits = {row["key"]: run.config.select.limit(row["category"]) for row in passed}
    missing = judge.missing_runs(store, here, wanted, limits, config)
    shards = _judgement_shards(run, passed, missing)
    _announce(run.judge, needed=bool(shards))
    with Progress("judge", "verdicts") as progress:
        made = run_shards(run.judge, ledger, judge.JUDGE, shards, lost, progress)
    asked = sum(map(len, missing.values()))
    run.note(
        "judge",
        wanted=len(wanted),
        reused=len(wanted) - asked,
        made=made.rows,
        skipped=made.skipped,
        gated=len(dropped),
        lost_shards=len(lost),
    )


@task(name="select", cache_policy=NO_CACHE)
def select_step(run: Workspace) -> Dataset:
    """Selects rows and publishes the dataset version; stops with the funnel when too little is left."""
    config, store = run.config, run.store
    rows, dropped = _completions(run)
    left = set(judge.wanted([row["key"] for row in rows], run.judge_hash("full"), config.judge.k))
    verdicts = []
    for shard in Ledger(store, judge.STAGE).survey()[0]:
        for row in store.read_table(shard.path, ["key", "completion_key", "run", "score"]).to_pylist():
            if row["key"] in left:
                left.remove(row["key"])
                verdicts.append(row)
    pool = candidates(rows, dropped, verdicts, config.judge.k)
    kept = select(pool, config.select)
    table = funnel(pool)
    require_kept(kept, table, config.select)
    prompts = {prompt.id: prompt for prompt in run.loaded.prompts}
    dataset = publish(store, config.name, rows, pool, prompts, run.splits, _provenance(run), table)
    categories = len({candidate.category for candidate in kept})
    run.note("select", completions=len(pool), kept=len(kept), dropped=len(pool) - len(kept), categories=categories)
    return dataset


@task(name="sft", cache_policy=NO_CACHE)
def sft_step(run: Workspace, dataset: Dataset) -> Checkpoint:
    """Supervised fine-tuning of the base model on the dataset, mixed with capability rows."""
    config, store, base = run.config.sft, run.store, run.base_model
    table = training_rows(store, dataset, run.loaded.capability, complete.chat_of(base.path), config)
    recipe = {
        "rows": digest(table.to_pylist()),
        "base": [base.id, base.revision],
        "config": config.model_dump(exclude=sft.UNIMPORTANT),
    }
    id = f"sft-{digest(recipe)[:12]}"
    found = ckpt.find(store, id)
    if found is None:
        _clear(store, id)
        shard = store.put_table(f"checkpoints/{id}/rows", table)
        path = ckpt.directory(store, id)
        say(f"  starting {config.ranks} x DeepSpeed ZeRO-{config.training.zero_stage}")
        with Progress("sft", "steps") as progress:
            metrics = sft.train_sft(store.path(shard.path), base.path, str(path / "model"), config, progress)
        origin = {"dataset": f"{dataset.name}@{dataset.version}", "code": code_version()}
        found = ckpt.finish(store, id, "sft", recipe | origin, metrics)
        shutil.rmtree(path / ".training", ignore_errors=True)
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
    found = ckpt.find(store, id)
    if found is None:
        _clear(store, id)
        path = ckpt.directory(store, id)
        path.mkdir(parents=True, exist_ok=True)
        _announce(run.policy_engine)
        _announce(run.judge)
        job = rl.RlJob(
            root=store.root,
            id=id,
            start_path=start.model.path,
            output=str(path / "model"),
            weights_file=str(path / "weights.safetensors"),
            config=config.rl,
            prompts=tuple(prompts),
            specs=run.specs,
            policy=run.policy_engine.fleet(),
            judge=run.judge.fleet(),
            judge_model=run.judge.model,
            judge_config=config.judge,
            sync_tolerance=rl.sync_tolerance(config.rl, config.evaluate.engine.dtype),
        )
        say(f"  starting {config.rl.ranks} x DeepSpeed ZeRO-{config.rl.training.zero_stage}")
        with Progress("rl", "steps") as progress:
            metrics = rl.train_rl(job, str(path), progress)
        found = ckpt.finish(store, id, "rl", recipe | {"code": code_version()}, metrics)
        (path / "weights.safetensors").unlink(missing_ok=True)
        shutil.rmtree(path / "train", ignore_errors=True)
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
    found = evaluate.find(store, id, checkpoint.kind)
    if found is None:
        _announce(run.policy_engine)
        _announce(run.judge)
        subject = run.policy_engine.fleet()
        subject.load_weights(checkpoint.model.path, 0)
        with Progress(f"eval-{checkpoint.kind}", "answers and verdicts") as progress:
            found = evaluate.evaluate(
                store, id, checkpoint.kind, prompts, run.policy, run.specs, subject, run.base_model,
                run.judge.fleet(), run.judge.model, config.judge, config.evaluate, progress,
            )  # fmt: skip
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
        "quarantined": [asdict(row) for row in run.loaded.quarantined],
        "provenance": _provenance(run) | {"parameters": run.config.parameters()},
    }
    return write_report(run.store, manifest, dataset, checkpoints, evaluations)


def _completions(run: Workspace) -> tuple[list[dict[str, Any]], dict[bytes, str]]:
    wanted = complete.wanted(run.split("sft"), run.requests, run.config.generate.n)
    shards = Ledger(run.store, complete.STAGE).survey()[0]
    return gather(run.store, shards, wanted, run.policy, run.specs, run.config.gates)


def _judgement_shards(run: Workspace, passed: list[dict[str, Any]], missing: dict[bytes, list[int]]) -> list[judge.JudgementShard]:
    """One shard per completion shard with something to judge: its rows are of one category and share the spec's prefix."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in passed:
        if row["key"] in missing:
            by_source.setdefault(row["source"], []).append(row)
    prompts = {prompt.id: prompt for prompt in run.loaded.prompts}
    return [
        judge.JudgementShard(
            run.store.root,
            run.judge.model,
            run.config.judge,
            run.judge_hash("full"),
            run.specs[rows[0]["category"]],
            source,
            {row["key"]: (prompts[row["prompt_id"]], tuple(missing[row["key"]])) for row in rows},
            run.config.select.limit(rows[0]["category"]),
        )
        for source, rows in by_source.items()
    ]


def _provenance(run: Workspace) -> dict[str, Any]:
    config, parameters = run.config, run.config.parameters()
    return {
        "policy": {"id": run.policy.bundle.id, "hash": digest({name: spec.hash for name, spec in run.specs.items()})},
        "prompts": {
            "hash": run.prompts_hash,
            "rows": len(run.loaded.prompts),
            "capability": len(run.loaded.capability),
            "quarantined": len(run.loaded.quarantined),
        },
        "generator": {"id": run.generator.model.id, "revision": run.generator.model.revision},
        "judge": {"id": run.judge.model.id, "revision": run.judge.model.revision, "k": config.judge.k},
        "parameters": {name: parameters[name] for name in ("generate", "gates", "judge", "select")},
        "code": code_version(),
    }


def _announce(pool: Pool, needed: bool = True) -> None:
    """Engines take up to a minute to start; a person should know what is being waited for."""
    if needed and not pool.started:
        say(f"  starting {pool.config.engines} x {pool.model.id}")


def _clear(store: Store, id: str) -> None:
    """Removes the model of a checkpoint that was not finished; training state stays, so that it can go on."""
    shutil.rmtree(ckpt.directory(store, id) / "model", ignore_errors=True)
