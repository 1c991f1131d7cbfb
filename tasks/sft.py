"""Supervised fine-tuning: the loss is the mean over the learnt tokens of a step, wherever they lie."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from tasks.batch import MicroBatch, Row, micro_batches
from tasks.losses import TokenLoss, nll
from tasks.offline import Objective

if TYPE_CHECKING:
    from cluster.causal_model import TokenScores


class Sft(Objective):
    """Rows of `tables.TRAINING_ROWS`: token ids, and how many of them lead and are not learnt."""

    name = "sft"
    remedy = "Lower select.threshold, or look at the funnel."
    columns = ("input_ids", "prompt_length")

    @classmethod
    def usable(cls, table: pa.Table) -> pa.ChunkedArray:
        """A prompt token and a token to learn."""
        learnt = pc.subtract(pc.list_value_length(table["input_ids"]), table["prompt_length"])
        return pc.and_(pc.greater(learnt, 0), pc.greater(table["prompt_length"], 0))

    @classmethod
    def longest(cls, table: pa.Table) -> pa.ChunkedArray:
        """Tokens of each row."""
        return pc.list_value_length(table["input_ids"])

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row."""
        return list(self.longest(self.table).to_pylist())

    def batches(self, indices: Sequence[int], rank: int, ranks: int) -> list[MicroBatch]:
        """Rows, packed."""
        input_ids, prompts = self.table["input_ids"], self.table["prompt_length"]
        rows = [Row(input_ids[index].as_py(), prompts[index].as_py()) for index in indices]
        return micro_batches(rows, self.config.training.micro_batch_tokens, rank, ranks)

    def loss(self, scores: "TokenScores", batch: MicroBatch) -> TokenLoss:
        """Negative log-likelihood."""
        return nll(scores, batch.mask)
