"""SFT beside a bare DeepSpeed loop and TRL's SFTTrainer, on the same model, rows, precision and optimiser.

    python tests/benchmarks/training.py --rounds 6

Contenders take turns, each in a process of its own with all cores. A turn takes some optimiser steps of `--rows` rows; what comes before
the end of its first step is not counted. Rows are of mixed length, from 40 to 400 tokens, of which a third is not learnt. Counted are
tokens of rows, padding left out.

- Specmill: `cluster.deepspeed_engine.TrainingEngine` with packed rows, as a rank of a run has it, without Ray.
- bare DeepSpeed: `deepspeed.initialize` with the same settings around transformers' model, the same packs in the same order, logits of all
  positions, cross-entropy over those that are learnt.
- TRL packed: `SFTTrainer` with `packing` by its default strategy, best fit decreasing, and packs as long as ours.
- TRL padded: `SFTTrainer` with batches of rows, each padded to its longest.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

from report import head, ranged, ratio, row, say

CONTENDERS = {"specmill": "Specmill", "deepspeed": "bare DeepSpeed", "packed": "TRL packed", "padded": "TRL padded"}
LIMITS = {"deepspeed": "lower end 0.95", "packed": "1, not behind", "padded": "1.2"}
PACK_TOKENS = 1024
STEPS = 4
LEARNING_RATE = 1e-5


def rows_of(count: int, vocabulary: int) -> list[tuple[list[int], int]]:
    """Token ids and the number of those that are not learnt."""
    chance = random.Random(0)
    lengths = [round(40 * 10 ** chance.random()) for _ in range(count)]
    return [([chance.randrange(10, vocabulary) for _ in range(length)], length // 3) for length in lengths]


def in_steps(rows: Sequence[Any], size: int) -> list[list[Any]]:
    """The rows of each step."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def timed(steps: Sequence[Sequence[tuple[list[int], int]]], take: Callable[[Sequence[tuple[list[int], int]]], object]) -> dict[str, float]:
    """Tokens and seconds of all steps but the first."""
    take(steps[0])
    started = time.perf_counter()
    for step in steps[1:]:
        take(step)
    return {"tokens": sum(len(ids) for step in steps[1:] for ids, _ in step), "seconds": time.perf_counter() - started}


def specmill(model: str, steps: Sequence[Sequence[tuple[list[int], int]]]) -> dict[str, float]:
    """Our engine and our packing."""
    from cluster.deepspeed_engine import TrainingEngine
    from tasks.batch import Row, micro_batches
    from tasks.losses import nll

    engine = TrainingEngine(model, settings(), len(steps))

    def take(step: Sequence[tuple[list[int], int]]) -> None:
        batches = micro_batches([Row(ids, prompt) for ids, prompt in step], PACK_TOKENS, 0, 1)
        engine.step(batches, lambda scores, batch: nll(scores, batch.mask))

    return timed(steps, take)


def settings() -> Any:
    """What Specmill and the bare loop tell DeepSpeed."""
    from cluster.training_config import TrainingConfig

    return TrainingConfig(zero_stage=1, learning_rate=LEARNING_RATE, micro_batch_tokens=PACK_TOKENS, schedule="constant", warmup_ratio=0.0)


def bare_deepspeed(model: str, steps: Sequence[Sequence[tuple[list[int], int]]]) -> dict[str, float]:
    """The loop of a tutorial, with packs."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "warning", "LOCAL_RANK": "0"}
    import deepspeed
    import deepspeed.ops
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from tasks.batch import Row, micro_batches

    deepspeed.ops.__compatible_ops__ = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=settings().deepspeed_settings(False))
    engine.train()

    def take(step: Sequence[tuple[list[int], int]]) -> None:
        batches = micro_batches([Row(ids, prompt) for ids, prompt in step], PACK_TOKENS, 0, 1)
        learnt = sum(len(batch.learnt) for batch in batches)
        for batch in batches:
            logits = engine(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[batch.learnt], batch.targets, reduction="sum")
            engine.backward(loss / learnt)
        engine.step()

    return timed(steps, take)


def trl(model: str, steps: Sequence[Sequence[tuple[list[int], int]]], packing: bool) -> dict[str, float]:
    """TRL's trainer over all rows once; the first step is not counted."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [row for step in steps for row in step]
    masks = [[0] * prompt + [1] * (len(ids) - prompt) for ids, prompt in rows]
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "completion_mask": masks})
    seen: list[tuple[float, int]] = []

    class Counting(SFTTrainer):
        tokens = 0

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            self.tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
            return super().compute_loss(model, inputs, *arguments, **named)

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append((time.perf_counter(), trainer.tokens))

    with tempfile.TemporaryDirectory() as place:
        arguments = SFTConfig(
            output_dir=place,
            use_cpu=True,
            bf16=False,
            optim="adamw_torch_fused",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            per_device_train_batch_size=1 if packing else len(steps[0]),
            num_train_epochs=1,
            packing=packing,
            max_length=PACK_TOKENS,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        trainer = Counting(module, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()])
        trainer.train()
    return {"tokens": seen[-1][1] - seen[0][1], "seconds": seen[-1][0] - seen[0][0]}


def turn(contender: str, model: str, rows: int) -> dict[str, float]:
    """One contender, in this process."""
    from transformers import AutoConfig

    from cluster.training import prepare_worker

    prepare_worker()
    steps = in_steps(rows_of(rows * STEPS, AutoConfig.from_pretrained(model).vocab_size), rows)
    if contender == "specmill":
        return specmill(model, steps)
    return bare_deepspeed(model, steps) if contender == "deepspeed" else trl(model, steps, packing=contender == "packed")


def compare(arguments: argparse.Namespace) -> None:
    """All turns, and their rows of the table."""
    from cluster.models import resolve_model
    from cluster.training import keep_memory

    head()
    model, orders = resolve_model(arguments.model).path, list(permutations(CONTENDERS))
    speeds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for number in range(arguments.rounds):
        for contender in orders[number * 5 % len(orders)]:
            command = [sys.executable, __file__, "--turn", contender, "--model", model, "--rows", str(arguments.rows)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **keep_memory()})
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            speeds[contender].append(found["tokens"] / found["seconds"])
            say(f"round {number + 1}: {contender} {found['tokens']:.0f} tokens in {found['seconds']:.1f} s")
    for contender, values in speeds.items():
        ranged(CONTENDERS[contender], values, "tokens/s")
    for contender, limit in LIMITS.items():
        mean, low, high = ratio(list(zip(speeds["specmill"], speeds[contender], strict=True)))
        row(f"Specmill / {CONTENDERS[contender]}", f"{mean:.3f}", f"95 % interval {low:.3f} to {high:.3f}, {arguments.rounds} pairs", limit)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each contender, at least 2")
    parser.add_argument("--rows", type=int, default=8, help="rows of an optimiser step")
    parser.add_argument("--model", default="default", help="`default`, a checkpoint directory or a hub id")
    parser.add_argument("--turn", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        print(json.dumps(turn(arguments.turn, arguments.model, arguments.rows)))
    else:
        compare(arguments)
