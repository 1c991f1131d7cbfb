"""What changes pays, and nothing else: plan and run after an edit of the policy, of the prompts, of n, k and threshold.

Prefect, Ray and the store are real; the engines are fake, since it is counted here what they are asked.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import UserError
from flows.config import RunRequest
from flows.inspect import problems
from flows.opening import prepare
from flows.plan import Estimate, Line, describe_plan, plan
from flows.steps import made_once
from flows.workspace import survey
from tasks import progress
from tasks.garbage import garbage, stages
from tasks.ledger import Ledger
from tasks.store import Store
from tasks.tombstones import delete_prompt

pytestmark = pytest.mark.slow
SPECS = Path(__file__).parent.parent / "specs"


@pytest.fixture(scope="module")
def servers(local_ray: None) -> Iterator[None]:
    """One Prefect server and one Ray for all runs of this file."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
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
    lines, *_ = plan(prepare(request(folder, *changes)))
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


def test_the_plan_skips_the_runs_that_an_earlier_score_made_needless(folder: Path) -> None:
    lines, *_ = plan(prepare(request(folder, "judge.k=3", "select.threshold=5")))
    judged = [line for line in lines if line.stage == "judge"]
    wanted, reused, skipped, to_do = (sum(getattr(line, name) for line in judged) for name in ("wanted", "reused", "skipped", "to_do"))
    assert (wanted, reused) == (672, 448) and skipped + to_do == 224
    assert 100 < skipped < 224, "few rows have two fives, and some are judged three times in any case"


def test_agreement_counts_the_audited_completions_on_which_all_runs_say_the_same(folder: Path) -> None:
    run = prepare(request(folder, "select.threshold=3", "judge.audit_share=0.5"))
    judgements, scores = Ledger(run.store, "judgements"), defaultdict(list)
    wanted, _ = survey(run, Ledger(run.store, "completions"), judgements)
    for shard in judgements.shards():
        for row in run.store.read_table(shard.path, ["completion_key", "score"]).to_pylist():
            scores[row["completion_key"]].append(row["score"] >= 3)
    audited = [kept for key, kept in scores.items() if int.from_bytes(key[:4]) < 0.5 * 2**32]
    agreed = wanted.agreement(run.config.judge, run.limits)
    assert agreed.total == len(audited) in range(80, 145) and agreed.count == sum(len(set(kept)) == 1 for kept in audited)
    assert 0 < agreed.count < agreed.total


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
    parent = regenerate(folder)
    before = asked(folder, "completions"), asked(folder, "judgements")
    edit(folder)
    lines = planned(folder)
    assert set(lines) == {("complete", "violence"), ("judge", "violence")}
    assert lines["complete", "violence"].reasons == {reason: rows}
    dataset = regenerate(folder)
    assert (dataset.manifest["parent"], dataset.version != parent.version) == (parent.version, True)
    assert problems(str(folder / "root" / parent.path)) == ([], len(parent.manifest["files"])), "the old version stays readable"
    assert asked(folder, "completions") - before[0] == rows
    assert asked(folder, "judgements") - before[1] == 2 * rows
    assert planned(folder) == {}


def test_the_plan_is_told_in_words(folder: Path) -> None:
    text = describe_plan(*plan(prepare(request(folder, "generate.n=3"))))
    assert "more samples" in text and "prompt tokens" in text and "minutes on 2 engines" in text
    assert "nothing was made under this root" in describe_plan([], [Estimate("completions", 5, None, 1)], [], [])
    assert "nothing to do" in describe_plan([], [Estimate("completions", 0, None, 1)], [], [])


def test_the_plan_tells_how_much_is_trained(folder: Path) -> None:
    changes = ["train=[sft, dpo, rl]", "rl.steps=3", "rl.prompts_per_step=4", "rl.rollouts_per_prompt=5", "rl.judge_runs=2"]
    text = describe_plan(*plan(prepare(request(folder, *changes, "sft.epochs=7", "dpo.rows_per_step=6"))))
    assert "sft: 7 epochs of the rows that are selected" in text and re.search("dpo: .* epochs of the pairs, 6 a step", text)
    assert "60 answers of at most" in text and "120 judge runs" in text
    text = describe_plan(*plan(prepare(request(folder, *changes, "rl.reward.source=rules"))))
    assert "60 answers of at most" in text and "120 judge runs" not in text, "a rule asks no judge"


def test_gc_removes_what_nothing_names_and_nothing_else(folder: Path) -> None:
    regenerate(folder)
    root = folder / "root"
    store = Store(str(root))
    store.put("completions/shards/of-a-killed-run.parquet", b"1")
    store.put("judgements/shards/.half-written", b"1")
    store.put("datasets/incremental/unfinished/data/x.parquet", b"1")
    assert list(garbage(store, older_than=3600)) == [], "they are young"
    found = [file.path for file in garbage(store, older_than=0)]
    names = {path.rpartition("/")[2] for path in found if not path.startswith("prompts/")}
    assert names == {"of-a-killed-run.parquet", ".half-written", "x.parquet"}
    for path in found:
        store.delete(path)
    before = asked(folder, "completions"), asked(folder, "judgements")
    assert regenerate(folder).reused and (asked(folder, "completions"), asked(folder, "judgements")) == before


def test_gc_stands_back_while_a_run_writes(folder: Path) -> None:
    store = Store(str(folder / "root"))
    with Ledger(store, "completions").writing(3), pytest.raises(UserError, match="another run"):
        list(garbage(store, older_than=0))


def test_a_deleted_prompt_is_gone_from_every_row_and_stays_away(folder: Path) -> None:
    name = next(iter(prepare(request(folder)).prompts.prompts("sft"))).id
    parent, before = regenerate(folder), (asked(folder, "completions"), asked(folder, "judgements"))
    store = Store(str(folder / "root"))
    done = delete_prompt(store, name)
    assert done.rows["completions"] >= 2 and done.rows["judgements"] >= 4 and parent.path in done.holders
    dataset = regenerate(folder)
    assert (asked(folder, "completions"), asked(folder, "judgements")) == before, "nothing is made again"
    assert dataset.manifest["parent"] == parent.version
    assert dataset.manifest["balance"]["completions"] == parent.manifest["balance"]["completions"] - 2
    for shard in [*Ledger(store, "completions").shards(), *Ledger(store, "judgements").shards()]:
        assert name not in store.read_table(shard.path, ["prompt_id"])["prompt_id"].to_pylist()
    assert delete_prompt(store, name).rows["completions"] == 0, "doing it again does nothing"
    with pytest.raises(UserError, match="no prompt with the id"):
        delete_prompt(store, "never-heard-of")


def test_a_prompt_is_deleted_with_what_was_judged_under_an_older_name_of_it(folder: Path) -> None:
    prompts = prepare(request(folder)).prompts
    old = next(iter(prompts.prompts("sft"))).id
    (file,) = [file for file in (folder / "prompts").glob("*.jsonl") if f'"{old}"' in file.read_text()]
    file.write_text(file.read_text().replace(f'"{old}"', '"a-new-name"'))
    before = asked(folder, "completions"), asked(folder, "judgements")
    dataset = regenerate(folder)
    assert (asked(folder, "completions"), asked(folder, "judgements")) == before, "a name makes no other completion"
    store = Store(str(folder / "root"))
    done = delete_prompt(store, "a-new-name")
    assert done.rows["completions"] == 2 and done.rows["judgements"] == 4
    assert {prompts.path, prepare(request(folder)).prompts.path, dataset.path} & set(done.holders) == {prompts.path, dataset.path}


def test_a_second_run_does_not_make_what_the_first_is_making(folder: Path) -> None:
    run = prepare(request(folder))
    with Ledger(run.store, "checkpoints/sft-1").writing(3), pytest.raises(UserError, match=r"another run.*checkpoints/sft-1"):
        made_once(run, "checkpoints/sft-1", lambda: None, lambda: pytest.fail("it trains beside the first"))
    assert made_once(run, "checkpoints/sft-1", lambda: None, lambda: "trained") == "trained"
    assert "checkpoints/sft-1" in stages(run.store)
    run.store.put("checkpoints/sft-1/manifest.json", b"{}")
    assert "checkpoints/sft-1" not in stages(run.store), "what is finished is claimed by nobody"
    run.store.delete("checkpoints/sft-1/manifest.json")


def test_a_run_tells_rows_tokens_cache_idle_share_retries_and_what_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    regenerate(folder, "generate.temperature=0.9", "generate.engine.fake.drop=0.03", "judge.engine.fake.drop=0.03")
    told = capsys.readouterr().err
    number = r"[\d.,e+]+"
    for stage, unit in (("complete", "completions"), ("judge", "verdicts")):
        pace = rf"{number} tokens/s, \d+ % of prompts cached, engines idle \d+ %, \d+ retries"
        assert re.search(rf"{stage} +\d+/\d+ {unit} \({number}/s, \d+ s left\) {pace}", told), stage
        ended = rf"{stage} +{number} rows/s, {number} tokens/s, \d+ % of prompt tokens cached, [1-9]\d* retries, \d+ quarantined"
        assert re.search(ended, told), stage
    assert re.search(rf"engines +idle {number} % of \d+ s, tail {number} %", told)
