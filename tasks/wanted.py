"""What a run wants and what is there: one entry per completion in columns of some 40 bytes, and no row.

Wanted keys minus committed keys is all that resume, nightly runs and changes of n and k come down to. The completions are ordered by
key; the number of the prompt, in which shard its completion (shard, place), what the gates said and the score of every judge run
stand beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks import judge
from tasks.complete import Request
from tasks.gates import Gates, gate
from tasks.keys import KEY_BYTES, completion_key
from tasks.keyset import column_keys, find, keys_of
from tasks.policy import VERDICTS, Spec
from tasks.prompt_set import Part, PromptSet
from tasks.prompts import Split
from tasks.statistics import Proportion
from tasks.store import Shard, Store
from tasks.work import Pairs

NOT_JUDGED, NO_SCORE = 0, -1
"""Entries of `scores` beside 1 to 5: a run that was not made, and one whose verdict is missing (quarantined)."""
MARKS = ["key", "content", "cited_verdict", "gates", "drop_reason"]
GATED = ["finish_reason", "malformed", "thought", "answer", "quarantined"]
SCORED = ["completion_key", "content", "run", "score", "judge_hash"]
NOT_MADE = 255
"""Entry of `dropped` of a completion that is not there."""


@dataclass
class Wanted:
    """The completions of a run. Arrays of one length; `scores` has a column for each of the k runs.

    `prompt` counts through all parts, `category` counts `categories`, `shard` counts `shards`.
    """

    parts: list[Part]
    categories: list[str]
    keys: npt.NDArray[np.bytes_]
    prompt: npt.NDArray[np.uint32]
    category: npt.NDArray[np.uint8]
    sample: npt.NDArray[np.uint16]
    shard: npt.NDArray[np.int32]
    place: npt.NDArray[np.uint32]
    content: npt.NDArray[np.uint64]
    verdict: npt.NDArray[np.uint8]
    dropped: npt.NDArray[np.uint8]
    scores: npt.NDArray[np.int8]
    reasons: list[str | None]
    """What the numbers in `dropped` mean; 0: passed. `content` is the beginning of the content's hash, `verdict` counts VERDICTS from 1."""
    shards: list[Shard]
    """Completion shards that are there."""

    @classmethod
    def of(cls, prompts: PromptSet, split: Split, asked: dict[str, Request], n: int, k: int) -> "Wanted":
        """n samples of every prompt of a split; nothing is there yet."""
        count, end = n * prompts.size(split), 0
        starts, categories = _starts(prompts.parts), sorted({part.category for part in prompts.parts})
        columns: list[npt.NDArray[Any]] = [np.empty(count, kind) for kind in (f"S{KEY_BYTES}", np.uint32, np.uint8, np.uint16)]
        for number, table in prompts.tables(split, ["prompt_hash"]):
            start, end = end, end + n * table.num_rows
            name, hashes = prompts.parts[number].category, table["prompt_hash"].to_pylist()
            prefix = asked[name].prefix
            keys = keys_of([completion_key(prefix, hash, sample) for hash in hashes for sample in range(n)])
            numbers, samples = np.repeat(starts[number] + table["row"].to_numpy(), n), np.tile(np.arange(n), table.num_rows)
            for column, found in zip(columns, (keys, numbers, categories.index(name), samples), strict=True):
                column[start:end] = found
        order = np.argsort(columns[0], kind="stable")
        for place, column in enumerate(columns):  # one after the other: all of them twice would be the most that the driver ever holds
            columns[place] = column[order]
        keys, prompt, category, sample = columns
        return cls(
            parts=prompts.parts,
            categories=categories,
            keys=keys,
            prompt=prompt,
            category=category,
            sample=sample,
            shard=np.full(count, -1, np.int32),
            place=np.zeros(count, np.uint32),
            content=np.zeros(count, np.uint64),
            verdict=np.zeros(count, np.uint8),
            dropped=np.full(count, NOT_MADE, np.uint8),
            scores=np.zeros((count, k), np.int8),
            reasons=[None],
            shards=[],
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def made(self) -> npt.NDArray[np.bool_]:
        """Which completions are there."""
        return self.shard >= 0

    @property
    def passed(self) -> npt.NDArray[np.bool_]:
        """Which are there and passed the gates."""
        return self.dropped == 0

    def mark_completions(self, store: Store, shards: Sequence[Shard], gates: Gates, specs: dict[str, Spec]) -> list[str]:
        """Notes where the wanted completions are, and what the gates say; of a key that is in two shards, the first counts.

        Rows that were gated by other rules are read again: it takes no engine to change a gate. Returns the shards that are gone.
        """
        lost = []
        for shard, table in zip(shards, store.read_tables([shard.path for shard in shards], MARKS), strict=True):
            if table is None:
                lost.append(shard.path)
                continue
            places, here = find(self.keys, column_keys(table["key"]))
            fresh = here & (self.shard[places] < 0)
            if not fresh.any():
                continue
            table = table.filter(pa.array(fresh))
            index = places[fresh]
            self.shard[index] = len(self.shards)
            self.shards.append(shard)
            self.place[index] = np.flatnonzero(fresh)
            self.content[index] = _beginnings(table["content"])
            self.verdict[index] = pc.index_in(table["cited_verdict"], pa.array(VERDICTS)).fill_null(-1).to_numpy() + 1
            reasons = table["drop_reason"].to_pylist()
            if any(rules != gates.hash for rules in table["gates"].unique().to_pylist()):
                rows = store.read_table(shard.path, [*GATED, "category"]).filter(pa.array(fresh)).to_pylist()
                reasons = [gate(row, gates, specs[row["category"]]) for row in rows]
            self.dropped[index] = [self._reason(reason) for reason in reasons]
        return lost

    def mark_judgements(self, store: Store, shards: Sequence[Shard], judge_hash: str) -> list[str]:
        """Notes the scores that this judge gave to these completions. Returns the shards that are gone.

        Of a run that is in two shards, the last counts: a completion that was lost and says the same when it is drawn again is judged from
        its first run on, up to a score that settles it, and earlier scores must not take that one's place.
        """
        lost = []
        paths = [shard.path for shard in shards[::-1]]
        for path, table in zip(paths, store.read_tables(paths, SCORED), strict=True):
            if table is None:
                lost.append(path)
                continue
            runs = table["run"].to_numpy()
            places, here = find(self.keys, column_keys(table["completion_key"]))
            fresh = here & pc.equal(table["judge_hash"], judge_hash).to_numpy() & (runs < self.scores.shape[1])
            fresh &= self.content[places] == _beginnings(table["content"])
            fresh[fresh] &= self.scores[places[fresh], runs[fresh]] == NOT_JUDGED
            self.scores[places[fresh], runs[fresh]] = table["score"].fill_null(NO_SCORE).to_numpy()[fresh]
        return lost

    def missing_completions(self) -> Iterator[tuple[Part, Pairs]]:
        """Completions that are not there, by part, in the order of its rows."""
        for part, rows, index in self._in_order(~self.made):
            yield part, Pairs(rows, self.sample[index])

    def missing_runs(self, config: judge.JudgeConfig, limits: dict[str, int]) -> npt.NDArray[np.bool_]:
        """(completion, run): which are wanted and not made. Unless audited, none after a score below the category's limit."""
        settled = ((self.scores > 0) & (self.scores < self._limit(limits))).any(axis=1) & ~judge.audited(self.keys, config)
        return (self.scores == NOT_JUDGED) & (self.passed & ~settled)[:, None]

    def agreement(self, config: judge.JudgeConfig, limits: dict[str, int]) -> Proportion:
        """On how many completions all runs of the judge agree to keep or to drop. Of those that are audited: the others may lack runs."""
        audited = judge.audited(self.keys, config) & (self.scores > 0).all(axis=1)
        keeps = (self.scores >= self._limit(limits))[audited]
        return Proportion(int((keeps.all(axis=1) | ~keeps.any(axis=1)).sum()), len(keeps))

    def settled_runs(self, missing: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """(completion, run): which were not made and, since an earlier run settled the matter, are not `missing`."""
        return (self.scores == NOT_JUDGED) & self.passed[:, None] & ~missing

    def judgements_to_make(self, missing: npt.NDArray[np.bool_]) -> Iterator[tuple[Shard, str, Pairs]]:
        """Completion shard, category and (place, run) of the runs that are missing."""
        for number, index in _groups(self.shard, np.flatnonzero(missing.any(axis=1))):
            index = index[np.argsort(self.place[index])]
            completion, run = np.nonzero(missing[index])
            yield self.shards[number], self.categories[self.category[index[0]]], Pairs(self.place[index][completion], run.astype(np.uint16))

    def by_part(self) -> Iterator[tuple[Part, npt.NDArray[np.uint32], npt.NDArray[np.int64]]]:
        """The completions of each part, in the order of its rows: an order that no shard and no engine has an influence on.

        Row of the part and index, for each.
        """
        return self._in_order(np.ones(len(self), np.bool_))

    def _in_order(self, mask: npt.NDArray[np.bool_]) -> Iterator[tuple[Part, npt.NDArray[np.uint32], npt.NDArray[np.int64]]]:
        """The entries of a mask by part. Sorted category by category: an index of all would be a fifth of all of this."""
        starts = _starts(self.parts)
        for category in range(len(self.categories)):
            index = np.flatnonzero(mask & (self.category == category))
            index = index[np.lexsort((self.sample[index], self.prompt[index]))]
            prompt = self.prompt[index]
            edges = np.searchsorted(prompt, starts)
            for part, start, first, last in zip(self.parts, starts[:-1], edges[:-1], edges[1:], strict=True):
                if first < last:
                    yield part, prompt[first:last] - start, index[first:last]

    def rows(self, store: Store, index: npt.NDArray[np.int64], columns: list[str]) -> pa.Table:
        """Columns of completions that are there, in the order of `index`."""
        found, places = [], []
        for number, part in _groups(self.shard, index):
            found.append(store.read_table(self.shards[number].path, columns).take(self.place[part]))
            places.append(part)
        return pa.concat_tables(found).take(_places_among(np.concatenate(places), index))

    def count(self, mask: npt.NDArray[Any]) -> dict[str, int]:
        """Entries of a mask by category."""
        counts = np.bincount(self.category, weights=mask.reshape(len(self), -1).sum(axis=1), minlength=len(self.categories))
        return {name: int(count) for name, count in zip(self.categories, counts, strict=True)}

    def _limit(self, limits: dict[str, int]) -> npt.NDArray[np.int8]:
        """(completion, 1): the lowest score that is kept."""
        return np.array([limits[name] for name in self.categories], np.int8)[self.category][:, None]

    def _reason(self, reason: str | None) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)


def _starts(parts: Sequence[Part]) -> npt.NDArray[np.uint32]:
    """Number of the first prompt of each part, and at the end how many there are."""
    return np.cumsum([0, *(part.rows for part in parts)]).astype(np.uint32)


def _beginnings(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    return column_keys(column).view(np.uint64)[::2]


def _places_among(values: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each wanted number is among the values."""
    order = np.argsort(values)
    return order[np.searchsorted(values, wanted, sorter=order)]


def _groups(values: npt.NDArray[Any], index: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Entries of `index` by their value, in the order of the values."""
    order = index[np.argsort(values[index], kind="stable")]
    borders = np.flatnonzero(np.diff(values[order])) + 1
    for group in np.split(order, borders):
        if len(group):
            yield int(values[group[0]]), group
