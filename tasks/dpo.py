"""Preference learning: the policy is moved towards the chosen completion of each pair and away from the rejected one.

What the starting weights say of every completion is computed once, before the first step, and kept as Parquet: no second model is held.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.training import agreed
from tasks.batch import MicroBatch, Row, pair_batches
from tasks.losses import TokenLoss, dpo, row_sums
from tasks.offline import Objective
from tasks.preferences import NO_PAIRS
from tasks.stage_config import DpoConfig

if TYPE_CHECKING:
    import torch

    from cluster.causal_model import TokenScores
    from cluster.deepspeed_engine import TrainingEngine

REFERENCE = "reference.parquet"
SIDES = ("chosen", "rejected")


class Dpo(Objective):
    """Rows of `tables.PREFERENCE_ROWS`: the token ids of two completions of a prompt, the prompt's included, and its length."""

    name = "dpo"
    remedy = NO_PAIRS
    columns = ("chosen_ids", "rejected_ids", "prompt_length")
    config: DpoConfig

    @classmethod
    def usable(cls, table: pa.Table) -> pa.ChunkedArray:
        """A prompt token, and a token to learn on both sides."""
        good = pc.greater(table["prompt_length"], 0)
        for side in SIDES:
            good = pc.and_(good, pc.greater(pc.list_value_length(table[f"{side}_ids"]), table["prompt_length"]))
        return good

    @classmethod
    def longest(cls, table: pa.Table) -> pa.ChunkedArray:
        """Tokens of the longer completion, its prompt included."""
        return pc.max_element_wise(*(pc.list_value_length(table[f"{side}_ids"]) for side in SIDES))

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of both completions together."""
        chosen, rejected = (pc.list_value_length(self.table[f"{side}_ids"]) for side in SIDES)
        return list(pc.add(chosen, rejected).to_pylist())

    def begin(self, engine: "TrainingEngine", run: Path) -> None:
        """Reads the log-probabilities under the starting weights, or computes them, a part on every rank."""
        file = run / REFERENCE
        if not agreed(file.exists()):
            self._reference = [(0.0, 0.0)] * self.table.num_rows
            found = self._starting_logps(engine)
            if engine.rank == 0:
                columns = {f"{side}_logp": pa.array([found[index][number] for index in sorted(found)]) for number, side in enumerate(SIDES)}
                work = file.with_suffix(".part")
                pq.write_table(pa.table(columns), work)
                os.replace(work, file)
            agreed(None)
        table = pq.read_table(file)
        self._reference = list(zip(*(table[f"{side}_logp"].to_pylist() for side in SIDES), strict=True))

    def batches(self, indices: Sequence[int], rank: int, ranks: int) -> list[MicroBatch]:
        """Pairs, packed, each in one micro-batch."""
        pairs = [self._pair(index) for index in indices]
        return pair_batches(pairs, self.config.training.micro_batch_tokens, rank, ranks)

    def loss(self, scores: "TokenScores", batch: MicroBatch) -> TokenLoss:
        """The logistic loss of the pairs."""
        return dpo(scores.logp, batch.values["reference"], batch.row, batch.mask, self.config.beta, self.config.nll)

    def _pair(self, index: int) -> tuple[Row, Row]:
        """Chosen and rejected; a row's log-probability under the starting weights stands at its first learnt token."""
        prompt_length = self.table["prompt_length"][index].as_py()
        rows = []
        for side, reference in zip(SIDES, self._reference[index], strict=True):
            ids = self.table[f"{side}_ids"][index].as_py()
            rows.append(Row(ids, prompt_length, {"reference": [reference, *[0.0] * (len(ids) - prompt_length - 1)]}))
        return rows[0], rows[1]

    def _starting_logps(self, engine: "TrainingEngine") -> dict[int, tuple[float, float]]:
        """Pair -> log-probabilities of both completions, on every rank."""
        import torch.distributed as dist

        def sums(scores: "TokenScores", batch: MicroBatch) -> "torch.Tensor":
            return row_sums(scores.logp.double(), batch.row)

        ours: dict[int, tuple[float, float]] = {}
        count, size = self.table.num_rows, self.config.rows_per_step
        for first in range(0, count, size):  # not all pairs at once
            batches = self.batches(range(first, min(first + size, count)), engine.rank, engine.world_size)
            for batch, values in zip(batches, engine.evaluate(batches, sums), strict=True):
                if batch.members:
                    ours |= {first + member: pair for member, pair in zip(batch.members, values.reshape(-1, 2).tolist(), strict=True)}
        everybodys: list[Any] = [None] * engine.world_size
        dist.all_gather_object(everybodys, ours)
        return {index: pair for part in everybodys for index, pair in part.items()}
