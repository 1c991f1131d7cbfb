"""How work is handed out: prefixes stay with an engine, idle engines help, and the end of the work is shared."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.engine import EngineConfig
from cluster.errors import UserError
from cluster.fleet import Done, Fleet, Line, Stage, portion
from cluster.pool import Pool
from cluster.serving import Usage
from cluster.suspects import Suspects, Work, to_blame
from tasks import work
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


def test_an_engine_with_several_prefixes_takes_one_after_the_other() -> None:
    fleet = Fleet([], capacity=8)
    line = Line(TEXT, lambda: fleet)
    line.add(["a1", "a2", "a3", "b1", "b2", "b3", "b4"])
    assert [line.take(fleet, 0, 8).shard for _ in range(4)] == ["b1", "b2", "b3", "b4"]
    line.add(["b5"])
    assert [line.take(fleet, 0, 8).shard for _ in range(2)] == ["b5", "a1"]
    line.add(["b6", "b7", "b8"])
    assert [line.take(fleet, 0, 8).shard for _ in range(3)] == ["a2", "a3", "b6"], "though more of the other wait"
    assert [line.take(fleet, 1, 8).shard for _ in range(2)] == ["b7", "b8"]


def test_towards_the_end_several_engines_hold_less_in_smaller_pieces() -> None:
    assert portion(8, 2, 256, can_be_cut=True) == (16, 32), "twice the capacity while there is plenty"
    assert [portion(8, 2, waiting, can_be_cut=True) for waiting in (24, 8, 2)] == [(14, 3), (10, 2), (10, 2)]


def test_one_engine_and_what_cannot_be_cut_are_fed_to_twice_the_capacity() -> None:
    assert [portion(8, 1, waiting, can_be_cut=True) for waiting in (256, 2)] == [(16, 128), (16, 2)]
    assert [portion(8, 2, waiting, can_be_cut=False) for waiting in (256, 2)] == [(16, 64), (16, 2)]


def test_a_shard_is_to_blame_for_deaths_on_machines_that_are_still_there() -> None:
    nodes = {"head", "one", "two"}
    assert to_blame(["one", "one"], 60, nodes) is False
    assert to_blame(["one", "two", "one"], 60, nodes) is True
    assert to_blame(["one", "two", "one"], 1, nodes) is None, "one of them may be gone, and Ray not know it yet"
    assert to_blame(["one", "two", "one"], 1, {"head", "one"}) is False, "and now it knows"
    assert to_blame(["head"] * 3, 0, {"head"}) is True, "the only machine is that of the run"
    assert to_blame(["gone"] * 12, 60, nodes) is True, "a shard may take machines down, too"


def test_suspects_are_run_alone_and_the_row_that_kills_is_soon_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight rows the sixth kills; of a shard beside it nothing does."""
    monkeypatch.setattr("cluster.suspects.ray", SimpleNamespace(nodes=lambda: [{"NodeID": "head", "Alive": True}]))
    halves = replace(TEXT, split=lambda rows: [rows[: len(rows) // 2], rows[len(rows) // 2 :]] if len(rows) > 1 else [rows])
    suspects, line, alone = Suspects(), SimpleNamespace(stage=halves), []
    suspects.add([Work(line, "12345678", 8), Work(line, "ab", 2)], 0, "head", "died")
    while suspects.waiting:
        work = suspects.take()
        alone.append(work.shard)
        if "6" in work.shard:
            suspects.add([work], 0, "head", "died")
    assert alone == ["12345678", "1234", "5678", "56", "5", "6", "6", "78", "ab"]
    assert not suspects.guilty(finished=0.0), "nothing was finished since: it may be the engine"
    (guilty,) = suspects.guilty(finished=math.inf)
    assert (guilty.shard, len(guilty.deaths)) == ("6", 3) and not suspects


def test_engines_that_are_ending_get_time_to_free_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, free = Pool(EngineConfig(backend="fake")), iter([1.0, 1.0, 3.0])
    monkeypatch.setattr(Pool, "memory_gib", 2.0)
    monkeypatch.setattr("cluster.memory.free_gib", lambda: next(free))
    pool.check_memory()
    monkeypatch.setattr("cluster.memory.END_SECONDS", 0)
    monkeypatch.setattr("cluster.memory.free_gib", lambda: 1.0)
    with pytest.raises(UserError, match=r"need about 2.0 GiB, 1.0 GiB are free"):
        pool.check_memory()


def test_a_shard_is_cut_when_little_is_left_and_nothing_of_it_is_lost() -> None:
    fleet = Fleet([], capacity=8)
    line = Line(TEXT, lambda: fleet)
    line.add(["abcdefgh"])
    assert line.take(fleet, 0, 3).shard == "ab"
    assert line.waiting == 6
    assert sorted(line.take(fleet, 0, 100).shard for _ in range(2)) == ["cd", "efgh"]


def test_the_idle_share_counts_each_engine_until_its_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 10.0])
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    fleet = Fleet([], capacity=8)
    line, idle = Line(TEXT, lambda: fleet), work.Idle()
    idle.take(Done(line, "a", None, Usage(busy_seconds=3.0), engine=0))
    assert idle.share(fleet) == pytest.approx(1 / 4), "of engine 1 nothing is known"
    idle.take(Done(line, "b", None, Usage(busy_seconds=10.0), engine=1))
    idle.take(Done(line, "c", None, Usage(busy_seconds=5.0), engine=0))
    assert idle.share(fleet) == pytest.approx(2 / 20)


def test_a_silence_is_told_and_how_long_it_has_lasted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]

    def nothing_comes(lines: list[Line], tick: Callable[[bool], None]) -> Iterator[Done]:
        for _ in range(700):
            clock[0] += 1.0
            tick(True)
        yield from ()

    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(work, "run", nothing_comes)
    work.work({})
    assert re.findall(r"no shard was finished in the last (\d+) s", capsys.readouterr().err) == ["301", "602"]


def test_pairs_are_halved_between_rows_and_only_then_within_one() -> None:
    pairs = Pairs(np.array([3, 3, 3, 4], np.uint32), np.array([0, 1, 2, 0], np.uint16))
    assert [list(half) for half in pairs.halves()] == [[(3, 0), (3, 1), (3, 2)], [(4, 0)]]
    assert [list(half) for half in pairs.halves()[0].halves()] == [[(3, 0)], [(3, 1), (3, 2)]]
    assert [list(half) for half in Pairs.product([7], 1).halves()] == [[(7, 0)]]
    assert [len(piece) for piece in Pairs.product(range(5), 2).pieces(4)] == [4, 4, 2]
    assert Pairs.product([], 3).pieces(4) == []
