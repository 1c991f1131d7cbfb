"""Where results lie: a root that any fsspec URL can name, and files that are written once, all of them or nothing.

A shard is serialised in memory, checksummed and put once; `tasks.ledger` says which of them count.
"""

import errno
import hashlib
import io
import json
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Literal, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from cluster.errors import SpecmillError, UserError
from tasks.tables import wrong_column
from tasks.validation import describe

ROW_GROUP_ROWS = 1024
T = TypeVar("T")
PATIENCE_SECONDS = float(os.environ.get("SPECMILL_STORE_SECONDS", "60"))
"""How long a store that does not answer is asked again."""
DEFINITE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
DEFINITE_NUMBERS = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG)
"""What is an answer of a remote store; anything else may be better the next time."""
S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "max_concurrency": 1,  # more would ask for the size of every file first
    "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 10, "read_timeout": 60},
}
READERS = 16
"""Files read at the same time."""


class Conflict(SpecmillError):
    """Somebody else created the file first."""


class Corrupt(SpecmillError):
    """A file is missing or its bytes are not the ones that were written."""


@dataclass(frozen=True, slots=True)
class File:
    """A file under the root: its path, size in bytes and sha256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Shard(File):
    """A Parquet file of rows with unique keys. rows = ok + quarantined."""

    rows: int
    quarantined: int


class Down(SpecmillError):
    """The store did not answer, or has no room; the run stops and the same command goes on from there."""


class Missing(SpecmillError, FileNotFoundError):
    """A file that should be there is gone."""


class Store:
    """A root URL: a directory, `s3://bucket/prefix`, or any other that fsspec knows. Paths are relative to it and use `/`."""

    def __init__(self, root: str) -> None:
        self.root = root
        options = S3_OPTIONS if root.startswith(("s3://", "s3a://")) else {}
        try:
            root.encode()  # Arrow takes no other names
            self.fs, self.base = fsspec.core.url_to_fs(root, **options)
        except (ValueError, ImportError, TypeError, OSError) as error:
            raise UserError(f"root {root!r} cannot be opened: {error}") from error
        self.base = self.base.rstrip("/")
        if options:
            self.fs.retries = 1  # s3fs's own, like botocore's, would only multiply ours

    @property
    def local(self) -> bool:
        """True when the root is a directory of this machine."""
        protocol = self.fs.protocol
        return "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def path(self, path: str) -> str:
        """The full path of a file under the root. Raises Corrupt for one that leads out of it: nothing of ours has such a name."""
        if path.startswith("/") or ".." in path.split("/"):
            raise Corrupt(f"{self.root}: something here names the file {path!r}, which lies outside of this root")
        return f"{self.base}/{path}"

    def check_writable(self) -> None:
        """Raises UserError when nothing can be written under the root, or when a second file of one name would replace the first."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self._write("create", probe, probe.encode())
            try:
                self._write("create", probe, b"")
            except FileExistsError:
                pass
            else:
                raise UserError(f"root {self.root!r}: writes over what is there instead of refusing to. It needs conditional writes.")
            finally:
                self._write("delete", probe)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not self.local:
                raise UserError(f"root {self.root!r}: there is no such bucket. Make it, or choose another root.") from error
            raise UserError(f"root {self.root!r} cannot be written: {error.strerror or error}. Choose another root.") from error

    def put(self, path: str, content: bytes) -> File:
        """Writes a file, all of it or nothing. Raises Conflict when there is one of this name with other content.

        The same content is fine: an earlier attempt may have succeeded although its answer was lost.
        """
        try:
            self._write("create", path, content)
        except FileExistsError:
            if self.read(path) != content:
                raise Conflict(f"{path} exists already") from None
        return _file(path, content)

    def replace(self, path: str, content: bytes) -> None:
        """Writes a file, all of it or nothing, over an older one."""
        self._write("replace", path, content)

    def upload(self, path: str, source: str) -> None:
        """Copies a file of this machine to a remote root, all of it or nothing, over an older one. It need not fit in memory."""
        self._write("upload", path, source=source)

    def download(self, file: File, target: str) -> None:
        """Copies a file to this machine, all of it or nothing. Raises Missing, or Corrupt when its checksum differs."""
        os.makedirs(os.path.dirname(target), exist_ok=True)
        private = f"{target}.{uuid.uuid4().hex}"
        try:
            self._trying(lambda: self.fs.get_file(self.path(file.path), private), file.path)
            with open(private, "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                    raise Corrupt(f"{self.path(file.path)}: checksum differs")
            os.replace(private, target)
        except FileNotFoundError:
            raise Missing(f"{self.path(file.path)} is gone.") from None
        finally:
            with suppress(FileNotFoundError):
                os.unlink(private)

    def delete(self, path: str) -> None:
        """Removes a file; one that is gone already is fine."""
        with suppress(FileNotFoundError):
            self._write("delete", path)

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError."""
        return bytes(self._trying(lambda: self.fs.cat_file(self.path(path)), path))

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        return bool(self._trying(lambda: self.fs.exists(self.path(path)), path))

    def glob(self, pattern: str) -> list[str]:
        """Files and folders that fit a pattern, in order. For people's commands: nothing that a run does relies on a listing."""
        found = self._trying(lambda: self.fs.glob(self.path(pattern)), pattern)
        return sorted(str(path).removeprefix(f"{self.base}/") for path in found)

    def files(self, folder: str) -> Iterator[tuple[str, int, float]]:
        """Every file below a folder: path, bytes, and when it was written, in seconds since 1970 on the store's clock."""
        try:
            found = self._trying(lambda: self.fs.find(self.path(folder), detail=True), folder)
        except FileNotFoundError:
            return
        for path, about in sorted(found.items()):
            if about["type"] == "directory":  # s3fs finds the folder itself where a server keeps one that is empty
                continue
            known = next((name for name in ("mtime", "LastModified") if name in about), None)
            changed = about[known] if known else self.fs.modified(path)
            seconds = changed if isinstance(changed, float) else changed.timestamp()
            yield str(path).removeprefix(f"{self.base}/"), int(about["size"]), seconds

    def read_json(self, path: str, kind: TypeAdapter[Any] | None = None) -> Any:
        """The content of a JSON file, or None when there is no such file. Raises Corrupt when it is not JSON, or not of its kind."""
        try:
            content = self.read(path)
            found = kind.dump_python(kind.validate_json(content, strict=True), exclude_unset=True) if kind else json.loads(content)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValidationError as error:
            raise Corrupt("; ".join(describe(error, self.path(path))[:3])) from error
        except (OSError, ValueError, RecursionError) as error:
            raise Corrupt(f"{self.path(path)}: not JSON: {error}") from error
        if found is None:
            raise Corrupt(f"{self.path(path)}: holds nothing")
        return found

    def put_table(self, folder: str, table: pa.Table) -> Shard:
        """Writes rows as a Parquet file named by its content; counts rows whose column `quarantined` is set."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", compression_level=3, row_group_size=ROW_GROUP_ROWS, write_page_checksum=True)
        content = buffer.getvalue()
        path = f"{folder}/{hashlib.sha256(content).hexdigest()[:32]}.parquet"
        try:
            file = self.put(path, content)
        except Conflict:  # what lies under this name is damaged: the name is that of its content
            self.replace(path, content)
            file = _file(path, content)
        quarantined = table.num_rows - table["quarantined"].null_count if "quarantined" in table.column_names else 0
        return Shard(**asdict(file), rows=table.num_rows, quarantined=quarantined)

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """Rows of a Parquet file. Raises Missing, which is a FileNotFoundError too, or Corrupt when it is not one or of another kind."""
        try:
            source = self.path(path) if self.local else io.BytesIO(self.read(path))
            file = pq.ParquetFile(source, page_checksum_verification=True)
            if wrong := wrong_column(path, file.schema_arrow):
                raise Corrupt(f"{path}: {wrong}")
            table = file.read(columns, use_threads=False)
        except FileNotFoundError:
            raise Missing(f"{self.path(path)} is gone. Start the same command again: what is missing is made anew.") from None
        except (pa.ArrowException, OSError) as error:
            raise Corrupt(f"{path}: {error}") from error
        if missing := set(columns or ()) - set(table.column_names):
            raise Corrupt(f"{path}: no column {', '.join(sorted(missing))}")
        return table

    def read_tables(self, paths: Sequence[str], columns: list[str]) -> Iterator[pa.Table | None]:
        """Some columns of Parquet files, in order, several being read at a time; None for one that is gone. Raises Corrupt."""

        def read(path: str) -> pa.Table | None:
            try:
                return self.read_table(path, columns)
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(READERS) as readers:
            ahead: deque[Future[pa.Table | None]] = deque()
            for number in range(len(paths)):
                ahead.extend(readers.submit(read, later) for later in paths[number + len(ahead) : number + 2 * READERS])
                yield ahead.popleft().result()

    def verify(self, file: File) -> str | None:
        """What is wrong with a file, or None."""
        try:
            content = self.read(file.path)
        except FileNotFoundError:
            return f"{file.path}: missing"
        except Corrupt as error:
            return str(error)
        except OSError as error:
            return f"{file.path}: cannot be read: {error.strerror or error}"
        if hashlib.sha256(content).hexdigest() != file.sha256:
            return f"{file.path}: checksum differs ({len(content)} bytes, expected {file.bytes})"
        return None

    def _write(self, action: Literal["create", "replace", "delete", "upload"], path: str, content: bytes = b"", source: str = "") -> None:
        """Every durable change passes here. Raises FileExistsError (create) and FileNotFoundError (delete)."""
        target = self.path(path)
        if self.local and action != "upload":
            try:
                _write_file(action, target, content)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise Down(f"{target}: {error.strerror}. Make room and start the same command again.") from error
                if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise UserError(f"{target}: {error.strerror}. Give this user the right to write there.") from error
                raise
        elif action == "delete":
            self._trying(lambda: self.fs.rm_file(target), path)
        elif action == "upload":
            self._trying(lambda: self.fs.put_file(source, target), path)
        elif action == "replace":
            self._trying(lambda: self.fs.pipe_file(target, content), path)
        else:
            try:
                self._trying(lambda: self.fs.pipe_file(target, content, mode="create"), path)
            except OSError as error:
                # Some servers do not say which condition failed, so that s3fs cannot know either.
                if isinstance(error, FileExistsError) or (error.errno == errno.EINVAL and self.exists(path)):
                    raise FileExistsError(path) from error
                raise

    def _trying(self, ask: Callable[[], T], path: str) -> T:
        """The store's answer. What is no definite answer is asked for again, within bounds; then raises Down."""
        deadline = 0.0
        for attempt in count():
            try:
                return ask()
            except PermissionError as error:
                advice = "Check its permissions and the credentials in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
                raise UserError(f"root {self.root!r} refuses {path}: {str(error.strerror or error).rstrip('.')}. {advice}") from error
            except Exception as error:
                definite = isinstance(error, OSError) and (self.local or isinstance(error, DEFINITE) or error.errno in DEFINITE_NUMBERS)
                if definite or isinstance(error, SpecmillError):
                    raise
                deadline = deadline or time.monotonic() + PATIENCE_SECONDS  # a long transfer that breaks is worth another attempt
                pause = random.uniform(0, min(5.0, 0.1 * 2**attempt))
                if time.monotonic() + pause > deadline:
                    raise Down(
                        f"root {self.root!r} does not answer ({path}; {attempt + 1} attempts in {PATIENCE_SECONDS:.0f} s; the last: "
                        f"{type(error).__name__}: {error}). Everything committed is kept; start the same command again when it does."
                    ) from error
                time.sleep(pause)
        raise AssertionError


def _file(path: str, content: bytes) -> File:
    return File(path, len(content), hashlib.sha256(content).hexdigest())


def _write_file(action: Literal["create", "replace", "delete"], target: str, content: bytes) -> None:
    """On a disk: a private file with all bytes, which then gets the name; by a link if there must be none of this name."""
    if action == "delete":
        os.unlink(target)
        return
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    private = f"{folder}/.{uuid.uuid4().hex}"
    try:
        with open(private, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if action == "create":
            os.link(private, target)
        else:
            os.replace(private, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(private)
