"""Spec-conditioned completion: n samples for every prompt of the SFT split, each under its own key.

`wanted` names the keys, the stage `COMPLETE` draws those that no ledger entry holds. The ideal verdict never reaches this module.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import pyarrow as pa
from pydantic import Field

from cluster.chat import Chat
from cluster.engine import Completion, Engine, EngineConfig, Sampling
from cluster.errors import UserError
from cluster.fleet import Stage
from cluster.models import Model
from tasks import tables, thoughts
from tasks.compose import TEMPLATE_HASH, Placement, generator_turns, plain_turns
from tasks.keys import completion_key, digest, request_prefix
from tasks.policy import Policy, Spec, render
from tasks.prompts import Message, Prompt, prompt_hash
from tasks.store import Shard, Store
from tasks.validation import Strict

STAGE = "completions"


class GenerateConfig(Strict):
    """How completions are drawn."""

    engine: EngineConfig = Field(EngineConfig(), title="Generator", description="The model that writes thoughts and answers.")
    n: int = Field(2, ge=1, title="Samples per prompt", description="More samples give the selection more to choose from.")
    temperature: float = Field(1.0, gt=0, le=2, title="Temperature", description="Sampling temperature.")
    seed: int = Field(0, ge=0, title="Seed", description="Sample i of a prompt has the seed of its prompt plus i.")
    placement: Placement = Field("system", title="Spec placement", description="`system` shares a prefix; `user` is the paper's order.")
    render_mode: Literal["category", "full"] = Field("category", title="Render mode", description="What of the policy is shown.")
    thought_format: Literal["guided", "native"] = Field(
        "guided", title="Thought format", description="`guided`: held by a grammar. `native`: the model's own reasoning format."
    )
    thought_characters: int = Field(600, ge=40, title="Thought length", description="Longest guided thought, in characters.")
    answer_characters: int = Field(600, ge=40, title="Answer length", description="Longest guided answer, in characters.")
    max_tokens: int = Field(5120, ge=16, title="Completion length", description="Longest completion, in tokens.")
    shard_prompts: int = Field(8, ge=1, title="Prompts per shard", description="How work is cut; changes no key.")


@dataclass(frozen=True)
class Request:
    """What is asked of the generator for one category: the same for all its prompts. `template` and `sampling` are hashes."""

    spec: Spec
    model: Model
    prefix: str
    template: str
    sampling: str
    grammar: str | None


@dataclass(frozen=True)
class CompletionShard:
    """A unit of work: prompts of one category with the sample numbers wanted of each."""

    root: str
    model: Model
    config: GenerateConfig
    request: Request
    prompts: tuple[Prompt, ...]
    samples: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=4)
def chat_of(path: str) -> Chat:
    """The tokenizer of a model, read once per process."""
    return Chat(path)


def requests(policy: Policy, model: Model, config: GenerateConfig) -> dict[str, Request]:
    """Category -> what its prompts are asked.

    Raises UserError when the grammar's longest output does not fit `max_tokens`, or spec and completion not the engine's context.
    """
    chat = chat_of(model.path)
    held = None
    if config.thought_format == "guided":
        held = thoughts.grammar(policy, config.thought_characters, config.answer_characters, _begins_in_thought(chat))
        longest = thoughts.longest_output(policy, config.thought_characters, config.answer_characters)
        if longest > config.max_tokens:
            raise UserError(
                f"generate.max_tokens: {config.max_tokens} is below the grammar's longest output ({longest} tokens); "
                "raise it, or lower thought_characters or answer_characters."
            )
    template = digest([chat.hash, TEMPLATE_HASH, config.placement, thoughts.FORMAT_VERSION, held])
    # The context is no detail of serving: a completion that it cuts short, or a prompt that it has no room for, is another result.
    context = config.engine.max_model_len
    sampling = {"temperature": config.temperature, "seed": config.seed, "max_tokens": config.max_tokens, "context": context}
    found = {}
    for category in policy.categories:
        spec = render(policy, category, config.render_mode)
        prefix = request_prefix(spec=spec.hash, template=template, model=model.id, revision=model.revision, sampling=sampling)
        found[category] = Request(spec, model, prefix, template, digest(sampling), held)
        empty = len(chat.prompt(generator_turns(spec, (Message(role="user", content="?"),), config.placement)))
        if empty + config.max_tokens > context:
            raise UserError(
                f"generate.engine.max_model_len: {context} tokens have no room for the policy of {category} ({empty} tokens with the "
                f"instructions) and generate.max_tokens ({config.max_tokens}). Raise it, or lower max_tokens."
            )
    return found


def wanted(prompts: Iterable[Prompt], asked: dict[str, Request], n: int) -> dict[bytes, tuple[Prompt, int]]:
    """Key -> (prompt, sample number) for every completion that the run wants."""
    keys = {}
    for prompt in prompts:
        name = prompt_hash(prompt.messages)
        for sample in range(n):
            keys[completion_key(asked[prompt.category].prefix, name, sample)] = (prompt, sample)
    return keys


def cut(
    missing: Iterable[tuple[Prompt, int]], asked: dict[str, Request], root: str, model: Model, config: GenerateConfig
) -> list[CompletionShard]:
    """Cuts missing completions into shards of one category each, so that a shard's requests share the spec's prefix."""
    by_prompt: dict[str, tuple[Prompt, list[int]]] = {}
    for prompt, sample in missing:
        by_prompt.setdefault(prompt.id, (prompt, []))[1].append(sample)
    by_category: dict[str, list[tuple[Prompt, list[int]]]] = {}
    for prompt, numbers in by_prompt.values():
        by_category.setdefault(prompt.category, []).append((prompt, numbers))
    shards = []
    for category, items in by_category.items():
        for start in range(0, len(items), config.shard_prompts):
            part = items[start : start + config.shard_prompts]
            prompts = tuple(prompt for prompt, _ in part)
            samples = tuple(tuple(numbers) for _, numbers in part)
            shards.append(CompletionShard(root, model, config, asked[category], prompts, samples))
    return shards


async def complete_shard(engine: Engine, shard: CompletionShard) -> Shard:
    """Draws, splits and writes the completions of a shard; returns the receipt. A request that the engine rejects is quarantined."""
    chat = chat_of(shard.model.path)
    jobs = []
    for prompt, samples in zip(shard.prompts, shard.samples, strict=True):
        jobs += [_draw(engine, shard, prompt, sample, chat) for sample in samples]
    rows = await asyncio.gather(*jobs)
    return Store(shard.root).put_table(f"{STAGE}/shards", pa.Table.from_pylist(list(rows), schema=tables.COMPLETIONS))


def split(shard: CompletionShard) -> list[CompletionShard]:
    """Two halves, by prompts or, of a single prompt, by samples; a single sample comes back alone."""
    prompts, samples = shard.prompts, shard.samples
    if len(prompts) > 1:
        half = len(prompts) // 2
        cuts = (slice(0, half), slice(half, None))
        return [replace(shard, prompts=prompts[cut], samples=samples[cut]) for cut in cuts]
    numbers = samples[0]
    half = len(numbers) // 2
    return [replace(shard, samples=(numbers[:half],)), replace(shard, samples=(numbers[half:],))] if half else [shard]


def give_up(shard: CompletionShard, reason: str) -> Shard:
    """Writes the rows of a shard that cannot be run, all of them quarantined."""
    named = [(prompt, sample) for prompt, samples in zip(shard.prompts, shard.samples, strict=True) for sample in samples]
    rows = [_row(shard, prompt, sample) | {"quarantined": reason} for prompt, sample in named]
    return Store(shard.root).put_table(f"{STAGE}/shards", pa.Table.from_pylist(rows, schema=tables.COMPLETIONS))


COMPLETE = Stage(
    run=complete_shard,
    size=lambda shard: sum(map(len, shard.samples)),
    prefix=lambda shard: shard.request.spec.hash,
    split=split,
    give_up=give_up,
)


def _row(shard: CompletionShard, prompt: Prompt, sample: int) -> dict:
    """What is known of a completion before it is drawn."""
    name = prompt_hash(prompt.messages)
    return {
        "key": completion_key(shard.request.prefix, name, sample),
        "prompt_id": prompt.id,
        "prompt_hash": name,
        "category": prompt.category,
        "sample": sample,
        "seed": seed_of(shard.config.seed, name, sample),
        "spec_hash": shard.request.spec.hash,
        "template_hash": shard.request.template,
        "sampling_hash": shard.request.sampling,
        "generator": shard.model.id,
        "generator_revision": shard.model.revision,
    }


async def _draw(engine: Engine, shard: CompletionShard, prompt: Prompt, sample: int, chat: Chat) -> dict:
    config, row = shard.config, _row(shard, prompt, sample)
    try:
        ids = chat.prompt(generator_turns(shard.request.spec, prompt.messages, config.placement))
        require_room(len(ids), config.max_tokens, config.engine)
        drawn = await engine.complete(ids, Sampling(config.temperature, config.max_tokens, row["seed"], grammar=shard.request.grammar))
    except (ValueError, UserError) as error:
        return row | {"quarantined": f"the engine gave no completion: {error}"}
    return row | _outcome(drawn, chat, thoughts.opened(ids, chat))


def _outcome(drawn: Completion, chat: Chat, opened: bool) -> dict:
    parts = thoughts.split(drawn.token_ids, chat, opened)
    good = isinstance(parts, thoughts.Parts)
    return {
        "token_ids": drawn.token_ids,
        "thought": parts.thought if good else None,  # type: ignore[union-attr]
        "answer": parts.answer if good else None,  # type: ignore[union-attr]
        "malformed": None if good else parts.reason,  # type: ignore[union-attr]
        "finish_reason": drawn.finish_reason,
        "prompt_tokens": drawn.prompt_tokens,
        "cached_tokens": drawn.cached_tokens,
    }


def _begins_in_thought(chat: Chat) -> bool:
    return thoughts.opened(chat.prompt(plain_turns((Message(role="user", content="?"),))), chat)


def require_room(prompt_tokens: int, max_tokens: int, engine: EngineConfig) -> None:
    """Raises ValueError when a request does not fit the engine's context; a shorter completion would be another one."""
    if prompt_tokens + max_tokens > engine.max_model_len:
        raise ValueError(f"prompt of {prompt_tokens} tokens and {max_tokens} to draw exceed max_model_len {engine.max_model_len}")


def seed_of(base: int, name: str, number: int) -> int:
    """Seed of draw `number` on the thing whose hash is `name`: a base of its own per prompt, so that prompts are not correlated."""
    return (base + int(name[:7], 16) + number) % 2**31
