"""Turns token rows into packed micro-batches: which rows a step takes, which rank gets them, and the tensors. Pure.

Promises: the order of rows depends on (seed, epoch) alone, so a resumed run continues with the same rows; every rank gets the
same number of micro-batches in a step (ZeRO's collectives would hang otherwise); packing changes no logit, because position ids
restart with each row and the model is called without an attention mask.
"""

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cluster.errors import UserError


@dataclass(frozen=True)
class Row:
    """One sequence: `input_ids` of n tokens, of which the first `prompt_length` are given and the rest are learnt.

    `values` holds per-token numbers of the learnt part by name (rollout log-probabilities, advantages), n - prompt_length each.
    """

    input_ids: Sequence[int]
    prompt_length: int
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end: T tokens, of which L are learnt.

    input_ids, position_ids: int64 [T]; position ids restart at 0 with every row.
    learnt: int64 [L], the positions that predict a learnt token; only their logits are computed.
    targets: int64 [L], the tokens that they predict. values: float32 [L] each. row: int64 [L], the row that they belong to.
    mask: float32 [L], the loss weight of each prediction: 1, and 0 in a dummy. In a batch of pairs the weight of a pair lies on the
    first prediction of its first row. members: which of the pairs that were given are in it.
    """

    input_ids: Tensor
    position_ids: Tensor
    learnt: Tensor
    targets: Tensor
    row: Tensor
    mask: Tensor
    values: Mapping[str, Tensor]
    members: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with all tensors on `device`."""
        return MicroBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.learnt.to(device),
            self.targets.to(device),
            self.row.to(device),
            self.mask.to(device),
            {name: value.to(device) for name, value in self.values.items()},
            self.members,
        )


def steps_per_epoch(row_count: int, rows_per_step: int) -> int:
    """Optimiser steps of one epoch; the last may hold fewer rows."""
    return math.ceil(row_count / rows_per_step)


class RowOrder:
    """Which rows a step takes: all of them once an epoch, in an order that (seed, epoch) alone decides.

    `grouped`: rows of a step are of similar length. Shuffled rows are cut into windows of `WINDOW` steps, sorted by length within each,
    and the steps of a window shuffled again.
    """

    WINDOW = 50

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int, grouped: bool = False) -> None:
        self._lengths, self._rows_per_step, self._seed, self._grouped = lengths, rows_per_step, seed, grouped
        self._steps_per_epoch = steps_per_epoch(len(lengths), rows_per_step)
        self._epoch, self._steps = -1, list[list[int]]()

    def at(self, step: int) -> tuple[int, list[int]]:
        """The epoch that step number `step` (from 0) belongs to, and the indices of its rows over all ranks."""
        epoch, within = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._steps_of(epoch)
        return epoch, self._steps[within]

    def _steps_of(self, epoch: int) -> list[list[int]]:
        order, size = list(range(len(self._lengths))), self._rows_per_step
        chance = random.Random(f"{self._seed}/{epoch}")
        chance.shuffle(order)
        if not self._grouped:
            return _cut(order, size)
        steps = []
        for window in _cut(order, size * self.WINDOW):
            alike = _cut(sorted(window, key=lambda index: self._lengths[index]), size)
            chance.shuffle(alike)
            steps += alike
        return steps


def assign(lengths: Sequence[int], token_budget: int, ranks: int) -> list[list[list[int]]]:
    """Splits rows into micro-batches of at most `token_budget` tokens, the same number for every rank.

    Returns [rank][micro-batch] -> row indices; a micro-batch may be empty (then it becomes a dummy). A row longer than the
    budget is alone in its micro-batch. Longest first into the emptiest bin, so that ranks wait little for each other.
    """
    bins = ranks * max(1, math.ceil(sum(lengths) / token_budget / ranks))
    while (packed := _fill(lengths, token_budget, bins)) is None:
        bins += ranks
    return [packed[rank::ranks] for rank in range(ranks)]


def micro_batches(rows: Sequence[Row], token_budget: int, rank: int, ranks: int) -> list[MicroBatch]:
    """This rank's share of a step's rows, packed. Every rank passes the same rows."""
    names = sorted(rows[0].values) if rows else []
    plan = assign([len(row.input_ids) for row in rows], token_budget, ranks)[rank]
    return [pack([rows[index] for index in indices]) if indices else dummy(names) for indices in plan]


def pair_batches(pairs: Sequence[tuple[Row, Row]], token_budget: int, rank: int, ranks: int) -> list[MicroBatch]:
    """This rank's share of a step's pairs, each pair in one micro-batch: its rows are numbers 2i and 2i + 1, and it weighs 1."""
    names = sorted(pairs[0][0].values) if pairs else []
    plan = assign([len(first.input_ids) + len(second.input_ids) for first, second in pairs], token_budget, ranks)[rank]
    packed = [_pack_pairs([pairs[index] for index in indices]) if indices else dummy(names) for indices in plan]
    return [replace(batch, members=tuple(indices)) for batch, indices in zip(packed, plan, strict=True)]


def _pack_pairs(pairs: Sequence[tuple[Row, Row]]) -> MicroBatch:
    batch = pack([row for pair in pairs for row in pair])
    begins = torch.diff(batch.row, prepend=torch.tensor([-1])) > 0
    return replace(batch, mask=(begins & (batch.row % 2 == 0)).float())


def pack(rows: Sequence[Row]) -> MicroBatch:
    """Lays rows end to end. Raises UserError for a row without a prompt token or without a learnt token."""
    learnt: list[int] = []
    owners: list[int] = []
    start = 0
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        if not 1 <= row.prompt_length < length:
            raise UserError(
                f"a training row has {length} tokens and prompt_length {row.prompt_length}; it needs at least one prompt "
                "token and one token to learn. Remove such rows from the dataset."
            )
        if any(len(values) != length - row.prompt_length for values in row.values.values()):
            raise ValueError("a row's values have to be as many as its learnt tokens")
        learnt += range(start + row.prompt_length - 1, start + length - 1)
        owners += [number] * (length - row.prompt_length)
        start += length
    input_ids = torch.tensor([token for row in rows for token in row.input_ids])
    position_ids = torch.cat([torch.arange(len(row.input_ids)) for row in rows])
    positions = torch.tensor(learnt)
    values = {name: torch.tensor([value for row in rows for value in row.values[name]], dtype=torch.float32) for name in rows[0].values}
    return MicroBatch(input_ids, position_ids, positions, input_ids[positions + 1], torch.tensor(owners), torch.ones(len(learnt)), values)


def dummy(value_names: Sequence[str]) -> MicroBatch:
    """A prediction of weight zero: a rank without rows still runs the forward and backward pass that its peers wait in."""
    ids, one = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return MicroBatch(ids, torch.arange(2), one, one, one, torch.zeros(1), {name: torch.zeros(1) for name in value_names})


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _fill(lengths: Sequence[int], token_budget: int, bins: int) -> list[list[int]] | None:
    """Rows in `bins` bins, longest row first into the emptiest bin; None if some row does not fit."""
    content: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0, number) for number in range(bins)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        load, number = heapq.heappop(loads)
        if load and load + lengths[index] > token_budget:
            return None
        content[number].append(index)
        heapq.heappush(loads, (load + lengths[index], number))
    return [sorted(indices) for indices in content]
