"""Seed prompts: the shipped set, reading without losing a row, and the split by scenario group."""

import copy
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import UserError
from flows.cli import app
from flows.config import RunRequest
from flows.opening import prepare
from tasks.policy import load_policy
from tasks.prompt_parts import PART_ROWS
from tasks.prompt_set import PromptSet, load_prompts
from tasks.prompts import CELLS, SPLIT_SHARES, CapabilityRow, Prompt, case_prompts, named_split, read_rows
from tasks.sources import source_files
from tasks.store import Corrupt, Store

SPECS = Path(__file__).parent.parent / "specs"
POLICY = load_policy(SPECS / "policies" / "base")
SEEDS = [item for _, _, item in read_rows(source_files(SPECS / "prompts"), POLICY)]
PROMPTS = [item for item in SEEDS if isinstance(item, Prompt)]
CAPABILITY = [item for item in SEEDS if isinstance(item, CapabilityRow)]


def loaded(folder: Path, rows: list[dict | bytes], name: str = "prompts.jsonl") -> PromptSet:
    """Rows as prompts under a root."""
    file = folder / name
    file.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return load_prompts(Store(str(folder / "root")), file, POLICY)


def _row(number: int, **changes: object) -> dict:
    return GOOD | {"id": f"row-{number}", "messages": [{"role": "user", "content": f"request {number}"}]} | changes


def _trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text.lower())
    return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}


def _text(prompt) -> str:
    return " ".join(message.content for message in prompt.messages)


def test_the_shipped_set_is_whole():
    assert not [item for item in SEEDS if isinstance(item, str)]
    cells = Counter((prompt.category, prompt.cell) for prompt in PROMPTS)
    assert cells == {(category, cell): 8 for category in POLICY.categories for cell in CELLS}
    multi = [prompt for prompt in PROMPTS if len(prompt.messages) > 1]
    assert len(multi) >= len(PROMPTS) / 10
    assert any(message.role == "tool" for prompt in multi for message in prompt.messages)
    never = {name for name, (_, clause) in POLICY.clauses.items() if clause.generate == "never"}
    assert not any(never.intersection(prompt.ideal_clauses) for prompt in PROMPTS)


def test_no_two_prompts_of_a_cell_are_alike():
    for _, group in itertools.groupby(sorted(PROMPTS, key=lambda p: (p.category, p.cell)), key=lambda p: (p.category, p.cell)):
        for one, other in itertools.combinations(list(group), 2):
            left, right = _trigrams(_text(one)), _trigrams(_text(other))
            assert len(left & right) <= 0.5 * len(left | right), (one.id, other.id)


def test_capability_thoughts_do_not_talk_about_policy():
    assert len(CAPABILITY) >= 60
    assert len({row.skill for row in CAPABILITY}) >= 8
    talk = re.compile(r"\b(polic(y|ies)|guidelines?|clauses?|refuse|comply|allowed)\b|[<>]", re.IGNORECASE)
    assert [row.id for row in CAPABILITY if talk.search(row.thought)] == []


def test_splits_go_by_scenario_group(tmp_path: Path):
    prompts = load_prompts(Store(str(tmp_path)), SPECS / "prompts", POLICY)
    cells = Counter((prompt.category, prompt.cell, split) for split in SPLIT_SHARES for prompt in prompts.prompts(split))
    for category, cell in itertools.product(POLICY.categories, CELLS):
        assert [cells[category, cell, split] for split in SPLIT_SHARES] == [4, 1, 1, 2]
    assert prompts.counts == {"prompts": 224, "capability": len(CAPABILITY), "quarantined": 0}
    assert sorted(item.id for item in prompts.capability) == sorted(item.id for item in CAPABILITY)


def test_a_group_that_names_no_split_goes_by_its_name(tmp_path: Path):
    shares = Counter(named_split(f"group {number}") for number in range(4000))
    assert all(abs(shares[split] / 4000 - share) < 0.03 for split, share in (("sft", 0.5), ("rl", 0.125), ("dev", 0.125), ("eval", 0.25)))
    rows = [_row(number, group=f"g{number // 4}", split=None) for number in range(80)]
    splits = {prompt.group: split for split in shares for prompt in loaded(tmp_path, rows).prompts(split)}
    assert splits == {f"g{number}": named_split(f"g{number}") for number in range(20)}


def test_groups_of_a_never_clause_are_for_evaluation_only(tmp_path: Path):
    """Also the rows of the group that come before the one that says so."""
    rows = [json.loads(line) for line in (SPECS / "prompts" / "erotic.jsonl").read_text().splitlines()]
    marked = next(row for row in reversed(rows) if row["group"] == "er-01" and row["ideal_verdict"] == "refuse")
    marked["ideal_clauses"] = ["ER12"]
    prompts = loaded(tmp_path, rows)
    assert {prompt.group for prompt in prompts.prompts("eval")} >= {"er-01"}
    assert all(prompt.group != "er-01" for split in ("sft", "rl", "dev") for prompt in prompts.prompts(split))
    assert sum(prompts.size(split) for split in SPLIT_SHARES) == len(rows)


def test_the_policys_cases_are_prompts_to_learn_from_but_for_those_that_are_never_generated_from(tmp_path: Path):
    store = Store(str(tmp_path))
    plain, whole = (load_prompts(store, SPECS / "prompts", POLICY, cases=cases) for cases in (False, True))
    cases = [(name, clause, case) for name, (_, clause) in POLICY.clauses.items() for case in clause.cases]
    wanted = {case.prompt: name for name, clause, case in cases if clause.generate == "always"}
    assert len(wanted) < len(cases), "the policy has a clause that is never generated from"
    known = {prompt.id for prompt in plain.prompts("sft")}
    found = [prompt for prompt in whole.prompts("sft") if prompt.id not in known]
    assert {prompt.messages[0].content: prompt.ideal_clauses[0] for prompt in found} == wanted
    assert all(prompt.category == POLICY.clauses[prompt.ideal_clauses[0]][0].id for prompt in found)
    assert len({prompt.group for prompt in found}) == len(found) and whole.path != plain.path
    assert [whole.size(split) for split in ("rl", "dev", "eval")] == [plain.size(split) for split in ("rl", "dev", "eval")]
    clause = POLICY.categories["violence"].clauses[0]
    edited = clause.model_copy(update={"cases": clause.cases[1:]})
    violence = POLICY.categories["violence"].model_copy(update={"clauses": (edited, *POLICY.categories["violence"].clauses[1:])})
    policy = replace(POLICY, categories={**POLICY.categories, "violence": violence})
    fewer = load_prompts(store, SPECS / "prompts", policy, cases=True)
    assert fewer.size("sft") == whole.size("sft") - 1, "an edited case is noticed"


def test_a_run_file_may_ask_for_the_policys_cases(tmp_path: Path):
    file, root, cases = str(SPECS / "runs" / "demo.yaml"), str(tmp_path), len(case_prompts(POLICY).rows)
    plain, more = (prepare(RunRequest(file=file, root=root, changes=[f"cases={said}"]), trains=False) for said in ("false", "true"))
    assert more.prompts.size("sft") == plain.prompts.size("sft") + cases
    shown = CliRunner().invoke(app, ["prompts", "check", file, "--root", root, "--set", "cases=true"])
    assert f"cases of base {cases} {cases} 0 0" in " ".join(shown.stdout.split())


@pytest.mark.parametrize("content", [None, b"PAR1"])
def test_a_part_that_is_gone_or_cut_short_is_made_again(tmp_path: Path, content: bytes | None):
    rows = [_row(number) for number in range(3)]
    lost = tmp_path / "root" / loaded(tmp_path, rows).parts[0].path
    lost.unlink()
    if content:
        lost.write_bytes(content)
    assert [prompt.id for prompt in loaded(tmp_path, rows).prompts("sft")] == [row["id"] for row in rows]


def test_a_part_that_holds_other_prompts_than_its_manifest_says_is_told(tmp_path: Path):
    store = Store(str(tmp_path))
    whole = load_prompts(store, SPECS / "prompts", POLICY)
    manifest = copy.deepcopy(whole.manifest)
    manifest["parts"][0]["splits"]["sft"] += 1
    with pytest.raises(Corrupt, match=r"prompts of the split 'sft', not \d+"):
        list(PromptSet(store, whole.path, manifest).prompts("sft"))


def test_prompts_are_read_once_and_again_when_they_change(tmp_path: Path):
    rows = [_row(number) for number in range(PART_ROWS + 10)]
    first = loaded(tmp_path, rows)
    assert [part.rows for part in first.parts] == [PART_ROWS, 10]
    assert loaded(tmp_path, rows).path == first.path
    changed = loaded(tmp_path, [*rows, _row(9999)])
    assert changed.path != first.path and changed.hash != first.hash
    assert [prompt.id for prompt in changed.prompts("sft")] == [row["id"] for row in rows] + ["row-9999"]


@pytest.mark.parametrize("name", ["capability", "quarantined", "overlap", "prompts", "parts"])
def test_a_category_may_have_the_name_of_what_else_is_written(tmp_path: Path, name: str):
    category = POLICY.categories["violence"].model_copy(update={"id": name})
    policy = replace(POLICY, categories={"erotic": POLICY.categories["erotic"], name: category})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(_row(number, category=name)) + "\n" for number in range(3)) + "{}\n")
    lines = [line for kind in ("erotic", "capability") for line in (SPECS / "prompts" / f"{kind}.jsonl").read_text().splitlines()]
    (tmp_path / "others.jsonl").write_text("\n".join(lines))
    prompts = load_prompts(Store(str(tmp_path / "root")), tmp_path, policy)
    found = Counter(prompt.category for split in SPLIT_SHARES for prompt in prompts.prompts(split))
    assert found == {name: 3, "erotic": 32} and len(prompts.capability) == len(CAPABILITY)
    assert prompts.counts == {"prompts": 35, "capability": len(CAPABILITY), "quarantined": 1}


OTHER = [{"role": "user", "content": "another request"}]
GOOD = json.loads((SPECS / "prompts" / "violence.jsonl").read_text().splitlines()[0]) | {"split": "sft"}


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
        (json.dumps({**GOOD, "id": "second", "messages": OTHER, "split": "eval"}).encode(), "an earlier row of group"),
        (json.dumps({**GOOD, "id": "second"}).encode(), "same as those of an earlier row"),
    ],
)
def test_a_malformed_row_is_quarantined_with_file_line_and_reason(tmp_path: Path, line: bytes, reason: str):
    prompts = loaded(tmp_path, [{**GOOD, "id": "first"}, line])
    assert [prompt.id for prompt in prompts.prompts("sft")] == ["first"]
    (bad,) = prompts.manifest["quarantined"]
    assert bad["file"].endswith("prompts.jsonl") and bad["line"] == 2 and reason in bad["reason"]
    assert prompts.counts == {"prompts": 1, "capability": 0, "quarantined": 1}


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n"])
def test_a_file_without_a_usable_prompt_stops_the_run(tmp_path: Path, content: str):
    with pytest.raises(UserError, match="not one usable prompt"):
        loaded(tmp_path, [content.encode()])


def test_a_missing_file_stops_the_run(tmp_path: Path):
    with pytest.raises(UserError, match="no such prompt file"):
        load_prompts(Store(str(tmp_path)), tmp_path / "nothing.jsonl", POLICY)
