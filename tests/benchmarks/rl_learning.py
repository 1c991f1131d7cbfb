"""What RL and DPO add to a model that SFT has taught to think: rewards that can be checked, on prompts that no training saw.

    python tests/benchmarks/rl_learning.py --seeds 3

The rows are those of `learning.py`, made once under the same `--root`; started again, the command goes on from what is there. SFT teaches
all weights. On it, RL trains adapters with several seeds, rewarded by the rules alone: a refusal's style, or an answer that is none and
long enough. DPO trains adapters on the pairs that the judge's scores make. Each checkpoint answers every prompt of the evaluation split
four times without guidance: mean reward and over-refusal with 95 % intervals over scenario groups, and the gain over SFT, prompt by prompt.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from learning import SAMPLES, SPECS, answers_of
from report import head, row

from flows.config import RunRequest, load_run
from flows.opening import opened
from flows.steps import base_checkpoint, complete_and_judge_step, select_step
from flows.training_steps import dpo_step, rl_step, sft_step
from flows.workspace import Workspace
from tasks.checkpoints import Checkpoint
from tasks.gates import answer_kind
from tasks.prompts import Prompt, may_be_helped
from tasks.rewards import FLOOR, ruled
from tasks.rollout import Drawn
from tasks.statistics import clustered_mean

RESAMPLES = 2000
STAGES = ("train=[sft, dpo, rl]",)


def rl_learning(root: str, seeds: int, changes: list[str]) -> None:
    """All of it, a row of the table for each measure."""
    head()
    request = RunRequest(file=str(SPECS / "runs" / "learn.yaml"), root=root, changes=[*STAGES, *changes])
    with opened(request) as run:
        complete_and_judge_step.fn(run)
        dataset = select_step.fn(run)
        taught = sft_step.fn(run, dataset, base_checkpoint(run))
        before = drawn(run, taught)
        tell(run, "SFT", before, before)
        tell(run, "DPO", drawn(run, dpo_step.fn(run, dataset, taught)), before)
        for seed in range(seeds):
            seeded = [*request.changes, f"rl.seed={seed}", f"rl.training.seed={seed}"]
            config = load_run(request.model_copy(update={"changes": seeded}))
            started = time.monotonic()
            trained = rl_step.fn(replace(run, config=config), dataset, taught)
            row(f"RL, seed {seed}: training, or finding it trained", f"{time.monotonic() - started:.0f} s", "", "1800 s")
            tell(run, f"RL, seed {seed}", drawn(run, trained), before)


def drawn(run: Workspace, checkpoint: Checkpoint) -> dict[str, list[Drawn]]:
    """Id of a prompt of the evaluation split -> answers of a checkpoint."""
    found: dict[str, list[Drawn]] = {}
    for answer in answers_of(run, checkpoint, run.split("eval"), SAMPLES):
        found.setdefault(answer.prompt_id, []).append(answer)
    return found


def earned(run: Workspace, answers: Sequence[Drawn], prompt: Prompt) -> list[float]:
    """What answers earn by the rules of RL."""
    config = run.config.rl.reward
    return [ruled(one.answer or "", prompt.ideal_verdict, config, prompt.category) if one.earns else FLOOR for one in answers]


def tell(run: Workspace, label: str, after: dict[str, list[Drawn]], before: dict[str, list[Drawn]]) -> None:
    """The rows of one checkpoint."""
    rewards, gains, refusals = (defaultdict[str, list[float]](list) for _ in range(3))
    for prompt in run.split("eval"):
        answers = after[prompt.id]
        values = earned(run, answers, prompt)
        rewards[prompt.group] += values
        gains[prompt.group].append(fmean(values) - fmean(earned(run, before[prompt.id], prompt)))
        if may_be_helped(prompt.ideal_verdict, prompt.cell):
            refusals[prompt.group] += [float(answer_kind(one.answer or "") == "refusal") for one in answers]
    mean, gain, refused = (clustered_mean(list(values.values()), RESAMPLES) for values in (rewards, gains, refusals))
    spread = "95 % interval {low:.3f} to {high:.3f}".format(**mean)
    if after is not before:
        spread += "; {value:+.3f} [{low:+.3f}, {high:+.3f}] over SFT".format(**gain)
    row(f"{label}: mean reward of {sum(map(len, rewards.values()))} answers", f"{mean['value']:.3f}", spread)
    row(f"{label}: over-refusal", f"{refused['value']:.2f}", "95 % interval {low:.2f} to {high:.2f}".format(**refused))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="build/learning", help="where rows and checkpoints are kept")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of RL")
    parser.add_argument("--set", action="append", default=[], help="change of the run file, for example rl.steps=2")
    arguments = parser.parse_args()
    rl_learning(arguments.root, arguments.seeds, arguments.set)
