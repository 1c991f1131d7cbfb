"""Which rows of the sources become prompts: unique ones, whose scenario group goes to one split, and which of them resemble others.

Rows wait in a temporary file until all are read, because a row's group may be reserved for evaluation by a later one. Memory does not
grow with the texts: uniqueness is checked on 16-byte hashes.
"""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import compress, islice
from typing import Any

import numpy as np

from cluster.errors import UserError
from tasks.duplicates import OverlapConfig, Rows, pairs_between, pairs_within
from tasks.keys import KEY_BYTES
from tasks.keyset import Keys, KeySet, keys_of
from tasks.prompts import SPLIT_SHARES, CapabilityRow, Prompt, Split, named_split, prompt_hash, read_conversations
from tasks.sources import SourceFile

Item = Prompt | CapabilityRow
BATCH_ROWS = 4096


class Admission:
    """The rows read so far: admitted ones in `rows`, the others in `quarantined`, both on disk."""

    def __init__(self, files: list[SourceFile], words: int | None, deleted: frozenset[str], never: set[str]) -> None:
        self.files, self.deleted, self.never = files, deleted, never
        self.rows, self.quarantined = Rows(words), Rows(None)
        self.read = [0] * len(files)
        """Rows read of each file."""
        self.reserved: set[str] = set()
        """Scenario groups with a prompt that is decided by one of the clauses `never`: they are for evaluation only."""
        self._numbers = {id(file): number for number, file in enumerate(files)}
        self.ids, self.conversations, self.groups = KeySet(), KeySet(), KeySet()

    def add(self, batch: list[tuple[SourceFile, int, Item | str]]) -> None:
        """Rows of equal id or conversation after the first, and prompts that send their group to a second split, are quarantined."""
        good: list[tuple[int, int, str, Item]] = []
        bad: list[tuple[int, int, str]] = []
        for source, line, item in batch:
            file = self._numbers[id(source)]
            self.read[file] += 1
            if isinstance(item, str):
                bad.append((file, line, item))
            elif (name := prompt_hash(item.messages)) in self.deleted:
                bad.append((file, line, "deleted by request"))
            else:
                good.append((file, line, name, item))
        fresh = self.ids.add(_hashes([item.id for *_, item in good]))
        bad += [(*row[:2], f"id: {row[3].id!r} is used by an earlier row") for row, new in zip(good, fresh, strict=True) if not new]
        good = list(compress(good, fresh))
        fresh = self.conversations.add(keys_of([bytes.fromhex(name)[:KEY_BYTES] for _, _, name, _ in good]))
        same = "messages: the same as those of an earlier row ({!r} here)"
        bad += [(*row[:2], same.format(row[3].id)) for row, new in zip(good, fresh, strict=True) if not new]
        good = list(compress(good, fresh))
        prompts = [(row, row[3]) for row in good if isinstance(row[3], Prompt)]
        admitted: list[tuple[int, int, str, Item]] = []
        for (row, prompt), fine in zip(prompts, self._one_split([prompt for _, prompt in prompts]), strict=True):
            if fine:
                admitted.append(row)
                if self.never.intersection(prompt.ideal_clauses):
                    self.reserved.add(prompt.group)
            else:
                bad.append((*row[:2], f"split: {prompt.split or 'none'}, but an earlier row of group {prompt.group!r} says another"))
        admitted += [row for row in good if isinstance(row[3], CapabilityRow)]
        self.rows.add([{"file": file, "line": line, "prompt_hash": name} | item.model_dump() for file, line, name, item in admitted])
        self.quarantined.add([{"file": file, "line": line, "reason": reason} for file, line, reason in bad])

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


@dataclass
class Overlap:
    """What resembles what: `found` in the order of the rows, and the reason of each row that is dropped."""

    found: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    """File, rows, and how many of them are unusable, with the first reason."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each kind that resemble another, and how many are dropped for it."""
        kinds = Counter(row["kind"] for row in self.found)
        return {"near_duplicates": kinds["near-duplicate"], "contaminated": kinds["contamination"], "dropped": len(self.dropped)}


def find_overlap(admission: Admission, config: OverlapConfig, benchmarks: list[SourceFile]) -> Overlap:
    """Rows that resemble an earlier one of their side, and training rows that resemble an evaluation prompt. Raises UserError."""
    overlap = Overlap()
    if not config.looks:
        return overlap
    rows, files = admission.rows, admission.files
    held_out = np.fromiter((split_of(row, admission.reserved) == "eval" for row in rows), np.bool_, len(rows))
    contaminated: dict[int, Match] = {}
    if config.contamination != "off":
        external, overlap.benchmarks = _conversations(benchmarks, config.shingle_words)
        training = np.flatnonzero(~held_out)
        for others, some, places in ((rows, np.flatnonzero(held_out), files), (external, np.arange(len(external)), benchmarks)):
            for number, other, similarity in pairs_between(rows, training, others, some, config.similarity):
                if number not in contaminated or contaminated[number].similarity < similarity:
                    contaminated[number] = Match(similarity, others[other]["id"], _place(others[other], places))
    duplicates: dict[int, Match] = {}
    if config.duplicates != "off":
        gone = set(contaminated) if config.contamination == "drop" else set()
        for first, number, similarity in sorted(pairs_within(rows, config.similarity), key=lambda pair: pair[1::-1]):
            if held_out[first] == held_out[number] and not {first, number} & gone and first not in duplicates and number not in duplicates:
                duplicates[number] = Match(similarity, rows[first]["id"], _place(rows[first], files))
    for kind, matches, drop, what in (
        ("contamination", contaminated, config.contamination == "drop", "the evaluation prompt"),
        ("near-duplicate", duplicates, config.duplicates == "drop", "the earlier row"),
    ):
        for number, match in sorted(matches.items()):
            row = rows[number]
            where = {"file": files[row["file"]].path, "line": row["line"], "id": row["id"]}
            overlap.found.append({"kind": kind, **where, **asdict(match), "dropped": drop})
            if drop:
                overlap.dropped[number] = f"{kind}: {match.similarity:.2f} like {what} {match.resembles!r} ({match.at})"
    return overlap


@dataclass(frozen=True)
class Match:
    """The row that another resembles: its id and where it is."""

    similarity: float
    resembles: str
    at: str


def split_of(row: dict[str, Any], reserved: set[str]) -> Split | None:
    """The split of an admitted row; None for a capability row."""
    if "group" not in row:
        return None
    return "eval" if row["group"] in reserved else row["split"] or named_split(row["group"])


def _conversations(files: list[SourceFile], words: int) -> tuple[Rows, list[dict[str, Any]]]:
    """The conversations of benchmarks, and what is in each file. Raises UserError for a file without one."""
    found, described = Rows(words), []
    for index, file in enumerate(files):
        before, counts, reason = len(found), Counter({"rows": 0, "unusable": 0}), None
        rows = read_conversations(file)
        while batch := list(islice(rows, BATCH_ROWS)):
            usable = [{"file": index, "line": line} | item.model_dump(mode="json") for line, item in batch if not isinstance(item, str)]
            reason = reason or next((f"{file}:{line}: {item}" for line, item in batch if isinstance(item, str)), None)
            counts.update(rows=len(batch), unusable=len(batch) - len(usable))
            found.add(usable)
        if len(found) == before:
            raise UserError(f"overlap.benchmarks: {file}: not one usable prompt ({counts['rows']} rows)." + f"\n  {reason}" * bool(reason))
        described.append({"file": file.path, **counts, "first_reason": reason})
    return found, described


def _place(row: dict[str, Any], files: list[SourceFile]) -> str:
    return f"{files[row['file']].path}:{row['line']}"


def _hashes(names: list[str]) -> Keys:
    return keys_of([hashlib.sha256(name.encode()).digest()[:KEY_BYTES] for name in names])


def _marked(keys: Keys, marks: np.ndarray) -> Keys:
    """Keys whose last byte is replaced by a mark."""
    marked = keys.copy().view(np.uint8).reshape(-1, KEY_BYTES)
    marked[:, -1] = marks
    return marked.reshape(-1).view(keys.dtype)
