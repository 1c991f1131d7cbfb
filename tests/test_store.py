"""The store and the ledger: written once, named by content, one writer."""

import errno
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import tasks.store
from cluster.errors import SpecmillError, UserError
from cluster.serving import Usage
from flows.inspect import problems
from tasks.ledger import Ledger
from tasks.store import Conflict, Corrupt, Down, Store
from tasks.tables import KEY


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


def _table(keys: range, quarantined: int = 0) -> pa.Table:
    marks = ["reason"] * quarantined + [None] * (len(keys) - quarantined)
    return pa.table({"key": pa.array([bytes([key]) * 16 for key in keys], KEY), "quarantined": pa.array(marks, pa.string())})


def test_a_file_is_created_once_and_never_replaced(store: Store):
    store.put("a/b.json", b"one")
    with pytest.raises(Conflict):
        store.put("a/b.json", b"two")
    assert store.read("a/b.json") == b"one"
    assert store.put("a/b.json", b"one").bytes == 3
    assert not [name for name in Path(store.path("a")).iterdir() if name.name.startswith(".")]


def test_the_ledger_names_what_counts(store: Store):
    ledger = Ledger(store, "completions")
    first, second = (
        store.put_table("completions/shards", _table(range(3), 1)),
        store.put_table("completions/shards", _table(range(3, 5))),
    )
    store.put_table("completions/shards", _table(range(9, 10)))
    ledger.commit([first])
    ledger.commit([second])
    assert Ledger(store, "completions").shards() == [first, second]
    assert (first.rows, first.quarantined) == (3, 1)


def test_a_stale_writer_is_fenced_out(store: Store):
    one, other = Ledger(store, "completions"), Ledger(store, "completions")
    one.commit([])
    other.commit([])
    with pytest.raises(Conflict, match="another run"):
        one.commit([])


def test_what_is_committed_after_a_look_fences_its_writer_out(store: Store):
    """It has planned on what it saw: the same keys may be in the other's shard."""
    one = Ledger(store, "completions")
    one.shards()
    Ledger(store, "completions").commit([])
    with pytest.raises(Conflict, match="another run"):
        one.commit([])


def test_a_lost_shard_is_seen_declared_and_made_again(store: Store):
    ledger = Ledger(store, "completions")
    shard = store.put_table("completions/shards", _table(range(3)))
    ledger.commit([shard])
    Path(store.path(shard.path)).unlink()
    assert list(store.read_tables([shard.path for shard in ledger.shards()], ["key"])) == [None]
    assert problems(store.root)[0] == [f"{shard.path}: missing"]
    ledger.commit([], lost=[shard.path])
    assert Ledger(store, "completions").shards() == []
    ledger.commit([store.put_table("completions/shards", _table(range(3)))])
    assert problems(store.root) == ([], 1)


def test_verify_finds_changed_bytes_and_doubled_keys(store: Store):
    ledger = Ledger(store, "completions")
    shards = [
        store.put_table("completions/shards", _table(range(3))),
        store.put_table("completions/shards", _table(range(2, 6))),
    ]
    ledger.commit(shards)
    found, checked = problems(store.root)
    assert checked == 2 and len(found) == 1 and "key 0202" in found[0]
    target = Path(store.path(shards[0].path))
    target.write_bytes(target.read_bytes()[:-1] + b"x")
    assert "checksum differs" in problems(store.root)[0][0]


def test_no_changed_byte_of_a_shard_passes_for_another_value(store: Store):
    rows = [{"key": bytes([number]) * 16, "text": f"answer {number} of many"} for number in range(20)]
    shard = store.put_table("completions/shards", pa.Table.from_pylist(rows, schema=pa.schema([("key", KEY), ("text", pa.string())])))
    target = Path(store.path(shard.path))
    content, found = target.read_bytes(), 0
    for place in range(len(content)):
        target.write_bytes(content[:place] + bytes([content[place] ^ 0x11]) + content[place + 1 :])
        try:
            table = store.read_table(shard.path, ["key", "text"])
        except Corrupt:
            found += 1
            continue
        assert table.cast(pa.schema([("key", pa.binary()), ("text", pa.string())])).to_pylist() == rows, place
    assert found > len(content) / 3


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"key": pa.array([b"k" * 16], pa.binary())}, "column key is binary, not fixed_size_binary[16]"),
        ({"key": pa.array([b"k" * 16], KEY), "sample": pa.array(["0"])}, "column sample is string, not int32"),
    ],
)
def test_a_column_of_another_type_is_told_though_the_checksum_is_right(store: Store, column: dict[str, pa.Array], said: str):
    shard = store.put_table("completions/shards", pa.table({**column, "quarantined": pa.nulls(1, pa.string())}))
    Ledger(store, "completions").commit([shard])
    with pytest.raises(Corrupt, match=re.escape(said)):
        store.read_table(shard.path)
    assert problems(store.root)[0] == [f"{shard.path}: {said}"]


def test_a_completion_that_was_lost_and_says_the_same_again_may_be_judged_twice(store: Store):
    ledger = Ledger(store, "judgements")
    ledger.commit([store.put_table("judgements/shards", _table(keys)) for keys in (range(3), range(2, 6))])
    assert problems(store.root) == ([], 2)


def test_a_broken_ledger_entry_is_named(store: Store):
    Ledger(store, "completions").commit([])
    Path(store.path("completions/ledger/00000000.json")).write_text("{")
    with pytest.raises(Corrupt, match="00000000"):
        Ledger(store, "completions").shards()


def test_entries_say_what_they_hold(store: Store):
    Ledger(store, "completions").commit([store.put_table("completions/shards", _table(range(3)))])
    entry = json.loads(store.read("completions/ledger/00000000.json"))
    assert entry["shards"][0]["rows"] == 3 and entry["shards"][0]["sha256"]


def test_an_unwritable_root_is_the_users_mistake(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Store(str(tmp_path / "file" / "root")).check_writable()
    with pytest.raises(UserError, match="cannot be opened"):
        Store("nothing://root")


@pytest.mark.parametrize("root", ["memory://files-of-a-root", ""])
def test_files_are_told_with_their_size_and_age(tmp_path: Path, root: str):
    store = Store(root or str(tmp_path))
    store.put("a/b.json", b"{}")
    ((path, size, written),) = store.files("a")
    assert (path, size) == ("a/b.json", 2) and abs(time.time() - written) < 60


def test_a_root_that_writes_over_what_is_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = tasks.store._write_file
    monkeypatch.setattr(tasks.store, "_write_file", lambda action, *file: write("replace" if action == "create" else action, *file))
    with pytest.raises(UserError, match="instead of refusing to"):
        Store(str(tmp_path)).check_writable()
    assert not list(tmp_path.iterdir())


def test_a_second_run_says_that_another_one_is_writing(store: Store):
    first, second = Ledger(store, "completions"), Ledger(store, "completions")
    with first.writing(lease=2.0), pytest.raises(UserError, match="another run is writing"), second.writing(lease=0.1):
        pass
    with Ledger(store, "completions").writing(lease=0.1):
        pass


def test_a_dead_run_is_taken_over_after_its_lease_and_fenced_out(store: Store):
    dead = Ledger(store, "completions")
    dead._lease = 1.0
    dead.commit()
    started = time.monotonic()
    with Ledger(store, "completions").writing(lease=0.1):
        assert 1.0 <= time.monotonic() - started < 5
        with pytest.raises(Conflict, match="another run"):
            dead.commit()


def test_a_lease_that_is_renewed_while_the_ledger_is_read_fences_nobody_out(store: Store, monkeypatch: pytest.MonkeyPatch):
    ledger = Ledger(store, "completions")
    for _ in range(5):
        ledger.commit()
    read = Store.read_json

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.02)
        return read(*arguments)

    monkeypatch.setattr(Store, "read_json", slowly)
    with ledger.writing(lease=0.1):
        until = time.monotonic() + 1
        while time.monotonic() < until:
            ledger.shards()
    assert ledger.read().entries > 10 and ledger.read().ended


def test_a_run_that_is_fenced_out_while_it_has_nothing_to_commit_learns_of_it(store: Store):
    ledger = Ledger(store, "completions")
    with pytest.raises(Conflict), ledger.writing(lease=0.3):
        other = Ledger(store, "completions")
        while True:
            try:
                other.read()
                other.commit()
                break
            except Conflict:
                other = Ledger(store, "completions")
        deadline = time.monotonic() + 10
        while not ledger._fenced:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ledger.commit()


def test_a_ledger_says_the_same_with_and_without_snapshots(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tasks.ledger.SNAPSHOT_ENTRIES", 4)
    first, ledger = Ledger(store, "completions"), Ledger(store, "completions")
    shards = [store.put_table("completions/shards", _table(range(2 * number, 2 * number + 2))) for number in range(21)]
    for number, shard in enumerate(shards):
        (first if number < 10 else ledger).commit([shard], usage=Usage(requests=2))
    ledger.commit(lost=[shards[3].path])
    state = Ledger(store, "completions").read()
    assert state == ledger.read() and list(state.shards.values()) == shards[:3] + shards[4:]
    assert (state.entries, state.made, state.usage.requests) == (22, 42, 42)
    assert (state.last.writer, state.last.made, state.last.usage.requests) == (ledger.writer, 22, 22)
    for snapshot in Path(store.path("completions/ledger")).glob("snapshot-*"):
        snapshot.unlink()
    assert Ledger(store, "completions").read() == state


def test_a_full_disk_is_one_line_that_says_what_to_do(store: Store, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(Down, match="Make room"):
        store.put("a", b"1")
    assert list(Path(store.root).iterdir()) == [], "no part of it is left"


@pytest.mark.parametrize("refusal", [errno.EACCES, errno.EPERM, errno.EROFS], ids=errno.errorcode.get)
def test_what_the_user_may_not_write_is_one_line_too(store: Store, monkeypatch: pytest.MonkeyPatch, refusal: int):
    def refused(*_: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(UserError, match=f"{os.strerror(refusal)}.*the right to write"), Ledger(store, "completions").writing(1.0):
        pass


def test_a_damaged_file_that_nothing_names_is_written_anew(store: Store):
    shard = store.put_table("completions/shards", _table(range(3)))
    Path(store.path(shard.path)).write_bytes(b"half")
    assert store.put_table("completions/shards", _table(range(3))) == shard
    assert store.verify(shard) is None


def test_a_file_that_is_gone_is_told_in_one_line(store: Store):
    with pytest.raises(SpecmillError, match="is gone"):
        store.read_table("completions/shards/nothing.parquet")
