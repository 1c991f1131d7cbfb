"""What the rollouts of a step say, and the signs that training goes wrong. Pure: the same rows and lines say the same again.

An alarm compares the last steps with the first ones of the same run, so it needs no knowledge of model or policy.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from tasks.collect import NOISE, effective_groups, trained
from tasks.prompts import may_be_helped
from tasks.statistics import Proportion, clustered_mean

RESAMPLES = 500
WINDOW = 4
"""Steps that are compared with the first so many; an alarm needs twice as many steps."""
SHORTER = 0.5
"""Share of its first length that a thought or an answer may not fall below."""
REFUSES = 0.25
"""So much may the share of refusals rise where help is allowed; the intervals of both shares have to be apart, too."""
DECEIVED = 0.1
"""So much may the reward rise while a measure that rewards nothing falls by half of it."""
SATISFIED = 0.9
"""Rules that are so content from the beginning can only fall."""
DRIFTED = 1.0
"""Nats a token that the policy may be away from where it started."""
SETTLED = 0.2
"""Share of its first entropy that the policy may not fall below."""


def describe(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of a step's rollouts. A measure that no row has is left out.

    reward with its 95 % interval over groups; rule_reward and held_out_reward of the same answers; shares of rollouts that were judged,
    that refuse, and that refuse what may be helped with; mean tokens of thought and answer; spread of the judge's runs; groups.
    """
    formed = [row for row in rows if row["answer_kind"]]
    may_help = [row for row in formed if may_be_helped(row["ideal_verdict"], row["cell"])]
    groups: dict[int, list[float]] = {}
    for row in rows:
        if row["reward"] is not None:
            groups.setdefault(row["group"], []).append(row["reward"])
    found: dict[str, float | None] = {
        "rule_reward": _mean(row["rule_reward"] for row in rows),
        "held_out_reward": _mean(row["held_out_reward"] for row in rows),
        "judged_share": _mean(float(row["answer_kind"] is not None) for row in rows),
        "refusals": _mean(float(row["answer_kind"] == "refusal") for row in formed),
        "over_refusals": _mean(float(row["answer_kind"] == "refusal") for row in may_help),
        "may_be_helped": float(len(may_help)),
        "thought_tokens": _mean(row["thought_tokens"] for row in formed),
        "answer_tokens": _mean(len(row["token_ids"]) - row["thought_tokens"] for row in formed),
        "judge_spread": _mean(pstdev(row["rewards"]) for row in rows if len(row["rewards"]) > 1),
        "effective_groups": float(effective_groups(list(rows))),
        "drawn_groups": float(len({row["group"] for row in rows})),
        "noisy_groups": float(len({row["group"] for row in rows if row["drop_reason"] == NOISE})),
        "rollout_tokens": float(sum(len(row["token_ids"]) for row in rows)),
        "trained_rollouts": float(len(trained(list(rows)))),
    }
    if groups:
        reward = clustered_mean(list(groups.values()), RESAMPLES)
        found |= {"reward": reward["value"], "reward_low": reward["low"], "reward_high": reward["high"]}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Alarm:
    """A sign that training goes wrong, at a step."""

    name: str
    step: int
    text: str


def alarms(lines: Sequence[dict[str, Any]]) -> list[Alarm]:
    """What the last of these lines, one a step, gives cause for. Nothing before there are two windows of steps."""
    if len(lines) < 2 * WINDOW:
        return []
    first, last, step = lines[:WINDOW], lines[-WINDOW:], lines[-1]["step"]

    def both(name: str) -> tuple[float, float] | None:
        before, now = (_mean(line.get(name) for line in part) for part in (first, last))
        return None if before is None or now is None else (before, now)

    found = []
    for name, measure, judge in SIGNS:
        values = both(measure)
        if values and (text := judge(*values)):
            found.append(Alarm(name, step, f"{measure} {values[0]:.3g} -> {values[1]:.3g}: {text}"))
    before, now = (_refused(part) for part in (first, last))
    if now.value is not None and now.value - (before.value or 0.0) > REFUSES and now.interval[0] > before.interval[1]:
        text = f"over_refusals {before.value or 0.0:.2g} -> {now.value:.2g}: it refuses what may be helped with"
        found.append(Alarm("over_refusal", step, text))
    reward = both("reward")
    for measure in ("held_out_reward", "rule_reward"):
        other = both(measure)
        if reward and other:
            knows = measure != "rule_reward" or other[0] < SATISFIED
            if knows and reward[1] - reward[0] > DECEIVED and other[0] - other[1] > DECEIVED / 2:
                text = (
                    f"reward {reward[0]:.3g} -> {reward[1]:.3g} while {measure} {other[0]:.3g} -> {other[1]:.3g}: the reward is being gamed"
                )
                found.append(Alarm("over_optimisation", step, text))
            break  # the rules stand in where no judge is held out
    return found


def _refused(lines: Sequence[dict[str, Any]]) -> Proportion:
    """Refusals of what may be helped with, of all steps together."""
    counted = [(line["over_refusals"] * line["may_be_helped"], line["may_be_helped"]) for line in lines if "over_refusals" in line]
    return Proportion(round(sum(refused for refused, _ in counted)), round(sum(total for _, total in counted)))


def _shorter(before: float, now: float) -> str | None:
    return "it collapses" if now < SHORTER * before else None


SIGNS: tuple[tuple[str, str, Callable[[float, float], str | None]], ...] = (
    ("short_thoughts", "thought_tokens", _shorter),
    ("short_answers", "answer_tokens", _shorter),
    ("no_thoughts", "judged_share", _shorter),
    ("drift", "reference_kl", lambda before, now: "far from where RL started; raise rl.kl" if now > DRIFTED else None),
    ("entropy_collapse", "entropy", lambda before, now: "it has settled on few answers" if now < SETTLED * before else None),
    ("no_signal", "effective_groups", lambda before, now: "no group of answers differs in reward" if now == 0 else None),
)
"""Name, measure, and what a change of it means, if it means something."""


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
