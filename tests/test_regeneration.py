"""What the data stages make of engines that are late, talk nonsense, stall or die: on real Ray actors, by the steps of the flow.

The engines are fake and say what their seed says, so that it is known what has to come of it.
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import RUN, write_run
from typer.testing import CliRunner

from cluster.pool import Pool
from flows.cli import app
from flows.config import RunRequest
from flows.inspect import problems
from flows.opening import opened, prepare
from flows.plan import plan
from flows.steps import complete_and_judge_step, select_step
from flows.workspace import Workspace
from tasks.judge import audited
from tasks.keyset import keys_of
from tasks.ledger import Ledger
from tasks.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
PROMPTS = 16
STAGES = ("completions", "judgements")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A run of sixteen prompts in two categories, two completions a shard."""
    file = write_run(tmp_path)
    content = RUN | {"root": str(tmp_path / "root"), "generate": RUN["generate"] | {"shard_rows": 2}}
    file.write_text(yaml.safe_dump(content))
    return file


def regenerate(file: Path, *changes: str) -> Workspace:
    """Runs the steps; returns the run."""
    with opened(RunRequest(file=str(file), changes=list(changes)), trains=False) as run:
        complete_and_judge_step.fn(run)
        select_step.fn(run)
    assert problems(run.store.root)[0] == []
    return run


def rows(run: Workspace, stage: str) -> list[dict[str, Any]]:
    return [row for shard in Ledger(run.store, stage).shards() for row in run.store.read_table(shard.path).to_pylist()]


def usage(file: Path, stage: str, name: str) -> float:
    """A sum over all entries of a ledger, read as what they are: JSON files."""
    entries = (file.parent / "root" / stage / "ledger").glob("0*.json")
    return sum(float(json.loads(entry.read_text())["usage"][name]) for entry in entries)


def test_what_is_drawn_is_judged_while_more_is_drawn(file: Path) -> None:
    slow = [f"{stage}.engine.{field}" for stage in ("generate", "judge") for field in ("fake.latency_seconds=0.1", "max_num_seqs=2")]
    regenerate(file, *slow)
    times = {stage: [path.stat().st_mtime for path in (file.parent / "root" / stage / "shards").iterdir()] for stage in STAGES}
    assert sorted(times["judgements"])[2] < max(times["completions"])


def test_a_run_of_the_judge_below_the_threshold_is_the_last_one_but_for_audited_rows(file: Path) -> None:
    run = regenerate(file, "select.threshold=2", "judge.k=3", "judge.audit_share=0.3")
    given: dict[bytes, dict[int, int]] = defaultdict(dict)
    for row in rows(run, "judgements"):
        given[row["completion_key"]][row["run"]] = row["score"]
    known = {key: bool(audited(keys_of([key]), run.config.judge)[0]) for key in given}
    assert len(given) == PROMPTS and 0 < sum(known.values()) < PROMPTS
    for key, scores in given.items():
        low = [number for number in sorted(scores) if scores[number] < 2]
        wanted = range(3) if known[key] or not low else range(low[0] + 1)
        assert sorted(scores) == list(wanted), scores
    assert 0 < run.notes["judge"]["skipped"] == 3 * PROMPTS - sum(map(len, given.values()))


def test_a_verdict_that_cannot_be_read_is_asked_for_again_and_then_quarantined(file: Path) -> None:
    run = regenerate(file, "judge.engine.fake.malformed=0.7", "judge.attempts=2", "judge.sequential=false")
    found = rows(run, "judgements")
    assert len(found) == PROMPTS
    mended = [row for row in found if row["score"] and len(row["raw"]) == 2]
    given_up = [row for row in found if row["quarantined"]]
    assert mended and given_up
    assert all(row["raw"][0] != row["raw"][1] for row in (*mended, *given_up)), [row["raw"] for row in given_up]
    assert {row["quarantined"] for row in given_up} == {"verdict not parsable after 2 attempts"}
    assert all(row["score"] is None and len(row["raw"]) == 2 for row in given_up)
    assert run.notes["select"]["kept"] == PROMPTS - len(given_up), "without a score there is no row"


def test_a_prompt_that_kills_engines_is_quarantined_with_the_reason_and_the_rest_completes(file: Path) -> None:
    careful = ["generate.engine.attempts=2", "generate.engine.max_num_seqs=1", "generate.shard_rows=1"]
    run = regenerate(file, "generate.engine.fake.die_on=Question 3 about pets?", *careful)
    found = {row["prompt_id"]: row for row in rows(run, "completions")}
    assert len(found) == PROMPTS
    poison = found.pop("pets-3")
    assert "engine" in poison["quarantined"] and poison["thought"] is None, poison["quarantined"]
    assert all(row["quarantined"] is None for row in found.values())
    assert {row["prompt_id"] for row in rows(run, "judgements")} == set(found)


def test_an_engine_that_stalls_is_started_again_and_everything_is_made(file: Path) -> None:
    stalls = ["generate.engine.fake.stall_at=12", "generate.engine.stuck_seconds=1", "generate.engine.max_num_seqs=4"]
    run = regenerate(file, *stalls)
    assert run.notes["complete"]["made"] == PROMPTS and all(row["quarantined"] is None for row in rows(run, "completions"))


def test_what_changes_nothing_needs_no_engine(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regenerate(file, "judge.k=2", "judge.sequential=false")
    monkeypatch.setattr(Pool, "fleet", lambda self: pytest.fail("an engine is started"))
    for prompts in (file.parent / "prompts").glob("*.jsonl"):
        prompts.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True))))
    run = regenerate(
        file, "judge.k=2", "judge.sequential=false", "select.threshold=2", "generate.shard_rows=3", "generate.engine.engines=4"
    )
    assert run.notes["complete"] == {"wanted": PROMPTS, "reused": PROMPTS, "made": 0, "lost_shards": 0}
    assert run.notes["judge"]["made"] == 0 and run.notes["select"]["kept"] < PROMPTS


def test_a_kept_row_costs_what_all_rows_cost(file: Path) -> None:
    run = regenerate(file, "select.threshold=2", "judge.sequential=false")
    kept = run.notes["select"]["kept"]
    assert 0 < kept < PROMPTS
    cost = run.selections[0].cost
    for name, field in (("engine_seconds", "busy_seconds"), ("tokens", "completion_tokens")):
        spent = sum(usage(file, stage, field) for stage in STAGES)
        assert cost[f"{name}_per_kept_row"] == pytest.approx(spent / kept) and spent > 0


def test_the_plan_foretells_what_the_rows_of_the_last_run_have_cost(file: Path) -> None:
    regenerate(file, *(f"{stage}.engine.fake.latency_seconds=0.5" for stage in ("generate", "judge")))
    fields = ("prompt_tokens", "completion_tokens", "busy_seconds")
    slow = {(stage, field): usage(file, stage, field) for stage in STAGES for field in fields}
    regenerate(file, "generate.n=2")
    _, (completions, judgements), *_ = plan(prepare(RunRequest(file=str(file), changes=["generate.n=4"]), trains=False))
    assert (completions.rows, judgements.rows) == (2 * PROMPTS, 2 * PROMPTS)
    for stage, estimate in zip(STAGES, (completions, judgements), strict=True):
        assert estimate.usage
        for field in fields:
            last = usage(file, stage, field) - slow[stage, field]
            assert getattr(estimate.usage, field) == pytest.approx(2 * last, rel=0.01), field
        assert estimate.usage.busy_seconds < slow[stage, "busy_seconds"]


def test_gc_shows_what_nothing_names_and_removes_it_only_when_it_is_told_to(file: Path) -> None:
    run = regenerate(file)
    stray = ["completions/shards/of-a-killed-run.parquet", "judgements/shards/of-another.parquet"]
    for path in stray:
        run.store.put(path, b"left over")
    old = Path(run.store.path(stray[0]))
    os.utime(old, (0, 0))

    def gc(*options: str) -> str:
        shown = CliRunner().invoke(app, ["gc", run.store.root, *options])
        assert shown.exit_code == 0, shown.output
        return shown.output

    assert stray[0] in (told := gc()) and stray[1] not in told and "--delete removes them" in told and old.exists()
    assert "removed" in gc("--delete") and not old.exists() and Path(run.store.path(stray[1])).exists()
    gc("--delete", "--older-than", "0")
    assert not Path(run.store.path(stray[1])).exists()
    left = [path for path, *_ in Store(run.store.root).files("") if path.startswith(STAGES)]
    assert problems(run.store.root)[0] == [] and len([path for path in left if "/shards/" in path]) == 2 * PROMPTS // 2


def test_one_engine_section_is_one_pool_and_two_of_one_model_are_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(RunRequest(file=str(file)), trains=False) as run:
        assert run.judge is run.generator and "of its own" not in capsys.readouterr().err
    with opened(RunRequest(file=str(file), changes=["judge.engine.max_num_seqs=3"]), trains=False) as run:
        assert run.judge is not run.generator
        assert capsys.readouterr().err.count("has engines of its own, of the generator's model: judge.engine differs in max_num_seqs") == 1
