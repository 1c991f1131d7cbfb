"""Runs whose driver, engines or node are killed in the windows before and after a durable write, and what has to be there in the end.

Ray, its processes and nodes are real; the engines are fake, and fast. `windows/sitecustomize.py` kills.
"""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
import yaml
from write_sites import FOLDERS, WINDOWS

from cluster import suspects
from flows.config import RunRequest
from flows.inspect import problems
from flows.opening import prepare
from flows.workspace import Workspace, survey
from tasks import ledger
from tasks.garbage import garbage
from tasks.ledger import Ledger
from tasks.store import Down, Store
from tasks.tombstones import delete_prompt
from tasks.wanted import NOT_JUDGED

SPECS = Path(__file__).parent.parent.parent / "specs"
CATEGORIES = ("violence", "self-harm")
TARGETS = ("driver", "actor", "engine", "node")
BEFORE_ENGINES = ("probe", "prompts")
"""Sites that are passed before there is an engine that could be killed."""
AFTER_REQUESTS = ("datasets",)
"""Sites that are passed when no engine is asked for anything any more."""
GROUP_ROWS = 4
"""Prompts of a scenario group. The second and fourth group of a file are for SFT, the third is for evaluation."""
LIVES = 80
"""More runs than there are windows."""
LONGEST_SECONDS = 600
FAKE = {"backend": "fake", "engines": 2, "max_num_seqs": 4, "fake": {"latency_seconds": 0.01}}
HEALTH_CHECKS = {"health_check_period_ms": 300, "health_check_initial_delay_ms": 1000}
"""Ray notices the death of a node after five checks that fail at once: 1.5 s instead of 15. One that is merely slow fails none."""


class Place:
    """A folder with policy, prompts, run file and, unless it lies elsewhere, root, and what the windows look into."""

    def __init__(self, folder: Path, root: str = "", engine: dict[str, Any] = FAKE, groups: int = 3) -> None:
        self.folder, self.root, self.windows = folder, root or str(folder / "root"), folder / "windows"
        for name in FOLDERS:
            (self.windows / name).mkdir(parents=True)
        (self.windows / "target").write_text("nobody")
        shutil.copytree(SPECS / "policies" / "base", folder / "policy")
        (folder / "prompts").mkdir()
        for name in CATEGORIES:
            rows = (SPECS / "prompts" / f"{name}.jsonl").read_text().splitlines(keepends=True)
            (folder / "prompts" / f"{name}.jsonl").write_text("".join(rows[GROUP_ROWS : GROUP_ROWS * (1 + groups)]))
        capability = (SPECS / "prompts" / "capability.jsonl").read_text().splitlines(keepends=True)
        (folder / "prompts" / "more.jsonl").write_text(capability[0] + '{"id": "no-prompt"}\n')
        content = {
            "version": 1,
            "name": "kills",
            "root": self.root,
            "lease_seconds": 0.3,
            "policy": "policy",
            "prompts": "prompts",
            "generate": {"engine": engine, "n": 2, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800, "shard_rows": 2},
            "judge": {"engine": engine, "k": 2, "sequential": False},
            "select": {"threshold": 1},
            "train": ["sft"],
            "evaluate": {"engine": engine | {"engines": 1}, "max_tokens": 200},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(content))

    @property
    def store(self) -> Store:
        return Store(self.root)

    def names(self, kind: str) -> set[str]:
        return {file.name for file in (self.windows / kind).iterdir()}

    def request(self, *changes: str) -> RunRequest:
        return RunRequest(file=str(self.folder / "run.yaml"), changes=list(changes))


def life(folder: str, changes: tuple[str, ...]) -> None:
    """One run of the driver: the steps of the flow, one after the other, without Prefect."""
    from flows.opening import opened
    from flows.steps import complete_and_judge_step, select_step

    ledger.SNAPSHOT_ENTRIES = 4
    (Path(folder) / "windows" / "driver").write_text(str(os.getpid()))
    with opened(RunRequest(file=f"{folder}/run.yaml", changes=list(changes)), trains=False) as run:
        complete_and_judge_step.fn(run)
        (Path(folder) / "dataset").write_text(select_step.fn(run).version)


def strict_life(folder: str, changes: tuple[str, ...]) -> None:
    """One run in which a row is accused at the second death of its engine."""
    suspects.MAX_DEATHS = 2
    life(folder, changes)


def finish(folder: str, changes: tuple[str, ...]) -> None:
    """The other half of a run: a checkpoint that nobody trains, evaluations by engines that are no models, the report."""
    from flows.opening import opened
    from flows.steps import base_checkpoint, evaluate_step, made_once, report_step, select_step
    from tasks import checkpoints

    ledger.SNAPSHOT_ENTRIES = 4
    (Path(folder) / "windows" / "driver").write_text(str(os.getpid()))
    with opened(RunRequest(file=f"{folder}/run.yaml", changes=list(changes))) as run:
        dataset, base = select_step.fn(run), base_checkpoint(run)

        def train() -> checkpoints.Checkpoint:
            path = checkpoints.directory(run.store, "sft-0")
            Store(str(path)).put_table("rows", pa.table({"row_id": ["one"]}))
            (path / "model").mkdir(exist_ok=True)
            (path / "model" / "model.safetensors").write_bytes(b"weights")
            (path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
            return checkpoints.finish(run.store, "sft-0", "sft", {"dataset": f"{dataset.name}@{dataset.version}"}, {"loss": 1.0})

        run.checkpoints = [made_once(run, "checkpoints/sft-0", lambda: checkpoints.find(run.store, "sft-0"), train)]
        report_step.fn(run, [evaluate_step.fn(run, checkpoint) for checkpoint in (base, *run.checkpoints)])


def collection(folder: str, _: tuple[str, ...]) -> None:
    """One run of gc."""
    ledger.SNAPSHOT_ENTRIES = 4
    (Path(folder) / "windows" / "driver").write_text(str(os.getpid()))
    store = Store(yaml.safe_load((Path(folder) / "run.yaml").read_text())["root"])
    for file in garbage(store, older_than=0, lease=0.3):
        store.delete(file.path)


def deletion(folder: str, _: tuple[str, ...]) -> None:
    """Deletes the prompt that the file `prompt` names."""
    ledger.SNAPSHOT_ENTRIES = 4
    (Path(folder) / "windows" / "driver").write_text(str(os.getpid()))
    store = Store(yaml.safe_load((Path(folder) / "run.yaml").read_text())["root"])
    delete_prompt(store, (Path(folder) / "prompt").read_text(), lease=0.3)


def life_of_a_full_disk(folder: str, changes: tuple[str, ...]) -> None:
    """One run that the store ends; what it says goes to the file `told`."""
    try:
        life(folder, changes)
    except Down as error:
        (Path(folder) / "told").write_text(str(error))


class Lives:
    """Starts drivers, each a process of its own; keeps a node for engines alive.

    `forkserver`: drivers are forked from one process that has imported everything, and have the environment that the first of them had.
    `spawn`: each starts from nothing.
    """

    def __init__(self, folder: Path, start: Literal["forkserver", "spawn"]) -> None:
        from ray.cluster_utils import Cluster

        self.current = folder / "current"
        os.environ["SPECMILL_WINDOWS"] = str(self.current)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(WINDOWS), os.environ.get("PYTHONPATH", "")])
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECKS}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        os.environ["RAY_ADDRESS"] = self.cluster.address
        self.node: Any = None
        self.context: Any = multiprocessing.get_context(start)
        self.context.set_forkserver_preload(["flows.steps", "flows.opening", "sitecustomize"])

    def place(self, folder: Path, root: str = "", engine: dict[str, Any] = FAKE, groups: int = 3) -> Place:
        """A new place, at which the windows look from now on."""
        place = Place(folder, root, engine, groups)
        self.current.unlink(missing_ok=True)
        self.current.symlink_to(place.windows)
        self._keep_node()
        return place

    def run(self, place: Place, *changes: str, target: Any = life) -> int:
        """Runs a driver to its end; returns its exit code, negative if it was killed."""
        process = self.context.Process(target=target, args=(str(place.folder), changes))
        process.start()
        deadline = time.monotonic() + LONGEST_SECONDS
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


def check(place: Place, *changes: str) -> None:
    """Everything that is wanted is there once, belongs to one shard, and balances; gc leaves nothing that is not named."""
    store = place.store
    assert problems(place.root)[0] == []
    run = prepare(place.request(*changes), trains=False)
    wanted, lost = survey(run, Ledger(store, "completions"), Ledger(store, "judgements"))
    assert lost == ([], []) and wanted.made.all()
    assert ((wanted.scores != NOT_JUDGED).all(axis=1) == wanted.passed).all()
    check_rows(run)
    for file in list(garbage(store, older_than=0, lease=0.3)):
        store.delete(file.path)
    assert list(garbage(store, older_than=0, lease=0.3)) == [] and problems(place.root)[0] == []
    named = {text for path, *_ in store.files("") if path.endswith(".json") for text in texts(json.loads(store.read(path)))}
    assert [path for path, *_ in store.files("") if path.endswith(".parquet") and not named & set(endings(path))] == []


def endings(path: str) -> list[str]:
    """A path as seen from each of the folders above it."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def check_rows(run: Workspace) -> None:
    """The rows themselves, whatever marks say: each once, of this policy or the one before, and judged as often as asked."""
    rows = {
        stage: [row for shard in Ledger(run.store, stage).shards() for row in run.store.read_table(shard.path).to_pylist()]
        for stage in ("completions", "judgements")
    }
    assert all(set(Counter(row["key"] for row in found).values()) == {1} for found in rows.values())
    current = {spec.hash for spec in run.specs.values()}
    prompts = {prompt.id for prompt in run.prompts.prompts("sft")}
    of_now = Counter((row["prompt_id"], row["sample"]) for row in rows["completions"] if row["spec_hash"] in current)
    assert of_now == Counter((prompt, sample) for prompt in prompts for sample in range(run.config.generate.n))
    older = [row for row in rows["completions"] if row["spec_hash"] not in current]
    assert {row["category"] for row in older} <= {"violence"} and {row["prompt_id"] for row in older} <= prompts
    passed = {row["key"]: row["spec_hash"] in current for row in rows["completions"] if row["drop_reason"] is None}
    runs = Counter((row["completion_key"], row["run"]) for row in rows["judgements"] if row["judge_hash"] == run.judge_hash("full"))
    assert {key for key, _ in runs} <= passed.keys() and set(runs.values()) == {1}
    for key, counts in passed.items():
        assert not counts or sum(other == key for other, _ in runs) == run.config.judge.k


def texts(content: Any) -> Iterator[str]:
    """All texts in a JSON document."""
    if isinstance(content, str):
        yield content
    for item in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from texts(item)


def chain(
    lives: Lives, place: Place, target: str, windows: set[str], *changes: str, what: Any = life, from_the_first: bool = False
) -> list[int]:
    """Runs, killed in one window after the other, until one reaches its end; returns the exit codes.

    The second and all later ones are started with the changes, the first only if told.
    """
    for window in windows:
        (place.windows / "todo" / window).touch()
    (place.windows / "target").write_text(target)
    codes = []
    while len(codes) < LIVES:
        codes.append(lives.run(place, *(changes if codes or from_the_first else ()), target=what))
        if codes[-1] == 0:
            return codes
        assert codes[-1] == -signal.SIGKILL, "a run ends well or is killed"
        if place.store.exists("completions/ledger/00000000.json"):
            assert problems(place.root)[0] == [], place.names("done")
    raise AssertionError(f"{LIVES} runs were not enough; left: {place.names('todo')}")


def reached(undisturbed: Place, target: str) -> set[str]:
    """Windows in which the target can be killed."""
    idle = (*BEFORE_ENGINES, *AFTER_REQUESTS)
    out_of_reach = {"driver": (), "node": BEFORE_ENGINES, "actor": idle, "engine": idle}[target]
    return {name for name in undisturbed.names("seen") if not any(site in name for site in out_of_reach)}


def edit_clause(place: Place) -> str:
    file = place.folder / "policy" / "violence.yaml"
    file.write_text(file.read_text().replace("text: ", "text: In all cases, ", 1))
    return "name=edited"
