"""An HTTP proxy on loopback that fails now and then: it answers with an error of its own, breaks off, or loses the server's answer."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    """Answers without asking the server."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


def reset(request: BaseHTTPRequestHandler) -> None:
    """Breaks off before the server is asked."""
    request.close_connection = True
    request.connection.close()


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `port`; a share of them meets one of the faults, another loses its answer after it took effect.

    `arrived` and `bodies` hold the monotonic times and contents of all requests.
    """

    daemon_threads = True

    def __init__(self, port: int, faults: dict[str, Fault], share: float, lost: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.faults, self.share, self.lost = port, faults, share, lost
        self.random = random.Random(0)
        self.seen: Counter[str] = Counter()
        self.arrived: list[float] = []
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy, fate = self.server, self.server.random.random()
        proxy.arrived.append(time.monotonic())
        proxy.bodies.append(body)
        if proxy.faults and fate < proxy.share:
            name = proxy.random.choice(sorted(proxy.faults))
            proxy.seen[name] += 1
            proxy.faults[name](self)
            return
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=120)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fate > 1 - proxy.lost:
            proxy.seen["lost answer"] += 1
            reset(self)
            return
        proxy.seen["passed"] += 1
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def faulty_proxy(port: int, faults: dict[str, Fault], share: float = 0.0, lost: float = 0.0) -> Iterator[Proxy]:
    """A proxy in front of a server on loopback."""
    proxy = Proxy(port, faults, share, lost)
    threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()  # so often it looks whether it is to stop
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
