"""Fixtures that several rooms share: a tiny model for tests that need no language, and the folder of real data sets."""

import os
from pathlib import Path

import pytest

from cluster.models import copy_tokenizer, resolve_model


def pytest_configure() -> None:
    """Test processes that run side by side (pytest-xdist) share out the cores; engines bind themselves to the first they see."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        mine = cores[int(worker.removeprefix("gw")) % len(cores) :: workers]
        os.sched_setaffinity(0, set(mine))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a seeded two-layer Llama with tied embeddings in float32, with the default model's tokenizer and template."""
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    parent = Path(resolve_model("default").path)
    tokens = AutoConfig.from_pretrained(parent)
    config = LlamaConfig(
        vocab_size=tokens.vocab_size,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        max_position_embeddings=tokens.max_position_embeddings,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    path = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(path)
    copy_tokenizer(parent, path)
    return str(path)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded two-layer Llama with tied embeddings and 512 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of openly licensed data sets that `SPECMILL_TEST_DATA` names; they belong to their authors and are not in here."""
    folder = os.environ.get("SPECMILL_TEST_DATA")
    if not folder:
        pytest.skip("SPECMILL_TEST_DATA names no folder of data sets")
    if not Path(folder).is_dir():
        pytest.fail(f"SPECMILL_TEST_DATA={folder}: no such folder")
    return Path(folder)
