"""Per-token losses, advantages and the KL penalty. Pure torch.

Every function works on flat tensors of T predictions (`tasks.batch.MicroBatch`). A loss is returned *per token and unweighted*,
zero where the mask is zero; nothing here divides. The engine multiplies by the mask and divides once, by the token count of the
whole step over all ranks (`cluster.deepspeed_engine.TrainingEngine.step`), so a row weighs the same however it was packed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenLoss:
    """loss: float [T] with gradient. stats: name -> float [T] without; the engine reports their means over the mask."""

    loss: Tensor
    stats: dict[str, Tensor]

    def plus(self, other: "TokenLoss", coefficient: float) -> "TokenLoss":
        """self + coefficient * other, with the statistics of both."""
        return TokenLoss(self.loss + coefficient * other.loss, {**self.stats, **other.stats})


@dataclass(frozen=True)
class Advantages:
    """values: float [groups, k], 0 where there is no signal. zero_spread: bool [groups], groups that teach nothing."""

    values: Tensor
    zero_spread: Tensor

    @property
    def effective_groups(self) -> int:
        """Groups whose samples differ in reward."""
        return int((~self.zero_spread).sum())


AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) under the distribution that was sampled from: logits [T, V] / temperature, in float32 -> [T]."""
    return -F.cross_entropy(logits.float() / temperature, targets, reduction="none")


def nll(logits: Tensor, targets: Tensor, mask: Tensor) -> TokenLoss:
    """Negative log-likelihood of the learnt tokens: logits [T, V], targets [T], mask [T].

    The statistic `accuracy` is the share of learnt tokens that are the model's first choice.
    """
    loss = _where(mask, -token_logprobs(logits, targets))
    hits = (logits.detach().argmax(-1) == targets).float()
    return TokenLoss(loss, {"accuracy": _where(mask, hits)})


def group_advantages(rewards: Tensor, kind: AdvantageKind) -> Advantages:
    """Advantages of k samples of the same prompt: rewards float [groups, k], NaN = not scored (it gets advantage 0).

    grpo: (r - mean) / std with the sample standard deviation (DeepSeekMath, arXiv 2402.03300, section 4.1).
    dr_grpo: r - mean (arXiv 2503.20783, section 3). rloo: r - mean of the others (arXiv 2402.14740).
    A group with no spread, or with fewer than two scores, gets 0 and is reported; nothing is divided by an epsilon.
    """
    scored = ~rewards.isnan()
    count = scored.sum(1, keepdim=True)
    filled = torch.where(scored, rewards, 0.0)
    others = (count - 1).clamp(min=1)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(scored, rewards - mean, 0.0)
    spread = (centred.square().sum(1, keepdim=True) / others).sqrt()
    # a constant group's mean is not exact in floating point, so its deviations are tiny instead of zero
    flat = (count < 2) | (spread <= 1e-6 * mean.abs().clamp(min=1.0))
    if kind == "grpo":
        centred = centred / torch.where(flat, 1.0, spread)
    elif kind == "rloo":
        centred = centred * count / others
    return Advantages(torch.where(flat, 0.0, centred), flat.squeeze(1))


def policy_gradient(
    logp: Tensor,
    old_logp: Tensor,
    rollout_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: tuple[float, float] = (0.2, 0.28),
    tis_cap: float = 2.0,
) -> TokenLoss:
    """Clipped policy gradient with truncated importance sampling; all arguments float [T], gradient flows through `logp` only.

    Three policies are kept apart: `rollout_logp` is what the sampling engine said, `old_logp` what the trainer's weights said
    before the update (pass `logp.detach()` when there is one update a rollout), `logp` what they say now.
    -min(r A, clip(r, 1 - low, 1 + high) A) with r = pi/pi_old: PPO, arXiv 1707.06347, equation 7; the higher upper bound is
    DAPO, arXiv 2503.14476, section 3.1. The factor min(pi_old/pi_rollout, tis_cap), without gradient, corrects the sampling
    engine's numerics (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"); it is per
    token, because a bound on whole sequences drops the long thoughts.
    """
    low, high = clip
    ratio = (_where(mask, logp) - _where(mask, old_logp)).exp()
    clipped = ratio.clamp(1.0 - low, 1.0 + high)
    mismatch = _where(mask, old_logp - rollout_logp).detach()
    correction = mismatch.exp().clamp(max=tis_cap)
    loss = -correction * torch.minimum(ratio * advantage, clipped * advantage)
    stats = {
        "ratio": ratio.detach(),
        "clip_fraction": (clipped * advantage < ratio * advantage).float(),
        "rollout_mismatch": mismatch.abs(),
        "tis_truncated": (mismatch.exp() > tis_cap).float(),
    }
    return TokenLoss(_where(mask, loss), {name: _where(mask, value) for name, value in stats.items()})


def reference_kl(logp: Tensor, old_logp: Tensor, reference_logp: Tensor, mask: Tensor) -> TokenLoss:
    """Ratio-weighted k3 estimate of KL(pi || reference), all float [T]: r (exp(d) - d - 1) with d = log reference - log pi.

    k3 is Schulman's "Approximating KL divergence" (2020). Used as a loss without the weight r = pi/pi_old its gradient is
    biased; with it the gradient is that of the reverse KL (DeepSeek-V3.2, arXiv 2512.02556, section 3.1, equation 7). The statistic is the
    plain k3.
    """
    logp = _where(mask, logp)
    difference = _where(mask, reference_logp) - logp
    k3 = difference.exp() - difference - 1.0
    ratio = (logp - _where(mask, old_logp)).exp()
    return TokenLoss(_where(mask, ratio * k3), {"reference_kl": _where(mask, k3.detach())})


def _where(mask: Tensor, value: Tensor) -> Tensor:
    """`value` where the mask is not zero, else 0; a masked inf or NaN would survive a multiplication by 0."""
    return torch.where(mask > 0, value, 0.0)
