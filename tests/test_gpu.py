"""What training does on a GPU alone: attention by rows, compiled layers, offload. Skipped where there is none."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.causal_model import TokenScores, load
from cluster.training_config import TrainingConfig
from tasks.batch import Row, micro_batches, pack
from tasks.losses import nll

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

ROWS = [
    Row([5 + (7 * number + start) % 480 for number in range(length)], length // 3) for start, length in enumerate((200, 18, 90, 9, 250))
]
EXACT = {"dtype": "bfloat16", "warmup_ratio": 0.0, "schedule": "constant", "learning_rate": 1e-3, "micro_batch_tokens": 300}


def sft_loss(scores: TokenScores, batch: Any) -> Any:
    return nll(scores, batch.mask)


def logp(model: Any, rows: list[Row]) -> Tensor:
    """Log-probabilities of the learnt tokens of rows laid end to end."""
    batch = pack(rows).to(torch.device("cuda"))
    return model(batch.input_ids, batch.position_ids, batch.learnt, batch.targets, 1.0).logp


def losses(path: Path, steps: int = 4, **settings: Any) -> list[float]:
    """Losses of some steps on the same rows."""
    from cluster.deepspeed_engine import TrainingEngine

    engine = TrainingEngine(str(path), TrainingConfig(**{**EXACT, **settings}), 10)
    batches = micro_batches(ROWS, 300, 0, 1)
    return [engine.step(batches, sft_loss)["loss"] for _ in range(steps)]


def test_packed_rows_attend_as_separate_ones_and_have_their_gradient(toy: Path) -> None:
    config = TrainingConfig(dtype="bfloat16")
    packed, plain = (load(str(toy), config, on_gpu=True).cuda() for _ in range(2))
    plain.plain.set_attn_implementation("sdpa")
    assert packed.plain.config._attn_implementation == "packed"
    found, expected = logp(packed, ROWS), torch.cat([logp(plain, [row]) for row in ROWS])
    assert (found - expected).abs().max() < 0.05
    found.sum().backward()
    expected.sum().backward()
    for (name, weight), other in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert (weight.grad.float() - other.grad.float()).norm() < 0.03 * other.grad.float().norm(), name


@pytest.mark.parametrize("settings", [{"zero_stage": 2}, {"zero_stage": 2, "gradient_checkpointing": True, "lora_rank": 4}])
def test_compiled_layers_learn_what_others_learn(toy: Path, settings: dict[str, Any]) -> None:
    expected, found = losses(toy, **settings), losses(toy, compile=True, **settings)
    assert expected[-1] < expected[0] - 0.01 and found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_lies_in_the_hosts_memory_is_learnt_as_well(toy: Path, stage: int) -> None:
    expected = losses(toy, zero_stage=stage)
    assert expected[-1] < expected[0] - 0.02 and losses(toy, zero_stage=stage, offload=True) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_goes_on_and_a_full_model_comes_out(toy: Path, tmp_path: Path, stage: int) -> None:
    from transformers import AutoModelForCausalLM

    from cluster.deepspeed_engine import TrainingEngine

    config = TrainingConfig(**{**EXACT, "zero_stage": stage})  # type: ignore[arg-type]
    batches = micro_batches(ROWS, 300, 0, 1)
    engine = TrainingEngine(str(toy), config, 10)
    engine.step(batches, sft_loss)
    engine.save(tmp_path / "checkpoint", {"step": 1})
    expected = [engine.step(batches, sft_loss)["loss"] for _ in range(2)]
    again = TrainingEngine(str(toy), config, 10)
    assert again.load(tmp_path / "checkpoint") == {"step": 1}
    assert [again.step(batches, sft_loss)["loss"] for _ in range(2)] == pytest.approx(expected, abs=1e-3)
    again.export(tmp_path / "model")
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).named_parameters())
    weights = dict(again.named_weights())
    assert all(torch.equal(value, weights[name]) for name, value in exported.items()) and math.isfinite(expected[-1])
