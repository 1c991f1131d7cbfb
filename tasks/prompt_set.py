"""The prompts of a run, checked and written once as Parquet parts of one category each, which the driver and the engines read from.

A set is named by what its source files hold and by what of the policy they were checked against, so a second start reads only its
manifest. Memory does not grow with the texts: uniqueness is checked on 16-byte hashes.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from tasks import tables
from tasks.keys import KEY_BYTES, digest
from tasks.keyset import Keys, KeySet, keys_of
from tasks.policy import Policy
from tasks.prompts import SPLIT_SHARES, CapabilityRow, Prompt, Split, named_split, prompt_hash, read_rows, source_files
from tasks.store import Shard, Store

FORMAT_VERSION = 1
PART_ROWS = 1024
BATCH_ROWS = 4096
SHOWN = 20
"""Quarantined rows that the manifest repeats, for reports; all of them are in a file."""


@dataclass(frozen=True)
class Part:
    """Prompts of one category; `splits` counts them by split."""

    path: str
    category: str
    rows: int
    splits: dict[Split, int]


class PromptSet:
    """Prompts on disk."""

    def __init__(self, store: Store, path: str, manifest: dict[str, Any]) -> None:
        self.store, self.path, self.manifest = store, path, manifest
        self.parts = [Part(f"{path}/{part.pop('path')}", **part) for part in [dict(part) for part in manifest["parts"]]]

    @property
    def hash(self) -> str:
        """Hash of all usable rows."""
        return str(self.manifest["hash"])

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each kind: prompts, capability, quarantined."""
        return dict(self.manifest["counts"])

    def size(self, split: Split) -> int:
        """Prompts of a split."""
        return sum(part.splits[split] for part in self.parts)

    def table(self, part: Part, split: Split, columns: list[str]) -> pa.Table:
        """Some columns of a part's prompts of a split, and `row`, where each is in the part."""
        table = self.store.read_table(part.path, list(dict.fromkeys([*columns, "group", "split"])))
        table = table.append_column("row", pa.array(np.arange(table.num_rows, dtype=np.int32)))
        reserved = pc.is_in(table["group"], value_set=pa.array(self.manifest["reserved"], pa.string()))
        splits = pc.if_else(reserved, "eval", table["split"])
        return table.set_column(table.column_names.index("split"), "split", splits).filter(pc.equal(splits, split))

    def prompts(self, split: Split) -> Iterator[Prompt]:
        """The prompts of a split, one after the other."""
        for part in self.parts:
            if part.splits[split]:
                for row in self.table(part, split, tables.PROMPTS.names).to_pylist():
                    yield Prompt.model_validate({name: row[name] for name in Prompt.model_fields})

    @cached_property
    def capability(self) -> list[CapabilityRow]:
        """Worked answers to everyday tasks."""
        files = self.manifest["capability"]
        rows = [row for file in files for row in self.store.read_table(f"{self.path}/{file}").to_pylist()]
        return [CapabilityRow.model_validate(row) for row in rows]


def load_prompts(store: Store, source: Path | str, policy: Policy, deleted: frozenset[str] = frozenset()) -> PromptSet:
    """Reads a JSONL file or a directory of them. Raises UserError when there is no file or not one usable prompt.

    Prompts whose hashes are in `deleted` are quarantined.
    """
    files = source_files(source)
    checked = {name: [clause.verdict, clause.generate] for name, (_, clause) in policy.clauses.items()}
    content = [[str(file), _file_hash(file)] for file in files]
    path = f"prompts/{digest([FORMAT_VERSION, content, checked, sorted(policy.categories), sorted(deleted)])[:12]}"
    manifest = store.read_json(f"{path}/manifest.json")
    if manifest is None:
        writer = _Writer(store, path, policy, deleted)
        rows = read_rows(files, policy)
        while batch := list(islice(rows, BATCH_ROWS)):
            writer.add(batch)
        manifest = writer.finish(str(source))
        store.replace(f"{path}/manifest.json", json.dumps(manifest, indent=1).encode())
    return PromptSet(store, path, manifest)


class _Writer:
    """Takes rows in batches, puts the good ones into parts and the others aside."""

    def __init__(self, store: Store, path: str, policy: Policy, deleted: frozenset[str]) -> None:
        self.store, self.path, self.policy, self.deleted = store, path, policy, deleted
        self.never = {name for name, (_, clause) in policy.clauses.items() if clause.generate == "never"}
        self.reserved: set[str] = set()
        self.files: dict[str, list[Shard]] = defaultdict(list)
        self.waiting: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.shown: list[dict[str, Any]] = []
        self.counts = Counter({"prompts": 0, "capability": 0, "quarantined": 0})
        self.hash = hashlib.sha256()
        self.ids, self.conversations, self.groups = KeySet(), KeySet(), KeySet()

    def add(self, batch: list[tuple[Path, int, Prompt | CapabilityRow | str]]) -> None:
        """Rows of equal id or conversation after the first, and prompts that send their group to a second split, are quarantined."""
        good: list[tuple[Path, int, Prompt | CapabilityRow]] = []
        for file, line, item in batch:
            if isinstance(item, str):
                self._quarantine(file, line, item)
            elif prompt_hash(item.messages) in self.deleted:
                self._quarantine(file, line, "deleted by request")
            else:
                good.append((file, line, item))
        for known, name, reason in (
            (self.ids, lambda item: item.id, "id: {id!r} is used by an earlier row"),
            (self.conversations, lambda item: prompt_hash(item.messages), "messages: the same as those of an earlier row ({id!r} here)"),
        ):
            fresh = known.add(_hashes([name(item) for _, _, item in good]))
            for (file, line, item), new in zip(good, fresh, strict=True):
                if not new:
                    self._quarantine(file, line, reason.format(id=item.id))
            good = [row for row, new in zip(good, fresh, strict=True) if new]
        prompts = [(file, line, item) for file, line, item in good if isinstance(item, Prompt)]
        agree = self._one_split([prompt for _, _, prompt in prompts])
        for (file, line, prompt), fine in zip(prompts, agree, strict=True):
            if fine:
                self._keep(prompt)
            else:
                split = prompt.split or "none"
                self._quarantine(file, line, f"split: {split}, but an earlier row of group {prompt.group!r} says another")
        for _, _, item in good:
            if isinstance(item, CapabilityRow):
                self.counts["capability"] += 1
                self._write("capability", item.model_dump())

    def finish(self, source: str) -> dict[str, Any]:
        """The manifest. Raises UserError when there is not one prompt."""
        if not self.counts["prompts"]:
            worst = "".join(f"\n  {row['file']}:{row['line']}: {row['reason']}" for row in self.shown[:3])
            raise UserError(f"{source}: not one usable prompt ({self.counts['quarantined']} rows quarantined).{worst}")
        for kind in list(self.waiting):
            self._flush(kind)
        parts = []
        for category in self.policy.categories:
            for file in self.files.pop(category, []):
                found = self.store.read_table(file.path, ["group", "split"]).to_pydict()
                splits = Counter("eval" if group in self.reserved else split for group, split in zip(*found.values(), strict=True))
                counted = {split: splits[split] for split in SPLIT_SHARES}
                parts.append({"path": self._inside(file.path), "category": category, "rows": file.rows, "splits": counted})
                self.files["prompts"].append(file)
        files = [asdict(file) | {"path": self._inside(file.path)} for files in self.files.values() for file in files]
        return {
            "version": 1,
            "kind": "prompts",
            "id": self.path.rpartition("/")[2],
            "hash": self.hash.hexdigest(),
            "source": source,
            "counts": dict(self.counts),
            "parts": parts,
            "capability": [self._inside(file.path) for file in self.files["capability"]],
            "reserved": sorted(self.reserved),
            "quarantined": self.shown,
            "files": files,
        }

    def _keep(self, prompt: Prompt) -> None:
        self.counts["prompts"] += 1
        if self.never.intersection(prompt.ideal_clauses):
            self.reserved.add(prompt.group)
        named = {"prompt_hash": prompt_hash(prompt.messages), "split": prompt.split or named_split(prompt.group)}
        self._write(prompt.category, prompt.model_dump() | named)

    def _one_split(self, prompts: list[Prompt]) -> list[bool]:
        """Which prompts name the split that the first prompt of their group names."""
        splits = ["", *SPLIT_SHARES]
        groups = _hashes([prompt.group for prompt in prompts])
        choices = np.array([splits.index(prompt.split or "") for prompt in prompts], np.uint8)
        _, first, which = np.unique(groups, return_index=True, return_inverse=True)
        agree = choices == choices[first][which] if len(prompts) else np.zeros(0, np.bool_)
        for choice in range(len(splits)):
            agree &= (choices == choice) | ~self.groups.holds(_marked(groups, np.full(len(groups), choice, np.uint8)))
        self.groups.add(_marked(groups, choices)[agree])
        return list(agree)

    def _quarantine(self, file: Path, line: int, reason: str) -> None:
        row = {"file": str(file), "line": line, "reason": reason}
        self.counts["quarantined"] += 1
        if len(self.shown) < SHOWN:
            self.shown.append(row)
        self._write("quarantined", row)

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        if kind != "quarantined":
            self.hash.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        self.waiting[kind].append(row)
        if len(self.waiting[kind]) == PART_ROWS:
            self._flush(kind)

    def _flush(self, kind: str) -> None:
        schema = {"capability": tables.CAPABILITY, "quarantined": tables.QUARANTINED}.get(kind, tables.PROMPTS)
        folder = kind if kind in ("capability", "quarantined") else "parts"
        table = pa.Table.from_pylist(self.waiting.pop(kind), schema=schema)
        self.files[kind].append(self.store.put_table(f"{self.path}/{folder}", table))

    def _inside(self, path: str) -> str:
        return path.removeprefix(f"{self.path}/")


def _hashes(names: list[str]) -> Keys:
    return keys_of([hashlib.sha256(name.encode()).digest()[:KEY_BYTES] for name in names])


def _marked(keys: Keys, marks: np.ndarray) -> Keys:
    """Keys whose last byte is replaced by a mark."""
    marked = keys.copy().view(np.uint8).reshape(-1, KEY_BYTES)
    marked[:, -1] = marks
    return marked.reshape(-1).view(keys.dtype)


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
