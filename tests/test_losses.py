"""Batches and losses: packing, the plan of ranks, orders of rows, and the closed forms of every loss."""

import math

import pytest
import torch

from cluster.causal_model import score
from cluster.errors import UserError
from tasks.advantages import group_advantages, judge_noise, spread_over_tokens
from tasks.batch import Row, RowOrder, assign, micro_batches, pack, pair_batches, steps_per_epoch
from tasks.losses import dpo, nll, policy_gradient, reference_kl

ROWS = [Row(list(range(9, 9 + length)), prompt) for length, prompt in ((20, 5), (18, 10), (30, 4), (9, 3))]
BUDGET = 40


# Batches


def test_pack_aligns_targets_mask_and_values_to_the_predicting_position() -> None:
    batch = pack([Row([1, 2, 3, 4], 2, {"advantage": [0.5, -0.5]}), Row([5, 6], 1, {"advantage": [2.0]})])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.learnt.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [3, 4, 6]
    assert batch.mask.tolist() == [1, 1, 1]
    assert batch.values["advantage"].tolist() == [0.5, -0.5, 2.0]


@pytest.mark.parametrize("row", [Row([1, 2], 0), Row([1, 2], 2)])
def test_a_row_that_cannot_be_learnt_from_is_the_users_mistake(row: Row) -> None:
    with pytest.raises(UserError, match="prompt_length"):
        pack([row])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[5], [30, 30, 30, 30, 4], [100, 3, 3], list(range(1, 40))])
def test_every_row_is_packed_once_within_the_budget_and_ranks_get_equally_many_batches(lengths: list[int], ranks: int) -> None:
    plan = assign(lengths, BUDGET, ranks)
    assert len(plan) == ranks and len({len(batches) for batches in plan}) == 1
    assert sorted(index for batches in plan for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in (batch for batches in plan for batch in batches):
        assert sum(lengths[index] for index in batch) <= BUDGET or len(batch) == 1


def test_a_rank_without_rows_gets_a_batch_of_weight_zero() -> None:
    batches = [micro_batches(ROWS[:1], BUDGET, rank, 2) for rank in (0, 1)]
    assert [len(share) for share in batches] == [1, 1]
    assert sorted(float(share[0].mask.sum()) for share in batches) == [0.0, 15.0]


def test_an_epoch_takes_every_row_once_in_an_order_of_its_own() -> None:
    steps = [RowOrder([1] * 10, 4, seed=3).at(step) for step in range(2 * steps_per_epoch(10, 4))]
    first, second = ([index for epoch, rows in steps if epoch == number for index in rows] for number in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert steps == list(map(RowOrder([1] * 10, 4, seed=3).at, range(6)))


# Losses


def test_nll_is_the_log_of_the_softmax_and_ignores_what_is_masked() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.inf, 0.0]])
    loss = nll(score(logits, torch.tensor([1, 0])), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss.loss, torch.tensor([-math.log(0.75), 0.0]))
    assert loss.stats["token_accuracy"].tolist() == [1.0, 0.0]


def test_temperature_divides_logits() -> None:
    logits = torch.tensor([[0.0, 2 * math.log(3.0)]])
    scores = score(logits, torch.tensor([1]), temperature=2.0)
    torch.testing.assert_close(scores.logp, torch.tensor([math.log(0.75)]))
    torch.testing.assert_close(scores.entropy, torch.tensor([-0.75 * math.log(0.75) - 0.25 * math.log(0.25)]))


def test_dpo_is_the_logistic_loss_of_the_margin_and_counts_each_pair_once() -> None:
    pairs = [(Row([1, 2, 3, 4], 2), Row([1, 2, 9], 2)), (Row([5, 6], 1), Row([5, 7, 8], 1))]
    (batch,) = pair_batches(pairs, 100, 0, 1)
    assert batch.row.tolist() == [0, 0, 1, 2, 3, 3] and batch.mask.tolist() == [1, 0, 0, 1, 0, 0]
    logp = torch.tensor([-1.0, -2.0, -1.0, -4.0, -0.5, -0.5])
    reference = torch.tensor([-2.0, -2.0, -1.5, -2.0, -1.0, -1.0])
    loss = dpo(logp, reference, batch.row, batch.mask, beta=2.0)
    margins = torch.tensor([2 * (1.0 - 0.5), 2 * (-2.0 - 1.0)])
    torch.testing.assert_close(loss.loss[batch.mask > 0], torch.log1p(torch.exp(-margins)))
    assert loss.loss.sum() == loss.loss[batch.mask > 0].sum() and loss.stats["pair_accuracy"].tolist() == [1, 0, 0, 0, 0, 0]
    (empty,) = pair_batches(pairs[:1], 100, 1, 2)
    nothing = dpo(torch.zeros(1, requires_grad=True), torch.zeros(1), empty.row, empty.mask, beta=2.0)
    assert nothing.loss.tolist() == [0.0] and nothing.loss.requires_grad and set(nothing.stats) == set(loss.stats)


# Advantages


def test_group_advantages_match_their_closed_forms() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1], [5.0, math.nan, 1.0], [4.0, math.nan, math.nan]])
    half = 2.0 / math.sqrt(8.0)
    expected = {
        "grpo": [[-1.0, 0.0, 1.0], [half, 0.0, -half]],
        "dr_grpo": [[-1.0, 0.0, 1.0], [2.0, 0.0, -2.0]],
        "rloo": [[-1.5, 0.0, 1.5], [4.0, 0.0, -4.0]],
    }
    for kind, (first, third) in expected.items():
        advantages = group_advantages(rewards, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(advantages.values, torch.tensor([first, [0.0] * 3, third, [0.0] * 3]))
        assert advantages.flat.tolist() == [False, True, False, True] and not advantages.noisy.any()
        assert advantages.effective.tolist() == [True, False, True, False]


def test_the_judges_noise_is_the_variance_of_a_mean_of_its_runs() -> None:
    assert judge_noise([[0.5], [1.0]]) is None, "one run says nothing of the noise"
    assert judge_noise([[0.0, 1.0], [0.5, 0.5], [0.3]]) == pytest.approx(((0.5 + 0.0) / 2) / 2)
    generator = torch.Generator().manual_seed(0)
    runs = (0.5 + 0.1 * torch.randn(4000, 4, generator=generator)).tolist()
    assert judge_noise(runs) == pytest.approx(0.1**2 / 4, rel=0.05)


def test_groups_that_differ_no_more_than_the_judge_teach_nothing_and_others_less() -> None:
    rewards = torch.tensor([[0.4, 0.5, 0.6], [0.0, 0.5, 1.0]])  # variances 0.01 and 0.25
    shrunk, dropped, kept = (group_advantages(rewards, "dr_grpo", 0.05, rule) for rule in ("shrink", "drop", "keep"))  # type: ignore[arg-type]
    assert shrunk.noisy.tolist() == dropped.noisy.tolist() == [True, False] and kept.noisy.tolist() == [False, False]
    torch.testing.assert_close(shrunk.values, torch.tensor([[0.0, 0.0, 0.0], [-0.4, 0.0, 0.4]]))
    torch.testing.assert_close(dropped.values, torch.tensor([[0.0, 0.0, 0.0], [-0.5, 0.0, 0.5]]))
    torch.testing.assert_close(kept.values, torch.tensor([[-0.1, 0.0, 0.1], [-0.5, 0.0, 0.5]]))


def test_the_reward_may_be_kept_off_the_thought() -> None:
    assert spread_over_tokens(2.0, 3, 5, "all") == [2.0] * 5
    assert spread_over_tokens(2.0, 3, 5, "answer") == [0.0, 0.0, 0.0, 2.0, 2.0]
    assert spread_over_tokens(2.0, 0, 2, "answer") == [2.0, 2.0], "what has no closed thought is moved as a whole"


# Policy gradient


def test_policy_gradient_clips_above_and_below_and_truncates_the_correction() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0, 1.0])
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    rollout = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.log(4.0), math.nan])
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    loss = policy_gradient(ratio.log(), torch.zeros(6), rollout, advantage, mask)
    torch.testing.assert_close(loss.loss, torch.tensor([-1.28, 0.8, 1.5, -0.5, -2.0, 0.0]))
    assert loss.stats["clip_fraction"].tolist() == [1, 1, 0, 0, 0, 0]
    assert loss.stats["tis_truncated"].tolist() == [0, 0, 0, 0, 1, 0]


def test_on_policy_gradient_is_minus_advantage_times_score() -> None:
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    old = logp.detach()
    policy_gradient(logp, old, old, torch.tensor([2.0, -3.0]), torch.ones(2)).loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-2.0, 3.0]))


def test_gradient_of_the_weighted_k3_is_that_of_the_reverse_kl() -> None:
    """In expectation over all tokens: compare with the exact KL of two small distributions."""
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    reference = torch.tensor([0.1, 0.4, -0.3]).log_softmax(0)
    logp = logits.log_softmax(0)
    estimate = reference_kl(logp, logp.detach(), reference, torch.ones(3))
    (gradient,) = torch.autograd.grad((logp.detach().exp() * estimate.loss).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits)
    torch.testing.assert_close(gradient, exact)
    total = policy_gradient(logp, logp.detach(), logp.detach(), torch.ones(3), torch.ones(3)).plus(estimate, 0.5)
    assert {"ratio", "reference_kl"} <= set(total.stats)
