"""The rollouts of an RL step: draws groups, has them judged while others are drawn, turns rewards into advantages, as rows.

Only one process does it, beside whichever ranks train. What it makes is a function of weights, step and configuration: prompts come in a
fixed order, each group has seeds of its own, and the rows say all that a later training from them needs to know.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from cluster.fleet import Fleet, run
from cluster.models import Model
from tasks.gates import answer_kind
from tasks.judge import JudgeConfig, Verdict
from tasks.keys import KEY_BYTES, digest
from tasks.policy import Spec
from tasks.prompts import CELLS, Cell, Prompt
from tasks.rewards import FLOOR, judged, rewards_of, ruled
from tasks.rl_config import RlConfig
from tasks.rollout import DRAW, JUDGE_BLIND, Drawn, DrawShard, blind_shards
from tasks.thoughts import Malformed

Rewards = Callable[..., list[float]]
"""What an answer earns, once for each judge run: like `tasks.rewards.rewards_of`."""
NO_SPREAD, NOISE = "no_spread", "judge_noise"
"""Why a group is not trained on: all its answers earn the same, or differ no more than the judge's runs on one answer do."""


@dataclass(frozen=True)
class Source:
    """Where rollouts come from. `policy` receives weights and never judges; the judges keep their weights for the whole run."""

    job: str
    model_path: str
    config: RlConfig
    prompts: tuple[Prompt, ...]
    specs: dict[str, Spec]
    policy: Fleet
    judge: Fleet | None
    judge_model: Model
    judge_config: JudgeConfig
    held_out: Fleet | None = None
    rewards: Rewards = rewards_of


@dataclass
class Collected:
    """Rows of `tables.ROLLOUTS` and the seconds that they took: until the last was drawn, and until the last was judged after that."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rollout_seconds: float = 0.0
    judge_seconds: float = 0.0


class PromptOrder:
    """Which prompt a group answers: the cells in turn by their weights, within a cell one pass over a shuffle after the other."""

    def __init__(self, prompts: Sequence[Prompt], mix: dict[Cell, float], seed: int) -> None:
        self._seed = seed
        self._cells = {cell: [prompt for prompt in prompts if prompt.cell == cell] for cell in CELLS}
        weights = mix or dict.fromkeys(CELLS, 1.0)
        self._weights = {cell: weights.get(cell, 0.0) for cell in CELLS if self._cells[cell]}
        self._turns: list[tuple[Cell, int]] = []
        self._taken = dict.fromkeys(self._weights, 0)
        self._shuffles: dict[tuple[Cell, int], list[Prompt]] = {}

    def at(self, number: int) -> Prompt:
        """The prompt of group `number`, from 0."""
        while len(self._turns) <= number:
            # the cell that is furthest behind its share
            cell = max(self._weights, key=lambda name: self._weights[name] * (len(self._turns) + 1) - self._taken[name] * self._total)
            self._turns.append((cell, self._taken[cell]))
            self._taken[cell] += 1
        cell, turn = self._turns[number]
        passes, place = divmod(turn, len(self._cells[cell]))
        if (cell, passes) not in self._shuffles:
            self._shuffles[cell, passes] = sorted(self._cells[cell], key=lambda prompt: digest([self._seed, passes, prompt.id]))
        return self._shuffles[cell, passes][place]

    @property
    def _total(self) -> float:
        return sum(self._weights.values())


def collect(source: Source, step: int, version: int, first_group: int) -> Collected:
    """Draws and judges the groups of a step under policy version `version`, beginning with group number `first_group`.

    Groups that teach nothing are replaced by further ones `refills` times; they stay among the rows, with the reason.
    """
    config, order, found = source.config, PromptOrder(source.prompts, source.config.mix, source.config.seed), Collected()
    next_group = first_group
    for _ in range(1 + config.refills):
        missing = config.prompts_per_step - effective_groups(found.rows)
        if missing <= 0:
            break
        groups = {number: order.at(number) for number in range(next_group, next_group + missing)}
        next_group += missing
        _answer(source, step, version, groups, found)
        _weigh(found.rows, config)
    return found


def trained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that a step trains on: of the groups that teach something, or, if none does, all of them, for the sake of the KL."""
    return [row for row in rows if row["drop_reason"] is None] or rows


def effective_groups(rows: list[dict[str, Any]]) -> int:
    """Groups that teach something."""
    return len({row["group"] for row in rows if row["drop_reason"] is None})


def rollout_key(job: str, group: int, prompt: str, sample: int) -> bytes:
    """The key of a rollout: which job, group, prompt and sample."""
    return bytes.fromhex(digest(["rollouts", job, group, prompt, sample]))[:KEY_BYTES]


def _answer(source: Source, step: int, version: int, groups: dict[int, Prompt], found: Collected) -> None:
    """Adds the rows of some groups; what is drawn is judged while others are drawn."""
    config, started = source.config, time.monotonic()
    numbers = {prompt_seed(config, number): number for number in groups}
    runs = source.judge_config.model_copy(update={"k": config.judge_runs})
    drawing = source.policy.line(DRAW)
    judging = [(fleet, fleet.line(JUDGE_BLIND)) for fleet in (source.judge, source.held_out) if fleet]
    verdicts: dict[Any, dict[str, list[Verdict]]] = {line: {} for _, line in judging}
    drawn: dict[int, list[Drawn]] = {}
    last_drawn = started
    drawing.add(
        DrawShard(
            source.model_path, (prompt,), config.rollouts_per_prompt, config.max_tokens, config.temperature, prompt_seed(config, number)
        )
        for number, prompt in groups.items()
    )
    for done in run([*(line for _, line in judging), drawing]):
        if done.line is drawing:
            number = numbers[done.shard.seed]
            drawn[number], last_drawn = done.result, time.monotonic()
            shown = blind_shards([one for one in done.result if one.earns], {groups[number].id: groups[number]}, source.specs, runs)
            for _, line in judging:
                line.add(shown)
        else:
            verdicts[done.line] |= {item.name: given for item, given in zip(done.shard.items, done.result, strict=True)}
    given = {fleet: verdicts[line] for fleet, line in judging}
    for number, prompt in groups.items():
        for one in sorted(drawn[number], key=lambda answer: answer.sample):
            ours, theirs = (given[fleet].get(one.name, []) if fleet else [] for fleet in (source.judge, source.held_out))
            found.rows.append(_row(source, step, version, number, prompt, one, ours, theirs))
    found.rollout_seconds += last_drawn - started
    found.judge_seconds += time.monotonic() - last_drawn


def prompt_seed(config: RlConfig, group: int) -> int:
    """Base of the seeds of a group's rollouts: a prompt that comes again is answered anew."""
    return config.seed + 7919 * group


def _row(
    source: Source, step: int, version: int, group: int, prompt: Prompt, one: Drawn, verdicts: list[Verdict], held_out: list[Verdict]
) -> dict[str, Any]:
    malformed = one.parts.reason if isinstance(one.parts, Malformed) else None
    config, answer = source.config, one.answer or ""
    graded = [verdict.scores for verdict in verdicts if verdict.scores]
    rewards = source.rewards(answer, prompt.ideal_verdict, prompt.category, graded, config.reward) if one.earns else [FLOOR]
    theirs = [judged(verdict.scores) for verdict in held_out if verdict.scores]
    return {
        "key": rollout_key(source.job, group, prompt.id, one.sample),
        "prompt_id": prompt.id,
        "category": prompt.category,
        "cell": prompt.cell,
        "ideal_verdict": prompt.ideal_verdict,
        "step": step,
        "group": group,
        "sample": one.sample,
        "seed": one.seed,
        "policy_version": version,
        "prompt_ids": one.prompt_ids,
        "token_ids": one.completion.token_ids,
        "logprobs": one.completion.logprobs,
        "finish_reason": one.completion.finish_reason,
        "thought_tokens": 0 if malformed else one.parts.thought_tokens,  # type: ignore[union-attr]
        "malformed": malformed,
        "answer_kind": answer_kind(answer) if one.earns else None,
        "verdicts": [verdict.raw for verdict in verdicts],
        "spec_hash": source.specs[prompt.category].hash,
        "judge": source.judge_model.id,
        "judge_revision": source.judge_model.revision,
        "rewards": rewards,
        "reward": sum(rewards) / len(rewards) if rewards else None,
        "rule_reward": ruled(answer, prompt.ideal_verdict, config.reward, prompt.category) if one.earns else FLOOR,
        "held_out_verdicts": [verdict.raw for verdict in held_out],
        "held_out_reward": (sum(theirs) / len(theirs) if theirs else None) if one.earns else FLOOR,
        "quarantined": None if rewards else "no verdict could be parsed",
    }


def _weigh(rows: list[dict[str, Any]], config: RlConfig) -> None:
    """Sets the advantage of every row, and why a group teaches nothing."""
    import torch

    from tasks.advantages import group_advantages, judge_noise

    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["group"])]
    rewards = torch.tensor([[math.nan if row["reward"] is None else row["reward"] for row in group] for group in groups])
    noise = judge_noise([row["rewards"] for row in rows]) or 0.0
    found = group_advantages(rewards, config.advantage, noise, config.noise)
    for group, values, flat, noisy in zip(groups, found.values.tolist(), found.flat.tolist(), found.noisy.tolist(), strict=True):
        for row, value in zip(group, values, strict=True):
            row |= {"advantage": value, "drop_reason": NO_SPREAD if flat else NOISE if noisy else None}
