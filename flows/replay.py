"""`specmill replay`: trains once more from the rollouts that an RL checkpoint learnt from, without engines, and compares the steps."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cluster.errors import UserError
from cluster.session import ray_session
from flows.inspect import read_manifest
from tasks import checkpoints
from tasks.rl import RlJob, train_rl
from tasks.rl_config import RlConfig
from tasks.store import Store
from tasks.training_log import read_lines
from tasks.validation import describe

TOLERANCE = 1e-6
"""Largest difference of a measure, relative to the larger of it and 1, on the kind of machine that trained."""
MEASURES = ("loss", "gradient_norm", "entropy", "reference_kl")
"""What is compared: a loss of fresh rollouts alone says little of the weights, since all ratios are 1."""


@dataclass(frozen=True)
class Replayed:
    """One step: its measures when it was trained, and now."""

    step: int
    recorded: dict[str, float]
    found: dict[str, float]

    @property
    def differing(self) -> list[str]:
        """The measures that are not the same."""
        return [name for name, value in self.recorded.items() if not abs(value - self.found[name]) <= TOLERANCE * max(1.0, abs(value))]


def replay(path: str) -> list[Replayed]:
    """Every step of the RL checkpoint in the directory `path`. Raises UserError when it is none, or what it started from is gone."""
    manifest = read_manifest(path)
    if manifest["kind"] != "rl":
        raise UserError(f"{path}: a {manifest['kind']} has no rollouts. Give the directory of an RL checkpoint, <root>/checkpoints/rl-...")
    source = manifest["provenance"]
    if not {"from", "sync_tolerance", "ranks", "gpus_per_rank"} <= set(source):
        raise UserError(f"{path}: an older version trained it, which did not write down what a replay needs.")
    store = Store((path if "://" in path else os.path.abspath(path)).rstrip("/").rpartition("/checkpoints/")[0])
    found = checkpoints.find(store, manifest["id"])
    before = None if "from_model" in source else checkpoints.find(store, source["from"])
    start = Path(before.model.path if before else source.get("from_model", ""))
    if not found or not found.path or not (start / "config.json").exists():
        raise UserError(f"{path}: this checkpoint, or the one that RL started from, is gone. The run's own command trains it anew.")
    try:
        training = source["config"]["training"] | source.get("memory", {})
        config = RlConfig.model_validate(
            source["config"] | {"training": training} | {name: source[name] for name in ("ranks", "gpus_per_rank")}
        )
    except ValidationError as error:
        raise UserError(f"{path}: an older version trained it: {'; '.join(describe(error, 'config'))}") from error
    with tempfile.TemporaryDirectory(prefix="replay-", dir=Path(found.path).parent) as place:
        job = RlJob(
            root=store.root,
            id=manifest["id"],
            start_path=str(start),
            output=f"{place}/model",
            weights_file="",
            config=config.model_copy(update={"save_every_steps": config.steps}),
            source=None,
            sync_tolerance=source["sync_tolerance"],
        )
        with ray_session():
            train_rl(job, place)
        lines = zip(read_lines(Path(found.path) / "metrics.jsonl"), read_lines(Path(place) / "metrics.jsonl"), strict=True)
        return [
            Replayed(before["step"], *({name: line[name] for name in MEASURES if name in line} for line in (before, now)))
            for before, now in lines
        ]
