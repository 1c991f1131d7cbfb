"""The thought is split on token ids, held by the grammar, and read for what it cites."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.chat import Chat
from cluster.models import resolve_model
from tasks.policy import load_policy
from tasks.thoughts import Malformed, Parts, cited_clauses, cited_verdict, grammar, join, longest_output, split

CHAT = Chat(resolve_model("default").path)

# The default tokenizer has no token for some control characters and some bytes of unassigned ones; ordinary writing comes back whole.
WRITTEN = st.text(st.characters(max_codepoint=0x2FFF, exclude_characters="<", exclude_categories=["Cs", "Cn", "Co", "Cc"]), min_size=1)


@settings(max_examples=100, deadline=None)
@given(thought=WRITTEN, answer=WRITTEN)
def test_a_thought_comes_back_as_it_was_written(thought: str, answer: str):
    parts = split([*CHAT.text(join(thought, answer)), CHAT.end_of_turn], CHAT)
    assert isinstance(parts, Parts)
    assert (parts.thought, parts.answer) == (thought.strip(), answer.strip())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("an answer", "no_thought"),
        ("<think>\nstill thinking", "unterminated_thought"),
        ("<think>a</think>b</think>c", "several_thoughts"),
        ("<think>a<think>b</think>c", "several_thoughts"),
        ("first <think>a</think>b", "text_before_thought"),
    ],
)
def test_anything_but_one_closed_thought_is_named(text: str, reason: str):
    assert split(CHAT.text(text), CHAT) == Malformed(reason)


def test_the_answer_begins_after_the_thoughts_tokens():
    ids = CHAT.text(join("A thought.", "An answer."))
    parts = split(ids, CHAT)
    assert isinstance(parts, Parts)
    assert CHAT.decode(ids[parts.thought_tokens :]).strip() == "An answer."
    assert "answer" not in CHAT.decode(ids[: parts.thought_tokens])


def test_a_thought_is_read_for_verdict_and_clauses():
    thought = "This is about SH4 and VI2.\nClauses: SH4, SH1\nVerdict: safe_complete"
    assert cited_verdict(thought) == "safe_complete"
    assert cited_clauses(thought) == ["SH4", "SH1"]
    assert cited_clauses("Clause VI2 fits, not SH4.") == ["VI2", "SH4"]
    assert cited_verdict("I would comply.") is None


def test_the_grammar_offers_every_clause_and_verdict_and_fits_its_bound():
    policy = load_policy("specs/policies/base")
    text = grammar(policy, 100, 200)
    assert all(f'"{name}"' in text for name in policy.clauses)
    longest = join("\U00010348" * 100 + "\nClauses: ER10, ER10\nVerdict: safe_complete", "\U00010348" * 200)
    assert len(CHAT.text(longest)) + 1 <= longest_output(policy, 100, 200)
