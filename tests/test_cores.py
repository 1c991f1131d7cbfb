"""Engines on CPU are bound to cores of their own, as long as there are any."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

CLAIM = """
import os, sys
from cluster.cores import claim_cores
os.sched_getaffinity = lambda process: {900, 901}  # such as no engine on this machine has
print(*claim_cores(int(sys.argv[1]), int(sys.argv[2])), flush=True)
input()
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_engines_of_all_pools_have_cores_of_their_own_which_are_free_again_however_they_end(processes: list[subprocess.Popen[str]]):
    def claim(count: int, number: int) -> list[int]:
        command = [sys.executable, "-c", CLAIM, str(count), str(number)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout
        return [int(core) for core in processes[-1].stdout.readline().split()]

    assert claim(1, 0) == [900]
    assert claim(1, 0) == [901], "the first engine of another pool"
    assert claim(1, 1) == [901], "none is free, so it is shared by number"
    assert claim(2, 0) == [900, 901]
    processes[0].kill()
    processes[0].wait()
    assert claim(2, 1) == [900, 901]
