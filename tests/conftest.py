"""Fixtures that several rooms share: a tiny model for tests that need no language, and the folder of real data sets."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from write_sites import FOLDERS, WINDOWS

from cluster.models import copy_tokenizer, resolve_model


def pytest_configure() -> None:
    """Test processes that run side by side (pytest-xdist) share out the cores; engines bind themselves to the first they see."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        mine = cores[int(worker.removeprefix("gw")) % len(cores) :: workers]
        os.sched_setaffinity(0, set(mine))


LONGEST_FIRST = [
    "chain", "kill_matrix", "sft", "doors", "s3", "rl_recovery", "planted_rewards", "vllm_server", "schedules", "incremental",
    "training_engine", "cluster_room",
]  # fmt: skip
"""Files that take minutes. Processes side by side take the next file when theirs is done: a long one at the end leaves cores idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that take minutes; the order within a file stays."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def save_llama(path: Path, **sizes: int | None) -> None:
    """Writes a seeded two-layer Llama with tied embeddings in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, dtype="float32", intermediate_size=128, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a small Llama with the default model's tokenizer and template."""
    from transformers import AutoConfig

    parent = Path(resolve_model("default").path)
    tokens = AutoConfig.from_pretrained(parent)
    path = tmp_path_factory.mktemp("tiny-model")
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    parents = {name: getattr(tokens, name) for name in names}
    save_llama(path, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, **parents)
    copy_tokenizer(parent, path)
    return str(path)


@pytest.fixture(scope="session")
def scripted_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the tiny model, taught one thought and one answer."""
    from scripted_model import teach

    path = tmp_path_factory.mktemp("scripted-model")
    teach(tiny_model, path)
    return str(path)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with 512 tokens and no tokenizer."""
    path = tmp_path_factory.mktemp("toy")
    save_llama(path, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, max_position_embeddings=256)
    return path


@pytest.fixture(scope="session")
def vllm_environment() -> dict[str, str]:
    """The environment of a program that imports this project and runs vLLM in its own process."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of openly licensed data sets that `SPECMILL_TEST_DATA` names; they belong to their authors and are not in here."""
    folder = os.environ.get("SPECMILL_TEST_DATA")
    if not folder:
        pytest.skip("SPECMILL_TEST_DATA names no folder of data sets")
    if not Path(folder).is_dir():
        pytest.fail(f"SPECMILL_TEST_DATA={folder}: no such folder")
    return Path(folder)


@pytest.fixture
def specmill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command; gives its exit code, output and error output. What is no message of ours ends the test as it is."""

    from flows.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specmill", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this process and those of Ray note every durable write, as in the kill matrix. Nothing is killed until a target is named."""
    import tasks.store

    folder = tmp_path_factory.mktemp("windows")
    for name in FOLDERS:
        (folder / name).mkdir()
    (folder / "target").write_text("nobody")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECMILL_WINDOWS", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(WINDOWS), os.environ.get("PYTHONPATH", "")]))
        patch.setattr(tasks.store.Store, "_write", tasks.store.Store._write)  # is put back in the end
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        runpy.run_path(str(WINDOWS / "sitecustomize.py"))["patch_store"](tasks.store)
        yield folder


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for the tests of a file, to which every session that is opened meanwhile attaches."""
    import ray

    from cluster.session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        # Ray Train looks for new checkpoints every two seconds, in which a toy run is over.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        with ray_session():
            patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
            yield
