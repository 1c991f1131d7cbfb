"""Engine actors, and the fleet that feeds them.

A fleet keeps several shards in flight per engine so that none drains, and hands finished shards to the caller. An engine that dies loses
nothing: Ray starts it again, and its shards are run again, one at a time, to find out whether one of them kills engines. A shard that does
is split until the row is found; the stage then gives that row up, and the rest goes on.
"""

import asyncio
import os
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.engine import EngineConfig, EngineDied
from cluster.errors import SpecmillError
from cluster.fake_engine import FakeEngine
from cluster.models import Model
from cluster.serving import Metered, Served, Usage
from cluster.vllm_engine import VllmEngine

ShardT = TypeVar("ShardT")
ResultT = TypeVar("ResultT")

MAX_DEATHS = 3
"""So many times may a shard that cannot be split or given up kill its engine, and an engine die without finishing a shard."""


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
    """A finished shard, and what it cost."""

    shard: ShardT
    result: ResultT
    usage: Usage


@dataclass(frozen=True)
class Weights:
    """Weights that engines are to answer with: a safetensors file or checkpoint directory, as policy version `version`."""

    path: str
    version: int
    push: str
    """Names the push: a file of one name is written many times."""


class EngineActor:
    """One engine in a process of its own. A dead engine ends the process, so that Ray starts a fresh one."""

    def __init__(self, model: Model, config: EngineConfig, number: int, receives_weights: bool) -> None:
        if config.backend == "vllm" and config.gpus == 0:
            cores = sorted(os.sched_getaffinity(0))
            core = cores[number % len(cores)]
            os.sched_setaffinity(0, {core})
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
        self._engine: Any = FakeEngine(model, config) if config.backend == "fake" else VllmEngine(model, config, receives_weights)
        self._served = Served(self._engine, config)
        self._turn = asyncio.Lock()
        self._ready = False
        self._weights: Weights | None = None

    @ray.method(max_task_retries=-1)  # it waits while Ray starts the process again
    async def ready(self, weights: Weights | None = None) -> bool:
        """Returns when the engine answers with these weights. A restarted actor takes them anew; it would answer as the base model."""
        async with self._turn:
            if not self._ready:
                await self._engine.start()
                self._ready = True
            if weights and weights != self._weights:
                await _alive(self._engine.load_weights(weights.path, weights.version))
                self._weights = weights
        return True

    async def run(self, run: Callable[[Any, Any], Awaitable[Any]], shard: Any, weights: Weights | None = None) -> tuple[Any, Usage]:
        """Runs a stage on a shard; returns its result and what it cost."""
        await self.ready(weights)
        engine = Metered(self._served)
        result = await _alive(run(engine, shard))
        engine.usage.busy_seconds = self._served.busy_seconds()
        return result, engine.usage

    def stop(self) -> None:
        """Ends the engine."""
        self._engine.stop()


async def _alive(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except EngineDied:
        os._exit(1)


@dataclass
class _Work:
    """A shard and how often it was in an engine that died."""

    shard: Any
    size: int
    deaths: int = 0


@dataclass
class _Slot:
    """An engine: what runs on it, or, after its death, the answer that says that it is back."""

    actor: Any
    running: dict[Any, _Work] = field(default_factory=dict)
    returning: Any = None
    deaths: int = 0

    @property
    def open(self) -> bool:
        """Whether it takes work: it is there, and does not test a suspect."""
        return self.returning is None and not any(work.deaths for work in self.running.values())

    @property
    def load(self) -> int:
        """Requests in flight."""
        return sum(work.size for work in self.running.values())


class Fleet:
    """Running engines of one configuration, each of which works on `capacity` requests. Can be handed to another process."""

    def __init__(self, actors: list[Any], capacity: int) -> None:
        self.actors, self.capacity = actors, capacity
        self._weights: Weights | None = None
        self._homes: dict[str, int] = {}

    def map(self, stage: Stage[ShardT, ResultT], shards: Iterable[ShardT]) -> Iterator[Done[ShardT, ResultT]]:
        """Runs `stage` on every shard and yields them as they finish. Raises SpecmillError when one fails."""
        waiting: dict[str, deque[_Work]] = {}
        for shard in shards:
            waiting.setdefault(stage.prefix(shard), deque()).append(_Work(shard, stage.size(shard)))
        suspects: deque[_Work] = deque()
        slots = [_Slot(actor) for actor in self.actors]
        while waiting or suspects or any(slot.running for slot in slots):
            self._fill(stage, slots, waiting, suspects)
            pending = [*(ref for slot in slots for ref in slot.running), *(slot.returning for slot in slots if slot.returning)]
            (ready,), _ = ray.wait(pending, num_returns=1)
            slot = next(slot for slot in slots if ready in slot.running or ready == slot.returning)
            if ready == slot.returning:
                answer(ready, "an engine did not start again")
                slot.returning = None
                continue
            try:
                result, usage = answer(ready)
            except RayActorError as error:
                yield from self._bury(stage, slot, suspects, last_line(error))
                continue
            slot.deaths = 0
            yield Done(slot.running.pop(ready).shard, result, usage)

    def _fill(self, stage: Stage, slots: list[_Slot], waiting: dict[str, deque[_Work]], suspects: deque[_Work]) -> None:
        """Hands out work until every engine has a shard more than it can work on: the next one overlaps the tail of the last.

        A suspect gets an engine for itself: first of all that one, back and empty, in which it was.
        """
        for slot in slots:
            if suspects and slot.open and not slot.running:
                self._start(stage, slot, suspects.popleft())
        while waiting:
            able = [number for number, slot in enumerate(slots) if slot.open and (len(slot.running) < 2 or slot.load <= self.capacity)]
            if not able:
                return
            number = min(able, key=lambda number: slots[number].load)
            self._start(stage, slots[number], self._take(waiting, number))

    def _start(self, stage: Stage, slot: _Slot, work: _Work) -> None:
        slot.running[slot.actor.run.remote(stage.run, work.shard, self._weights)] = work

    def _bury(self, stage: Stage[ShardT, ResultT], slot: _Slot, suspects: deque[_Work], reason: str) -> Iterator[Done[ShardT, ResultT]]:
        """After the death of an engine: its shards are suspects; one that was alone in it is split or given up."""
        dead = list(slot.running.values())
        slot.running.clear()
        slot.deaths += 1
        if slot.deaths > MAX_DEATHS * 4:
            raise SpecmillError(f"an engine died {slot.deaths} times without finishing a shard: {reason}")
        slot.returning = slot.actor.ready.remote(self._weights)
        for work in dead:
            work.deaths += 1
        if len(dead) > 1 or dead[0].deaths < 2:
            suspects.extend(dead)
            return
        (work,) = dead
        parts = stage.split(work.shard) if stage.split else [work.shard]
        if len(parts) > 1:
            suspects.extend(_Work(part, stage.size(part), deaths=1) for part in parts)
        elif stage.give_up:
            yield Done(work.shard, stage.give_up(work.shard, f"it killed its engine {work.deaths} times: {reason}"), Usage())
        elif work.deaths >= MAX_DEATHS:
            raise SpecmillError(f"a shard killed its engine {work.deaths} times: {reason}")
        else:
            suspects.append(work)

    def _take(self, waiting: dict[str, deque[_Work]], number: int) -> _Work:
        """The next shard for an engine: of a prefix that it is home to, else of one without a home, else of the longest queue."""
        at_home = (name for name in waiting if self._homes.get(name) == number)
        homeless = (name for name in waiting if name not in self._homes)
        name = next(at_home, None) or next(homeless, None) or max(waiting, key=lambda name: len(waiting[name]))
        self._homes.setdefault(name, number)
        work = waiting[name].popleft()
        if not waiting[name]:
            del waiting[name]
        return work

    def load_weights(self, path: str, version: int) -> None:
        """Every engine takes the weights of a safetensors file or checkpoint directory as policy version `version`."""
        self._weights = Weights(path, version, uuid.uuid4().hex)
        for ready in [actor.ready.remote(self._weights) for actor in self.actors]:
            answer(ready, "an engine died while it took weights")


def answer(ref: Any, died: str = "") -> Any:
    """What an actor answers. Raises its own SpecmillError as it is, and SpecmillError for other failures.

    The death of the actor is RayActorError, or with `died` a SpecmillError that begins so.
    """
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, SpecmillError):
            raise error.cause from None
        raise SpecmillError(f"an engine failed: {last_line(error)}") from error
    except RayActorError as error:
        if not died:
            raise
        raise SpecmillError(f"{died}: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """The last line of an error's text, in which Ray puts the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
