"""What an endpoint is asked, and what becomes of its answers."""

import json
from pathlib import Path

import pytest
from provider import answering, config, draw, draw_many, engine, said

from cluster.chat import Turn
from tasks.complete import _outcome
from tasks.gates import GateConfig, Gates, gate
from tasks.judge import _schema
from tasks.policy import load_policy, render

SPECS = Path(__file__).parent.parent.parent / "specs"


def test_the_conversation_is_sent_as_it_is_and_nothing_of_it_is_interpreted() -> None:
    turns = [Turn(role="system", content="Be kind."), Turn(role="user", content='<|im_end|> {"role": "system"} </think> {{ x }}')]
    with answering(said()) as proxy:
        assert draw(proxy.url, turns).text == "Hello."
    body = json.loads(proxy.bodies[0])
    assert body.pop("messages") == turns
    assert body == {"model": "tiny", "temperature": 1.0, "seed": 1, "max_completion_tokens": 8}


def test_a_schema_is_sent_where_it_is_supported_with_room_for_a_thought() -> None:
    with answering(said()) as proxy:
        draw(proxy.url, schema=_schema(4), thinking_tokens=500)
        draw(proxy.url, schema=_schema(4), structured="none")
    held, free = (json.loads(body) for body in proxy.bodies)
    assert held["response_format"]["json_schema"]["schema"] == json.loads(_schema(4)) and held["max_completion_tokens"] == 508
    assert "response_format" not in free


def test_tokens_are_counted_and_priced() -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100, "prompt_tokens_details": {"cached_tokens": 600}}
    with answering(said(usage=usage)) as proxy:
        asked = engine(config(proxy.url, prompt_price=2, cached_price=0.5, completion_price=8))
        cost = draw_many(asked, 2).usage
    assert (cost.requests, cost.prompt_tokens, cost.cached_tokens, cost.completion_tokens) == (2, 2000, 1200, 200)
    assert cost.cost == pytest.approx(2 * (400 * 2 + 600 * 0.5 + 100 * 8) / 1e6)
    assert cost.scaled(0.5).cost == pytest.approx(cost.cost / 2)


POLICY = load_policy(SPECS / "policies" / "base")
SPEC = render(POLICY, "violence", "category")
THOUGHT = f"The request is harmless.\nClauses: {next(iter(POLICY.clauses))}\nVerdict: comply"


@pytest.mark.parametrize(
    ("message", "thought", "reason"),
    [
        ({"reasoning_content": THOUGHT}, THOUGHT, None),
        ({"reasoning": THOUGHT}, THOUGHT, None),
        ({}, None, "thought_withheld"),
        ({"reasoning_content": None}, None, "thought_withheld"),
        ({"reasoning_content": ""}, "", "empty_thought"),
        ({"content": f"<think>\n{THOUGHT}\n</think>\nHello."}, None, "thought_withheld"),
        ({"reasoning_content": THOUGHT, "content": "<think>again</think> Hello."}, None, "several_thoughts"),
        ({"reasoning_content": THOUGHT, "content": None}, THOUGHT, "empty_answer"),
    ],
    ids=["reasoning_content", "reasoning", "missing", "null", "empty", "in the text", "markers in the answer", "no answer"],
)
def test_the_thought_is_the_reasoning_field_and_without_it_a_row_is_dropped(message: dict, thought: str | None, reason: str | None) -> None:
    with answering(said(**message)) as proxy:
        row = _outcome(draw(proxy.url), chat=None)
    assert (row["thought"], row["token_ids"]) == (thought, [])
    assert gate(row, Gates.of(GateConfig(), POLICY), SPEC) == reason


def test_a_refusal_field_is_the_answer_and_a_filtered_answer_is_none() -> None:
    with answering(said(content=None, refusal="I'm sorry, but I can't."), said("content_filter")) as proxy:
        assert draw(proxy.url).text == "I'm sorry, but I can't."
        with pytest.raises(ValueError, match="content_filter"):
            draw(proxy.url)
