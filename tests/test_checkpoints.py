"""Checkpoints on a store that is no directory: complete or invisible, fetched once, checked when fetched."""

import shutil
from pathlib import Path

import fsspec
import pytest

from tasks.checkpoints import directory, find, finish, forget_damaged, forget_state
from tasks.store import Corrupt, Store

ID = "sft-1"
FILES = {"model/model.safetensors": b"weights", "model/config.json": b"{}", "metrics.jsonl": b"{}\n", "tensorboard/events.1": b"curve"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An object store in memory, and a checkpoint that was trained in the cache beside it."""
    monkeypatch.setenv("SPECMILL_CACHE", str(tmp_path / "cache"))
    store = Store(f"memory://{tmp_path.name}")
    folder = directory(store, ID)
    assert folder.is_relative_to(tmp_path / "cache")
    for name, content in {**FILES, "train/state": b"not to be kept"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return store


def test_a_checkpoint_is_there_when_its_manifest_is(store: Store) -> None:
    assert find(store, ID) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finish(store, ID, "sft", {}, {"loss": 1.0})
    assert store.exists(f"checkpoints/{ID}/model/model.safetensors") and find(store, ID) is None, "killed before its manifest was written"
    finished = finish(store, ID, "sft", {}, {"loss": 1.0})
    there = {path.partition(f"checkpoints/{ID}/")[2] for path in fsspec.filesystem("memory").find(store.path("checkpoints"))}
    assert there == {*FILES, "manifest.json"}
    found = find(store, ID)
    assert found and found.reused and (found.weights, found.model) == (finished.weights, finished.model)


def test_another_machine_fetches_it_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(store, ID, "sft", {}, {})
    shutil.rmtree(directory(store, ID))
    assert find(store, ID)
    assert {name: (directory(store, ID) / name).read_bytes() for name in FILES} == FILES
    assert not list(directory(store, ID).rglob("*.safetensors.*")), "nothing half copied is left"
    monkeypatch.setattr(Store, "download", lambda *_: pytest.fail("it is here already"))
    assert find(store, ID)


def test_what_another_machine_finished_takes_the_place_of_what_lies_here(store: Store) -> None:
    finish(store, ID, "sft", {}, {})
    place = directory(store, ID) / "model" / "model.safetensors"
    place.write_bytes(b"WEIGHTS")
    assert find(store, ID) and place.read_bytes() == b"weights"


def test_a_damaged_copy_is_told_and_a_lost_model_is_trained_anew(store: Store) -> None:
    finish(store, ID, "sft", {}, {})
    shutil.rmtree(directory(store, ID))
    remote = fsspec.filesystem("memory")
    remote.pipe_file(store.path(f"checkpoints/{ID}/model/model.safetensors"), b"WEIGHTS")
    with pytest.raises(Corrupt, match="checksum differs"):
        find(store, ID)
    store.delete(f"checkpoints/{ID}/model/model.safetensors")
    assert find(store, ID) is None
    forget_damaged(store, ID)
    assert not store.exists(f"checkpoints/{ID}/manifest.json") and not (directory(store, ID) / "model").exists()


def test_a_model_without_a_manifest_is_one_whose_training_goes_on(store: Store) -> None:
    forget_damaged(store, ID)
    assert (directory(store, ID) / "model" / "model.safetensors").exists()


def test_nothing_is_left_of_a_finished_training_but_what_is_kept(store: Store) -> None:
    folder = directory(store, ID)
    for name in (
        "train/state",
        ".training/model/state",
        ".checkpoint-1/state",
        ".exporting-1/model.safetensors",
        ".weights.safetensors.77",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"of a killed rank")
    finish(store, ID, "sft", {}, {})
    forget_state(store, ID)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(FILES)
