"""Writes admitted prompts as Parquet parts of one category each, beside them what was quarantined and what overlaps, and a manifest."""

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from pydantic_core import to_json

from cluster.errors import SpecmillError, UserError
from tasks import tables
from tasks.admission import Admission, Overlap, split_of
from tasks.policy import Policy
from tasks.prompts import SPLIT_SHARES
from tasks.store import Shard, Store

PART_ROWS = 1024
SHOWN = 20
"""Quarantined rows and overlaps of each kind that the manifest repeats, for reports; all of them are in files."""


def write_parts(store: Store, path: str, admission: Admission, policy: Policy, overlap: Overlap) -> dict[str, Any]:
    """Writes everything under `path` and returns the manifest. Raises UserError when there is not one prompt."""
    writer = _Writer(store, path, admission)
    for row in admission.quarantined:
        writer.quarantine(row["file"], row["line"], row["reason"])
    for number, row in enumerate(admission.rows):
        if number in overlap.dropped:
            writer.quarantine(row["file"], row["line"], overlap.dropped[number])
        else:
            writer.keep(row)
    for match in overlap.found:
        writer.write("overlap", match)
    return writer.finish(policy, overlap)


class _Writer:
    """Takes rows one by one, puts the good ones into parts and the others aside."""

    def __init__(self, store: Store, path: str, admission: Admission) -> None:
        self.store, self.path, self.admission = store, path, admission
        self.files: dict[tuple[str, str], list[Shard]] = defaultdict(list)
        """By folder and, of prompts, category; so is `waiting`."""
        self.splits: dict[str, Counter[str]] = {}
        self.waiting: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self.shown: list[dict[str, Any]] = []
        self.reasons: dict[str, dict[str, Any]] = {}
        self.counts = [Counter({"prompts": 0, "capability": 0, "quarantined": 0}) for _ in admission.files]
        self.hash = hashlib.sha256()

    def quarantine(self, file: int, line: int, reason: str) -> None:
        """Puts a row aside."""
        row = {"file": self.admission.files[file].path, "line": line, "reason": reason}
        self.counts[file]["quarantined"] += 1
        reasons = self.reasons.setdefault(field_of(reason), {"rows": 0, "first": f"{row['file']}:{line}: {reason}"})
        reasons["rows"] += 1
        if len(self.shown) < SHOWN:
            self.shown.append(row)
        self.write("quarantined", row)

    def keep(self, row: dict[str, Any]) -> None:
        """Takes an admitted row."""
        file = row["file"]
        row = {name: value for name, value in row.items() if name not in ("file", "line")}
        kind = "prompts" if "group" in row else "capability"
        self.counts[file][kind] += 1
        if kind == "prompts":
            row["split"] = split_of(row, self.admission.reserved)
        self.hash.update(to_json(row))
        self.write("parts" if kind == "prompts" else kind, row, row.get("category", ""))

    def write(self, folder: str, row: dict[str, Any], category: str = "") -> None:
        """Adds a row to the file of a folder, and of a category, that is being filled."""
        self.waiting[folder, category].append(row)
        if len(self.waiting[folder, category]) == PART_ROWS:
            self._flush(folder, category)

    def finish(self, policy: Policy, overlap: Overlap) -> dict[str, Any]:
        """The manifest. Raises UserError when there is not one prompt, SpecmillError when rows went missing."""
        sources = []
        for file, rows, found in zip(self.admission.files, self.admission.read, self.counts, strict=True):
            sources.append({"file": file.path, "rows": rows, **found, "left_out": dict(+file.left_out)})
            if rows != found.total():
                raise SpecmillError(f"{file.path}: the rows do not balance: {sources[-1]}")
        counts = {kind: sum(counted[kind] for counted in self.counts) for kind in ("prompts", "capability", "quarantined")}
        if not counts["prompts"]:
            worst = "".join(f"\n  {row['file']}:{row['line']}: {row['reason']}" for row in self.shown[:3])
            places = ", ".join(dict.fromkeys(file.source.place for file in self.admission.files))
            raise UserError(f"{places}: not one usable prompt ({counts['quarantined']} rows quarantined).{worst}")
        for folder, category in list(self.waiting):
            self._flush(folder, category)
        parts = []
        for category in policy.categories:
            for shard in self.files["parts", category]:
                counted = {split: self.splits[shard.path][split] for split in SPLIT_SHARES}
                parts.append({"path": self._inside(shard.path), "category": category, "rows": shard.rows, "splits": counted})
        files = [asdict(shard) | {"path": self._inside(shard.path)} for shards in self.files.values() for shard in shards]
        kinds = ("contamination", "near-duplicate")
        return {
            "version": 1,
            "kind": "prompts",
            "id": self.path.rpartition("/")[2],
            "hash": self.hash.hexdigest(),
            "source": ", ".join(dict.fromkeys(file.source.place for file in self.admission.files)),
            "sources": sources,
            "counts": counts,
            "parts": parts,
            "capability": [self._inside(shard.path) for shard in self.files["capability", ""]],
            "quarantined": self.shown,
            "reasons": self.reasons,
            "overlap": {
                **overlap.counts,
                "benchmarks": overlap.benchmarks,
                "examples": [row for kind in kinds for row in [row for row in overlap.found if row["kind"] == kind][:SHOWN]],
            },
            "files": files,
        }

    def _flush(self, folder: str, category: str) -> None:
        table = pa.Table.from_pylist(self.waiting.pop((folder, category)), schema=tables.FOLDERS[folder])
        shard = self.store.put_table(f"{self.path}/{folder}", table)
        self.files[folder, category].append(shard)
        if folder == "parts":
            self.splits[shard.path] = Counter(table["split"].to_pylist())

    def _inside(self, path: str) -> str:
        return path.removeprefix(f"{self.path}/")


def field_of(reason: str) -> str:
    """The field that a reason names first; `row` when it is about the whole."""
    found = re.match(r"([a-z][a-z_-]*)[.:]", reason)
    return found[1] if found else "row"
