"""The number of requests that are sent at a time: grows while it pays, falls when the server pushes back, pauses when it says so."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from cluster.limit import FIRST, Limit


async def ask(limit: Limit, answer: Callable[[], Awaitable[None]]) -> None:
    async with limit.room() as sent:
        await answer()
        limit.answered(sent, 0, 1)


def test_it_grows_to_the_highest_where_more_at_a_time_are_no_slower() -> None:
    limit = Limit(32)

    async def main() -> None:
        await asyncio.gather(*(ask(limit, lambda: asyncio.sleep(0.01 + random.random() / 500)) for _ in range(200)))

    asyncio.run(main())
    assert limit.allowed == 32 and limit.in_flight == 0


def test_it_stays_near_what_a_server_works_on_where_more_would_queue() -> None:
    limit, desks, seen = Limit(64), asyncio.Semaphore(4), []

    async def queue() -> None:
        async with desks:
            await asyncio.sleep(0.01)
        seen.append(limit.in_flight)

    async def main() -> None:
        await asyncio.gather(*(ask(limit, queue) for _ in range(400)))

    asyncio.run(main())
    assert 4 <= sum(seen[-100:]) / 100 <= 20, "no more than three times what is worked on, and a round's growth"
    assert limit.allowed < 64


def test_it_is_halved_once_a_round_and_grows_again() -> None:
    limit = Limit(16)
    sent = time.monotonic()
    limit.allowed = 16.0
    for _ in range(16):
        limit.pushed_back(sent)
    assert limit.allowed == 8, "all of them were sent before the limit was halved"
    limit.pushed_back(time.monotonic())
    assert limit.allowed == 4

    async def main() -> None:
        await asyncio.gather(*(ask(limit, lambda: asyncio.sleep(0.002)) for _ in range(100)))

    asyncio.run(main())
    assert 8 < limit.allowed <= 16


def test_nothing_is_sent_during_a_pause() -> None:
    limit, sent = Limit(8), []

    async def request() -> None:
        async with limit.room() as now:
            sent.append(now)

    limit.pushed_back(time.monotonic(), pause=0.3)
    over = time.monotonic() + 0.3

    async def main() -> None:
        await asyncio.gather(*(request() for _ in range(20)))

    asyncio.run(main())
    assert len(sent) == 20 and min(sent) >= over - 0.01


def test_requests_that_are_given_up_leave_their_place_to_others() -> None:
    limit = Limit(1)

    async def main() -> None:
        async with limit.room():
            waiting = [asyncio.ensure_future(ask(limit, lambda: asyncio.sleep(0))) for _ in range(5)]
            await asyncio.sleep(0.01)
            for task in waiting[:3]:
                task.cancel()
        done, _ = await asyncio.wait(waiting, timeout=5)
        assert len(done) == 5 and not any(task.cancelled() for task in waiting[3:])

    asyncio.run(main())
    assert FIRST > limit.allowed == 1 and limit.in_flight == 0
