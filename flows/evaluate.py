"""Flow `evaluate`: the base model and every checkpoint of a run, on the evaluation split."""

from prefect import flow

from flows.config import RunRequest
from flows.opening import opened
from flows.steps import base_checkpoint, evaluate_step
from flows.train import train
from tasks.evaluate import Evaluation


@flow(name="evaluate", description="Unguided answers of the base model and every checkpoint, judged without their thoughts.")
def evaluate(request: RunRequest) -> list[Evaluation]:
    """Evaluates the base model and every checkpoint; they are trained first if they are missing."""
    with opened(request) as run:
        checkpoints = [base_checkpoint(run), *(run.checkpoints or train(request))]
        return [evaluate_step(run, checkpoint) for checkpoint in checkpoints]
