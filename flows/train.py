"""Flow `train`: a dataset version in, an SFT and an RL checkpoint out."""

from prefect import flow

from flows.config import RunRequest
from flows.regenerate import regenerate
from flows.steps import rl_step, sft_step
from flows.workspace import opened
from tasks.checkpoints import Checkpoint


@flow(name="train", description="SFT on the dataset of a run, then RL from it. Finished checkpoints are reused.")
def train(request: RunRequest) -> list[Checkpoint]:
    """Trains on the run's dataset, which is made first if it is missing; returns the checkpoints in order."""
    with opened(request) as run:
        dataset = run.dataset or regenerate(request)
        sft = sft_step(run, dataset)
        rl = rl_step(run, sft)
        run.checkpoints = [sft, rl]
        return run.checkpoints
