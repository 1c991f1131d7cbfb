"""Every durable write has a window before and one after it. In each of them the driver, an engine's actor, the engine itself and a node
are killed; then the same command is started again, unchanged or with another policy, k, shard size or worker count.

One run without kills says which windows there are. For each target a chain of runs is then killed in one window after the other until
none is left; what stands in the end has to be exactly what the undisturbed run made: the same dataset, the same keys, nothing foreign,
nothing twice, and no garbage after gc.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pytest
from lives import (
    FAKE,
    TARGETS,
    Lives,
    Place,
    chain,
    check,
    collection,
    deletion,
    edit_clause,
    finish,
    life_of_a_full_disk,
    reached,
    strict_life,
)
from s3_server import KEY, SECRET, S3Server
from write_sites import DATA_SITES, FINAL_SITES

from flows.inspect import problems
from flows.opening import prepare
from tasks import ledger
from tasks.keys import KEY_BYTES
from tasks.ledger import Ledger
from tasks.rl import _folder
from tasks.tables import ROLLOUTS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test itself commits, it commits as its drivers do."""
    monkeypatch.setattr(ledger, "SNAPSHOT_ENTRIES", 4)


@contextmanager
def started(folder: Path, start: Literal["forkserver", "spawn"]) -> Iterator[Lives]:
    """Lives on a Ray cluster of their own."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SPECMILL_WINDOWS", "PYTHONPATH", "RAY_ADDRESS"):
            patch.setenv(name, os.environ.get(name, ""))
        lives = Lives(folder, start)
        try:
            yield lives
        finally:
            lives.cluster.shutdown()


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    with started(tmp_path_factory.mktemp("lives"), "forkserver") as lives:
        yield lives


@pytest.fixture(scope="module")
def undisturbed(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that nobody kills: says which windows there are and what has to come of it."""
    place = lives.place(tmp_path_factory.mktemp("undisturbed") / "place")
    assert lives.run(place) == 0
    return place


@pytest.fixture(scope="module")
def half(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run whose driver died after a few shards."""
    place = lives.place(tmp_path_factory.mktemp("half") / "place")
    (place.windows / "todo" / "after create completions snapshot").touch()
    (place.windows / "target").write_text("driver")
    assert lives.run(place) == -signal.SIGKILL
    return place


def test_every_site_of_the_data_stages_has_its_windows(undisturbed: Place) -> None:
    assert undisturbed.names("seen") == {f"{moment} {site}" for moment in ("before", "after") for site in DATA_SITES}
    check(undisturbed)


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_killed_in_whichever_window_nothing_is_lost_or_doubled(
    lives: Lives, undisturbed: Place, target: str, tmp_path: Path
) -> None:
    place, windows = lives.place(tmp_path / "place"), reached(undisturbed, target)
    codes = chain(lives, place, target, windows)
    assert place.names("todo") == set() and place.names("done") == windows
    assert target == "driver" or codes == [0]
    deaths = len(codes) - 1 if target == "driver" else len(place.names("killed"))
    assert deaths > len(windows) / 2, "two engines may reach two windows at once, and both die of one kill"
    assert deaths == len(windows) or target in ("driver", "node")
    assert (place.folder / "dataset").read_text() == (undisturbed.folder / "dataset").read_text()
    check(place)


@pytest.mark.parametrize("target", ["node", "machine"])
def test_a_row_whose_machine_is_lost_again_and_again_is_not_given_up(lives: Lives, target: str, tmp_path: Path) -> None:
    """One engine works on one row at a time, so that the same row is under way each time."""
    changes = ("generate.n=1", "generate.shard_rows=1", "generate.engine.engines=1", "generate.engine.max_num_seqs=1", "judge.k=1")
    place = lives.place(tmp_path / "place")
    windows = {f"{moment} create {stage} shard" for moment in ("before", "after") for stage in ("completions", "judgements")}
    assert chain(lives, place, target, windows, *changes, what=strict_life, from_the_first=True) == [0] and place.names("done") == windows
    assert all(shard.quarantined == 0 for stage in ("completions", "judgements") for shard in Ledger(place.store, stage).shards())
    check(place, *changes)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.soak), 5])
def test_a_driver_killed_while_it_finishes_a_run_has_it_finished_by_the_next_one(lives: Lives, every: int, tmp_path: Path) -> None:
    """In every window, or every fifth one, in which a checkpoint, evaluations and the report are written."""
    place = lives.place(tmp_path / "place")
    assert lives.run(place) == 0
    windows = {*sorted(f"{moment} {site}" for moment in ("before", "after") for site in FINAL_SITES)[::every]}
    codes = chain(lives, place, "driver", windows, what=finish)
    assert place.names("todo") == set() and place.names("done") == windows and len(codes) == len(windows) + 1
    check(place)
    (run,) = place.store.glob("runs/*/manifest.json")
    manifest = place.store.read_json(run)
    assert len(manifest["evaluations"]) == 2 and manifest["checkpoints"] == ["checkpoints/sft-0"]


FEWER_ENGINES = "generate.engine.engines=1"
CHANGES = [edit_clause, "judge.k=3", "generate.shard_rows=5", FEWER_ENGINES]


@pytest.mark.parametrize("change", CHANGES)
def test_a_killed_run_goes_on_as_another_one(lives: Lives, change: Any, tmp_path: Path) -> None:
    """Killed while it draws and judges, and started again after each time with the change; the policy is edited after a run that ended."""
    place = lives.place(tmp_path / "place", engine=FAKE | {"engines": 2 if change == FEWER_ENGINES else 1})
    draws = ("before create completions shard", "after create completions entry")
    judges = ("before create judgements entry", "after create judgements shard")
    if callable(change):
        assert lives.run(place) == 0
    changes = (change(place) if callable(change) else change,)
    codes = chain(lives, place, "driver", {*draws, *judges}, *changes)
    assert len(codes) > 2 and place.names("todo") == set()
    check(place, *changes)


@pytest.mark.soak
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_in_every_window_after_every_change(
    lives: Lives, undisturbed: Place, half: Place, target: str, change: Any, tmp_path: Path
) -> None:
    """A policy is edited after a whole run; all else changes after half of one, for a driver after its first death.

    So few rows are left to make then that engines killed in every window would die of the same row again and again, which is given up in
    the end: each of them is killed in another third of the windows.
    """
    windows, place = reached(undisturbed, target), lives.place(tmp_path / "place")
    changes = (change(place) if callable(change) else change,)
    fresh = target == "driver" and not callable(change)
    if not fresh:
        shutil.copytree((undisturbed if callable(change) else half).root, place.root)
    if target != "driver":
        windows = {*sorted(windows)[TARGETS.index(target) - 1 :: 3]}
    chain(lives, place, target, windows, *changes, from_the_first=not fresh)
    assert not fresh or place.names("todo") == set()
    check(place, *changes)


def test_gc_that_is_killed_is_finished_by_the_next_one(lives: Lives, tmp_path: Path) -> None:
    place = lives.place(tmp_path / "place")
    assert lives.run(place) == 0
    for number in range(3):
        for stage in ("completions", "judgements"):
            place.store.put(f"{stage}/shards/of-a-killed-run-{number}.parquet", b"1")
    windows = {f"{phase} delete {stage} shard" for phase in ("before", "after") for stage in ("completions", "judgements")}
    assert len(chain(lives, place, "driver", windows, what=collection)) == 5 and place.names("todo") == set()
    check(place)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.soak), 5])
def test_a_deletion_that_is_killed_is_finished_by_the_next_one(lives: Lives, every: int, tmp_path: Path) -> None:
    """In every window, or every fifth one, of tombstones and of shards that are written anew. No shard holds the prompt then."""
    place = lives.place(tmp_path / "place", engine=FAKE | {"max_num_seqs": 64})  # so that a piece of verdicts has several prompts
    assert lives.run(place, "generate.shard_rows=5") == 0
    store, run = place.store, prepare(place.request(), trains=False)
    judged = [store.read_table(shard.path)["prompt_id"].unique().to_pylist() for shard in Ledger(store, "judgements").shards()]
    gone = next(ids[0] for ids in judged if len(ids) > 1)
    (place.folder / "prompt").write_text(gone)
    names = [prompt.id for prompt in run.prompts.prompts("sft")]
    rows = [{"key": bytes([number]) * KEY_BYTES, "prompt_id": name, "step": 0} for number, name in enumerate(names)]
    Ledger(store, "rollouts/rl-0").commit([store.put_table(_folder("rl-0", 0), pa.Table.from_pylist(rows, schema=ROLLOUTS))])
    sites = [f"{action} {stage} shard" for stage in ("completions", "judgements", "rollouts") for action in ("create", "delete")]
    sites += ["create tombstones shard", "create tombstones entry"]
    windows = {*sorted(f"{phase} {site}" for phase in ("before", "after") for site in sites)[::every]}
    codes = chain(lives, place, "driver", windows, what=deletion)
    assert place.names("todo") == set() and len(codes) == len(windows) + 1
    left = [path for path, *_ in store.files("") if path.endswith(".parquet") and not path.startswith(("prompts/", "datasets/"))]
    told = {
        stage: [row["prompt_id"] for path in left if path.startswith(stage) for row in store.read_table(path).to_pylist()]
        for stage in ("completions", "judgements", "rollouts")
    }
    assert all(gone not in ids for ids in told.values())
    assert {*told["rollouts"], gone} == {*told["completions"], gone} == {*names} and len(told["rollouts"]) == len(names) - 1
    assert lives.run(place, "generate.shard_rows=5") == 0
    check(place)


@contextmanager
def small_disk(folder: Path, pages: int) -> Iterator[Callable[[], object]]:
    """A file system with so much room; the function gives it more."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", str(folder)]).returncode:
        pytest.skip("mounting a small disk takes root's rights")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(lives: Lives, undisturbed: Place, share: float, tmp_path: Path) -> None:
    # How many files there are of verdicts and of the ledger is chance; those of completions are known, and are not all.
    pages = sum(-(-size // 4096) for _, size, _ in undisturbed.store.files("completions/shards"))
    with small_disk(tmp_path / "disk", int(share * pages)) as make_room:
        place = lives.place(tmp_path / "place", str(tmp_path / "disk" / "root"))
        assert lives.run(place, target=life_of_a_full_disk) == 0
        told = (place.folder / "told").read_text()
        assert "No space left on device. Make room and start the same command again." in told and "\n" not in told
        assert not (place.folder / "dataset").exists() and problems(place.root)[0] == []
        make_room()
        assert lives.run(place) == 0
        assert (place.folder / "dataset").read_text() == (undisturbed.folder / "dataset").read_text()
        check(place)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server of its own, which processes that start from here on find."""
    server = S3Server(tmp_path)
    server.start()
    for name, value in (("ACCESS_KEY_ID", KEY), ("SECRET_ACCESS_KEY", SECRET), ("ENDPOINT_URL_S3", server.url)):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("test-kills")
    yield "s3://test-kills"
    server.kill()


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS)
def test_on_s3_too_whatever_is_killed_nothing_is_lost_or_doubled(bucket: str, undisturbed: Place, target: str, tmp_path: Path) -> None:
    """A sample: each target is killed in another quarter of the windows."""
    with started(tmp_path / "ray", "spawn") as lives:
        place = lives.place(tmp_path / "place", f"{bucket}/{target}")
        windows = {*sorted(reached(undisturbed, target))[TARGETS.index(target) :: 4]}
        chain(lives, place, target, windows)
        assert place.names("done") == windows
        assert (place.folder / "dataset").read_text() == (undisturbed.folder / "dataset").read_text()
        check(place)


@pytest.mark.soak
@pytest.mark.parametrize("target", ["driver", "actor", "child", "node"])
def test_engines_of_vllm_are_killed_and_nothing_is_lost_or_doubled(lives: Lives, target: str, tiny_model: str, tmp_path: Path) -> None:
    """Once per target, in the middle of the work; `child` is the process in which vLLM computes."""
    vllm = {"model": tiny_model, "dtype": "float32", "engines": 2, "max_num_seqs": 8, "max_model_len": 4096, "kv_cache_gib": 0.3}
    place = lives.place(tmp_path / "place", engine=vllm, groups=1)
    codes = chain(lives, place, target, {"after create completions shard"})
    assert place.names("todo") == set() and len(codes) == (2 if target == "driver" else 1)
    check(place)
