"""How work is handed out: prefixes stay with an engine, idle engines help, and the end of the work is shared."""

import numpy as np

from cluster.fleet import Fleet, Line, Stage
from tasks.work import Pairs

TEXT = Stage(run=None, size=len, prefix=lambda shard: shard[0], split=lambda shard: [shard[: len(shard) // 2], shard[len(shard) // 2 :]])


def test_shards_of_one_prefix_go_to_one_engine_and_an_idle_engine_helps() -> None:
    fleet = Fleet([], capacity=8)
    line = Line(TEXT, lambda: fleet)
    line.add(["a1", "a2", "a3", "b1"])
    assert [line.take(fleet, engine, 8).shard for engine in (0, 1, 0)] == ["a1", "b1", "a2"]
    assert line.take(fleet, 1, 8).shard == "a3", "its own prefix has nothing left"
    assert line.waiting == 0
    line.add(["b2"])
    assert line.take(fleet, 0, 8).shard == "b2"


def test_a_shard_is_cut_when_little_is_left_and_nothing_of_it_is_lost() -> None:
    fleet = Fleet([], capacity=8)
    line = Line(TEXT, lambda: fleet)
    line.add(["abcdefgh"])
    assert line.take(fleet, 0, 3).shard == "ab"
    assert line.waiting == 6
    assert sorted(line.take(fleet, 0, 100).shard for _ in range(2)) == ["cd", "efgh"]


def test_pairs_are_halved_between_rows_and_only_then_within_one() -> None:
    pairs = Pairs(np.array([3, 3, 3, 4], np.uint32), np.array([0, 1, 2, 0], np.uint16))
    assert [list(half) for half in pairs.halves()] == [[(3, 0), (3, 1), (3, 2)], [(4, 0)]]
    assert [list(half) for half in pairs.halves()[0].halves()] == [[(3, 0)], [(3, 1), (3, 2)]]
    assert [list(half) for half in Pairs.product([7], 1).halves()] == [[(7, 0)]]
    assert [len(piece) for piece in Pairs.product(range(5), 2).pieces(4)] == [4, 4, 2]
    assert Pairs.product([], 3).pieces(4) == []
