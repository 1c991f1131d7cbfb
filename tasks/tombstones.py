"""`specmill delete`: takes a prompt and everything that came from it out of a root.

A tombstone, in a ledger of its own, keeps the prompt from coming back: from then on its row is quarantined wherever it is read. Shards
that hold something of it are written anew without; the next run selects a dataset version that does not know it.
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from tasks import tables
from tasks.garbage import stages
from tasks.keys import KEY_BYTES
from tasks.ledger import Ledger
from tasks.manifest import ANY, CHECKPOINT
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


def delete_prompt(store: Store, id: str, lease: float = LEASE_SECONDS) -> Deleted:
    """Raises UserError when there is no such prompt, or when a run is writing. Interrupted, it is finished by doing it again."""
    hashes, ids = _names(store, id) if id.isascii() else (set(), set())
    if not hashes:
        raise UserError(f"{store.root}: no prompt with the id {id!r} was ever read or completed here.")
    with ExitStack() as claimed:
        ledgers = {stage: Ledger(store, stage) for stage in dict.fromkeys([STAGE, *stages(store)])}
        for ledger in ledgers.values():
            claimed.enter_context(ledger.writing(lease))
        new = sorted(hashes - deleted_prompts(store))
        if new:
            keys = [hashlib.sha256(name.encode()).digest()[:KEY_BYTES] for name in new]
            rows = pa.table([keys, new, [None] * len(new)], schema=tables.TOMBSTONES)
            ledgers[STAGE].commit([store.put_table(f"{STAGE}/shards", rows)])
        rows_by_stage = {stage: _strip(ledger, ids, hashes) for stage, ledger in ledgers.items() if stage.split("/")[0] in ROWS}
    return Deleted(rows_by_stage, _holders(store, ids, [stage for stage, rows in rows_by_stage.items() if rows]))


def _names(store: Store, id: str) -> tuple[set[str], set[str]]:
    """Hashes of the prompts that had this id, and all ids that these had, as far as prompt sets and completions tell."""
    named = [(path, "id") for path, _, _ in store.files("prompts") if "/parts/" in path]
    named += [(shard.path, "prompt_id") for shard in Ledger(store, "completions").shards()]
    hashes: set[str] = set()
    for path, column in named:
        table = store.read_table(path, [column, "prompt_hash"])
        hashes.update(table.filter(pc.equal(table[column], id))["prompt_hash"].to_pylist())
    ids: set[str] = set()
    for path, column in named if hashes else ():
        table = store.read_table(path, [column, "prompt_hash"])
        ids.update(table.filter(_among(table["prompt_hash"], hashes))[column].to_pylist())
    return hashes, ids


def _among(column: pa.ChunkedArray, values: set[str]) -> pa.ChunkedArray:
    return pc.is_in(column, pa.array(sorted(values), pa.string()))


def _strip(ledger: Ledger, ids: set[str], hashes: set[str]) -> int:
    """Writes the shards of a stage that hold rows of the prompt anew, without these rows; returns how many rows that were.

    Shards that the ledger does not name go as well: superseded ones, and what a killed run or deletion left behind.
    """
    store, count = ledger.store, 0
    for shard in ledger.shards():
        table = store.read_table(shard.path)
        theirs = _among(table["prompt_hash"], hashes) if "prompt_hash" in table.column_names else _among(table["prompt_id"], ids)
        rest = table.filter(pc.invert(theirs))
        if rest.num_rows == table.num_rows:
            continue
        count += table.num_rows - rest.num_rows
        kept: list[Shard] = [store.put_table(shard.path.rpartition("/")[0], rest)] if rest.num_rows else []
        ledger.commit(kept, lost=[shard.path])
    named = {shard.path for shard in ledger.shards()}
    for path, _, _ in store.files(ledger.stage):
        if path not in named and "/ledger/" not in path:
            store.delete(path)
    return count


def _holders(store: Store, ids: set[str], stripped: Sequence[str]) -> list[str]:
    """Prompt sets, datasets and evaluations with the prompt among their rows, and the checkpoints that were trained on it.

    `stripped`: stages of which rows were taken out; rollouts name the checkpoint that learned from them.
    """
    prompts, datasets, evaluations = (
        [file.removesuffix("/manifest.json") for file in store.glob(f"{pattern}/manifest.json")]
        for pattern in ("prompts/*", "datasets/*/*", "evaluations/*")
    )
    prompts = [folder for folder in prompts if _holds(store, folder, "parts/", "id", ids)]
    datasets = [folder for folder in datasets if _holds(store, folder, "audit/", "prompt_id", ids)]
    evaluations = [folder for folder in evaluations if _holds(store, folder, "", "prompt_id", ids)]
    names = {"@".join(folder.split("/")[1:]) for folder in datasets}
    trained = {stage.replace("rollouts/", "checkpoints/") for stage in stripped if stage.startswith("rollouts/")}
    checkpoints = {
        file.removesuffix("/manifest.json"): store.read_json(file, CHECKPOINT) for file in store.glob("checkpoints/*/manifest.json")
    }
    trained |= {folder for folder, manifest in checkpoints.items() if manifest["provenance"].get("dataset") in names}
    while True:  # whatever was trained from one of these
        weights = {checkpoints[folder]["weights"] for folder in trained if folder in checkpoints}
        later = {folder for folder, manifest in checkpoints.items() if manifest["provenance"].get("start") in weights}
        if later <= trained:
            break
        trained |= later
    return [*prompts, *datasets, *sorted(trained), *evaluations]


def _holds(store: Store, folder: str, kind: str, column: str, ids: set[str]) -> bool:
    """Whether one of the files that a manifest names, of those whose names begin so, has a row of the prompt."""
    files = [entry["path"] for entry in store.read_json(f"{folder}/manifest.json", ANY).get("files", []) if entry["path"].startswith(kind)]
    return any(pc.any(_among(store.read_table(f"{folder}/{path}", [column])[column], ids)).as_py() for path in files)
