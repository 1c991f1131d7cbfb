"""How far one driver reaches: prompts by the hundred thousand through fake engines, completed once and judged three times.

    python tests/benchmarks/scale.py --prompts 1000000

Runs a tenth of the prompts and then all of them, each in a driver of its own on one Ray, and prints rows per second, the driver's memory
at its peak after each part, what a key costs of it, and how long it takes to find out and make some thousand completions when all others
are there. Then a tenth of them on S3 (SeaweedFS on loopback), to count the requests that a row takes.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import yaml

SPECS = Path(__file__).parent.parent.parent / "specs"
LOST = 1000
"""Completions, at least, that are gone when the run is started again."""
PARTS = ("read", "plan", "make", "select")
JUDGE_RUNS = 3


def write_prompts(file: Path, start: int, stop: int) -> None:
    """Prompts of seven categories, each a scenario of its own."""
    kinds = [json.loads((SPECS / "prompts" / f"{path.stem}.jsonl").read_text().splitlines()[0]) for path in policies()]
    with file.open("w") as stream:
        for number in range(start, stop):
            kind = kinds[number * len(kinds) // stop]
            messages = [{"role": "user", "content": f"Request number {number}: {kind['messages'][-1]['content']}"}]
            row = kind | {"id": f"p{number}", "group": f"g{number}", "split": "sft", "messages": messages}
            stream.write(json.dumps(row) + "\n")


def policies() -> list[Path]:
    """The categories' files."""
    return [path for path in sorted((SPECS / "policies" / "base").glob("*.yaml")) if path.stem != "bundle"]


def write_run(folder: Path, engines: int, root: str) -> None:
    """The run file: nothing is compared for overlap, and the engines count characters instead of tokens."""
    engine = {"backend": "fake", "engines": engines, "max_num_seqs": 256, "fake": {"tokenizes": False}}
    content = {
        "version": 1,
        "name": "scale",
        "root": root,
        "policy": str(SPECS / "policies" / "base"),
        "prompts": str(folder / "prompts"),
        "overlap": {"duplicates": "off", "contamination": "off"},
        "generate": {"engine": engine, "n": 1, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800},
        "judge": {"engine": engine, "k": JUDGE_RUNS, "sequential": False},
        "select": {"threshold": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))


def drive(file: str) -> dict[str, Any]:
    """One run of the driver; seconds of each part, and its memory at its peak, in bytes."""
    from flows.config import RunRequest
    from flows.opening import opened
    from flows.steps import complete_and_judge_step, select_step
    from flows.workspace import survey
    from tasks.ledger import Ledger

    times, peaks = [time.monotonic()], []

    def part_ended() -> None:
        times.append(time.monotonic())
        peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    with opened(RunRequest(file=file), trains=False) as run:
        part_ended()
        wanted, _ = survey(run, Ledger(run.store, "completions"), Ledger(run.store, "judgements"))
        missing = int((~wanted.made).sum())
        del wanted
        part_ended()
        complete_and_judge_step.fn(run)
        part_ended()
        dataset = select_step.fn(run)
        part_ended()
    seconds = {part: end - start for part, start, end in zip(PARTS, times[:-1], times[1:], strict=True)}
    return {"prompts": dataset.manifest["balance"]["completions"], "made": missing, "seconds": seconds, "peaks": peaks}


def lose(root: str) -> None:
    """Removes files of completions, as a disk might; the next run draws them again."""
    from tasks.ledger import Ledger
    from tasks.store import Store

    store, gone = Store(root), 0
    for shard in Ledger(store, "completions").shards():
        if gone >= LOST:
            return
        store.delete(shard.path)
        gone += shard.rows


def s3_requests(folder: Path, prompts: int, engines: int) -> None:
    """The same on S3, through a proxy that counts."""
    sys.path.append(str(Path(__file__).parent.parent))
    from faulty_proxy import faulty_proxy
    from s3_server import KEY, SECRET, S3Server

    (folder / "s3" / "prompts").mkdir(parents=True)
    write_prompts(folder / "s3" / "prompts" / "prompts.jsonl", 0, prompts)
    write_run(folder / "s3", engines, "s3://test-scale/root")
    server = S3Server(folder / "s3")
    server.start()
    try:
        with faulty_proxy(server.port, {}) as proxy:
            os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL_S3": proxy.url}
            fsspec.filesystem("s3").mkdir("test-scale")
            with ray_of_its_own():
                result = measured(folder / "s3")
            rows = result["made"] * (1 + JUDGE_RUNS)
            print(f"S3: {len(proxy.arrived):,} requests for {rows:,} rows: {len(proxy.arrived) / rows:.4f} a row")
    finally:
        server.kill()


@contextmanager
def ray_of_its_own() -> Iterator[None]:
    """A Ray for the drivers that run inside; its workers have this process's environment."""
    from cluster.session import ray_session

    with ray_session():
        import ray  # behind `cluster`, which makes the settings that it reads when it is imported

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        try:
            yield
        finally:
            del os.environ["RAY_ADDRESS"]


def measured(folder: Path) -> dict[str, Any]:
    """A run of a driver in a process of its own, on the Ray of this one."""
    done = subprocess.run([sys.executable, __file__, "--drive", str(folder / "run.yaml")], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def scale(prompts: int, engines: int) -> None:
    """All measurements, one line each."""
    with tempfile.TemporaryDirectory() as place, ray_of_its_own():
        folder = Path(place)
        (folder / "prompts").mkdir()
        write_run(folder, engines, str(folder / "root"))
        results = []
        for count in (prompts // 10, prompts):
            shutil.rmtree(folder / "root", ignore_errors=True)
            write_prompts(folder / "prompts" / "prompts.jsonl", 0, count)
            results.append(result := measured(folder))
            rows, total = result["made"] * (1 + JUDGE_RUNS), sum(result["seconds"].values())
            print(f"{count:,} prompts, {rows:,} rows: {rows / total:,.0f} rows/s ({told(result)})")
        small, large = results
        keys = (large["prompts"] - small["prompts"]) * (1 + JUDGE_RUNS)
        print(f"memory of the driver per key: {(large['peaks'][-1] - small['peaks'][-1]) / keys:.1f} bytes")
        lose(str(folder / "root"))
        again = measured(folder)
        print(f"all but {again['made']:,} completions there: {told(again)}")


def told(result: dict[str, Any]) -> str:
    """Seconds of each part, and the driver's memory at its peak until then."""
    peaks = zip(result["seconds"].items(), result["peaks"], strict=True)
    return ", ".join(f"{part} {seconds:.0f} s, {peak / 2**20:,.0f} MiB" for (part, seconds), peak in peaks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--engines", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        print(json.dumps(drive(arguments.drive)))
    else:
        scale(arguments.prompts, arguments.engines)
        with tempfile.TemporaryDirectory() as place:
            s3_requests(Path(place), arguments.prompts // 10, arguments.engines)
