"""Time and threads of simulated processes: stand-ins for the modules `time`, `threading` and `asyncio` and for executors."""

from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf
from typing import Any

from simulation.world import Fiber, Process, Settings, World


class Clock:
    """Stands in for the module `time`: what the clock of the process that asks shows."""

    def __init__(self, world: World) -> None:
        self.world = world

    def monotonic(self) -> float:
        process = self.world.current.process if self.world.current else Process("-", Settings())
        return 1000.0 + process.offset + self.world.now * process.rate

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.world.wait(seconds / (self.world.current.process.rate if self.world.current else 1.0))


class Threads:
    """Stands in for the module `threading`: threads, locks and events of the process that makes them."""

    def __init__(self, world: World) -> None:
        self.world = world

    def Lock(self) -> "SimulatedLock":
        return SimulatedLock(self.world)

    def Event(self) -> "SimulatedEvent":
        return SimulatedEvent(self.world)

    def Thread(self, target: Callable[..., None], args: tuple[Any, ...] = (), daemon: bool = False) -> "SimulatedThread":
        return SimulatedThread(self.world, lambda: target(*args))


@dataclass
class SimulatedLock:
    """A lock that waits for its turn in simulated time."""

    world: World
    held: bool = False

    def __enter__(self) -> None:
        while self.held:
            self.world.wait(inf, lambda: not self.held)
        self.held = True

    def __exit__(self, *error: object) -> None:
        self.held = False


@dataclass
class SimulatedEvent:
    """An event that is waited for in simulated time."""

    world: World
    happened: bool = False

    def set(self) -> None:
        self.happened = True

    def wait(self, timeout: float) -> bool:
        self.world.wait(timeout, lambda: self.happened)
        return self.happened


@dataclass
class SimulatedThread:
    """A second thread of the process whose turn it is."""

    world: World
    body: Callable[[], None]
    fiber: Fiber | None = None

    def start(self) -> None:
        assert self.world.current
        self.fiber = self.world.spawn(self.world.current.process, self.body)

    def join(self) -> None:
        fiber = self.fiber
        assert fiber
        while not fiber.done:
            self.world.wait(inf, lambda: fiber.done)


class Inline:
    """Stands in for an executor and for `asyncio` where it only spreads work over threads: everything happens at once, in order."""

    def __init__(self, workers: int = 1) -> None:
        pass

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    @staticmethod
    async def to_thread(call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)

    @staticmethod
    async def gather(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
        return [await coroutine for coroutine in coroutines]
