"""A world in one process: an object store, clocks and processes that fail, stepped one at a time in an order that a seed decides.

The recipe, the ledger, the keys, the marks and the stages' reading and writing are the real ones. What they reach through a module's name
is exchanged for as long as a schedule runs: `time`, `threading`, `random`, the file system behind `Store`, and the fleet of engines.
Every thread of a simulated process waits for its turn; it gives the turn away at every request to the store and whenever it sleeps.
"""

import errno
import io
import random
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache, cached_property
from math import inf
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

import flows.inspect
import flows.steps
import flows.workspace
import tasks.complete
import tasks.judge
import tasks.keys
import tasks.ledger
import tasks.progress
import tasks.store
import tasks.work
from cluster.errors import SpecmillError
from cluster.fleet import Done, Fleet, Line
from cluster.models import Model
from cluster.serving import Usage
from flows.workspace import Workspace
from tasks import tables
from tasks.complete import GenerateConfig, Request
from tasks.gates import GateConfig, Gates
from tasks.judge import JudgeConfig
from tasks.keys import digest, request_prefix
from tasks.policy import Spec
from tasks.prompt_set import PromptSet
from tasks.store import Store

ROOT = "sim://root"
LEASE = 30.0
PROMPTS = {"harassment": 2, "violence": 1}
LIMIT = 3
"""Judge scores below it settle a completion."""
DRIFT = 0.05
"""How much faster or slower than true time a clock may run."""
MOST_STEPS = 60_000
SNAPSHOT_ENTRIES = 4


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


@dataclass
class Weather:
    """Chances of what can happen to a request to the store, and at a write in particular."""

    fail: float = 0.0
    lose_answer: float = 0.0
    unclear_conflict: float = 0.0
    delay: float = 0.0
    crash: float = 0.0
    interrupt: float = 0.0
    pause: float = 0.0
    outage: float = 0.0
    slow: float = 0.0
    lose_shard: float = 0.0
    damage_shard: float = 0.0
    engine_fails: float = 0.0
    give_up: float = 0.0

    @classmethod
    def drawn(cls, rng: random.Random) -> "Weather":
        """Some faults of the list, each as often as it comes: a schedule with few kinds of them goes deeper than one with all."""
        most = {
            "fail": 0.2, "lose_answer": 0.2, "unclear_conflict": 1.0, "delay": 0.1, "crash": 0.08, "interrupt": 0.03, "pause": 0.01,
            "outage": 0.004, "slow": 0.1, "lose_shard": 0.01, "damage_shard": 0.015, "engine_fails": 0.05, "give_up": 0.1,
        }  # fmt: skip
        return cls(**{name: rng.random() * top if rng.random() < 0.4 else 0.0 for name, top in most.items()})


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
        self.draws: Counter[tuple[bytes, bytes]] = Counter()
        """(key, content) -> how often a completion was drawn."""
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


class Files:
    """The simulated object store, as fsspec would show it: whole objects, conditional creation, no folders."""

    protocol = "sim"

    def __init__(self, world: World) -> None:
        self.world = world

    def cat_file(self, path: str) -> bytes:
        self._ask(path)
        content = self.world.objects.get(path)
        if content is None:
            raise FileNotFoundError(path)
        return content

    def exists(self, path: str) -> bool:
        self._ask(path)
        return path in self.world.objects

    def glob(self, pattern: str) -> list[str]:
        """A listing that lags behind by up to half a minute."""
        self._ask(pattern)
        lag = self.world.rng.random() * 30 if self.world.current and not self.world.current.process.calm else 0.0
        return [path for path in self.world.objects if fnmatch(path, pattern) and self.world.born[path] <= self.world.now - lag]

    def pipe_file(self, path: str, content: bytes, mode: str = "overwrite") -> None:
        def write() -> None:
            if mode == "create" and path in self.world.objects:
                self._refuse(path, content)
            self.world.note(f"{mode} {path}")
            self.world.store(path, content, self.world.current.process if self.world.current else None)

        self._change(path, write, content if mode == "create" else None)

    def rm_file(self, path: str) -> None:
        def remove() -> None:
            self.world.note(f"delete {path}")
            if self.world.objects.pop(path, None) is None:
                raise FileNotFoundError(path)

        self._change(path, remove, None)

    def _refuse(self, path: str, content: bytes) -> None:
        world = self.world
        world.note(f"refused: create {path}")
        process = world.current.process if world.current else None
        if (
            process
            and world.authors.get(path) is process
            and world.objects[path] != content
            and "/ledger/" in path
            and not process.disturbed
        ):
            world.violations.append(f"{process.name} stands in its own way at {path}")
        if world.happens(world.weather.unclear_conflict):
            raise OSError(errno.EINVAL, "condition failed")
        raise FileExistsError(path)

    def _ask(self, path: str) -> None:
        """A request travels. It may be slow, not arrive, or find that the world has changed."""
        world, weather = self.world, self.world.weather
        if world.current is None:
            return
        process = world.current.process
        world.wait(world.rng.uniform(0.001, 0.05) if not world.happens(weather.slow) else world.rng.uniform(0.1, 4.0))
        if world.happens(weather.pause):
            process.frozen, process.disturbed = world.now + world.rng.uniform(0.3, 3.0) * LEASE, True
            world.note(f"PAUSE of {process.frozen - world.now:.0f} s at {path}")
            world.wait()
        if world.happens(weather.lose_shard):
            world.hurt(remove=True)
        if world.happens(weather.damage_shard):
            world.hurt(remove=False)
        if world.happens(weather.outage):
            world.down_until = world.now + world.rng.uniform(5, 150)
            world.note(f"OUTAGE for {world.down_until - world.now:.0f} s")
        if (world.now < world.down_until and not process.calm) or world.happens(weather.fail):
            self._failed(process, f"no answer: {path}")
        process.failures = 0

    def _failed(self, process: Process, text: str) -> None:
        process.failures += 1
        process.disturbed |= process.failures > 3 or self.world.now < self.world.down_until
        self.world.note(text)
        raise ConnectionResetError(errno.ECONNRESET, "connection reset")

    def _change(self, path: str, change: Callable[[], None], created: bytes | None) -> None:
        world, weather = self.world, self.world.weather
        self._ask(path)
        if world.current is None:
            change()
            return
        process = world.current.process
        if world.happens(weather.crash / 2):
            world.crash(process, f"before the write of {path}")
        self._interrupt(process, path)
        if created is not None and world.happens(weather.delay):
            world.later.append((world.now + world.rng.uniform(1, 2 * LEASE), path, created))
            process.disturbed = True
            world.wait(world.rng.uniform(0.1, 10))
            self._failed(process, f"no answer, under way: {path}")
        change()
        if world.happens(weather.crash / 2):
            world.crash(process, f"after the write of {path}")
        world.wait(world.rng.uniform(0.001, 0.03))
        self._interrupt(process, path)
        if world.happens(weather.lose_answer):
            self._failed(process, f"answer lost: {path}")

    def _interrupt(self, process: Process, path: str) -> None:
        first = next(fiber for fiber in self.world.fibers if fiber.process is process)
        if first is self.world.current and self.world.happens(self.world.weather.interrupt / 2):
            process.disturbed = True
            self.world.note(f"INTERRUPT at {path}")
            raise KeyboardInterrupt


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


class Tablets:
    """Stands in for `pyarrow.parquet`: Arrow's own format with a checksum, which costs a tenth of the time."""

    class ParquetFile:
        def __init__(self, source: io.BytesIO, page_checksum_verification: bool = False) -> None:
            content = source.read()
            if page_checksum_verification and zlib.crc32(content[4:]).to_bytes(4) != content[:4]:
                raise OSError("checksum of a page differs")
            self.content = content[4:]

        def read(self, columns: list[str] | None, use_threads: bool = True) -> pa.Table:
            table = pa.ipc.open_file(pa.BufferReader(self.content)).read_all()
            return table.select(columns) if columns else table

    @staticmethod
    def write_table(table: pa.Table, sink: io.BytesIO, **options: Any) -> None:
        content = pa.BufferOutputStream()
        with pa.ipc.new_file(content, table.schema) as writer:
            writer.write_table(table)
        body = content.getvalue().to_pybytes()
        sink.write(zlib.crc32(body).to_bytes(4) + body)


def specs(settings: Settings) -> dict[str, Spec]:
    """Category -> its policy as it is worded in this edition."""
    texts = {category: f"policy of {category}, edition {edition}" for category, edition in settings.editions}
    return {category: Spec(text, digest(text)) for category, text in texts.items()}


class Pool:
    """Engines that need no start."""

    started = True

    def __init__(self, id: str, engines: int) -> None:
        self.model = Model("no files", id, "1")
        self._fleet = Fleet([None] * engines, 4)

    def fleet(self) -> Fleet:
        return self._fleet

    def close(self) -> None:
        pass


class Run(Workspace):
    """A workspace without models."""

    @cached_property
    def requests(self) -> dict[str, Request]:
        found = {}
        for category, spec in specs(self.config.settings).items():
            model, sampling = self.generator.model, {"temperature": 1.0}
            prefix = request_prefix(spec=spec.hash, template="t", model=model.id, revision=model.revision, sampling=sampling)
            found[category] = Request(category, spec, model, prefix, "t", digest(sampling), None)
        return found

    @property
    def gates(self) -> Gates:
        return Gates(GateConfig(), frozenset(["VI1"]))

    @property
    def limits(self) -> dict[str, int]:
        return dict.fromkeys(PROMPTS, LIMIT)

    def judge_hash(self, view: str) -> str:
        return digest(["judge", view])

    def note(self, stage: str, **counts: int) -> None:
        self.notes[stage] = counts


def workspace(settings: Settings) -> Run:
    """What a driver opens."""
    generate, judge = GenerateConfig(n=settings.n, shard_rows=settings.shard_rows), JudgeConfig(k=settings.k, overlap=settings.overlap)
    config: Any = SimpleNamespace(settings=settings, generate=generate, judge=judge, lease_seconds=LEASE)
    store = Store(ROOT)
    pools: Any = [Pool("generator", settings.engines), Pool("judge", settings.engines)]
    return Run(config, None, prompt_set(store), store, *pools, None)  # type: ignore[arg-type]


def prompt_set(store: Store) -> PromptSet:
    """The prompts that lie in every world's store."""
    parts = [{"path": f"{category}.parquet", "category": category, "rows": rows + 1, "splits": {"sft": rows, "rl": 1, "eval": 0}}
             for category, rows in PROMPTS.items()]  # fmt: skip
    return PromptSet(store, "prompts", {"parts": parts, "reserved": [], "hash": "", "counts": {}})


@cache
def prompt_files(real: bool) -> dict[str, bytes]:
    """Path -> the file of a category's prompts, the last of which is of another split."""
    files = {}
    for category, rows in PROMPTS.items():
        names = [f"{category}-{number}" for number in range(rows + 1)]
        table = [
            {"id": name, "prompt_hash": digest(name), "category": category, "messages": [{"role": "user", "content": name}],
             "group": name, "split": "rl" if number == rows else "sft"}
            for number, name in enumerate(names)
        ]  # fmt: skip
        sink = io.BytesIO()
        (pq if real else Tablets).write_table(pa.Table.from_pylist(table, schema=tables.PROMPTS), sink)
        files[f"root/prompts/{category}.parquet"] = sink.getvalue()
    return files


def said(row: dict[str, Any]) -> str:
    """Names what a judge has read."""
    return digest([row["thought"], row["answer"]])


class Engines:
    """What is drawn and judged: every draw may say something else, as engines do whose batches differ."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.fickle = world.rng.random() < 0.5

    async def draw(self, engine: None, shard: Any, prompt: dict[str, Any], sample: int) -> dict[str, Any]:
        row = tasks.complete._row(shard, prompt, sample)
        if sample == 2 and prompt["id"].endswith("-0"):
            return row | {"quarantined": "the engine gave no completion"}
        thought = f"{shard.request.spec.text} on {prompt['id']}\nClauses: VI1\nVerdict: comply"
        answer = (
            f"answer {sample} in words {self.world.draws.total() if self.fickle else 0}"
            if sample != 1 or not prompt["id"].endswith("-1")
            else ""
        )
        content = bytes.fromhex(digest([thought, answer]))[:16]
        self.world.draws[row["key"], content] += 1
        return row | {
            "thought": thought, "answer": answer, "malformed": None, "finish_reason": "stop", "content": content, "cited_verdict": "comply",
            "cited_clauses": ["VI1"], "token_ids": [1],
        }  # fmt: skip

    async def judge(self, engine: None, shard: Any, row: dict[str, Any], run: int) -> dict[str, Any]:
        result = tasks.judge._row(shard, row, run) | {"seed": run, "raw": [said(row)]}
        if self.world.rng.random() < 0.1:
            return result | {"quarantined": "verdict not parsable"}
        return result | {"score": self.world.rng.randint(2, 5)}

    def run(self, lines: Sequence[Line], tick: Callable[[], None]) -> Iterator[Done]:
        """A fleet: shards finish in any order, some are given up, and now and then an engine fails for good."""
        world, under_way = self.world, []
        while True:
            for line in lines:
                while line.waiting and len(under_way) < 2 * len(line.fleet().actors):
                    number = world.rng.randrange(len(line.fleet().actors))
                    work = line.take(line.fleet(), number, world.rng.randint(1, 12))
                    under_way.append((world.now + world.rng.uniform(0.2, 2.0) * world.rng.choice([1, 1, 1, 15]), work))
            if not under_way:
                return
            due, work = min(under_way, key=lambda item: item[0])
            under_way.remove((due, work))
            while world.now < due:
                world.wait(min(1.0, due - world.now))
                tick()
            if world.happens(world.weather.engine_fails):
                raise SpecmillError("an engine failed")
            if world.happens(world.weather.give_up):
                result = work.line.stage.give_up(work.shard, "it killed its engine")
            else:
                try:
                    result = finish(work.line.stage.run(None, work.shard))
                except SpecmillError:
                    raise
                except Exception as error:
                    raise SpecmillError(f"an engine failed: {error!r}") from error
            yield Done(work.line, work.shard, result, Usage(requests=work.size))


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


@contextmanager
def inside(world: World, real_parquet: bool = False) -> Iterator[None]:
    """Exchanges what the real code reaches outside itself for this world's."""
    files, clock, threads, engines = Files(world), Clock(world), Threads(world), Engines(world)
    tasks.complete._prompts.cache_clear()
    world.objects |= prompt_files(real_parquet)
    world.born |= dict.fromkeys(world.objects, 0.0)

    def name() -> SimpleNamespace:
        process = world.current.process if world.current else Process("oracle", Settings())
        process.writers += 1
        world.writers[f"{process.name}.{process.writers}"] = process
        return SimpleNamespace(hex=f"{process.name}.{process.writers}")

    exchanged: list[tuple[Any, str, Any]] = [
        (tasks.store, "fsspec", SimpleNamespace(core=SimpleNamespace(url_to_fs=lambda root, **options: (files, "root")))),
        (tasks.store, "ThreadPoolExecutor", Inline),
        (tasks.store, "random", world.rng),
        (tasks.ledger, "threading", threads),
        (tasks.ledger, "uuid", SimpleNamespace(uuid4=name)),
        (tasks.ledger, "SNAPSHOT_ENTRIES", SNAPSHOT_ENTRIES),
        (tasks.work, "run", engines.run),
        (tasks.complete, "_draw", engines.draw),
        (tasks.judge, "_judge_row", engines.judge),
        *((module, "time", clock) for module in (tasks.store, tasks.ledger, tasks.work, tasks.progress)),
        *((module, "say", lambda text: None) for module in (tasks.ledger, tasks.progress, flows.steps)),
        *((module, "asyncio", Inline) for module in (tasks.complete, tasks.judge)),
    ]
    if not real_parquet:
        exchanged.append((tasks.store, "pq", Tablets))
    with ExitStack() as stack:
        for target, attribute, value in exchanged:
            stack.enter_context(patch.object(target, attribute, value))
        yield
