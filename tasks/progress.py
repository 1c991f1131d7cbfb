"""Progress of long work, for a person: lines in the terminal and a progress artifact in Prefect.

Prefect is imported late: it reads its settings from the environment as it is imported, and the command `specmill` makes them from the
run file, whose types come from modules that show progress.
"""

import sys
import time
from types import TracebackType
from typing import Any

EVERY_SECONDS = 3.0


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Counts units of one stage; a context manager. Call it with (done, total)."""

    def __init__(self, stage: str, unit: str) -> None:
        self.stage, self.unit = stage, unit
        self._started = self._shown = time.monotonic()
        self._last = (0, 0)
        self._artifact: Any = None

    def __enter__(self) -> "Progress":
        from prefect.artifacts import create_progress_artifact
        from prefect.context import get_run_context
        from prefect.exceptions import MissingContextError

        try:
            get_run_context()
            self._artifact = create_progress_artifact(0.0, key=self.stage, description=f"{self.stage}: {self.unit}")
        except MissingContextError:
            self._artifact = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._last[1] and kind is None:
            self._show(*self._last)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self._last = (done, total)
        now = time.monotonic()
        if now - self._shown >= EVERY_SECONDS and done < total:
            self._shown = now
            self._show(done, total, note)

    def _show(self, done: int, total: int, note: str = "") -> None:
        seconds = max(1e-9, time.monotonic() - self._started)
        rate = done / seconds
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else f", {seconds:.0f} s"
        say(f"  {self.stage:<10} {done}/{total} {self.unit} ({rate:.1f}/s{left}){' ' + note if note else ''}")
        if self._artifact:
            from prefect.artifacts import update_progress_artifact

            update_progress_artifact(self._artifact, 100.0 * done / max(1, total))
