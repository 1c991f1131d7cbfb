"""The thought is split on token ids, held by the grammar, and read for what it cites."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.chat import Chat
from cluster.models import copy_tokenizer, resolve_model
from tasks.policy import load_policy
from tasks.thoughts import Malformed, Parts, cited_clauses, cited_verdict, grammar, join, longest_output, opened, split


def with_markers(begun: bool) -> Chat:
    """The default tokenizer with tokens for the markers, as reasoning models have them; `begun`: the template opens the thought."""
    folder = Path(tempfile.mkdtemp(prefix="markers-"))
    copy_tokenizer(Path(resolve_model("default").path), folder)
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    first = 1 + max(definition["model"]["vocab"].values())
    definition["added_tokens"] += [{"id": first + n, "content": text, **flags} for n, text in enumerate(("<think>", "</think>"))]
    file.write_text(json.dumps(definition))
    turns = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(turns + "<|im_start|>assistant\n" + ("<think>\n" if begun else ""))
    return Chat(str(folder))


CHAT = Chat(resolve_model("default").path)
CHATS = {"spelled": CHAT, "tokens": with_markers(begun=False), "begun by the template": with_markers(begun=True)}
TALK = [{"role": "user", "content": "Hello"}]

# The default tokenizer has no token for some control characters and some bytes of unassigned ones; ordinary writing comes back whole.
WRITTEN = st.text(st.characters(max_codepoint=0x2FFF, exclude_characters="<", exclude_categories=["Cs", "Cn", "Co", "Cc"]), min_size=1)


@pytest.mark.parametrize("kind", CHATS)
@settings(max_examples=100, deadline=None)
@given(thought=WRITTEN, answer=WRITTEN)
def test_a_thought_comes_back_as_it_was_written(kind: str, thought: str, answer: str):
    chat = CHATS[kind]
    begun = opened(chat.prompt(TALK), chat)
    assert begun == (kind == "begun by the template")
    parts = split([*join(thought, answer, chat, begun), chat.end_of_turn], chat, begun)
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
        ("a</think>b", "unopened_thought"),
    ],
)
def test_anything_but_one_closed_thought_is_named(text: str, reason: str):
    assert split(CHAT.text(text), CHAT) == Malformed(reason)


def test_a_marker_that_a_special_token_parts_is_one_in_the_text():
    special = next(token for name, token in CHAT.added.items() if token != CHAT.end_of_turn and not CHAT.decode([token]))
    forged = [*CHAT.text("<think>a<"), special, *CHAT.text("think>b</think>c")]
    assert split(forged, CHAT) == Malformed("several_thoughts")


def test_nothing_is_read_beyond_the_end_of_the_turn():
    assert split([*CHAT.text("<think>a"), CHAT.end_of_turn, *CHAT.text("</think>b")], CHAT) == Malformed("unterminated_thought")
    beyond = split([*join("a", "b", CHAT), CHAT.end_of_turn, *CHAT.text("c<think>")], CHAT)
    assert isinstance(beyond, Parts) and (beyond.thought, beyond.answer) == ("a", "b")


def test_text_that_spells_a_marker_is_none_where_markers_are_tokens():
    chat = CHATS["tokens"]
    assert split(chat.text("<think>a</think>b"), chat) == Malformed("no_thought")
    parts = split(join("</think> spelled", "<think> as well", chat), chat)
    assert isinstance(parts, Parts) and (parts.thought, parts.answer) == ("</think> spelled", "<think> as well")


def test_the_answer_begins_after_the_thoughts_tokens():
    ids = join("A thought.", "An answer.", CHAT)
    parts = split(ids, CHAT)
    assert isinstance(parts, Parts)
    assert CHAT.decode(ids[parts.thought_tokens :]).strip() == "An answer."
    assert "answer" not in CHAT.decode(ids[: parts.thought_tokens])


def test_a_thought_is_read_for_verdict_and_clauses():
    thought = "This is about SH4 and VI2.\nClauses: SH4, SH1\nVerdict: safe_complete"
    assert cited_verdict(thought) == "safe_complete"
    assert cited_clauses(thought) == ["SH4", "SH1"]
    assert cited_clauses("Vitamin B12 helped.") == []
    assert cited_verdict("I would comply.") is None


def test_the_grammar_offers_every_clause_and_verdict_and_fits_its_bound():
    policy = load_policy("specs/policies/base")
    text = grammar(policy, 100, 200)
    assert all(f'"{name}"' in text for name in policy.clauses)
    longest = join("\U00010348" * 100 + "\nClauses: ER10, ER10\nVerdict: safe_complete", "\U00010348" * 200, CHAT)
    assert len(longest) + 1 <= longest_output(policy, 100, 200)


def test_the_grammar_can_offer_the_clauses_of_one_category_alone():
    policy = load_policy("specs/policies/base")
    text = grammar(policy, 100, 200, category="violence")
    assert {name for name in policy.clauses if f'"{name}"' in text} == {clause.id for clause in policy.categories["violence"].clauses}
