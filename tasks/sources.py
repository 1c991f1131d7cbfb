"""Where prompts come from: files or Hugging Face datasets, which of their columns are which of our fields, and what identifies them."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from cluster.errors import UserError
from cluster.models import cache_dir
from tasks.validation import Strict

FileFormat = Literal["jsonl", "csv", "parquet"]
SUFFIXES: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}
_ESCAPED = re.compile("[\ud800-\udfff]")
"""Bytes of a file's name that are not UTF-8, as Python holds them."""
Label = Literal["category", "cell", "group", "split", "ideal_verdict", "ideal_clauses", "skill"]


def _one_or_more(value: Any) -> Any:
    """YAML and JSON read `1` and `true` as no text; as a label they are."""
    if isinstance(value, bool | int):
        return str(value)
    return value


LabelValue = Annotated[str | tuple[str, ...], BeforeValidator(_one_or_more)]


def _text_keys(table: Any) -> Any:
    return {str(key): value for key, value in table.items()} if isinstance(table, dict) else table


class Columns(Strict):
    """Our field -> the source's column. Where one is named, only named ones are read; where none is, they are named like our fields."""

    id: str | None = Field(None, title="Id", description="Left out: made of the source's name and a hash of the conversation.")
    messages: str | None = Field(
        None,
        title="Messages",
        description="OpenAI (role, content) or ShareGPT (from, value) turns, JSON text of these, or one text.",
    )
    text: str | None = Field(None, title="Text", description="Plain text, which becomes one user turn. Instead of `messages`.")
    category: str | None = Field(None, title="Category", description="Category of the policy.")
    cell: str | None = Field(None, title="Cell", description="violation, borderline, benign or transformation.")
    group: str | None = Field(None, title="Group", description="Scenario group, which goes to one split whole. Left out: each row is one.")
    split: str | None = Field(None, title="Split", description="sft, rl, dev or eval. Left out: the group's name decides.")
    ideal_verdict: str | None = Field(None, title="Ideal verdict", description="comply, refuse or safe_complete.")
    ideal_clauses: str | None = Field(None, title="Ideal clauses", description="Clause ids: a list, or text with commas.")
    skill: str | None = Field(None, title="Skill", description="A row that has one is a capability row.")
    thought: str | None = Field(None, title="Thought", description="The thought of a capability row.")
    answer: str | None = Field(None, title="Answer", description="The answer of a capability row.")

    @cached_property
    def named(self) -> dict[str, str]:
        """Our field -> the source's column, of those that are named."""
        return {name: column for name, column in self.model_dump().items() if column is not None}

    @model_validator(mode="after")
    def _has_a_conversation(self) -> "Columns":
        if self.named and (self.messages is None) == (self.text is None):
            raise ValueError("name the source's column for one of `messages` and `text`")
        return self


class Source(Strict):
    """A file, a directory of files, or a Hugging Face dataset, and how its rows become ours."""

    path: str | None = Field(None, title="Path", description="A file or a directory, relative to the run file that names it.")
    dataset: str | None = Field(None, title="Dataset", description="A Hugging Face dataset: its directory, or its id on the hub.")
    subset: str | None = Field(None, title="Subset", description="Which configuration of the dataset.")
    part: str | None = Field(None, title="Part", description="Which part of the dataset, for example train. Needed where it has several.")
    revision: str | None = Field(None, title="Revision", description="Branch, tag or commit of a dataset on the hub.")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.:-]{1,80}$", title="Name", description="Begins the ids that are made. Left out: the file's name."
    )
    format: FileFormat | None = Field(None, title="Format", description="jsonl, csv or parquet. Left out: the file's suffix says it.")
    delimiter: str = Field(",", pattern=r'^[^"\r\n]$', title="Delimiter", description="What separates the cells of a CSV file.")
    skip_lines: int = Field(0, ge=0, le=100_000, title="Skipped lines", description="Lines before the header of a CSV file.")
    columns: Columns = Field(Columns(), title="Columns", description="Which column is which field.")
    constants: dict[Label, LabelValue] = Field(
        {}, title="Constants", description="Field -> value where the source has no column for it, or nothing in it."
    )
    values: dict[Label, Annotated[dict[str, LabelValue], BeforeValidator(_text_keys)]] = Field(
        {}, title="Values", description="Field -> {their value: our value}. A value that is not named stays as it is."
    )
    system: Literal["quarantine", "drop"] = Field(
        "quarantine", title="System turns", description="A row with a system turn: quarantine it, or drop the turn (and count it)."
    )
    last_answer: Literal["quarantine", "drop"] = Field(
        "quarantine",
        title="Last answer",
        description="One that ends with an answer: quarantine it, or drop what follows its last user turn.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "Source":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("name one of `path` and `dataset`")
        for only, fields in (("dataset", ("subset", "part", "revision")), ("path", ("format",))):
            for name in fields:
                if getattr(self, name) is not None and getattr(self, only) is None:
                    raise ValueError(f"{name}: is for a `{only}`")
        return self

    @property
    def place(self) -> str:
        """The path or id that names it."""
        return self.path or self.dataset or ""


def _as_list(value: Any) -> Any:
    several = value if isinstance(value, list | tuple) else [value]
    return [{"path": one} if isinstance(one, str) else one for one in several]


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_list)]
"""In a run file: a path, a mapping, or a list of these."""


def located(content: Any, change: Any) -> Any:
    """The content of a `prompts` field with `change(path)` for the path of each source; a hub id stays what it is."""
    if isinstance(content, list | tuple):
        return [located(one, change) for one in content]
    if isinstance(content, str):
        return change(content)
    if isinstance(content, dict):
        content = dict(content)
        if isinstance(path := content.get("path"), str):
            content["path"] = change(path)
        if isinstance(name := content.get("dataset"), str) and (name.startswith((".", "/", "~")) or os.path.isdir(change(name))):
            content["dataset"] = change(name)
    return content


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, or one part of a dataset. `left_out` counts the turns that its configuration drops."""

    source: Source
    path: str
    format: Literal["jsonl", "csv", "parquet", "dataset", "rows"]
    content: str
    """Hash of its bytes; of a dataset on the hub, its fingerprint."""
    rows: Any = None
    """The opened dataset, or a list of rows."""
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return self.path

    @property
    def identity(self) -> list[Any]:
        """What can change the prompts that are made of it."""
        return [self.source.model_dump(mode="json"), self.path, self.content]

    @property
    def name(self) -> str:
        """What the ids that are made begin with."""
        file = Path(self.path).name if self.source.path else self.source.place.strip("/")
        for suffix in (".gz", *SUFFIXES):
            file = file.removesuffix(suffix)
        return (
            self.source.name
            or "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_.") else "-" for letter in file)[:80]
        )


def source_files(source: Path | str | Source | Iterable[Source]) -> list[SourceFile]:
    """The files that sources name. Raises UserError when one of them names none."""
    if isinstance(source, Path | str):
        source = Source(path=str(source))
    several: Sequence[Source] = [source] if isinstance(source, Source) else list(source)
    return [file for one in several for file in (_files(one) if one.path is not None else _parts(one))]


def _files(source: Source) -> list[SourceFile]:
    root = Path(source.place)
    known = {suffix: kind for suffix, kind in SUFFIXES.items() if source.format in (None, kind)}
    files = sorted(file for file in root.iterdir() if file.name.endswith(tuple(known))) if os.path.isdir(root) else [root]
    if not files or not all(map(os.path.isfile, files)):
        raise UserError(f"{root}: no such prompt file, or a directory without {', '.join(f'*{suffix}' for suffix in known)} files.")
    for file in files:
        if _ESCAPED.search(str(file)):
            raise UserError(f"{str(file)!r}: the name is not UTF-8; rename the file.")
    return [SourceFile(source, str(file), source.format or _format(file), file_hash(file)) for file in files]


def _format(file: Path) -> FileFormat:
    for suffix, kind in SUFFIXES.items():
        if file.name.endswith(suffix):
            return kind
    raise UserError(f"{file}: format: the suffix {file.suffix!r} does not say it; name one of {', '.join(get_args(FileFormat))}.")


def _parts(source: Source) -> list[SourceFile]:
    import datasets  # imports pandas: a second that runs on files need not wait

    folder = Path(source.place)
    if not os.path.isdir(folder) and source.place.startswith((".", "/", "~")):
        raise UserError(f"{folder}: dataset: no such directory.")
    datasets.disable_progress_bars()
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(source.place, source.subset, revision=source.revision, cache_dir=str(cache_dir() / "datasets"))
    except Exception as error:
        raise UserError(f"{source.place}: dataset: cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    parts = dict(found) if isinstance(found, dict) else {source.part or "": found}
    if source.part is None and len(parts) > 1:
        raise UserError(f"{source.place}: part: the dataset has several; name one of {', '.join(parts)}.")
    part = source.part or next(iter(parts))
    if part not in parts:
        raise UserError(f"{source.place}: part: there is no {part!r}; name one of {', '.join(parts)}.")
    content = _folder_hash(folder) if folder.is_dir() else parts[part]._fingerprint
    return [SourceFile(source, f"{source.place}[{part}]" if part else source.place, "dataset", content, parts[part])]


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal. Raises UserError when it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _folder_hash(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256("".join(f"{file.relative_to(folder)} {file_hash(file)}\n" for file in files).encode()).hexdigest()
