"""What W&B and MLflow are told of a training: their own clients, writing to disk instead of to a server."""

import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from tasks.progress import Progress
from tasks.trackers import TRACKERS, Mirror, check_trackers, mirrored
from tasks.training_log import TrainingLog, followed


@pytest.fixture(autouse=True)
def told_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Both write under the test's folder."""
    for name in ("WANDB_API_KEY", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield


def train(path: Path, mirror: Mirror, steps: range) -> None:
    """Writes lines as training does, while the driver follows them."""
    with followed(path, steps.stop, Progress("sft", "steps"), mirror):
        log = TrainingLog(path, steps.start)
        for step in steps:
            log.append({"step": step, "loss": 2.0 - step / 10, "alarms": [["collapse", "a text"]]})


def mlflow_history(name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("specmill")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == name and run.info.status == "FINISHED"
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss"))


def test_mlflow_has_every_step_once_though_training_was_interrupted(tmp_path: Path) -> None:
    for steps in (range(3), range(2, 5)):  # step 2 is done again
        with mirrored(["mlflow"], "sft-0123") as mirror:
            train(tmp_path / "metrics.jsonl", mirror, steps)
    assert mlflow_history("sft-0123") == [(step, 2.0 - step / 10) for step in range(5)]


def test_wandb_has_every_step(tmp_path: Path) -> None:
    import wandb

    with mirrored(["wandb"], "sft-0123") as mirror:
        train(tmp_path / "metrics.jsonl", mirror, range(4))
    wandb.teardown()  # its writer closes the file some time after the run's end
    (file,) = tmp_path.rglob("run-sft-0123.wandb")
    written = file.read_bytes()
    assert all(json.dumps(2.0 - step / 10).encode() in written for step in range(1, 4)) and b"alarms" not in written


def test_a_tracker_that_fails_costs_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Gone:
        last = -1

        def log(self, step: int, metrics: dict[str, float]) -> None:
            raise ConnectionError("no route to https://me:secret@host/api")

        def close(self) -> None:
            raise AssertionError("it is left out by then")

    mirror = Mirror({"mlflow": Gone()})
    train(tmp_path / "metrics.jsonl", mirror, range(2))
    mirror.close()
    assert capsys.readouterr().err.count("mlflow     takes no more metrics (no route to https://***@host/api)") == 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_a_tracker_lacks_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    check_trackers([name])
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match=f"trackers: {name} needs (WANDB_API_KEY|MLFLOW_TRACKING_URI) in the environment"):
        check_trackers([name])
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"is not installed\. .*pip install '\.\["):
        check_trackers([name])


def test_a_tracker_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(id: str) -> Any:
        raise ConnectionError("https://me:secret@host refused")

    monkeypatch.setitem(TRACKERS, "mlflow", refused)
    with (
        pytest.raises(UserError, match=r"trackers: mlflow takes no run \(https://\*\*\*@host refused\)") as told,
        mirrored(["mlflow"], "s"),
    ):
        pass
    assert "secret" not in "".join(traceback.format_exception(told.value))
