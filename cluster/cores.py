"""Which cores an engine on CPU is bound to. Two that share one get half of it each, however idle the others are."""

import os
import socket

_claims: list[socket.socket] = []


def claim_cores(count: int, number: int) -> list[int]:
    """As many cores of this machine: such that no other process has claimed, then, from `number` on, such that one has.

    A claim is a name that Linux gives to one process of a machine (an abstract socket), and takes back when it ends, however it ends.
    """
    cores = sorted(os.sched_getaffinity(0))
    free = [core for core in cores if _claim(core, count)]
    shared = [cores[(number + rank) % len(cores)] for rank in range(count - len(free))]
    return free + shared


def _claim(core: int, count: int) -> bool:
    if len(_claims) == count:
        return False
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0specmill-core-{core}")
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    return True
