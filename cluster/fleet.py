"""Fleets of engine actors, and what feeds them.

A fleet keeps several shards in flight per engine so that none drains, and hands finished shards to the caller, who may answer with more:
the shards of a next stage, for the same engines or for others. An engine that dies loses nothing: Ray starts it again, and its shards are
run again, one at a time, to find out whether one of them kills engines (`cluster.suspects`). The stage gives up the row that does, and
the rest goes on.
"""

import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from cluster.actor import Weights
from cluster.errors import SpecmillError, UserError
from cluster.serving import Usage
from cluster.suspects import MAX_DEATHS, MAX_LOSSES, Suspects, Work

ShardT = TypeVar("ShardT")
ResultT = TypeVar("ResultT")

TICK_SECONDS = 1.0
DEATHS = (RayActorError, OutOfMemoryError)
"""How Ray says that an actor's process has ended: by itself, with its machine, or because the machine had no memory left."""
logger = logging.getLogger(__name__)


def _no_prefix(shard: Any) -> str:
    return ""


@dataclass(frozen=True)
class Stage(Generic[ShardT, ResultT]):
    """A step of the work as a fleet needs to know it."""

    run: Callable[[Any, ShardT], Awaitable[ResultT]]
    """A picklable async function of an engine and a shard."""
    size: Callable[[ShardT], int]
    """How many requests a shard makes at the same time."""
    prefix: Callable[[ShardT], str] = _no_prefix
    """Names what a shard's requests begin with: shards of one prefix go to one engine, which has it in its cache."""
    split: Callable[[ShardT], list[ShardT]] | None = None
    """Cuts a shard that kills engines in two; a shard that cannot be cut comes back alone."""
    give_up: Callable[[ShardT, str], ResultT] | None = None
    """The result of a shard that cannot be run, for a reason."""


@dataclass(frozen=True)
class Done(Generic[ShardT, ResultT]):
    """A finished shard of a line, and what it cost."""

    line: "Line[ShardT, ResultT]"
    shard: ShardT
    result: ResultT
    usage: Usage
    engine: int
    """Number of the engine in its fleet."""


@dataclass(eq=False)
class _Slot:
    """An engine: what runs on it, or, at first and after its death, the answer that says that it is there."""

    number: int
    actor: Any
    node: str = ""
    running: dict[Any, Work] = field(default_factory=dict)
    returning: Any = None
    open: bool = False
    """Whether it takes work: it is there, and none of its work has to be alone in it."""
    load: int = 0
    """Requests in flight."""
    deaths: int = 0


class Fleet:
    """Running engines of one configuration, each of which works on `capacity` requests. Can be handed to another process.

    When none of them is there for `start_seconds`, work ends with a SpecmillError.
    """

    def __init__(self, actors: list[Any], capacity: int, start_seconds: float = math.inf) -> None:
        self.actors, self.capacity, self.start_seconds = actors, capacity, start_seconds
        self.weights: Weights | None = None
        self._homes: dict[str, int] = {}
        self._had: dict[tuple[str, int], int] = {}
        self._taken = 0

    def map(self, stage: Stage[ShardT, ResultT], shards: Iterable[ShardT]) -> Iterator[Done[ShardT, ResultT]]:
        """Runs `stage` on every shard and yields them as they finish. Raises SpecmillError when one fails."""
        line = self.line(stage)
        line.add(shards)
        yield from run([line])

    def line(self, stage: Stage[ShardT, ResultT]) -> "Line[ShardT, ResultT]":
        """A line of this fleet for the shards of a stage."""
        return Line(stage, lambda: self)

    def load_weights(self, path: str, version: int) -> None:
        """Every engine takes the weights of a safetensors file or checkpoint directory as policy version `version`.

        Raises SpecmillError when one dies over it, or is not there for `start_seconds`.
        """
        self.weights = Weights(path, version, uuid.uuid4().hex)
        taking = [actor.ready.remote(self.weights) for actor in self.actors]
        _, absent = ray.wait(taking, num_returns=len(taking), timeout=None if self.start_seconds == math.inf else self.start_seconds)
        if absent:
            raise SpecmillError(
                f"{len(absent)} of {len(taking)} engines took no weights within {self.start_seconds:.0f} s (`start_seconds`): they do not "
                "come back, or wait for a machine that is gone. The same command goes on from the last checkpoint; `engines` may be lower."
            )
        for ready in taking:
            answer(ready, "an engine died while it took weights")

    def home(self, prefixes: Iterable[str], number: int) -> str:
        """Which prefix engine `number` goes on with: one that it is home to, else one without a home, else any; of several the one that it
        had last, so that what it works on at a time has one prefix, else the first."""

        def distance(name: str) -> tuple[int, int]:
            home = self._homes.get(name)
            return (0 if home == number else 1 if home is None else 2), -self._had.get((name, number), 0)

        name = min(prefixes, key=distance)
        self._homes.setdefault(name, number)
        self._taken += 1
        self._had[name, number] = self._taken
        return name


class Line(Generic[ShardT, ResultT]):
    """Shards of one stage that wait for a fleet, which is asked for when the first one does. More may be added while it runs."""

    def __init__(self, stage: Stage[ShardT, ResultT], fleet: Callable[[], Fleet]) -> None:
        self.stage, self.fleet = stage, fleet
        self.waiting = 0
        """Requests of the shards that wait."""
        self._queues: dict[str, deque[Work]] = {}

    def add(self, shards: Iterable[ShardT]) -> None:
        """Shards to run after those that wait already."""
        for shard in shards:
            self._put(shard, deque.append)

    def take(self, fleet: Fleet, number: int, limit: int) -> Work:
        """The next shard for engine `number`, cut to `limit` requests if it can be: towards the end all engines share what is left."""
        longest_first = sorted(self._queues, key=lambda name: -len(self._queues[name]))
        name = fleet.home(longest_first, number)
        work = self._queues[name].popleft()
        self.waiting -= work.size
        if not self._queues[name]:
            del self._queues[name]
        while work.size > limit and self.stage.split and len(parts := self.stage.split(work.shard)) > 1:
            for part in reversed(parts[1:]):
                self._put(part, deque.appendleft)
            work = Work(self, parts[0], self.stage.size(parts[0]))
        return work

    def _put(self, shard: ShardT, put: Callable[[deque[Work], Work], None]) -> None:
        work = Work(self, shard, self.stage.size(shard))
        self.waiting += work.size
        put(self._queues.setdefault(self.stage.prefix(shard), deque()), work)


def portion(capacity: int, engines: int, waiting: int, can_be_cut: bool) -> tuple[int, int]:
    """With fewer than how many requests an engine gets more, and how many that are at most, while so many wait for all engines.

    Twice what it can work on: shards that wait for their last rows leave it full. Towards the end several engines get less of what can be
    cut, in smaller pieces: what one has, no other can take.
    """
    least, share = max(capacity // 4, 1), waiting // (2 * engines)
    if engines == 1 or not can_be_cut:
        return 2 * capacity, max(least, share)
    return capacity + max(least, min(capacity, share)), max(least, share // 2)


class _Feeder:
    """Feeds one fleet from the lines that want it, the first ones first."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.pending: dict[Any, _Slot] = {}
        """Answers that are waited for, and from whom."""
        self.slots = [_Slot(number, actor) for number, actor in enumerate(fleet.actors)]
        self.suspects = Suspects()
        self._there = time.monotonic()
        """When an engine was last seen to be there."""
        self._finished = 0.0
        """When a shard was last finished."""
        for slot in self.slots:
            self._await(slot)
        # The first to answer is not handed all of a small work while the others are about to answer.
        ray.wait(list(self.pending), num_returns=len(self.pending), timeout=TICK_SECONDS)

    @property
    def busy(self) -> bool:
        """Whether something is under way or in doubt."""
        return bool(self.suspects) or any(slot.running for slot in self.slots)

    @property
    def full(self) -> bool:
        """Whether every engine that is there has something to do."""
        return all(slot.running or not slot.open for slot in self.slots)

    def fill(self, lines: Sequence[Line], waiting: int) -> None:
        """Hands out work until every engine has its portion. `waiting`: requests of all lines.

        A suspect gets an engine for itself: first of all that one, back and empty, in which it was. One that has died again and again works
        on something else in between, which shows whether it is the engine.
        """
        for slot in self.slots:
            if self.suspects.waiting and slot.open and not slot.running:
                line = next((line for line in lines if line.waiting), None) if slot.deaths >= MAX_DEATHS else None
                self._start(slot, self._taken(line, slot, waiting) if line else self.suspects.take(), alone=True)
        while line := next((line for line in lines if line.waiting), None):
            limit, _ = self._portion(line, waiting)
            able = [slot for slot in self.slots if slot.open and (len(slot.running) < 2 or slot.load < limit)]
            if not able:
                return
            slot = min(able, key=lambda slot: slot.load)
            work = self._taken(line, slot, waiting)
            waiting -= work.size
            self._start(slot, work)

    def _portion(self, line: Line, waiting: int) -> tuple[int, int]:
        return portion(self.fleet.capacity, len(self.slots), waiting, line.stage.split is not None)

    def _taken(self, line: Line, slot: _Slot, waiting: int) -> Work:
        return line.take(self.fleet, slot.number, self._portion(line, waiting)[1])

    def check(self) -> None:
        """Raises SpecmillError when no engine was there for longer than one may take to start: Ray tries it for ever."""
        now = time.monotonic()
        if any(slot.open or slot.running for slot in self.slots):
            self._there = now
        elif now - self._there > self.fleet.start_seconds:
            raise SpecmillError(
                f"no engine was there for {self.fleet.start_seconds:.0f} s (`start_seconds`): they die while they start, or wait for a "
                "machine that is gone. Everything committed is kept; the same command goes on from there."
            )

    def receive(self, ready: Any) -> Iterator[Done]:
        """Takes an answer, if it is of this fleet."""
        slot = self.pending.pop(ready, None)
        if slot is None:  # of another fleet, or of an engine that has died since
            return
        if ready == slot.returning:
            self._welcome(slot)
            return
        try:
            result, usage = answer(ready)
        except DEATHS as error:
            self._bury(slot, last_line(error))
            return
        work = slot.running.pop(ready)
        slot.load, slot.open, slot.deaths, self._finished = slot.load - work.size, True, 0, time.monotonic()
        yield Done(work.line, work.shard, result, usage, slot.number)

    def _start(self, slot: _Slot, work: Work, alone: bool = False) -> None:
        ref = slot.actor.run.remote(work.line.stage.run, work.shard, self.fleet.weights)
        slot.running[ref], self.pending[ref] = work, slot
        slot.load, slot.open = slot.load + work.size, not alone

    def _await(self, slot: _Slot) -> None:
        slot.returning, slot.open, slot.load = slot.actor.ready.remote(self.fleet.weights), False, 0
        self.pending[slot.returning] = slot

    def _welcome(self, slot: _Slot) -> None:
        """Takes an engine that is there. One that does not start is left out, unless there is no other."""
        ready, slot.returning = slot.returning, None
        try:
            slot.node, slot.open = answer(ready, "an engine did not start"), True
        except SpecmillError as error:
            slot.deaths += 1
            if slot.deaths <= MAX_DEATHS and not isinstance(error, UserError):
                ray.kill(slot.actor, no_restart=False)
                self._await(slot)
                return
            if not any(other.open or other.running or other.returning is not None for other in self.slots):
                raise
            logger.warning("engine %d of %d is left out: %s", slot.number + 1, len(self.slots), error)

    def _bury(self, slot: _Slot, reason: str) -> None:
        """After the death of an engine: its shards are suspects."""
        dead = list(slot.running.values())
        for ref in slot.running:
            self.pending.pop(ref, None)
        slot.running.clear()
        slot.deaths += 1
        if slot.deaths > MAX_LOSSES:
            raise SpecmillError(f"an engine died {slot.deaths} times without finishing a shard: {reason}")
        self._await(slot)
        self.suspects.add(dead, slot.number, slot.node, reason)

    def give_up(self, waiting: int) -> Iterator[Done]:
        """Gives up what is to blame; SpecmillError where the stage gives nothing up. `waiting`: requests of the lines of this fleet."""
        others = waiting or any(not work.deaths for slot in self.slots for work in slot.running.values())
        for work in self.suspects.guilty(self._finished if others else math.inf):
            told, give_up = f"killed its engine {len(work.deaths)} times: {work.reason}", work.line.stage.give_up
            if give_up is None:
                raise SpecmillError(f"a shard {told}")
            yield Done(work.line, work.shard, give_up(work.shard, f"it {told}"), Usage(), work.engine)


def run(lines: Sequence[Line], tick: Callable[[bool], None] | None = None) -> Iterator[Done]:
    """Runs all shards of the lines, and those that are added between two results. Lines that come first have precedence on a fleet
    that they share. `tick` is called every second, and told whether every engine has something to do. Raises SpecmillError when a shard
    fails."""
    feeders: dict[int, _Feeder] = {}
    while True:
        for line in lines:
            if line.waiting and id(fleet := line.fleet()) not in feeders:
                feeders[id(fleet)] = _Feeder(fleet)
        waiting = sum(line.waiting for line in lines)
        if not waiting and not any(feeder.busy for feeder in feeders.values()):
            return
        for feeder in feeders.values():
            feeder.check()
            wanting = [line for line in lines if line.waiting and line.fleet() is feeder.fleet]
            yield from feeder.give_up(sum(line.waiting for line in wanting))
            feeder.fill(wanting, waiting)
        pending = [ref for feeder in feeders.values() for ref in feeder.pending]
        if tick:
            tick(all(feeder.full for feeder in feeders.values()))
        if not pending:  # only accused are left
            time.sleep(TICK_SECONDS)
            continue
        ready, _ = ray.wait(pending, num_returns=1, timeout=TICK_SECONDS)
        if ready:  # of a thousand engines, many have answered in the meantime
            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        for ref in ready:
            for feeder in feeders.values():
                yield from feeder.receive(ref)


def answer(ref: Any, died: str = "") -> Any:
    """What an actor answers. Raises its own SpecmillError as it is, and SpecmillError for other failures.

    The death of the actor is one of DEATHS, or with `died` a SpecmillError that begins so.
    """
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, SpecmillError):
            raise error.cause from None
        raise SpecmillError(f"an engine failed: {last_line(error)}") from error
    except DEATHS as error:
        if not died:
            raise
        raise SpecmillError(f"{died}: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """The last line of an error's text, in which Ray puts the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
