"""On the path of every Python process of a kill test: each durable write has a window before and one after it, where something is killed.

The folder that SPECMILL_WINDOWS names says what: files of `todo` are windows that have not been struck yet, `target` is what is killed
there, `driver`, `node` and `actors/` hold process ids. Windows that were passed are noted in `seen`, those that were struck in `done`,
what died in `killed`; `deaths` wait for an engine.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

FOLDER = Path(os.environ["SPECMILL_WINDOWS"])


def site(path):
    """What kind of file is written: numbers, names and hashes are left out."""
    if path.startswith(".probe"):
        return "probe"
    stage, _, rest = path.partition("/")
    for part, kind in (LEDGER | KINDS.get(stage, {})).items():
        if part in rest:
            return f"{stage} {kind}"
    raise AssertionError(f"a kind of file that this test does not know: {path}")


LEDGER = {"ledger/snapshot-": "snapshot", "ledger/": "entry"}
DATA = {".parquet": "shard"}
KINDS = {
    "prompts": {"/parts/": "part", "/capability/": "capability", "/quarantined/": "quarantined", "manifest.json": "manifest"},
    "completions": DATA,
    "judgements": DATA,
    "datasets": {f"/{view}/": view for view in ("data", "spare", "preferences", "audit")} | {"README": "card", "manifest.json": "manifest"},
    "rows": DATA,
    "rollouts": DATA,
    "tombstones": DATA,
    "checkpoints": {"manifest.json": "manifest"},
    "evaluations": DATA | {"manifest.json": "manifest"},
    "runs": {".png": "plot", "sweep-": "sweep", "report.md": "report", "manifest.json": "manifest"},
}
"""First folder -> part of a path below it -> what kind of file that is. `rows` is where a checkpoint is trained."""


def window(name):
    (FOLDER / "seen" / name).touch()
    target = (FOLDER / "target").read_text()
    if target in ("actor", "child") and not any(any((FOLDER / kind).iterdir()) for kind in ("actors", "killed")):
        return  # there is none yet: the window is struck when it is passed again
    try:
        os.rename(FOLDER / "todo" / name, FOLDER / "done" / name)
    except FileNotFoundError:
        return
    strike(target)


def strike(target):
    if target == "engine":
        (FOLDER / "deaths" / uuid.uuid4().hex).touch()
        return
    if target == "self":
        os.kill(os.getpid(), signal.SIGKILL)
    if target == "child":
        for actor in sorted((FOLDER / "actors").iterdir()):
            for child in children(actor.name):
                kill(child)
                return
        raise AssertionError("no engine runs as a child of its actor")
    if target == "actor":
        mine = FOLDER / "actors" / str(os.getpid())
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for victim in [mine] if mine.exists() else sorted((FOLDER / "actors").iterdir()):
                victim.unlink(missing_ok=True)
                try:
                    kill(int(victim.name))
                    return
                except ProcessLookupError:
                    continue
            time.sleep(0.2)  # those that were killed before have no successors yet
        raise AssertionError("no actor is left")
    deadline = time.monotonic() + 30
    while True:
        try:
            kill(int((FOLDER / ("node" if target == "machine" else target)).read_text()))
            break
        except ProcessLookupError:  # the node that was killed before has no successor yet
            assert time.monotonic() < deadline
            time.sleep(0.2)
    if target == "machine":  # whatever ran there ends at the same time, before Ray notices the death of the node
        for actor in sorted((FOLDER / "actors").iterdir(), key=lambda actor: actor.name == str(os.getpid())):
            actor.unlink()
            with suppress(ProcessLookupError):
                os.kill(int(actor.name), signal.SIGKILL)
    time.sleep(1 if target == "driver" else 0)


def kill(process):
    """Kills a process and counts it. Raises ProcessLookupError when it is gone already."""
    os.kill(process, 0)
    (FOLDER / "killed" / uuid.uuid4().hex).touch()
    os.kill(process, signal.SIGKILL)


def children(parent):
    """Process ids of the children of a process, if it lives."""
    try:
        return [int(child) for task in Path(f"/proc/{parent}/task").iterdir() for child in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


def patch_store(module):
    write = module.Store._write

    def stopping(self, action, path, *rest, **named):
        window(f"before {action} {site(path)}")
        write(self, action, path, *rest, **named)
        window(f"after {action} {site(path)}")

    module.Store._write = stopping
    if sys.argv[0].endswith("default_worker.py"):
        (FOLDER / "actors" / str(os.getpid())).touch()


def patch_engine(module):
    complete = module.FakeEngine.complete

    async def mortal(self, *arguments):
        for death in (FOLDER / "deaths").iterdir():
            try:
                death.rename(FOLDER / "killed" / death.name)
            except FileNotFoundError:  # another engine's
                continue
            raise module.EngineDied("its process was killed")
        return await complete(self, *arguments)

    async def load_weights(self, path, version):
        """These answers are no model's."""

    module.FakeEngine.complete, module.FakeEngine.load_weights = mortal, load_weights


class Patches(importlib.abc.MetaPathFinder):
    """Changes modules right after they are loaded."""

    def __init__(self):
        self.patches = {"tasks.store": patch_store, "cluster.fake_engine": patch_engine}

    def find_spec(self, name, path=None, target=None):
        patch = self.patches.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_patch(module):
            load(module)
            patch(module)

        spec.loader.exec_module = load_and_patch
        return spec


sys.meta_path.insert(0, Patches())
