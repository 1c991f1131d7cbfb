"""What changes pays, and nothing else: plan and run after an edit of the policy, of the prompts, of n, k and threshold.

Prefect, Ray and the store are real; the engines are fake, since it is counted here what they are asked.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import RunRequest
from flows.inspect import problems
from flows.plan import Estimate, Line, describe_plan, plan
from flows.workspace import prepare

pytestmark = pytest.mark.slow
SPECS = Path(__file__).parent.parent / "specs"


@pytest.fixture(scope="module")
def servers() -> Iterator[None]:
    """One Prefect server and one Ray for all runs of this file."""
    import ray
    from prefect.testing.utilities import prefect_test_harness

    from cluster.session import ray_session

    with prefect_test_harness(server_startup_timeout=180), ray_session(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield


@pytest.fixture(scope="module")
def folder(servers: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of policy and prompts, and a run that is done."""
    folder = tmp_path_factory.mktemp("incremental")
    shutil.copytree(SPECS / "policies" / "base", folder / "policy")
    shutil.copytree(SPECS / "prompts", folder / "prompts")
    engine = {"backend": "fake", "engines": 2, "max_num_seqs": 32}
    content = {
        "version": 1,
        "name": "incremental",
        "root": str(folder / "root"),
        "policy": "policy",
        "prompts": "prompts",
        "generate": {"engine": engine, "n": 2, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800},
        "judge": {"engine": engine, "k": 2},
        "select": {"threshold": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    regenerate(folder)
    return folder


def request(folder: Path, *changes: str) -> RunRequest:
    return RunRequest(file=str(folder / "run.yaml"), changes=list(changes))


def regenerate(folder: Path, *changes: str) -> Any:
    """Runs the flow; returns the dataset."""
    from flows.regenerate import regenerate as flow

    dataset = flow(request(folder, *changes))
    assert problems(str(folder / "root"))[0] == []
    return dataset


def planned(folder: Path, *changes: str) -> dict[tuple[str, str], Line]:
    lines, _ = plan(prepare(request(folder, *changes)))
    return {(line.stage, line.category): line for line in lines if line.to_do}


def asked(folder: Path, stage: str) -> int:
    """Requests of all ledger entries so far."""
    entries = [json.loads(file.read_text()) for file in sorted((folder / "root" / stage / "ledger").glob("*.json"))]
    return sum(entry["usage"]["requests"] for entry in entries)


def test_a_finished_run_has_nothing_to_do(folder: Path) -> None:
    before = asked(folder, "completions"), asked(folder, "judgements")
    assert before == (224, 448) and planned(folder) == {}
    dataset = regenerate(folder, "generate.engine.engines=1", "generate.shard_rows=5", "select.threshold=2")
    assert (asked(folder, "completions"), asked(folder, "judgements")) == before, "neither worker count nor shard size nor threshold"
    assert dataset.manifest["rows"] < 224


@pytest.mark.parametrize(
    ("change", "completions", "verdicts", "reason"),
    [
        ("generate.n=3", 112, 224, "more samples"),
        ("judge.k=3", 0, 224, "more runs"),
        ("judge.temperature=0.5", 0, 448, "judge changed"),
        ("generate.temperature=0.5", 224, 448, "sampling changed"),
        ("generate.placement=user", 224, 448, "template changed"),
        ("generate.engine.fake.seed=5", 224, 448, "model changed"),
    ],
)
def test_the_plan_says_what_a_change_costs_and_why(folder: Path, change: str, completions: int, verdicts: int, reason: str) -> None:
    lines = planned(folder, change).values()
    counts = {stage: sum(line.to_do for line in lines if line.stage == stage) for stage in ("complete", "judge")}
    assert counts == {"complete": completions, "judge": verdicts}
    stage = "complete" if completions else "judge"
    assert {name for line in lines if line.stage == stage for name in line.reasons} == {reason}


def edit_clause(folder: Path) -> None:
    file = folder / "policy" / "violence.yaml"
    file.write_text(file.read_text().replace("text: ", "text: In all cases, ", 1))


def add_prompts(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "prompts" / "violence.jsonl").read_text().splitlines()[:4]]
    with (folder / "prompts" / "more.jsonl").open("w") as stream:
        for row in rows:
            messages = [{"role": "user", "content": f"Once more: {row['messages'][-1]['content']}"}]
            stream.write(json.dumps(row | {"id": f"new-{row['id']}", "group": "new", "split": "sft", "messages": messages}) + "\n")


@pytest.mark.parametrize(("edit", "reason", "rows"), [(edit_clause, "spec changed", 32), (add_prompts, "new prompt", 8)])
def test_an_edit_touches_exactly_what_it_concerns(folder: Path, edit: Callable[[Path], None], reason: str, rows: int) -> None:
    regenerate(folder)
    before = asked(folder, "completions"), asked(folder, "judgements")
    edit(folder)
    lines = planned(folder)
    assert set(lines) == {("complete", "violence"), ("judge", "violence")}
    assert lines["complete", "violence"].reasons == {reason: rows}
    regenerate(folder)
    assert asked(folder, "completions") - before[0] == rows
    assert asked(folder, "judgements") - before[1] == 2 * rows
    assert planned(folder) == {}


def test_the_plan_is_told_in_words(folder: Path) -> None:
    text = describe_plan(*plan(prepare(request(folder, "generate.n=3"))))
    assert "more samples" in text and "prompt tokens" in text and "minutes on 2 engines" in text
    assert "nothing was made under this root" in describe_plan([], [Estimate("completions", 5, None, 1)])
    assert "nothing to do" in describe_plan([], [Estimate("completions", 0, None, 1)])
