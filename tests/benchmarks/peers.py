"""Bespoke Curator, datatrove and Specmill against the fake engine, with what each has against doing a row twice.

    python tests/benchmarks/peers.py --python .venv-peers/bin/python

All get the same conversations and keep as many requests in flight; every answer takes a latency that its text chooses, and has no model
behind it, so that what is measured is the way around a model. Runs are interleaved, each in processes and a folder of its own.

- over HTTP: one server on loopback (`fake_server.py`). Curator and datatrove talk to it, and Specmill with `backend: openai`.
- in process: Specmill with `backend: fake`, which is where it keeps engines that it runs itself.

Curator runs with its cache, in the one process that it has; datatrove with checkpoints, in one process for each core; Specmill with one
engine actor for each core. Rows/s are counted from the call that is given the rows to its last write: processes, imports and Ray have
started, and the peers have done a few rows before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from report import machine, ranged, ratio, row, say
from workload import fresh, requests_of, specmill, write_run

HERE = Path(__file__).parent
LIMITS = {"curator": 2.0, "datatrove": 3.0}
"""How many times a peer's rows/s Specmill's have to be."""


@contextmanager
def serving(latency: float) -> Iterator[str]:
    """The address of a fake server."""
    server = subprocess.Popen([sys.executable, HERE / "fake_server.py", "--latency", str(latency)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def write_requests(file: Path, folder: Path) -> None:
    """The same conversations for the others: what the system says to each category, and rows that name their category."""
    requests = requests_of(fresh(file, 0))
    specs = {request.category: request.turns[0]["content"] for request in requests}
    (folder / "specs.json").write_text(json.dumps(specs))
    with (folder / "requests.jsonl").open("w") as stream:
        for number, request in enumerate(requests):
            assert len(request.turns) == 2
            content = request.turns[1]["content"]
            stream.write(json.dumps({"id": f"r{number}", "category": request.category, "content": content}) + "\n")


def drive(file: Path, number: int) -> dict[str, float]:
    """One run of Specmill."""
    from cluster.session import ray_session

    with ray_session():
        run = fresh(file, number)
        with run.generator:
            made = specmill(run)
    return {"rows": made.rows, "seconds": made.seconds}


def measured(command: Sequence[str | Path]) -> dict[str, Any]:
    """What a contender says in its last line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(arguments: argparse.Namespace) -> None:
    """All runs, and their rows of the table."""
    say(machine())
    cores = len(os.sched_getaffinity(0))
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place, serving(arguments.latency) as url:
        folder = Path(place)
        engine = {"engines": cores, "max_num_seqs": arguments.in_flight // cores}
        http = {"backend": "openai", "model": "fake", "revision": "unversioned", "endpoint": {"url": url, "key_variable": None}}
        fake = {"backend": "fake", "fake": {"latency_seconds": arguments.latency}}
        files = {
            "Specmill over HTTP": write_run(folder / "http", arguments.rows, engine | http, n=1, thought_format="native"),
            "Specmill in process": write_run(folder / "fake", arguments.rows, engine | fake, n=1, thought_format="native"),
        }
        write_requests(files["Specmill over HTTP"], folder)
        for number in range(1, arguments.runs + 1):
            commands: dict[str, list[str | Path]] = {
                name: [sys.executable, __file__, "--drive", file, "--number", str(number)] for name, file in files.items()
            }
            for peer in LIMITS:
                scratch = folder / f"{peer}-{number}"
                scratch.mkdir()
                commands[peer] = [arguments.python, HERE / f"peer_{peer}.py", url, scratch, str(arguments.in_flight)]
            names = sorted(commands, reverse=number % 2 == 0)
            for name in names:
                result = measured(commands[name])
                if result["rows"] != arguments.rows:
                    raise SystemExit(f"{name}: {result['rows']} of {arguments.rows} rows")
                say(f"run {number}: {name} {result['rows']} rows in {result['seconds']:.1f} s")
                speeds.setdefault(name, []).append(result["rows"] / result["seconds"])
    for name, values in speeds.items():
        ranged(name, values, "rows/s with the fake engine")
    for ours in files:
        for peer, limit in LIMITS.items():
            pairs = list(zip(speeds[ours], speeds[peer], strict=True))
            middle = statistics.median(first / second for first, second in pairs)
            spread = "95 % interval {1:.2f} to {2:.2f}".format(*ratio(pairs)) if arguments.runs > 1 else ""
            row(f"{ours} / {peer}", f"{middle:.2f}", spread, f"{limit:g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"), help="Python of the peers' environment")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.02, help="median seconds of an answer")
    parser.add_argument("--in-flight", type=int, default=256, help="requests at a time, all processes together")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        print(json.dumps(drive(arguments.drive, arguments.number)))
    else:
        compare(arguments)
