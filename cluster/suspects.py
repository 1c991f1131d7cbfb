"""Which shard kills engines: those that were in one that died are run again, each alone in an engine.

One that was alone in it when it died is cut in two, and one that cannot be cut is accused when engines have died with it again and again.
It is given up if an engine finishes something else afterwards: else it may be the engines that die. The loss of a machine speaks against no
shard, unless very many were lost with it.
"""

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray

MAX_DEATHS = 3
"""A shard that cannot be cut may be in so many engines that die, and an engine may die so often while it starts."""
MAX_LOSSES = 12
"""The same of a shard where machines were lost, and of an engine that finishes no shard."""
NOTICE_SECONDS = 20.0
"""Ray may need so long to notice that a machine is gone, whose processes' end it tells at once."""


@dataclass
class Work:
    """A shard of a line; of the engines that died with it in them, the nodes, and of the last one, its number, when and why."""

    line: Any
    shard: Any
    size: int
    deaths: tuple[str, ...] = ()
    engine: int = 0
    died_at: float = 0.0
    reason: str = ""


class Suspects:
    """Shards of one fleet that were in an engine that died."""

    def __init__(self) -> None:
        self._waiting: deque[Work] = deque()
        self._accused: list[Work] = []

    def __bool__(self) -> bool:
        return bool(self._waiting or self._accused)

    @property
    def waiting(self) -> bool:
        """Whether one is to be run alone."""
        return bool(self._waiting)

    def take(self) -> Work:
        """The next one to run alone: parts of what has just killed an engine come first, so that the row is soon found."""
        return self._waiting.popleft()

    def add(self, dead: Sequence[Work], engine: int, node: str, reason: str) -> None:
        """What was in an engine that died; one that was alone in it for the second time is cut, or accused at last."""
        for work in dead:
            work.deaths, work.engine, work.died_at, work.reason = (*work.deaths, node), engine, time.monotonic(), reason
        if len(dead) > 1 or len(dead[0].deaths) < 2:
            self._waiting.extend(dead)
            return
        (work,) = dead
        stage = work.line.stage
        parts = stage.split(work.shard) if stage.split else [work.shard]
        if len(parts) > 1:
            self._waiting.extendleft(Work(work.line, part, stage.size(part), (node,)) for part in reversed(parts))
        elif len(work.deaths) < MAX_DEATHS:
            self._waiting.appendleft(work)
        else:
            self._accused.append(work)

    def guilty(self, finished: float) -> list[Work]:
        """Takes the accused that are to blame; those whose machines were lost may try again. `finished`: when something else was."""
        if not self._accused:
            return []
        there, now, found = {node["NodeID"] for node in ray.nodes() if node["Alive"]}, time.monotonic(), []
        for work in [work for work in self._accused if work.died_at < finished]:
            guilty = to_blame(work.deaths, now - work.died_at, there)
            if guilty is None:
                continue
            self._accused.remove(work)
            if guilty:
                found.append(work)
            else:
                self._waiting.append(work)
        return found


def to_blame(deaths: Sequence[str], seconds: float, there: Collection[str]) -> bool | None:
    """Whether a shard that cannot be cut is to blame for the deaths of the engines that it was in, or their machines were lost.

    None while Ray may not know yet. `deaths`: their nodes; `seconds`: since the last one; `there`: the nodes that are there now.
    """
    if sum(node in there for node in deaths) < MAX_DEATHS and len(deaths) < MAX_LOSSES:
        return False
    return True if seconds >= NOTICE_SECONDS or len(there) == 1 else None
