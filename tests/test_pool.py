"""Which engine a shard goes to."""

from collections import deque
from typing import Any

from cluster.fleet import Fleet


def test_shards_of_one_prefix_go_to_one_engine_and_an_idle_engine_helps() -> None:
    fleet = Fleet([object(), object()], capacity=32)
    waiting: dict[str, Any] = {"a": deque(["a1", "a2", "a3"]), "b": deque(["b1"])}
    assert [fleet._take(waiting, slot) for slot in (0, 1, 0)] == ["a1", "b1", "a2"]
    assert fleet._take(waiting, 1) == "a3", "nothing of its own is left"
    assert fleet._take({"b": deque(["b2"]), "a": deque(["a4"])}, 0) == "a4", "homes last from one call to the next"
