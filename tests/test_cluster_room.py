"""Room on the cluster: engines that join when it grows, engines that spread over several cores, and what both give back."""

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from ray import cloudpickle

from cluster.chat import Turn, chat_of
from cluster.engine import Engine, EngineConfig, FakeConfig, Sampling
from cluster.errors import UserError
from cluster.fleet import Stage
from cluster.pool import Pool
from flows.checks import check_gpus
from flows.config import RunConfig
from flows.workspace import Workspace

pytestmark = pytest.mark.slow
TOKENS = 24
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # engine actors do not import the tests


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A Ray cluster with one core to give away; more machines may be added."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    if before is None:
        del os.environ["RAY_ADDRESS"]
    else:
        os.environ["RAY_ADDRESS"] = before


def free_cores(ray: Any, cores: float) -> float:
    """The cores that Ray has to give away, as soon as they are as many as expected, or after ten seconds."""
    deadline = time.monotonic() + 10
    while (free := ray.available_resources().get("CPU", 0.0)) != cores and time.monotonic() < deadline:
        time.sleep(0.1)
    return free


async def process_id(engine: Engine, shard: int) -> int:
    await asyncio.sleep(0.1)
    return os.getpid()


async def drawn(engine: Engine, shard: str) -> list[int]:
    """Token ids that the engine draws after a text, each the likeliest one."""
    return (await engine.complete([Turn(role="user", content=shard)], Sampling(0.0, TOKENS, seed=3))).token_ids


PIDS = Stage(run=process_id, size=lambda shard: 1)
DRAWN = Stage(run=drawn, size=lambda shard: 1)


def test_an_engine_without_room_joins_when_a_machine_does_and_all_room_is_given_back(machines: Any) -> None:
    import ray

    served = EngineConfig(backend="fake", engines=2, max_num_seqs=2, fake=FakeConfig())
    seen: list[int] = []
    with Pool(served) as pool:
        for number, done in enumerate(pool.map(PIDS, list(range(200)))):
            seen.append(done.result)
            if number == 5:
                assert len(set(seen)) == 1, "there is room for one"
                added = machines.add_node(num_cpus=1)
    assert len(seen) == 200 and len(set(seen)) == 2
    assert free_cores(ray, 2) == 2
    machines.remove_node(added)
    assert free_cores(ray, 1) == 1


def test_a_machine_that_leaves_takes_its_engine_along_and_the_rest_completes(machines: Any) -> None:
    added, seen = machines.add_node(num_cpus=1), list[int]()
    with Pool(EngineConfig(backend="fake", engines=2, max_num_seqs=2)) as pool:
        for number, done in enumerate(pool.map(PIDS, list(range(150)))):
            seen.append(done.result)
            if added and number > 20 and len(set(seen)) == 2:
                machines.remove_node(added)
                added = None
    assert added is None and len(seen) == 150 and len(set(seen[-20:])) == 1, "the one that is left does the rest"


def test_an_engine_that_no_machine_has_room_for_is_told_and_not_waited_for(machines: Any) -> None:
    wide, many = EngineConfig(backend="fake", tensor_parallel=2), EngineConfig(backend="fake", engines=2)
    with Pool(wide) as pool, pytest.raises(UserError, match=r"2 of them on one machine.* Lower .*`tensor_parallel`"):
        pool.fleet()
    with Pool(many, receives_weights=True) as pool, pytest.raises(UserError, match=r"2 of 2 engines .* need 2 CPUs"):
        pool.fleet()


def test_engines_give_their_gpus_back_when_training_needs_them(machines: Any) -> None:
    import ray

    added = machines.add_node(num_cpus=3, num_gpus=2)
    assert free_cores(ray, 4) == 4
    pools = [Pool(EngineConfig(backend="fake", gpus=gpus, fake=FakeConfig(seed=number))) for number, gpus in enumerate((1, 1, 0))]
    for pool in pools:
        pool.fleet()
    run = Workspace(None, None, None, None, *pools)  # type: ignore[arg-type]
    run.make_room(run.judge, gpus=True)
    assert [pool.started for pool in pools] == [False, True, True]
    run.make_room(gpus=True)
    assert [pool.started for pool in pools] == [False, False, True]
    pools[2].close()
    assert free_cores(ray, 4) == 4 and ray.available_resources()["GPU"] == 2
    machines.remove_node(added)
    assert free_cores(ray, 1) == 1


def test_engines_end_where_ranks_have_no_room_beside_them_but_for_those_that_training_needs(
    machines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = machines.add_node(num_cpus=3)
    pools = [Pool(EngineConfig(backend="fake", fake=FakeConfig(seed=number))) for number in range(3)]
    run = Workspace(None, None, None, None, *pools)  # type: ignore[arg-type]
    monkeypatch.setattr(Pool, "memory_gib", 2.0)
    monkeypatch.setattr("cluster.memory.free_gib", lambda: 6.0)
    monkeypatch.setattr("flows.workspace.free_gib", lambda: 3.0)
    run.generator.fleet()
    run.make_room(run.judge, gib=1.0)
    assert run.generator.started, "there is room for both"
    run.make_room(run.judge, gib=1.5)
    assert not run.generator.started
    run.judge.fleet()
    run.policy_engine.fleet()
    run.make_room(run.judge, gib=3.5)
    assert [pool.started for pool in pools] == [False, True, False], "what is there takes no more"
    run.judge.close()
    machines.remove_node(added)


def test_too_few_gpus_for_ranks_and_the_engines_beside_them_are_told_before_anything_is_made(machines: Any) -> None:
    added = machines.add_node(num_cpus=1, num_gpus=2)
    engine = EngineConfig(backend="fake", gpus=1)
    judge, policy = Pool(engine), Pool(engine)
    config = RunConfig.model_validate({"train": ["sft", "rl"], "sft": {"ranks": 2, "gpus_per_rank": 1}, "rl": {"gpus_per_rank": 1}})
    run = Workspace(config, None, None, None, judge, judge, policy)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"rl: needs 3 GPUs .*1 for rl.ranks, 1 for evaluate.engine, 1 for judge.engine\), .* has 2\."):
        check_gpus(run)
    halves = Pool(engine.model_copy(update={"gpus": 0.5}))
    check_gpus(Workspace(config, None, None, None, halves, halves, halves))  # type: ignore[arg-type]
    machines.remove_node(added)


@pytest.mark.soak
def test_an_engine_over_two_cores_draws_what_transformers_does_and_gives_both_back(machines: Any, tiny_model: str) -> None:
    import ray

    added = machines.add_node(num_cpus=2)
    assert free_cores(ray, 3) == 3
    config = EngineConfig(model=tiny_model, dtype="float32", max_model_len=512, max_num_seqs=4, kv_cache_gib=0.05, tensor_parallel=2)
    texts = ["What is a noun?", "Name three rivers."]
    with Pool(config) as pool:
        found = {done.shard: done.result for done in pool.map(DRAWN, texts)}
        assert ray.available_resources().get("CPU", 0.0) == 1
        (engine,) = {done.result for done in pool.map(PIDS, [0])}
        processes = [psutil.Process(engine), *psutil.Process(engine).children(recursive=True)]
    assert free_cores(ray, 3) == 3
    assert len(processes) > 2 and psutil.wait_procs(processes, timeout=10)[1] == [], "its workers are processes, which end with it"
    assert found == {text: greedy(tiny_model, text) for text in texts}
    machines.remove_node(added)


def greedy(path: str, text: str) -> list[int]:
    """Token ids that transformers draws after a text."""
    import torch
    from transformers import AutoModelForCausalLM

    prompt = torch.tensor([chat_of(path).prompt([Turn(role="user", content=text)])])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    drawn = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    return [int(token) for token in drawn[0, prompt.shape[1] :]]
