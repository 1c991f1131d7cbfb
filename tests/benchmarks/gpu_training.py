"""SFT of a random Llama of 1.2 billion weights on GPUs: tokens a second and model-FLOPs utilisation, beside a bare DeepSpeed loop.

    python tests/benchmarks/gpu_training.py
    torchrun --nproc-per-node 8 tests/benchmarks/gpu_training.py --case zero3 --model CHECKPOINT

Rows of mixed length, from 256 to 4,096 tokens, of which a third is not learnt, in bfloat16. Each case is a process of its own, in which
ours and the bare loop (where it takes part) take turns step by step; the first two steps of each are not counted. Model FLOPs are those
that the result needs: 6 a token and weight of the layers, 6 a learnt token and weight of the output layer, causal attention within rows.
What is computed twice is not counted. Utilisation is their share of the card's dense bfloat16 rate.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from report import head, ranged, ratio, row, say

from cluster.training_config import TrainingConfig
from tasks.batch import MicroBatch, Row, micro_batches

CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "zero2": ({"zero_stage": 2, "compile": True}, True),
    "zero3": ({"zero_stage": 3}, True),
    "packs of 32,768": ({"zero_stage": 2, "compile": True, "micro_batch_tokens": 32_768}, False),
    "not compiled": ({"zero_stage": 2}, False),
    "lora": ({"zero_stage": 2, "compile": True, "lora_rank": 16}, False),
    "offload": ({"zero_stage": 2, "compile": True, "offload": True}, False),
}
"""Settings of TrainingConfig, and whether the bare loop is measured beside it."""

PACK_TOKENS = 8192
"""Tokens of a pack, and of the logits that are in memory at a time."""

PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets, of the SXM form where there are several."""

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
LLAMA_1B = (2048, 8192, 16, 32, 8, 128_256)
SMALL = (128, 512, 2, 2, 1, 2048)
WARM_UP = 2


def make_model(directory: Path, small: bool) -> None:
    """Writes a random checkpoint of the shape of Llama 3.2 1B, or a small one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(zip(SHAPE, SMALL if small else LLAMA_1B, strict=True))
    config = LlamaConfig(**sizes, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def rows_of(tokens: int, vocabulary: int, chance: random.Random) -> list[Row]:
    """Rows of a step: about `tokens` of them."""
    rows: list[Row] = []
    while tokens > 0:
        length = round(256 * 16 ** chance.random())
        rows.append(Row([chance.randrange(vocabulary) for _ in range(length)], length // 3))
        tokens -= length
    return rows


def model_flops(config: Any, rows: Sequence[Row]) -> float:
    """FLOPs of one step forward and backward."""
    hidden, heads = config.hidden_size, config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layers = config.num_hidden_layers * hidden * (heads + 3 * config.intermediate_size)
    tokens = sum(len(row.input_ids) for row in rows)
    learnt = sum(len(row.input_ids) - row.prompt_length for row in rows)
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    attention = 6 * width * sum(len(row.input_ids) ** 2 for row in rows)
    return 6.0 * (layers * tokens + hidden * config.vocab_size * learnt) + attention


def ours(path: str, config: TrainingConfig) -> Callable[[Sequence[MicroBatch]], object]:
    """A step of Specmill."""
    from cluster.deepspeed_engine import TrainingEngine
    from tasks.losses import nll

    engine = TrainingEngine(path, config, 1000)
    return lambda batches: engine.step(batches, lambda scores, batch: nll(scores, batch.mask))


def bare(path: str, config: TrainingConfig, device: Any) -> Callable[[Sequence[MicroBatch]], object]:
    """A step of a tutorial's loop with packs; the process group is there already."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    settings = config.deepspeed_settings(device.type == "cuda")
    sharding = HfDeepSpeedConfig(settings) if config.zero_stage == 3 else None
    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    del sharding
    engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=settings)
    engine.train()

    def step(batches: Sequence[MicroBatch]) -> None:
        learnt = sum(len(batch.learnt) for batch in batches)
        for batch in (batch.to(device) for batch in batches):
            logits = engine(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[batch.learnt].float(), batch.targets, reduction="sum")
            engine.backward(loss / learnt)
        engine.step()

    return step


def measure(case: str, path: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each counted step of each contender, FLOPs and tokens of the steps."""
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig

    settings, beside = CASES[case]
    settings = {"micro_batch_tokens": PACK_TOKENS, "logit_tokens": PACK_TOKENS, **settings}
    config = TrainingConfig(dtype="bfloat16", schedule="constant", warmup_ratio=0.0, **settings)
    contenders = {"specmill": ours(path, config)}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if beside:
        contenders["deepspeed"] = bare(path, config, device)
    shape, chance = AutoConfig.from_pretrained(path), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    memory, flops, tokens = dict.fromkeys(contenders, 0), [], []
    for number in range(WARM_UP + arguments.steps):
        rows = rows_of(arguments.step_tokens * dist.get_world_size(), shape.vocab_size, chance)
        batches = micro_batches(rows, config.micro_batch_tokens, dist.get_rank(), dist.get_world_size())
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            synchronize, started = _clock(device)
            contenders[name](batches)
            synchronize()
            taken = time.perf_counter() - started
            if dist.get_rank() == 0:
                say(f"{case}, step {number + 1} of {WARM_UP + arguments.steps}, {name}: {taken:.2f} s")
            if number >= WARM_UP:
                seconds[name].append(taken)
            if device.type == "cuda":
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated())
        if number >= WARM_UP:
            flops.append(model_flops(shape, rows) / dist.get_world_size())
            tokens.append(sum(len(row.input_ids) for row in rows) / dist.get_world_size())
    if arguments.profile:
        _profile(contenders["specmill"], batches)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {"seconds": seconds, "memory": memory, "flops": flops, "tokens": tokens, "card": card}


def _clock(device: Any) -> tuple[Callable[[], None], float]:
    import torch

    if device.type != "cuda":
        return (lambda: None), time.perf_counter()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.synchronize, time.perf_counter()


def _profile(step: Callable[[Sequence[MicroBatch]], object], batches: Sequence[MicroBatch]) -> None:
    """Prints where the GPU's time of one step goes, to stderr."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step(batches)
    say(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=70))


def show(case: str, found: dict[str, Any]) -> None:
    """The rows of a case."""
    peak = next((rate for name, rate in PEAKS.items() if name in found["card"]), None)
    both = "deepspeed" in found["seconds"]
    names = {"specmill": f"{case}, Specmill", "deepspeed": f"{case}, bare DeepSpeed"}
    for contender, seconds in found["seconds"].items():
        ranged(names[contender], [tokens / time for tokens, time in zip(found["tokens"], seconds, strict=True)], "tokens/s a GPU")
        if peak:
            shares = [100 * flops / time / peak for flops, time in zip(found["flops"], seconds, strict=True)]
            ranged(names[contender], shares, "% of the card's bfloat16 rate")
        row(f"{names[contender]}, memory at its peak{', with the other one in it' * both}", f"{found['memory'][contender] / 1e9:.1f} GB")
    if both:
        mean, low, high = ratio(list(zip(found["seconds"]["deepspeed"], found["seconds"]["specmill"], strict=True)))
        row(f"{case}, Specmill / bare DeepSpeed", f"{mean:.3f}", f"95 % interval {low:.3f} to {high:.3f}, {len(found['tokens'])} pairs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="all of them without it")
    parser.add_argument("--steps", type=int, default=8, help="steps that are counted, at least 2")
    parser.add_argument("--step-tokens", type=int, default=65_536, help="tokens of a step and GPU")
    parser.add_argument("--small", action="store_true", help="a small model, to try this script on a CPU")
    parser.add_argument("--profile", action="store_true", help="say where a step's time goes")
    parser.add_argument("--model", help="a checkpoint directory, measured in this process, for one case; without it a random model is made")
    arguments = parser.parse_args()
    if arguments.model and not arguments.case:
        parser.error("--model needs a --case")
    if arguments.model:
        found = measure(arguments.case[-1], arguments.model, arguments)
        if int(os.environ.get("RANK", "0")) == 0:
            show(arguments.case[-1], found)
    else:
        head()
        with tempfile.TemporaryDirectory() as place:
            make_model(Path(place), arguments.small)
            command = [sys.executable, __file__, *sys.argv[1:]]
            environment = {**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # packs differ in length
            for case in arguments.case or CASES:
                subprocess.run([*command, "--case", case, "--model", place], check=True, env=environment)
