"""On the path of every Python process of a kill test: each durable write has a window before and one after it, where something is killed.

The folder that SPECMILL_WINDOWS names says what: files of `todo` are windows that have not been struck yet, `target` is what is killed
there, `driver`, `node` and `actors/` hold process ids. Windows that were passed are noted in `seen`, those that were struck in `done`.
"""

import importlib.abc
import importlib.util
import os
import re
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["SPECMILL_WINDOWS"])


def site(path):
    """What kind of file is written: numbers and hashes are left out."""
    if path.startswith(".probe"):
        return "probe"
    stage, _, rest = path.partition("/")
    for pattern, kind in (
        ("ledger/snapshot-", "snapshot"), ("ledger/", "entry"), ("shards/", "shard"), ("manifest.json", "manifest"),
        ("README.md", "card"), ("/(parts|data|audit|capability|quarantined)/", ""),
    ):  # fmt: skip
        found = re.search(pattern, rest)
        if found:
            return f"{stage} {kind or found.group(1)}"
    raise AssertionError(f"a kind of file that this test does not know: {path}")


def window(name):
    (FOLDER / "seen" / name).touch()
    try:
        os.rename(FOLDER / "todo" / name, FOLDER / "done" / name)
    except FileNotFoundError:
        return
    strike((FOLDER / "target").read_text())


def strike(target):
    if target == "engine":
        (FOLDER / "engine dies").touch()
        return
    if target == "child":
        for actor in sorted((FOLDER / "actors").iterdir()):
            for child in children(actor.name):
                os.kill(child, signal.SIGKILL)
                return
        raise AssertionError("no engine runs as a child of its actor")
    if target == "actor":
        mine = FOLDER / "actors" / str(os.getpid())
        victims = [mine] if mine.exists() else sorted((FOLDER / "actors").iterdir())
        for victim in victims:
            victim.unlink(missing_ok=True)
            try:
                os.kill(int(victim.name), signal.SIGKILL)
                return
            except ProcessLookupError:
                continue
        return
    deadline = time.monotonic() + 30
    while True:
        try:
            os.kill(int((FOLDER / target).read_text()), signal.SIGKILL)
            break
        except ProcessLookupError:  # the node that was killed before has no successor yet
            assert time.monotonic() < deadline
            time.sleep(0.2)
    time.sleep(1 if target == "driver" else 0)


def children(parent):
    """Process ids of the children of a process, if it lives."""
    try:
        return [int(child) for task in Path(f"/proc/{parent}/task").iterdir() for child in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


def patch_store(module):
    write = module.Store._write

    def stopping(self, action, path, content=b""):
        window(f"before {action} {site(path)}")
        write(self, action, path, content)
        window(f"after {action} {site(path)}")

    module.Store._write = stopping
    if sys.argv[0].endswith("default_worker.py"):
        (FOLDER / "actors" / str(os.getpid())).touch()


def patch_engine(module):
    complete = module.FakeEngine.complete

    async def mortal(self, *arguments):
        try:
            (FOLDER / "engine dies").unlink()
        except FileNotFoundError:
            return await complete(self, *arguments)
        raise module.EngineDied("its process was killed")

    module.FakeEngine.complete = mortal


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
