"""Engine actors and the pool that feeds them.

A pool starts its actors when they are first needed. Its fleet keeps several shards in flight per actor so that the engines never drain,
and hands a finished shard's result to the caller. Ray restarts an actor that died and runs its shards again. The pool knows stages
(async functions from `tasks`) and nothing else.
"""

import asyncio
import math
import os
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.engine import EngineConfig, EngineDied
from cluster.errors import SpecmillError, UserError
from cluster.models import Model, resolve_model
from cluster.vllm_engine import VllmEngine, environment

ShardT = TypeVar("ShardT")
ResultT = TypeVar("ResultT")
Stage = Callable[[Any, ShardT], Awaitable[ResultT]]

MAX_ATTEMPTS = 3
"""A shard whose actor dies this often ends the run: something in it kills engines."""
ENGINE_OVERHEAD_GIB = 1.5
"""Memory of a CPU engine beside weights and KV cache: two Python processes with torch (measured: 1.3 GiB)."""


def _no_prefix(shard: Any) -> str:
    return ""


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
        if config.gpus == 0:
            cores = sorted(os.sched_getaffinity(0))
            core = cores[number % len(cores)]
            os.sched_setaffinity(0, {core})
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
        self._engine = VllmEngine(model, config, receives_weights)
        self._turn = asyncio.Lock()
        self._ready = False
        self._weights: Weights | None = None

    async def ready(self, weights: Weights | None = None) -> bool:
        """Returns when the engine answers with these weights. A restarted actor takes them anew; it would answer as the base model."""
        async with self._turn:
            if not self._ready:
                await self._engine.start()
                self._ready = True
            if weights and weights != self._weights:
                await self._alive(self._engine.load_weights(weights.path, weights.version))
                self._weights = weights
        return True

    async def run(self, stage: Stage, shard: Any, weights: Weights | None = None) -> Any:
        """Runs a stage on a shard."""
        await self.ready(weights)
        return await self._alive(stage(self._engine, shard))

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
        self._weights: Weights | None = None
        self._homes: dict[str, int] = {}

    def map(
        self, stage: Stage, shards: Iterable[ShardT], in_flight: int = 2, prefix: Callable[[ShardT], str] = _no_prefix
    ) -> Iterator[tuple[ShardT, ResultT]]:
        """Runs `stage` on every shard, at most `in_flight` per engine, and yields (shard, result) as they finish.

        `prefix` names what a shard's requests begin with. Shards of one prefix go to one engine, which has it in its cache, from one
        call to the next; an engine that would have nothing to do takes shards of other homes.
        """
        waiting: dict[str, deque[ShardT]] = {}
        for shard in shards:
            waiting.setdefault(prefix(shard), deque()).append(shard)
        load = [0] * len(self.actors)
        running: dict[Any, tuple[int, ShardT]] = {}
        while waiting or running:
            while waiting and min(load) < in_flight:
                slot = load.index(min(load))
                shard = self._take(waiting, slot)
                running[self.actors[slot].run.remote(stage, shard, self._weights)] = (slot, shard)
                load[slot] += 1
            done, _ = ray.wait(list(running), num_returns=1)
            slot, shard = running.pop(done[0])
            load[slot] -= 1
            yield shard, _result(done[0], f"a shard's engine died {MAX_ATTEMPTS} times")

    def _take(self, waiting: dict[str, deque[ShardT]], slot: int) -> ShardT:
        """The next shard for an engine: of a prefix that it is home to, else of one without a home, else of the longest queue."""
        at_home = (name for name in waiting if self._homes.get(name) == slot)
        homeless = (name for name in waiting if name not in self._homes)
        name = next(at_home, None) or next(homeless, None) or max(waiting, key=lambda name: len(waiting[name]))
        self._homes.setdefault(name, slot)
        shard = waiting[name].popleft()
        if not waiting[name]:
            del waiting[name]
        return shard

    def load_weights(self, path: str, version: int) -> None:
        """Every engine takes the weights of a safetensors file or checkpoint directory as policy version `version`."""
        self._weights = Weights(path, version, uuid.uuid4().hex)
        for answer in [actor.ready.remote(self._weights) for actor in self.actors]:
            _result(answer, "an engine died while it took weights")


class Pool:
    """Engines that start when they are first needed and end with the `with` block."""

    def __init__(self, config: EngineConfig, receives_weights: bool = False) -> None:
        self.config, self.receives_weights = config, receives_weights
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
        """The running engines, started if need be. Raises UserError when they cannot fit in memory or on the cluster's GPUs."""
        if self._fleet is None:
            self.check_memory()
            self._check_gpus()
            fleet: Fleet = Fleet([self._actor(number) for number in range(self.config.engines)])
            for answer in [actor.ready.remote() for actor in fleet.actors]:
                _result(answer, f"the engine of {self.config.model} did not start")
            self._fleet = fleet
        return self._fleet

    def map(self, stage: Stage, shards: Sequence[ShardT], requests: int, prefix: Callable[[ShardT], str]) -> Iterator[tuple[ShardT, Any]]:
        """Like `Fleet.map`, with as many shards in flight as fill the engines' batches; `requests` is that of all shards together.

        With no shards, no engine is started.
        """
        if shards:
            in_flight = 1 + math.ceil(self.config.max_num_seqs * len(shards) / max(1, requests))
            yield from self.fleet().map(stage, shards, in_flight, prefix)

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

    def _check_gpus(self) -> None:
        """Without this, Ray would wait for the GPUs for ever."""
        need = self.config.engines * self.config.gpus
        total, free = (resources().get("GPU", 0.0) for resources in (ray.cluster_resources, ray.available_resources))
        if need > free:
            raise UserError(
                f"{self.config.engines} engines of {self.config.model} need {need:g} GPUs; the Ray cluster has {total:g}, {free:g} of them "
                "free. Lower `engines`, or let engines share GPUs: `gpus` below 1 and a smaller `gpu_memory_utilization`."
            )

    def close(self) -> None:
        """Ends the engines and frees their memory."""
        if self._fleet is None:
            return
        for actor, stopped in [(actor, actor.stop.remote()) for actor in self._fleet.actors]:
            # It may be dead already, and one that does not answer is killed in the next line.
            with suppress(RayActorError, ray.exceptions.GetTimeoutError):
                ray.get(stopped, timeout=20)
            ray.kill(actor)
        self._fleet = None

    def _actor(self, number: int) -> Any:
        options = {
            "num_cpus": 1,
            "num_gpus": self.config.gpus,
            "max_restarts": -1,
            "max_task_retries": MAX_ATTEMPTS - 1,
            "max_concurrency": 64,
            "runtime_env": {"env_vars": environment(self.config)},
        }
        return ray.remote(EngineActor).options(**options).remote(self.model, self.config, number, self.receives_weights)


def _result(answer: Any, died: str) -> Any:
    """What an actor answers. Raises its own UserError or SpecmillError as it is, and SpecmillError for every other failure."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        if isinstance(error.cause, SpecmillError):
            raise error.cause from None
        raise SpecmillError(f"an engine failed: {_last_line(error)}") from error
    except RayActorError as error:
        raise SpecmillError(f"{died}: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
