"""Errors, pauses and faults of an endpoint: whose fault they are, who waits, and what is asked again."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from faulty_proxy import Fault, reset, status
from provider import KEY, TURNS, VARIABLE, answering, config, draw, draw_many, engine, failed, said

from cluster import serving
from cluster.chat import Turn
from cluster.engine import Busy, Completion, Sampling, Unavailable
from cluster.errors import SpecmillError, UserError
from cluster.serving import Metered, NotAnswered, Served


@pytest.mark.parametrize(
    ("fault", "expected", "words"),
    [
        (failed(401, f"Incorrect API key provided: {KEY}"), UserError, VARIABLE),
        (failed(403), UserError, VARIABLE),
        (failed(404, "no such model"), UserError, "no such model"),
        (failed(429, kind="insufficient_quota"), UserError, "quota"),
        (failed(400, f"too long; you sent {KEY}"), ValueError, r"too long; you sent \*\*\*"),
        (failed(422), ValueError, "422"),
        (failed(429), Busy, "429"),
        (failed(503), Busy, "503"),
        (failed(500), Unavailable, "500"),
        (failed(408), Unavailable, "408"),
        (reset, Unavailable, "broke"),
        (status(200, b"<html>", Content_Type="text/html"), Unavailable, "without a completion"),
        (status(200, b'{"choices": []}', Content_Type="application/json"), Unavailable, "without a completion"),
    ],
    ids=["401", "403", "404", "quota", "400", "422", "429", "503", "500", "408", "reset", "no JSON", "no choice"],
)
def test_an_error_says_whose_fault_it_is_and_never_the_key(fault: Fault, expected: type[Exception], words: str) -> None:
    with answering(fault) as proxy, pytest.raises(expected, match=words) as raised:
        draw(proxy.url)
    assert type(raised.value) is expected and len(proxy.arrived) == 1, "retries are made elsewhere"
    assert KEY not in str(raised.value) + repr(raised.value) and raised.value.__context__ is None


def test_a_redirect_to_another_host_is_not_followed() -> None:
    with answering(said()) as other:
        moved = status(307, Location=f"{other.url}/v1/chat/completions")
        with answering(moved) as proxy, pytest.raises(UserError, match="307"):
            draw(proxy.url)
    assert not other.arrived


def test_what_is_meant_for_this_machine_passes_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(said()) as other, answering(said()) as server:
        monkeypatch.setenv("HTTP_PROXY", other.url)
        draw(server.url)
    assert not other.arrived and server.arrived


def test_an_answer_that_takes_too_long_is_asked_for_again() -> None:
    def slow(request: BaseHTTPRequestHandler) -> None:
        time.sleep(1)

    with answering(slow) as proxy, pytest.raises(Unavailable, match=r"0\.2 s"):
        draw(proxy.url, request_seconds=0.2)


def _in_a_second() -> dict[str, str]:
    """The date of a server whose clock is a day late, and one second later."""
    now = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    return {"Date": format_datetime(now, usegmt=True), "Retry_After": format_datetime(now + timedelta(seconds=1), usegmt=True)}


@pytest.mark.parametrize("headers", [lambda: {"Retry_After": "1"}, _in_a_second], ids=["seconds", "date"])
def test_a_pause_that_the_server_asks_for_is_kept_by_all_requests(headers: Callable[[], dict[str, str]]) -> None:
    def too_many(request: BaseHTTPRequestHandler) -> None:
        given = headers()
        request.send_response_only(429)
        for name, value in given.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    with answering(said(), too_many, said()) as proxy:
        asked = engine(config(proxy.url, max_num_seqs=1))
        usage = draw_many(asked, 4).usage
    assert usage.requests == 4 and usage.retries == 1 and len(proxy.arrived) == 5
    assert proxy.arrived[2] - proxy.arrived[1] >= 0.95, "and the others wait as well"


@pytest.mark.parametrize("value", ["soon", "-3", "nan", "Wed, 99 Foo 2026"])
def test_a_pause_that_cannot_be_read_is_none(value: str) -> None:
    with answering(failed(429, Retry_After=value)) as proxy, pytest.raises(Busy) as raised:
        draw(proxy.url)
    assert raised.value.pause == 0


def test_a_pause_ends_before_the_watchdog_wakes() -> None:
    with answering(failed(503, Retry_After="86400")) as proxy, pytest.raises(Busy) as raised:
        draw(proxy.url, stuck_seconds=60)
    assert raised.value.pause == 30


def test_a_busy_server_costs_no_row_and_one_that_stays_busy_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LONGEST_PAUSE", 0.1)
    with answering(failed(429), failed(429), said()) as proxy:
        assert draw_many(engine(config(proxy.url, attempts=1)), 1).usage.retries == 2
    with answering(failed(503)) as proxy, pytest.raises(SpecmillError, match=r"503.*What is made is kept"):
        draw_many(engine(config(proxy.url, attempts=1, request_seconds=1)), 2)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(SpecmillError, match="cannot be reached"):
            draw_many(engine(config(url, attempts=1, request_seconds=1)), 1)


def poisonous(sick: Fault) -> Fault:
    """A server that answers all requests but those that hold the word `poison`."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        (sick if b"poison" in request.server.bodies[-1] else said())(request)

    return answer


@pytest.mark.parametrize("sick", [failed(500), failed(502), reset], ids=["500", "502", "reset"])
def test_a_server_that_fails_everybody_costs_no_row_and_one_request_that_it_fails_on_is_given_up(
    monkeypatch: pytest.MonkeyPatch, sick: Fault
) -> None:
    monkeypatch.setattr(serving, "LONGEST_PAUSE", 0.1)
    with answering(*[sick] * 9, said()) as proxy:
        assert draw_many(engine(config(proxy.url, attempts=2)), 1).usage.requests >= 1
    with answering(sick) as proxy, pytest.raises(SpecmillError, match="What is made is kept"):
        draw_many(engine(config(proxy.url, attempts=2, request_seconds=1)), 2)
    with answering(poisonous(sick)) as proxy, pytest.raises(NotAnswered, match="3 attempts"):
        draw_many(engine(config(proxy.url, attempts=2)), 1, turns=[Turn(role="user", content="poison")])


def test_what_a_server_refuses_of_everybody_ends_the_run_and_what_it_refuses_of_one_is_that_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LONGEST_PAUSE", 0.1)
    with answering(failed(400, "no credit left")) as proxy, pytest.raises(SpecmillError, match=r"no credit left.*one word") as raised:
        draw_many(engine(config(proxy.url)), 3)
    assert not isinstance(raised.value, NotAnswered)

    async def all_of_them() -> list[Any]:
        asked = engine(config(proxy.url))
        await asked.start()
        metered = Metered(Served(asked, asked.config))
        try:
            return await asyncio.gather(*(metered.complete(TURNS, Sampling(1.0, 8, seed)) for seed in range(40)), return_exceptions=True)
        finally:
            await asked.stop()

    with answering(*[said()] * 20, failed(400, "no credit left")) as proxy:
        became = Counter(type(answer) for answer in asyncio.run(all_of_them()))
    assert became == {Completion: 20, SpecmillError: 20}, "none is held against its row"

    async def one_after_the_other() -> None:
        asked = engine(config(proxy.url))
        await asked.start()
        metered = Metered(Served(asked, asked.config))
        try:
            await metered.complete(TURNS, Sampling(1.0, 8, 1))
            await metered.complete(TURNS, Sampling(1.0, 8, 2))
        finally:
            await asked.stop()

    with answering(said(), failed(400, "no credit left")) as proxy, pytest.raises(SpecmillError, match="no credit left"):
        asyncio.run(one_after_the_other())
    with answering(said(), failed(400, "too long"), failed(503), failed(500), said()) as proxy, pytest.raises(ValueError, match="too long"):
        asyncio.run(one_after_the_other())
    with answering(poisonous(failed(400, "too long"))) as proxy, pytest.raises(ValueError, match="too long"):
        draw_many(engine(config(proxy.url)), 1, turns=[Turn(role="user", content="poison")])


def test_time_that_a_request_waits_for_its_turn_is_not_the_servers() -> None:
    def slow(request: BaseHTTPRequestHandler) -> None:
        time.sleep(0.2)
        said()(request)

    with answering(slow) as proxy:
        usage = draw_many(engine(config(proxy.url, max_num_seqs=1, request_seconds=0.6)), 8).usage
    assert usage.requests == 8 and usage.retries == 0 and len(proxy.arrived) == 8


def test_answers_that_come_too_late_lower_the_number_of_requests_at_a_time() -> None:
    late = [True] * 4

    def slow(request: BaseHTTPRequestHandler) -> None:
        if late:
            late.pop()
            time.sleep(1)
        said()(request)

    with answering(slow) as proxy:
        asked = engine(config(proxy.url, max_num_seqs=4, request_seconds=0.3, attempts=9))
        assert asked.limit.allowed == 4
        allowed = []
        draw_many(asked, 4, each=lambda: allowed.append(asked.limit.allowed))
    assert min(allowed) <= 2


def test_a_request_that_a_server_is_always_too_busy_for_is_given_up_while_others_are_answered() -> None:
    async def main() -> None:
        asked = engine(config(proxy.url, max_num_seqs=1, request_seconds=0.5))
        await asked.start()
        metered = Metered(Served(asked, asked.config))
        refused = asyncio.ensure_future(metered.complete([Turn(role="user", content="poison")], Sampling(1.0, 8, 1)))
        while not refused.done():
            await metered.complete(TURNS, Sampling(1.0, 8, 1))
        with pytest.raises(NotAnswered, match="503"):
            refused.result()
        await asked.stop()

    with answering(poisonous(failed(503))) as proxy:
        asyncio.run(main())
