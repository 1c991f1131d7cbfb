"""The numbered ledger: which shards of a stage count.

A shard counts when an entry names it; entry n is created only if there is no entry n, so there is one writer and a stale one is fenced
out. Nothing is found by listing: readers probe the next number, from the newest snapshot on. A writer that has nothing to commit commits
that; one whose ledger has not moved for its lease is dead, on the clock of whoever waits to take over.
"""

import json
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from cluster.errors import SpecmillError, UserError
from cluster.serving import Usage
from tasks.progress import say
from tasks.store import Conflict, Corrupt, Down, Shard, Store

SNAPSHOT_ENTRIES = 64
"""Snapshot m holds what entries 0 to 64 m - 1 say, and is written before entry 64 m is. Another number is another format."""


@dataclass(frozen=True)
class Entry:
    """What an entry's file holds. `time`: when it was written, in seconds since 1970, for people."""

    version: Literal[1]
    stage: str
    writer: str
    lease: float
    ended: bool
    shards: list[Shard]
    lost: list[str]
    usage: Usage
    time: float


@dataclass(frozen=True)
class Spent:
    """What one writer's `made` rows cost."""

    writer: str = ""
    made: int = 0
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot's file holds: a `State`."""

    entries: int
    shards: list[Shard]
    made: int
    usage: Usage
    writer: str
    ended: bool
    lease: float
    last: Spent = Spent()


ENTRY, SNAPSHOT = TypeAdapter(Entry), TypeAdapter(Snapshot)


@dataclass
class State:
    """What the entries so far say. `made` rows cost `usage`; the last entry is `writer`'s, who has not `ended` and renews its `lease`.

    `last`: the rows of the last writer that made some.
    """

    entries: int = 0
    shards: dict[str, Shard] = field(default_factory=dict)
    made: int = 0
    usage: Usage = field(default_factory=Usage)
    writer: str = ""
    ended: bool = True
    lease: float = 0.0
    last: Spent = Spent()

    def apply(self, entry: dict[str, Any]) -> None:
        """Takes the next entry."""
        named = [Shard(**shard) for shard in entry["shards"]]
        for path in [*entry["lost"], *(shard.path for shard in named)]:
            self.shards.pop(path, None)
        self.shards |= {shard.path: shard for shard in named}
        usage = Usage(**entry["usage"])
        if usage.requests:
            rows = sum(shard.rows for shard in named)
            self.made += rows
            self.usage += usage
            before = self.last if self.last.writer == entry["writer"] else Spent(entry["writer"])
            self.last = Spent(before.writer, before.made + rows, before.usage + usage)
        self.writer, self.ended, self.lease = entry["writer"], entry["ended"], entry["lease"]
        self.entries += 1


class Ledger:
    """The ledger of one stage: `<stage>/ledger/<n>.json`. A completion belongs to the first shard that holds it."""

    def __init__(self, store: Store, stage: str) -> None:
        self.store, self.stage = store, stage
        self.writer = uuid.uuid4().hex
        self._state: State | None = None
        self._lease = 0.0
        self._moved = 0.0
        self._lock = threading.Lock()
        self._fenced: SpecmillError | None = None

    def read(self) -> State:
        """Everything that is committed.

        From here on `commit` continues after the last entry seen: what another run commits meanwhile fences this one out.
        """
        with self._lock:  # the lease is renewed by another thread
            return self._read()

    def _read(self) -> State:
        if self._state is not None:  # entries never change: the last one seen is a better start than a snapshot
            self._catch_up()
            return self._state
        state, snapshot = State(), self._newest_snapshot()
        if snapshot:
            content = self.store.read_json(self._snapshot(snapshot), SNAPSHOT) or {"entries": 0}
            if content["entries"] != snapshot * SNAPSHOT_ENTRIES:
                raise Corrupt(f"{self._snapshot(snapshot)}: entries: it holds {content['entries']}, not {snapshot * SNAPSHOT_ENTRIES}")
            shards = {shard["path"]: Shard(**shard) for shard in content.pop("shards")}
            last = content.get("last", {})
            spent = Spent(**last | {"usage": Usage(**last.get("usage", {}))})
            state = State(**content | {"shards": shards, "usage": Usage(**content["usage"]), "last": spent})
        self._state = state
        self._catch_up()
        return state

    @property
    def state(self) -> State:
        """Everything that was committed when this ledger was last read or written; it is read if it was neither."""
        return self._state or self.read()

    def shards(self) -> list[Shard]:
        """Shards that count: named by an entry, and not declared lost by a later one."""
        return list(self.read().shards.values())

    def commit(self, shards: Iterable[Shard] = (), lost: Iterable[str] = (), usage: Usage | None = None, ended: bool = False) -> None:
        """Appends one entry; `usage` is what its shards cost. Outside of `writing`, the ledger is not claimed for longer than that.

        Raises Conflict when another writer was faster: this one has lost its turn and must stop.
        """
        with self._lock:
            if self._fenced:
                raise self._fenced
            state = self._state or self._read()
            if state.entries and state.entries % SNAPSHOT_ENTRIES == 0:
                content = vars(state) | {"shards": list(map(asdict, state.shards.values()))}
                content |= {"usage": asdict(state.usage), "last": asdict(state.last)}
                self.store.put(self._snapshot(state.entries // SNAPSHOT_ENTRIES), json.dumps(content).encode())
            ends, cost = ended or not self._lease, usage or Usage()
            entry = asdict(Entry(1, self.stage, self.writer, self._lease, ends, list(shards), list(lost), cost, time.time()))
            try:
                self.store.put(self._entry(state.entries), json.dumps(entry, indent=1).encode())
            except Conflict:
                self._fenced = Conflict(
                    f"{self.stage}: another run writes to {self.store.root}; this one stops. Start it again when the other has ended."
                )
                raise self._fenced from None
            state.apply(entry)
            self._moved = time.monotonic()

    @contextmanager
    def writing(self, lease: float) -> Iterator[None]:
        """Claims the ledger for as long as the block runs. Raises UserError when another run that lives has claimed it."""
        state = self.state
        if not state.ended and state.writer != self.writer:
            self._wait_for_death(state, max(lease, state.lease))
        self._lease = lease
        self.commit()
        over = threading.Event()
        renewal = threading.Thread(target=self._renew, args=(over,), daemon=True)
        renewal.start()
        lost = False
        try:
            yield
        except (Conflict, Down):
            lost = True
            raise
        finally:
            over.set()
            renewal.join()
            if not lost and not self._fenced:
                self.commit(ended=True)

    def _wait_for_death(self, state: State, lease: float) -> None:
        say(f"  {self.stage}: an earlier run did not end; waiting {lease:.0f} s to see whether it still lives")
        seen, deadline = state.entries, time.monotonic() + lease
        while time.monotonic() < deadline:
            time.sleep(min(1.0, lease / 10))
            self._catch_up()
            if state.entries > seen:
                raise UserError(
                    f"another run is writing to {self.store.root} ({self.stage}: {seen + 1} entries and more). "
                    "Wait until it has ended, stop it, or choose another root."
                )

    def _renew(self, over: threading.Event) -> None:
        """Commits that there is nothing to commit, three times a lease. What goes wrong is told by the next commit of the run itself."""
        while not over.wait(self._lease / 10):
            if time.monotonic() - self._moved > self._lease / 3:
                try:
                    self.commit()
                except SpecmillError as error:
                    self._fenced = error
                    return
                except Exception as error:
                    self._fenced = SpecmillError(f"{self.stage}: the lease could not be renewed: {type(error).__name__}: {error}")
                    return

    def _catch_up(self) -> None:
        state = self._state or State()
        while (entry := self.store.read_json(self._entry(state.entries), ENTRY)) is not None:
            if entry["stage"] != self.stage:
                raise Corrupt(f"{self._entry(state.entries)}: stage: is an entry of {entry['stage']!r}")
            state.apply(entry)

    def _newest_snapshot(self) -> int:
        """The number of the newest snapshot, 0 if there is none. They have no gaps, so it is found in logarithmically many questions."""
        low, high = 0, 1
        while self.store.exists(self._snapshot(high)):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.store.exists(self._snapshot(middle)) else (low, middle)
        return low

    def _entry(self, number: int) -> str:
        return f"{self.stage}/ledger/{number:08d}.json"

    def _snapshot(self, number: int) -> str:
        return f"{self.stage}/ledger/snapshot-{number:06d}.json"
