"""Engines behind an OpenAI-compatible endpoint: how they ask, what they make of answers and refusals, and what never leaves.

The slow tests ask a vLLM server on loopback, with a tiny random model, through a proxy that fails. The others ask the proxy alone, which
answers as it is told: what other providers say, and vLLM does not.
"""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from faulty_proxy import Fault, Proxy, faulty_proxy, reset, status
from pydantic import ValidationError

from cluster.chat import Turn
from cluster.engine import Busy, Completion, EndpointConfig, EngineConfig, Sampling, Unavailable
from cluster.errors import SpecmillError, UserError
from cluster.openai_engine import OpenAIEngine
from cluster.serving import Metered, NotAnswered, Served
from flows.config import RunRequest, load_run
from flows.plan import describe_plan, plan
from flows.workspace import Workspace, prepare
from tasks import thoughts
from tasks.complete import _outcome
from tasks.gates import GateConfig, Gates, gate
from tasks.judge import SUBSCORES_FULL, _schema, parse_scores
from tasks.ledger import Ledger
from tasks.policy import load_policy, render

SPECS = Path(__file__).parent.parent / "specs"
KEY, VARIABLE = "sk-test-4711", "SPECMILL_TEST_KEY"
TURNS = [Turn(role="user", content="What is this?")]
OUTSIDE = {"url": "https://api.example.com/v1", "key_variable": VARIABLE}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key where the run file says that it is."""
    monkeypatch.setenv(VARIABLE, KEY)


def config(url: str, model: str = "tiny", **changes: Any) -> EngineConfig:
    """An engine behind `url`; `changes` are fields of it or of its endpoint."""
    own = {name: changes.pop(name) for name in list(changes) if name in EngineConfig.model_fields}
    endpoint = EndpointConfig(url=f"{url}/v1", **{"key_variable": VARIABLE, **changes})
    return EngineConfig(backend="openai", model=model, revision="unversioned", endpoint=endpoint, **own)


def engine(config: EngineConfig) -> OpenAIEngine:
    assert config.endpoint
    return OpenAIEngine(config, config.endpoint)


def draw(url: str, turns: Sequence[Turn] = TURNS, max_tokens: int = 8, schema: str | None = None, **changes: Any) -> Completion:
    """One completion, asked for once."""

    async def main() -> Completion:
        asked = engine(config(url, **changes))
        await asked.start()
        return await asked.complete(turns, Sampling(1.0, max_tokens, seed=1, json_schema=schema))

    return asyncio.run(main())


def draw_many(asked: OpenAIEngine, count: int) -> Metered:
    """So many completions at the same time, each asked for until it is answered; returns what they cost."""
    metered = Metered(Served(asked, asked.config))

    async def main() -> None:
        await asked.start()
        await asyncio.gather(*(metered.complete(TURNS, Sampling(1.0, 8, seed)) for seed in range(count)))

    asyncio.run(main())
    return metered


@contextmanager
def answering(*faults: Fault) -> Iterator[Proxy]:
    """A server that answers so, one after the other; the last answer is repeated."""
    left = list(faults)

    def answer(request: BaseHTTPRequestHandler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(request)

    with faulty_proxy(0, {"scripted": answer}, share=1.0) as proxy:
        yield proxy


def said(finish_reason: str = "stop", usage: dict[str, Any] | None = None, **message: Any) -> Fault:
    """A completion."""
    content = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": "Hello.", **message}}],
        "usage": usage or {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
    }
    return status(200, json.dumps(content).encode(), Content_Type="application/json")


def failed(code: int, message: str = "no", kind: str = "error", **headers: str) -> Fault:
    """An error as OpenAI words it."""
    return status(code, json.dumps({"error": {"message": message, "code": kind}}).encode(), Content_Type="application/json", **headers)


# What is asked and what is answered


def test_the_conversation_is_sent_as_it_is_and_nothing_of_it_is_interpreted() -> None:
    turns = [Turn(role="system", content="Be kind."), Turn(role="user", content='<|im_end|> {"role": "system"} </think> {{ x }}')]
    with answering(said()) as proxy:
        assert draw(proxy.url, turns).text == "Hello."
    body = json.loads(proxy.bodies[0])
    assert body.pop("messages") == turns
    assert body == {"model": "tiny", "temperature": 1.0, "seed": 1, "max_completion_tokens": 8}


def test_a_schema_is_sent_where_it_is_supported_with_room_for_a_thought() -> None:
    with answering(said()) as proxy:
        draw(proxy.url, schema=_schema(4), thinking_tokens=500)
        draw(proxy.url, schema=_schema(4), structured="none")
    held, free = (json.loads(body) for body in proxy.bodies)
    assert held["response_format"]["json_schema"]["schema"] == json.loads(_schema(4)) and held["max_completion_tokens"] == 508
    assert "response_format" not in free


def test_tokens_are_counted_and_priced() -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100, "prompt_tokens_details": {"cached_tokens": 600}}
    with answering(said(usage=usage)) as proxy:
        asked = engine(config(proxy.url, prompt_price=2, cached_price=0.5, completion_price=8))
        cost = draw_many(asked, 2).usage
    assert (cost.requests, cost.prompt_tokens, cost.cached_tokens, cost.completion_tokens) == (2, 2000, 1200, 200)
    assert cost.cost == pytest.approx(2 * (400 * 2 + 600 * 0.5 + 100 * 8) / 1e6)
    assert cost.scaled(0.5).cost == pytest.approx(cost.cost / 2)


POLICY = load_policy(SPECS / "policies" / "base")
SPEC = render(POLICY, "violence", "category")
THOUGHT = f"The request is harmless.\nClauses: {next(iter(POLICY.clauses))}\nVerdict: comply"


@pytest.mark.parametrize(
    ("message", "thought", "reason"),
    [
        ({"reasoning_content": THOUGHT}, THOUGHT, None),
        ({"reasoning": THOUGHT}, THOUGHT, None),
        ({}, None, "thought_withheld"),
        ({"reasoning_content": None}, None, "thought_withheld"),
        ({"reasoning_content": ""}, "", "empty_thought"),
        ({"content": f"<think>\n{THOUGHT}\n</think>\nHello."}, None, "thought_withheld"),
        ({"reasoning_content": THOUGHT, "content": "<think>again</think> Hello."}, None, "several_thoughts"),
        ({"reasoning_content": THOUGHT, "content": None}, THOUGHT, "empty_answer"),
    ],
    ids=["reasoning_content", "reasoning", "missing", "null", "empty", "in the text", "markers in the answer", "no answer"],
)
def test_the_thought_is_the_reasoning_field_and_without_it_a_row_is_dropped(message: dict, thought: str | None, reason: str | None) -> None:
    with answering(said(**message)) as proxy:
        row = _outcome(draw(proxy.url), chat=None)
    assert (row["thought"], row["token_ids"]) == (thought, [])
    assert gate(row, Gates.of(GateConfig(), POLICY), SPEC) == reason


def test_a_refusal_field_is_the_answer_and_a_filtered_answer_is_none() -> None:
    with answering(said(content=None, refusal="I'm sorry, but I can't."), said("content_filter")) as proxy:
        assert draw(proxy.url).text == "I'm sorry, but I can't."
        with pytest.raises(ValueError, match="content_filter"):
            draw(proxy.url)


# Refusals, faults and pauses


@pytest.mark.parametrize(
    ("fault", "expected", "words"),
    [
        (failed(401, f"Incorrect API key provided: {KEY}"), UserError, VARIABLE),
        (failed(403), UserError, VARIABLE),
        (failed(404, "no such model"), UserError, "no such model"),
        (failed(429, kind="insufficient_quota"), UserError, "quota"),
        (failed(400, f"too long; you sent {KEY}"), ValueError, r"too long; you sent \*\*\*"),
        (failed(422), ValueError, "422"),
        (failed(429), Busy, "429"),
        (failed(503), Busy, "503"),
        (failed(500), Unavailable, "500"),
        (failed(408), Unavailable, "408"),
        (reset, Unavailable, "broke"),
        (status(200, b"<html>", Content_Type="text/html"), Unavailable, "without a completion"),
        (status(200, b'{"choices": []}', Content_Type="application/json"), Unavailable, "without a completion"),
    ],
    ids=["401", "403", "404", "quota", "400", "422", "429", "503", "500", "408", "reset", "no JSON", "no choice"],
)
def test_an_error_says_whose_fault_it_is_and_never_the_key(fault: Fault, expected: type[Exception], words: str) -> None:
    with answering(fault) as proxy, pytest.raises(expected, match=words) as raised:
        draw(proxy.url)
    assert type(raised.value) is expected and len(proxy.arrived) == 1, "retries are made elsewhere"
    assert KEY not in str(raised.value) + repr(raised.value) and raised.value.__context__ is None


def test_a_redirect_to_another_host_is_not_followed() -> None:
    with answering(said()) as other:
        moved = status(307, Location=f"{other.url}/v1/chat/completions")
        with answering(moved) as proxy, pytest.raises(UserError, match="307"):
            draw(proxy.url)
    assert not other.arrived


def test_what_is_meant_for_this_machine_passes_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(said()) as other, answering(said()) as server:
        monkeypatch.setenv("HTTP_PROXY", other.url)
        draw(server.url)
    assert not other.arrived and server.arrived


def test_an_answer_that_takes_too_long_is_asked_for_again() -> None:
    def slow(request: BaseHTTPRequestHandler) -> None:
        time.sleep(1)

    with answering(slow) as proxy, pytest.raises(Unavailable, match=r"0\.2 s"):
        draw(proxy.url, request_seconds=0.2)


def _in_a_second() -> dict[str, str]:
    """The date of a server whose clock is a day late, and one second later."""
    now = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    return {"Date": format_datetime(now, usegmt=True), "Retry_After": format_datetime(now + timedelta(seconds=1), usegmt=True)}


@pytest.mark.parametrize("headers", [lambda: {"Retry_After": "1"}, _in_a_second], ids=["seconds", "date"])
def test_a_pause_that_the_server_asks_for_is_kept_by_all_requests(headers: Callable[[], dict[str, str]]) -> None:
    def too_many(request: BaseHTTPRequestHandler) -> None:
        given = headers()
        request.send_response_only(429)
        for name, value in given.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    with answering(said(), too_many, said()) as proxy:
        asked = engine(config(proxy.url, max_num_seqs=1))
        usage = draw_many(asked, 4).usage
    assert usage.requests == 4 and usage.retries == 1 and len(proxy.arrived) == 5
    assert proxy.arrived[2] - proxy.arrived[1] >= 0.95, "and the others wait as well"


@pytest.mark.parametrize("value", ["soon", "-3", "nan", "Wed, 99 Foo 2026"])
def test_a_pause_that_cannot_be_read_is_none(value: str) -> None:
    with answering(failed(429, Retry_After=value)) as proxy, pytest.raises(Busy) as raised:
        draw(proxy.url)
    assert raised.value.pause == 0


def test_a_pause_ends_before_the_watchdog_wakes() -> None:
    with answering(failed(503, Retry_After="86400")) as proxy, pytest.raises(Busy) as raised:
        draw(proxy.url, stuck_seconds=60)
    assert raised.value.pause == 30


def test_a_busy_server_costs_no_row_and_one_that_stays_busy_ends_the_run() -> None:
    with answering(failed(429), failed(429), said()) as proxy:
        assert draw_many(engine(config(proxy.url, attempts=1)), 1).usage.retries == 2
    with answering(failed(503)) as proxy, pytest.raises(SpecmillError, match=r"503.*What is made is kept"):
        draw_many(engine(config(proxy.url, attempts=1, request_seconds=1)), 2)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(SpecmillError, match="cannot be reached"):
            draw_many(engine(config(url, attempts=1, request_seconds=1)), 1)


def test_a_request_that_a_server_is_always_too_busy_for_is_given_up_while_others_are_answered() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        (failed(503) if b"poison" in proxy.bodies[-1] else said())(request)

    async def main() -> None:
        asked = engine(config(proxy.url, max_num_seqs=1, request_seconds=0.5))
        await asked.start()
        metered = Metered(Served(asked, asked.config))
        poisonous = asyncio.ensure_future(metered.complete([Turn(role="user", content="poison")], Sampling(1.0, 8, 1)))
        while not poisonous.done():
            await metered.complete(TURNS, Sampling(1.0, 8, 1))
        with pytest.raises(NotAnswered, match="503"):
            poisonous.result()

    with answering(answer) as proxy:
        asyncio.run(main())


# The run file


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


def run_file(folder: Path, **changes: Any) -> RunRequest:
    """A run of the category self-harm: a fake generator and an endpoint outside that judges, to which it may be sent."""
    (folder / "prompts").mkdir(exist_ok=True)
    shutil.copy(SPECS / "prompts" / "self-harm.jsonl", folder / "prompts")
    content = {
        "version": 1,
        "name": "remote",
        "root": str(folder / "root"),
        "policy": str(SPECS / "policies" / "base"),
        "prompts": "prompts",
        "generate": {"engine": {"backend": "fake"}, "n": 1, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800},
        "judge": {"engine": outside(), "k": 1, "temperature": 1.0},
        "select": {"threshold": 1},
        "sent_to": {"self-harm": ["API.example.com"]},
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return RunRequest(file=str(folder / "run.yaml"))


def outside(**endpoint: Any) -> dict[str, Any]:
    return {"backend": "openai", "model": "big", "revision": "2026-11-01", "endpoint": OUTSIDE | endpoint}


NATIVE = {"engine": outside(), "thought_format": "native", "n": 1}


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


def test_the_trained_model_is_not_the_endpoints(tmp_path: Path) -> None:
    run = prepare(run_file(tmp_path, generate=NATIVE), trains=False)
    assert run.generator.model.id == "big" and not run.generator.model.here
    assert run.base_model.here and load_run(run_file(tmp_path, generate=NATIVE)).evaluate.engine.backend == "vllm"


def test_a_missing_key_is_told_by_the_name_of_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = prepare(run_file(tmp_path), trains=False)
    with pytest.raises(UserError, match=VARIABLE):
        run.judge.check_key()


# A real server


@pytest.fixture(scope="module")
def server(tiny_model: str, vllm_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a vLLM server that wants the key, on one core."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = {
        "model": tiny_model, "served-model-name": "tiny", "host": "127.0.0.1", "port": port, "dtype": "float32", "max-model-len": 8192,
        "max-num-batched-tokens": 8192, "max-num-seqs": 16, "block-size": 32, "api-key": KEY,
        "structured-outputs-config": json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command += ["--enforce-eager", "--no-enable-chunked-prefill", "--disable-log-stats"]
    core = str(max(os.sched_getaffinity(0)))
    environment = vllm_environment | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": core, "TOKENIZERS_PARALLELISM": "false"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 240
        while not _healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.slow
def test_through_faults_all_is_answered_pauses_are_kept_and_the_limit_falls_and_rises(server: int) -> None:
    told: list[float] = []
    limits: list[float] = []

    def too_many(request: BaseHTTPRequestHandler) -> None:
        told.append(time.monotonic())
        failed(429, Retry_After="1")(request)

    faults = {"429": too_many, "503": failed(503), "500": failed(500), "reset": reset}
    with faulty_proxy(server, faults) as proxy:
        asked = engine(config(proxy.url, max_num_seqs=16, attempts=20))
        metered = Metered(Served(asked, asked.config))

        async def one(seed: int) -> Completion:
            drawn = await metered.complete(TURNS, Sampling(1.0, 8, seed))
            limits.append(asked.limit.allowed)
            return drawn

        async def main() -> list[Completion]:
            await asked.start()
            return [drawn for share in (0.0, 0.3, 0.0) for drawn in await phase(share)]

        async def phase(share: float) -> list[Completion]:
            proxy.share = share
            return list(await asyncio.gather(*(one(seed) for seed in range(40))))

        drawn = asyncio.run(main())
    assert len(drawn) == 120 and drawn[:40] == drawn[40:80] == drawn[80:], "what is drawn depends on the seed, not on faults"
    assert metered.usage.requests == 120 and metered.usage.retries > 5 and len(told) > 0
    for pause in told:
        early = [arrived for arrived in proxy.arrived if pause + 0.2 < arrived < pause + 0.9]
        assert not early, "nobody asks during a pause"
    lowest = min(limits[40:80])
    assert lowest < max(limits[:40]) and lowest < limits[-1]


@pytest.mark.slow
def test_a_wrong_key_is_told_without_it(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sk-wrong-key")
    with pytest.raises(UserError, match=VARIABLE) as raised:
        draw(f"http://127.0.0.1:{server}")
    assert "sk-wrong-key" not in str(raised.value)


@pytest.mark.slow
def test_a_verdict_comes_by_its_schema_and_a_prompt_without_room_is_refused(server: int) -> None:
    url = f"http://127.0.0.1:{server}"
    drawn = draw(url, max_tokens=20, schema=_schema(4))
    assert parse_scores(drawn.text, SUBSCORES_FULL) and drawn.completion_tokens > 0
    assert isinstance(thoughts.parts_of(drawn, None), thoughts.Malformed)
    with pytest.raises(ValueError, match="400"):
        draw(url, max_tokens=9000)
    with pytest.raises(UserError, match="404"):
        draw(url, model="nothing")


@pytest.fixture
def ray(key: None) -> Iterator[None]:
    """A Ray of its own: engine processes have the key from the environment in which it starts."""
    from cluster.session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session():
            yield


def complete_and_judge(request: RunRequest) -> tuple[Workspace, list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs both stages without Prefect; returns the rows of both."""
    from flows.steps import complete_and_judge_step

    run = prepare(request, trains=False)
    with run.generator, run.judge:
        complete_and_judge_step.fn(run)
    rows = [
        [row for shard in Ledger(run.store, stage).shards() for row in run.store.read_table(shard.path).to_pylist()]
        for stage in ("completions", "judgements")
    ]
    return run, rows[0], rows[1]


@pytest.mark.slow
def test_an_endpoint_judges_and_generates_in_a_run(server: int, ray: None, tmp_path: Path) -> None:
    """It judges what a fake engine drew; its own completions come without a thought, which drops each of them."""
    prices = {"prompt_price": 1.0, "completion_price": 5.0}
    with faulty_proxy(server, {"503": failed(503), "reset": reset}, share=0.1) as proxy:
        served = config(proxy.url, max_num_seqs=8, attempts=20, **prices).model_dump(mode="json")
        judge = {"engine": served | {"engines": 2}, "k": 1, "temperature": 1.0}
        request = run_file(tmp_path, judge=judge, sent_to={})
        run, drawn, judged = complete_and_judge(request)
        assert len(drawn) == 16 and len(judged) == sum(row["drop_reason"] is None for row in drawn) > 0
        assert all(row["score"] and row["judge"] == "tiny" and row["judge_revision"] == "unversioned" for row in judged)
        spent = Ledger(run.store, "judgements").read().usage
        assert spent.cost == pytest.approx((spent.prompt_tokens + 5 * spent.completion_tokens) / 1e6) and spent.prompt_tokens > 16000
        told = describe_plan(*plan(prepare(request.model_copy(update={"changes": ["judge.k=2"]}), trains=False)))
        assert "at the endpoint's prices" in told and "nothing would leave this machine" in told

        generate = {"engine": served, "thought_format": "native", "n": 1, "max_tokens": 16}
        request = run_file(tmp_path, generate=generate, judge=judge, sent_to={}, root=str(tmp_path / "other"))
        _, drawn, judged = complete_and_judge(request)
        assert len(drawn) == 16 and judged == []
        assert {row["malformed"] for row in drawn} == {thoughts.WITHHELD} and all(row["drop_reason"] for row in drawn)
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 5 and not any(KEY.encode() in content for content in written), "the key is in no file"
