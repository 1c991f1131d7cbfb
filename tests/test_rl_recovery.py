"""RL jobs on one vLLM engine and rules alone: one step off, and a rank or the rollout actor killed in the middle of it.

The model is the scripted one, so a run takes seconds.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rl_jobs import job_of, lines_of, policy_of

from cluster.pool import Pool
from cluster.training_config import TrainingConfig
from tasks import rl
from tasks.ledger import Ledger
from tasks.rl_config import RlConfig
from tasks.store import Store

pytestmark = pytest.mark.slow
STEPS = 5
RAY_ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


def config(**changes: Any) -> RlConfig:
    """Some steps of two groups, with adapters and the rules' reward."""
    training = TrainingConfig(lora_rank=4, learning_rate=1e-4, micro_batch_tokens=2048).model_dump()
    values = {
        "steps": STEPS,
        "prompts_per_step": 2,
        "rollouts_per_prompt": 4,
        "max_tokens": 40,
        "reward": {"source": "rules"},
        "refills": 1,
    }
    return RlConfig.model_validate(values | {"training": training} | changes)


@pytest.fixture(scope="module")
def policy(scripted_model: str) -> Iterator[Pool]:
    """One engine that takes weights, on a Ray of this file."""
    from cluster.session import ray_session

    os.environ |= RAY_ENVIRONMENT
    with ray_session(), policy_of(scripted_model) as pool:
        yield pool


def rows_of(root: Path) -> list[dict[str, Any]]:
    store = Store(str(root))
    return [row for shard in Ledger(store, "rollouts/rl-test").shards() for row in store.read_table(shard.path).to_pylist()]


@pytest.fixture(scope="module")
def undisturbed(policy: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that nobody kills."""
    root = tmp_path_factory.mktemp("undisturbed")
    rl.train_rl(job_of(policy, root, config()), str(root))
    return root


def test_a_run_says_of_every_step_what_it_drew_learnt_and_took(undisturbed: Path) -> None:
    lines = lines_of(undisturbed)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(line["rollout_mismatch"] <= 5e-5 and line["judged_share"] > 0.5 for line in lines)
    assert lines[-1]["last_push_mismatch"] <= 5e-5
    for name in ("rollout_seconds", "judge_seconds", "train_seconds", "sync_seconds", "reference_kl", "entropy", "reward_low", "kl_weight"):
        assert all(name in line for line in lines), name
    assert list((undisturbed / "tensorboard").glob("events.*"))


def kill(process_name: str, root: Path, at_lines: int, killed: list[int]) -> None:
    """Kills a process of a name when the run has so many lines."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (root / "metrics.jsonl").exists() and (root / "metrics.jsonl").read_text().count("\n") >= at_lines:
            named = [child for child in psutil.Process().children(recursive=True) if process_name in " ".join(child.cmdline())]
            killed += [child.pid for child in named]
            for child in named:
                os.kill(child.pid, signal.SIGKILL)
            return
        time.sleep(0.02)


@pytest.mark.parametrize("process_name", ["RayTrainWorker", "EngineActor"])
def test_a_killed_rank_and_a_killed_rollout_actor_cost_one_step_at_most(
    undisturbed: Path, policy: Pool, tmp_path: Path, process_name: str
) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill, args=(process_name, tmp_path, 2, killed))
    killer.start()
    rl.train_rl(job_of(policy, tmp_path, config()), str(tmp_path))
    killer.join()
    assert killed
    expected, found = lines_of(undisturbed), lines_of(tmp_path)
    assert [line["step"] for line in found] == list(range(STEPS))
    order = [[(row["step"], row["group"], row["prompt_id"]) for row in rows_of(root)] for root in (undisturbed, tmp_path)]
    assert order[0] == order[1], "the same prompts in the same order, and nothing drawn twice"
    assert [line["loss"] for line in found[:2]] == pytest.approx([line["loss"] for line in expected[:2]], abs=1e-5)


def test_one_step_off_draws_ahead_and_a_replay_needs_no_engine(policy: Pool, tmp_path: Path) -> None:
    settings = config(one_step_off=True, kl_target=0.01, target="answer", steps=4)
    job = job_of(policy, tmp_path / "run", settings)
    rl.train_rl(job, str(tmp_path / "run"))
    lines = lines_of(tmp_path / "run")
    versions = {row["step"]: row["policy_version"] for row in rows_of(tmp_path / "run")}
    assert versions == {0: 0, 1: 0, 2: 1, 3: 2}
    assert lines[2]["ratio"] != 1.0 and lines[1]["kl_weight"] != lines[0]["kl_weight"]
    again = rl.RlJob(**{**vars(job), "output": str(tmp_path / "again" / "model"), "source": None})
    rl.train_rl(again, str(tmp_path / "again"))
    assert [line["loss"] for line in lines_of(tmp_path / "again")] == pytest.approx([line["loss"] for line in lines], abs=1e-6)
