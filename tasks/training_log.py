"""`metrics.jsonl` of a training run: rank 0 writes one line a step, and the driver, who waits for the ranks, shows how far they are.

The same numbers go to TensorBoard, in the folder `tensorboard` beside the file.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

from tasks.progress import Progress, say
from tasks.trackers import Mirror

POLL_SECONDS = 1.0
FILES = ("metrics.jsonl", "tensorboard")
"""What a log is made of, in the working directory of its run."""


class TrainingLog:
    """The metrics that rank 0 writes. Lines of steps that are about to be done again are dropped, and one that a crash cut short."""

    def __init__(self, path: Path, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = path
        self.lines = [line for line in read_lines(path) if line["step"] < steps]
        """The lines of all steps so far."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=steps)

    def append(self, line: dict[str, Any]) -> None:
        """Adds the metrics of a step."""
        self.lines.append(line)
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, line["step"])
        self._board.flush()


def replace_text(path: Path, text: str) -> None:
    """Writes a file by rename: what a crash leaves is the old text or the new one."""
    work = path.with_name(f".{path.name}.new")
    with work.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    work.replace(path)


def last_line(path: Path) -> dict[str, Any]:
    """The metrics of the last step."""
    return read_lines(path)[-1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; none when there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@contextmanager
def followed(path: Path, total: int, progress: Progress, mirror: Mirror) -> Iterator[None]:
    """While inside, shows the lines of `path` as progress towards `total` steps, with the last loss or reward, and each alarm once.

    The mirror gets all lines.
    """
    over, told = threading.Event(), set[str]()
    progress.before = len(read_lines(path))

    def show() -> None:
        lines = read_lines(path)
        if lines:
            name = "reward" if "reward" in lines[-1] else "loss"
            progress(len(lines), total, f"{name} {lines[-1][name]:.3g}")
        mirror.show(lines)
        for line in lines:
            for name, text in line.get("alarms", ()):
                if name not in told:
                    told.add(name)
                    say(f"  {progress.stage:<10} step {line['step']}: {text}")

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
