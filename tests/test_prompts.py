"""Seed prompts: the shipped set, reading without losing a row, and the split by scenario group."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from cluster.errors import UserError
from tasks.policy import load_policy
from tasks.prompts import CELLS, load_prompts, split_groups

SPECS = Path(__file__).parent.parent / "specs"
POLICY = load_policy(SPECS / "policies" / "base")
SEEDS = load_prompts(SPECS / "prompts", POLICY)


def _trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text.lower())
    return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}


def _text(prompt) -> str:
    return " ".join(message.content for message in prompt.messages)


def test_the_shipped_set_is_whole():
    assert SEEDS.quarantined == []
    cells = Counter((prompt.category, prompt.cell) for prompt in SEEDS.prompts)
    assert cells == {(category, cell): 8 for category in POLICY.categories for cell in CELLS}
    multi = [prompt for prompt in SEEDS.prompts if len(prompt.messages) > 1]
    assert len(multi) >= len(SEEDS.prompts) / 10
    assert any(message.role == "tool" for prompt in multi for message in prompt.messages)
    never = {name for name, (_, clause) in POLICY.clauses.items() if clause.generate == "never"}
    assert not any(never.intersection(prompt.ideal_clauses) for prompt in SEEDS.prompts)


def test_no_two_prompts_of_a_cell_are_alike():
    for _, group in itertools.groupby(sorted(SEEDS.prompts, key=lambda p: (p.category, p.cell)), key=lambda p: (p.category, p.cell)):
        for one, other in itertools.combinations(list(group), 2):
            left, right = _trigrams(_text(one)), _trigrams(_text(other))
            assert len(left & right) <= 0.5 * len(left | right), (one.id, other.id)


def test_capability_thoughts_do_not_talk_about_policy():
    assert len(SEEDS.capability) >= 60
    assert len({row.skill for row in SEEDS.capability}) >= 8
    talk = re.compile(r"\b(polic(y|ies)|guidelines?|clauses?|refuse|comply|allowed)\b|[<>]", re.IGNORECASE)
    assert [row.id for row in SEEDS.capability if talk.search(row.thought)] == []


def test_splits_go_by_scenario_group():
    splits = split_groups(SEEDS.prompts, POLICY)
    cells = Counter((prompt.category, prompt.cell, splits[prompt.group]) for prompt in SEEDS.prompts)
    for category, cell in itertools.product(POLICY.categories, CELLS):
        assert [cells[category, cell, split] for split in ("sft", "rl", "eval")] == [4, 2, 2]


def test_a_split_does_not_depend_on_order_or_on_other_categories():
    splits = split_groups(SEEDS.prompts, POLICY)
    some = [prompt for prompt in reversed(SEEDS.prompts) if prompt.category == "violence"]
    assert split_groups(some, POLICY) == {group: splits[group] for group in {prompt.group for prompt in some}}


def test_groups_of_a_never_clause_are_for_evaluation_only():
    prompts = [prompt for prompt in SEEDS.prompts if prompt.category == "erotic"]
    marked = [prompt.model_copy(update={"ideal_clauses": ("ER12",)}) if prompt.group == "er-01" else prompt for prompt in prompts]
    assert split_groups(marked, POLICY)["er-01"] == "eval"


OTHER = [{"role": "user", "content": "another request"}]
GOOD = json.loads((SPECS / "prompts" / "violence.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1, 2]", "expected an object"),
        (json.dumps({**GOOD, "category": "cooking"}).encode(), "category"),
        (json.dumps({**GOOD, "ideal_clauses": ["VI99"]}).encode(), "VI99"),
        (json.dumps({**GOOD, "ideal_verdict": "comply"}).encode(), "ideal_verdict"),
        (json.dumps({**GOOD, "messages": []}).encode(), "messages"),
        (json.dumps({**GOOD, "messages": [{"role": "system", "content": "x"}]}).encode(), "role"),
        (json.dumps({**GOOD, "surprise": 1}).encode(), "surprise: unknown field"),
        (json.dumps({**GOOD, "id": "first", "messages": OTHER}).encode(), "used by an earlier row"),
        (json.dumps({**GOOD, "id": "second"}).encode(), "same as those of 'first'"),
    ],
)
def test_a_malformed_row_is_quarantined_with_file_line_and_reason(tmp_path: Path, line: bytes, reason: str):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(json.dumps({**GOOD, "id": "first"}).encode() + b"\n" + line + b"\n")
    loaded = load_prompts(file, POLICY)
    assert loaded.prompts[0].id == "first"
    assert len(loaded.quarantined) == 1
    bad = loaded.quarantined[0]
    assert bad.file == str(file) and bad.line >= 2 and reason in bad.reason


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n"])
def test_a_file_without_a_usable_prompt_stops_the_run(tmp_path: Path, content: str):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match="not one usable prompt"):
        load_prompts(file, POLICY)


def test_a_missing_file_stops_the_run(tmp_path: Path):
    with pytest.raises(UserError, match="no such prompt file"):
        load_prompts(tmp_path / "nothing.jsonl", POLICY)
