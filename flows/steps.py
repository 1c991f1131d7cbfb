"""The Prefect tasks of the flows, one per stage. They pass handles and keys, never rows; the ledgers, not Prefect, know what is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from cluster.models import weights_digest
from flows.checks import check_memory, check_room
from flows.lines import Lines
from flows.workspace import Workspace, survey
from tasks import complete, evaluate, judge
from tasks.checkpoints import Checkpoint
from tasks.dataset import OPTIONAL, Dataset, Selection, candidates, publish
from tasks.evaluate import Evaluation
from tasks.keys import code_version, digest
from tasks.ledger import Ledger
from tasks.progress import Progress, say
from tasks.prompts import Split
from tasks.report import write_report
from tasks.select import funnel, require_kept, select
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
            if lines.waiting:
                check_memory(run, draws=bool(lines.drawing.waiting))
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
    dataset = publish(run.store, run.config.name, run.prompts, wanted, found, run.config.select, _provenance(run))
    kept = dataset.manifest["rows"]
    categories = sum("kept" in counts for counts in table.values())
    runs = int((wanted.scores != NOT_JUDGED).sum())
    cost = cost_per_kept([(completions.state, len(wanted)), (judgements.state, runs)], kept)
    agreed = wanted.agreement(run.config.judge, run.limits)
    run.selections.append(Selection(dataset, cost, agreed.as_json()))
    more = {view: dataset.manifest[view] for view in OPTIONAL}
    run.note(run.label("select"), completions=len(wanted), kept=kept, dropped=len(wanted) - kept, categories=categories, **more)
    if run.config.judge.k > 1 and agreed.total:
        say(f"  judge      all {run.config.judge.k} runs agree to keep or to drop on {agreed.count} of {agreed.total} audited completions")
    return dataset


def base_checkpoint(run: Workspace) -> Checkpoint:
    """The untrained model: what the first stage starts from, and what all are compared with."""
    return Checkpoint("base", run.base_model.revision, run.base_model, weights_digest(Path(run.base_model.path)), label="base")


@task(name="evaluate", task_run_name="evaluate-{checkpoint.label}", cache_policy=NO_CACHE)
def evaluate_step(run: Workspace, checkpoint: Checkpoint, split: Split = "eval") -> Evaluation:
    """Unguided answers of a checkpoint on a split, judged without their thoughts."""
    config, store = run.config, run.store
    prompts = run.split(split)
    id = evaluate.evaluation_id(checkpoint.weights, prompts, run.specs, run.judge_hash("blind"), config.evaluate)

    def make() -> Evaluation:
        run.make_room(run.policy_engine, run.judge)
        check_room(run, "evaluate", {"evaluate.engine": run.policy_engine, "judge.engine": run.judge})
        run.start(run.policy_engine)
        run.start(run.judge)
        subject = run.policy_engine.fleet()
        subject.load_weights(checkpoint.model.path, 0)
        with Progress(f"eval-{checkpoint.label}", "answers and verdicts") as progress:
            return evaluate.evaluate(
                store, id, checkpoint.label, prompts, run.policy, run.specs, subject, run.base_model,
                run.judge.fleet(), run.judge.model, config.judge, config.evaluate, progress,
            )  # fmt: skip

    found = made_once(run, f"evaluations/{id}", lambda: evaluate.find(store, id, checkpoint.label), make)
    run.note(f"eval-{checkpoint.label}", prompts=len(prompts), reused=int(found.reused), made=int(not found.reused))
    return found


@task(name="report", cache_policy=NO_CACHE)
def report_step(run: Workspace, evaluations: list[Evaluation]) -> str:
    """Writes the run's manifest and report; returns the run's directory."""
    manifest = {
        "version": 1,
        "kind": "run",
        "id": run.run_id,
        "identity": run.identity,
        "datasets": [selection.dataset.path for selection in run.selections],
        "checkpoints": [f"checkpoints/{checkpoint.id}" for checkpoint in run.checkpoints],
        "evaluations": [f"evaluations/{evaluation.id}" for evaluation in evaluations],
        "stages": run.notes,
        "speeds": run.speeds,
        "cost": [selection.cost for selection in run.selections],
        "agreement": [selection.agreement for selection in run.selections],
        "quarantined": run.prompts.manifest["quarantined"],
        "provenance": run.selections[0].dataset.manifest["provenance"] | {"parameters": run.config.parameters(), "code": code_version()},
    }
    return write_report(run.store, manifest, run.selections, run.checkpoints, evaluations)


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


def made_once(run: Workspace, folder: str, find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What is there already, or is made now. The folder is claimed for that, so that a second run of one identity says so and stops."""
    found = find()
    if found is None:
        with Ledger(run.store, folder).writing(run.config.lease_seconds):
            found = find() or make()
    return found
