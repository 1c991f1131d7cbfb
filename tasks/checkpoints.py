"""A trained checkpoint: a Hugging Face directory that exists when its manifest exists, and what it was made from."""

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cluster.models import Model, cache_dir
from tasks.keys import digest
from tasks.manifest import CHECKPOINT
from tasks.store import File, Missing, Store

KEPT = ("model", "rows", "tensorboard", "metrics.jsonl")
"""What of a checkpoint's folder outlives its training."""

STATE = (".training", "train")
"""What does not: the state of offline training, and of RL."""

WEIGHTS = "weights.safetensors"
"""What engines take a trainer's weights from."""


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be evaluated. `weights`: sha256 over its safetensors; `path` is None for the base model."""

    kind: str
    id: str
    model: Model
    weights: str
    path: str | None = None
    reused: bool = False
    label: str = ""
    """What the run calls it: its kind, from the second round on with the round's number."""


def directory(store: Store, id: str) -> Path:
    """Where a checkpoint lies while it is trained and used: under the root, or, if that is no directory, in the cache.

    All nodes of a cluster have to see that place.
    """
    root = Path(store.base) if store.local else cache_dir() / "roots" / digest(store.root)[:16]
    return root / "checkpoints" / id


def storage(store: Store, id: str) -> str:
    """Where the state of a checkpoint's training lies: in its directory, or, if the root is none, under the root."""
    return str(directory(store, id)) if store.local else f"{store.root.rstrip('/')}/checkpoints/{id}"


def forget_state(store: Store, id: str) -> None:
    """Removes what only the training of a finished checkpoint needed, be it finished here or on another machine."""
    place = directory(store, id)
    (place / WEIGHTS).unlink(missing_ok=True)
    # what a killed process had begun to write has a hidden name
    for path in [*(place / name for name in STATE), *place.glob(".*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for name in () if store.local else STATE:
        for remote in [path for path, *_ in store.files(f"checkpoints/{id}/{name}")]:
            store.delete(remote)


def forget_damaged(store: Store, id: str) -> None:
    """Removes what is left of a finished checkpoint that `find` does not find, since files of its model are gone: it is trained anew."""
    manifest = f"checkpoints/{id}/manifest.json"
    if store.exists(manifest):
        shutil.rmtree(directory(store, id) / "model", ignore_errors=True)
        store.delete(manifest)  # comes last: without it, a model is one whose training goes on


def find(store: Store, id: str) -> Checkpoint | None:
    """A finished checkpoint whose model is all there; rows and curves are missed by `verify` alone. A remote one is fetched."""
    manifest = store.read_json(f"checkpoints/{id}/manifest.json", CHECKPOINT)
    if manifest is None:
        return None
    path = directory(store, id)
    for file in manifest["files"]:
        place = path / file["path"]
        if not store.local and not (place.exists() and _sha256(place) == file["sha256"]):
            with suppress(Missing):
                store.download(File(f"checkpoints/{id}/{file['path']}", file["bytes"], file["sha256"]), str(place))
        if file["path"].startswith("model/") and not place.exists():
            return None
    return _checkpoint(manifest, path, reused=True)


def finish(store: Store, id: str, kind: str, provenance: dict[str, Any], metrics: dict[str, Any]) -> Checkpoint:
    """Writes the manifest of a checkpoint whose model directory is complete. It names everything that is to be kept, and comes last."""
    path = directory(store, id)
    files: list[dict[str, Any]] = []
    for file in sorted(file for name in KEPT for file in (path / name, *(path / name).rglob("*")) if file.is_file()):
        files.append({"path": file.relative_to(path).as_posix(), "bytes": file.stat().st_size, "sha256": _sha256(file)})
        if not store.local:
            store.upload(f"checkpoints/{id}/{files[-1]['path']}", str(file))
    weights = hashlib.sha256(json.dumps([f for f in files if f["path"].endswith(".safetensors")]).encode()).hexdigest()
    manifest = {
        "version": 1,
        "kind": kind,
        "id": id,
        "weights": weights,
        "files": files,
        "metrics": metrics,
        "provenance": provenance,
    }
    store.replace(f"checkpoints/{id}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
    return _checkpoint(manifest, path, reused=False)


def _sha256(file: Path) -> str:
    about = file.stat()
    return _digest_of(file, about.st_size, about.st_mtime_ns)


@cache
def _digest_of(file: Path, size: int, changed: int) -> str:
    """Read once per process, unless a file's size or time changes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checkpoint(manifest: dict[str, Any], path: Path, reused: bool) -> Checkpoint:
    model = Model(str(path / "model"), manifest["id"], manifest["weights"][:16])
    return Checkpoint(manifest["kind"], manifest["id"], model, manifest["weights"], str(path), reused, label=manifest["kind"])
