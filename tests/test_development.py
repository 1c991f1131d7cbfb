"""Looks at a model in training: the best step is kept, over-refusal keeps none, patience ends it, an interruption changes nothing."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from tasks import development
from tasks.development import Watch
from tasks.stage_config import DevelopmentConfig

Found = dict[int, tuple[float, float]]
"""What each look finds: step -> (verdict accuracy, over-refusal)."""


@dataclass
class Looks:
    """Looks whose findings are known beforehand."""

    found: Found
    config: DevelopmentConfig

    def look(self, engine: Any, version: int) -> dict[str, float]:
        accuracy, over_refusal = self.found[version]
        return {"verdict_accuracy": accuracy, "policy_retrieval": 0.0, "format_adherence": 1.0, "over_refusal": over_refusal}


@dataclass
class Trainer:
    """Exports the number of its step."""

    rank: int = 0
    steps: int = 0
    exported: list[int] = field(default_factory=list)

    def export(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(str(self.steps))
        self.exported.append(self.steps)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, and no process group."""
    monkeypatch.setattr(development, "agreed", lambda value: value)


def trained(folder: Path, found: Found, total: int, interrupted: int | None = None, **config: Any) -> dict[int, Any]:
    """Trains until it is over; returns what the looks say. `interrupted`: after this step, all that is not in a checkpoint is forgotten."""
    looks: Any = Looks(found, DevelopmentConfig.model_validate({"every_steps": 2} | config))
    engine: Any = Trainer()
    watch = Watch(looks, folder, None)
    lines = {0: watch.begin(engine)}
    for step in range(1, total + 1):
        engine.steps = step
        if line := watch.after(engine, step, total):
            lines[step] = line
        if watch.over:
            break
        watch.forget(engine)
        if step == interrupted:
            watch = Watch(looks, folder, watch.state)
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("{}")
    watch.publish(engine, folder / "model", [folder / "metrics.jsonl"])
    return lines


def test_the_best_look_is_kept_and_the_last_step_is_looked_at(tmp_path: Path) -> None:
    lines = trained(tmp_path, {0: (0.9, 0.0), 2: (0.3, 0.0), 4: (0.6, 0.05), 6: (0.5, 0.0), 7: (0.6, 0.0)}, 7)
    assert list(lines) == [0, 2, 4, 6, 7]
    assert [line.get("development_best") for line in lines.values()] == [None, 2, 4, 4, 4], "of two alike the first is kept"
    assert (tmp_path / "model" / "model.safetensors").read_text() == "4" and (tmp_path / "model" / "metrics.jsonl").exists()
    assert lines[4]["development_verdict_accuracy"] == 0.6 and lines[0]["development_over_refusal"] == 0.0


def test_training_ends_when_looks_are_no_longer_better(tmp_path: Path) -> None:
    lines = trained(tmp_path, {0: (0, 0.0), 2: (0.5, 0.0), 4: (0.4, 0.0), 6: (0.5, 0.0), 8: (0.9, 0.0)}, 20, patience=2)
    assert list(lines) == [0, 2, 4, 6] and (tmp_path / "model" / "model.safetensors").read_text() == "2"


def test_what_refuses_too_much_is_not_kept_however_good_it_is(tmp_path: Path) -> None:
    found = {0: (0.0, 0.1), 2: (0.2, 0.2), 4: (0.9, 0.21), 6: (0.3, 0.15)}
    lines = trained(tmp_path / "some", found, 6, over_refusal=0.1)
    assert [line.get("development_best") for line in lines.values()] == [None, 2, 2, 6]
    with pytest.raises(UserError, match=r"over-refusal .* above 0.12 at every look.*training.learning_rate"):
        trained(tmp_path / "none", found, 6, over_refusal=0.02)


def test_what_is_published_can_be_published_again(tmp_path: Path) -> None:
    """Whoever dies between the publication and what follows it does the last steps again."""
    found = {0: (0.0, 0.0), 2: (0.3, 0.0), 4: (0.2, 0.0)}
    for _ in range(2):
        trained(tmp_path, found, 4)
        assert (tmp_path / "model" / "model.safetensors").read_text() == "2"
    watch = Watch(Looks(found, DevelopmentConfig()), tmp_path, {"allowed": 0.1, "step": 2, "value": 0.3, "worse": 1})  # type: ignore[arg-type]
    watch.publish(Trainer(), tmp_path / "model", [tmp_path / "metrics.jsonl"])  # type: ignore[arg-type]
    assert (tmp_path / "model" / "model.safetensors").read_text() == "2"


@pytest.mark.parametrize("interrupted", range(1, 7))
def test_an_interruption_changes_nothing(tmp_path: Path, interrupted: int) -> None:
    found = {0: (0.0, 0.0), 2: (0.3, 0.0), 4: (0.6, 0.0), 6: (0.5, 0.0), 8: (0.5, 0.0)}
    straight = trained(tmp_path / "straight", found, 8, patience=2)
    assert trained(tmp_path / "interrupted", found, 8, interrupted, patience=2) == straight
    assert (tmp_path / "interrupted" / "model" / "model.safetensors").read_text() == "4"
