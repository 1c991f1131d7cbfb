"""Runs the shards of a stage on a pool and commits what comes back: the loop that completions and judgements share."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import SpecmillError
from cluster.fleet import ShardT, Stage
from cluster.pool import Pool
from cluster.serving import Usage
from tasks.progress import Progress
from tasks.store import Ledger, Shard


@dataclass(frozen=True)
class Made:
    """Rows written, rows that turned out not to be needed, and what all of it cost."""

    rows: int
    skipped: int
    usage: Usage


def run_shards(
    pool: Pool, ledger: Ledger, stage: Stage[ShardT, Shard], shards: Sequence[ShardT], lost: list[str], progress: Progress
) -> Made:
    """Commits the receipt of each shard as it is finished.

    `lost` shards are declared gone in the first entry. Raises SpecmillError unless every row that was asked for is committed or
    quarantined.
    """
    total = sum(map(stage.size, shards))
    made, skipped, usage = 0, 0, Usage()
    if lost:
        ledger.commit([], lost)
    for finished in pool.map(stage, shards):
        ledger.commit([finished.result], usage=finished.usage)
        usage += finished.usage
        made += finished.result.rows
        skipped += finished.result.skipped
        progress(made + skipped, total)
    if made + skipped != total:
        raise SpecmillError(f"{ledger.stage}: {total} rows were asked for, {made} were written and {skipped} not needed")
    return Made(made, skipped, usage)
