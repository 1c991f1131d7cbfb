"""A deterministic engine without a model: for tests of faults and of scale, and for trying a run file. Never a default.

What it says depends on the prompt and the seed alone, as with a real engine. It obeys grammars and schemas. Latency, length and faults are
configured; a fault strikes the requests that the seed chooses, so that a test knows which.
"""

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from random import Random

from cluster import fake_text
from cluster.chat import LONG_TEXT, Turn, chat_of
from cluster.engine import Completion, EngineConfig, EngineDied, Sampling, Unavailable, request_ids
from cluster.errors import UserError
from cluster.models import Model, resolve_model

CHARACTERS_PER_TOKEN = 4
FREE_CHARACTERS = 80
"""Length of what is said when neither grammar nor schema holds it."""


def fake_model(config: EngineConfig) -> Model:
    """What rows name as their model: not the one whose tokenizer the fake engine borrows, and another for each seed and share of faults."""
    identity = config.fake.model_dump(include={"seed", "malformed"})
    revision = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Model(resolve_model(config.model, config.revision).path, "fake", revision)


class FakeEngine:
    """Answers after a while, as `EngineConfig.fake` says."""

    def __init__(self, model: Model, config: EngineConfig) -> None:
        self.config, self.fake = config, config.fake
        self._chat = chat_of(model.path)
        self._end = self._chat.end_of_turn
        self._room = asyncio.Semaphore(config.max_num_seqs)
        self._asked = 0
        self._struck: Counter[str] = Counter()
        """Request -> how often a fault struck it."""

    async def start(self) -> None:
        """Takes as long as configured. Raises EngineDied if so told."""
        await asyncio.sleep(self.fake.start_seconds)
        if self.fake.die_at == 0:
            raise EngineDied("the fake engine was told to die while it starts")

    async def complete(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
        """Draws one completion; see `Engine.complete`."""
        fake, prompt = self.fake, request_ids(self._chat, turns, sampling, self.config) if self.fake.tokenizes else []
        name = _name(fake.seed, sampling.seed, turns)
        async with self._room:
            self._asked += 1
            if fake.die_at and self._asked >= fake.die_at:
                raise EngineDied(f"the fake engine was told to die at request {fake.die_at}")
            if fake.stall_at and self._asked >= fake.stall_at:
                await asyncio.Event().wait()
            if fake.die_on and any(fake.die_on in turn["content"] for turn in turns):
                raise EngineDied(f"the fake engine was told to die of {fake.die_on!r}")
            if fake.latency_seconds:
                await asyncio.sleep(fake.latency_seconds * math.exp(fake.latency_spread * Random(name).gauss(0, 1)))
            malformed = await self._strike(name)
            text = fake_text.words(Random(name), FREE_CHARACTERS) if malformed else self._text(Random(name), sampling)
        ids = [*self._chat.text(text), self._end]
        reason = "length" if len(ids) > sampling.max_tokens else "stop"
        ids = ids[: sampling.max_tokens]
        logprobs = [-1.0] * len(ids) if sampling.logprobs else []
        length = len(prompt) or sum(len(turn["content"]) for turn in turns) // CHARACTERS_PER_TOKEN
        return Completion(self._chat.decode(ids), reason, length, 0, len(ids), prompt, ids, logprobs)

    async def load_weights(self, path: str, version: int) -> None:
        """There is no policy to train or evaluate."""
        raise UserError("a fake engine takes no weights: run the flow `regenerate` alone, or name a real engine for `evaluate`.")

    async def stop(self) -> None:
        """There is nothing to end."""

    async def _strike(self, name: str) -> bool:
        """Brings about the fault that this attempt meets; returns whether its answer is malformed."""
        fake, fate = self.fake, Random(f"{name}/{self._struck[name]}").random() if self._faulty else 1.0
        faults = {"hang": fake.hang, "drop": fake.drop, "error": fake.error, "malformed": fake.malformed}
        for fault, share in faults.items():
            fate -= share
            if fate >= 0:
                continue
            self._struck[name] += 1
            if fault == "hang":
                await asyncio.Event().wait()
            if fault == "malformed":
                return True
            raise Unavailable("the fake engine dropped the connection" if fault == "drop" else "the fake engine answered with status 500")
        return False

    @property
    def _faulty(self) -> bool:
        return bool(self.fake.hang or self.fake.drop or self.fake.error or self.fake.malformed)

    def _text(self, random: Random, sampling: Sampling) -> str:
        if sampling.grammar:
            return fake_text.from_grammar(sampling.grammar)(random)
        if sampling.json_schema:
            return fake_text.from_schema(sampling.json_schema)(random)
        return fake_text.words(random, FREE_CHARACTERS)


def _name(engine_seed: int, seed: int, turns: Sequence[Turn]) -> str:
    """Hash of a request, from which all that becomes of it follows."""
    name = hashlib.sha256(f"{engine_seed}/{seed}".encode())
    for turn in turns:
        name.update(_text_hash(turn["content"]) if len(turn["content"]) > LONG_TEXT else turn["content"].encode())
        name.update(turn["role"].encode())
    return name.hexdigest()


@lru_cache(maxsize=64)
def _text_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
