"""SFT on a real worker group: it learns, restarts by itself, is interrupted and goes on; vLLM loads what it exports.

Run as a program, this file is a driver to be interrupted, or a vLLM engine that loads checkpoints.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.causal_model import TokenScores
from cluster.errors import Diverged, UserError
from cluster.training import UNFINISHED, keep_memory, report, run_workers
from cluster.training_config import WorkersConfig
from flows.config import RunRequest, load_run
from tasks.batch import MicroBatch
from tasks.losses import TokenLoss
from tasks.offline import train_offline
from tasks.sft import Sft
from tasks.stage_config import SftConfig

pytestmark = pytest.mark.training
ROOT = Path(__file__).parent.parent
PROMPT = [7, 8, 9]
STEPS, SAVED = 32, 8
INTERRUPTED, WORKERS_LEFT = 77, 78


def sft_config(stage: int) -> SftConfig:
    """The demo's run file, for two ranks and a toy."""
    training = {"zero_stage": stage, "learning_rate": 1e-3, "micro_batch_tokens": 64}
    changes = [f"sft.training.{name}={value}" for name, value in training.items()]
    changes += ["sft.ranks=2", f"sft.epochs={STEPS // 2}", "sft.rows_per_step=6", f"sft.save_every_steps={SAVED}"]
    return load_run(RunRequest(file=str(ROOT / "specs" / "runs" / "demo.yaml"), changes=changes)).sft


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows: two steps of six an epoch."""
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(6, 30, (12,), generator=generator).tolist()
    ids = [torch.randint(5, 500, (length,), generator=generator).tolist() for length in lengths]
    columns = {"input_ids": pa.array(ids, pa.list_(pa.int32())), "prompt_length": pa.array([3] * 12, pa.int32())}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def finished(local_ray: None, rows_file: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of an undisturbed run at ZeRO-2."""
    output = tmp_path_factory.mktemp("sft") / "undisturbed"
    train_offline(Sft, str(rows_file), str(toy), str(output), sft_config(2))
    return output


def losses_in(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
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
    again = train_offline(Sft, str(rows_file), str(toy), str(finished), sft_config(2).model_copy(update={"save_every_steps": 7}))
    assert again["step"] == STEPS - 1 and (finished / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another configuration"):
        train_offline(Sft, str(rows_file), str(toy), str(finished), sft_config(3))


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_at_once_and_names_the_rows(finished: Path, rows_file: Path, toy: Path) -> None:
    output = finished.parent / "diverged"
    changes = {"learning_rate": 1e38, "warmup_ratio": 0.0}
    training = sft_config(2).training.model_copy(update=changes)
    config = sft_config(2).model_copy(update={"ranks": 1, "save_every_steps": 1, "training": training})
    with pytest.raises(Diverged, match=r"sft step 1, rows number \d+, .*became nan; lower training.learning_rate"):
        train_offline(Sft, str(rows_file), str(toy), str(output), config)
    run = output.parent / ".training" / output.name
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1 and not output.exists()
    assert list(run.glob("checkpoint_*/state.json")), "what came before it is kept"


@pytest.mark.slow
def test_what_was_learnt_before_a_loss_that_is_no_number_is_gone_on_from(finished: Path, rows_file: Path, toy: Path) -> None:
    class Failing(Sft):
        """Its loss is no number from the sixth step on."""

        steps = 0

        def batches(self, indices: Sequence[int], rank: int, ranks: int) -> list[MicroBatch]:
            self.steps += 1
            return super().batches(indices, rank, ranks)

        def loss(self, scores: TokenScores, batch: MicroBatch) -> TokenLoss:
            found = super().loss(scores, batch)
            return replace(found, loss=found.loss * (math.nan if self.steps > 5 else 1.0))

    output = finished.parent / "failing"
    config = sft_config(2).model_copy(update={"save_every_steps": 2})
    with pytest.raises(Diverged, match="sft step 5, "):
        train_offline(Failing, str(rows_file), str(toy), str(output), config)
    learnt = (output.parent / ".training" / output.name / "metrics.jsonl").read_text().splitlines()[:4]
    train_offline(Sft, str(rows_file), str(toy), str(output), config)
    assert (output / "metrics.jsonl").read_text().splitlines()[:4] == learnt, "its first four steps are not taken again"
    assert losses_in(output) == pytest.approx(losses_in(finished), rel=1e-4)


@pytest.mark.slow
def test_a_node_that_sees_another_directory_by_the_name_of_the_runs_stops_it(local_ray: None, tmp_path: Path) -> None:
    def loop(settings: dict[str, Any]) -> None:
        for file in (tmp_path / "run").glob(".validate*"):  # which Ray writes there; it is not in a directory of another node
            file.unlink()
        report({}, SimpleNamespace(save=lambda *_: None), {}, tmp_path)

    with pytest.raises(UserError, match="not the run's directory on this node"):
        run_workers(loop, {}, WorkersConfig(ranks=1), storage=str(tmp_path), name="run")


@pytest.mark.slow
def test_a_rank_on_a_cpu_takes_memory_from_the_allocator_that_keeps_it(local_ray: None, tmp_path: Path) -> None:
    found = tmp_path / "maps"

    def loop(_: dict[str, Any]) -> None:
        found.write_text(Path("/proc/self/maps").read_text())

    run_workers(loop, {}, WorkersConfig(ranks=1), storage=str(tmp_path), name="run")
    assert keep_memory()["LD_PRELOAD"] in found.read_text()


@pytest.fixture(scope="module")
def killed(finished: Path, rows_file: Path, toy: Path) -> Path:
    """The export of a run at ZeRO-3 that lost a worker in the middle."""
    output = finished.parent / "killed"
    run = output.parent / ".training" / output.name
    (run / f"{UNFINISHED}of-a-killed-rank").mkdir(parents=True)

    def kill_one() -> None:
        wait_for_lines(run / "metrics.jsonl", SAVED + 4)
        train_workers()[-1].kill()

    with ThreadPoolExecutor(1) as pool:
        kill = pool.submit(kill_one)
        metrics = train_offline(Sft, str(rows_file), str(toy), str(output), sft_config(3))
        kill.result()
    assert metrics["loss"] == losses_in(output)[-1]
    assert not list(run.glob(f"{UNFINISHED}*"))
    return output


@pytest.mark.slow
def test_zero_3_with_a_killed_worker_ends_where_undisturbed_zero_2_does(finished: Path, killed: Path) -> None:
    assert losses_in(killed) == pytest.approx(losses_in(finished), rel=1e-4)
    ours, theirs = load(killed).state_dict(), load(finished).state_dict()
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in theirs)


@pytest.mark.soak
def test_vllm_reads_the_exports_of_zero_2_and_3_as_transformers_does(
    finished: Path, killed: Path, vllm_environment: dict[str, str]
) -> None:
    command = [sys.executable, __file__, "generate", str(finished.parent / "drawn.json"), str(finished), str(killed)]
    subprocess.run(command, env=vllm_environment, check=True, timeout=280)
    for path, drawn in zip((finished, killed), json.loads((finished.parent / "drawn.json").read_text()), strict=True):
        ids = list(PROMPT)
        with torch.no_grad():
            for _ in drawn:
                ids.append(int(load(path)(torch.tensor([ids])).logits[0, -1].argmax()))
        assert drawn == ids[len(PROMPT) :]


def interrupt_main(rows: str, model: str, output: str) -> None:
    """A driver that is interrupted: its exit code says whether it noticed, and whether workers survived."""
    from cluster.session import ray_session

    with ray_session():
        try:
            # a save after each step, lest the toy has learnt all before the interrupt comes
            train_offline(Sft, rows, model, output, sft_config(2).model_copy(update={"save_every_steps": 1}))
        except KeyboardInterrupt:
            _, alive = psutil.wait_procs(train_workers(), timeout=5)
            sys.exit(WORKERS_LEFT if alive else INTERRUPTED)


@pytest.mark.soak
@pytest.mark.parametrize(("ranks", "tolerance"), [(2, 1e-6), (1, 1e-4)])
def test_an_interrupt_stops_the_workers_and_the_next_run_continues(
    finished: Path, rows_file: Path, toy: Path, ranks: int, tolerance: float
) -> None:
    """With as many ranks as before, or with another number: then sums are rounded otherwise."""
    output = finished.parent / f"interrupted-{ranks}"
    run = output.parent / ".training" / output.name
    command = [sys.executable, __file__, "interrupt", str(rows_file), str(toy), str(output)]
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, env=alone | {"PYTHONPATH": str(ROOT)})
    try:
        wait_for_lines(run / "metrics.jsonl", SAVED)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=120) == INTERRUPTED
    finally:
        driver.kill()
    done = (run / "metrics.jsonl").read_text().splitlines()
    assert SAVED <= len(done) < STEPS and not output.exists()
    train_offline(Sft, str(rows_file), str(toy), str(output), sft_config(2).model_copy(update={"ranks": ranks}))
    # steps before the last checkpoint were not done again: their lines, with their timings, are the same
    kept = (output / "metrics.jsonl").read_text().splitlines()[: SAVED - 2]
    assert kept == done[: SAVED - 2]
    assert losses_in(output) == pytest.approx(losses_in(finished), rel=tolerance)


def generate_main(output: str, *models: str) -> None:
    """Loads checkpoints in vLLM, one after the other, and writes the greedy continuation of each."""
    from vllm import LLM, SamplingParams

    params = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
    drawn = []
    for model in models:
        engine = LLM(model=model, skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True)
        (request,) = engine.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        drawn.append(list(request.outputs[0].token_ids))
        del engine
    Path(output).write_text(json.dumps(drawn))


if __name__ == "__main__":
    {"generate": generate_main, "interrupt": interrupt_main}[sys.argv[1]](*sys.argv[2:])
