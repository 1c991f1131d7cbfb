"""Reads rows of JSONL, CSV, Parquet and Hugging Face datasets one after the other, whatever the size of the file.

A row that cannot be read is a reason in its place; a file that cannot be read at all raises UserError. Text is UTF-8, with or
without a byte order mark.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import count
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from tasks.sources import SourceFile

Row = dict[str, Any]
MAX_ROW_BYTES = 4 << 20
"""No conversation that a model could continue is longer; a row that is costs no more memory than this."""
TOO_LONG = f"the row is longer than {MAX_ROW_BYTES >> 20} MiB"
BATCH_ROWS = 256
_ESCAPED = re.compile("[\udc80-\udcff]")


def read_source(file: SourceFile) -> Iterator[tuple[int, Row | str]]:
    """Line number (of JSONL and CSV) or row number, from 1, and the row, or the reason why there is none."""
    return {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet, "dataset": _dataset, "rows": _listed}[file.format](file)


def _jsonl(file: SourceFile) -> Iterator[tuple[int, Row | str]]:
    for number, raw in _lines(file.path):
        if raw.strip():
            yield number, _json_row(raw)


def _json_row(raw: bytes) -> Row | str:
    if len(raw) > MAX_ROW_BYTES:
        return TOO_LONG
    if (place := raw.find(0)) >= 0:
        return f"NUL at byte {place}"
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start} (0x{raw[error.start]:02x})"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"expected an object, found {type(row).__name__}"


def _csv(file: SourceFile) -> Iterator[tuple[int, Row | str]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    text = _TextLines(file.path)
    for _ in range(file.source.skip_lines):
        next(text, None)
    reader = csv.reader(text, delimiter=file.source.delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
    except StopIteration:
        raise UserError(f"{file}: is empty; expected a line with the names of the columns.") from None
    except (csv.Error, _TooLongError) as error:
        raise UserError(f"{file}: line {text.number}: no names of columns: {error}") from None
    _check_header(file, header)
    while True:
        line = text.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, _TooLongError) as error:
            yield line, f"not CSV: {error}"
        else:
            if cells:
                yield line, _csv_row(header, cells)


def _csv_row(header: list[str], cells: list[str]) -> Row | str:
    if len(cells) != len(header):
        return f"{len(cells)} cells, but the header names {len(header)} columns"
    for name, cell in zip(header, cells, strict=True):
        if found := _ESCAPED.search(cell):
            return f"{name}: not UTF-8 (byte 0x{ord(found[0]) - 0xDC00:02x})"
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _parquet(file: SourceFile) -> Iterator[tuple[int, Row | str]]:
    try:
        with pq.ParquetFile(file.path) as table:
            _check_header(file, table.schema_arrow.names)
            columns = sorted(set(file.source.columns.named.values())) or None
            yield from enumerate((row for batch in table.iter_batches(BATCH_ROWS, columns=columns) for row in _rows(batch)), start=1)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {_first_line(error)}") from error


def _rows(batch: pa.RecordBatch) -> Iterator[Row | str]:
    for number in range(batch.num_rows):
        row: Row = {}
        for name in batch.schema.names:
            try:
                value = _present(batch[name][number].as_py())
            except (UnicodeDecodeError, pa.ArrowException, ValueError, OverflowError) as error:
                yield f"{name}: cannot be read: {_first_line(error)}"
                break
            if value is not None:
                row[name] = value
        else:
            yield row


def _dataset(file: SourceFile) -> Iterator[tuple[int, Row | str]]:
    _check_header(file, file.rows.column_names)
    columns = sorted(set(file.source.columns.named.values())) or file.rows.column_names
    rows = file.rows.select_columns(columns).with_format("arrow")
    tables = (table for table in rows.iter(BATCH_ROWS))
    yield from enumerate((row for table in tables for batch in table.to_batches() for row in _rows(batch)), start=1)


def _listed(file: SourceFile) -> Iterator[tuple[int, Row | str]]:
    yield from enumerate(file.rows, start=1)


def _present(value: Any) -> Any:
    """Without what is null: a column of structs has every field in every row."""
    if isinstance(value, dict):
        return {name: _present(item) for name, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _check_header(file: SourceFile, header: list[str]) -> None:
    """Raises UserError when a column is not UTF-8, named twice, or not there although it is mapped."""
    for name in header:
        if found := _ESCAPED.search(name):
            raise UserError(f"{file}: not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x} in the names of the columns; save the file as UTF-8.")
        if header.count(name) > 1:
            raise UserError(f"{file}: two columns are named {name!r}.")
    for field, name in file.source.columns.named.items():
        if name not in header:
            raise UserError(f"{file}: columns.{field}: no column {name!r}; there are {', '.join(map(repr, header))}.")


class _TooLongError(Exception):
    """A line of more than MAX_ROW_BYTES."""


class _TextLines:
    """The lines of a file for `csv`. Bytes that are not UTF-8 are kept as lone surrogates, so that their cell can be named."""

    def __init__(self, path: str) -> None:
        self.number = 0
        self._lines = _lines(path)

    def __iter__(self) -> "_TextLines":
        return self

    def __next__(self) -> str:
        self.number, raw = next(self._lines)
        if len(raw) > MAX_ROW_BYTES:
            raise _TooLongError(TOO_LONG)
        return raw.decode("utf-8", "surrogateescape")


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line; a longer one is cut to one byte more than MAX_ROW_BYTES. Raises UserError."""
    try:
        with cast(BinaryIO, gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb") as stream:
            for number in count(1):
                raw = stream.readline(MAX_ROW_BYTES + 1)
                if not raw:
                    return
                if number == 1:
                    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                        raise UserError(f"{path}: not UTF-8: byte 0 is 0x{raw[0]:02x} (UTF-16); save the file as UTF-8.")
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if len(raw) > MAX_ROW_BYTES:
                    rest = raw
                    while rest and not rest.endswith(b"\n"):
                        rest = stream.readline(MAX_ROW_BYTES)
                yield number, raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
