"""Flow `regenerate`: policy and prompts in, a dataset version out. Draws and judges only what no earlier run did."""

from prefect import flow

from flows.config import RunRequest
from flows.opening import opened
from flows.steps import complete_and_judge_step, select_step
from tasks.dataset import Dataset


@flow(name="regenerate", description="Policy and prompts in, dataset version out. Only what is missing is made.")
def regenerate(request: RunRequest) -> Dataset:
    """Completes, judges and selects; returns the dataset version."""
    with opened(request, trains=False) as run:
        complete_and_judge_step(run)
        run.dataset = select_step(run)
        return run.dataset
