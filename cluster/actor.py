"""The Ray actor in which an engine runs."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray

from cluster.cores import claim_cores
from cluster.engine import EngineConfig, EngineDied
from cluster.fake_engine import FakeEngine
from cluster.models import Model
from cluster.openai_engine import OpenAIEngine
from cluster.serving import Metered, Served, Usage
from cluster.vllm_engine import VllmEngine


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
            mine = claim_cores(config.tensor_parallel, number * config.tensor_parallel)
            os.sched_setaffinity(0, mine)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, mine))
        self._engine = _engine(model, config, receives_weights)
        self._served = Served(self._engine, config)
        self._turn = asyncio.Lock()
        self._ready = False
        self._weights: Weights | None = None

    @ray.method(max_task_retries=-1)  # it waits while Ray starts the process again
    async def ready(self, weights: Weights | None = None) -> str:
        """Returns the id of its node when the engine answers with these weights. A restarted actor takes them anew; it would answer as the
        base model."""
        async with self._turn:
            if not self._ready:
                await _alive(self._engine.start())
                self._ready = True
            if weights and weights != self._weights:
                await _alive(self._engine.load_weights(weights.path, weights.version))
                self._weights = weights
        return ray.get_runtime_context().get_node_id()

    async def run(self, run: Callable[[Any, Any], Awaitable[Any]], shard: Any, weights: Weights | None = None) -> tuple[Any, Usage]:
        """Runs a stage on a shard; returns its result and what it cost."""
        await self.ready(weights)
        engine = Metered(self._served)
        result = await _alive(run(engine, shard))
        engine.usage.busy_seconds = self._served.busy_seconds()
        return result, engine.usage

    async def stop(self) -> None:
        """Ends the engine."""
        await self._engine.stop()


def _engine(model: Model, config: EngineConfig, receives_weights: bool) -> Any:
    if config.remote:
        return OpenAIEngine(config, config.remote)
    return FakeEngine(model, config) if config.backend == "fake" else VllmEngine(model, config, receives_weights)


async def _alive(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except EngineDied:
        os._exit(1)
