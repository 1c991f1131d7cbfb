"""RL jobs on one vLLM engine and rules alone. Run as a program, this file is one whole job: Ray, engine and rank."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripted_model import CATEGORIES, prompts_of

from cluster.engine import EngineConfig
from cluster.pool import Pool
from cluster.training_config import TrainingConfig
from tasks import rl
from tasks.collect import Rewards, Source
from tasks.judge import JudgeConfig
from tasks.policy import Spec
from tasks.rewards import rewards_of
from tasks.rl_config import RlConfig

STEPS = 5
RAY_ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


@contextmanager
def policy_of(model: str) -> Iterator[Pool]:
    """One engine that takes weights."""
    engine = EngineConfig(model=model, dtype="float32", engines=1, max_num_seqs=32, max_model_len=512, kv_cache_gib=0.25)
    with Pool(engine, receives_weights=True) as pool:
        pool.fleet()
        yield pool


def recovery_config(**changes: Any) -> RlConfig:
    """Some steps of two groups, with adapters and the rules' reward."""
    training = TrainingConfig(lora_rank=4, learning_rate=1e-4, micro_batch_tokens=2048).model_dump()
    values = {
        "steps": STEPS,
        "prompts_per_step": 2,
        "rollouts_per_prompt": 4,
        "max_tokens": 40,
        "temperature": 0.9,
        "reward": {"source": "rules"},
        "refills": 1,
        "save_every_steps": 1,
    }
    return RlConfig.model_validate(values | {"training": training} | changes)


def job_of(policy: Pool, root: Path, settings: RlConfig, rewards: Rewards = rewards_of) -> rl.RlJob:
    """A job in a root of its own, without a judge."""
    specs = dict.fromkeys(CATEGORIES, Spec("", ""))
    source = Source(
        job="rl-test",
        model_path=policy.model.path,
        config=settings,
        prompts=tuple(prompts_of(*CATEGORIES)),
        specs=specs,
        policy=policy.fleet(),
        judge=None,
        judge_model=policy.model,
        judge_config=JudgeConfig(),
        rewards=rewards,
    )
    return rl.RlJob(
        root=str(root),
        id="rl-test",
        start_path=policy.model.path,
        output=str(root / "model"),
        weights_file=str(root / "weights.safetensors"),
        config=settings,
        source=source,
        sync_tolerance=rl.sync_tolerance(settings, "float32"),
    )


def lines_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def main(model: str, root: str) -> None:
    """Runs a job to its end, or goes on with it."""
    from cluster.session import ray_session

    os.environ |= RAY_ENVIRONMENT
    with ray_session(), policy_of(model) as policy:
        rl.train_rl(job_of(policy, Path(root), recovery_config()), root)


if __name__ == "__main__":
    main(*sys.argv[1:])
