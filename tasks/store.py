"""Where results lie: a root that any fsspec URL can name, files written once, and the numbered ledger that says which of them count.

A shard is serialised in memory, checksummed and put once. It counts when a ledger entry names it; entry n is created only if there is no
entry n, so there is one writer and a stale one is fenced out. Nothing is found by listing: readers probe the next number.
"""

import hashlib
import io
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import SpecmillError, UserError
from cluster.serving import Usage

ROW_GROUP_ROWS = 1024
READERS = 16
"""Files read at the same time."""


class Conflict(SpecmillError):
    """Somebody else created the file first."""


class Corrupt(SpecmillError):
    """A file is missing or its bytes are not the ones that were written."""


@dataclass(frozen=True)
class File:
    """A file under the root: its path, size in bytes and sha256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard(File):
    """A Parquet file of rows with unique keys. rows = ok + quarantined."""

    rows: int
    quarantined: int


class Store:
    """A root URL. Paths are relative to it and use `/`."""

    def __init__(self, root: str) -> None:
        self.root = root
        try:
            self.fs, self.base = fsspec.core.url_to_fs(root)
        except (ValueError, ImportError) as error:
            raise UserError(f"root {root!r} cannot be opened: {error}") from error
        self.base = self.base.rstrip("/")

    @property
    def local(self) -> bool:
        """True when the root is a directory of this machine."""
        protocol = self.fs.protocol
        return "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def path(self, path: str) -> str:
        """The full path of a file under the root."""
        return f"{self.base}/{path}"

    def check_writable(self) -> None:
        """Raises UserError when nothing can be written under the root."""
        try:
            self.create(f".probe-{uuid.uuid4().hex}", b"", keep=False)
        except OSError as error:
            raise UserError(f"root {self.root!r} cannot be written: {error.strerror or error}. Choose another root.") from error

    def create(self, path: str, content: bytes, keep: bool = True) -> File:
        """Writes a file that must not exist yet, all of it or nothing. Raises Conflict when it exists."""
        target = self.path(path)
        if self.local:
            self._link(target, content)
        else:
            try:
                self.fs.pipe_file(target, content, mode="create")
            except FileExistsError:
                raise Conflict(f"{path} exists already") from None
        if not keep:
            self.fs.rm_file(target)
        return File(path, len(content), hashlib.sha256(content).hexdigest())

    def put(self, path: str, content: bytes) -> File:
        """Like `create`, but content that lies there already is fine: content-named files are put once."""
        try:
            return self.create(path, content)
        except Conflict:
            if self.read(path) != content:
                raise
            return File(path, len(content), hashlib.sha256(content).hexdigest())

    def replace(self, path: str, content: bytes) -> None:
        """Writes a file for people (a report, a card), all of it or nothing, over an older one."""
        target = self.path(path)
        if not self.local:
            self.fs.pipe_file(target, content)
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        private = f"{os.path.dirname(target)}/.{uuid.uuid4().hex}"
        with open(private, "wb") as stream:
            stream.write(content)
        os.replace(private, target)

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self.path(path)))

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        return bool(self.fs.exists(self.path(path)))

    def read_json(self, path: str) -> Any:
        """The content of a JSON file, or None when there is no such file. Raises Corrupt when it is not JSON."""
        try:
            return json.loads(self.read(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Corrupt(f"{path}: not JSON: {error}") from error

    def put_table(self, folder: str, table: pa.Table) -> Shard:
        """Writes rows as a Parquet file named by its content; counts rows whose column `quarantined` is set."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", compression_level=3, row_group_size=ROW_GROUP_ROWS)
        content = buffer.getvalue()
        name = hashlib.sha256(content).hexdigest()
        file = self.put(f"{folder}/{name[:32]}.parquet", content)
        quarantined = table.num_rows - table["quarantined"].null_count if "quarantined" in table.column_names else 0
        return Shard(**asdict(file), rows=table.num_rows, quarantined=quarantined)

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """Rows of a Parquet file. Raises FileNotFoundError, or Corrupt when it is not one."""
        try:
            source = self.path(path) if self.local else io.BytesIO(self.read(path))
            return pq.ParquetFile(source).read(columns, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise Corrupt(f"{path}: {error}") from error

    def read_shards(self, shards: Sequence[Shard], columns: list[str]) -> Iterator[tuple[Shard, pa.Table | None]]:
        """Some columns of each shard, in order, several being read at a time; None for one that is gone. Raises Corrupt."""

        def read(shard: Shard) -> pa.Table | None:
            try:
                return self.read_table(shard.path, columns)
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(READERS) as readers:
            ahead: deque[Future[pa.Table | None]] = deque()
            for number, shard in enumerate(shards):
                ahead.extend(readers.submit(read, later) for later in shards[number + len(ahead) : number + 2 * READERS])
                yield shard, ahead.popleft().result()

    def verify(self, file: File) -> str | None:
        """What is wrong with a file, or None."""
        try:
            content = self.read(file.path)
        except FileNotFoundError:
            return f"{file.path}: missing"
        if hashlib.sha256(content).hexdigest() != file.sha256:
            return f"{file.path}: checksum differs ({len(content)} bytes, expected {file.bytes})"
        return None

    def _link(self, target: str, content: bytes) -> None:
        """Local create: a private file with all bytes, then a hard link to the name, which fails if the name exists."""
        folder = os.path.dirname(target)
        os.makedirs(folder, exist_ok=True)
        private = f"{folder}/.{uuid.uuid4().hex}"
        try:
            with open(private, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(private, target)
            except FileExistsError:
                raise Conflict(f"{target} exists already") from None
        finally:
            if os.path.exists(private):
                os.unlink(private)


class Ledger:
    """The numbered record of one stage: `<stage>/ledger/<n>.json`, each entry naming shards. A key belongs to the first that names it."""

    def __init__(self, store: Store, stage: str) -> None:
        self.store, self.stage = store, stage
        self._next: int | None = None

    def entries(self) -> Iterator[dict[str, Any]]:
        """All entries in order."""
        number = 0
        while (entry := self.store.read_json(self._path(number))) is not None:
            yield entry
            number += 1
        self._next = number

    def shards(self) -> list[Shard]:
        """Shards that count: named by an entry, and not declared lost by a later one.

        From here on `commit` continues after the last entry seen: what another run commits meanwhile fences this one out.
        """
        named: dict[str, Shard] = {}
        for entry in self.entries():
            for shard in entry["shards"]:
                named[shard["path"]] = Shard(**shard)
            for path in entry["lost"]:
                named.pop(path, None)
        return list(named.values())

    def commit(self, shards: Iterable[Shard], lost: Iterable[str] = (), usage: Usage | None = None) -> None:
        """Appends one entry; `usage` is what its shards cost.

        Raises Conflict when another writer was faster: this one has lost its turn and must stop.
        """
        shards = list(shards)
        number = sum(1 for _ in self.entries()) if self._next is None else self._next
        entry = {
            "version": 1,
            "stage": self.stage,
            "shards": [asdict(shard) for shard in shards],
            "keys": sum(shard.rows for shard in shards),
            "lost": list(lost),
            "usage": asdict(usage or Usage()),
            "time": time.time(),
        }
        try:
            self.store.create(self._path(number), json.dumps(entry, indent=1).encode())
        except Conflict:
            raise Conflict(
                f"{self.stage}: another run writes to {self.store.root}; this one stops. Start it again when the other has ended."
            ) from None
        self._next = number + 1

    def _path(self, number: int) -> str:
        return f"{self.stage}/ledger/{number:08d}.json"
