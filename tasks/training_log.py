"""`metrics.jsonl` of a training run: rank 0 writes one line a step, and the driver, who waits for the ranks, shows how far they are."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

from tasks.progress import Progress

POLL_SECONDS = 1.0


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Adds the metrics of a step."""
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def keep_lines(path: Path, steps: int) -> None:
    """Drops the lines of steps that are about to be done again, and a line that a crash cut short."""
    if path.exists():
        path.write_text("".join(json.dumps(line) + "\n" for line in _lines(path) if line["step"] < steps))


def last_line(path: Path) -> dict[str, Any]:
    """The metrics of the last step."""
    return _lines(path)[-1]


@contextmanager
def followed(path: Path, total: int, progress: Progress) -> Iterator[None]:
    """While inside, shows the lines of `path` as progress towards `total` steps, with the last step's loss or reward."""
    over = threading.Event()
    progress.before = len(_lines(path)) if path.exists() else 0

    def show() -> None:
        lines = _lines(path) if path.exists() else []
        if lines:
            name = "reward" if "reward" in lines[-1] else "loss"
            progress(len(lines), total, f"{name} {lines[-1][name]:.3g}")

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            show()

    # The context holds Prefect's run, to which the progress artifact belongs.
    thread = threading.Thread(target=copy_context().run, args=(watch,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    show()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
