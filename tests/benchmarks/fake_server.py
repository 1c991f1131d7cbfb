"""The fake engine behind an OpenAI-compatible server on loopback, for clients of all kinds.

    python tests/benchmarks/fake_server.py --latency 0.02

Prints its address, and serves until it is terminated. It answers any number of requests at a time, each after a latency that its text and
seed choose.
"""

import argparse
import socket

import uvloop
from aiohttp import web

from cluster.chat import Turn
from cluster.engine import EngineConfig, FakeConfig, Sampling
from cluster.fake_engine import FakeEngine, fake_model


def application(latency: float) -> web.Application:
    """The server's routes."""
    config = EngineConfig(backend="fake", fake=FakeConfig(latency_seconds=latency), max_num_seqs=1 << 20)
    engine = FakeEngine(fake_model(config), config)

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        turns = [Turn(role=turn["role"], content=turn["content"]) for turn in body["messages"]]
        if not turns:  # how a client asks for its rate limits
            return web.json_response({"error": {"message": "no messages"}}, status=400)
        length = body.get("max_completion_tokens") or body.get("max_tokens") or 256
        drawn = await engine.complete(turns, Sampling(body.get("temperature", 1.0), length, body.get("seed", 0)))
        message = {"role": "assistant", "content": drawn.text, "reasoning_content": ""}
        usage = {"prompt_tokens": drawn.prompt_tokens, "completion_tokens": drawn.completion_tokens}
        return web.json_response(
            {
                "id": "0",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "finish_reason": drawn.finish_reason, "message": message}],
                "usage": usage | {"total_tokens": sum(usage.values())},
            }
        )

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/v1/models", models)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.02, help="median seconds of an answer")
    arguments = parser.parse_args()
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", flush=True)
    web.run_app(application(arguments.latency), sock=listening, print=None, access_log=None, loop=uvloop.new_event_loop())
