"""The two other ways in: a deployment on a Prefect server with its schedule, and a job on a running Ray cluster."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
FLOWS = {"regenerate", "train", "evaluate", "factory"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(*command: str, env: dict[str, str], cwd: Path = ROOT, seconds: float = 300) -> str:
    """Runs a program of the environment to its end and returns what it said."""
    done = subprocess.run([str(BIN / command[0]), *command[1:]], env=env, cwd=cwd, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run_file(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two categories with four groups of prompts each, eight prompts of which are completed."""
    folder = tmp_path_factory.mktemp("doors")
    (folder / "prompts").mkdir()
    for name in ("self-harm", "violence"):
        rows = (ROOT / "specs" / "prompts" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / "prompts" / f"{name}.jsonl").write_text("".join(rows[:16]))
    engine = {"model": tiny_model, "dtype": "float32", "max_num_seqs": 32, "kv_cache_gib": 0.25}
    content = {
        "version": 1,
        "name": "doors",
        "root": str(folder / "root"),
        "policy": str(ROOT / "specs" / "policies" / "base"),
        "prompts": str(folder / "prompts"),
        "generate": {"engine": engine, "n": 1, "thought_characters": 40, "answer_characters": 40, "max_tokens": 700},
        "judge": {"engine": engine, "k": 1, "temperature": 1.0},
        "select": {"threshold": 1},
        "evaluate": {"engine": engine},
    }
    file = folder / "doors.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def clean_environment() -> dict[str, str]:
    """The environment of a person's shell: nothing of the servers that other tests have started."""
    private = ("PREFECT_", "RAY_")
    return {name: value for name, value in os.environ.items() if not name.startswith(private)} | {"DO_NOT_TRACK": "1"}


@pytest.fixture(scope="module")
def submitted(run_file: Path, clean_environment: dict[str, str]) -> set[str]:
    """The dataset versions under the root after `ray job submit` on a head of its own."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    temp = Path("/tmp") / f"ray-doors-{os.getpid()}"  # a socket's path has to be short
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    # Beside another Ray on this machine an agent on the usual port would fail in silence, and no job could be submitted.
    command += [
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        "--num-cpus=8",
        f"--temp-dir={temp}",
        "--object-store-memory=268435456",
    ]
    head = subprocess.Popen([*command, "--disable-usage-stats"], env=clean_environment, stdout=subprocess.DEVNULL)
    try:
        jobs = f"http://127.0.0.1:{dashboard}/api/jobs/"
        wait_until(lambda: healthy(jobs, {"entrypoint": "true"}), "the head takes jobs", 120)
        job = ["ray", "job", "submit", f"--address=http://127.0.0.1:{dashboard}", "--", str(BIN / "specmill"), "run", str(run_file)]
        said = call(*job, "--flow", "regenerate", env=clean_environment, seconds=600)
        assert "succeeded" in said and "16 made" in said, said[-3000:]
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(temp, ignore_errors=True)
    return versions(run_file.parent / "root")


@pytest.fixture(scope="module")
def server(clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server with all deployments; yields the environment of its clients."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    environment = clean_environment | {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    environment |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_CLI_PROMPT": "false"}
    with (home / "server.log").open("w") as log:
        command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: healthy(environment["PREFECT_API_URL"] + "/health"), "the server answers", 180)
        call("prefect", "work-pool", "create", "local", "--type", "process", env=environment)
        call("prefect", "deploy", "--all", env=environment)
        yield environment
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def wait_until(holds: Callable[[], Any], what: str, seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s it was still not so that {what}"
        time.sleep(1)
    return found


def healthy(address: str, content: dict[str, str] | None = None) -> bool:
    try:
        return httpx.request("POST" if content else "GET", address, json=content, timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


def ask(environment: dict[str, str], path: str, **content: Any) -> Any:
    """An answer of the server's API."""
    response = httpx.post(environment["PREFECT_API_URL"] + path, json=content, timeout=60)
    response.raise_for_status()
    return response.json()


def versions(root: Path) -> set[str]:
    return {path.parent.name for path in (root / "datasets" / "doors").glob("*/manifest.json")}


def test_the_nightly_runs_are_scheduled_in_the_server(server: dict[str, str]) -> None:
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    runs = wait_until(lambda: ask(server, "/flow_runs/filter", **scheduled), "there are scheduled runs", 120)
    assert all("T02:00:00" in run["expected_start_time"] for run in runs)
    deployments = {item["name"]: item for item in ask(server, "/deployments/filter")}
    assert set(deployments) == FLOWS
    assert {run["deployment_id"] for run in runs} == {deployments["regenerate"]["id"]}


def test_the_forms_explain_every_parameter(server: dict[str, str]) -> None:
    for deployment in ask(server, "/deployments/filter"):
        schema = deployment["parameter_openapi_schema"]
        fields = schema["definitions"]["RunRequest"]["properties"]
        assert {"file", "root", "samples", "judge_runs", "threshold", "changes"} == set(fields)
        assert all(field["title"] and field["description"] for field in fields.values())


@pytest.mark.parametrize("own_root", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["shared root", "own roots"])
def test_a_ray_job_and_a_run_of_the_deployment_make_the_same_dataset(
    submitted: set[str], server: dict[str, str], run_file: Path, tmp_path: Path, own_root: bool
) -> None:
    """On one root the deployment finds what the job made; on a root of its own it makes the same again."""
    assert len(submitted) == 1
    root = tmp_path / "root" if own_root else run_file.parent / "root"
    request = json.dumps({"file": str(run_file), "root": str(root)})
    call("prefect", "deployment", "run", "regenerate/regenerate", "--param", f"request={request}", env=server)
    worker = subprocess.Popen([str(BIN / "prefect"), "worker", "start", "--pool", "local"], env=server, cwd=ROOT)
    try:
        finished = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}}
        (run,) = wait_until(lambda: ask(server, "/flow_runs/filter", **finished), "the run of the deployment ended", 600)
    finally:
        worker.kill()  # it sometimes sleeps through signals, and its run has ended
        worker.wait(60)
    assert run["state"]["type"] == "COMPLETED", run["state"]
    assert versions(root) == submitted
