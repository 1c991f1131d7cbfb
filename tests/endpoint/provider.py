"""A provider that answers as it is told, and engines that ask it."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from faulty_proxy import Fault, Proxy, faulty_proxy, status

from cluster.chat import Turn
from cluster.engine import Completion, EndpointConfig, EngineConfig, Sampling
from cluster.openai_engine import OpenAIEngine
from cluster.serving import Metered, Served

KEY, VARIABLE = "sk-test-4711", "SPECMILL_TEST_KEY"
TURNS = [Turn(role="user", content="What is this?")]


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
        try:
            return await asked.complete(turns, Sampling(1.0, max_tokens, seed=1, json_schema=schema))
        finally:
            await asked.stop()

    return asyncio.run(main())


def draw_many(asked: OpenAIEngine, count: int, turns: Sequence[Turn] = TURNS, each: Callable[[], None] = lambda: None) -> Metered:
    """So many completions at the same time, each asked for until it is answered; returns what they cost. Calls `each` after each."""
    metered = Metered(Served(asked, asked.config))

    async def one(seed: int) -> None:
        await metered.complete(turns, Sampling(1.0, 8, seed))
        each()

    async def main() -> None:
        await asked.start()
        try:
            await asyncio.gather(*map(one, range(count)))
        finally:
            await asked.stop()

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
