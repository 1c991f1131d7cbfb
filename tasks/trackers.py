"""Experiment trackers of the user's: what `metrics.jsonl` says of each step, shown in Weights & Biases or MLflow too.

The driver sends it, so that their keys stay in its environment. The file remains the record: a tracker that goes away while a model is
trained costs curves and nothing else.
"""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from cluster.errors import UserError
from tasks.progress import say

TrackerName = Literal["wandb", "mlflow"]

PROJECT = "specmill"
"""W&B's project, unless WANDB_PROJECT names another one, and MLflow's experiment, unless MLFLOW_EXPERIMENT_NAME does."""


class Tracker(Protocol):
    """One run of a tracker. A training that goes on goes on in the same run."""

    last: int
    """The last step that it knows, -1 if it knows none."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of a step, without waiting until they have arrived."""

    def close(self) -> None:
        """Waits until everything has arrived."""


class WandbTracker:
    """A run of Weights & Biases, named after the checkpoint."""

    def __init__(self, id: str) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(project=project, id=id, name=id, resume="allow", settings=settings)
        self.last = self._run.step - 1

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow, named after the checkpoint and found by that name."""

    def __init__(self, id: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"attributes.run_name = '{id}'", max_results=1)
        run = runs[0] if runs else self._client.create_run(experiment, run_name=id)
        self._run = run.info.run_id
        self._client.update_run(self._run, status="RUNNING")
        self._sent: list[Any] = []
        self.last = int(run.data.metrics.get("step", -1))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        values = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._sent.append(self._client.log_batch(self._run, values, synchronous=False))

    def close(self) -> None:
        for sent in self._sent:
            sent.wait()
        self._client.set_terminated(self._run)


TRACKERS: dict[TrackerName, Callable[[str], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raises UserError for a tracker that is not installed or not told where to send to."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed. Install this distribution with its extra: pip install '.[{name}]'.")
    if "wandb" in names and not ("WANDB_API_KEY" in os.environ or os.environ.get("WANDB_MODE") in ("offline", "disabled")):
        raise UserError("trackers: wandb needs WANDB_API_KEY in the environment, or WANDB_MODE=offline.")
    if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
        raise UserError("trackers: mlflow needs MLFLOW_TRACKING_URI in the environment, the address of its server.")


class Mirror:
    """The trackers of one checkpoint. A tracker that fails is told of once and left out from then on."""

    def __init__(self, trackers: dict[TrackerName, Tracker]) -> None:
        self._trackers = trackers

    def show(self, lines: Sequence[dict[str, Any]]) -> None:
        """Gives each tracker the lines of a log that it does not know yet."""

        def send(tracker: Tracker) -> None:
            for line in lines:
                if line["step"] > tracker.last:
                    tracker.log(line["step"], {name: float(value) for name, value in line.items() if isinstance(value, int | float)})
                    tracker.last = line["step"]

        self._each(send)

    def close(self) -> None:
        """Waits until the trackers have everything."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._trackers[name]
                say(f"  {name:<10} takes no more metrics ({_told(error)}); metrics.jsonl has them all")


@contextmanager
def mirrored(names: Iterable[TrackerName], id: str) -> Iterator[Mirror]:
    """The trackers' runs of a checkpoint. Raises UserError for one that cannot be reached."""
    trackers: dict[TrackerName, Tracker] = {}
    try:
        for name in names:
            try:
                trackers[name] = TRACKERS[name](id)
            except Exception as error:
                # without its cause, whose text has the address as it was given
                raise UserError(
                    f"trackers: {name} takes no run ({_told(error)}). Mend its settings, or take it out of `trackers`."
                ) from None
        yield Mirror(trackers)
    finally:
        Mirror(trackers).close()


def _told(error: Exception) -> str:
    """An error's text without the user's name and password, which an address in it may have."""
    return re.sub(r"://[^/\s]*@", "://***@", str(error))
