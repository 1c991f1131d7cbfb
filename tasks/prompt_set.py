"""The prompts of a run, checked and written once as Parquet parts of one category each, which the driver and the engines read from.

A set is named by what its sources hold, how they are mapped, what they are compared with, and by what of the policy they were checked
against, so a second start reads only its manifest.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import tables
from tasks.admission import BATCH_ROWS, Admission, find_overlap
from tasks.duplicates import OverlapConfig
from tasks.keys import digest
from tasks.manifest import PROMPTS
from tasks.policy import Policy
from tasks.prompt_parts import write_parts
from tasks.prompts import CapabilityRow, Prompt, Split, case_prompts, read_rows
from tasks.sources import Source, source_files
from tasks.store import Corrupt, Store

FORMAT_VERSION = 4


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

    def tables(self, split: Split, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
        """Number of each part that has prompts of a split, and some columns of these, with `row`, where each is in the part.

        Raises Corrupt when a part does not hold as many as the manifest says.
        """
        numbers = [number for number, part in enumerate(self.parts) if part.splits[split]]
        paths, columns = [self.parts[number].path for number in numbers], list(dict.fromkeys([*columns, "split"]))
        for number, path, found in zip(numbers, paths, self.store.read_tables(paths, columns), strict=True):
            table = self.store.read_table(path, columns) if found is None else found  # says that the part is gone
            table = table.append_column("row", pa.array(np.arange(table.num_rows, dtype=np.int32)))
            table = table.filter(pc.equal(table["split"], split))
            if table.num_rows != self.parts[number].splits[split]:
                raise Corrupt(f"{path}: {table.num_rows} prompts of the split {split!r}, not {self.parts[number].splits[split]}")
            yield number, table

    def prompts(self, split: Split) -> Iterator[Prompt]:
        """The prompts of a split, one after the other."""
        for _, table in self.tables(split, tables.PROMPTS.names):
            for row in table.to_pylist():
                yield Prompt.model_validate({name: row[name] for name in Prompt.model_fields})

    @cached_property
    def capability(self) -> list[CapabilityRow]:
        """Worked answers to everyday tasks."""
        files = self.manifest["capability"]
        rows = [row for file in files for row in self.store.read_table(f"{self.path}/{file}").to_pylist()]
        return [CapabilityRow.model_validate(row) for row in rows]


def load_prompts(
    store: Store,
    source: Path | str | Source | Iterable[Source],
    policy: Policy,
    overlap: OverlapConfig | None = None,
    deleted: frozenset[str] = frozenset(),
    cases: bool = False,
) -> PromptSet:
    """Reads what sources name, and, if asked, the policy's cases.

    Prompts whose hashes are in `deleted` are quarantined. Raises UserError when a file cannot be read, or there is not one usable prompt.
    """
    files = [*source_files(source), *([case_prompts(policy)] if cases else [])]
    overlap = overlap or OverlapConfig()
    benchmarks = source_files(overlap.benchmarks)
    checked = {name: [clause.verdict, clause.generate] for name, (_, clause) in policy.clauses.items()}
    content = [file.identity for file in files]
    compared = [overlap.model_dump(mode="json", exclude={"benchmarks"}), [file.identity for file in benchmarks]]
    path = f"prompts/{digest([FORMAT_VERSION, content, compared, checked, sorted(policy.categories), sorted(deleted)])[:12]}"
    manifest = store.read_json(f"{path}/manifest.json", PROMPTS)
    if manifest is None or not _whole(store, path, manifest):
        never = {name for name, (_, clause) in policy.clauses.items() if clause.generate == "never"}
        admission = Admission(files, overlap.shingle_words if overlap.looks else None, deleted, never)
        rows = read_rows(files, policy)
        while batch := list(islice(rows, BATCH_ROWS)):
            admission.add(batch)
        manifest = write_parts(store, path, admission, policy, find_overlap(admission, overlap, benchmarks))
        store.replace(f"{path}/manifest.json", json.dumps(manifest, indent=1).encode())
    return PromptSet(store, path, manifest)


def _whole(store: Store, path: str, manifest: dict[str, Any]) -> bool:
    """Whether all files of a prompt set are there. What is listed is only compared with what the manifest names."""
    there = {file: size for file, size, _ in store.files(path)}
    return all(there.get(f"{path}/{file['path']}") == file["bytes"] for file in manifest["files"])
