"""What every engine needs around it: bounded retries, a watchdog for engines that stopped answering, and a meter.

Stages talk to a `Metered` engine, one per shard. It adds up what the shard cost.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

from cluster.chat import Turn
from cluster.engine import Busy, Completion, Engine, EngineConfig, EngineDied, Sampling, Unavailable
from cluster.errors import SpecmillError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first and the last retry of a request that was not answered; each pause is drawn below its bound (full jitter)."""


@dataclass
class Usage:
    """What requests cost. `busy_seconds`: time in which the engine had something to do, counted for one shard only; `cost`: money."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    busy_seconds: float = 0.0
    cost: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def scaled(self, share: float) -> "Usage":
        """What so much of it costs."""
        counts = {field.name: round(getattr(self, field.name) * share) for field in fields(self)}
        return Usage(**counts | {"busy_seconds": self.busy_seconds * share, "cost": self.cost * share})


class NotAnswered(ValueError):
    """A request that was given up: the row is quarantined, the rest goes on."""


class Served:
    """An engine that is watched. Raises EngineDied in all requests when none was answered for `stuck_seconds`."""

    def __init__(self, engine: Engine, config: EngineConfig) -> None:
        self.engine, self.config = engine, config
        self._in_flight = 0
        self._busy_since = self._answered_at = self._given_at = 0.0
        self._busy = 0.0

    async def complete(self, turns: Sequence[Turn], sampling: Sampling, usage: Usage) -> Completion:
        """Draws one completion, trying again where no answer came. Raises NotAnswered, ValueError for a refusal, and EngineDied.

        A busy server is no fault of a request and counts as no attempt. After `request_seconds` the request is given up if others were
        answered meanwhile; if none was, the run ends (SpecmillError).
        """
        asked, failed, tries = time.monotonic(), 0, 0
        while True:
            try:
                answer = await self._watched(turns, sampling)
            except Busy as error:
                reason, pause = str(error), error.pause
                if time.monotonic() - asked >= self.config.request_seconds:
                    told = f"{reason}, and has been for {self.config.request_seconds:g} s"
                    raise (NotAnswered(told) if self._given_at > asked else SpecmillError(f"{told}. What is made is kept.")) from None
            except Unavailable as error:
                reason, pause, failed = str(error), 0.0, failed + 1
            else:
                self._given_at = time.monotonic()
                self._count(answer, usage)
                return answer
            if failed >= self.config.attempts:
                raise NotAnswered(f"no answer in {self.config.attempts} attempts; the last: {reason}")
            tries += 1
            usage.retries += 1
            await asyncio.sleep(pause + random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10))))

    def _count(self, answer: Completion, usage: Usage) -> None:
        tokens = answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens
        usage.requests += 1
        usage.prompt_tokens += tokens[0]
        usage.cached_tokens += tokens[1]
        usage.completion_tokens += tokens[2]
        usage.cost += self.config.remote.cost(*tokens) if self.config.remote else 0.0

    def busy_seconds(self) -> float:
        """Time with something to do since the last call."""
        now = time.monotonic()
        busy = self._busy + (now - self._busy_since if self._in_flight else 0.0)
        self._busy, self._busy_since = 0.0, now
        return busy

    async def _watched(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
        started = time.monotonic()
        if not self._in_flight:
            self._busy_since = self._answered_at = started
        self._in_flight += 1
        work = asyncio.ensure_future(self.engine.complete(turns, sampling))
        try:
            while not (await asyncio.wait({work}, timeout=self._patience(started)))[0]:
                now = time.monotonic()
                if now - self._answered_at >= self.config.stuck_seconds:
                    raise EngineDied(f"no request was answered for {self.config.stuck_seconds:g} s")
                if now - started >= self.config.request_seconds:
                    raise Unavailable(f"not answered in {self.config.request_seconds:g} s")
            return work.result()
        finally:
            work.cancel()
            self._in_flight -= 1
            now = time.monotonic()
            self._answered_at = now if work.done() and not work.cancelled() else self._answered_at
            if not self._in_flight:
                self._busy += now - self._busy_since

    def _patience(self, started: float) -> float:
        """Seconds until there is something to decide."""
        now = time.monotonic()
        return max(0.01, min(started + self.config.request_seconds, self._answered_at + self.config.stuck_seconds) - now)


class Metered:
    """The engine as one shard sees it."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.usage = Usage()

    async def complete(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
        """Draws one completion; see `Engine.complete`."""
        return await self._served.complete(turns, sampling, self.usage)
