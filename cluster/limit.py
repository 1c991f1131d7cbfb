"""How many requests a server is sent at a time: as many as it takes without pushing back, found out by trying.

Additive increase, multiplicative decrease. Until the server pushes back for the first time, the limit grows by one with every answer, later
by one with every round. It is halved, once in a round, when the server is busy or its answers are queueing.
"""

import asyncio
import statistics
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

FIRST = 4
"""Requests that are sent at a time before anything is known."""
WINDOW = 8
"""Answers, at least, whose median time is compared."""
QUEUEING = 3.0
"""Answers that take so many times as long as the fastest did are queueing. A server that works in batches takes somewhat longer for more
requests and still gets more done; where the time grows with the number of requests, more of them only wait."""
FORGET = 1.02
"""Growth, per window, of the time that counts as fastest: a server that has become slower for good is not waited for."""


class Limit:
    """Admits up to `allowed` requests at a time, between 1 and `highest`. For one event loop."""

    def __init__(self, highest: int) -> None:
        self.highest = highest
        self.allowed = float(min(FIRST, highest))
        self.in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._pushed_back = False
        self._reduced_at = self._closed_until = 0.0
        self._recent: defaultdict[int, list[float]] = defaultdict(list)
        self._fastest: dict[int, float] = {}

    @asynccontextmanager
    async def room(self) -> AsyncIterator[float]:
        """Waits until a request may be sent, and for the end of a pause; gives the monotonic time at which it is."""
        while self.in_flight >= int(self.allowed):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                self._wake()
                raise
        self.in_flight += 1
        try:
            while (pause := self._closed_until - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            yield time.monotonic()
        finally:
            self.in_flight -= 1
            self._wake()

    def answered(self, sent: float, kind: int, tokens: int) -> None:
        """Notes an answer of some tokens to a request sent at `sent`. Only requests of one `kind` are compared with each other."""
        recent = self._recent[kind]
        recent.append((time.monotonic() - sent) / max(tokens, 1))
        if len(recent) >= max(WINDOW, int(self.allowed)):
            usual = statistics.median(recent)
            recent.clear()
            self._fastest[kind] = min(usual, FORGET * self._fastest.get(kind, usual))
            if usual > QUEUEING * self._fastest[kind]:
                self._reduce(sent)
                return
        if self._waiting:
            self.allowed = min(float(self.highest), self.allowed + (1 / self.allowed if self._pushed_back else 1))

    def pushed_back(self, sent: float, pause: float = 0.0) -> None:
        """Notes that the server was too busy for a request sent at `sent`; nothing is sent for `pause` seconds."""
        self._closed_until = max(self._closed_until, time.monotonic() + pause)
        self._reduce(sent)

    def _reduce(self, sent: float) -> None:
        if sent >= self._reduced_at:
            self.allowed = max(1.0, self.allowed / 2)
            self._pushed_back, self._reduced_at = True, time.monotonic()
            self._recent.clear()

    def _wake(self) -> None:
        free = int(self.allowed) - self.in_flight
        while free > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1
