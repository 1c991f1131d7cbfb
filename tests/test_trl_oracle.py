"""Our losses beside TRL's on fixed tensors. TRL's trainers are never built: their loss is called with what it reads of a trainer."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from tasks.losses import dpo, policy_gradient, reference_kl

pytestmark = pytest.mark.filterwarnings("ignore:TRL currently supports vLLM", "ignore:.*torch.jit.script")
ROWS, LENGTH = 4, 7
BETA, KL = 0.3, 0.05
ACCELERATOR = SimpleNamespace(
    num_processes=1, device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value, reduce=lambda value, reduction: value
)


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    """Log-probabilities of four completions of different lengths, as four policies give them."""
    generator = torch.Generator().manual_seed(4)
    names = ("logp", "old", "rollout", "reference")
    found = {name: -1.0 - torch.rand(ROWS, LENGTH, generator=generator) for name in names}
    found["mask"] = (torch.arange(LENGTH) < torch.tensor([7, 3, 5, 1])[:, None]).float()
    found["advantage"] = torch.tensor([1.5, -0.5, 0.7, -2.0])
    return found


def gradient(loss: Tensor, logp: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, logp)
    return found


def test_policy_gradient_and_kl_are_trls(tokens: dict[str, Tensor]) -> None:
    """Token-level loss with its global denominator (DAPO), clip-higher, truncated importance sampling, ratio-weighted KL."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    logp = tokens["logp"].clone().requires_grad_()
    trainer = MagicMock(
        loss_type="dapo",
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.28,
        beta=KL,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        accelerator=ACCELERATOR,
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )
    inputs: dict[str, Any] = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long),
        "completion_mask": tokens["mask"],
        "advantages": tokens["advantage"],
        "old_per_token_logps": tokens["old"],
        "ref_per_token_logps": tokens["reference"],
        "importance_sampling_ratio": (tokens["old"] - tokens["rollout"]).exp().clamp(max=2.0),
        "num_items_in_batch": tokens["mask"].sum(),
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)

    ours_logp = tokens["logp"].clone().requires_grad_()
    flat = {name: tokens[name].flatten() for name in ("old", "rollout", "reference", "mask")}
    advantage = tokens["advantage"][:, None].expand(ROWS, LENGTH).flatten()
    loss = policy_gradient(ours_logp.flatten(), flat["old"], flat["rollout"], advantage, flat["mask"])
    loss = loss.plus(reference_kl(ours_logp.flatten(), flat["old"], flat["reference"], flat["mask"]), KL)
    ours = (loss.loss * flat["mask"]).sum() / flat["mask"].sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, ours_logp), gradient(theirs, logp))


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_advantages_are_centred_and_scaled_as_trls_but_for_its_epsilon(kind: str) -> None:
    from trl.trainer.utils import nanstd

    from tasks.advantages import group_advantages

    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    centred = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
    theirs = {"grpo": centred / nanstd(rewards, dim=1)[:, None], "dr_grpo": centred, "rloo": centred * 4 / 3}
    torch.testing.assert_close(group_advantages(rewards, kind).values, theirs[kind])  # type: ignore[arg-type]


def test_dpo_is_trls(tokens: dict[str, Tensor]) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    def model_of(logp: Tensor) -> Any:
        metrics = {name: torch.zeros(ROWS, LENGTH) for name in ("entropy", "mean_logits")} | {"is_top1": tokens["mask"] > 0}
        return lambda **_: SimpleNamespace(log_probs=logp * tokens["mask"], **metrics)

    logp = tokens["logp"].clone().requires_grad_()
    trainer = MagicMock(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=0.0,
        use_weighting=False,
        aux_loss_enabled=False,
        accelerator=ACCELERATOR,
        _total_train_tokens=0,
        _tp_size=1,
    )
    reference = (tokens["reference"] * tokens["mask"]).sum(1)
    inputs = {
        "input_ids": torch.zeros(ROWS, LENGTH + 1, dtype=torch.long),
        "attention_mask": torch.ones(ROWS, LENGTH + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(ROWS, 1), tokens["mask"]], 1),
        "ref_chosen_logps": reference[:2],
        "ref_rejected_logps": reference[2:],
    }
    theirs = DPOTrainer._compute_loss(trainer, model_of(logp), inputs, return_outputs=False)

    ours_logp = tokens["logp"].clone().requires_grad_()
    order = [0, 2, 1, 3]  # TRL lays all chosen before all rejected, we lay pair after pair
    kept = [tokens["mask"][row] > 0 for row in order]
    flat, flat_reference = (
        torch.cat([values[row][keep] for row, keep in zip(order, kept, strict=True)]) for values in (ours_logp, tokens["reference"])
    )
    rows = torch.cat([torch.full((int(keep.sum()),), number) for number, keep in enumerate(kept)])
    weights = ((torch.diff(rows, prepend=torch.tensor([-1])) > 0) & (rows % 2 == 0)).float()
    loss = dpo(flat, flat_reference, rows, weights, BETA)
    ours = (loss.loss * weights).sum() / weights.sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, ours_logp), gradient(theirs, logp))
