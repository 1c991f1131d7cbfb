"""A world in one process: an object store, clocks and processes that fail, stepped one at a time in an order that a seed decides.

The recipe, the ledger, the keys, the marks and the stages' reading and writing are the real ones. What they reach through a module's name
is exchanged for as long as a schedule runs: `time`, `threading`, `random`, the file system behind `Store`, and the fleet of engines.
Every thread of a simulated process waits for its turn; it gives the turn away at every request to the store and whenever it sleeps.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import flows.steps
import tasks.complete
import tasks.judge
import tasks.ledger
import tasks.progress
import tasks.store
import tasks.work
from simulation.clock import Clock, Inline, Threads
from simulation.engines import Engines
from simulation.object_store import Files, Tablets
from simulation.run import prompt_files
from simulation.world import Process, Settings, World

SNAPSHOT_ENTRIES = 4


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
