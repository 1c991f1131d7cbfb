"""Advantages: what the rewards of a group, k samples of one prompt, say about each sample. Pure torch.

A reward is measured by a judge that errs. Where its runs on one answer differ as much as the answers of a group do, the group teaches
nothing but noise, and is dropped or shrunk; nothing is ever divided by an epsilon.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.rl_config import AdvantageKind, NoiseRule, Target


@dataclass(frozen=True)
class Advantages:
    """values: float [groups, k], 0 where there is no signal. flat, noisy: bool [groups], groups without a spread, or with one that is
    no larger than the judge's noise; both teach nothing. `noisy` excludes `flat`."""

    values: Tensor
    flat: Tensor
    noisy: Tensor

    @property
    def effective(self) -> Tensor:
        """Bool [groups]: groups that teach something."""
        return ~(self.flat | self.noisy)


def group_advantages(rewards: Tensor, kind: AdvantageKind, noise: float = 0.0, rule: NoiseRule = "shrink") -> Advantages:
    """Advantages of k samples of the same prompt: rewards float [groups, k], NaN = not scored (it gets advantage 0).

    grpo: (r - mean) / std with the sample standard deviation (DeepSeekMath, arXiv 2402.03300, section 4.1).
    dr_grpo: r - mean (arXiv 2503.20783, section 3). rloo: r - mean of the others (arXiv 2402.14740).
    A group with no spread, or with fewer than two scores, gets 0 and is reported.

    `noise` is the variance of a reward that the judge alone causes (`judge_noise`). A group whose variance is no larger gets 0;
    with `shrink` the advantages of the others are multiplied by the share of their variance that is not noise (the
    reliability of classical test theory); with `keep` the noise changes nothing.
    """
    scored = ~rewards.isnan()
    count = scored.sum(1, keepdim=True)
    filled = torch.where(scored, rewards, 0.0)
    others = (count - 1).clamp(min=1)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(scored, rewards - mean, 0.0)
    variance = centred.square().sum(1, keepdim=True) / others
    # a constant group's mean is not exact in floating point, so its deviations are tiny instead of zero
    flat = (count < 2) | (variance.sqrt() <= 1e-6 * mean.abs().clamp(min=1.0))
    noisy = ~flat & (variance <= noise) if rule != "keep" else torch.zeros_like(flat)
    known = torch.where(flat, 1.0, variance)
    if kind == "grpo":
        centred = centred / known.sqrt()
    elif kind == "rloo":
        centred = centred * count / others
    if rule == "shrink":
        centred = centred * (1.0 - noise / known)
    return Advantages(torch.where(flat | noisy, 0.0, centred), flat.squeeze(1), noisy.squeeze(1))


def judge_noise(runs: Sequence[Sequence[float]]) -> float | None:
    """Variance of a mean reward that comes from the judge alone: of each answer's runs around their own mean, pooled, by their number.

    None when no answer has two runs: then nothing is known of the noise.
    """
    several = [torch.tensor(rewards, dtype=torch.float64) for rewards in runs if len(rewards) > 1]
    if not several:
        return None
    squares = sum(float((rewards - rewards.mean()).square().sum()) for rewards in several)
    pooled = squares / sum(len(rewards) - 1 for rewards in several)
    return pooled * sum(1 / len(rewards) for rewards in several) / len(several)


def spread_over_tokens(advantage: float, thought_tokens: int, tokens: int, target: Target) -> list[float]:
    """The advantage of each of a rollout's tokens. With the target `answer` none of it falls on the thought.

    A judge that never reads the thought still shapes it through the gradient ("Output Supervision Can Obfuscate the Chain of Thought",
    arXiv 2511.11584): reward targeting cuts that way. A rollout without a closed thought (`thought_tokens` 0) is moved as a whole.
    """
    before = thought_tokens if target == "answer" else 0
    return [0.0] * before + [advantage] * (tokens - before)
