"""Rows that resemble others: near-duplicates, and training rows that resemble what a model will be evaluated on.

Two conversations resemble each other when the Jaccard similarity of their word n-grams reaches a threshold. MinHash (the library
`rensa`) finds the pairs worth comparing without comparing all, and each of them is then compared exactly. Rows and their sketches lie
in temporary files; memory grows by a few dozen bytes a row.
"""

import re
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import rensa
from pydantic import Field
from pydantic_core import from_json, to_json

from tasks.sources import Sources
from tasks.validation import Strict

PERMUTATIONS = 128
SEED = 1
RECALL = 0.995
"""The chance that a pair exactly at the threshold is compared."""
NEIGHBOURS = 16
"""Rows of one bucket that a row is compared with (near-duplicates: beside the first). Without a bound, a thousand copies are half a
million pairs."""
MARGIN = 0.2
"""How far under the threshold a sketch's estimate (standard deviation 0.04) may be for a pair to be compared."""
CHUNK, BLOCK = 1 << 16, 1 << 10

Index = npt.NDArray[np.int64]
# A word; in scripts that are written without spaces, a letter.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class OverlapConfig(Strict):
    """What to do with rows that resemble others."""

    duplicates: Literal["report", "drop", "off"] = Field(
        "report",
        title="Near-duplicates",
        description="Rows that resemble an earlier one: report, drop (the first stays), or do not look.",
    )
    contamination: Literal["report", "drop", "off"] = Field(
        "report",
        title="Contamination",
        description="Training rows that resemble an evaluation prompt: report, drop, or do not look.",
    )
    similarity: float = Field(
        0.8, ge=0.3, le=1, title="Similarity", description="Jaccard similarity of word n-grams from which two rows resemble each other."
    )
    shingle_words: int = Field(3, ge=1, le=13, title="Words of an n-gram", description="More words find only closer resemblance.")
    benchmarks: Sources = Field(
        (), title="Benchmarks", description="Evaluation prompts beside the split `eval`: sources like `prompts`, which need no labels."
    )

    @property
    def looks(self) -> bool:
        """Whether anything is looked for."""
        return not self.duplicates == self.contamination == "off"


class Rows:
    """Rows with `messages`, in temporary files, and a sketch of each if `words` says how many words an n-gram has."""

    def __init__(self, words: int | None) -> None:
        self.words = words
        self._rows, self._sketches = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (gone with the object)
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return next(self._read(number, number + 1))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), BLOCK):
            yield from self._read(start, min(start + BLOCK, len(self)))

    def _read(self, start: int, end: int) -> Iterator[dict[str, Any]]:
        begin = self._rows.seek(self._ends[start - 1] if start else 0)
        borders = [begin, *self._ends[start:end]]
        content = self._rows.read(borders[-1] - begin)
        return (from_json(content[here - begin : there - begin]) for here, there in pairwise(borders))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows that JSON can hold."""
        end = self._rows.seek(0, 2)
        for row in rows:
            end += self._rows.write(to_json(row))
            self._ends.append(end)
        if self.words:
            found = [[*shingles(row["messages"], self.words)] for row in rows]
            sketches = np.array(rensa.RMinHash.digests_from_token_sets(found, PERMUTATIONS, SEED), np.uint32).reshape(-1, PERMUTATIONS)
            sums = np.array([zlib.crc32(_text(row["messages"]).casefold().encode()) for row in rows], np.uint32)
            self._sketches.write(np.column_stack([sketches, sums]).tobytes())

    def shingles(self, number: int) -> set[str]:
        """The n-grams of a row."""
        return shingles(self[number]["messages"], self.words or 1)

    @property
    def sketches(self) -> npt.NDArray[np.uint32]:
        """One sketch a row, on disk."""
        return self._summed[:, :PERMUTATIONS]

    @property
    def sums(self) -> npt.NDArray[np.uint64]:
        """A checksum of each row's text."""
        return self._summed[:, PERMUTATIONS].astype(np.uint64)

    @property
    def _summed(self) -> npt.NDArray[np.uint32]:
        self._sketches.flush()
        shape = (len(self), PERMUTATIONS + 1)
        return np.memmap(self._sketches, np.uint32, "r", shape=shape) if len(self) else np.zeros(shape, np.uint32)


def shingles(messages: Sequence[dict[str, Any]], words: int) -> set[str]:
    """The word n-grams of a conversation, without case and punctuation; the whole where it has fewer words."""
    text = _text(messages)
    found = _WORD.findall(text.casefold()) or [text]
    return {" ".join(found[start : start + words]) for start in range(max(1, len(found) - words + 1))}


def _text(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(message["content"] for message in messages)


def pairs_within(rows: Rows, threshold: float) -> list[tuple[int, int, float]]:
    """Pairs of rows that resemble each other, the earlier first, and their similarity; in order."""
    sketches, candidates = rows.sketches, np.zeros(0, np.int64)
    for keys in _keys(sketches, band_width(threshold)):
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        first = np.maximum.accumulate(np.where(np.r_[True, ordered[1:] != ordered[:-1]], np.arange(len(ordered)), 0))
        later = np.flatnonzero(first != np.arange(len(ordered)))
        near = [(order[first[later]], order[later])]
        for lag in range(1, NEIGHBOURS + 1):
            same = np.flatnonzero(ordered[lag:] == ordered[:-lag])
            if not len(same):
                break
            near.append((order[same], order[same + lag]))
        coded = [left * len(rows) + right for left, right in near]
        candidates = np.union1d(candidates, np.concatenate(coded))
    left, right = np.divmod(candidates, max(1, len(rows)))
    return list(_compared(rows, left, rows, right, threshold))


def pairs_between(rows: Rows, some: Index, others: Rows, references: Index, threshold: float) -> list[tuple[int, int, float]]:
    """Pairs of a row (of `some`) and another (of `references`) that resemble each other, and their similarity; in order."""
    candidates, rest = np.zeros(0, np.int64), np.uint64(2**20 - 1)
    copies, width = (rows.sums[some] & rest, others.sums[references] & rest), band_width(threshold)
    for left, right in zip(_keys(rows.sketches, width, some), _keys(others.sketches, width, references), strict=True):
        # In a crowded bucket, copies lie side by side, and are compared first.
        left, right = (left & ~rest) | copies[0], (right & ~rest) | copies[1]
        order = np.argsort(right, kind="stable")
        ordered = right[order]
        start, end = np.searchsorted(ordered, left & ~rest), np.searchsorted(ordered, left | rest, side="right")
        start = np.clip(np.searchsorted(ordered, left), start, np.maximum(start, end - NEIGHBOURS))
        end = np.minimum(end, start + NEIGHBOURS)
        found = np.repeat(np.arange(len(left)), end - start)
        places = np.arange(len(found)) - np.repeat(np.cumsum(end - start) - (end - start), end - start) + np.repeat(start, end - start)
        candidates = np.union1d(candidates, some[found] * len(others) + references[order[places]])
    here, there = np.divmod(candidates, max(1, len(others)))
    return list(_compared(rows, here, others, there, threshold))


def _keys(sketches: npt.NDArray[np.uint32], width: int, some: Index | None = None) -> Iterator[npt.NDArray[np.uint64]]:
    """For each band of so many hashes of the sketches, one number a row; rows that agree in the band have the same."""
    for start in range(0, PERMUTATIONS - width + 1, width):
        keys = np.zeros(len(sketches), np.uint64)
        for begin in range(0, len(sketches), CHUNK):
            chunk = keys[begin : begin + CHUNK]
            for column in sketches[begin : begin + CHUNK, start : start + width].T:
                chunk *= np.uint64(0x9E3779B97F4A7C15)
                chunk ^= column
                chunk ^= chunk >> np.uint64(29)
        yield keys if some is None else keys[some]


def band_width(threshold: float) -> int:
    """The most hashes of a band with which a pair at the threshold is compared with the chance RECALL; at least one."""
    return next(width - 1 for width in count(2) if (1 - threshold**width) ** (PERMUTATIONS // width) > 1 - RECALL or width > 16)


def _compared(rows: Rows, left: Index, others: Rows, right: Index, threshold: float) -> Iterator[tuple[int, int, float]]:
    last, known = -1, set[str]()
    for begin in range(0, len(left), CHUNK):
        here, there = left[begin : begin + CHUNK], right[begin : begin + CHUNK]
        likely = _estimates(rows.sketches, here, others.sketches, there) >= threshold - MARGIN
        for one, other in zip(here[likely].tolist(), there[likely].tolist(), strict=True):
            if one != last:
                last, known = one, rows.shingles(one)
            found = others.shingles(other)
            similarity = len(known & found) / len(known | found)
            if similarity >= threshold:
                yield one, other, similarity


def _estimates(left: npt.NDArray[np.uint32], here: Index, right: npt.NDArray[np.uint32], there: Index) -> npt.NDArray[np.float64]:
    """The part of the hashes that agree, for each pair."""
    parts = [(left[here[start : start + 1024]] == right[there[start : start + 1024]]).mean(axis=1) for start in range(0, len(here), 1024)]
    return np.concatenate([np.zeros(0), *parts])
