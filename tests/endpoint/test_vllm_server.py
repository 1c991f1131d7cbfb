"""A vLLM server on loopback, with a tiny random model, asked directly and through a proxy that fails."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from endpoint_runs import run_file
from faulty_proxy import faulty_proxy, reset
from provider import KEY, TURNS, VARIABLE, config, draw, engine, failed

from cluster import serving
from cluster.engine import Completion, Sampling
from cluster.errors import UserError
from cluster.serving import Metered, Served
from flows.config import RunRequest
from flows.opening import prepare
from flows.plan import describe_plan, plan
from flows.workspace import Workspace
from tasks import thoughts
from tasks.judge import SUBSCORES_FULL, _schema, parse_scores
from tasks.ledger import Ledger

pytestmark = pytest.mark.slow


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


def test_through_faults_all_is_answered_pauses_are_kept_and_the_limit_falls_and_rises(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LONGEST_PAUSE", 1.0)
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
            drawn = [drawn for share in (0.0, 0.3, 0.0) for drawn in await phase(share)]
            await asked.stop()
            return drawn

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


def test_a_wrong_key_is_told_without_it(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sk-wrong-key")
    with pytest.raises(UserError, match=VARIABLE) as raised:
        draw(f"http://127.0.0.1:{server}")
    assert "sk-wrong-key" not in str(raised.value)


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


def test_an_endpoint_judges_and_generates_in_a_run(server: int, ray: None, tmp_path: Path) -> None:
    """It judges what a fake engine drew; its own completions come without a thought, so that no row can be made of them."""
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
        with pytest.raises(UserError, match=r"not one of \d+ answers of tiny came with its thought"):
            complete_and_judge(request)
        assert not (tmp_path / "other" / "completions" / "shards").exists()
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 5 and not any(KEY.encode() in content for content in written), "the key is in no file"
