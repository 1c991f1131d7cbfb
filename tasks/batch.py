"""Turns token rows into packed micro-batches: which rows a step takes, which rank gets them, and the tensors. Pure.

Promises: the order of rows depends on (seed, epoch) alone, so a resumed run continues with the same rows; every rank gets the
same number of micro-batches in a step (ZeRO's collectives would hang otherwise); packing changes no logit, because position ids
restart with each row and the model is called without an attention mask.
"""

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

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
    targets: int64 [L], the tokens that they predict. values: float32 [L] each.
    mask: float32 [L], the loss weight of each prediction: 1, and 0 in a dummy.
    """

    input_ids: Tensor
    position_ids: Tensor
    learnt: Tensor
    targets: Tensor
    mask: Tensor
    values: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with all tensors on `device`."""
        return MicroBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.learnt.to(device),
            self.targets.to(device),
            self.mask.to(device),
            {name: value.to(device) for name, value in self.values.items()},
        )


def steps_per_epoch(row_count: int, rows_per_step: int) -> int:
    """Optimiser steps of one epoch; the last may hold fewer rows."""
    return math.ceil(row_count / rows_per_step)


def step_rows(step: int, row_count: int, rows_per_step: int, seed: int) -> tuple[int, list[int]]:
    """The epoch that step number `step` (from 0) belongs to, and the indices of its rows over all ranks."""
    epoch, within = divmod(step, steps_per_epoch(row_count, rows_per_step))
    return epoch, list(_epoch_order(row_count, seed, epoch)[within * rows_per_step : (within + 1) * rows_per_step])


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


def pack(rows: Sequence[Row]) -> MicroBatch:
    """Lays rows end to end. Raises UserError for a row without a prompt token or without a learnt token."""
    learnt: list[int] = []
    start = 0
    for row in rows:
        length = len(row.input_ids)
        if not 1 <= row.prompt_length < length:
            raise UserError(
                f"a training row has {length} tokens and prompt_length {row.prompt_length}; it needs at least one prompt "
                "token and one token to learn. Remove such rows from the dataset."
            )
        if any(len(values) != length - row.prompt_length for values in row.values.values()):
            raise ValueError("a row's values have to be as many as its learnt tokens")
        learnt += range(start + row.prompt_length - 1, start + length - 1)
        start += length
    input_ids = torch.tensor([token for row in rows for token in row.input_ids])
    position_ids = torch.cat([torch.arange(len(row.input_ids)) for row in rows])
    positions = torch.tensor(learnt)
    values = {name: torch.tensor([value for row in rows for value in row.values[name]], dtype=torch.float32) for name in rows[0].values}
    return MicroBatch(input_ids, position_ids, positions, input_ids[positions + 1], torch.ones(len(learnt)), values)


def dummy(value_names: Sequence[str]) -> MicroBatch:
    """A prediction of weight zero: a rank without rows still runs the forward and backward pass that its peers wait in."""
    ids, one = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return MicroBatch(ids, torch.arange(2), one, one, torch.zeros(1), {name: torch.zeros(1) for name in value_names})


@lru_cache(maxsize=2)
def _epoch_order(row_count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(row_count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


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
