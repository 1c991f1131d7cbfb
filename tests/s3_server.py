"""A real S3 server on loopback, SeaweedFS, for tests and benchmarks. Only buckets whose names begin with `test-` are allowed."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

KEY, SECRET = "testkey", "testsecret123"


class S3Server:
    """SeaweedFS, its files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, [_free_port() for _ in range(5)]
        identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin:test-*"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.process: subprocess.Popen | None = None

    @property
    def port(self) -> int:
        """Where it listens for S3."""
        return self.ports[0]

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers."""
        s3, filer, master, volume, admin = self.ports
        options = {
            "dir": self.folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "master.telemetry": "false", "webdav": "false",
            "admin.ui": "false", "s3.port": s3, "filer.port": filer, "master.port": master, "volume.port": volume, "admin.port": admin,
            "s3.port.iceberg": 0, "s3.port.lance": 0, "s3.iam": "false", "s3.config": self.folder / "s3.json",
            "master.volumeSizeLimitMB": 64,
        }  # fmt: skip
        command = [str(Path(sys.executable).parent / "weed"), "-logtostderr=true", "mini"]
        command += [f"-{name}={value}" for name, value in options.items()]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def _answers(self) -> bool:
        """Whether it takes requests: it refuses those without a key."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == http.HTTPStatus.FORBIDDEN
        except (ConnectionError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """Ends it without notice; it may be started again."""
        assert self.process
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _free_port() -> int:
    """A port whose twin 10000 above, which SeaweedFS takes for gRPC, exists."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port < 55000:
                return port
