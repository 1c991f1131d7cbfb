"""Runs the lines of a stage or two on their engines and commits what comes back; what completions and judgements share.

A shard says which requests it makes as pairs of a row (of a part, or of a completion shard) and a number (of a sample, or of a run).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import SpecmillError
from cluster.fleet import Done, Fleet, Line, run
from cluster.serving import Usage
from tasks.ledger import Ledger, State
from tasks.progress import Progress, say
from tasks.store import Conflict, Down, Shard

COMMIT_SECONDS = 2.0
"""Finished shards are committed together, this long after the last commit: until then a driver that is killed loses them."""
QUIET_SECONDS = 300.0
"""When nothing was finished for so long, a person should know."""


@dataclass(frozen=True)
class Pairs:
    """Requests as (row, number), ordered by row. 6 bytes each."""

    rows: npt.NDArray[np.uint32]
    numbers: npt.NDArray[np.uint16]

    @classmethod
    def product(cls, rows: Sequence[int], numbers: int) -> "Pairs":
        """Every row with every number below `numbers`."""
        every = np.arange(numbers, dtype=np.uint16)
        return cls(np.repeat(np.array(rows, np.uint32), numbers), np.tile(every, len(rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.rows.tolist(), self.numbers.tolist(), strict=True)

    def halves(self) -> list["Pairs"]:
        """Two parts, if it can be between two rows; a single pair comes back alone."""
        middle = len(self) // 2
        between = np.flatnonzero(np.diff(self.rows)) + 1
        if len(between):
            middle = int(between[np.argmin(np.abs(between - middle))])
        return self.cut(middle) if middle else [self]

    def cut(self, *places: int) -> list["Pairs"]:
        """Parts that begin at 0 and at the places given."""
        ends = (*places, len(self))
        return [Pairs(self.rows[start:end], self.numbers[start:end]) for start, end in zip((0, *places), ends, strict=True)]

    def pieces(self, size: int) -> list["Pairs"]:
        """Parts of at most `size` pairs."""
        return self.cut(*range(size, len(self), size)) if len(self) else []


@dataclass(frozen=True)
class Receipt:
    """What comes back of a shard. `skipped`: requests that were not needed; `passed`: rows of the file that passed the gates."""

    file: Shard
    skipped: int = 0
    passed: tuple[int, ...] = ()


class Tally:
    """What a stage has done so far: commits receipts, counts rows and shows progress."""

    def __init__(self, ledger: Ledger, progress: Progress, lost: Sequence[str] = ()) -> None:
        self.ledger, self.progress = ledger, progress
        self.asked = self.made = self.skipped = self.quarantined = 0
        self.usage = Usage()
        self.lost = list(lost)
        self._waiting: list[Shard] = []
        self._cost = Usage()

    def add(self, line: Line, shards: Sequence[Any]) -> None:
        """Asks a line for shards."""
        line.add(shards)
        self.asked += sum(len(shard.pairs) for shard in shards)

    def take(self, done: Done) -> None:
        """A finished shard."""
        receipt: Receipt = done.result
        if receipt.file.rows:
            self._waiting.append(receipt.file)
        self._cost += done.usage
        self.usage += done.usage
        self.made += receipt.file.rows
        self.skipped += receipt.skipped
        self.quarantined += receipt.file.quarantined

    def tell(self, seconds: float, idle: float) -> None:
        """Shows progress, so many seconds after the beginning. `idle`: the share of their time that engines had nothing to do."""
        self.progress(self.made + self.skipped, self.asked, self._pace(seconds, idle))

    @property
    def pending(self) -> bool:
        """Whether there is something to commit."""
        return bool(self._waiting or self.lost)

    def commit(self) -> None:
        """Names the finished shards in the ledger. The first entry declares the lost ones."""
        if self.pending:
            self.ledger.commit(self._waiting, self.lost, self._cost)
            self._waiting, self.lost, self._cost = [], [], Usage()

    def speed(self, seconds: float) -> dict[str, float]:
        """What the stage reached in so many seconds. Tokens are drawn ones; `cached`: share of prompt tokens that cost nothing."""
        usage = self.usage
        return {
            "rows_per_second": self.made / seconds,
            "tokens_per_second": usage.completion_tokens / seconds,
            "cached": usage.cached_tokens / max(1, usage.prompt_tokens),
            "engine_seconds": usage.busy_seconds,
            "retries": usage.retries,
            "quarantined": self.quarantined,
        }

    def _pace(self, seconds: float, idle: float) -> str:
        usage = self.usage
        parts = [
            f"{usage.completion_tokens / max(seconds, 1e-9):.3g} tokens/s",
            f"{100 * usage.cached_tokens / max(1, usage.prompt_tokens):.0f} % of prompts cached",
            f"engines idle {100 * idle:.0f} %",
        ]
        parts += [f"{count} {name}" for count, name in ((usage.retries, "retries"), (self.quarantined, "quarantined")) if count]
        return ", ".join(parts)

    def balance(self) -> None:
        """Raises SpecmillError unless every request that was asked for was made or not needed."""
        if self.made + self.skipped != self.asked:
            raise SpecmillError(f"{self.ledger.stage}: {self.asked} rows were asked for, {self.made} made and {self.skipped} not needed")


def cost_per_kept(stages: Sequence[tuple[State, int]], kept: int) -> dict[str, float]:
    """Engine seconds, drawn tokens and money per kept row. Each stage's rows, dropped ones too, cost what its rows cost on average."""
    spent = sum((state.usage.scaled(rows / state.made) for state, rows in stages if state.made), Usage())
    each = {"engine_seconds": spent.busy_seconds, "tokens": spent.completion_tokens, "price": spent.cost}
    return {f"{what}_per_kept_row": much / max(1, kept) for what, much in each.items()}


class Idle:
    """How much of its time until its last answer each engine had nothing to do."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._known: dict[tuple[Fleet, int], float] = defaultdict(float)
        """Engine -> seconds from the beginning to its last answer."""
        self._busy: dict[Fleet, float] = defaultdict(float)
        self._time: dict[Fleet, float] = defaultdict(float)
        """Seconds that the engines of a fleet were busy, of those that are known."""

    def take(self, done: Done) -> None:
        """A finished shard."""
        fleet, now = done.line.fleet(), time.monotonic() - self._began
        self._busy[fleet] += done.usage.busy_seconds
        self._time[fleet] += now - self._known[fleet, done.engine]
        self._known[fleet, done.engine] = now

    def share(self, fleet: Fleet) -> float:
        """The share for the engines of a fleet together."""
        return max(0.0, 1 - self._busy[fleet] / max(self._time[fleet], 1e-9))


@dataclass(frozen=True)
class Wall:
    """How long it took, in seconds, and how much of that came after an engine ran dry for good: the tail."""

    seconds: float
    tail: float


def commit_all(tallies: Iterable[Tally]) -> None:
    """Commits what is finished, of the last tally first.

    Verdicts come before the completions that they are on, whose entry has to be there before theirs: a driver that is killed in between
    would lose the completions, draw them again and have them judged again.
    """
    for tally in reversed(list(tallies)):
        tally.commit()


def work(lines: dict[Line, Tally], follow: Callable[[Done], None] | None = None) -> Wall:
    """Runs the lines until nothing is left, committing what is finished. `follow` is told of every finished shard and may add others.

    Lines that come first are worked on first; what a shard of theirs needs is made by lines after them.
    """
    started = full = heard = told = time.monotonic()
    committed = 0.0
    idle, fresh = Idle(), set[Line]()

    def tell() -> None:
        for line in fresh:  # what came together is told together: the time of one shard may have come with another one of its engine
            lines[line].tell(heard - started, idle.share(line.fleet()))
        fresh.clear()

    def commit() -> None:
        """Unless that was done a moment ago."""
        nonlocal committed
        if any(tally.pending for tally in lines.values()) and time.monotonic() - committed >= COMMIT_SECONDS:
            commit_all(lines.values())
            committed = time.monotonic()

    def tick(all_busy: bool) -> None:
        nonlocal full, told
        tell()
        commit()
        now = time.monotonic()
        if all_busy:
            full = now
        if now - max(heard, told) > QUIET_SECONDS:
            say(f"  no shard was finished in the last {now - heard:.0f} s; `stuck_seconds` and `request_seconds` end what does not answer")
            told = now

    try:
        for done in run(list(lines), tick=tick):
            heard = time.monotonic()
            if follow:
                follow(done)
            lines[done.line].take(done)
            idle.take(done)
            fresh.add(done.line)
            commit()
        tell()
    except (Conflict, Down):
        raise
    except BaseException:
        commit_all(lines.values())
        raise
    commit_all(lines.values())
    ended = time.monotonic()
    return Wall(ended - started, ended - full)
