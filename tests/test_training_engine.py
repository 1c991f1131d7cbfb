"""One training engine: packed logits, gradients over ranks and ZeRO stages, and its weights in vLLM.

Run as a program, this file is one rank of a process group, or a trainer beside a vLLM engine.
"""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.causal_model import TokenScores
from cluster.errors import Diverged, UserError
from cluster.packed_attention import ARCHITECTURES
from cluster.training_config import TrainingConfig
from tasks.batch import Row, micro_batches, pack
from tasks.losses import nll

pytestmark = pytest.mark.training
ROOT = Path(__file__).parent.parent
ROWS = [Row(list(range(9, 9 + length)), prompt) for length, prompt in ((20, 5), (18, 10), (30, 4), (9, 3))]
BUDGET = 40


def logits_of(model: Any, rows: list[Row]) -> Tensor:
    """All logits of rows laid end to end."""
    batch = pack(rows)
    logits: Tensor = model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False).logits[0]
    return logits


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_packed_logits_are_those_of_separate_rows(toy: Path) -> None:
    model = load(toy)
    with torch.no_grad():
        packed = logits_of(model.train(), ROWS)
        separate = torch.cat([model.eval()(torch.tensor([row.input_ids])).logits[0] for row in ROWS])
    assert (packed - separate).abs().max() < 1e-5


def test_dropout_is_off(toy: Path, tmp_path: Path) -> None:
    from cluster.causal_model import load as load_to_train

    file = Path(shutil.copytree(toy, tmp_path / "model")) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.5}))
    batch, models = pack(ROWS), {folder: load_to_train(str(folder), TrainingConfig()) for folder in (toy, file.parent)}
    with torch.no_grad():
        plain, dropping = (
            model.train()(batch.input_ids, batch.position_ids, batch.learnt, batch.targets, 1.0).logp for model in models.values()
        )
    assert torch.equal(plain, dropping)
    assert not torch.equal(logits_of(load(file.parent).train(), ROWS), logits_of(load(toy), ROWS)), "the model has dropout"


SMALL: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "n_embd": 32, "intermediate_size": 64, "num_hidden_layers": 2, "n_layer": 2},
    **{"num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "max_position_embeddings": 128},
    **{"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "attention_dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
"""What makes models of all architectures small, with windows shorter than rows."""


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_packed_rows_attend_as_separate_ones_and_have_their_gradient(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from cluster.causal_model import load as load_to_train

    usual = AutoConfig.for_model(architecture).to_dict()
    small = {name: value for name, value in SMALL.items() if name in usual}
    if set(usual.get("layer_types") or ()) <= {"full_attention"}:
        small.pop("layer_types", None)
    if "kv_lora_rank" in usual:
        small = {**small, "num_key_value_heads": 4, "head_dim": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **small)).save_pretrained(tmp_path)
    packed, plain = load_to_train(str(tmp_path), TrainingConfig()), load(tmp_path)
    assert packed.plain.config._attn_implementation == "packed" and plain.config._attn_implementation == "sdpa"
    batch = pack(ROWS)
    found = packed(batch.input_ids, batch.position_ids, batch.learnt, batch.targets, 1.0).logp
    separate = [plain(torch.tensor([row.input_ids])).logits[0, row.prompt_length - 1 : -1].log_softmax(-1) for row in ROWS]
    expected = torch.cat(separate).gather(-1, batch.targets[:, None])[:, 0]
    assert (found - expected).abs().max() < 1e-5
    found.sum().backward()
    expected.sum().backward()
    for (name, weight), other in zip(packed.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert (weight.grad - other.grad).norm() <= 1e-5 * other.grad.norm() + 1e-7, name


def test_a_full_gpu_is_told_with_what_to_change() -> None:
    from cluster.deepspeed_engine import room_in_memory

    with pytest.raises(UserError, match=r"\(CUDA out of memory\). Lower training.micro_batch_tokens"), room_in_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


# Gradients over ranks and stages


def sft_loss(scores: TokenScores, batch: Any) -> Any:
    return nll(scores, batch.mask)


def loss_without_gradient(scores: TokenScores, batch: Any) -> Any:
    """A loss that is a number, with a gradient that is none."""
    found = nll(scores, batch.mask)
    return replace(found, loss=found.loss + (scores.logp - scores.logp.detach()).abs().sqrt())


STAGES: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2, "logit_tokens": 7},
    "3": {"zero_stage": 3, "logit_tokens": 7},
    "2-offload": {"zero_stage": 2, "offload": True},
    "3-offload": {"zero_stage": 3, "offload": True},
    "2-checkpointing": {"zero_stage": 2, "gradient_checkpointing": True},
    "3-checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
}
"""What shares, moves or computes again what a gradient is made of. `logit_tokens`: how many predictions have their logits in memory."""
MANY = 50
"""So often each row is in a step of many micro-batches."""


def gradients_main(model: str, output: str) -> None:
    """One rank: writes each stage's gradient of the same four rows, read back from Adam's first moment after one step."""
    from deepspeed.utils import safe_get_full_optimizer_state
    from safetensors.torch import save_file

    from cluster.deepspeed_engine import TrainingEngine

    settings: dict[str, Any] = {"warmup_ratio": 0.0, "gradient_clipping": 0.0, "schedule": "constant"}

    def moment(engine: Any, weight: Tensor) -> Tensor:
        of_all_ranks: Tensor = engine._engine.basic_optimizer.state[weight]["exp_avg"] if not engine.config.zero_stage else None
        return safe_get_full_optimizer_state(weight, "exp_avg") if of_all_ranks is None else of_all_ranks

    def gradient(engine: Any, rows: list[Row]) -> tuple[dict[str, float], dict[str, Tensor]]:
        metrics = engine.step(micro_batches(rows, BUDGET, engine.rank, engine.world_size), sft_loss)
        weights = engine._engine.module.plain.named_parameters()
        return metrics, {name: moment(engine, weight).float() / 0.1 for name, weight in weights}

    for name, case in STAGES.items():
        engine = TrainingEngine(model, TrainingConfig(**settings | case), 2)
        metrics, found = gradient(engine, ROWS)
        # a step with a single row, which one of two ranks spends on a dummy
        single = engine.step(micro_batches(ROWS[:1], BUDGET, engine.rank, engine.world_size), sft_loss)
        with pytest.raises(Diverged) as told:
            engine.step(micro_batches(ROWS, BUDGET, engine.rank, engine.world_size), loss_without_gradient)
        if engine.rank == 0:
            save_file(found, f"{output}/{name}.safetensors")
            Path(f"{output}/{name}.json").write_text(json.dumps([metrics, single, str(told.value)]))
    for stage in (1, 2, 3) if engine.world_size == 1 else ():
        engine = TrainingEngine(model, TrainingConfig(zero_stage=stage, dtype="bfloat16", **settings), 1)  # type: ignore[arg-type]
        _, found = gradient(engine, ROWS * MANY)
        save_file(found, f"{output}/bfloat16-{stage}.safetensors")


def run_ranks(ranks: int, *arguments: str) -> None:
    """Runs this file as a process group and waits for its end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, __file__, *arguments]
    processes = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_is_that_of_plain_torch_whatever_the_ranks_the_stage_and_the_pieces(toy: Path, tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, "gradients", str(toy), str(tmp_path))

    from safetensors.torch import load_file

    model = load(toy)
    losses = [
        torch.nn.functional.cross_entropy(
            logits_of(model, [row])[row.prompt_length - 1 : -1], torch.tensor(row.input_ids[row.prompt_length :]), reduction="sum"
        )
        for row in ROWS
    ]
    tokens = sum(len(row.input_ids) - row.prompt_length for row in ROWS)
    loss = torch.stack(losses).sum() / tokens
    loss.backward()
    norm = float(torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]))
    for case in STAGES:
        metrics, single, told = json.loads((tmp_path / f"{case}.json").read_text())
        assert told.startswith(("the gradient's norm became nan", "the gradient's norm became inf"))
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6) and metrics["weight"] == tokens
        assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)
        assert single["weight"] == 15
        gradients = load_file(tmp_path / f"{case}.safetensors")
        for name, weight in model.named_parameters():
            assert (gradients[name] - weight.grad).norm() <= 1e-5 * weight.grad.norm(), (case, name)
    for stage in (1, 2, 3) if ranks == 1 else ():
        gradients = load_file(tmp_path / f"bfloat16-{stage}.safetensors")
        for name, weight in model.named_parameters():
            # activations in bfloat16 cost a third of that; summed in bfloat16, so many micro-batches would be off by twice as much
            assert (gradients[name] - weight.grad).norm() <= 0.03 * weight.grad.norm(), (stage, name)


# Another number of ranks


def other_ranks_main(model: str, output: str, stage: str, lora_rank: str) -> None:
    """Two ranks train three steps and save before the third; one rank goes on from there. Both write the third step's weights."""
    from safetensors.torch import save_file

    from cluster.deepspeed_engine import TrainingEngine

    config = TrainingConfig(zero_stage=int(stage), lora_rank=int(lora_rank), learning_rate=1e-3, warmup_ratio=0.0)  # type: ignore[arg-type]
    engine = TrainingEngine(model, config, 4)
    if engine.world_size == 2:
        for _ in range(2):
            engine.step(micro_batches(ROWS, BUDGET, engine.rank, 2), sft_loss)
        engine.save(f"{output}/checkpoint", {"step": 2})
    else:
        assert engine.load(f"{output}/checkpoint") == {"step": 2}
    metrics = engine.step(micro_batches(ROWS, BUDGET, engine.rank, engine.world_size), sft_loss)
    weights = dict(engine.named_weights())
    engine.export(f"{output}/model-{engine.world_size}")
    if engine.rank == 0:
        save_file(weights, f"{output}/{engine.world_size}.safetensors")
        Path(f"{output}/{engine.world_size}.json").write_text(json.dumps(metrics))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "lora_rank"), [(3, 0), (3, 4), *(pytest.param(*case, marks=pytest.mark.soak) for case in ((1, 0), (2, 4)))]
)
def test_a_run_of_two_ranks_goes_on_with_one_as_if_nothing_had_changed(toy: Path, tmp_path: Path, stage: int, lora_rank: int) -> None:
    from safetensors.torch import load_file

    for ranks in (2, 1):
        run_ranks(ranks, "other_ranks", str(toy), str(tmp_path), str(stage), str(lora_rank))
    two, one = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (2, 1))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5) and one["learning_rate"] == two["learning_rate"]
    expected, found, start = (
        load_file(file) for file in (tmp_path / "2.safetensors", tmp_path / "1.safetensors", toy / "model.safetensors")
    )
    moved = [name for name in expected if not torch.equal(expected[name], start[name])]
    assert len(moved) > 5, "a test of weights that never moved"
    for name in moved:
        assert (found[name] - expected[name]).norm() <= 1e-3 * (expected[name] - start[name]).norm(), name
    if lora_rank:
        from peft import PeftModel

        for ranks, merged in ((2, expected), (1, found)):
            adapted = PeftModel.from_pretrained(load(toy), str(tmp_path / f"model-{ranks}" / "adapter")).merge_and_unload()
            assert all((weight - merged[name]).norm() <= 1e-6 * merged[name].norm() for name, weight in adapted.named_parameters())


# Weight transfer


def names_main(model: str, output: str) -> None:
    """One rank publishes the weights of a model that transformers holds in other shapes and by other names than its checkpoints."""
    from cluster.deepspeed_engine import TrainingEngine

    TrainingEngine(model, TrainingConfig(), 1).write_weights(f"{output}/weights.safetensors", 1)


@pytest.mark.slow
def test_engines_get_weights_by_the_names_of_a_saved_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    usual = AutoConfig.for_model("mixtral").to_dict()
    config = AutoConfig.for_model("mixtral", **{name: value for name, value in SMALL.items() if name in usual})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    run_ranks(1, "names", str(tmp_path / "model"), str(tmp_path))
    saved, published = load_file(tmp_path / "model" / "model.safetensors"), load_file(tmp_path / "weights.safetensors")
    assert saved.keys() == published.keys() and any("block_sparse_moe.experts.3.w1" in name for name in saved)
    assert all(torch.equal(value, published[name]) for name, value in saved.items())


def transfer_main(model: str, output: str) -> None:
    """Samples from vLLM, trains twice, and compares the log-probabilities of both sides before and after each transfer."""
    from vllm import LLM, SamplingParams
    from vllm.config import WeightTransferConfig

    from cluster.deepspeed_engine import TrainingEngine
    from cluster.weight_transfer import BACKEND, register, write_weights

    register()
    engine = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
    )
    engine.init_weight_transfer_engine({"init_info": {}})
    trainer = TrainingEngine(model, TrainingConfig(learning_rate=1e-3, warmup_ratio=0.0), 8)

    def mismatch() -> list[float]:
        """Mean and maximum over tokens of the difference between both sides."""
        params = SamplingParams(max_tokens=16, temperature=1.0, logprobs=0, detokenize=False, ignore_eos=True)
        prompts = [{"prompt_token_ids": [7, 8, 9 + number]} for number in range(4)]
        rows = []
        for prompt, request in zip(prompts, engine.generate(prompts, params, use_tqdm=False), strict=True):
            drawn = request.outputs[0]
            values = [entry[token].logprob for token, entry in zip(drawn.token_ids, drawn.logprobs, strict=True)]
            rows.append(Row(prompt["prompt_token_ids"] + list(drawn.token_ids), 3, {"rollout": values}))
        (batch,) = micro_batches(rows, 1024, 0, 1)
        (logp,) = trainer.evaluate([batch], lambda scores, batch: scores.logp)
        difference = (logp - batch.values["rollout"]).abs()[batch.mask > 0]
        return [float(difference.mean()), float(difference.max())]

    seen = {"fresh": [mismatch()], "stale": [], "synced": []}
    for version in (1, 2):
        trainer.step(micro_batches(ROWS, BUDGET, 0, 1), sft_loss)
        seen["stale"].append(mismatch())
        trainer.write_weights(f"{output}/weights.safetensors", version)
        engine.start_weight_update()
        engine.update_weights({"update_info": {"path": f"{output}/weights.safetensors", "version": version}})
        engine.finish_weight_update(str(version))
        seen["synced"].append(mismatch())
    refusals = []
    for wanted, names in ((3, None), (4, "norm.weight")):
        kept = {name: weight for name, weight in trainer.named_weights() if not names or names in name}
        write_weights(f"{output}/weights.safetensors", kept, 4)
        engine.start_weight_update()
        try:
            engine.update_weights({"update_info": {"path": f"{output}/weights.safetensors", "version": wanted}})
            engine.finish_weight_update(str(wanted))
        except Exception as error:
            refusals.append(str(error))
    seen["refusals"] = refusals
    Path(f"{output}/mismatch.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_vllm_agrees_with_the_trainer_after_each_transfer_and_not_before(
    toy: Path, tmp_path: Path, vllm_environment: dict[str, str]
) -> None:
    """In float32, per token. The tied output layer is where a transfer goes wrong without a trace on a CPU."""
    command = [sys.executable, __file__, "transfer", str(toy), str(tmp_path)]
    subprocess.run(command, env=vllm_environment, check=True, timeout=280)
    seen = json.loads((tmp_path / "mismatch.json").read_text())
    assert all(mean <= 5e-5 and largest <= 1e-3 for mean, largest in seen["fresh"] + seen["synced"])
    assert all(stale[0] >= 20 * synced[0] for stale, synced in zip(seen["stale"], seen["synced"], strict=True))
    older, part = seen["refusals"]
    assert "holds weights of version 4, not 3" in older and "did not come: model.embed_tokens.weight" in part


# Long thoughts

LONG, WORDS = 16_384, 49_152
"""Tokens of a row, and of the vocabulary: in float32 the logits of the one are 3 GiB."""


def long_main(output: str) -> None:
    """One rank learns from one long row; writes how much memory that took at its peak, in GiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cluster.deepspeed_engine import TrainingEngine

    sizes = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=LONG, tie_word_embeddings=True)).save_pretrained(f"{output}/model")
    engine = TrainingEngine(f"{output}/model", TrainingConfig(micro_batch_tokens=LONG, logit_tokens=512), 2)
    row = Row([9 + place % 40_000 for place in range(LONG)], 1)
    engine.step(micro_batches([Row(row.input_ids[:64], 1)], LONG, 0, 1), sft_loss)
    before = peak()
    metrics = engine.step(micro_batches([row], LONG, 0, 1), sft_loss)
    Path(f"{output}/long.json").write_text(json.dumps({"weight": metrics["weight"], "gib": peak() - before}))


def peak() -> float:
    """The most memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@pytest.mark.soak
def test_a_row_of_16k_tokens_takes_less_memory_than_its_logits_would(tmp_path: Path) -> None:
    run_ranks(1, "long", str(tmp_path))
    seen = json.loads((tmp_path / "long.json").read_text())
    assert seen["weight"] == LONG - 1
    assert seen["gib"] < 0.5 * LONG * WORDS * 4 / 2**30, seen


if __name__ == "__main__":
    programs = {
        "names": names_main,
        "gradients": gradients_main,
        "other_ranks": other_ranks_main,
        "transfer": transfer_main,
        "long": long_main,
    }
    programs[sys.argv[1]](*sys.argv[2:])
