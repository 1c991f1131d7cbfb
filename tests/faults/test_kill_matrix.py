"""Every durable write has a window before and one after it. In each of them the driver, an engine's actor, the engine itself and a node
are killed; then the same command is started again, unchanged or with another policy, k, shard size or worker count.

One run without kills says which windows there are. For each target a chain of runs is then killed in one window after the other until
none is left; what stands in the end has to be exactly what the undisturbed run made: the same dataset, the same keys, nothing foreign,
nothing twice, and no garbage after gc. Ray, its processes and nodes are real; the engines are fake, and fast.
"""

import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import RunRequest
from flows.inspect import problems
from flows.workspace import prepare, survey
from tasks import ledger
from tasks.garbage import garbage
from tasks.ledger import Ledger
from tasks.store import Store
from tasks.wanted import NOT_JUDGED

pytestmark = pytest.mark.slow
SPECS = Path(__file__).parent.parent.parent / "specs"
CATEGORIES = ("violence", "self-harm")
BEFORE_ENGINES = ("probe", "prompts")
"""Sites that are passed before there is an engine that could be killed."""
LIVES = 80
"""More runs than there are windows."""
HEALTH_CHECKS = {"health_check_period_ms": 300, "health_check_initial_delay_ms": 1000}
"""Ray notices the death of a node after five checks that fail at once: 1.5 s instead of 15. One that is merely slow fails none."""


class Place:
    """A folder with policy, prompts, run file and root, and what the windows look into."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.windows = folder, folder / "root", folder / "windows"
        for name in ("todo", "done", "seen", "actors"):
            (self.windows / name).mkdir(parents=True)
        (self.windows / "target").write_text("nobody")
        shutil.copytree(SPECS / "policies" / "base", folder / "policy")
        (folder / "prompts").mkdir()
        for name in CATEGORIES:
            shutil.copy(SPECS / "prompts" / f"{name}.jsonl", folder / "prompts")
        engine = {"backend": "fake", "engines": 2, "max_num_seqs": 4, "fake": {"latency_seconds": 0.01}}
        content = {
            "version": 1,
            "name": "kills",
            "root": str(self.root),
            "lease_seconds": 0.3,
            "policy": "policy",
            "prompts": "prompts",
            "generate": {"engine": engine, "n": 1, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800, "shard_rows": 2},
            "judge": {"engine": engine, "k": 2, "sequential": False},
            "select": {"threshold": 1},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(content))

    @property
    def store(self) -> Store:
        return Store(str(self.root))

    def names(self, kind: str) -> set[str]:
        return {file.name for file in (self.windows / kind).iterdir()}

    def request(self, *changes: str) -> RunRequest:
        return RunRequest(file=str(self.folder / "run.yaml"), changes=list(changes))


def life(folder: str, changes: tuple[str, ...]) -> None:
    """One run of the driver: the steps of the flow, one after the other, without Prefect."""
    from flows.steps import complete_and_judge_step, select_step
    from flows.workspace import opened

    ledger.SNAPSHOT_ENTRIES = 4
    (Path(folder) / "windows" / "driver").write_text(str(os.getpid()))
    with opened(RunRequest(file=f"{folder}/run.yaml", changes=list(changes)), trains=False) as run:
        complete_and_judge_step.fn(run)
        (Path(folder) / "dataset").write_text(select_step.fn(run).version)


def collection(folder: str, _: tuple[str, ...]) -> None:
    """One run of gc."""
    ledger.SNAPSHOT_ENTRIES = 4
    (Path(folder) / "windows" / "driver").write_text(str(os.getpid()))
    store = Store(f"{folder}/root")
    for file in garbage(store, older_than=0, lease=0.3):
        store.delete(file.path)


class Lives:
    """Starts drivers, each a process of its own that is forked from one which has imported everything; keeps a node for engines alive."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self.current = folder / "current"
        windows = str(Path(__file__).parent / "windows")
        os.environ["SPECMILL_WINDOWS"] = str(self.current)
        os.environ["PYTHONPATH"] = os.pathsep.join([windows, os.environ.get("PYTHONPATH", "")])
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECKS}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        os.environ["RAY_ADDRESS"] = self.cluster.address
        self.node: Any = None
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["flows.steps", "flows.workspace", "sitecustomize"])

    def place(self, folder: Path) -> Place:
        """A new place, at which the windows look from now on."""
        place = Place(folder)
        self.current.unlink(missing_ok=True)
        self.current.symlink_to(place.windows)
        self._keep_node()
        return place

    def run(self, place: Place, *changes: str, target: Any = life) -> int:
        """Runs a driver to its end; returns its exit code, negative if it was killed."""
        process = self.context.Process(target=target, args=(str(place.folder), changes))
        process.start()
        deadline = time.monotonic() + 120
        while process.is_alive():
            self._keep_node()
            process.join(0.2)
            if time.monotonic() > deadline:
                process.kill()
                pytest.fail("the driver hangs")
        assert process.exitcode is not None
        return process.exitcode

    def _keep_node(self) -> None:
        """Starts a node where there is none, and tells the windows."""
        if self.node and self.node.all_processes["raylet"][0].process.poll() is not None:
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.node = None
        if self.node is None:
            self.node = self.cluster.add_node(num_cpus=8)
        (self.current / "new").write_text(str(self.node.all_processes["raylet"][0].process.pid))
        os.rename(self.current / "new", self.current / "node")


@pytest.fixture(autouse=True)
def small_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test itself commits, it commits as its drivers do."""
    monkeypatch.setattr(ledger, "SNAPSHOT_ENTRIES", 4)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SPECMILL_WINDOWS", "PYTHONPATH", "RAY_ADDRESS"):
            patch.setenv(name, os.environ.get(name, ""))
        lives = Lives(tmp_path_factory.mktemp("lives"))
        yield lives
        lives.cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that nobody kills: says which windows there are and what has to come of it."""
    place = lives.place(tmp_path_factory.mktemp("undisturbed") / "place")
    assert lives.run(place) == 0
    return place


def check(place: Place, *changes: str) -> None:
    """Everything that is wanted is there once, belongs to one shard, and balances; gc leaves nothing that is not named."""
    store = place.store
    assert problems(str(place.root))[0] == []
    run = prepare(place.request(*changes), trains=False)
    wanted, lost = survey(run, Ledger(store, "completions"), Ledger(store, "judgements"))
    assert lost == ([], []) and wanted.made.all()
    assert ((wanted.scores != NOT_JUDGED).all(axis=1) == wanted.passed).all()
    keys = Counter(key for shard in Ledger(store, "completions").shards() for key in store.read_table(shard.path)["key"].to_pylist())
    assert set(keys.values()) == {1}
    for file in list(garbage(store, older_than=0, lease=0.3)):
        store.delete(file.path)
    assert list(garbage(store, older_than=0, lease=0.3)) == [] and problems(str(place.root))[0] == []


def chain(lives: Lives, place: Place, target: str, windows: set[str], *changes: str, what: Any = life) -> list[int]:
    """Runs, killed in one window after the other, until one reaches its end with no window left; returns the exit codes.

    The second and all later ones are started with the changes.
    """
    for window in windows:
        (place.windows / "todo" / window).touch()
    (place.windows / "target").write_text(target)
    codes = []
    while len(codes) < LIVES:
        codes.append(lives.run(place, *(changes if codes else ()), target=what))
        if codes[-1] == 0:
            return codes
        assert codes[-1] == -signal.SIGKILL, "a run ends well or is killed"
        if (place.root / "completions").exists():
            assert problems(str(place.root))[0] == [], place.names("done")
    raise AssertionError(f"{LIVES} runs were not enough; left: {place.names('todo')}")


def test_the_windows_are_known(undisturbed: Place) -> None:
    sites = {name.partition(" ")[2] for name in undisturbed.names("seen")}
    assert {name.partition(" ")[0] for name in undisturbed.names("seen")} == {"before", "after"}
    assert {f"{action} {site}" for action, site in (("create", "completions shard"), ("create", "completions entry"))} <= sites
    assert {"create judgements shard", "create judgements entry", "create completions snapshot", "replace datasets manifest"} <= sites
    check(undisturbed)


@pytest.mark.parametrize("target", ["driver", "actor", "engine", "node"])
def test_whatever_is_killed_in_whichever_window_nothing_is_lost_or_doubled(
    lives: Lives, undisturbed: Place, target: str, tmp_path: Path
) -> None:
    place = lives.place(tmp_path / "place")
    windows = undisturbed.names("seen")
    if target != "driver":
        windows = {name for name in windows if not any(site in name for site in BEFORE_ENGINES)}
    codes = chain(lives, place, target, windows)
    assert place.names("todo") == set() and place.names("done") == windows
    assert (len(codes) > len(windows) / 2) if target == "driver" else (codes == [0]), "two engines may reach two windows at once"
    assert (place.folder / "dataset").read_text() == (undisturbed.folder / "dataset").read_text()
    check(place)


def edit_clause(place: Place) -> str:
    file = place.folder / "policy" / "violence.yaml"
    file.write_text(file.read_text().replace("text: ", "text: In all cases, ", 1))
    return "name=edited"


@pytest.mark.parametrize("change", [edit_clause, "judge.k=3", "generate.shard_rows=5", "generate.engine.engines=1"])
def test_a_killed_run_goes_on_as_another_one(lives: Lives, change: Any, tmp_path: Path) -> None:
    """Killed while it draws and judges, and started again after each time with the change; the policy is edited after a run that ended."""
    place = lives.place(tmp_path / "place")
    draws = ("before create completions shard", "after create completions entry")
    judges = ("before create judgements entry", "after create judgements shard")
    if callable(change):
        assert lives.run(place) == 0
    changes = (change(place) if callable(change) else change,)
    codes = chain(lives, place, "driver", {*draws, *judges}, *changes)
    assert len(codes) > 2 and place.names("todo") == set()
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
