"""The whole way once, from the written policy to the report, with Prefect, Ray, vLLM and DeepSpeed; then what a second start does.

The model is two layers that have learnt one thing: to answer everything with the same thought, which holds a canary. So rollouts are
well formed, the judge is really asked, and a thought that reached the judge would be seen.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds
import pytest
import yaml
from ray import cloudpickle
from scripted_model import CANARY, CATEGORIES
from write_sites import DATA_SITES, FINAL_SITES, ROLLOUT_SITES

from cluster.chat import Chat, Turn
from cluster.engine import Completion, Engine, EngineConfig, Sampling
from cluster.errors import UserError
from cluster.fleet import Fleet, Line, Stage
from cluster.pool import Pool
from flows.config import RunRequest
from flows.inspect import describe, problems, read_manifest
from flows.replay import MEASURES, Replayed, replay
from tasks import rl, thoughts
from tasks.garbage import garbage
from tasks.ledger import Ledger
from tasks.policy import load_policy
from tasks.store import Store
from tasks.tombstones import delete_prompt

pytestmark = [pytest.mark.slow, pytest.mark.chain]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # engine actors do not import the tests

SPECS = Path(__file__).parent.parent / "specs"
LIMIT = 40
ROWS_PER_STEP = 16
PROBE = "Which bird nests on a cliff?"


@pytest.fixture(scope="module")
def run_file(scripted_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two categories, 64 prompts."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "prompts").mkdir()
    for name in (*CATEGORIES, "capability"):
        (folder / "prompts" / f"{name}.jsonl").write_bytes((SPECS / "prompts" / f"{name}.jsonl").read_bytes())
    engine = {"model": scripted_model, "dtype": "float32", "engines": 1, "max_num_seqs": 32, "kv_cache_gib": 0.25}
    # so small a learning rate that the model does not forget its script
    training = {"learning_rate": 1e-6, "micro_batch_tokens": 2048}
    content = {
        "version": 1,
        "name": "chain",
        "root": str(folder / "root"),
        "policy": str(SPECS / "policies" / "base"),
        "prompts": str(folder / "prompts"),
        "generate": {"engine": engine, "n": 1, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800},
        "judge": {"engine": engine, "k": 2, "temperature": 1.0},
        "select": {"threshold": 1},
        "sft": {"epochs": 1, "rows_per_step": ROWS_PER_STEP, "training": training, "development": {"every_steps": 1, "max_tokens": LIMIT}},
        "rl": {
            "steps": 2,
            "prompts_per_step": 4,
            "rollouts_per_prompt": 4,
            "max_tokens": LIMIT,
            "ranks": 2,
            "training": training | {"zero_stage": 3},
            "held_out": engine | {"backend": "fake"},
        },
        "evaluate": {"engine": engine | {"max_model_len": 1024}, "max_tokens": LIMIT},
    }
    file = folder / "chain.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def servers(windows: Path, local_ray: None) -> Iterator[None]:
    """One Prefect server and one Ray for all runs of this file."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


class Recorder:
    """Passes requests on to an engine and writes down the prompt ids that it read."""

    def __init__(self, engine: Engine, file: str) -> None:
        self.engine, self.file = engine, file

    async def complete(self, turns: Any, sampling: Sampling) -> Completion:
        drawn = await self.engine.complete(turns, sampling)
        with open(self.file, "a") as stream:
            stream.write(json.dumps(drawn.prompt_ids) + "\n")
        return drawn


class RecordingFleet(Fleet):
    """A fleet whose engines see every request through a recorder."""

    def __init__(self, fleet: Fleet, file: str) -> None:
        super().__init__(fleet.actors, fleet.capacity)
        self.file = file

    def line(self, stage: Stage) -> Line:
        file, run = self.file, stage.run

        async def recorded(engine: Engine, shard: Any) -> Any:
            return await run(Recorder(engine, file), shard)

        return super().line(replace(stage, run=recorded))


async def process_id(engine: Engine, shard: None) -> int:
    """The process of an engine actor."""
    return os.getpid()


async def probe(engine: Engine, turns: list[Turn]) -> Completion:
    """What an engine says, token by token, with log-probabilities."""
    return await engine.complete(turns, Sampling(1.0, 24, seed=7, logprobs=True))


PROBE_STAGE = Stage(run=probe, size=lambda turns: 1)


@pytest.fixture(scope="module")
def chain(servers: None, run_file: Path, scripted_model: str) -> dict[str, Any]:
    """The finished run: its root, and what was seen of the judge during RL."""
    from flows.factory import factory

    root, seen = run_file.parent / "root", run_file.parent / "judge-requests.jsonl"
    question = [Turn(role="user", content=PROBE)]
    probes: list[Completion] = []
    real = rl.train_rl

    def watched(job: rl.RlJob, storage: str, *more: Any) -> dict[str, Any]:
        def ask() -> None:
            assert job.source and job.source.judge
            probes.extend(done.result for done in job.source.judge.map(PROBE_STAGE, [question]))

        ask()
        assert job.source and job.source.judge
        recorded = replace(job.source, judge=RecordingFleet(job.source.judge, str(seen)))
        metrics = real(replace(job, source=recorded), storage, *more)
        ask()
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "train_rl", watched)
        folder = Path(factory(RunRequest(file=str(run_file))))
    return {"root": root, "folder": folder, "requests": [json.loads(line) for line in seen.open()], "probes": probes}


def again(run_file: Path) -> dict[str, dict[str, int]]:
    """Starts the run once more; returns what each stage did."""
    from flows.factory import factory

    return stages(Path(factory(RunRequest(file=str(run_file)))))


def stages(folder: Path) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = json.loads((folder / "manifest.json").read_text())["stages"]
    return counts


def test_the_run_ends_with_a_report_and_every_row_accounted_for(chain: dict[str, Any]) -> None:
    assert problems(str(chain["root"]))[0] == []
    counts = stages(chain["folder"])
    assert counts["complete"] == {"wanted": 32, "reused": 0, "made": 32, "lost_shards": 0}
    assert counts["judge"]["made"] == counts["judge"]["wanted"] == 2 * (32 - counts["judge"]["gated"])
    assert counts["select"]["kept"] + counts["select"]["dropped"] == 32 and counts["select"]["categories"] == 2
    assert "| self-harm | 16 |" in describe(str(chain["folder"]), read_manifest(str(chain["folder"]))), "it shows the funnel"
    report = (chain["folder"] / "report.md").read_text()
    assert "not calibrated" in report.splitlines()[0] and "135M" in report.splitlines()[0]
    assert all(name in report for name in ("base", "sft", "rl", *CATEGORIES))


def test_every_durable_write_of_a_whole_run_is_one_in_whose_windows_something_is_killed(chain: dict[str, Any], windows: Path) -> None:
    sites = {name.name.partition(" ")[2] for name in (windows / "seen").iterdir()}
    assert {"create completions shard", "create rows shard", "create rollouts shard", "replace runs manifest"} <= sites
    assert sites <= DATA_SITES | FINAL_SITES | ROLLOUT_SITES


def test_the_dataset_opens_with_datasets_and_holds_no_policy(chain: dict[str, Any], tmp_path: Path) -> None:
    from datasets import load_dataset

    manifest = json.loads((chain["folder"] / "manifest.json").read_text())
    rows = load_dataset(str(chain["root"] / manifest["datasets"][0]), split="train", cache_dir=str(tmp_path))
    assert len(rows) == stages(chain["folder"])["select"]["kept"] and set(rows["category"]) == set(CATEGORIES)
    assert rows.column_names == ["prompt_id", "category", "messages", "thought", "answer"]
    clauses = [clause.text for _, clause in load_policy(str(SPECS / "policies" / "base")).clauses.values()]
    assert not any(clause in json.dumps(row) for row in rows for clause in clauses)


def test_sft_is_looked_at_on_the_development_split_and_the_best_step_is_kept(chain: dict[str, Any]) -> None:
    (path,) = (chain["root"] / "checkpoints").glob("sft-*")
    lines = [json.loads(line) for line in (path / "model" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == math.ceil(stages(chain["folder"])["sft"]["rows"] / ROWS_PER_STEP)
    assert lines[0]["development_over_refusal_before"] == 0
    looks = [(line["development_format_adherence"], line["development_verdict_accuracy"]) for line in lines]
    assert looks == [(1.0, 0.0)] * len(lines), "the script cites no verdict"
    assert {line["development_best"] for line in lines} == {1}, "of several alike the first is kept"


def test_the_report_shows_the_course_of_training(chain: dict[str, Any]) -> None:
    report = (chain["folder"] / "report.md").read_text()
    for name in ("sft", "rl"):
        assert f"![{name}]({name}.png)" in report and (chain["folder"] / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_rl_moves_the_policy_and_stays_in_step_with_the_engine(chain: dict[str, Any]) -> None:
    (path,) = (chain["root"] / "checkpoints").glob("rl-*")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(line["rollout_mismatch"] <= 5e-5 and line["judged_share"] > 0.5 for line in lines)
    assert [line.get("last_push_mismatch", 1.0) <= 5e-5 for line in lines] == [False, True]
    assert any(line["effective_groups"] for line in lines)
    assert all(0 < line["held_out_reward"] < 1 for line in lines)
    assert "forward_kl" not in lines[0] and abs(lines[1]["forward_kl"]) < 1e-3, "so small are its steps"
    weights = {json.loads(file.read_text())["weights"] for file in (chain["root"] / "checkpoints").glob("*/manifest.json")}
    assert len(weights) == 2


def test_what_a_checkpoint_is_read_by_is_no_garbage(chain: dict[str, Any]) -> None:
    folders = [f"checkpoints/{path.parent.name}" for path in (chain["root"] / "checkpoints").glob("*/manifest.json")]
    assert len(folders) == 2 and not [file for file in garbage(Store(str(chain["root"])), 0) if file.path.startswith(tuple(folders))]
    assert all(list((chain["root"] / folder / "tensorboard").glob("events.*")) for folder in folders)


def test_a_replay_reproduces_the_losses_without_an_engine(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (chain["root"] / "checkpoints").glob("rl-*")
    train, jobs = rl.train_rl, list[rl.RlJob]()

    def noted(job: rl.RlJob, place: str) -> None:
        jobs.append(job)
        train(job, place)

    monkeypatch.setattr("flows.replay.train_rl", noted)
    steps = replay(str(path))
    assert jobs[0].config.training.micro_batch_tokens == 2048, "a replay takes the memory that the training took"
    assert len(steps) == 2 and not any(step.differing for step in steps)
    assert all(step.recorded.keys() == step.found.keys() == {*MEASURES} for step in steps)
    assert any(step.recorded["loss"] for step in steps), "losses that are all 0 say nothing"
    assert {"loss", "gradient_norm", "entropy"} <= {*Replayed(1, steps[1].recorded, steps[0].found).differing}, "another step would be seen"
    with pytest.raises(UserError, match="no rollouts"):
        replay(str(next((chain["root"] / "checkpoints").glob("sft-*"))))


def test_rollouts_say_what_a_later_training_needs(chain: dict[str, Any]) -> None:
    (path,) = (chain["root"] / "checkpoints").glob("rl-*")
    rows = rollouts_of(chain["root"], path.name)
    assert {row["policy_version"] for row in rows} == {0, 1} and all(row["step"] == row["policy_version"] for row in rows)
    assert all(len(row["logprobs"]) == len(row["token_ids"]) for row in rows)
    assert all(len(row["verdicts"]) == len(row["held_out_verdicts"]) == 1 for row in rows if row["answer_kind"])
    used = [row for row in rows if row["drop_reason"] is None]
    assert used and all(row["advantage"] == 0 for row in rows if row["drop_reason"])
    assert all(row["reward"] == pytest.approx(sum(row["rewards"]) / len(row["rewards"])) for row in used)


def rollouts_of(root: Path, checkpoint: str) -> list[dict[str, Any]]:
    """All rollouts that an RL checkpoint learnt from."""
    files = [shard.path for shard in Ledger(Store(str(root)), f"rollouts/{checkpoint}").shards()]
    return list(ds.dataset([str(root / file) for file in files]).to_table().to_pylist())


def test_the_judge_of_rl_never_reads_a_thought(chain: dict[str, Any], scripted_model: str) -> None:
    chat = Chat(scripted_model)
    (path,) = (chain["root"] / "checkpoints").glob("rl-*")
    rollouts = rollouts_of(chain["root"], path.name)
    assert len(rollouts) >= 32
    judged = [thoughts.split(row["token_ids"], chat) for row in rollouts if row["verdicts"]]
    assert len(judged) > 16 and all(isinstance(parts, thoughts.Parts) and parts.thought for parts in judged)
    assert sum(CANARY in parts.thought for parts in judged) > 16
    read = [chat.decode(ids) for ids in chain["requests"]]
    assert len(read) >= len(judged) and all(any(json.dumps(parts.answer) in text for text in read) for parts in judged)
    assert not any(parts.thought in text for parts in judged for text in read), "whatever was thought, canary or not"
    assert not any(CANARY in text or "zebra" in text for text in read)


def test_the_judge_is_the_same_before_and_after_rl(chain: dict[str, Any]) -> None:
    before, after = chain["probes"]
    assert before.token_ids == after.token_ids and len(before.logprobs) == len(before.token_ids) > 0
    assert before.logprobs == after.logprobs


def test_prefect_shows_the_progress_of_each_stage(chain: dict[str, Any]) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        response = client._client.post("/artifacts/filter", json={"artifacts": {"type": {"any_": ["progress", "markdown"]}}})
    found = {artifact["key"]: artifact["data"] for artifact in response.json()}
    assert {"complete", "judge", "sft", "rl", "eval-base", "eval-sft", "eval-rl", "report"} <= set(found)
    assert all(float(found[key]) == 100.0 for key in ("complete", "judge", "sft", "rl", "eval-base"))


def test_a_second_start_reuses_everything_without_an_engine(chain: dict[str, Any], run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pool: Pool) -> Fleet:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(Pool, "fleet", refuse)
    monkeypatch.setattr("cluster.memory.free_gib", lambda: 0.0)  # nor needs memory what starts none
    counts = again(run_file)
    assert counts["complete"]["made"] == counts["judge"]["made"] == counts["sft"]["trained"] == counts["rl"]["trained"] == 0
    assert all(counts[f"eval-{name}"]["reused"] for name in ("base", "sft", "rl"))


@pytest.mark.soak
def test_a_lost_shard_and_a_lost_checkpoint_are_made_again_and_nothing_else(chain: dict[str, Any], run_file: Path) -> None:
    import shutil

    ledger = Ledger(Store(str(chain["root"])), "judgements")
    lost = ledger.shards()[0]
    os.remove(chain["root"] / lost.path)
    (checkpoint,) = (chain["root"] / "checkpoints").glob("sft-*")
    shutil.rmtree(checkpoint)
    counts = again(run_file)
    assert counts["complete"]["made"] == 0
    judged = counts["judge"]
    assert (judged["made"], judged["lost_shards"]) == (lost.rows, 1)
    assert judged["reused"] + judged["skipped"] + judged["made"] == judged["wanted"]
    assert counts["sft"]["trained"] == 1 and checkpoint.exists()
    assert counts["rl"]["reused"] == 1, "the same data give the same weights, so what depends on them stands"
    (checkpoint / "model" / "model.safetensors").unlink()
    assert again(run_file)["sft"]["trained"] == 1 and (checkpoint / "model" / "model.safetensors").exists()
    assert problems(str(chain["root"]))[0] == []


def written(root: Path, stage: str) -> int:
    """How many files of rows a stage has written; of SFT, how many steps."""
    if stage == "sft":
        return sum(len(file.read_text().splitlines()) for file in root.glob("checkpoints/sft-*/.training/*/metrics.jsonl"))
    return len(list(root.glob(f"{stage}/**/*.parquet")))


@pytest.mark.soak
def test_an_interrupted_run_is_finished_by_the_same_command(run_file: Path) -> None:
    """Ctrl-C while verdicts are given, in SFT and in RL: one root, and nothing of it is made twice."""
    root = run_file.parent / "interrupted"
    small = [
        "generate.shard_rows=2",
        "judge.engine.max_num_seqs=4",
        "generate.engine.max_num_seqs=4",
        "sft.rows_per_step=4",
        "sft.development.every_steps=6",
    ]
    changes = [argument for change in [*small, "sft.save_every_steps=2"] for argument in ("--set", change)]
    command = [sys.executable, "-m", "flows.cli", "run", str(run_file), "--root", str(root), *changes]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PREFECT_"))}
    for stage in ("judgements", "sft", "rollouts"):
        # A process group of its own, as the shell gives it: Ctrl-C reaches all of it.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        before, deadline = written(root, stage), time.monotonic() + 600
        while written(root, stage) <= before + 1:
            assert process.poll() is None and time.monotonic() < deadline, stage
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 130
        assert not (root / "runs").exists(), f"{stage} was over before it was interrupted"
    assert subprocess.run(command, env=environment, timeout=900, check=False).returncode == 0
    assert problems(str(root))[0] == []
    ledgers = [root / stage / "ledger" for stage in ("completions", "judgements")]
    for ledger in [*ledgers, *root.glob("rollouts/**/ledger")]:
        stage = ledger.parent.relative_to(root).as_posix()
        counted = [shard.path for shard in Ledger(Store(str(root)), stage).shards()]
        keys = ds.dataset([str(root / path) for path in counted]).to_table(columns=["key"])["key"].to_pylist()
        assert len(keys) == len(set(keys)) > 0
        # Made twice is at most what was in flight, written and not yet in the ledger, when Ctrl-C came.
        lost = {str(file.relative_to(root)) for file in ledger.parent.glob("**/*.parquet")} - set(counted)
        assert len(lost) <= 3, f"{stage}: {lost}"


@pytest.mark.soak
def test_a_restarted_engine_answers_with_the_weights_it_was_given(servers: None, tiny_model: str, scripted_model: str) -> None:
    question = [Turn(role="user", content=PROBE)]
    config = EngineConfig(model=tiny_model, dtype="float32", max_model_len=512, kv_cache_gib=0.25)
    with Pool(config, receives_weights=True) as pool:
        fleet = pool.fleet()
        (untrained,) = (done.result for done in fleet.map(PROBE_STAGE, [question]))
        fleet.load_weights(scripted_model, 1)
        (before,) = (done.result for done in fleet.map(PROBE_STAGE, [question]))
        (actor,) = (done.result for done in fleet.map(Stage(run=process_id, size=lambda shard: 1), [None]))
        family = [psutil.Process(actor), *psutil.Process(actor).children(recursive=True)]
        family[0].kill()
        (after,) = (done.result for done in fleet.map(PROBE_STAGE, [question]))
        assert before.token_ids == after.token_ids != untrained.token_ids
        assert psutil.wait_procs(family, timeout=60)[1] == [], "the dead engine left a process behind"


@pytest.mark.soak
@pytest.mark.training
def test_two_rounds_of_sft_rejection_sampling_dpo_and_rl(servers: None, run_file: Path, scripted_model: str) -> None:
    """A round's last checkpoint completes the prompts of the next; each stage begins where the one before it ended."""
    from flows.factory import factory

    stages_wanted = ["sft", "rejection", "dpo", "rl"]
    changes = [f"train={stages_wanted}", "rounds=2", "generate.n=4", "select.pairs.margin=0.5", "dpo.rows_per_step=8"]
    changes += [f"{stage}.training.learning_rate=1e-6" for stage in stages_wanted[1:]]
    request = RunRequest(file=str(run_file), root=str(run_file.parent / "rounds"), changes=changes)
    folder = Path(factory(request))
    root, manifest = folder.parent.parent, json.loads((folder / "manifest.json").read_text())
    checkpoints = [json.loads((root / path / "manifest.json").read_text()) for path in manifest["checkpoints"]]
    datasets = [json.loads((root / path / "manifest.json").read_text()) for path in manifest["datasets"]]
    assert [item["kind"] for item in checkpoints] == stages_wanted * 2 and len(datasets) == 2
    for before, after in pairwise(checkpoints):
        assert (after["provenance"]["start"], after["provenance"]["from"]) == (before["weights"], before["id"])
    generators = [item["provenance"]["generator"] for item in datasets]
    assert generators[1] == {"id": checkpoints[3]["id"], "revision": checkpoints[3]["weights"][:16]} != generators[0]
    learnt = [item["provenance"]["dataset"].split("@")[1] for item in checkpoints if item["kind"] != "rl"]
    assert learnt == [item["id"] for item in datasets for _ in stages_wanted[:3]]
    assert all(item["preferences"] > 4 and item["spare"] > 4 for item in datasets) and datasets[1]["parent"] == datasets[0]["id"]
    labels = [*stages_wanted, *(f"{stage}-2" for stage in stages_wanted)]
    assert all((folder / f"{label}.png").exists() and f"eval-{label}" in manifest["stages"] for label in labels)
    assert problems(str(root))[0] == []
    counts = stages(Path(factory(request)))
    assert all(counts[name].get("made", 0) == counts[name].get("trained", 0) == 0 for name in counts)
    trained = {f"checkpoints/{item['id']}" for item in checkpoints}
    assert trained <= set(delete_prompt(Store(str(root)), "sh-02-violation").holders), "every one of them learned from it"


@pytest.mark.soak
def test_a_sweep_compares_settings_on_the_development_split(chain: dict[str, Any], run_file: Path) -> None:
    from flows.sweep import sweep

    path = Path(sweep(RunRequest(file=str(run_file)), ["rows=4", "training.weight_decay=0,0.1"]))
    table = [line.split("|")[1].strip() for line in path.read_text().splitlines() if line.startswith("|")]
    assert table[2:] == ["base", *(f"rows=4 weight_decay={decay}" for decay in ("0", "0.1"))]
    assert "8 prompts of the development split" in path.read_text()
