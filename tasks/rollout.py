"""What RL and evaluation share: unguided answers of a policy under training, and the judge that sees only the answer.

No spec and no grammar: the model has to think by itself. Sampling is by temperature only, since any other filter would bias the ratio.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cluster.chat import chat_of
from cluster.engine import Completion, Engine, Sampling
from cluster.fleet import Fleet, Stage
from tasks import thoughts
from tasks.complete import seed_of
from tasks.compose import BlindCase, plain_turns
from tasks.judge import JudgeConfig, Verdict, judge
from tasks.keys import digest
from tasks.policy import Spec
from tasks.prompts import Prompt, prompt_hash


@dataclass(frozen=True)
class DrawShard:
    """Prompts to answer, `samples` times each."""

    model_path: str
    prompts: tuple[Prompt, ...]
    samples: int
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Drawn:
    """One unguided completion. `parts` is Malformed when it does not hold exactly one closed thought; `name` is its hash."""

    prompt_id: str
    sample: int
    seed: int
    completion: Completion
    parts: thoughts.Parts | thoughts.Malformed

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of what it continues."""
        return self.completion.prompt_ids

    @property
    def name(self) -> str:
        """Names the completion and seeds its judge runs: other samples of a group meet a judge with other seeds."""
        return digest([self.prompt_id, self.sample, self.seed])

    @property
    def answer(self) -> str | None:
        """The answer behind a closed thought, or the whole text where no thought was begun; None where they cannot be told apart."""
        if isinstance(self.parts, thoughts.Parts):
            return self.parts.answer or None
        return self.completion.text.strip() or None if self.parts.reason == thoughts.NO_THOUGHT else None

    @property
    def earns(self) -> bool:
        """RL: only a finished answer behind a closed thought is shown to the judge; everything else gets the floor."""
        good = isinstance(self.parts, thoughts.Parts) and bool(self.parts.answer)
        return good and self.completion.finish_reason == "stop"


@dataclass(frozen=True)
class BlindItem:
    """One answer to judge; `name` seeds the runs."""

    name: str
    spec: Spec
    case: BlindCase


@dataclass(frozen=True)
class BlindShard:
    """Answers to judge by one spec without their thoughts, `config.k` runs each."""

    config: JudgeConfig
    items: tuple[BlindItem, ...]


async def draw(engine: Engine, shard: DrawShard) -> list[Drawn]:
    """Draws the answers of a shard, with the log-probabilities of their tokens."""
    chat = chat_of(shard.model_path)

    async def one(prompt: Prompt, sample: int) -> Drawn:
        seed = seed_of(shard.seed, prompt_hash(prompt.messages), sample)
        sampling = Sampling(shard.temperature, shard.max_tokens, seed, logprobs=True)
        drawn = await engine.complete(plain_turns(prompt.messages), sampling)
        parts = thoughts.parts_of(drawn, chat)
        return Drawn(prompt.id, sample, seed, drawn, parts)

    return list(await asyncio.gather(*(one(prompt, sample) for prompt in shard.prompts for sample in range(shard.samples))))


async def judge_blind(engine: Engine, shard: BlindShard) -> list[list[Verdict]]:
    """k verdicts for every item, in order."""

    async def run(item: BlindItem, number: int) -> Verdict:
        try:
            return await judge(engine, item.spec, item.case, shard.config, item.name, number)
        except ValueError as error:
            return Verdict(None, (f"the engine gave no verdict: {error}",), 0)

    async def one(item: BlindItem) -> list[Verdict]:
        return list(await asyncio.gather(*(run(item, number) for number in range(shard.config.k))))

    return list(await asyncio.gather(*(one(item) for item in shard.items)))


DRAW = Stage(run=draw, size=lambda shard: len(shard.prompts) * shard.samples)
JUDGE_BLIND = Stage(run=judge_blind, size=lambda shard: len(shard.items) * shard.config.k, prefix=lambda shard: shard.items[0].spec.hash)


def blind_shards(drawn: Sequence[Drawn], prompts: dict[str, Prompt], specs: dict[str, Spec], config: JudgeConfig) -> list[BlindShard]:
    """What the judge is shown of completions that have an answer, one shard per category."""
    items: dict[str, list[BlindItem]] = {}
    for completion in drawn:
        if completion.answer is not None:
            prompt = prompts[completion.prompt_id]
            case = BlindCase(prompt.messages, completion.answer, prompt.ideal_verdict)
            items.setdefault(prompt.category, []).append(BlindItem(completion.name, specs[prompt.category], case))
    return [BlindShard(config, tuple(group)) for group in items.values()]


def verdicts_of(judge: Fleet, shards: Sequence[BlindShard], progress: Callable[[int], None] | None = None) -> dict[str, list[Verdict]]:
    """Name of a completion -> its verdicts; `progress` is called with how many were given."""
    verdicts: dict[str, list[Verdict]] = {}
    for done in judge.map(JUDGE_BLIND, shards):
        verdicts |= {item.name: given for item, given in zip(done.shard.items, done.result, strict=True)}
        if progress:
            progress(len(verdicts))
    return verdicts


def in_parts(items: Sequence[Any], parts: int) -> list[tuple[Any, ...]]:
    """Cuts a sequence into at most `parts` runs of nearly equal length, none empty."""
    parts = max(1, min(parts, len(items)))
    size, rest = divmod(len(items), parts)
    edges = [0]
    for number in range(parts):
        edges.append(edges[-1] + size + (number < rest))
    return [tuple(items[start:end]) for start, end in pairwise(edges) if end > start]
