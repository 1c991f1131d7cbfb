"""`specmill show` and `specmill verify`: reads manifests and ledgers, changes nothing, starts nothing."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from tasks import judge
from tasks.ledger import Ledger
from tasks.manifest import ANY
from tasks.select import funnel_markdown
from tasks.store import Corrupt, File, Shard, Store

STAGES = ("completions", "judgements")


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of a directory, or of the file itself. Raises UserError when there is none."""
    try:
        manifest: dict[str, Any] | None = Store(_folder(path)).read_json("manifest.json", ANY)
    except Corrupt as error:
        raise UserError(f"no manifest of Specmill's: {error}") from error
    if manifest is None:
        raise UserError(f"{path}: no manifest.json of Specmill here. Give a run, dataset, checkpoint or evaluation directory.")
    return manifest


def describe(path: str, manifest: dict[str, Any]) -> str:
    """A manifest for people: what it is, where it came from, the funnel."""
    lines = [f"{manifest['kind']} {manifest.get('name', '')}{'@' if 'name' in manifest else ''}{manifest['id']}  ({path})"]
    for name in ("rows", "spare", "preferences", "balance", "parent", "datasets", "checkpoints", "evaluations", "stages"):
        if name in manifest:
            lines.append(f"{name}: {json.dumps(manifest[name])}")
    lines.append("lineage:")
    provenance = {name: value for name, value in manifest.get("provenance", {}).items() if name != "parameters"}
    lines += [f"  {name}: {json.dumps(value)}" for name, value in provenance.items()]
    datasets = [manifest]
    if manifest["kind"] == "run":
        datasets = [_root_of(Store(_folder(path))).read_json(f"{part}/manifest.json", ANY) or {} for part in manifest["datasets"]]
    for dataset in datasets:
        if "funnel" in dataset:
            lines += ["", funnel_markdown(dataset["funnel"])]
    return "\n".join(lines)


def problems(path: str) -> tuple[list[str], int]:
    """Everything that is off under a path, and the number of files that were checked."""
    store = Store(path)
    manifest = store.read_json("manifest.json", ANY)
    if manifest is None and not any(store.exists(f"{stage}/ledger/{0:08d}.json") for stage in STAGES):
        raise UserError(f"{path}: neither a manifest.json nor a ledger here; give a root or a directory that Specmill wrote.")
    found: list[str] = []
    checked = 0
    if manifest is None:
        for stage in [*STAGES, *store.glob("rollouts/*")]:
            off, count = _ledger_problems(store, stage)
            found, checked = found + off, checked + count
        for pattern in ("prompts/*", "datasets/*/*", "checkpoints/*", "evaluations/*", "runs/*"):
            for file in store.glob(f"{pattern}/manifest.json"):
                off, count = _manifest_problems(store, file.rpartition("/")[0])
                found, checked = found + off, checked + count
        return found, checked
    found, checked = _manifest_problems(store, "")
    if manifest["kind"] == "run":
        root = _root_of(store)
        for part in [*manifest["datasets"], *manifest["checkpoints"], *manifest["evaluations"]]:
            off, count = _manifest_problems(root, part)
            found, checked = found + off, checked + count
    return found, checked


def _folder(path: str) -> str:
    """The directory that is meant by a path of it or of its manifest."""
    return path if os.path.isdir(path) or "://" in path else str(Path(path).parent)


def _root_of(run: Store) -> Store:
    """The root above a run's directory."""
    place = run.base if run.local else run.root.rstrip("/")
    return Store(place.rsplit("/", 2)[0])


def _manifest_problems(store: Store, folder: str) -> tuple[list[str], int]:
    place = f"{folder}/" if folder else ""
    try:
        manifest = store.read_json(f"{place}manifest.json", ANY)
    except Corrupt as error:
        return [str(error)], 0
    if manifest is None:
        return [f"{place}manifest.json: missing"], 0
    found = []
    for file in manifest.get("files", []):
        wrong = store.verify(File(f"{place}{file['path']}", file["bytes"], file["sha256"]))
        if wrong:
            found.append(wrong)
    if manifest["kind"] == "dataset":
        found += [f"{place or store.root}: {line}" for line in _dataset_balance(manifest)]
    return found, len(manifest.get("files", []))


def _dataset_balance(manifest: dict[str, Any]) -> Iterator[str]:
    balance = manifest["balance"]
    if balance["completions"] != balance["kept"] + balance["dropped"]:
        yield f"balance: {balance['completions']} completions are not {balance['kept']} kept + {balance['dropped']} dropped"
    counted = sum(count for counts in manifest["funnel"].values() for count in counts.values())
    if counted != balance["completions"]:
        yield f"funnel: adds up to {counted}, not to {balance['completions']} completions"
    rows = sum(file.get("rows", 0) for file in manifest["files"] if file["path"].startswith("data/"))
    if not rows == manifest["rows"] == balance["kept"]:
        yield f"rows: {rows} in data/, {manifest['rows']} in the manifest, {balance['kept']} kept"


def _ledger_problems(store: Store, stage: str) -> tuple[list[str], int]:
    """A key of a completion is in one shard. That of a judgement names what was judged: of a completion that was lost and, drawn again,
    says the same, the runs are made again, and the last ones count."""
    found: list[str] = []
    owner: dict[bytes, str] = {}
    try:
        shards: list[Shard] = Ledger(store, stage).shards()
    except Corrupt as error:
        return [str(error)], 0
    for shard in shards:
        wrong = store.verify(shard)
        if wrong:
            found.append(wrong)
            continue
        try:
            table = store.read_table(shard.path, ["key", "quarantined"])
        except Corrupt as error:
            found.append(str(error))
            continue
        quarantined = table.num_rows - table["quarantined"].null_count
        if (table.num_rows, quarantined) != (shard.rows, shard.quarantined):
            found.append(
                f"{shard.path}: {table.num_rows} rows ({quarantined} quarantined), the ledger says {shard.rows} ({shard.quarantined})"
            )
        for key in table["key"].to_pylist():
            if key in owner and stage != judge.STAGE:
                found.append(f"{stage}: key {key.hex()} is in {owner[key]} and in {shard.path}")
            owner[key] = shard.path
    return found, len(shards)
