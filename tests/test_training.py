"""Training on real processes: gradients over ranks and ZeRO stages, weights in vLLM, the worker group and its interruptions.

Run as a program, this file is one rank of a process group, a driver to be interrupted, or a trainer beside a vLLM engine.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from cluster.errors import UserError
from cluster.training_config import TrainingConfig
from flows.config import RunRequest, load_run
from tasks.batch import Row, micro_batches, pack
from tasks.losses import nll, token_logprobs
from tasks.sft import SftConfig, train_sft

ROOT = Path(__file__).parent.parent
ROWS = [Row(list(range(9, 9 + length)), prompt) for length, prompt in ((20, 5), (18, 10), (30, 4), (9, 3))]
BUDGET = 40
PROMPT = [7, 8, 9]
INTERRUPTED, WORKERS_LEFT = 77, 78
VLLM_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# Ray Train looks for new checkpoints every two seconds, in which a toy run is over.
RAY_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded two-layer Llama with tied embeddings and 512 tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    path = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


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


# Gradients over ranks and stages


def sft_loss(logits: Tensor, batch: Any) -> Any:
    return nll(logits, batch.targets, batch.mask)


def gradients_main(model: str, output: str) -> None:
    """One rank: writes each stage's gradient of the same four rows, read back from Adam's first moment after one step."""
    from deepspeed.utils import safe_get_full_optimizer_state
    from safetensors.torch import save_file

    from cluster.deepspeed_engine import TrainingEngine

    for stage in (2, 3):
        config = TrainingConfig(zero_stage=stage, warmup_ratio=0.0, gradient_clipping=0.0, schedule="constant")
        engine = TrainingEngine(model, config, 2)
        metrics = engine.step(micro_batches(ROWS, BUDGET, engine.rank, engine.world_size), sft_loss)
        weights = engine._engine.module.named_parameters()
        moments = {name: safe_get_full_optimizer_state(weight, "exp_avg") for name, weight in weights}
        # a step with a single row, which one of two ranks spends on a dummy
        single = engine.step(micro_batches(ROWS[:1], BUDGET, engine.rank, engine.world_size), sft_loss)
        if engine.rank == 0:
            save_file({name: moment / 0.1 for name, moment in moments.items()}, f"{output}/{stage}.safetensors")
            Path(f"{output}/{stage}.json").write_text(json.dumps([metrics, single]))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_is_that_of_plain_torch_whatever_the_ranks_and_the_stage(toy: Path, tmp_path: Path, ranks: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, __file__, "gradients", str(toy), str(tmp_path)]
    processes = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()

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
    for stage in (2, 3):
        metrics, single = json.loads((tmp_path / f"{stage}.json").read_text())
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6) and metrics["tokens"] == tokens
        assert single["tokens"] == 15
        gradients = load_file(tmp_path / f"{stage}.safetensors")
        for name, weight in model.named_parameters():
            assert (gradients[name] - weight.grad).norm() <= 1e-5 * weight.grad.norm(), (stage, name)


# Weight transfer


def transfer_main(model: str, output: str) -> None:
    """Samples from vLLM, trains twice, and compares the log-probabilities of both sides before and after each transfer."""
    os.environ |= VLLM_ENVIRONMENT
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
        (logp,) = trainer.evaluate([batch], lambda logits, batch: token_logprobs(logits, batch.targets))
        difference = (logp - batch.values["rollout"]).abs()[batch.mask > 0]
        return [float(difference.mean()), float(difference.max())]

    seen = {"fresh": [mismatch()], "stale": [], "synced": []}
    for version in ("1", "2"):
        trainer.step(micro_batches(ROWS, BUDGET, 0, 1), sft_loss)
        seen["stale"].append(mismatch())
        write_weights(f"{output}/weights.safetensors", trainer.named_weights())
        engine.start_weight_update()
        engine.update_weights({"update_info": {"path": f"{output}/weights.safetensors"}})
        engine.finish_weight_update(version)
        seen["synced"].append(mismatch())
    Path(f"{output}/mismatch.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_vllm_agrees_with_the_trainer_after_each_transfer_and_not_before(toy: Path, tmp_path: Path) -> None:
    """In float32, per token. The tied output layer is where a transfer goes wrong without a trace on a CPU."""
    run_main("transfer", toy, tmp_path)
    seen = json.loads((tmp_path / "mismatch.json").read_text())
    assert all(mean <= 5e-5 and largest <= 1e-3 for mean, largest in seen["fresh"] + seen["synced"])
    assert all(stale[0] >= 20 * synced[0] for stale, synced in zip(seen["stale"], seen["synced"], strict=True))


def generate_main(output: str, *models: str) -> None:
    """Loads checkpoints in vLLM, one after the other, and writes the greedy continuation of each."""
    os.environ |= VLLM_ENVIRONMENT
    from vllm import LLM, SamplingParams

    params = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
    drawn = []
    for model in models:
        engine = LLM(model=model, skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True)
        (request,) = engine.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        drawn.append(list(request.outputs[0].token_ids))
        del engine
    Path(output).write_text(json.dumps(drawn))


def run_main(name: str, *arguments: object) -> None:
    """Runs one of this file's programs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_NO_USAGE_STATS": "1"}
    subprocess.run([sys.executable, __file__, name, *map(str, arguments)], env=environment, check=True, timeout=280)


# The worker group


def sft_config(stage: int) -> SftConfig:
    """The demo's run file, for two ranks and a toy."""
    training = {"zero_stage": stage, "learning_rate": 1e-3, "micro_batch_tokens": 64}
    changes = [f"sft.training.{name}={value}" for name, value in training.items()]
    changes += ["sft.ranks=2", "sft.epochs=20", "sft.rows_per_step=6", "sft.save_every_steps=10"]
    return load_run(RunRequest(file=str(ROOT / "specs" / "runs" / "demo.yaml"), changes=changes)).sft


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows: with six a step and fifty epochs, a hundred steps."""
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(6, 30, (12,), generator=generator).tolist()
    ids = [torch.randint(5, 500, (length,), generator=generator).tolist() for length in lengths]
    columns = {"input_ids": pa.array(ids, pa.list_(pa.int32())), "prompt_length": pa.array([3] * 12, pa.int32())}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    from cluster.session import ray_session

    os.environ |= RAY_ENVIRONMENT
    with ray_session():
        yield


@pytest.fixture(scope="module")
def finished(ray_cluster: None, rows_file: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of an undisturbed run at ZeRO-2."""
    output = tmp_path_factory.mktemp("sft") / "undisturbed"
    train_sft(str(rows_file), str(toy), str(output), sft_config(2))
    return output


def losses_in(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(40))
    return [line["loss"] for line in lines]


def train_workers() -> list[psutil.Process]:
    """The Ray Train workers below this process."""
    return [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def wait_for_lines(path: Path, count: int, seconds: float = 200) -> None:
    """Waits until a file has that many lines, the last perhaps without its end."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert time.monotonic() < deadline, f"{path} never had {count} lines"
        time.sleep(0.02)


@pytest.mark.slow
def test_sft_learns_and_exports_a_model_that_transformers_loads(finished: Path) -> None:
    losses = losses_in(finished)
    assert losses[-1] < 0.7 * losses[0]
    assert load(finished).lm_head.weight.shape == (512, 128)


@pytest.mark.slow
def test_a_finished_run_is_not_done_again_nor_replaced_by_another(finished: Path, rows_file: Path, toy: Path) -> None:
    before = (finished / "model.safetensors").stat().st_mtime_ns
    again = train_sft(str(rows_file), str(toy), str(finished), sft_config(2).model_copy(update={"save_every_steps": 7}))
    assert again["step"] == 39 and (finished / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another configuration"):
        train_sft(str(rows_file), str(toy), str(finished), sft_config(3))


@pytest.mark.slow
def test_zero_3_with_a_killed_worker_ends_where_undisturbed_zero_2_does_and_vllm_loads_both(
    finished: Path, rows_file: Path, toy: Path
) -> None:
    output = finished.parent / "killed"

    def kill_one() -> None:
        wait_for_lines(output.parent / ".training" / output.name / "metrics.jsonl", 15)
        train_workers()[-1].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    metrics = train_sft(str(rows_file), str(toy), str(output), sft_config(3))
    killer.join()
    assert losses_in(output) == pytest.approx(losses_in(finished), rel=1e-4)
    assert metrics["loss"] == losses_in(output)[-1]
    ours, theirs = load(output).state_dict(), load(finished).state_dict()
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in theirs)
    run_main("generate", finished.parent / "drawn.json", finished, output)
    for path, drawn in zip((finished, output), json.loads((finished.parent / "drawn.json").read_text()), strict=True):
        ids = list(PROMPT)
        with torch.no_grad():
            for _ in drawn:
                ids.append(int(load(path)(torch.tensor([ids])).logits[0, -1].argmax()))
        assert drawn == ids[len(PROMPT) :], "vLLM and transformers read the export alike"


def interrupt_main(rows: str, model: str, output: str) -> None:
    """A driver that is interrupted: its exit code says whether it noticed, and whether workers survived."""
    from cluster.session import ray_session

    with ray_session():
        try:
            train_sft(rows, model, output, sft_config(2))
        except KeyboardInterrupt:
            _, alive = psutil.wait_procs(train_workers(), timeout=5)
            sys.exit(WORKERS_LEFT if alive else INTERRUPTED)


@pytest.mark.soak
def test_an_interrupt_stops_the_workers_and_the_next_run_continues(finished: Path, rows_file: Path, toy: Path) -> None:
    output = finished.parent / "interrupted"
    run = output.parent / ".training" / output.name
    command = [sys.executable, __file__, "interrupt", str(rows_file), str(toy), str(output)]
    driver = subprocess.Popen(command, env={**os.environ, **RAY_ENVIRONMENT})
    try:
        wait_for_lines(run / "checkpoint_manager_snapshot.json", 1)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=120) == INTERRUPTED
    finally:
        driver.kill()
    done = (run / "metrics.jsonl").read_text().splitlines()
    assert 10 <= len(done) < 40 and not output.exists()
    train_sft(str(rows_file), str(toy), str(output), sft_config(2))
    # steps before the first checkpoint were not done again: their lines, with their timings, are the same
    assert (output / "metrics.jsonl").read_text().splitlines()[:10] == done[:10]
    assert losses_in(output) == pytest.approx(losses_in(finished), rel=1e-6)


if __name__ == "__main__":
    {"gradients": gradients_main, "transfer": transfer_main, "generate": generate_main, "interrupt": interrupt_main}[sys.argv[1]](
        *sys.argv[2:]
    )
