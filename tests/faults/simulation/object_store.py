"""The simulated object store, as fsspec would show it, and the format of the files in it."""

import errno
import io
import zlib
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import pyarrow as pa

from simulation.world import LEASE, Process, World


class Files:
    """The simulated object store, as fsspec would show it: whole objects, conditional creation, no folders."""

    protocol = "sim"

    def __init__(self, world: World) -> None:
        self.world = world

    def cat_file(self, path: str) -> bytes:
        self._ask(path)
        content = self.world.objects.get(path)
        if content is None:
            raise FileNotFoundError(path)
        return content

    def exists(self, path: str) -> bool:
        self._ask(path)
        return path in self.world.objects

    def glob(self, pattern: str) -> list[str]:
        """A listing that lags behind by up to half a minute."""
        self._ask(pattern)
        lag = self.world.rng.random() * 30 if self.world.current and not self.world.current.process.calm else 0.0
        return [path for path in self.world.objects if fnmatch(path, pattern) and self.world.born[path] <= self.world.now - lag]

    def pipe_file(self, path: str, content: bytes, mode: str = "overwrite") -> None:
        def write() -> None:
            if mode == "create" and path in self.world.objects:
                self._refuse(path, content)
            self.world.note(f"{mode} {path}")
            self.world.store(path, content, self.world.current.process if self.world.current else None)

        self._change(path, write, content if mode == "create" else None)

    def rm_file(self, path: str) -> None:
        def remove() -> None:
            self.world.note(f"delete {path}")
            if self.world.objects.pop(path, None) is None:
                raise FileNotFoundError(path)

        self._change(path, remove, None)

    def _refuse(self, path: str, content: bytes) -> None:
        world = self.world
        world.note(f"refused: create {path}")
        process = world.current.process if world.current else None
        if (
            process
            and world.authors.get(path) is process
            and world.objects[path] != content
            and "/ledger/" in path
            and not process.disturbed
        ):
            world.violations.append(f"{process.name} stands in its own way at {path}")
        if world.happens(world.weather.unclear_conflict):
            raise OSError(errno.EINVAL, "condition failed")
        raise FileExistsError(path)

    def _ask(self, path: str) -> None:
        """A request travels. It may be slow, not arrive, or find that the world has changed."""
        world, weather = self.world, self.world.weather
        if world.current is None:
            return
        process = world.current.process
        world.wait(world.rng.uniform(0.001, 0.05) if not world.happens(weather.slow) else world.rng.uniform(0.1, 4.0))
        if world.happens(weather.pause):
            process.frozen, process.disturbed = world.now + world.rng.uniform(0.3, 3.0) * LEASE, True
            world.note(f"PAUSE of {process.frozen - world.now:.0f} s at {path}")
            world.wait()
        if world.happens(weather.lose_shard):
            world.hurt(remove=True)
        if world.happens(weather.damage_shard):
            world.hurt(remove=False)
        if world.happens(weather.outage):
            world.down_until = world.now + world.rng.uniform(5, 150)
            world.note(f"OUTAGE for {world.down_until - world.now:.0f} s")
        if (world.now < world.down_until and not process.calm) or world.happens(weather.fail):
            self._failed(process, f"no answer: {path}")
        process.failures = 0

    def _failed(self, process: Process, text: str) -> None:
        process.failures += 1
        process.disturbed |= process.failures > 3 or self.world.now < self.world.down_until
        self.world.note(text)
        raise ConnectionResetError(errno.ECONNRESET, "connection reset")

    def _change(self, path: str, change: Callable[[], None], created: bytes | None) -> None:
        world, weather = self.world, self.world.weather
        self._ask(path)
        if world.current is None:
            change()
            return
        process = world.current.process
        if world.happens(weather.crash / 2):
            world.crash(process, f"before the write of {path}")
        self._interrupt(process, path)
        if created is not None and world.happens(weather.delay):
            world.later.append((world.now + world.rng.uniform(1, 2 * LEASE), path, created))
            process.disturbed = True
            world.wait(world.rng.uniform(0.1, 10))
            self._failed(process, f"no answer, under way: {path}")
        change()
        if world.happens(weather.crash / 2):
            world.crash(process, f"after the write of {path}")
        world.wait(world.rng.uniform(0.001, 0.03))
        self._interrupt(process, path)
        if world.happens(weather.lose_answer):
            self._failed(process, f"answer lost: {path}")

    def _interrupt(self, process: Process, path: str) -> None:
        first = next(fiber for fiber in self.world.fibers if fiber.process is process)
        if first is self.world.current and self.world.happens(self.world.weather.interrupt / 2):
            process.disturbed = True
            self.world.note(f"INTERRUPT at {path}")
            raise KeyboardInterrupt


class Tablets:
    """Stands in for `pyarrow.parquet`: Arrow's own format with a checksum, which costs a tenth of the time."""

    class ParquetFile:
        def __init__(self, source: io.BytesIO, page_checksum_verification: bool = False) -> None:
            content = source.read()
            if page_checksum_verification and zlib.crc32(content[4:]).to_bytes(4) != content[:4]:
                raise OSError("checksum of a page differs")
            self._file = pa.ipc.open_file(pa.BufferReader(content[4:]))
            self.schema_arrow = self._file.schema

        def read(self, columns: list[str] | None, use_threads: bool = True) -> pa.Table:
            table = self._file.read_all()
            return table.select(columns) if columns else table

    @staticmethod
    def write_table(table: pa.Table, sink: io.BytesIO, **options: Any) -> None:
        content = pa.BufferOutputStream()
        with pa.ipc.new_file(content, table.schema) as writer:
            writer.write_table(table)
        body = content.getvalue().to_pybytes()
        sink.write(zlib.crc32(body).to_bytes(4) + body)
