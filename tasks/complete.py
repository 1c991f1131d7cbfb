"""Spec-conditioned completion: n samples for every prompt of the SFT split, each under its own key.

The stage `COMPLETE` draws what it is asked for and passes it through the gates. The ideal verdict never reaches this module.
"""

import asyncio
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from cluster.chat import Chat, chat_of
from cluster.engine import Completion, Engine, EngineConfig, Sampling
from cluster.errors import UserError
from cluster.fleet import Stage
from cluster.models import Model
from tasks import tables, thoughts
from tasks.compose import APART_TEMPLATE_HASH, TEMPLATE_HASH, Placement, generator_turns, plain_turns
from tasks.gates import Gates, gate
from tasks.keys import KEY_BYTES, completion_key, digest, request_prefix
from tasks.policy import Policy, Spec, render
from tasks.prompts import Message
from tasks.store import Store
from tasks.validation import Strict
from tasks.work import Pairs, Receipt

STAGE = "completions"
ENDPOINT = "endpoint"
"""Stands for the chat template of a model behind an endpoint, which knows it alone."""


class GenerateConfig(Strict):
    """How completions are drawn."""

    engine: EngineConfig = Field(EngineConfig(), title="Generator", description="The model that writes thoughts and answers.")
    n: int = Field(2, ge=1, le=1000, title="Samples per prompt", description="More samples give the selection more to choose from.")
    temperature: float = Field(1.0, gt=0, le=2, title="Temperature", description="Sampling temperature.")
    seed: int = Field(0, ge=0, title="Seed", description="Sample i of a prompt has the seed of its prompt plus i.")
    placement: Placement = Field("system", title="Spec placement", description="`system` shares a prefix; `user` is the paper's order.")
    render_mode: Literal["category", "full"] = Field("category", title="Render mode", description="What of the policy is shown.")
    thought_format: Literal["guided", "native"] = Field(
        "guided", title="Thought format", description="`guided`: held by a grammar. `native`: the model's own reasoning format."
    )
    guided_clauses: Literal["bundle", "category"] = Field(
        "bundle",
        title="Clauses offered",
        description="Whose ids the grammar offers to a guided thought: those of the whole `bundle`, or of the prompt's own `category`, for "
        "a generator that is too small to find in the policy what it has read there.",
    )
    thought_characters: int = Field(600, ge=40, title="Thought length", description="Longest guided thought, in characters.")
    answer_characters: int = Field(600, ge=40, title="Answer length", description="Longest guided answer, in characters.")
    max_tokens: int = Field(5120, ge=16, title="Completion length", description="Longest completion, in tokens.")
    shard_rows: int = Field(256, ge=1, title="Shard", description="Most completions in one file; changes no key. Smaller: less is lost.")


@dataclass(frozen=True)
class Request:
    """What is asked of the generator for one category: the same for all its prompts. `template` and `sampling` are hashes."""

    category: str
    spec: Spec
    model: Model
    prefix: str
    template: str
    sampling: str
    grammar: str | None


WITHHELD_ROWS = 8
"""A shard of at least so many answers, all without their thought, is not kept: the endpoint withholds them."""


@dataclass(frozen=True)
class CompletionShard:
    """A unit of work: rows of a part of prompts with the sample numbers wanted of each."""

    root: str
    model: Model
    config: GenerateConfig
    request: Request
    gates: Gates
    part: str
    pairs: Pairs


def tokenizer(model: Model) -> Chat | None:
    """The tokenizer and template of a model that is served here; None for one behind an endpoint, which is sent the turns."""
    return chat_of(model.path) if model.here else None


def template_of(model: Model) -> str:
    """Identity of a model's chat template."""
    chat = tokenizer(model)
    return chat.hash if chat else ENDPOINT


def requests(policy: Policy, model: Model, config: GenerateConfig) -> dict[str, Request]:
    """Category -> what its prompts are asked.

    Raises UserError when the grammar's longest output does not fit `max_tokens`, spec and completion not the engine's context, or when a
    grammar is to hold what an endpoint draws.
    """
    chat = tokenizer(model)
    if config.thought_format == "guided":
        if chat is None:
            raise UserError(
                "generate.thought_format: `guided` needs a grammar, which an endpoint does not take. Set `native`: the thought is then "
                "what the endpoint gives apart as the model's reasoning."
            )
        longest = thoughts.longest_output(policy, config.thought_characters, config.answer_characters)
        if longest > config.max_tokens:
            raise UserError(
                f"generate.max_tokens: {config.max_tokens} is below the grammar's longest output ({longest} tokens); "
                "raise it, or lower thought_characters or answer_characters."
            )
    turns = TEMPLATE_HASH if chat else APART_TEMPLATE_HASH
    # The context is no detail of serving: a completion that it cuts short, or a prompt that it has no room for, is another result.
    context = config.engine.max_model_len
    sampling = {"temperature": config.temperature, "seed": config.seed, "max_tokens": config.max_tokens, **config.engine.identity()}
    found = {}
    for category in policy.categories:
        spec = render(policy, category, config.render_mode)
        held = _grammar(policy, category, chat, config)
        template = digest([template_of(model), turns, config.placement, thoughts.FORMAT_VERSION, held])
        prefix = request_prefix(spec=spec.hash, template=template, model=model.id, revision=model.revision, sampling=sampling)
        found[category] = Request(category, spec, model, prefix, template, digest(sampling), held)
        if chat is None:
            continue
        empty = len(chat.prompt(generator_turns(spec, (Message(role="user", content="?"),), config.placement)))
        if empty + config.max_tokens > context:
            raise UserError(
                f"generate.engine.max_model_len: {context} tokens have no room for the policy of {category} ({empty} tokens with the "
                f"instructions) and generate.max_tokens ({config.max_tokens}). Raise it, or lower max_tokens."
            )
    return found


async def complete_shard(engine: Engine, shard: CompletionShard) -> Receipt:
    """Draws, splits, gates and writes the completions of a shard. A request that the engine rejects is quarantined.

    Files are read and written in threads: the engine has other shards to go on with. Raises UserError where an endpoint gives no thoughts.
    """
    prompts = await asyncio.to_thread(_prompts, shard.root, shard.part)
    rows = await asyncio.gather(*(_draw(engine, shard, prompts[row], sample) for row, sample in shard.pairs))
    if len(rows) >= WITHHELD_ROWS and all(row.get("malformed") == thoughts.WITHHELD for row in rows):
        raise UserError(
            f"generate.engine.endpoint: not one of {len(rows)} answers of {shard.model.id} came with its thought, and no row can be made "
            "of those. Have the server give it as `reasoning_content` (`vllm serve` needs `--reasoning-parser`), or take another model."
        )
    return await asyncio.to_thread(_write, shard, rows)


def give_up(shard: CompletionShard, reason: str) -> Receipt:
    """Writes the rows of a shard that cannot be run, all of them quarantined."""
    prompts = _prompts(shard.root, shard.part)
    return _write(shard, [_row(shard, prompts[row], sample) | {"quarantined": reason} for row, sample in shard.pairs])


COMPLETE = Stage(
    run=complete_shard,
    size=lambda shard: len(shard.pairs),
    prefix=lambda shard: shard.request.spec.hash,
    split=lambda shard: [replace(shard, pairs=half) for half in shard.pairs.halves()],
    give_up=give_up,
)


@lru_cache(maxsize=8)
def _prompts(root: str, part: str) -> list[dict[str, Any]]:
    return list(Store(root).read_table(part, ["id", "prompt_hash", "category", "messages"]).to_pylist())


def _write(shard: CompletionShard, rows: list[dict[str, Any]]) -> Receipt:
    for row in rows:
        row |= {"gates": shard.gates.hash, "drop_reason": gate(row, shard.gates, shard.request.spec)}
    file = Store(shard.root).put_table(f"{STAGE}/shards", pa.Table.from_pylist(rows, schema=tables.COMPLETIONS))
    return Receipt(file, passed=tuple(place for place, row in enumerate(rows) if row["drop_reason"] is None))


def _row(shard: CompletionShard, prompt: dict[str, Any], sample: int) -> dict[str, Any]:
    """What is known of a completion before it is drawn."""
    name = prompt["prompt_hash"]
    return {
        "key": completion_key(shard.request.prefix, name, sample),
        "prompt_id": prompt["id"],
        "prompt_hash": name,
        "category": prompt["category"],
        "messages": prompt["messages"],
        "sample": sample,
        "seed": seed_of(shard.config.seed, name, sample),
        "spec_hash": shard.request.spec.hash,
        "template_hash": shard.request.template,
        "sampling_hash": shard.request.sampling,
        "generator": shard.model.id,
        "generator_revision": shard.model.revision,
    }


async def _draw(engine: Engine, shard: CompletionShard, prompt: dict[str, Any], sample: int) -> dict[str, Any]:
    config, row = shard.config, _row(shard, prompt, sample)
    messages = [Message.model_validate(turn) for turn in prompt["messages"]]
    turns = generator_turns(shard.request.spec, messages, config.placement, apart=not shard.model.here)
    try:
        drawn = await engine.complete(turns, Sampling(config.temperature, config.max_tokens, row["seed"], grammar=shard.request.grammar))
    except ValueError as error:
        return row | {"quarantined": f"the engine gave no completion: {error}"}
    return row | _outcome(drawn, tokenizer(shard.model))


def _outcome(drawn: Completion, chat: Chat | None) -> dict[str, Any]:
    parts = thoughts.parts_of(drawn, chat)
    thought, answer = (parts.thought, parts.answer) if isinstance(parts, thoughts.Parts) else (None, None)
    return {
        "token_ids": drawn.token_ids,
        "thought": thought,
        "answer": answer,
        "malformed": parts.reason if isinstance(parts, thoughts.Malformed) else None,
        "finish_reason": drawn.finish_reason,
        "prompt_tokens": drawn.prompt_tokens,
        "cached_tokens": drawn.cached_tokens,
        "content": bytes.fromhex(digest([thought, answer]))[:KEY_BYTES],
        "cited_verdict": thoughts.cited_verdict(thought or ""),
        "cited_clauses": thoughts.cited_clauses(thought or ""),
    }


def _grammar(policy: Policy, category: str, chat: Chat | None, config: GenerateConfig) -> str | None:
    """What holds the thoughts on prompts of a category, if anything does."""
    if config.thought_format == "native" or chat is None:
        return None
    only = category if config.guided_clauses == "category" else None
    return thoughts.grammar(policy, config.thought_characters, config.answer_characters, _begins_in_thought(chat), only)


def _begins_in_thought(chat: Chat) -> bool:
    return thoughts.opened(chat.prompt(plain_turns((Message(role="user", content="?"),))), chat)


def seed_of(base: int, name: str, number: int) -> int:
    """Seed of draw `number` on the thing whose hash is `name`: a base of its own per prompt, so that prompts are not correlated."""
    return (base + int(name[:7], 16) + number) % 2**31
