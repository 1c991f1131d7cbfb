"""Engines that draw and judge in simulated time, and fail."""

from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import tasks.complete
import tasks.judge
from cluster.errors import SpecmillError
from cluster.fleet import Done, Line
from cluster.serving import Usage
from simulation.world import World
from tasks.keys import digest


def said(row: dict[str, Any]) -> str:
    """Names what a judge has read."""
    return digest([row["thought"], row["answer"]])


class Engines:
    """What is drawn and judged: every draw may say something else, as engines do whose batches differ."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.fickle = world.rng.random() < 0.5

    async def draw(self, engine: None, shard: Any, prompt: dict[str, Any], sample: int) -> dict[str, Any]:
        row = tasks.complete._row(shard, prompt, sample)
        if sample == 2 and prompt["id"].endswith("-0"):
            return row | {"quarantined": "the engine gave no completion"}
        thought = f"{shard.request.spec.text} on {prompt['id']}\nClauses: VI1\nVerdict: comply"
        answer = (
            f"answer {sample} in words {self.world.draws if self.fickle else 0}" if sample != 1 or not prompt["id"].endswith("-1") else ""
        )
        content = bytes.fromhex(digest([thought, answer]))[:16]
        self.world.draws += 1
        return row | {
            "thought": thought, "answer": answer, "malformed": None, "finish_reason": "stop", "content": content, "cited_verdict": "comply",
            "cited_clauses": ["VI1"], "token_ids": [1],
        }  # fmt: skip

    async def judge(self, engine: None, shard: Any, row: dict[str, Any], run: int) -> dict[str, Any]:
        result = tasks.judge._row(shard, row, run) | {"seed": run, "raw": [said(row)]}
        if self.world.rng.random() < 0.1:
            return result | {"quarantined": "verdict not parsable"}
        return result | {"score": self.world.rng.randint(2, 5)}

    def run(self, lines: Sequence[Line], tick: Callable[[bool], None]) -> Iterator[Done]:
        """A fleet: shards finish in any order, some are given up, and now and then an engine fails for good."""
        world, under_way = self.world, []
        while True:
            for line in lines:
                while line.waiting and len(under_way) < 2 * len(line.fleet().actors):
                    number = world.rng.randrange(len(line.fleet().actors))
                    work = line.take(line.fleet(), number, world.rng.randint(1, 12))
                    under_way.append((world.now + world.rng.uniform(0.2, 2.0) * world.rng.choice([1, 1, 1, 15]), work))
            if not under_way:
                return
            due, work = min(under_way, key=lambda item: item[0])
            under_way.remove((due, work))
            while world.now < due:
                world.wait(min(1.0, due - world.now))
                tick(True)
            if world.happens(world.weather.engine_fails):
                raise SpecmillError("an engine failed")
            if world.happens(world.weather.give_up):
                result = work.line.stage.give_up(work.shard, "it killed its engine")
            else:
                try:
                    result = finish(work.line.stage.run(None, work.shard))
                except SpecmillError:
                    raise
                except Exception as error:
                    raise SpecmillError(f"an engine failed: {error!r}") from error
            yield Done(work.line, work.shard, result, Usage(requests=work.size), 0)


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")
