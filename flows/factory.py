"""Flow `factory`: from a written policy to an aligned checkpoint and a report, in one run."""

from prefect import flow

from flows.config import RunRequest
from flows.evaluate import evaluate
from flows.opening import opened
from flows.regenerate import regenerate
from flows.steps import report_step
from flows.train import train


@flow(name="factory", description="Policy in, dataset, checkpoints and report out. Started again, it does what is left.")
def factory(request: RunRequest) -> str:
    """Regenerates, trains, evaluates and reports; returns the path of the run's directory."""
    with opened(request) as run:
        regenerate(request)
        train(request)
        return report_step(run, evaluate(request))
