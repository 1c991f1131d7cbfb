"""The store on S3: a real server on loopback, reached directly and through a proxy that fails.

Nothing here is a stand-in but the address: credentials, conditional writes, checksums and restarts are the server's own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import yaml
from faulty_proxy import Proxy, faulty_proxy, reset, status
from s3_server import KEY, SECRET, S3Server
from tiny_run import write_run

from cluster.errors import UserError
from cluster.models import weights_digest
from cluster.training import report, resume, run_workers
from cluster.training_config import WorkersConfig
from flows.inspect import problems
from tasks import store as store_module
from tasks import tables
from tasks.ledger import Ledger
from tasks.store import Conflict, Down, Store

pytestmark = pytest.mark.slow
SPECS = Path(__file__).parent.parent / "specs"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("weed"))
    server.start()
    yield server
    server.kill()


@contextmanager
def _reached(server: S3Server, name: str) -> Iterator[str]:
    """A root on the server in a bucket of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in (("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET), ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(variable, value)
        patch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        direct = fsspec.filesystem("s3", endpoint_url=server.url, skip_instance_cache=True)
        direct.mkdir(name)
        yield f"s3://{name}/root"
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture()
def root(server: S3Server, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.originalname.replace("_", "-")[:40].strip("-")
    with _reached(server, name) as root:
        yield root


def _table(first: int, count: int) -> pa.Table:
    keys = pa.array([number.to_bytes(16) for number in range(first, first + count)], tables.KEY)
    return pa.table({"key": keys, "quarantined": pa.nulls(count, pa.string())})


def test_files_are_created_once_read_replaced_and_removed(root: str) -> None:
    store = Store(root)
    store.check_writable()
    store.put("a/b", b"one")
    assert store.put("a/b", b"one").bytes == 3, "an attempt whose answer was lost is made again"
    with pytest.raises(Conflict):
        store.put("a/b", b"two")
    store.replace("a/b", b"three")
    assert store.read("a/b") == b"three" and store.exists("a/b")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")
    with pytest.raises(FileNotFoundError):
        store.read("a/b")


def test_one_of_sixteen_writers_wins_an_entry(root: str) -> None:
    ledgers = [Ledger(Store(root), "completions") for _ in range(16)]
    for ledger in ledgers:
        ledger.read()

    def commit(ledger: Ledger) -> bool:
        try:
            ledger.commit()
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(commit, ledgers)) == 1
    assert Ledger(Store(root), "completions").read().entries == 1


def test_a_ledger_of_many_entries_is_read_from_its_newest_snapshot(server: S3Server, root: str) -> None:
    ledger = Ledger(Store(root), "completions")
    shards = [ledger.store.put_table("completions/shards", _table(100 * number, 3)) for number in range(70)]
    for shard in shards:
        ledger.commit([shard])
    for _ in range(100):
        ledger.commit()
    with faulty_proxy(server.port, {}) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        state = Ledger(Store(root), "completions").read()
        assert proxy.seen["passed"] < 60, "the last snapshot holds 128 of 170 entries"
        assert list(state.shards.values()) == shards and state.entries == 170
        assert problems(root) == ([], 70)


def test_a_wrong_secret_and_a_bucket_of_others_are_the_users_mistake(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="refuses"):
        Store("s3://not-mine/root").check_writable()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY") as caught:
        Store(root).check_writable()
    assert "mistyped" not in str(caught.value)


FAULTS = {"slow down": status(503, SLOW_DOWN, Content_Type="application/xml"), "error 500": status(500), "reset": reset}


@contextmanager
def _faulty(server: S3Server, share: float, lost: float, root: str) -> Iterator[Proxy]:
    with faulty_proxy(server.port, FAULTS, share, lost) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield proxy
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_transient_errors_and_lost_answers_are_survived(server: S3Server, root: str) -> None:
    with _faulty(server, 0.3, 0.1, root) as proxy:
        ledger = Ledger(Store(root), "completions")
        for number in range(20):
            ledger.commit([ledger.store.put_table("completions/shards", _table(100 * number, 5))])
        assert all(proxy.seen[name] for name in ("slow down", "error 500", "reset", "lost answer")), proxy.seen
    assert problems(root) == ([], 20)
    assert Ledger(Store(root), "completions").read().entries == 20, "no entry is doubled by an attempt whose answer was lost"


def test_a_dead_store_stops_with_a_clear_message(server: S3Server, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PATIENCE_SECONDS", 2.0)
    with _faulty(server, 1.0, 0.0, root), pytest.raises(Down, match=r"does not answer .* start the same command again"):
        Store(root).put("a", b"1")


@pytest.fixture()
def workers(root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray, whose workers know where the store is and wait 20 s for it."""
    import ray

    from cluster.session import ray_session

    monkeypatch.setenv("SPECMILL_STORE_SECONDS", "20")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    with ray_session():
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield


@pytest.fixture()
def servers(workers: None) -> Iterator[None]:
    """Prefect and Ray."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


def test_another_machine_goes_on_from_what_a_training_has_in_the_store(root: str, workers: None, tmp_path: Path) -> None:
    class NoEngine:
        """Saves and loads nothing but the state of the loop, each rank in a file of its own."""

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def save(self, directory: str, state: dict[str, int]) -> None:
            (Path(directory) / f"state-{self.rank}.json").write_text(json.dumps(state))

        def load(self, directory: Path) -> Any:
            return json.loads((directory / f"state-{self.rank}.json").read_text())

    def loop(machine: str) -> None:
        import ray.train

        rank, work = ray.train.get_context().get_world_rank(), tmp_path / machine
        engine = NoEngine(rank)
        state = resume(engine, work) or {"step": 0}
        for step in range(state["step"], 4):
            if rank == 0:
                with (work / "log" / "lines").open("a") as lines:
                    lines.write(f"{step} {machine}\n")
            if (step, machine) == (2, "first"):
                raise UserError("the first machine is gone")
            report({}, engine, {"step": step + 1}, work, ["log"])

    def train(machine: str) -> None:
        (tmp_path / machine / "log").mkdir(parents=True)
        run_workers(lambda _: loop(machine), {}, WorkersConfig(ranks=2), storage=f"{root}/training", name="run")

    with pytest.raises(UserError, match="is gone"):
        train("first")
    train("second")
    lines = [line.split() for line in (tmp_path / "second" / "log" / "lines").read_text().splitlines()]
    assert [step for step, _ in lines] == ["0", "1", "2", "3"]
    begun = [machine for _, machine in lines].count("first")
    assert begun in (1, 2), "the ranks may have stopped before the second checkpoint was complete"
    assert [machine for _, machine in lines] == ["first"] * begun + ["second"] * (4 - begun)
    assert not list(tmp_path.glob("*/.checkpoint-*")), "a copy on the way to the store is removed"


def test_a_run_lives_through_a_restart_of_its_store_and_stops_when_it_is_dead(
    server: S3Server, root: str, servers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is killed and comes back is waited for; one that does not ends the run, which goes on when it is there again."""
    from flows.config import RunRequest
    from flows.regenerate import regenerate

    engine = {"backend": "fake", "engines": 2, "max_num_seqs": 4, "fake": {"latency_seconds": 0.3}}
    content = {
        "version": 1,
        "name": "s3",
        "root": root,
        "lease_seconds": 3,
        "policy": str(SPECS / "policies" / "base"),
        "prompts": str(SPECS / "prompts"),
        "generate": {"engine": engine, "n": 1, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800, "shard_rows": 4},
        "judge": {"engine": engine, "k": 2},
        "select": {"threshold": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    request = RunRequest(file=str(file))

    def committed() -> int:
        return sum(shard.rows for shard in Ledger(Store(root), "completions").shards())

    def at(rows: int, act: Callable[[], None]) -> threading.Thread:
        """Acts when so many rows more than now are committed."""
        goal = committed() + rows

        def watch() -> None:
            while committed() < goal:
                time.sleep(0.2)
            act()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread

    def restart() -> None:
        server.kill()
        time.sleep(1)
        server.start()

    monkeypatch.setattr(store_module, "PATIENCE_SECONDS", 4.0)
    killer = at(12, server.kill)
    with pytest.raises(Down, match="does not answer"):
        regenerate(request)
    killer.join()
    server.start()
    monkeypatch.setattr(store_module, "PATIENCE_SECONDS", 20.0)
    assert 0 < committed() < 112
    killer = at(12, restart)
    dataset = regenerate(request)
    killer.join()
    assert dataset.manifest["balance"]["completions"] == 112
    assert committed() == 112, "what was committed before the store died was not made again"
    assert problems(root)[0] == []


@pytest.mark.soak
def test_a_run_through_a_store_that_fails_now_and_then_makes_what_it_makes_of_a_sound_one(
    server: S3Server, root: str, tmp_path: Path
) -> None:
    """Driver and engines' actors meet errors, resets and lost answers; nothing is doubled, nothing is missing."""
    from flows.config import RunRequest
    from flows.opening import opened
    from flows.steps import complete_and_judge_step, select_step

    def run(root: str) -> str:
        request = RunRequest(file=str(file), root=root, samples=2, changes=["generate.shard_rows=1"])
        with opened(request, trains=False) as run:
            complete_and_judge_step.fn(run)
            return select_step.fn(run).version

    file = write_run(tmp_path / "tiny")
    sound = run(f"{root}/sound")
    with _faulty(server, 0.2, 0.1, root) as proxy:
        assert run(f"{root}/faulty") == sound
        assert all(proxy.seen[name] for name in ("slow down", "error 500", "reset", "lost answer")), proxy.seen
    assert problems(f"{root}/faulty") == problems(f"{root}/sound") and problems(f"{root}/faulty")[0] == []
    for stage in ("completions", "judgements"):
        made = [Ledger(Store(f"{root}/{name}"), stage).read() for name in ("sound", "faulty")]
        assert made[0].made == made[1].made > 0, "nothing was made twice"


@pytest.mark.soak
def test_what_is_trained_under_a_remote_root_goes_on_and_is_reused_where_nothing_of_it_is(
    root: str, servers: None, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT with a root on S3: trained in the cache, kept in the store, and fetched from there by machines with an empty cache."""
    from flows.config import RunRequest
    from flows.train import train

    def lines() -> list[str]:
        found = (tmp_path / "cache").glob("roots/*/checkpoints/*/**/model/metrics.jsonl")
        return next(found).read_text().splitlines()

    monkeypatch.setenv("SPECMILL_CACHE", str(tmp_path / "cache"))
    engine = {"backend": "fake", "engines": 2}
    served = {"backend": "vllm", "model": tiny_model, "dtype": "float32", "max_model_len": 2048, "kv_cache_gib": 0.25}
    content = {
        "version": 1,
        "name": "s3-training",
        "root": root,
        "policy": str(SPECS / "policies" / "base"),
        "prompts": str(SPECS / "prompts"),
        "generate": {"engine": engine, "n": 1, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800},
        "judge": {"engine": engine, "k": 1},
        "select": {"threshold": 3},
        "train": ["sft"],
        "sft": {"epochs": 10, "rows_per_step": 8, "save_every_steps": 2},
        "evaluate": {"engine": served},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    request = RunRequest(file=str(file))
    driver = subprocess.Popen([sys.executable, "-m", "flows.cli", "run", str(file), "--flow", "train"], start_new_session=True)
    while not Store(root).glob("checkpoints/*/.training/model/checkpoint_manager_snapshot.json"):
        assert driver.poll() is None
        time.sleep(0.1)
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=120) == 130
    begun = lines()
    shutil.rmtree(tmp_path / "cache")
    (trained,) = train(request)
    assert not trained.reused and problems(root)[0] == []
    assert lines()[:2] == begun[:2] and len(lines()) > len(begun), "with their times: they came from the store"
    assert len(list((tmp_path / "cache").glob("roots/*/checkpoints/*/tensorboard/*"))) == 2, "one file of each machine"
    assert not list(Store(root).files(f"checkpoints/{trained.id}/.training"))
    shutil.rmtree(tmp_path / "cache")
    (found,) = train(request)
    assert found.reused and (found.weights, found.id) == (trained.weights, trained.id)
    assert weights_digest(Path(found.model.path)) and (Path(found.model.path) / "tokenizer.json").exists()
