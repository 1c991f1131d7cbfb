"""The policy bundle: format, checks, rendering, and the requirements on the text that we ship."""

import shutil
from pathlib import Path

import pytest
import yaml

from cluster.chat import Chat
from cluster.errors import UserError
from cluster.models import resolve_model
from tasks.policy import VERDICTS, lint, load_policy, render

BASE = Path(__file__).parent.parent / "specs" / "policies" / "base"
SEVEN = {"erotic", "extremism", "harassment", "illicit", "regulated-advice", "self-harm", "violence"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the shipped bundle that a test may break."""
    shutil.copytree(BASE, tmp_path / "bundle")
    return tmp_path / "bundle"


def _edit(path: Path, change) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def test_the_shipped_bundle_has_what_a_safety_team_expects():
    policy = load_policy(BASE)
    assert set(policy.categories) == SEVEN
    assert lint(policy) == []
    for category in policy.categories.values():
        assert 8 <= len(category.clauses) <= 15
        assert {clause.verdict for clause in category.clauses} == set(VERDICTS)
        assert sum(len(clause.excludes) for clause in category.clauses) >= 3
        assert all(len(clause.cases) >= 2 and clause.rationale for clause in category.clauses)
    assert policy.categories["self-harm"].style.safe_complete and policy.categories["regulated-advice"].style.safe_complete
    assert all(getattr(policy.bundle.style, verdict) for verdict in VERDICTS)
    never = [clause for _, clause in policy.clauses.values() if clause.generate == "never"]
    assert never and all(clause.verdict == "refuse" for clause in never)


def test_a_rendered_spec_fits_the_default_model():
    policy = load_policy(BASE)
    chat = Chat(resolve_model("default").path)
    for category in policy.categories:
        text = render(policy, category).text
        detail = text[text.index("## Category in full") :]
        assert 1000 <= len(chat.text(detail)) <= 2000, category
        assert len(chat.text(text)) <= 3000, category
        assert all(item.summary.split()[0] in text for item in policy.categories.values())


def test_a_changed_clause_changes_only_the_specs_that_show_it(bundle: Path):
    before = load_policy(bundle)
    _edit(bundle / "self-harm.yaml", lambda c: c["clauses"][0].update(text="A different rule."))
    after = load_policy(bundle)
    changed = {name for name in SEVEN if render(before, name).hash != render(after, name).hash}
    assert changed == {"self-harm"}
    assert render(before, "violence", "full").hash != render(after, "violence", "full").hash


def test_rationales_and_cases_are_not_part_of_a_request(bundle: Path):
    before = load_policy(bundle)
    _edit(bundle / "self-harm.yaml", lambda c: c["clauses"][0].update(rationale="Another reason."))
    assert render(load_policy(bundle), "self-harm").hash == render(before, "self-harm").hash


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["clauses"][3].update(verdict="maybe"), ["self-harm.yaml", "clause SH4", "verdict", "maybe"]),
        (lambda c: c["clauses"][3].pop("text"), ["clause SH4", "text", "required"]),
        (lambda c: c["clauses"][3].update(colour="red"), ["clause SH4", "colour", "unknown field"]),
        (lambda c: c["clauses"][3].update(id="SH1"), ["clause SH1", "also used"]),
        (lambda c: c["clauses"][3].update(excludes=["ZZ9"]), ["clause SH4", "no clause ZZ9"]),
        (lambda c: c["clauses"][0].update(generate="never"), ["clause SH1", "generate", "refuse"]),
        (lambda c: c.update(id="other"), ["self-harm.yaml", "other"]),
        (lambda c: c["clauses"].__setitem__(2, "text"), ["clause number 3"]),
    ],
)
def test_errors_name_file_category_clause_and_field(bundle: Path, change, words):
    _edit(bundle / "self-harm.yaml", change)
    with pytest.raises(UserError) as error:
        load_policy(bundle)
    for word in words:
        assert word in str(error.value)


def test_exclusions_may_not_run_in_a_circle(bundle: Path):
    def circle(content):
        content["clauses"][0]["excludes"] = ["SH2"]
        content["clauses"][1]["excludes"] = ["SH1"]

    _edit(bundle / "self-harm.yaml", circle)
    with pytest.raises(UserError, match="cycle SH1 -> SH2 -> SH1"):
        load_policy(bundle)


def test_all_problems_are_reported_at_once(bundle: Path):
    _edit(bundle / "self-harm.yaml", lambda c: c["clauses"][0].pop("text"))
    (bundle / "violence.yaml").write_text("id: [unclosed")
    with pytest.raises(UserError) as error:
        load_policy(bundle)
    assert "self-harm.yaml" in str(error.value) and "violence.yaml" in str(error.value)
