"""Flow `train`: a dataset version in, a checkpoint for every entry of `train` out, in every round."""

from dataclasses import replace

from prefect import flow

from flows.config import RunRequest
from flows.opening import opened
from flows.regenerate import regenerate
from flows.steps import base_checkpoint
from flows.training_steps import STAGES
from tasks.checkpoints import Checkpoint
from tasks.preferences import require_pairs


@flow(name="train", description="SFT, rejection sampling, DPO and RL as the run file says. Finished checkpoints are reused.")
def train(request: RunRequest) -> list[Checkpoint]:
    """Trains on the run's dataset, which is made first if it is missing; returns the checkpoints in order.

    In further rounds the last checkpoint completes the prompts anew, and training goes on from it.
    """
    with opened(request) as run:
        last = base_checkpoint(run)
        for number in range(1, run.config.rounds + 1):
            if number > 1:
                run.begin_round(number, last)
            dataset = run.dataset or regenerate(request)
            if "dpo" in run.config.train:
                require_pairs(dataset.manifest, run.config.select.pairs)
            for stage in run.config.train:
                found = STAGES[stage](run, dataset, last)
                last = replace(found, label=run.label(stage))
                run.checkpoints.append(last)
        return run.checkpoints
