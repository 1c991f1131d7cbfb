"""`specmill delete`: takes a prompt and everything that came from it out of a root.

A tombstone, in a ledger of its own, keeps the prompt from coming back: from then on its row is quarantined wherever it is read. Shards
that hold something of it are written anew without; the next run selects a dataset version that does not know it.
"""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from tasks import tables
from tasks.garbage import stages
from tasks.keys import KEY_BYTES
from tasks.ledger import Ledger
from tasks.manifest import CHECKPOINT, DATASET
from tasks.store import Shard, Store

STAGE = "tombstones"
ROWS = ("completions", "judgements", "rollouts")
"""Stages whose rows are taken out."""
LEASE_SECONDS = 30.0


@dataclass(frozen=True)
class Deleted:
    """Rows taken out, by stage, and finished things that still hold the prompt: they are never changed, only removed as a whole."""

    rows: dict[str, int]
    holders: list[str]


def deleted_prompts(store: Store) -> frozenset[str]:
    """Hashes of the prompts that were deleted."""
    found: set[str] = set()
    for shard in Ledger(store, STAGE).shards():
        found.update(store.read_table(shard.path, ["prompt_hash"])["prompt_hash"].to_pylist())
    return frozenset(found)


def delete_prompt(store: Store, id: str) -> Deleted:
    """Raises UserError when there is no such prompt, or when a run is writing. Interrupted, it is finished by doing it again."""
    hashes = _hashes(store, id) if id.isascii() else set()
    if not hashes:
        raise UserError(f"{store.root}: no prompt with the id {id!r} was ever read or completed here.")
    with ExitStack() as claimed:
        ledgers = {stage: Ledger(store, stage) for stage in dict.fromkeys([STAGE, *stages(store)])}
        for ledger in ledgers.values():
            claimed.enter_context(ledger.writing(LEASE_SECONDS))
        new = sorted(hashes - deleted_prompts(store))
        if new:
            keys = [hashlib.sha256(name.encode()).digest()[:KEY_BYTES] for name in new]
            rows = pa.table([keys, new, [None] * len(new)], schema=tables.TOMBSTONES)
            ledgers[STAGE].commit([store.put_table(f"{STAGE}/shards", rows)])
        rows_by_stage = {stage: _strip(ledger, id, hashes) for stage, ledger in ledgers.items() if stage.split("/")[0] in ROWS}
    return Deleted(rows_by_stage, _holders(store, id))


def _hashes(store: Store, id: str) -> set[str]:
    """Hashes of the prompts that had this id, as far as prompt sets and completions tell."""
    named = [(path, "id") for path, _, _ in store.files("prompts") if "/parts/" in path]
    named += [(shard.path, "prompt_id") for shard in Ledger(store, "completions").shards()]
    found: set[str] = set()
    for path, column in named:
        table = store.read_table(path, [column, "prompt_hash"])
        found.update(table.filter(pc.equal(table[column], id))["prompt_hash"].to_pylist())
    return found


def _strip(ledger: Ledger, id: str, hashes: set[str]) -> int:
    """Writes the shards of a stage that hold rows of the prompt anew, without these rows; returns how many rows that were."""
    store, count = ledger.store, 0
    for shard in ledger.shards():
        table = store.read_table(shard.path)
        theirs = pc.equal(table["prompt_id"], id)
        if "prompt_hash" in table.column_names:
            theirs = pc.or_(theirs, pc.is_in(table["prompt_hash"], pa.array(sorted(hashes))))
        rest = table.filter(pc.invert(theirs))
        if rest.num_rows == table.num_rows:
            continue
        count += table.num_rows - rest.num_rows
        kept: list[Shard] = [store.put_table(shard.path.rpartition("/")[0], rest)] if rest.num_rows else []
        ledger.commit(kept, lost=[shard.path])
        store.delete(shard.path)
    return count


def _holders(store: Store, id: str) -> list[str]:
    """Datasets with the prompt among their completions, and the checkpoints trained on those."""
    datasets = []
    for file in store.glob("datasets/*/*/manifest.json"):
        folder = file.removesuffix("/manifest.json")
        audits = [entry["path"] for entry in store.read_json(file, DATASET)["files"] if entry["path"].startswith("audit/")]
        if any(pc.any(pc.equal(store.read_table(f"{folder}/{path}", ["prompt_id"])["prompt_id"], id)).as_py() for path in audits):
            datasets.append(folder)
    names = {"@".join(folder.split("/")[1:]) for folder in datasets}
    trained: set[str] = set()
    checkpoints = {
        file.removesuffix("/manifest.json"): store.read_json(file, CHECKPOINT) for file in store.glob("checkpoints/*/manifest.json")
    }
    for folder, manifest in checkpoints.items():
        if manifest["provenance"].get("dataset") in names:
            trained |= {folder, *(other for other, later in checkpoints.items() if later["provenance"].get("start") == manifest["weights"])}
    return [*datasets, *sorted(trained)]
