"""RL jobs on one vLLM engine, with a model so small that a step takes seconds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripted_model import CATEGORIES, prompts_of

from cluster.engine import EngineConfig
from cluster.pool import Pool
from tasks import rl
from tasks.collect import Rewards, Source
from tasks.judge import JudgeConfig
from tasks.policy import Spec
from tasks.rewards import rewards_of
from tasks.rl_config import RlConfig


@contextmanager
def policy_of(model: str) -> Iterator[Pool]:
    """One engine that takes weights."""
    engine = EngineConfig(model=model, dtype="float32", engines=1, max_num_seqs=32, max_model_len=512, kv_cache_gib=0.25)
    with Pool(engine, receives_weights=True) as pool:
        pool.fleet()
        yield pool


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
