"""Progress of long work, for a person: lines in the terminal and a progress artifact in Prefect.

Prefect is imported late: it reads its settings from the environment as it is imported, and the command `specmill` makes them from the
run file, whose types come from modules that show progress.
"""

import re
import sys
import time
from contextlib import suppress
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
        self.before = 0
        """Units that an earlier run made; they say nothing about this one's speed."""
        self._last = (0, 0, "")
        self._moved = self._started
        self._artifact: Any = None

    def __enter__(self) -> "Progress":
        from prefect.artifacts import create_progress_artifact
        from prefect.context import get_run_context
        from prefect.exceptions import MissingContextError

        try:
            get_run_context()
            self._artifact = create_progress_artifact(
                0.0, key=re.sub(r"[^a-z0-9-]+", "-", self.stage.lower()), description=f"{self.stage}: {self.unit}"
            )
        except MissingContextError:
            self._artifact = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:  # all is done, though it may have taken fewer units than were foreseen
            if self._last[1]:
                self._show(*self._last, over=True)
            self._tell_prefect(100.0)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if (done, total, note) == self._last:
            return
        self._last = (done, total, note)
        self._moved = time.monotonic()
        if self._moved - self._shown >= EVERY_SECONDS and done < total:
            self._shown = self._moved
            self._show(done, total, note)

    def _show(self, done: int, total: int, note: str, over: bool = False) -> None:
        seconds = max(1e-9, self._moved - self._started)
        made = max(0, done - self.before)
        left = f", {(total - done) * seconds / made:.0f} s left" if made and done < total and not over else f", {seconds:.0f} s"
        say(f"  {self.stage:<10} {done}/{total} {self.unit} ({made / seconds:.2g}/s{left}){' ' + note if note else ''}")
        self._tell_prefect(100.0 * done / max(1, total))

    def _tell_prefect(self, percent: float) -> None:
        """A server that does not answer for a moment is no reason to lose work: the next call tells it."""
        if self._artifact:
            from httpx import HTTPError
            from prefect.artifacts import update_progress_artifact

            with suppress(HTTPError):
                update_progress_artifact(self._artifact, percent)
