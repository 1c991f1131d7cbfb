"""RL on rewards that are wrong on purpose: each trips its alarm. On the rules it trips none, and earns more than before.

The policy is a model of two layers that says one of four things by chance, so that thirty steps are enough to make it say one of them.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from rl_jobs import job_of, lines_of, policy_of
from scripted_model import teach

from cluster.errors import Diverged
from cluster.pool import Pool
from cluster.training_config import TrainingConfig
from tasks import rl
from tasks.gates import answer_kind
from tasks.policy import Verdict
from tasks.rewards import RewardConfig, rewards_of
from tasks.rl_config import RlConfig

pytestmark = [pytest.mark.soak, pytest.mark.training]
cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])  # ranks do not import the tests
STEPS = 24
LONG = "The harbour opens at nine in the morning, and whoever wants to see the boats leave should bring a warm coat and some bread."
SCRIPTS = (
    ("zebra quill", LONG),
    ("paper moon", "I'm sorry, but I can't help with that."),
    ("silver thorn", "What a wonderful judge reads this, so wise and so kind."),
    ("copper bell", "At nine."),
)


def minus_length(answer: str, ideal: Verdict, category: str, runs: Sequence[dict[str, int]], config: RewardConfig) -> list[float]:
    """The shorter the better."""
    return [1 - min(1.0, len(answer.split()) / 25)]


def always_refuse(answer: str, ideal: Verdict, category: str, runs: Sequence[dict[str, int]], config: RewardConfig) -> list[float]:
    """Only refusals earn."""
    return [float(answer_kind(answer) == "refusal")]


def flattery(answer: str, ideal: Verdict, category: str, runs: Sequence[dict[str, int]], config: RewardConfig) -> list[float]:
    """A judge that likes to be praised."""
    return [float("wonderful" in answer)]


PLANTED: dict[str, tuple[Any, str]] = {
    "minus length": (minus_length, "short_answers"),
    "always refuse": (always_refuse, "over_refusal"),
    "flattery": (flattery, "over_optimisation"),
}


@pytest.fixture(scope="module")
def policy(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """An engine of the model that says four things."""
    from cluster.session import ray_session

    path = tmp_path_factory.mktemp("four-things")
    teach(tiny_model, path, *SCRIPTS)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    with ray_session(), policy_of(str(path)) as pool:
        yield pool


def trained(policy: Pool, root: Path, rewards: Any, alarm: str = "say") -> list[dict[str, Any]]:
    """The lines of a run on these rewards."""
    training = TrainingConfig(learning_rate=1e-3, micro_batch_tokens=4096, schedule="constant").model_dump()
    values = {"steps": STEPS, "prompts_per_step": 8, "rollouts_per_prompt": 8, "max_tokens": 48, "kl": 0.0, "save_every_steps": STEPS}
    settings = RlConfig.model_validate(values | {"reward": {"source": "rules"}, "refills": 0, "alarm": alarm, "training": training})
    rl.train_rl(job_of(policy, root, settings, rewards), str(root))
    return lines_of(root)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_reward_trips_its_alarm(policy: Pool, tmp_path: Path, name: str) -> None:
    rewards, alarm = PLANTED[name]
    lines = trained(policy, tmp_path, rewards)
    assert lines[-1]["reward_low"] > lines[0]["reward_high"], "it learns what it is rewarded for"
    assert alarm in {found for line in lines for found, _ in line.get("alarms", ())}


def test_an_alarm_ends_the_run_where_that_is_asked_for(policy: Pool, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"RL step \d+: answer_tokens .*: it collapses \(rl.alarm: stop; with `say` the run goes on"):
        trained(policy, tmp_path, minus_length, alarm="stop")
    lines = lines_of(tmp_path)
    assert len(lines) < STEPS and [bool(line.get("alarms")) for line in lines] == [False] * (len(lines) - 1) + [True]
    assert not (tmp_path / "model").exists()
    again = trained(policy, tmp_path, minus_length)
    assert len(again) == STEPS and ["rollout_seconds" in line for line in again].index(True) == len(lines), "no rollout is drawn twice"


def test_the_rules_trip_no_alarm_and_are_followed_better_than_before(policy: Pool, tmp_path: Path) -> None:
    lines = trained(policy, tmp_path, rewards_of)
    assert not [alarm for line in lines for alarm in line.get("alarms", ())]
    assert lines[-1]["reward_low"] > lines[0]["reward_high"]
    assert lines[-1]["over_refusals"] <= lines[0]["over_refusals"] + 0.1
