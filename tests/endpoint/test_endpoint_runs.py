"""Run files that name an endpoint: what has to be stated, what may leave this machine, and what is part of a result's identity."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from endpoint_runs import NATIVE, OUTSIDE, outside, run_file
from provider import VARIABLE, answering, engine, said
from pydantic import ValidationError

from cluster.engine import EndpointConfig, EngineConfig
from cluster.errors import UserError
from cluster.serving import Metered, Served
from flows.config import load_run
from flows.opening import prepare
from flows.plan import describe_plan, plan
from tasks.complete import CompletionShard, complete_shard
from tasks.wanted import Wanted


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "m", "revision": "1"}, "needs an `endpoint`"),
        ({"model": "m", "endpoint": OUTSIDE}, "state the `revision`"),
        ({"model": "m", "revision": "1", "endpoint": {"url": "api.example.com"}}, "begins with http"),
        ({"model": "m", "revision": "1", "endpoint": OUTSIDE | {"key_variable": "sk-4711"}}, "key_variable"),
        ({"model": "m", "revision": "1", "endpoint": OUTSIDE | {"key": "x"}}, "key"),
    ],
    ids=["no endpoint", "no revision", "no address", "a key for its variable", "a key"],
)
def test_an_endpoint_is_stated_in_full(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        EngineConfig.model_validate({"backend": "openai", **fields})


@pytest.mark.parametrize(
    ("url", "host", "here"),
    [
        ("http://localhost:8000/v1", "localhost", True),
        ("http://127.8.0.1/v1", "127.8.0.1", True),
        ("http://[::1]:8000/v1", "::1", True),
        ("https://API.Example.com/v1", "api.example.com", False),
        ("http://127.0.0.1.example.com/v1", "127.0.0.1.example.com", False),
        ("http://localhost@example.com/v1", "example.com", False),
        ("http://10.0.0.1/v1", "10.0.0.1", False),
    ],
)
def test_what_is_on_this_machine(url: str, host: str, here: bool) -> None:
    endpoint = EndpointConfig(url=url)
    assert (endpoint.host, endpoint.loopback) == (host, here)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sent_to": {}}, ["judge.engine.endpoint", "self-harm", "api.example.com", "sent_to"]),
        ({"sent_to": {"self-harm": ["other.example.com"]}}, ["judge.engine.endpoint", "self-harm", "api.example.com"]),
        ({"sent_to": {"violence": ["api.example.com"]}}, ["judge.engine.endpoint", "self-harm"]),
        ({"sent_to": {"cooking": ["api.example.com"]}}, ["sent_to", "cooking", "no category"]),
        ({"generate": NATIVE, "sent_to": {}}, ["generate.engine.endpoint", "self-harm"]),
        ({"generate": NATIVE | {"thought_format": "guided"}}, ["generate.thought_format", "grammar", "native"]),
        ({"evaluate": {"engine": outside()}}, ["evaluate.engine", "takes no weights"]),
    ],
    ids=["no host", "another host", "another category", "no category", "generator", "grammar", "weights"],
)
def test_what_an_endpoint_may_not_be_sent_or_cannot_do_is_told_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        prepare(run_file(tmp_path, **changes), trains=False)
    assert all(word in str(raised.value) for word in words), raised.value


def test_the_plan_tells_what_would_leave(tmp_path: Path) -> None:
    told = describe_plan(*plan(prepare(run_file(tmp_path), trains=False)))
    assert "judge: 16 rows would leave this machine for api.example.com: 16 self-harm" in told and "complete: 16 rows would" not in told
    assert "train: answers to 4 prompts of the rl split would leave this machine for api.example.com: 4 self-harm" in told
    assert "evaluate: answers to 8 prompts of the eval split would leave" in told
    told = describe_plan(*plan(prepare(run_file(tmp_path, generate=NATIVE), trains=False)))
    assert "complete: 16 rows would leave this machine for api.example.com: 16 self-harm" in told
    told = describe_plan(*plan(prepare(run_file(tmp_path, judge={"engine": outside(url="http://127.0.0.1/v1")}, sent_to={}), trains=False)))
    assert "nothing would leave this machine" in told


def test_an_address_is_no_part_of_what_is_computed_but_model_revision_and_schema_are(tmp_path: Path) -> None:
    def identity(**changes: Any) -> tuple[str, list[str], str]:
        endpoint = {name: changes.pop(name) for name in list(changes) if name in EndpointConfig.model_fields}
        served = outside(**endpoint) | changes
        sent_to = {"self-harm": ["api.example.com", "other.example.com"]}
        run = prepare(run_file(tmp_path, generate=NATIVE | {"engine": served}, judge={"engine": served}, sent_to=sent_to), trains=False)
        return run.identity, [request.prefix for request in run.requests.values()], run.judge_hash("full")

    first = identity()
    assert identity(url="https://other.example.com/v2", key_variable="OTHER", prompt_price=3, max_num_seqs=7) == first
    for changed in (identity(model="bigger"), identity(revision="2026-12-01")):
        assert all(now != before for now, before in zip(changed, first, strict=True))
    free = identity(structured="none")
    assert free[1] == first[1] and free[2] != first[2]


def test_an_endpoint_that_gives_no_thoughts_ends_the_run_before_a_row_is_kept(tmp_path: Path) -> None:
    with answering(said()) as proxy:
        served = outside(url=f"{proxy.url}/v1")
        run = prepare(run_file(tmp_path, generate=NATIVE | {"engine": served}, judge={"engine": served}, sent_to={}), trains=False)
        part, pairs = next(Wanted.of(run.prompts, "sft", run.requests, n=1, k=1).missing_completions())
        asked, generate = run.requests[part.category], run.config.generate
        shard = CompletionShard(run.store.root, run.generator.model, generate, asked, run.gates, part.path, pairs)

        async def main() -> None:
            client = engine(run.generator.config)
            await client.start()
            try:
                await complete_shard(Metered(Served(client, client.config)), shard)
            finally:
                await client.stop()

        with pytest.raises(UserError, match="not one of 16 answers"):
            asyncio.run(main())
    assert not (Path(run.store.root) / "completions").exists()


def test_the_trained_model_is_not_the_endpoints(tmp_path: Path) -> None:
    run = prepare(run_file(tmp_path, generate=NATIVE), trains=False)
    assert run.generator.model.id == "big" and not run.generator.model.here
    assert run.base_model.here and load_run(run_file(tmp_path, generate=NATIVE)).evaluate.engine.backend == "vllm"


def test_a_missing_key_is_told_by_the_name_of_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = prepare(run_file(tmp_path), trains=False)
    with pytest.raises(UserError, match=VARIABLE):
        run.check_keys()
