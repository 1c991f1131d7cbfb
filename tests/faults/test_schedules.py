"""The commit protocol under thousands of seeded schedules of faults, each of which can be run again; planted bugs must be found.

python tests/faults/test_schedules.py 1234              runs one schedule and prints its trace
python tests/faults/test_schedules.py 1234 BUG_NAME     the same with a bug planted
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from oracle import Oracle
from simulation import SNAPSHOT_ENTRIES, inside
from simulation.run import ROOT, workspace
from simulation.world import DRIFT, LEASE, Crashed, Process, Settings, Stuck, World

import flows.lines
import tasks.complete
import tasks.store
import tasks.wanted
import tasks.work
from cluster.errors import SpecmillError
from flows.inspect import problems
from flows.steps import complete_and_judge_step
from flows.workspace import Workspace
from tasks.keys import completion_key
from tasks.ledger import Ledger, State
from tasks.store import Conflict, Corrupt, Down, File, Shard, Store
from tasks.wanted import Wanted
from tasks.work import Tally

pytestmark = pytest.mark.slow
QUICK = 60


def drive(world: World, oracle: Oracle, process: Process) -> None:
    """One driver from start to end, whichever end that is."""
    try:
        world.note(f"START {process.settings}")
        complete_and_judge_step.fn(workspace(process.settings))
        process.outcome = "done"
        oracle.check_done(process.settings, process.name)
    except Crashed:
        process.outcome = "crashed"
    except KeyboardInterrupt:
        process.outcome = "interrupted"
    except (SpecmillError, FileNotFoundError) as error:  # a shard may be lost at any moment, and the next run sees it
        process.outcome = f"{type(error).__name__}: {error}"
    except Exception as error:
        process.outcome = f"{type(error).__name__}: {error}"
        oracle.blame(f"{process.name} ended with {error!r}, which says nothing to a person")
    process.ended = True
    world.note(f"END {process.name}: {process.outcome}")


def changed(world: World, settings: Settings) -> Settings:
    """The same run, or one in which a person has changed something."""
    rng = world.rng
    editions = tuple((category, edition + (rng.random() < 0.2)) for category, edition in settings.editions)
    change = {
        "n": rng.randint(1, 3), "k": rng.randint(1, 3), "shard_rows": rng.randint(1, 6), "engines": rng.randint(1, 3),
        "overlap": rng.random() < 0.7, "editions": editions,
    }  # fmt: skip
    return replace(settings, **{name: value for name, value in change.items() if rng.random() < 0.4})


def operate(world: World, oracle: Oracle, name: str, settings: Settings, start: float) -> None:
    """A person, or a timer, who starts a driver, and starts it again when it fails."""
    world.wait(start)
    for attempt in range(world.rng.randint(1, 2)):
        rng = world.rng
        process = Process(f"{name}{attempt}", settings, rng.uniform(-900, 900), 1 + rng.uniform(-DRIFT, DRIFT))
        fiber = world.spawn(process, lambda process=process: drive(world, oracle, process))
        while not fiber.done:
            world.wait(float("inf"), lambda fiber=fiber: fiber.done)
        if process.outcome == "done":
            return
        world.wait(rng.choice([0.0, rng.uniform(0, 2 * LEASE)]))


def verified() -> list[str]:
    """What `verify` finds."""
    try:
        return problems(ROOT)[0]
    except SpecmillError as error:
        return [str(error)]


def repair(world: World) -> None:
    """What a person does whom `verify` or an error tells that files are damaged: removes them."""
    for path in sorted(world.damaged):
        if path in world.objects and world.objects[path] != world.pristine[path]:
            world.note(f"repair: remove {path}")
            del world.objects[path]


def schedule(seed: int, storm: str = "") -> World:
    """One history: drivers that start at random times with changing settings, faults, and one last driver that nothing disturbs."""
    world = World(seed, STORMS.get(storm, {}))
    oracle = Oracle(world)
    with inside(world, real_parquet=seed % 100 == 99):
        settings = Settings()
        try:
            for number in range(world.rng.randint(1, 3)):
                settings = changed(world, settings)
                start = world.rng.choice([0.0, world.rng.uniform(0, 5), world.rng.uniform(0, 200)])
                operator = Process("operator", settings, calm=True)
                name = "abcd"[number]
                world.spawn(operator, lambda name=name, settings=settings, start=start: operate(world, oracle, name, settings, start))
            world.run()
            settings = changed(world, settings)
            for attempt in range(6):
                last = Process(f"z{attempt}", settings, calm=True)
                world.spawn(last, lambda last=last: drive(world, oracle, last))
                world.run()
                found = verified()
                if world.violations or (last.outcome == "done" and not found):
                    break
                repair(world)
            else:
                oracle.blame(f"undisturbed runs do not come to an end: {last.outcome}; verify finds {found}")
            if not world.violations:
                oracle.check_end(settings)
        except Stuck as error:
            oracle.blame(f"stuck: {error}")
    return world


def _create_over(store: Store, action: str, path: str, content: bytes = b"") -> None:
    REAL_WRITE(store, "replace" if action == "create" else action, path, content)


def _file(path: str, content: bytes) -> File:
    return File(path, len(content), hashlib.sha256(content).hexdigest())


def _put_unread(store: Store, path: str, content: bytes) -> File:
    """Takes any file of the name for its own."""
    with suppress(FileExistsError):
        store._write("create", path, content)
    return _file(path, content)


def _read_unchecked(store: Store, path: str, columns: list[str] | None = None) -> pa.Table:
    try:
        return tasks.store.pq.ParquetFile(io.BytesIO(store.read(path))).read(columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise Corrupt(path) from error


def _listed(ledger: Ledger) -> None:
    """Applies what a listing shows, and goes on behind it."""
    state = ledger._state or State()
    for path in ledger.store.glob(f"{ledger.stage}/ledger/0*.json"):
        number = int(path[-13:-5])
        if number >= state.entries:
            state.apply(ledger.store.read_json(path))
            state.entries = number + 1


def _listed_shards(ledger: Ledger) -> list[Shard]:
    """All files of the folder count."""
    ledger.read()
    found = []
    for path in ledger.store.glob(f"{ledger.stage}/shards/*.parquet"):
        found.append(ledger._state.shards.get(path) or Shard(path, 0, "", 0, 0))
    return found


def _put_table_later(store: Store, folder: str, table: pa.Table) -> Shard:
    """Says that it has written a shard, and writes it after the next entry."""
    kept: list[tuple[str, bytes]] = []
    with patch.object(Store, "put", lambda store, path, content: kept.append((path, content)) or _file(path, content)):
        shard = REAL_PUT_TABLE(store, folder, table)
    LATE.extend(kept)
    return shard


def _commit_then_write(ledger: Ledger, *args: Any, **options: Any) -> None:
    REAL_COMMIT(ledger, *args, **options)
    while LATE:
        ledger.store.put(*LATE.pop())


def _skip_a_number(ledger: Ledger, *args: Any, **options: Any) -> None:
    REAL_COMMIT(ledger, *args, **options)
    ledger._state.entries += bool(args and args[0] and ledger._state.entries == 5)


def _snapshot_too_late(ledger: Ledger, *args: Any, **options: Any) -> None:
    """Writes a snapshot behind the entry that it should precede, which makes it hold that entry too."""
    with patch("tasks.ledger.SNAPSHOT_ENTRIES", 10**6):
        REAL_COMMIT(ledger, *args, **options)
    state = ledger._state
    if state.entries % SNAPSHOT_ENTRIES == 1 and state.entries > 1:
        content = asdict(state) | {"shards": [asdict(shard) for shard in state.shards.values()], "entries": state.entries - 1}
        ledger.store.put(ledger._snapshot(state.entries // SNAPSHOT_ENTRIES), json.dumps(content).encode())


def _write_on(ledger: Ledger, *args: Any, **options: Any) -> None:
    """Takes the next free number when its own is taken."""
    while True:
        try:
            return REAL_COMMIT(ledger, *args, **options)
        except Conflict:
            ledger._fenced = None
            ledger._catch_up()


@contextmanager
def _look_again(ledger: Ledger, lease: float) -> Iterator[None]:
    """Claims the ledger behind what others committed since this run made its plan."""
    ledger.read()
    with REAL_WRITING(ledger, lease):
        yield


def _commit_if_it_works(tally: Tally) -> None:
    """Counts what could not be committed as done."""
    try:
        REAL_TALLY(tally)
    except (Conflict, Down):
        tally._waiting, tally.lost = [], []


def _commit_again(tally: Tally) -> None:
    """Keeps what it has committed, for the next time."""
    waiting = list(tally._waiting)
    REAL_TALLY(tally)
    tally._waiting = waiting if waiting and len(waiting) < 3 else tally._waiting


def _verdicts_first(tallies: Iterable[Tally]) -> None:
    for tally in list(tallies):
        tally.commit()


def _keep_lost(state: State, entry: dict[str, Any]) -> None:
    REAL_APPLY(state, entry | {"lost": []})


def _forget_lost(run: Workspace, *ledgers: Ledger) -> tuple[Wanted, tuple[list[str], list[str]]]:
    return REAL_SURVEY(run, *ledgers)[0], ([], [])


def _first_counts(wanted: Wanted, store: Store, shards: Sequence[Shard], judge_hash: str) -> list[str]:
    return REAL_MARK(wanted, store, list(reversed(shards)), judge_hash)


def _renew_unlocked(ledger: Ledger, over: Any) -> None:
    """Renews beside the commits of the run itself."""
    while not over.wait(ledger._lease / 10):
        with suppress(SpecmillError):
            ledger._lock, lock = nullcontext(), ledger._lock
            ledger.commit()
            ledger._lock = lock


REAL_WRITE, REAL_PUT_TABLE, REAL_COMMIT, REAL_WRITING = Store._write, Store.put_table, Ledger.commit, Ledger.writing
REAL_TALLY, REAL_APPLY, REAL_SURVEY, REAL_MARK = Tally.commit, State.apply, flows.lines.survey, Wanted.mark_judgements
REAL_WAIT = Ledger._wait_for_death
LATE: list[tuple[str, bytes]] = []

Change = tuple[Any, str, Any]
BUGS: dict[str, list[Change]] = {
    "unconditional_put": [(Store, "_write", _create_over)],
    "put_without_reading_back": [(Store, "put", _put_unread)],
    "no_checksum_on_read": [(Store, "read_table", _read_unchecked)],
    "no_checksum_anywhere": [
        (Store, "read_table", _read_unchecked),
        (Store, "verify", lambda store, file: None if store.exists(file.path) else f"{file.path}: missing"),
    ],
    "entries_by_listing": [
        (Ledger, "_catch_up", _listed),
        (Ledger, "_newest_snapshot", lambda ledger: 0),
        (Store, "_write", _create_over),
    ],
    "shards_by_listing": [(Ledger, "shards", _listed_shards)],
    "entry_before_its_shard": [(Store, "put_table", _put_table_later), (Ledger, "commit", _commit_then_write)],
    "key_without_spec": [
        (tasks.complete, "completion_key", lambda prefix, prompt, sample: completion_key("", prompt, sample)),
        (tasks.wanted, "completion_key", lambda prefix, prompt, sample: completion_key("", prompt, sample)),
    ],
    "key_without_sample": [
        (tasks.complete, "completion_key", lambda prefix, prompt, sample: completion_key(prefix, prompt, min(sample, 1))),
        (tasks.wanted, "completion_key", lambda prefix, prompt, sample: completion_key(prefix, prompt, min(sample, 1))),
    ],
    "number_skipped": [(Ledger, "commit", _skip_a_number)],
    "snapshot_behind_its_entry": [(Ledger, "commit", _snapshot_too_late)],
    "no_fencing": [(Ledger, "commit", _write_on)],
    "takeover_without_waiting": [(Ledger, "_wait_for_death", lambda ledger, state, lease: None)],
    "takeover_after_half_a_lease": [(Ledger, "_wait_for_death", lambda ledger, state, lease: REAL_WAIT(ledger, state, lease / 2))],
    "claim_behind_a_second_look": [(Ledger, "writing", _look_again)],
    "lease_never_renewed": [(Ledger, "_renew", lambda ledger, over: None)],
    "renewal_without_the_lock": [(Ledger, "_renew", _renew_unlocked)],
    "lost_shards_ignored": [(flows.lines, "survey", _forget_lost)],
    "lost_shards_count_again": [(State, "apply", _keep_lost)],
    "failed_commit_counted": [(Tally, "commit", _commit_if_it_works)],
    "shard_committed_twice": [(Tally, "commit", _commit_again)],
    "verdicts_before_their_completions": [(tasks.work, "commit_all", _verdicts_first)],
    "first_judgement_counts": [(Wanted, "mark_judgements", _first_counts)],
    "judgement_without_content": [(tasks.wanted, "_beginnings", lambda column: np.ones(len(column), np.uint64))],
    "first_shard_not_seen": [(Wanted, "made", property(lambda wanted: wanted.shard > 0))],
}
STORMS = {
    "no_checksum_on_read": {"damage_shard": 0.05},
    "no_checksum_anywhere": {"damage_shard": 0.05},
    "failed_commit_counted": {"pause": 0.2},
    "judgement_without_content": {"lose_shard": 0.03},
    "first_judgement_counts": {"lose_shard": 0.03},
    "verdicts_before_their_completions": {"crash": 0.1},
}
"""Bug -> the faults that it takes, more of them than the weather brings."""
SHOWN = {
    "unconditional_put": 9,
    "put_without_reading_back": 9,
    "no_checksum_on_read": 33,
    "no_fencing": 9,
    "claim_behind_a_second_look": 41,
    "lease_never_renewed": 62,
    "failed_commit_counted": 8,
    "judgement_without_content": 12,
}
"""Bug -> the first schedule that showed it, where it is not one of the first."""


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """Runs with a bug in the real code."""
    LATE.clear()
    with ExitStack() as stack:
        for target, name, value in BUGS.get(bug, []):
            stack.enter_context(patch.object(target, name, value))
        yield
    LATE.clear()


def report(world: World, arguments: str = "") -> str:
    """What went wrong, how to see it again, and what happened."""
    again = f"again: python tests/faults/test_schedules.py {world.seed} {arguments}".rstrip()
    return "\n".join(["", *world.trace, str(world.weather), *world.violations, again])


def check(seeds: range, storm: str = "") -> None:
    """Fails at the first schedule in which a promise is broken."""
    for seed in seeds:
        world = schedule(seed, storm)
        if world.violations:
            pytest.fail(report(world, f"none {storm}" if storm else ""), pytrace=False)


def schedule_that_shows(bug: str, seeds: range) -> int | None:
    """The first schedule in which a planted bug shows."""
    with planted(bug):
        return next((seed for seed in seeds if schedule(seed, bug).violations), None)


def test_one_seed_is_one_history() -> None:
    assert schedule(7).trace == schedule(7).trace


def test_promises_hold_under_seeded_faults() -> None:
    check(range(QUICK))


@pytest.mark.parametrize("storm", STORMS)
def test_promises_hold_in_a_storm(storm: str) -> None:
    check(range(3), storm)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    """From a schedule on that is known to show it: where the way of the real code has changed, another one soon will."""
    first = SHOWN.get(bug, 0)
    assert schedule_that_shows(bug, range(first, first + 200)) is not None


@pytest.mark.soak
@pytest.mark.parametrize("bug", BUGS)
def test_every_planted_bug_is_found(bug: str) -> None:
    found = schedule_that_shows(bug, range(2000))
    assert found is not None, f"{bug} does not show in 2,000 schedules"
    print(f"{bug}: schedule {found}")


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, 10_000, 500))
def test_promises_hold_in_ten_thousand_schedules(first: int) -> None:
    check(range(first, first + 500))


if __name__ == "__main__":
    seed, bug, storm = [*sys.argv[1:], "none", ""][:3] if len(sys.argv) == 2 else [*sys.argv[1:], ""][:3]
    with planted(bug):
        print(report(schedule(int(seed), storm or bug), " ".join(sys.argv[2:])))
