"""RL jobs on one vLLM engine and rules alone: one step off, and a rank or the rollout actor killed in the middle of it.

The model is the scripted one, so a run takes seconds; soak tests do the same to the demo's.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import rl_jobs
from rl_jobs import RAY_ENVIRONMENT, STEPS, job_of, lines_of, policy_of, recovery_config
from scripted_model import teach
from write_sites import ROLLOUT_SITES

from cluster.chat import Turn
from cluster.engine import Engine, Sampling
from cluster.errors import Diverged, SpecmillError
from cluster.fleet import Fleet, Stage
from cluster.models import resolve_model
from cluster.pool import Pool
from tasks import rl
from tasks.ledger import Ledger
from tasks.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.training]


TOY, DEMO = "two layers", pytest.param("demo", marks=pytest.mark.soak)


def on(*models: Any) -> pytest.MarkDecorator:
    """The models that a test is about."""
    return pytest.mark.parametrize("model", models, indirect=True, scope="module")


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, scripted_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers that say one thing; or the demo's model, taught to say one of several."""
    if request.param != "demo":
        return scripted_model
    path = tmp_path_factory.mktemp("taught")
    scripts = [("zebra quill", "At nine."), ("paper moon", "I'm sorry, but I can't help with that.")]
    teach(resolve_model("default").path, path, *scripts, learning_rate=1e-4, steps=40)
    return str(path)


@pytest.fixture(scope="module")
def policy(model: str, windows: Path) -> Iterator[Pool]:
    """One engine that takes weights, on a Ray of this file."""
    from cluster.session import ray_session

    os.environ |= RAY_ENVIRONMENT
    with ray_session(), policy_of(model) as pool:
        yield pool


def rows_of(root: Path) -> list[dict[str, Any]]:
    store = Store(str(root))
    return [row for shard in Ledger(store, "rollouts/rl-test").shards() for row in store.read_table(shard.path).to_pylist()]


@pytest.fixture(scope="module")
def undisturbed(policy: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that nobody kills."""
    root = tmp_path_factory.mktemp("undisturbed")
    rl.train_rl(job_of(policy, root, recovery_config()), str(root))
    return root


@on(TOY)
def test_a_run_says_of_every_step_what_it_drew_learnt_and_took(undisturbed: Path) -> None:
    lines = lines_of(undisturbed)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(line["rollout_mismatch"] <= 5e-5 and line["judged_share"] > 0.5 for line in lines)
    assert lines[-1]["last_push_mismatch"] <= 5e-5
    assert any(line["effective_groups"] for line in lines), "without a group that teaches something nothing is learnt that could be lost"
    measured = {"reference_kl", "entropy", "reward_low", "kl_weight"}
    timed = {f"{phase}_seconds" for phase in ("rollout", "judge", "train", "sync", "checkpoint", "step")}
    assert all(measured | timed <= line.keys() for line in lines)
    assert [line["checkpoint_seconds"] > 0 for line in lines] == [False] + [True] * (STEPS - 1)
    assert list((undisturbed / "tensorboard").glob("events.*"))


def kill(process_name: str, root: Path, at_lines: int, killed: list[int]) -> None:
    """Kills one process of a name when the run has so many lines."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (root / "metrics.jsonl").exists() and (root / "metrics.jsonl").read_text().count("\n") >= at_lines:
            named = [child.pid for child in psutil.Process().children(recursive=True) if process_name in " ".join(child.cmdline())]
            killed += named[:1]
            os.kill(named[0], signal.SIGKILL)
            return
        time.sleep(0.02)


@on(TOY, DEMO)
@pytest.mark.parametrize("process_name", ["RayTrainWorker", pytest.param("EngineActor", marks=pytest.mark.soak)])
def test_a_killed_rank_and_a_killed_rollout_actor_cost_one_step_at_most(
    undisturbed: Path, policy: Pool, tmp_path: Path, process_name: str
) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill, args=(process_name, tmp_path / "killed", 3, killed))
    killer.start()
    job = job_of(policy, tmp_path / "killed", recovery_config())
    rl.train_rl(job, job.root)
    killer.join()
    assert killed
    assert_the_same(undisturbed, tmp_path / "killed")
    assert_it_learnt_what_was_drawn(job, tmp_path / "again")


@pytest.mark.soak
@on(TOY)
def test_the_death_of_one_of_two_ranks_costs_one_step_at_most(undisturbed: Path, policy: Pool, tmp_path: Path) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill, args=("RayTrainWorker", tmp_path, 3, killed))
    killer.start()
    rl.train_rl(job_of(policy, tmp_path, recovery_config(ranks=2)), str(tmp_path))
    killer.join()
    assert killed
    assert_the_same(undisturbed, tmp_path)


def assert_the_same(undisturbed: Path, root: Path, kills: int = 1) -> None:
    """Both took the same steps on the same prompts, a kill cost one step at most, and what came before it is alike."""
    expected, found = lines_of(undisturbed), lines_of(root)
    assert [line["step"] for line in found] == list(range(STEPS))
    assert sum("rollout_seconds" not in line for line in found) <= kills, "steps that were taken anew from rollouts that lay there"
    order = [[(row["step"], row["group"], row["prompt_id"]) for row in rows_of(each)] for each in (undisturbed, root)]
    assert order[0] == order[1], "the same prompts in the same order, and nothing drawn twice"
    assert [line["loss"] for line in found[:2]] == pytest.approx([line["loss"] for line in expected[:2]], abs=1e-5)


def assert_it_learnt_what_was_drawn(job: rl.RlJob, place: Path) -> None:
    """Trained anew from its rollouts, without an interruption, a run loses the same: optimiser and schedule had come back, and all else."""
    rl.train_rl(replace(job, output=str(place / "model"), source=None), str(place))
    names = ("loss", "reference_kl", "gradient_norm", "learning_rate", "kl_weight")
    recorded, again = ([[line[name] for line in lines_of(root)] for name in names] for root in (Path(job.root), place))
    assert again == [pytest.approx(values, abs=1e-6) for values in recorded]


@pytest.mark.soak
@on(TOY)
@pytest.mark.parametrize("site", sorted(ROLLOUT_SITES))
def test_a_rank_killed_before_and_after_it_writes_rollouts_draws_nothing_twice(
    undisturbed: Path, policy: Pool, windows: Path, tmp_path: Path, site: str
) -> None:
    for moment in ("before", "after"):
        (windows / "todo" / f"{moment} {site}").touch()
    (windows / "target").write_text("self")
    job = job_of(policy, tmp_path / "killed", recovery_config(kl_target=0.01))
    rl.train_rl(job, job.root)
    (windows / "target").write_text("nobody")
    assert not list((windows / "todo").iterdir())
    assert_the_same(undisturbed, tmp_path / "killed", kills=2)
    assert_it_learnt_what_was_drawn(job, tmp_path / "again")


@on(DEMO)
def test_a_killed_job_goes_on_with_the_same_command(undisturbed: Path, model: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, rl_jobs.__file__, model, str(tmp_path)]
    job = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 400
        while not (tmp_path / "metrics.jsonl").exists() or len(lines_of(tmp_path)) < 3:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for process in (job_and_children := [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]):
            process.kill()
        psutil.wait_procs(job_and_children)
    done = len(lines_of(tmp_path))
    assert done < STEPS
    subprocess.run(command, env=environment, check=True, timeout=600)
    assert_the_same(undisturbed, tmp_path)


@on(TOY)
def test_an_engine_that_did_not_take_the_weights_stops_rl(policy: Pool, tmp_path: Path) -> None:
    class StaleFleet(Fleet):
        """A fleet that takes no weights but the first."""

        def load_weights(self, path: str, version: int) -> None:
            if version == 0:
                super().load_weights(path, version)

    job, fleet = job_of(policy, tmp_path, recovery_config(max_failures=0)), policy.fleet()
    training = job.config.training.model_copy(update={"learning_rate": 1e-2, "warmup_ratio": 0.0})
    assert job.source
    source = replace(job.source, policy=StaleFleet(fleet.actors, fleet.capacity))
    job = replace(job, source=source, config=job.config.model_copy(update={"training": training}))
    with pytest.raises(SpecmillError, match=r"RL weights of version [1-5]: engine and trainer disagree"):
        rl.train_rl(job, str(tmp_path))


@on(TOY)
def test_an_engine_forgets_what_it_computed_with_other_weights(policy: Pool) -> None:
    async def cached(engine: Engine, words: int) -> int:
        """How many tokens of a long prompt an engine still knows."""
        return (await engine.complete([Turn(role="user", content="word " * words)], Sampling(1.0, 2, seed=0))).cached_tokens

    stage, fleet = Stage(run=cached, size=lambda words: 1), policy.fleet()
    _, again = (done.result for _ in range(2) for done in fleet.map(stage, [400]))
    fleet.load_weights(policy.model.path, 0)
    (after,) = (done.result for done in fleet.map(stage, [400]))
    assert again > 100 and after == 0


@pytest.fixture(scope="module")
def one_step_off(policy: Pool, tmp_path_factory: pytest.TempPathFactory) -> rl.RlJob:
    """A finished job that draws while it trains."""
    root = tmp_path_factory.mktemp("ahead")
    job = job_of(policy, root, recovery_config(one_step_off=True, kl_target=0.01, target="answer", steps=4))
    rl.train_rl(job, str(root))
    return job


@on(TOY)
def test_one_step_off_draws_ahead(one_step_off: rl.RlJob) -> None:
    lines = lines_of(Path(one_step_off.root))
    versions = {row["step"]: row["policy_version"] for row in rows_of(Path(one_step_off.root))}
    assert versions == {0: 0, 1: 0, 2: 1, 3: 2}
    assert lines[2]["ratio"] != 1.0 and lines[1]["kl_weight"] != lines[0]["kl_weight"]


@pytest.mark.soak
@on(TOY)
def test_a_replay_of_one_step_off_needs_no_engine(one_step_off: rl.RlJob, tmp_path: Path) -> None:
    again = replace(one_step_off, output=str(tmp_path / "model"), source=None)
    rl.train_rl(again, str(tmp_path))
    losses = [line["loss"] for line in lines_of(Path(one_step_off.root))]
    assert [line["loss"] for line in lines_of(tmp_path)] == pytest.approx(losses, abs=1e-6)


@on(TOY)
def test_a_loss_that_is_no_number_stops_rl_keeps_what_was_learnt_and_names_the_prompts(one_step_off: rl.RlJob, tmp_path: Path) -> None:
    training = one_step_off.config.training.model_copy(update={"learning_rate": 1e38, "warmup_ratio": 0.0})
    config = one_step_off.config.model_copy(update={"training": training})
    with pytest.raises(Diverged, match="became nan; lower training") as told:
        rl.train_rl(replace(one_step_off, output=str(tmp_path / "model"), source=None, config=config), str(tmp_path))
    drawn = {row["prompt_id"] for row in rows_of(Path(one_step_off.root)) if row["step"] == 1}
    (named,) = re.findall(r"RL step 1, rollouts of (.+): the training loss", str(told.value))
    assert set(named.split(", ")) <= drawn
    assert len(lines_of(tmp_path)) == 1 and not (tmp_path / "model").exists()
    assert list(tmp_path.glob("train/checkpoint_*/state.json"))
