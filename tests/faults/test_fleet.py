"""Engines that drop requests, hang, die and are killed: what is in flight is run again within bounds, and the rest completes.

The engines are fake, so that faults come when they are wanted; actors, processes and restarts are Ray's own.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pytest
from ray import cloudpickle

from cluster.actor import EngineActor
from cluster.chat import Turn
from cluster.engine import EndpointConfig, Engine, EngineConfig, FakeConfig, Sampling
from cluster.errors import SpecmillError, UserError
from cluster.fleet import Fleet, Stage
from cluster.pool import Pool
from cluster.serving import NotAnswered

pytestmark = pytest.mark.slow
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # engine actors do not import the tests

POISON, GREEDY = "xyzzy", "a greedy text"


@dataclass(frozen=True)
class Texts:
    """A shard: texts to send to the engine, each a conversation of one turn."""

    texts: tuple[str, ...]


async def echo(engine: Engine, shard: Texts) -> list[tuple[str, str]]:
    """(text, what became of it)."""

    async def one(text: str) -> tuple[str, str]:
        try:
            drawn = await engine.complete([Turn(role="user", content=text)], Sampling(1.0, 64, seed=7))
        except NotAnswered as error:
            return text, f"given up: {error}"
        return text, drawn.text

    return list(await asyncio.gather(*map(one, shard.texts)))


async def greedy_echo(engine: Engine, shard: Texts) -> list[tuple[str, str]]:
    """Like `echo`, but one text takes memory until somebody stops it."""
    taken: list[bytes] = []
    while GREEDY in shard.texts:
        taken.append(os.urandom(2**26))
        await asyncio.sleep(0.01)
    return await echo(engine, shard)


async def process_id(engine: Engine, shard: None) -> int:
    return os.getpid()


def halves(shard: Texts) -> list[Texts]:
    half = len(shard.texts) // 2
    return [replace(shard, texts=shard.texts[:half]), replace(shard, texts=shard.texts[half:])] if half else [shard]


ECHO = Stage(
    run=echo,
    size=lambda shard: len(shard.texts),
    split=halves,
    give_up=lambda shard, reason: [(text, f"given up: {reason}") for text in shard.texts],
)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    from cluster.session import ray_session

    with ray_session():
        yield


def echoed(texts: list[str], engines: int = 2, stage: Stage = ECHO, shard: int = 8, **settings: Any) -> tuple[dict[str, str], Any]:
    """Sends texts to fake engines; returns what became of each, and the usage of all shards together."""
    fake = FakeConfig(**{name: value for name, value in settings.items() if name in FakeConfig.model_fields})
    others = {name: value for name, value in settings.items() if name not in FakeConfig.model_fields}
    with Pool(EngineConfig(backend="fake", fake=fake, engines=engines, max_num_seqs=16, **others)) as pool:
        shards = [Texts(tuple(texts[start : start + shard])) for start in range(0, len(texts), shard)]
        finished = list(pool.map(stage, shards))
    rows = [row for done in finished for row in done.result]
    assert sorted(text for text, _ in rows) == sorted(texts), "every text once"
    return dict(rows), sum((done.usage for done in finished[1:]), finished[0].usage)


TEXTS = [f"text number {number}" for number in range(120)]


class Counted:
    """An actor; every call of it is noted by name."""

    def __init__(self, actor: Any, calls: list[str]) -> None:
        self.actor, self.calls = actor, calls

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self.actor, name)


class Absent:
    """An actor whose engine never comes up."""

    async def ready(self, weights: Any) -> None:
        await asyncio.Event().wait()


def test_an_engine_is_asked_for_its_shards_and_once_whether_it_is_there(ray: None) -> None:
    calls: list[str] = []
    with Pool(EngineConfig(backend="fake", max_num_seqs=16)) as pool:
        fleet = Fleet([Counted(actor, calls) for actor in pool.fleet().actors], 16)
        assert len(list(fleet.map(ECHO, [Texts((text,)) for text in TEXTS]))) == len(TEXTS)
    assert sorted(calls) == ["ready"] + ["run"] * len(TEXTS)


def test_a_work_that_one_engine_could_take_is_shared_by_those_that_start_together(ray: None) -> None:
    with Pool(EngineConfig(backend="fake", engines=2, max_num_seqs=64)) as pool:
        processes = [done.result for done in pool.map(Stage(process_id, size=lambda _: 1), [None] * 8)]
    assert sorted(processes.count(process) for process in set(processes)) == [4, 4]


def test_an_engine_that_does_not_start_is_left_out_as_long_as_there_is_another(ray: None) -> None:
    from ray import remote

    endpoint = EndpointConfig(url="https://example.com/v1", key_variable="NOT_SET")
    closed = EngineConfig(backend="openai", model="big", revision="unversioned", endpoint=endpoint)
    with Pool(EngineConfig(backend="fake", max_num_seqs=16)) as pool:
        without_key = remote(EngineActor).options(num_cpus=0, max_restarts=-1).remote(pool.model, closed, 1, False)
        done = list(Fleet([*pool.fleet().actors, without_key], 16).map(ECHO, [Texts((text,)) for text in TEXTS]))
        assert len(done) == len(TEXTS)
        with pytest.raises(UserError, match="NOT_SET"):
            list(Fleet([without_key], 16).map(ECHO, [Texts(("text",))]))


def test_an_engine_that_dies_while_it_starts_ends_the_run(ray: None) -> None:
    with pytest.raises(SpecmillError, match="did not start"):
        echoed(TEXTS, die_at=0)


def test_a_fleet_without_an_engine_is_waited_for_as_long_as_one_may_take_to_start(ray: None) -> None:
    from ray import remote

    lost = remote(Absent).remote()
    with pytest.raises(SpecmillError, match="no engine was there for 2 s"):
        list(Fleet([lost], 16, start_seconds=2).map(ECHO, [Texts(("text",))]))
    with pytest.raises(SpecmillError, match=r"1 of 1 engines took no weights within 2 s \(`start_seconds`\)"):
        Fleet([lost], 16, start_seconds=2).load_weights("weights", 1)


@pytest.mark.soak
@pytest.mark.alone  # Ray watches the memory of the whole machine
def test_a_prompt_that_takes_all_memory_is_found_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.session import ray_session

    memory = psutil.virtual_memory()
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{memory.percent / 100 + 3 * 2**30 / memory.total:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    with ray_session():
        rows, _ = echoed(["a text", GREEDY, "another text"], engines=1, stage=replace(ECHO, run=greedy_echo), shard=3)
    assert [text for text, became in rows.items() if became.startswith("given up")] == [GREEDY]


def test_requests_that_are_not_answered_are_asked_again(ray: None) -> None:
    plain, _ = echoed(TEXTS)
    rows, usage = echoed(TEXTS, drop=0.2, error=0.1, attempts=20)
    assert rows == plain, "the answers are those of an engine without faults"
    assert usage.requests == len(TEXTS) and usage.retries > 10


def test_a_request_that_is_never_answered_is_given_up_and_the_rest_completes(ray: None) -> None:
    rows, _ = echoed(TEXTS, hang=0.02, request_seconds=0.5, attempts=1, latency_seconds=0.01)
    lost = [text for text, became in rows.items() if became.startswith("given up")]
    assert 0 < len(lost) < 12


def test_a_hanging_request_is_asked_again(ray: None) -> None:
    rows, usage = echoed(TEXTS, hang=0.02, request_seconds=0.5, latency_seconds=0.01)
    assert not any(became.startswith("given up") for became in rows.values()) and usage.retries > 0


def test_a_prompt_that_kills_engines_is_found_and_given_up(ray: None) -> None:
    texts = [*TEXTS[:50], f"a {POISON} text", *TEXTS[50:]]
    rows, _ = echoed(texts, die_on=POISON, latency_seconds=0.01)
    assert [text for text, became in rows.items() if became.startswith("given up")] == [f"a {POISON} text"]
    assert "killed its engine" in rows[f"a {POISON} text"]


def test_many_that_kill_the_only_engine_are_given_up_and_the_rest_completes(ray: None) -> None:
    """In between, the engine shows that it lives: so many deaths, one after the other, would end the run."""
    poisonous = [f"{POISON} {number}" for number in range(5)]
    rows, _ = echoed([*TEXTS[:40], *poisonous, *TEXTS[40:]], engines=1, die_on=POISON, latency_seconds=0.01)
    assert [text for text, became in rows.items() if became.startswith("given up")] == poisonous


def test_an_engine_that_always_dies_ends_the_run_and_costs_no_row(ray: None) -> None:
    given_up: list[str] = []
    stage = replace(ECHO, give_up=lambda shard, reason: given_up.extend(shard.texts) or [])
    with pytest.raises(SpecmillError, match="an engine died 13 times without finishing a shard"):
        echoed(TEXTS, engines=1, stage=stage, shard=1, die_on="text")
    assert not given_up


def test_an_engine_that_dies_now_and_then_loses_nothing(ray: None) -> None:
    rows, _ = echoed(TEXTS, die_at=40)
    assert not any(became.startswith("given up") for became in rows.values())


def test_an_engine_that_answers_nothing_is_started_again(ray: None) -> None:
    """All requests hang: the watchdog ends the engine; a stage that can give nothing up ends the run."""
    with pytest.raises(SpecmillError, match="killed its engine"):
        echoed(TEXTS[:2], engines=1, stage=replace(ECHO, split=None, give_up=None), hang=1.0, stuck_seconds=0.5)


def test_a_killed_actor_comes_back_and_nothing_is_lost(ray: None) -> None:
    config = EngineConfig(backend="fake", engines=2, max_num_seqs=4, fake=FakeConfig(latency_seconds=0.2))
    with Pool(config) as pool:
        pids = [done.result for done in pool.map(Stage(run=process_id, size=lambda shard: 1), [None, None])]
        shards = [Texts((text,)) for text in TEXTS[:40]]
        became: dict[str, str] = {}
        for number, done in enumerate(pool.map(ECHO, shards)):
            became |= dict(done.result)
            if number == 5:
                os.kill(pids[0], signal.SIGKILL)
    assert len(became) == 40 and not any(text.startswith("given up") for text in became.values())
