"""The fake engine: deterministic, obedient to grammars and schemas, faulty as configured; and what surrounds every engine."""

import asyncio
import json
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster import fake_text, serving
from cluster.chat import Turn, chat_of
from cluster.engine import Completion, EngineConfig, EngineDied, FakeConfig, Sampling
from cluster.errors import SpecmillError
from cluster.fake_engine import FakeEngine, fake_model
from cluster.serving import Metered, NotAnswered, Served
from tasks import thoughts
from tasks.complete import GenerateConfig, Request, requests
from tasks.judge import SUBSCORES_FULL, _schema, parse_scores
from tasks.policy import load_policy

POLICY = load_policy(Path(__file__).parent.parent / "specs" / "policies" / "base")
PROMPT = [Turn(role="user", content="What is this?")]


def engine(**fake: Any) -> FakeEngine:
    config = EngineConfig(backend="fake", fake=FakeConfig(**fake))
    return FakeEngine(fake_model(config), config)


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await work

    return asyncio.run(main())


def draw(fake: FakeEngine, seed: int = 1, **how: Any) -> Completion:
    return run(fake.complete(PROMPT, Sampling(1.0, how.pop("max_tokens", 512), seed, **how)))


def test_an_answer_depends_on_prompt_and_seed_alone() -> None:
    first = draw(engine())
    assert draw(engine()) == first and first.finish_reason == "stop"
    assert draw(engine(), seed=2) != first and draw(engine(seed=9)) != first


def test_a_long_answer_is_cut() -> None:
    drawn = draw(engine(), max_tokens=3, logprobs=True)
    assert drawn.finish_reason == "length" and len(drawn.token_ids) == len(drawn.logprobs) == 3


def test_it_obeys_the_grammar_of_thoughts_and_the_schema_of_verdicts() -> None:
    fake = engine()
    chat = chat_of(fake_model(fake.config).path)
    held = thoughts.grammar(POLICY, 120, 120)
    for seed in range(50):
        parts = thoughts.split(draw(fake, seed, grammar=held).token_ids, chat)
        assert isinstance(parts, thoughts.Parts) and parts.answer
        assert thoughts.cited_verdict(parts.thought) and set(thoughts.cited_clauses(parts.thought)) <= set(POLICY.clauses)
        raw = draw(fake, seed, json_schema=_schema(4)).text
        assert parse_scores(raw, SUBSCORES_FULL)


def test_a_run_may_offer_a_thought_the_clauses_of_its_category_alone() -> None:
    fake = engine()
    chat = chat_of(fake_model(fake.config).path)

    def cited(asked: Request) -> set[str]:
        drawn = [thoughts.split(draw(fake, seed, grammar=asked.grammar, max_tokens=5120).token_ids, chat) for seed in range(20)]
        return {name for parts in drawn if isinstance(parts, thoughts.Parts) for name in thoughts.cited_clauses(parts.thought)}

    of_bundle, of_category = (
        requests(POLICY, fake_model(fake.config), GenerateConfig(engine=fake.config, thought_characters=60, guided_clauses=whose))
        for whose in ("bundle", "category")
    )
    for category in POLICY.categories.values():
        own = {clause.id for clause in category.clauses}
        assert not cited(of_bundle[category.id]) <= own
        assert cited(of_category[category.id]) and cited(of_category[category.id]) <= own
    assert len({asked.template for asked in of_bundle.values()}) == 1
    assert not {asked.prefix for asked in of_bundle.values()} & {asked.prefix for asked in of_category.values()}, (
        "no row is taken for another's"
    )


def test_a_malformed_answer_ignores_the_schema() -> None:
    fake = engine(malformed=1.0)
    raw = draw(fake, json_schema=_schema(4)).text
    assert parse_scores(raw, SUBSCORES_FULL) is None


def test_fakes_with_other_answers_are_other_models() -> None:
    models = [fake_model(EngineConfig(backend="fake", fake=fake)) for fake in (FakeConfig(), FakeConfig(seed=1), FakeConfig(drop=0.5))]
    assert models[0] == models[2] != models[1] and models[0].id == "fake"


@pytest.mark.parametrize("grammar", ["root = 'a'", 'start ::= "a"', 'root ::= "a" & "b"'])
def test_an_unknown_grammar_is_refused(grammar: str) -> None:
    with pytest.raises(ValueError, match=r"grammar|rule"):
        fake_text.from_grammar(grammar)


def test_an_unknown_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="schema"):
        fake_text.from_schema(json.dumps({"type": "null"}))


def served(fake: FakeEngine, **config: Any) -> Metered:
    return Metered(Served(fake, fake.config.model_copy(update=config)))


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked again is asked soon."""
    monkeypatch.setattr(serving, "LONGEST_PAUSE", 0.1)


def test_what_is_not_answered_is_asked_again_and_counted(short_pauses: None) -> None:
    metered = served(engine(drop=0.5), attempts=20)
    for seed in range(4):
        run(metered.complete(PROMPT, Sampling(1.0, 8, seed)))
    assert metered.usage.requests == 4 and metered.usage.retries > 0
    assert metered.usage.prompt_tokens == 4 * draw(engine()).prompt_tokens and metered.usage.completion_tokens == 4 * 8


def test_what_fails_while_others_are_answered_is_given_up(short_pauses: None) -> None:
    metered = served(engine(error=0.97, latency_seconds=0.01), attempts=2)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(metered.complete(PROMPT, Sampling(1.0, 8, seed)) for seed in range(50)), return_exceptions=True)

    given_up = [became for became in asyncio.run(all_of_them()) if not isinstance(became, Completion)]
    assert given_up and all(isinstance(error, NotAnswered) and "the last: the fake engine answered" in str(error) for error in given_up)


def test_a_request_that_hangs_alone_is_given_up_by_an_engine_that_answers_others(short_pauses: None) -> None:
    class Selective(FakeEngine):
        """Never answers one prompt."""

        async def complete(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
            if turns == PROMPT:
                await asyncio.Event().wait()
            return await super().complete(turns, sampling)

    plain = engine()
    metered = served(Selective(fake_model(plain.config), plain.config), attempts=2, request_seconds=0.3, stuck_seconds=60)
    with pytest.raises(NotAnswered, match=r"3 attempts; the last: not answered in 0\.3 s"):
        run(metered.complete(PROMPT, Sampling(1.0, 8, 1)))


def test_a_request_that_has_no_memory_is_given_up_by_an_engine_that_answers_others(short_pauses: None) -> None:
    class Small(FakeEngine):
        """Has no memory for one prompt."""

        async def complete(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
            if turns == PROMPT:
                raise MemoryError
            return await super().complete(turns, sampling)

    plain = engine()
    metered = served(Small(fake_model(plain.config), plain.config), attempts=2)
    with pytest.raises(NotAnswered, match="the last: out of memory"):
        run(metered.complete(PROMPT, Sampling(1.0, 8, 1)))


def test_an_engine_that_answers_nobody_ends_the_run_and_gives_nothing_up(short_pauses: None) -> None:
    with pytest.raises(SpecmillError, match=r"500.*0\.5 s\. What is made is kept"):
        run(served(engine(error=1.0), attempts=2, request_seconds=0.5).complete(PROMPT, Sampling(1.0, 8, 1)))


def test_an_engine_stalls_from_a_request_on() -> None:
    async def answers(stalling: FakeEngine) -> list[bool]:
        tries = [asyncio.wait({asyncio.ensure_future(stalling.complete(PROMPT, Sampling(1.0, 8, 1)))}, timeout=0.5) for _ in range(3)]
        return [bool((await each)[0]) for each in tries]

    assert asyncio.run(answers(engine(stall_at=2))) == [True, False, False]


def test_an_engine_that_answers_nothing_is_declared_dead() -> None:
    started = time.monotonic()
    with pytest.raises(EngineDied, match=r"0\.3 s"):
        run(served(engine(hang=1.0), stuck_seconds=0.3).complete(PROMPT, Sampling(1.0, 8, 1)))
    assert time.monotonic() - started < 5


def test_a_slow_request_is_asked_again_while_others_are_answered(short_pauses: None) -> None:
    """The watchdog looks at the engine, the time-out at the request."""
    metered = served(engine(hang=0.3, latency_seconds=0.05), request_seconds=0.5, stuck_seconds=60, attempts=20)

    async def all_of_them() -> list[Completion]:
        return await asyncio.gather(*(metered.complete(PROMPT, Sampling(1.0, 8, seed)) for seed in range(12)))

    assert len(asyncio.run(all_of_them())) == 12 and metered.usage.retries > 0


def test_an_engine_of_our_own_that_has_just_answered_is_asked_nothing_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = engine()
    draw = fake.complete

    async def choosy(turns: list[Turn], sampling: Sampling) -> Completion:
        if turns[-1]["content"] == "too long":
            raise ValueError("too long")
        return await draw(turns, sampling)

    monkeypatch.setattr(fake, "complete", choosy)
    metered = served(fake)
    run(metered.complete(PROMPT, Sampling(1.0, 8, 1)))
    with pytest.raises(ValueError, match="too long"):
        run(metered.complete([Turn(role="user", content="too long")], Sampling(1.0, 8, 2)))
    assert metered.usage.requests == 1


def test_busy_time_is_that_with_a_request_in_flight() -> None:
    fake = engine(latency_seconds=0.2, latency_spread=0)
    around = Served(fake, fake.config)

    async def work() -> tuple[float, float]:
        metered = Metered(around)
        await asyncio.gather(*(metered.complete(PROMPT, Sampling(1.0, 8, seed)) for seed in range(3)))
        await asyncio.sleep(0.3)
        return around.busy_seconds(), around.busy_seconds()

    busy, again = asyncio.run(work())
    assert 0.19 <= busy < 0.29 and again == 0
