"""The store's objects, the true time, and processes whose threads take turns, in an order that a seed decides."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from simulation.weather import Weather

LEASE = 30.0
PROMPTS = {"harassment": 2, "violence": 1}
DRIFT = 0.05
"""How much faster or slower than true time a clock may run."""
MOST_STEPS = 60_000


class Crashed(BaseException):
    """Unwinds what is left of a process that died; nothing that it still tries has an effect."""


class Stuck(AssertionError):
    """Nobody can go on, or nobody comes to an end."""


@dataclass(frozen=True)
class Settings:
    """What a driver is started with."""

    n: int = 2
    k: int = 2
    shard_rows: int = 3
    editions: tuple[tuple[str, int], ...] = tuple((category, 1) for category in PROMPTS)
    """Category -> which edition of its policy holds."""
    engines: int = 2
    overlap: bool = True


@dataclass(eq=False)
class Process:
    """A driver: its threads, its clock, and what befell it."""

    name: str
    settings: Settings
    offset: float = 0.0
    rate: float = 1.0
    calm: bool = False
    dead: bool = False
    ended: bool = False
    disturbed: bool = False
    """Whether it was held up for so long that others may take it for dead."""
    frozen: float = 0.0
    failures: int = 0
    writers: int = 0
    outcome: str = ""


class Fiber:
    """A thread of a process. It runs only while it holds the turn."""

    def __init__(self, world: "World", process: Process, body: Callable[[], None]) -> None:
        self.world, self.process = world, process
        self.wake, self.ready, self.done = world.now, None, False
        self.ready: Callable[[], bool] | None
        self.turn = threading.Lock()
        self.turn.acquire()
        self._body = body
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.turn.acquire()
        try:
            self._body()
        except Crashed:
            pass
        except BaseException as error:
            self.world.violations.append(f"a thread of {self.process.name} ended with {error!r}")
        self.done = True
        self.world.hand_over()

    def due(self, now: float) -> float:
        """When it can go on."""
        if self.process.dead:
            return now
        waits = now if self.ready is not None and self.ready() else self.wake
        return max(waits, self.process.frozen)


class World:
    """The store's objects, the true time, and everything that runs."""

    def __init__(self, seed: int, storm: dict[str, float]) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.weather = replace(Weather.drawn(self.rng), **storm)
        self.now, self.steps = 0.0, 0
        self.objects: dict[str, bytes] = {}
        self.born: dict[str, float] = {}
        self.pristine: dict[str, bytes] = {}
        """Shards as they were first written."""
        self.damaged: set[str] = set()
        self.authors: dict[str, Process] = {}
        self.writers: dict[str, Process] = {}
        self.later: list[tuple[float, str, bytes]] = []
        """Creations that are under way although nobody waits for their answer."""
        self.down_until = 0.0
        self.violations: list[str] = []
        self.trace: list[str] = []
        self.fibers: list[Fiber] = []
        self.current: Fiber | None = None
        self.draws = 0
        """Completions that were drawn."""
        self.on_entry: Callable[[str, bytes], None] = lambda path, content: None
        self._main = threading.Lock()
        self._main.acquire()
        self._error: Stuck | None = None

    def note(self, text: str) -> None:
        """A line of the trace."""
        self.trace.append(f"{self.now:9.3f} {self.current.process.name if self.current else '-':<4} {text}")

    def spawn(self, process: Process, body: Callable[[], None]) -> Fiber:
        """A thread that waits for its first turn."""
        self.fibers.append(Fiber(self, process, body))
        return self.fibers[-1]

    def run(self) -> None:
        """Lets everything run to its end."""
        self.hand_over()
        self._main.acquire()
        self.current = None
        self.fibers.clear()
        if self._error:
            raise self._error

    def hand_over(self) -> None:
        """Gives the turn to one of those that can go on, or back to the test when all have ended."""
        following = self._next()
        self.current = following
        (following.turn if following else self._main).release()

    def wait(self, seconds: float = 0.0, ready: Callable[[], bool] | None = None) -> None:
        """Gives the turn away until `ready`, or for so long. Raises Crashed in a process that is dead by then."""
        fiber = self.current
        if fiber is None:
            return
        if not fiber.process.dead:
            fiber.wake, fiber.ready = self.now + seconds, ready
            following = self._next()
            if following is not fiber:
                self.current = following
                (following.turn if following else self._main).release()
                fiber.turn.acquire()
            fiber.ready = None
        if fiber.process.dead:
            raise Crashed

    def _next(self) -> Fiber | None:
        alive = [fiber for fiber in self.fibers if not fiber.done]
        self.steps += 1
        if not alive:
            return None
        due = [fiber.due(self.now) for fiber in alive]
        if min(due) == inf or self.steps > MOST_STEPS:
            self._error = Stuck("nobody can go on" if min(due) == inf else "no end")
            for fiber in alive:
                fiber.process.dead = True
            self.steps = 0
            return alive[0]
        if min(due) > self.now:
            self.now = min(due)
            self.deliver()
        return self.rng.choice([fiber for fiber, time in zip(alive, due, strict=True) if time <= self.now])

    def deliver(self) -> None:
        """Lets late creations happen."""
        for item in [item for item in self.later if item[0] <= self.now]:
            self.later.remove(item)
            _, path, content = item
            if path not in self.objects:
                self.note(f"late: create {path}")
                self.store(path, content, None)

    def store(self, path: str, content: bytes, process: Process | None) -> None:
        """An object appears, or gets other content."""
        if "/ledger/" in path:
            if path in self.objects and self.objects[path] != content:
                self.violations.append(f"{path} was written over")
            self.on_entry(path, content)
        elif path.endswith(".parquet"):
            self.pristine.setdefault(path, content)
        self.objects[path] = content
        self.born[path] = self.now
        if process:
            self.authors[path] = process

    def hurt(self, remove: bool) -> None:
        """A shard is lost, cut short or changed."""
        shards = [path for path in self.objects if "/shards/" in path]
        if not shards:
            return
        path = self.rng.choice(sorted(shards))
        self.damaged.add(path)
        content = self.objects[path]
        if remove:
            del self.objects[path]
            self.note(f"WORLD loses {path}")
        elif self.rng.random() < 0.3:
            self.objects[path] = content[: self.rng.randrange(len(content))]
            self.note(f"WORLD cuts {path}")
        else:
            word = content.find(b"in words")
            place = word if word >= 0 and self.rng.random() < 0.7 else self.rng.randrange(len(content))
            self.objects[path] = content[:place] + bytes([content[place] ^ self.rng.randrange(1, 256)]) + content[place + 1 :]
            self.note(f"WORLD changes byte {place} of {path}")

    def crash(self, process: Process, where: str) -> None:
        """A process dies."""
        self.note(f"CRASH {where}")
        process.dead = True
        raise Crashed

    def happens(self, chance: float) -> bool:
        """Whether something of this chance happens now to the process whose turn it is."""
        return bool(chance) and self.current is not None and not self.current.process.calm and self.rng.random() < chance
