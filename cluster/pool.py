"""Engine actors and the pool that feeds them.

A pool starts its actors when they are first needed. Its fleet keeps several shards in flight per actor so that the engines never drain,
hands a finished shard's result to the caller, and resubmits the shards of an actor that died. It knows stages (async functions from
`tasks`) and nothing else.
"""

import asyncio
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import ray
from ray.exceptions import RayActorError

from cluster.engine import EngineConfig, EngineDied
from cluster.errors import SpecmillError, UserError
from cluster.models import Model, resolve_model
from cluster.vllm_engine import VllmEngine, environment

ShardT = TypeVar("ShardT")
ResultT = TypeVar("ResultT")
Stage = Callable[[Any, ShardT], Awaitable[ResultT]]

MAX_ATTEMPTS = 3
"""A shard whose actor dies this often is given up: something in it kills engines."""
ENGINE_OVERHEAD_GIB = 1.5
"""Memory of a CPU engine beside weights and KV cache: two Python processes with torch (measured: 1.3 GiB)."""


class EngineActor:
    """One engine in a process of its own. A dead engine ends the process, so that Ray starts a fresh one."""

    def __init__(self, model: Model, config: EngineConfig, core: int | None, receives_weights: bool) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})
        self._engine = VllmEngine(model, config, receives_weights)
        self._started = asyncio.Lock()
        self._ready = False

    async def ready(self) -> bool:
        """Returns when the engine answers."""
        async with self._started:
            if not self._ready:
                await self._engine.start()
                self._ready = True
        return True

    async def run(self, stage: Stage, shard: Any) -> Any:
        """Runs a stage on a shard."""
        await self.ready()
        return await self._alive(stage(self._engine, shard))

    async def load_weights(self, path: str, version: int) -> int:
        """Loads the weights of policy version `version`; returns it."""
        await self.ready()
        await self._engine.load_weights(path, version)
        return version

    def stop(self) -> None:
        """Ends the engine."""
        self._engine.stop()

    async def _alive(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except EngineDied:
            os._exit(1)


class Fleet(Generic[ShardT, ResultT]):
    """Running engines of one configuration. Can be handed to another process, such as a training worker."""

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    def map(self, stage: Stage, shards: Iterable[ShardT], in_flight: int = 2) -> Iterator[tuple[ShardT, ResultT]]:
        """Runs `stage` on every shard, at most `in_flight` per engine, and yields (shard, result) as they finish."""
        waiting = deque((shard, 1) for shard in shards)
        load = [0] * len(self.actors)
        running: dict[Any, tuple[int, ShardT, int]] = {}
        while waiting or running:
            while waiting and min(load) < in_flight:
                shard, attempt = waiting.popleft()
                slot = load.index(min(load))
                running[self.actors[slot].run.remote(stage, shard)] = (slot, shard, attempt)
                load[slot] += 1
            done, _ = ray.wait(list(running), num_returns=1)
            slot, shard, attempt = running.pop(done[0])
            load[slot] -= 1
            try:
                result = ray.get(done[0])
            except RayActorError as error:
                if attempt == MAX_ATTEMPTS:
                    raise SpecmillError(f"a shard killed its engine {MAX_ATTEMPTS} times: {_last_line(error)}") from error
                waiting.append((shard, attempt + 1))
                continue
            yield shard, result

    def load_weights(self, path: str, version: int) -> None:
        """Every engine takes the weights of a safetensors file or checkpoint directory as policy version `version`."""
        ray.get([actor.load_weights.remote(path, version) for actor in self.actors])


class Pool:
    """Engines that start when they are first needed and end with the `with` block."""

    def __init__(self, config: EngineConfig, receives_weights: bool = False, first_core: int = 0) -> None:
        self.config, self.receives_weights, self.first_core = config, receives_weights, first_core
        self.model = resolve_model(config.model, config.revision)
        self._fleet: Fleet | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def started(self) -> bool:
        """Whether the engines run."""
        return self._fleet is not None

    def fleet(self) -> Fleet:
        """The running engines, started if need be. Raises UserError when they cannot fit in memory."""
        if self._fleet is None:
            self.check_memory()
            actors = [self._actor(number) for number in range(self.config.engines)]
            try:
                ray.get([actor.ready.remote() for actor in actors])
            except RayActorError as error:
                raise SpecmillError(f"the engine of {self.config.model} did not start: {_last_line(error)}") from error
            self._fleet = Fleet(actors)
        return self._fleet

    def map(self, stage: Stage, shards: Sequence[ShardT], requests: int) -> Iterator[tuple[ShardT, Any]]:
        """Like `Fleet.map`, with as many shards in flight as fill the engines' batches; `requests` is that of all shards together.

        With no shards, no engine is started.
        """
        if shards:
            in_flight = 1 + math.ceil(self.config.max_num_seqs * len(shards) / max(1, requests))
            yield from self.fleet().map(stage, shards, in_flight)

    def check_memory(self) -> None:
        """Raises UserError when CPU engines do not fit in this machine's free memory; of a cluster's nodes it knows nothing."""
        if self.config.gpus or "RAY_ADDRESS" in os.environ:
            return
        weights = sum(file.stat().st_size for file in Path(self.model.path).glob("*.safetensors")) / 2**30
        scale = 2 if self.config.dtype == "float32" else 1
        need = self.config.engines * (scale * weights + self.config.kv_cache_gib + ENGINE_OVERHEAD_GIB)
        free = psutil.virtual_memory().available / 2**30
        if need > free:
            raise UserError(
                f"{self.config.engines} engines of {self.config.model} need about {need:.1f} GiB, {free:.1f} GiB are free. "
                "Lower `engines` or `kv_cache_gib`, or take a smaller model."
            )

    def close(self) -> None:
        """Ends the engines and frees their memory."""
        if self._fleet is None:
            return
        for actor in self._fleet.actors:
            # It may be dead already, and one that does not answer is killed in the next line.
            with suppress(RayActorError, ray.exceptions.GetTimeoutError):
                ray.get(actor.stop.remote(), timeout=20)
            ray.kill(actor)
        self._fleet = None

    def _actor(self, number: int) -> Any:
        core = (self.first_core + number) % (os.cpu_count() or 1) if self.config.gpus == 0 else None
        options = {
            "num_cpus": 1,
            "num_gpus": self.config.gpus,
            "max_restarts": MAX_ATTEMPTS,
            "max_concurrency": 64,
            "runtime_env": {"env_vars": environment(self.config, core)},
        }
        return ray.remote(EngineActor).options(**options).remote(self.model, self.config, core, self.receives_weights)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
