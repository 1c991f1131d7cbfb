"""Raw vLLM and Specmill on the same engines.

    python tests/benchmarks/raw_vllm.py --rounds 6

The engines start once, in Specmill's actors, one bound to each core, and the contenders take turns on them, in an order that changes.
Before each turn the prefix cache is emptied. All draw the same requests: the same token ids, seeds and grammar, with seeds of its own for
each round. Raw takes them in the order in which Specmill plans them.

- raw: a loop in the process of each engine, which hands it ready token ids, keeps a quarter more of them in flight than the engine works
  on at a time, and collects the drawn tokens in memory. Measured from the first request to the last result. `queue`: the engines take
  the next request from one queue that they share (an append to a file), so that they end together. `parts`: each has its own
  part, cut beforehand, so that the requests of a category share an engine and its prefix cache.
- Specmill: plan, shards, tokenising, drawing, splitting, gates, Parquet and ledger. Measured from the plan to the last commit.

Then Specmill alone does more of the same work, for the engines' idle share and the tail, from when an engine runs dry for good.
"""

import argparse
import asyncio
import os
import tempfile
import time
import uuid
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from report import machine, ranged, ratio, row, say
from workload import Result, engine_of, engine_parser, fresh, requests_of, specmill, write_run

from cluster.chat import chat_of
from cluster.engine import Sampling
from cluster.fleet import answer
from cluster.pool import Pool
from cluster.session import ray_session
from flows.workspace import Workspace
from tasks.rollout import in_parts

CONTENDERS = {"queue": "raw vLLM, one queue", "parts": "raw vLLM, a part for each engine", "specmill": "Specmill on the same engines"}


@dataclass(frozen=True)
class Work:
    """Requests as (token ids, sampling), and the file that their next number is taken from."""

    requests: list[tuple[list[int], Sampling]]
    queue: str


@dataclass(frozen=True)
class Drawn:
    """What one engine drew; `started` and `ended` on the machine's monotonic clock."""

    rows: int
    tokens: int
    started: float
    ended: float


async def draw_raw(engine: Any, work: Work) -> Drawn:
    """Draws requests until the queue is empty; runs in an engine's process."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    served = engine._served
    model, capacity = served.engine._engine, served.config.max_num_seqs
    ready = [
        (
            {"prompt_token_ids": ids},
            SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed,
                structured_outputs=StructuredOutputsParams(grammar=sampling.grammar),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )
        for ids, sampling in work.requests
    ]
    queue = os.open(work.queue, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    drawn: list[list[int]] = []

    async def draw() -> None:
        while (number := take(queue)) < len(ready):
            async for output in model.generate(*ready[number], uuid.uuid4().hex):
                drawn.append(list(output.outputs[0].token_ids))

    started = time.monotonic()
    await asyncio.gather(*(draw() for _ in range(capacity + capacity // 4)))
    ended = time.monotonic()
    os.close(queue)
    return Drawn(len(drawn), sum(map(len, drawn)), started, ended)


def take(queue: int) -> int:
    """The next number: an append leaves the file's offset at its own end, so that no two processes get the same."""
    os.write(queue, b".")
    return os.lseek(queue, 0, os.SEEK_CUR) - 1


async def forget(engine: Any, _: None) -> None:
    """Empties the prefix cache; runs in an engine's process."""
    if not await engine._served.engine._engine.reset_prefix_cache():
        raise RuntimeError("the prefix cache is in use")


def on_all(pool: Pool, function: Any, arguments: list[Any]) -> list[Any]:
    """What `function` returns in every engine's process, which gets one of the arguments."""
    running = [actor.run.remote(function, argument) for actor, argument in zip(pool.fleet().actors, arguments, strict=True)]
    return [answer(ref)[0] for ref in running]


def raw(contender: str, run: Workspace, pool: Pool, folder: Path) -> Result:
    """The plain way."""
    engines, chat = pool.config.engines, chat_of(pool.model.path)
    ready = [(chat.prompt(request.turns), request.sampling) for request in requests_of(run)]
    queue = str(folder / uuid.uuid4().hex)
    shared, own = [Work(ready, queue)] * engines, [Work(list(part), f"{queue}-{i}") for i, part in enumerate(in_parts(ready, engines))]
    drawn = on_all(pool, draw_raw, shared if contender == "queue" else own)
    rows, tokens = sum(part.rows for part in drawn), sum(part.tokens for part in drawn)
    if rows != len(ready):
        raise RuntimeError(f"{rows} of {len(ready)} requests were drawn")
    return Result(rows, tokens, max(part.ended for part in drawn) - min(part.started for part in drawn))


def turn(contender: str, run: Workspace, pool: Pool, folder: Path) -> Result:
    """One contender's turn, from an empty prefix cache."""
    on_all(pool, forget, [None] * pool.config.engines)
    run.generator = pool
    return specmill(run) if contender == "specmill" else raw(contender, run, pool, folder)


def compare(arguments: argparse.Namespace) -> None:
    """All turns, and their rows of the table."""
    say(machine())
    engine = engine_of(arguments)
    results: dict[str, list[Result]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as place, ray_session():
        folder = Path(place)
        file = write_run(folder / "pairs", arguments.prompts, engine, n=2)
        longer = write_run(folder / "steady", arguments.steady, engine, n=2)
        first = write_run(folder / "first", 2 * arguments.batch, engine, n=1)
        with Pool(fresh(file, 0).config.generate.engine) as pool:
            for contender in ("queue", "specmill"):
                turn(contender, fresh(first, 0), pool, folder)
            orders = list(permutations(CONTENDERS))
            for number in range(arguments.rounds):
                run = fresh(file, number)
                for contender in orders[number % len(orders)]:
                    result = turn(contender, run, pool, folder)
                    results[contender].append(result)
                    say(f"round {number + 1}: {contender} {result.rows} rows, {result.tokens} tokens in {result.seconds:.1f} s")
            steady = turn("specmill", fresh(longer, 0), pool, folder)
    speeds = {contender: [result.tokens / result.seconds for result in made] for contender, made in results.items()}
    for contender, values in speeds.items():
        ranged(CONTENDERS[contender], values, "drawn tokens/s")
    for contender in ("queue", "parts"):
        mean, low, high = ratio(list(zip(speeds["specmill"], speeds[contender], strict=True)))
        spread = f"95 % interval {low:.3f} to {high:.3f}, {arguments.rounds} pairs"
        row(f"Specmill / {CONTENDERS[contender]}", f"{mean:.3f}", spread, "lower end 0.95")
    row("engines idle", f"{100 * steady.idle:.1f} %", f"of {steady.seconds:.0f} s", "3 %")
    row("tail", f"{100 * steady.tail:.1f} %", f"of {steady.seconds:.0f} s", "5 %")


if __name__ == "__main__":
    parser = engine_parser(__doc__, prompts=48, batch=8)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each contender, at least 2")
    parser.add_argument("--steady", type=int, default=100, help="prompts of the longer run of Specmill alone")
    compare(parser.parse_args())
