"""Losses of SFT, RL and preference learning, and the KL penalty. Pure torch.

Every function works on flat tensors of L predictions (`tasks.batch.MicroBatch`). A loss is returned *per token and unweighted*,
zero where the mask is zero; nothing here divides. The engine multiplies by the mask and divides once, by the sum of the masks of the
whole step over all ranks (`cluster.deepspeed_engine.TrainingEngine.step`), so a row weighs the same however it was packed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.causal_model import TokenScores


@dataclass(frozen=True)
class TokenLoss:
    """loss: float [L] with gradient. stats: name -> float [L] without; the engine reports their means over the mask."""

    loss: Tensor
    stats: dict[str, Tensor]

    def plus(self, other: "TokenLoss", coefficient: float) -> "TokenLoss":
        """self + coefficient * other, with the statistics of both."""
        return TokenLoss(self.loss + coefficient * other.loss, {**self.stats, **other.stats})


def nll(scores: TokenScores, mask: Tensor) -> TokenLoss:
    """Negative log-likelihood of the learnt tokens: scores and mask [L].

    The statistic `token_accuracy` is the share of learnt tokens that are the model's first choice.
    """
    return TokenLoss(_where(mask, -scores.logp), {"token_accuracy": _where(mask, scores.top), "entropy": _where(mask, scores.entropy)})


def dpo(logp: Tensor, reference_logp: Tensor, row: Tensor, mask: Tensor, beta: float, nll_weight: float = 0.0) -> TokenLoss:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7) of packed pairs, all arguments [L].

    Rows 2i and 2i + 1 of the micro-batch are the chosen and the rejected completion of pair i; `row` says which row a token belongs to.
    Each pair has weight 1, on the first token of its chosen row: `mask` is 1 there and 0 elsewhere, so that the engine divides by the
    number of pairs. Of `reference_logp`, what the starting weights say, only the sum over a row counts. `nll_weight` adds the chosen row's
    negative log-likelihood per token (Pang et al., arXiv 2404.19733, equation 1). Statistics: share of pairs that the policy orders as the
    judge does against the reference (`pair_accuracy`), and the implicit rewards beta log(pi / reference) of both completions.
    """
    sums, lengths = row_sums(logp - reference_logp, row), row_sums(torch.ones_like(logp), row)
    first = mask > 0
    if not first.any():
        nothing = logp * 0.0
        return TokenLoss(nothing, {name: nothing.detach() for name in ("pair_accuracy", "chosen_reward", "rejected_reward", "chosen_nll")})
    chosen, rejected = beta * sums[0::2], beta * sums[1::2]
    pair = row // 2
    margin = (chosen - rejected)[pair]
    own = -(row_sums(logp, row) / lengths)[0::2][pair]
    stats = {"pair_accuracy": (margin > 0).float(), "chosen_reward": chosen[pair], "rejected_reward": rejected[pair], "chosen_nll": own}
    loss = nll_weight * own - F.logsigmoid(margin)
    return TokenLoss(_where(mask, loss), {name: _where(mask, value.detach()) for name, value in stats.items()})


def row_sums(values: Tensor, row: Tensor) -> Tensor:
    """Sums over the tokens of each row: values [L] and the number of each value's row -> [rows]."""
    return values.new_zeros(int(row.max()) + 1).index_add(0, row, values)


def policy_gradient(
    logp: Tensor,
    old_logp: Tensor,
    rollout_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: tuple[float, float] = (0.2, 0.28),
    tis_cap: float = 2.0,
) -> TokenLoss:
    """Clipped policy gradient with truncated importance sampling; all arguments float [L], gradient flows through `logp` only.

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
    importance = _where(mask, old_logp - rollout_logp).detach().exp()
    correction = importance.clamp(max=tis_cap)
    loss = -correction * torch.minimum(ratio * advantage, clipped * advantage)
    stats = {
        "ratio": ratio.detach(),
        "clip_fraction": (clipped * advantage < ratio * advantage).float(),
        "rollout_mismatch": (logp - rollout_logp).detach().abs(),
        "tis_truncated": (importance > tis_cap).float(),
    }
    return TokenLoss(_where(mask, loss), {name: _where(mask, value) for name, value in stats.items()})


def reference_kl(logp: Tensor, old_logp: Tensor, reference_logp: Tensor, mask: Tensor) -> TokenLoss:
    """Ratio-weighted k3 estimate of KL(pi || reference), all float [L]: r (exp(d) - d - 1) with d = log reference - log pi.

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
