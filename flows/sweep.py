"""Flow `sweep`: SFT with several settings, compared on the development split, so that the reported sets stay unseen."""

from dataclasses import replace

from prefect import flow

from cluster.errors import UserError
from flows.config import RunRequest, load_run, variants
from flows.opening import opened
from flows.regenerate import regenerate
from flows.steps import base_checkpoint, evaluate_step
from flows.training_steps import sft_step
from tasks.keys import digest
from tasks.progress import say
from tasks.report import comparison


@flow(name="sweep", description="SFT with several settings, compared on the development split.")
def sweep(request: RunRequest, vary: list[str]) -> str:
    """Trains and evaluates every combination of the settings; returns the path of the comparison.

    vary: fields of `sft` with their values, such as `training.learning_rate=1e-5,1e-4`.
    """
    request = request.model_copy(update={"changes": [*request.changes, "train=[sft]"]})
    configs = {
        " ".join(_short(change) for change in changes): load_run(request.model_copy(update={"changes": [*request.changes, *changes]}))
        for changes in variants("sft", vary)
    }
    with opened(request) as run:
        if not run.prompts.size("dev"):
            raise UserError("sweep: not one scenario group falls to the split 'dev'. Add scenario groups, or name the `split` of some.")
        dataset = run.dataset or regenerate(request)
        base = base_checkpoint(run)
        evaluations = [evaluate_step(run, base, "dev")]
        for label, config in configs.items():
            checkpoint = sft_step(replace(run, config=config), dataset, base)
            evaluations.append(evaluate_step(run, replace(checkpoint, label=label), "dev"))
        table = comparison(evaluations, across=False)
        say(f"\n{table}\n")
        path = f"runs/sweep-{digest([dataset.version, [evaluation.id for evaluation in evaluations]])[:10]}.md"
        title = f"# Sweep over {dataset.name}@{dataset.version}\n\nShare of the {run.prompts.size('dev')} prompts of the development split."
        run.store.replace(path, f"{title}\n\n{table}\n".encode())
        say(f"  sweep      {run.store.path(path)}")
        return run.store.path(path)


def _short(change: str) -> str:
    """The last part of a field's name, and its value."""
    name, _, value = change.partition("=")
    return f"{name.rpartition('.')[2]}={value}"
