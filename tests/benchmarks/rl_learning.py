"""What RL and DPO add to a model that SFT has taught to think: rewards that can be checked, on prompts that no training saw.

    python tests/benchmarks/rl_learning.py --seeds 3

The rows are those of `learning.py`, made once under the same `--root`; started again, the command goes on from what is there. SFT teaches
all weights. On it, RL trains adapters with several seeds, rewarded by the rules alone: a refusal's style, or an answer that is none and
long enough. DPO trains adapters on the pairs that the judge's scores make. Each checkpoint answers the evaluation split without guidance:
mean reward with its 95 % interval over scenario groups, over-refusal, and what is gained over SFT, prompt by prompt.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

from learning import SPECS
from report import machine, row, say

from flows.config import RunRequest, load_run
from flows.opening import opened
from flows.steps import base_checkpoint, complete_and_judge_step, evaluate_step, select_step
from flows.training_steps import dpo_step, rl_step, sft_step
from flows.workspace import Workspace
from tasks.checkpoints import Checkpoint
from tasks.prompts import may_be_helped
from tasks.rewards import FLOOR, RewardConfig, ruled
from tasks.statistics import Proportion, clustered_mean

RESAMPLES = 2000
STAGES = ("train=[sft, dpo, rl]",)


def rl_learning(root: str, seeds: int, changes: list[str]) -> None:
    """All of it, a row of the table for each measure."""
    say(machine())
    request = RunRequest(file=str(SPECS / "runs" / "learn.yaml"), root=root, changes=[*STAGES, *changes])
    with opened(request) as run:
        complete_and_judge_step.fn(run)
        dataset = select_step.fn(run)
        taught = sft_step.fn(run, dataset, base_checkpoint(run))
        before = answers(run, taught)
        tell("SFT", before, before, run.config.rl.reward)
        tell("DPO", answers(run, dpo_step.fn(run, dataset, taught)), before, run.config.rl.reward)
        for seed in range(seeds):
            seeded = [*request.changes, f"rl.seed={seed}", f"rl.training.seed={seed}"]
            config = load_run(request.model_copy(update={"changes": seeded}))
            started = time.monotonic()
            trained = rl_step.fn(replace(run, config=config), dataset, taught)
            say(f"RL, seed {seed}: {time.monotonic() - started:.0f} s of training")
            tell(f"RL, seed {seed}", answers(run, trained), before, config.rl.reward)


def answers(run: Workspace, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The rows of a checkpoint's evaluation."""
    rows: list[dict[str, Any]] = run.store.read_table(evaluate_step.fn(run, checkpoint).file).to_pylist()
    return rows


def earned(answer: dict[str, Any], config: RewardConfig) -> float:
    """What an answer of the evaluation earns by the rules of RL."""
    formed = answer["malformed"] is None and answer["finish_reason"] == "stop"
    return ruled(answer["answer"], answer["ideal_verdict"], config, answer["category"]) if formed else FLOOR


def tell(label: str, after: list[dict[str, Any]], before: list[dict[str, Any]], config: RewardConfig) -> None:
    """The rows of one checkpoint."""
    first = {answer["prompt_id"]: earned(answer, config) for answer in before}
    rewards: dict[str, list[float]] = {}
    gains: dict[str, list[float]] = {}
    for answer in after:
        reward = earned(answer, config)
        rewards.setdefault(answer["group"], []).append(reward)
        gains.setdefault(answer["group"], []).append(reward - first[answer["prompt_id"]])
    mean, gain = (clustered_mean(list(values.values()), RESAMPLES) for values in (rewards, gains))
    spread = "95 % interval {low:.3f} to {high:.3f}".format(**mean)
    if after is not before:
        spread += "; {value:+.3f} [{low:+.3f}, {high:+.3f}] over SFT".format(**gain)
    row(f"{label}: mean reward of {len(after)} answers", f"{mean['value']:.3f}", spread)
    helped = [answer for answer in after if may_be_helped(answer["ideal_verdict"], answer["cell"])]
    refused = Proportion(sum(answer["answer_kind"] == "refusal" for answer in helped), len(helped))
    row(f"{label}: over-refusal", f"{refused.value:.2f}", "95 % interval {:.2f} to {:.2f}".format(*refused.interval))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="build/learning", help="where rows and checkpoints are kept")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of RL")
    parser.add_argument("--set", action="append", default=[], help="change of the run file, for example rl.steps=2")
    arguments = parser.parse_args()
    rl_learning(arguments.root, arguments.seeds, arguments.set)
