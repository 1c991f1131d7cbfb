"""`specmill replay`: trains once more from the rollouts that an RL checkpoint learnt from, without engines, and compares the losses."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.session import ray_session
from flows.inspect import read_manifest
from tasks.rl import RlJob, train_rl
from tasks.rl_config import RlConfig
from tasks.training_log import read_lines

TOLERANCE = 1e-6
"""Largest difference of a loss, relative to the larger of it and 1, on the kind of machine that trained."""


@dataclass(frozen=True)
class Replayed:
    """One step: its loss when it was trained, and now."""

    step: int
    recorded: float
    found: float

    @property
    def differs(self) -> bool:
        """Whether the losses are not the same."""
        return abs(self.recorded - self.found) > TOLERANCE * max(1.0, abs(self.recorded))


def replay(path: str) -> list[Replayed]:
    """Every step of the RL checkpoint in the directory `path`. Raises UserError when it is none, or what it started from is gone."""
    folder = Path(path).absolute()
    manifest = read_manifest(path)
    if manifest["kind"] != "rl":
        raise UserError(f"{path}: a {manifest['kind']} has no rollouts. Give the directory of an RL checkpoint, <root>/checkpoints/rl-...")
    root, source = folder.parent.parent, manifest["provenance"]
    if not {"from", "sync_tolerance", "ranks", "gpus_per_rank"} <= set(source):
        raise UserError(f"{path}: an older version trained it, which did not write down what a replay needs.")
    start = root / "checkpoints" / source["from"] / "model"
    if not start.exists():
        raise UserError(f"{start}: the checkpoint that RL started from is gone. The run's own command trains it anew.")
    config = RlConfig.model_validate(source["config"] | {name: source[name] for name in ("ranks", "gpus_per_rank")})
    with tempfile.TemporaryDirectory(prefix="replay-", dir=root) as place:
        job = RlJob(
            root=str(root),
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
        lines = zip(read_lines(folder / "metrics.jsonl"), read_lines(Path(place) / "metrics.jsonl"), strict=True)
        return [Replayed(before["step"], before["loss"], now["loss"]) for before, now in lines]
