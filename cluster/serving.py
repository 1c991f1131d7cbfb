"""What every engine needs around it: bounded retries, a watchdog for engines that stopped answering, and a meter.

Stages talk to a `Metered` engine, one per shard. It adds up what the shard cost.
"""

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

from cluster.chat import Turn
from cluster.engine import Busy, Completion, Engine, EngineConfig, EngineDied, Sampling, Unavailable
from cluster.errors import SpecmillError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first and the last retry of a request that was not answered; each pause is drawn below its bound (full jitter)."""
ONE_WORD = (Turn(role="user", content="Hello."),)
"""What an engine is asked that may answer nobody."""


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
        self._silent_at = self._refused_at = -math.inf
        self._busy = 0.0
        self._doubt = asyncio.Lock()
        # An endpoint's client keeps the time itself, from when it sends a request: it holds back what is too much for the server.
        self._longest = math.inf if config.remote else config.request_seconds

    async def complete(self, turns: Sequence[Turn], sampling: Sampling, usage: Usage) -> Completion:
        """Draws one completion, trying again where no answer came. Raises NotAnswered, ValueError for a refusal, and EngineDied.

        A request is given up after `attempts` attempts without an answer, or when the server has been too busy for it for
        `request_seconds`, which counts as no attempt; but only if the engine answers others meanwhile. An engine that answers nobody for
        so long, or refuses everybody from some moment on, ends the run (SpecmillError): what is wrong is not the rows.
        """
        since, failed, tries, lives = 0.0, 0, 0, False
        while True:
            asked = time.monotonic()
            try:
                answer = await self._watched(turns, sampling)
            except (Unavailable, MemoryError) as error:
                now, busy = time.monotonic(), isinstance(error, Busy)
                since, failed = since or now, failed + (not busy)
                reason, over = str(error) or "out of memory", now - since >= self.config.request_seconds
                others, spent = self._given_at > (since if busy else asked), failed >= self.config.attempts
                if (spent or (busy and over)) and (lives or others):
                    raise NotAnswered(f"no answer in {tries + 1} attempts; the last: {reason}") from None
                if (spent or over) and not others:
                    lives = await self._answers(sampling, usage, asked)
                    failed = failed if lives else 0  # they were the engine's fault
                    if over and not lives:
                        told = f"{reason}, and nobody has been answered for {self.config.request_seconds:g} s"
                        raise SpecmillError(f"{told}. What is made is kept.") from None
                pause = error.pause if isinstance(error, Busy) else 0.0
            except ValueError as error:
                if await self._refuses_all(sampling, usage, asked):
                    raise SpecmillError(f"{error}. A request of one word is not answered either. What is made is kept.") from None
                raise
            else:
                self._given_at = time.monotonic()
                self._count(answer, usage)
                return answer
            tries += 1
            usage.retries += 1
            await asyncio.sleep(pause + random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10))))

    async def _answers(self, sampling: Sampling, usage: Usage, since: float) -> bool:
        """Whether the engine has answered anybody since then; if it has not, it is asked for one word."""
        async with self._doubt:
            if self._given_at <= since and time.monotonic() - self._silent_at > LONGEST_PAUSE:
                try:
                    self._count(await self._watched(ONE_WORD, sampling), usage)
                    self._given_at = time.monotonic()
                except (Unavailable, MemoryError):
                    self._silent_at = time.monotonic()
                except ValueError:
                    self._silent_at = self._refused_at = time.monotonic()
            return self._given_at > since

    async def _refuses_all(self, sampling: Sampling, usage: Usage, asked: float) -> bool:
        """Whether what was asked then and refused now is not to blame: from now on the engine refuses one word, too, or answers nobody.

        An engine of our own begins at once, or never: of it, an answer shortly before says as much.
        """
        now = time.monotonic()
        since = now if self.config.remote else asked - LONGEST_PAUSE
        while time.monotonic() - now <= self.config.request_seconds:
            answers = await self._answers(sampling, usage, since)
            if self._refused_at > now - LONGEST_PAUSE:
                return True
            if answers:
                return False
            await asyncio.sleep(LONGEST_PAUSE)
        return True

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
                if now - started >= self._longest:
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
        return max(0.01, min(started + self._longest, self._answered_at + self.config.stuck_seconds) - now)


class Metered:
    """The engine as one shard sees it."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.usage = Usage()

    async def complete(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
        """Draws one completion; see `Engine.complete`."""
        return await self._served.complete(turns, sampling, self.usage)
