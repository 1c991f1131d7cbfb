"""`specmill gc`: finds the files under a root that no ledger and no manifest names: shards of killed runs, superseded ones, half a dataset.

It lists, which no run relies on to know what counts. It claims the ledgers while it looks, so no run commits what it is about to
remove, and it leaves young files alone: an interrupted training run goes on from them, a publication under way is named by nothing yet.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError
from tasks.ledger import Ledger
from tasks.manifest import ANY, PROMPTS
from tasks.store import Store

FOLDERS = ("completions", "judgements", "rollouts", "tombstones", "prompts", "datasets", "checkpoints", "evaluations")
"""What is looked through; everything else under a root is somebody else's."""
MANIFESTS = ("datasets/*/*", "checkpoints/*", "evaluations/*")
LEASE_SECONDS = 30.0


@dataclass(frozen=True)
class Garbage:
    """A file that nothing names. `age` in seconds."""

    path: str
    bytes: int
    age: float


def garbage(store: Store, older_than: float, lease: float = LEASE_SECONDS) -> Iterator[Garbage]:
    """Files that nothing names and that are at least so many seconds old. Raises UserError when a run is writing to the root."""
    with ExitStack() as claimed:
        named = set()
        for stage in stages(store):
            ledger = Ledger(store, stage)
            claimed.enter_context(ledger.writing(lease))
            named |= {shard.path for shard in ledger.shards()}
        for pattern in MANIFESTS:
            for file in store.glob(f"{pattern}/manifest.json"):
                folder = file.removesuffix("/manifest.json")
                manifest = store.read_json(file, ANY) or {}
                named |= {file, f"{folder}/README.md", *_inside(folder, manifest)}
                if prompts := manifest.get("prompt_set"):
                    place = f"{prompts}/manifest.json"
                    named |= {place, *_inside(prompts, store.read_json(place, PROMPTS) or {})}
        now = time.time()
        for folder in FOLDERS:
            for path, size, changed in store.files(folder):
                if path not in named and "/ledger/" not in path and now - changed >= older_than:
                    yield Garbage(path, size, now - changed)


def check_root(store: Store) -> None:
    """Raises UserError where no run has written: a mistyped root, or somebody else's folder."""
    if not stages(store) and not store.glob("prompts/*/manifest.json"):
        raise UserError(f"{store.root}: neither a ledger nor prompts of Specmill's are here; give the root of a run.")


def _inside(folder: str, manifest: dict[str, Any]) -> list[str]:
    """The files that a manifest names."""
    return [f"{folder}/{entry['path']}" for entry in manifest.get("files", [])]


def stages(store: Store) -> list[str]:
    """Everything that has a ledger, but for what is finished: a checkpoint with a manifest is written no more."""
    found = [file.removesuffix("/ledger/00000000.json") for depth in ("*", "*/*") for file in store.glob(f"{depth}/ledger/00000000.json")]
    return [stage for stage in found if not store.exists(f"{stage}/manifest.json")]
