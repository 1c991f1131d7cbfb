"""The pool: engines that start when they are first needed, checked beforehand against memory and GPUs, and end with the run."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.actor import EngineActor
from cluster.engine import EngineConfig
from cluster.errors import SpecmillError, UserError
from cluster.fake_engine import fake_model
from cluster.fleet import Done, Fleet, ResultT, ShardT, Stage, answer
from cluster.memory import engines_gib, require_free
from cluster.models import Model, resolve_model
from cluster.openai_engine import endpoint_key, endpoint_model
from cluster.vllm_engine import environment

RELEASE_SECONDS = 30
"""How long Ray may take to notice that engines which have ended left room for others."""


class Pool:
    """Engines that start when they are first needed and end with the `with` block. They serve `model`, or else what `config` names."""

    def __init__(self, config: EngineConfig, receives_weights: bool = False, model: Model | None = None) -> None:
        self.config, self.receives_weights, self._served = config, receives_weights, model
        self._fleet: Fleet | None = None
        self._starting: list[Any] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def model(self) -> Model:
        """The model that is served. Raises UserError when there is no such model."""
        if self._served:
            return self._served
        if self.config.remote:
            return endpoint_model(self.config)
        return fake_model(self.config) if self.config.backend == "fake" else resolve_model(self.config.model, self.config.revision)

    @property
    def started(self) -> bool:
        """Whether the engines run."""
        return self._fleet is not None

    def fleet(self) -> Fleet:
        """The engines, started if need be: at least one of them runs, all of them if they receive weights.

        Those that take up to twice as long as the first are waited for, or it would take all of a small work; others join later.
        Raises UserError when they cannot fit in memory or on the cluster's machines, SpecmillError when they do not start.
        """
        if self._fleet is None:
            self.check_memory()
            self._check_room()
            actors, patience = [self._actor(number) for number in range(self.config.engines)], self.config.start_seconds
            self._fleet = Fleet(actors, self.config.max_num_seqs, patience)
            # A process that dies in its first start would die in the next one too.
            self._starting, began = [actor.ready.options(max_task_retries=0).remote() for actor in actors], time.monotonic()
            wanted = len(actors) if self.receives_weights else 1
            needed = ray.wait(self._starting, num_returns=wanted, timeout=patience)[0]
            if len(needed) < wanted:
                raise SpecmillError(f"the engines of {self.config.model} did not start within {patience:.0f} s: raise `start_seconds`.")
            started = ray.wait(self._starting, num_returns=len(actors), timeout=time.monotonic() - began)[0]
            for ready in {*needed, *started}:
                answer(ready, f"the engine of {self.config.model} did not start")
        return self._fleet

    def map(self, stage: Stage[ShardT, ResultT], shards: Sequence[ShardT]) -> Iterator[Done[ShardT, ResultT]]:
        """Like `Fleet.map`; with no shards, no engine is started."""
        if shards:
            yield from self.fleet().map(stage, shards)

    @property
    def memory_gib(self) -> float:
        """What these engines take of this machine's memory; see `cluster.memory`."""
        return engines_gib(self.config, self.model)

    def check_memory(self) -> None:
        """Raises UserError when CPU engines do not fit in this machine's free memory; others that are ending get seconds to free it."""
        need = self.memory_gib
        require_free(
            need,
            lambda free: (
                f"{self.config.engines} engines of {self.config.model} need about {need:.1f} GiB, {free:.1f} GiB are free. "
                "Lower `engines` or `kv_cache_gib`, or take a smaller model."
            ),
        )

    def check_key(self) -> None:
        """Raises UserError when the key of an endpoint is not in this process's environment; of a cluster's nodes it knows nothing."""
        if self.config.remote and "RAY_ADDRESS" not in os.environ:
            endpoint_key(self.config.remote)

    def _check_room(self) -> None:
        """Raises UserError when the Ray cluster has no room for these engines: Ray would wait for it for ever.

        One is enough to begin with, the others join when there is room for them; weights are pushed to all of them.
        """
        each, engines = self._resources(), self.config.engines if self.receives_weights else 1
        deadline = time.monotonic() + RELEASE_SECONDS
        while True:
            total, free = ray.cluster_resources(), ray.available_resources()
            largest = {name: max(node["Resources"].get(name, 0.0) for node in ray.nodes() if node["Alive"]) for name in each}
            missing = [name for name, need in each.items() if engines * need > free.get(name, 0.0) or need > largest[name]]
            if not missing:
                return
            name, need = missing[0], each[missing[0]]
            if engines * need > total.get(name, 0.0) or need > largest[name] or time.monotonic() > deadline:
                raise UserError(
                    f"{engines} of {self.config.engines} engines of {self.config.model} need {engines * need:g} {name}s, "
                    f"{need:g} of them on one machine; the Ray cluster has {total.get(name, 0.0):g}, {free.get(name, 0.0):g} of them free, "
                    f"and no machine more than {largest[name]:g}. Lower `engines` or `tensor_parallel`, let generator and judge take turns "
                    "(`judge.overlap: false`), or let engines share GPUs: `gpus` below 1 and a smaller `gpu_memory_utilization`."
                )
            time.sleep(0.2)

    def _resources(self) -> dict[str, float]:
        """What of a machine Ray sets aside for one engine."""
        if self.config.remote:
            return {"CPU": 0}
        return {"CPU": self.config.tensor_parallel, "GPU": self.config.tensor_parallel * self.config.gpus}

    def close(self) -> None:
        """Ends the engines and frees their memory."""
        if self._fleet is None:
            return
        started = set(ray.wait(self._starting, num_returns=len(self._starting), timeout=0)[0])
        ending = [
            (actor, actor.stop.remote() if ready in started else None)
            for actor, ready in zip(self._fleet.actors, self._starting, strict=True)
        ]
        for actor, stopped in ending:
            # It may be dead already, and one that does not answer is killed in the next line.
            with suppress(RayActorError, ray.exceptions.GetTimeoutError):
                ray.get(stopped, timeout=20) if stopped else None
            ray.kill(actor)
        self._fleet = None

    def _actor(self, number: int) -> Any:
        options = {
            "num_cpus": self._resources()["CPU"],
            "num_gpus": self._resources().get("GPU", 0),
            "max_restarts": -1,
            "max_concurrency": 64,
            "runtime_env": {"env_vars": environment(self.config) if self.config.backend == "vllm" else {}},
        }
        return ray.remote(EngineActor).options(**options).remote(self.model, self.config, number, self.receives_weights)
