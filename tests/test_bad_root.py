"""Damaged and forged roots, and folders that are none: told by file and field, and nothing outside is touched."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Command, make_root, told, write_run


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: root, run file, policy and prompts."""
    folder = tmp_path_factory.mktemp("sound")
    make_root(write_run(folder))
    return folder


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    """A copy of its root."""
    shutil.copytree(sound / "root", tmp_path / "root")
    return tmp_path / "root"


def entry(number: int, **changes: Any) -> Callable[[Path], None]:
    """Changes fields of an entry of the completions' ledger."""
    return json_file(f"completions/ledger/{number:08d}.json", lambda content: content.update(changes))


def shard(**changes: Any) -> Callable[[Path], None]:
    """Changes fields of the shard that the first entry names."""
    return json_file("completions/ledger/00000000.json", lambda content: content["shards"][0].update(changes))


def json_file(pattern: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        file = next(iter(sorted(root.glob(pattern))))
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return spoil


def replaced(pattern: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        file = next(iter(sorted(root.glob(pattern))))
        file.write_bytes(content if isinstance(content, bytes) else content(file.read_bytes()))

    return spoil


def folder_for(pattern: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        file = next(iter(sorted(root.glob(pattern))))
        file.unlink()
        file.mkdir()

    return spoil


def flipped(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 255]) + content[101:]


def snapshot(content: Any) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / "completions/ledger/snapshot-000001.json").write_text(json.dumps(content))

    return spoil


SHARD, PART, DATASET = "completions/shards/*.parquet", "prompts/*/parts/*.parquet", "datasets/tiny/*/manifest.json"
LEDGER, PROMPTS, CHECKPOINT = "completions/ledger/00000000.json", "prompts/*/manifest.json", "checkpoints/sft-0/manifest.json"
STATE = {"entries": 64, "shards": [], "made": 0, "usage": {}, "writer": "w", "ended": True, "lease": 0.0}
ROOTS: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "a flipped byte": (replaced(SHARD, flipped), "verify plan delete", ["completions/shards/"]),
    "a truncated shard": (replaced(SHARD, lambda content: content[: len(content) // 2]), "verify plan delete", ["completions/shards/"]),
    "a shard of no bytes": (replaced(SHARD, b""), "verify plan delete", ["completions/shards/"]),
    "a folder for a shard": (folder_for(SHARD), "verify plan delete", ["completions/shards/"]),
    "another checksum": (shard(sha256="0" * 64), "verify", ["completions/shards/", "checksum differs"]),
    "rows that are not there": (shard(rows=9), "verify", ["completions/shards/", "8 rows (0 quarantined), the ledger says 9"]),
    "a flipped byte in the prompts": (replaced(PART, flipped), "verify", ["prompts/", ".parquet"]),
    "a damaged part of the prompts": (replaced(PART, b"PAR1"), "verify delete", ["prompts/", ".parquet"]),
    "an entry that is no JSON": (replaced(LEDGER, b"{"), "verify plan gc delete", ["00000000.json", "JSON"]),
    "an entry that is binary": (replaced(LEDGER, b"\xff\x00"), "verify plan gc delete", ["00000000.json", "JSON"]),
    "an entry that is nothing": (replaced(LEDGER, b"null"), "verify plan gc delete", ["00000000.json"]),
    "an entry of brackets": (replaced(LEDGER, b"[" * 100_000), "verify plan gc delete", ["00000000.json"]),
    "an entry that is a list": (replaced(LEDGER, b"[]"), "verify plan gc delete", ["00000000.json"]),
    "a folder for an entry": (folder_for(LEDGER), "verify plan gc delete", ["00000000.json"]),
    "an entry of version 2": (entry(0, version=2), "verify plan gc delete", ["00000000.json: version", "found 2"]),
    "an entry of another stage": (entry(0, stage="judgements"), "verify plan gc delete", ["00000000.json: stage"]),
    "an entry without writer": (json_file(LEDGER, lambda content: content.pop("writer")), "verify plan gc delete", ["0.json: writer"]),
    "an entry with a lease of text": (entry(1, lease="long"), "verify plan gc delete", ["00000001.json: lease", "long"]),
    "an entry with a cost of text": (entry(1, usage={"cost": "much"}), "verify plan gc delete", ["00000001.json: usage.cost"]),
    "an entry whose shards are text": (entry(0, shards="all"), "verify plan gc delete", ["00000000.json: shards"]),
    "a shard without checksum": (json_file(LEDGER, lambda content: content["shards"][0].pop("sha256")), "verify plan", ["shards.0.sha256"]),
    "rows that are text": (shard(rows="8"), "verify plan gc delete", ["00000000.json: shards.0.rows"]),
    "a shard outside of the root": (
        shard(path="../outside.parquet"),
        "verify plan delete",
        ["'../outside.parquet'", "outside of this root"],
    ),
    "a shard at the top of the disk": (shard(path="/etc/hosts"), "verify plan delete", ["'/etc/hosts'", "outside of this root"]),
    "a shard that is no Parquet": (
        shard(path="completions/ledger/00000001.json"),
        "verify plan delete",
        ["completions/ledger/00000001.json"],
    ),
    "a snapshot that is nothing": (snapshot(None), "verify plan gc delete", ["snapshot-000001.json"]),
    "a snapshot without shards": (snapshot({"entries": 64}), "verify plan gc delete", ["snapshot-000001.json: shards"]),
    "a snapshot of other entries": (snapshot(STATE | {"entries": 5}), "verify plan gc delete", ["snapshot-000001.json: entries", "5"]),
    "a snapshot of text": (snapshot(STATE | {"made": "64"}), "verify plan gc delete", ["snapshot-000001.json: made"]),
    "prompts of another program": (replaced(PROMPTS, b'{"kind": "Pod"}'), "verify plan gc", ["prompts/", "manifest.json", "kind"]),
    "prompts without parts": (json_file(PROMPTS, lambda content: content.pop("parts")), "verify plan gc", ["parts", "required"]),
    "a part of category 5": (json_file(PROMPTS, lambda content: content["parts"][0].update(category=5)), "plan gc", ["parts.0.category"]),
    "a part outside of the root": (
        json_file(PROMPTS, lambda content: content["parts"][0].update(path="../../../x")),
        "plan",
        ["outside of"],
    ),
    "a dataset of version 2": (
        json_file(DATASET, lambda content: content.update(version=2)),
        "verify gc delete",
        ["datasets/tiny/", "version: Input should be 1"],
    ),
    "a dataset that is a list": (replaced(DATASET, b"[]"), "verify gc delete", ["datasets/tiny/", "manifest.json"]),
    "a dataset with rows of text": (
        json_file(DATASET, lambda content: content.update(rows="5")),
        "verify gc delete",
        ["datasets/tiny/", "rows: Input should be a valid integer"],
    ),
    "a dataset with too many rows": (json_file(DATASET, lambda content: content.update(rows=10**6)), "verify", ["1000000 in the manifest"]),
    "a dataset with a file outside": (
        json_file(DATASET, lambda content: content["files"][0].update(path="../../../../x")),
        "verify",
        ["../../../../x", "outside of this root"],
    ),
    "a folder for the dataset's manifest": (folder_for(DATASET), "verify gc delete", ["datasets/tiny/", "manifest.json"]),
    "a checkpoint without weights": (
        json_file(CHECKPOINT, lambda content: content.pop("weights")),
        "verify gc delete",
        ["checkpoints/sft-0/", "weights: Field required"],
    ),
    "a checkpoint of nobody's": (
        json_file(CHECKPOINT, lambda content: content.update(kind="lora")),
        "verify gc",
        ["manifest.json", "lora"],
    ),
}


@pytest.mark.parametrize("kind", ROOTS)
def test_a_damaged_root(specmill: Command, sound: Path, root: Path, kind: str):
    spoil, commands, words = ROOTS[kind]
    spoil(root)
    (root.parent / "outside.parquet").write_bytes(b"")
    arguments = {"plan": [sound / "run.yaml", "--root", root], "gc": [root, "--delete"], "delete": [root, "--prompt", "pets-0"]}
    for command in commands.split():
        code, _, err = specmill(command, *arguments.get(command, [root]))
        assert code == 1 and "specmill: " in err, (command, err)
        for word in words:
            assert word in err, (command, word, err)
    assert (root.parent / "outside.parquet").exists()


def test_a_sound_root_is_sound(specmill: Command, sound: Path, root: Path):
    assert specmill("verify", root)[::2] == (0, "")
    assert "complete  pets      8" in specmill("plan", sound / "run.yaml", "--root", root)[1]
    code, out, _ = specmill("gc", root)
    assert code == 0 and out.startswith("0 files"), "what nothing names is young"
    for folder in [*root.glob("datasets/tiny/*/"), root / "checkpoints/sft-0", *root.glob("prompts/*/")]:
        if (folder / "manifest.json").exists():
            assert specmill("show", folder)[::2] == (0, "")
    told(specmill("delete", root, "--prompt", "never-heard-of"), 2, [str(root), "no prompt with the id 'never-heard-of'"])
    told(specmill("delete", root, "--prompt", "\udcff"), 2, ["no prompt with the id"])
    assert "taken out" in specmill("delete", root, "--prompt", "pets-0")[1]


def test_a_dataset_whose_prompts_are_gone_does_not_stop_gc(specmill: Command, root: Path):
    shutil.rmtree(next(root.glob("prompts/*/")))
    assert specmill("gc", root)[0] == 0


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("{}")
    return folder / "file"


def somebody_elses(folder: Path) -> Path:
    """A project with folders that are named like ours."""
    for name in ("datasets", "checkpoints/best", "prompts"):
        (folder / name).mkdir(parents=True)
        (folder / name / "data.bin").write_bytes(b"precious")
        os.utime(folder / name / "data.bin", (0, 0))
    return folder


NO_ROOTS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: folder / "gone",
    "an empty folder": lambda folder: folder,
    "a file": a_file,
    "somebody else's folder": somebody_elses,
    "no name": lambda folder: "",
    "an unknown scheme": lambda folder: "nothing://here",
}


@pytest.mark.parametrize("command", [["gc", "--delete"], ["delete", "--prompt", "x"], ["verify"], ["show"]], ids=lambda command: command[0])
@pytest.mark.parametrize("kind", NO_ROOTS)
def test_a_root_that_is_none(specmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: list[str]):
    monkeypatch.chdir(tmp_path)
    place = NO_ROOTS[kind](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    told(specmill(*command, place), 2, [str(place)])
    assert sorted(tmp_path.rglob("*")) == before


MANIFESTS: dict[str, tuple[bytes, list[str]]] = {
    "a list": (b"[]", ["manifest.json"]),
    "binary": (b"\x7fELF\xff", ["manifest.json", "JSON"]),
    "empty": (b"", ["manifest.json", "JSON"]),
    "of a browser": (b'{"manifest_version": 3, "name": "x"}', ["manifest.json", "kind"]),
    "of a cluster": (b'{"apiVersion": "v1", "kind": "Pod"}', ["manifest.json", "kind", "Pod"]),
    "without id": (b'{"version": 1, "kind": "sft", "weights": "w"}', ["manifest.json: sft.id"]),
    "of version 2": (b'{"version": 2, "kind": "sft", "id": "x", "weights": "w"}', ["manifest.json: sft.version"]),
    "with a lineage of text": (b'{"version": 1, "kind": "sft", "id": "x", "weights": "w", "provenance": "me"}', ["sft.provenance"]),
    "with a funnel of text": (
        b'{"version": 1, "kind": "dataset", "id": "x", "name": "n", "rows": 0, "funnel": "all", "balance": {}}',
        ["dataset.funnel"],
    ),
    "of a run without a dataset": (b'{"version": 1, "kind": "run", "id": "x", "checkpoints": [], "evaluations": []}', ["run.datasets"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_is_none(specmill: Command, tmp_path: Path, kind: str):
    content, words = MANIFESTS[kind]
    (tmp_path / "manifest.json").write_bytes(content)
    told(specmill("show", tmp_path), 2, words)
    told(specmill("show", tmp_path / "manifest.json"), 2, words)
    told(specmill("verify", tmp_path), 1, words)


def test_the_parts_of_a_run_are_found_from_everywhere(specmill: Command, root: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = next(root.glob(DATASET)).parent.relative_to(root)
    run = root / "runs" / "tiny-0"
    run.mkdir(parents=True)
    manifest = {"version": 1, "kind": "run", "id": run.name, "datasets": [str(dataset)], "evaluations": []}
    (run / "manifest.json").write_text(json.dumps(manifest | {"checkpoints": ["checkpoints/sft-0"]}))
    for folder, path in ((root, "runs/tiny-0"), (run.parent, "tiny-0/"), (run, "."), (root.parent, "root/runs/tiny-0")):
        monkeypatch.chdir(folder)
        assert specmill("verify", path)[0] == 0, path
    (root / "checkpoints" / "sft-0" / "model" / "model.safetensors").write_bytes(b"other")
    assert "checksum differs" in specmill("verify", run)[2]
