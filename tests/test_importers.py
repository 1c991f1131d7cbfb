"""Prompts in other formats: reading, mapping, rows that cannot be used, near-duplicates, overlap with evaluation prompts."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from cluster.errors import UserError
from flows.cli import app
from flows.config import RunRequest, load_run
from tasks.duplicates import OverlapConfig, Rows, band_width, pairs_between, pairs_within, shingles
from tasks.importing import MAX_ROW_BYTES
from tasks.policy import load_policy
from tasks.prompt_parts import field_of
from tasks.prompt_set import PromptSet, load_prompts
from tasks.prompts import Prompt, prompt_hash
from tasks.sources import Source
from tasks.store import Store

SPECS = Path(__file__).parent.parent / "specs"
POLICY = load_policy(SPECS / "policies" / "base")
SHIPPED = [json.loads(line) for file in sorted((SPECS / "prompts").glob("*.jsonl")) for line in file.read_text().splitlines()]
LABELS = {"category": "harassment", "cell": "violation", "ideal_verdict": "refuse", "ideal_clauses": "HA11", "split": "sft"}
TEXT = {"columns": {"text": "q"}, "constants": LABELS}
CHAT = {"columns": {"messages": "chat"}, "constants": LABELS}


def loaded(root: Path, *sources: dict[str, Any], overlap: dict[str, Any] | None = None) -> PromptSet:
    """Sources as prompts under a root; the counts balance."""
    models = [Source.model_validate(source) for source in sources]
    prompts = load_prompts(Store(str(root / "root")), models, POLICY, OverlapConfig.model_validate(overlap or {}))
    for source in prompts.manifest["sources"]:
        assert source["rows"] == source["prompts"] + source["capability"] + source["quarantined"]
    assert sum(prompts.counts.values()) == sum(source["rows"] for source in prompts.manifest["sources"])
    assert not [wrong for file in prompts.manifest["files"] if (wrong := _damage(prompts, file))]
    return prompts


def _damage(prompts: PromptSet, file: dict[str, Any]) -> bool:
    return prompts.store.read_table(f"{prompts.path}/{file['path']}").num_rows != file["rows"]


def _all(prompts: PromptSet) -> list[Prompt]:
    return [prompt for split in ("sft", "rl", "eval") for prompt in prompts.prompts(split)]


def _jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _csv(path: Path, rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, restval="")
        writer.writeheader()
        writer.writerows({name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows)
    return str(path)


def _chats(path: Path, *chats: Any) -> dict[str, Any]:
    return CHAT | {"path": _jsonl(path / "chats.jsonl", [{"chat": chat} for chat in chats])}


def _spoken(prompts: PromptSet) -> list[list[tuple[str, str]]]:
    return [[(turn.role, turn.content) for turn in prompt.messages] for prompt in _all(prompts)]


def _reason(prompts: PromptSet) -> str:
    (row,) = prompts.manifest["quarantined"]
    return f"{row['file']}:{row['line']}: {row['reason']}"


def _as_csv(folder: Path) -> dict[str, Any]:
    return {"path": _csv(folder / "all.csv", SHIPPED)}


def _as_csv_gz(folder: Path) -> dict[str, Any]:
    content = Path(_csv(folder / "all.csv", SHIPPED)).read_bytes()
    (folder / "all.csv.gz").write_bytes(gzip.compress(content))
    return {"path": str(folder / "all.csv.gz")}


def _as_parquet(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.Table.from_pylist(SHIPPED, schema=_schema()), folder / "all.parquet", row_group_size=50)
    return {"path": str(folder / "all.parquet")}


def _as_mixed_directory(folder: Path) -> dict[str, Any]:
    mixed = folder / "mixed"
    mixed.mkdir()
    _csv(mixed / "a.csv", SHIPPED[:100])
    pq.write_table(pa.Table.from_pylist(SHIPPED[100:150], schema=_schema()), mixed / "b.parquet")
    _jsonl(mixed / "c.jsonl", SHIPPED[150:])
    (mixed / "README.md").write_text("not prompts")
    return {"path": str(mixed)}


def _as_saved_dataset(folder: Path) -> dict[str, Any]:
    import datasets

    datasets.Dataset(pa.Table.from_pylist(SHIPPED, schema=_schema())).save_to_disk(folder / "saved")
    return {"dataset": str(folder / "saved")}


def _as_dataset_folder(folder: Path) -> dict[str, Any]:
    (folder / "repository" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(SHIPPED, schema=_schema()), folder / "repository" / "data" / "train-00000.parquet")
    return {"dataset": str(folder / "repository"), "part": "train"}


def _schema() -> pa.Schema:
    names = dict.fromkeys(name for row in SHIPPED for name in row)
    kinds = {"messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), "ideal_clauses": pa.list_(pa.string())}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in names])


@pytest.mark.parametrize(
    "convert",
    [_as_csv, _as_csv_gz, _as_parquet, _as_mixed_directory, _as_saved_dataset, _as_dataset_folder],
    ids=lambda convert: convert.__name__.removeprefix("_as_"),
)
def test_every_format_gives_the_shipped_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Callable[[Path], dict]):
    monkeypatch.setenv("SPECMILL_CACHE", str(tmp_path / "cache"))
    original = load_prompts(Store(str(tmp_path / "root")), SPECS / "prompts", POLICY)
    source = convert(tmp_path)
    prompts = loaded(tmp_path, source)
    assert _all(prompts) == _all(original) and prompts.capability == original.capability
    assert [prompt_hash(prompt.messages) for prompt in _all(prompts)] == [prompt_hash(prompt.messages) for prompt in _all(original)]
    assert prompts.hash == original.hash and prompts.path != original.path
    assert loaded(tmp_path, source).path == prompts.path


QUESTION = {"role": "user", "content": "Who is at the door?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"where": "door"}'}}


@pytest.mark.parametrize(
    ("chat", "spoken"),
    [
        ([QUESTION], [("user", "Who is at the door?")]),
        (json.dumps([QUESTION]), [("user", "Who is at the door?")]),
        ("[1] is a footnote, not a chat", [("user", "[1] is a footnote, not a chat")]),
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}, {"from": "human", "value": "Bye"}],
         [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")]),
        ([QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "A cat."}, {"role": "user", "content": "Let it in."}],
         [("user", "Who is at the door?"), ("assistant", '{"name": "look", "arguments": {"where": "door"}}'), ("tool", "A cat."),
          ("user", "Let it in.")]),
        ([QUESTION, {"role": "assistant", "content": "I look.", "function_call": {"name": "look", "arguments": "{"}},
          {"role": "function", "name": "look", "content": "A dog."}, {"role": "user", "content": "Oh."}],
         [("user", "Who is at the door?"), ("assistant", 'I look.\n{"name": "look", "arguments": "{"}'), ("tool", "A dog."),
          ("user", "Oh.")]),
        ([{"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]}], [("user", "One\ntwo")]),
    ],
    ids=["openai", "json-text", "plain", "sharegpt", "tools", "function-call", "parts"],
)  # fmt: skip
def test_chats_become_turns(tmp_path: Path, chat: Any, spoken: list[tuple[str, str]]):
    assert _spoken(loaded(tmp_path, _chats(tmp_path, chat))) == [spoken]


def test_tool_turns_survive_parquet(tmp_path: Path):
    """Where every struct has every field, a call without content and an answer without call are full of nulls."""
    chat = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "A cat."}, QUESTION]
    pq.write_table(pa.Table.from_pylist([{"chat": chat}]), tmp_path / "chats.parquet")
    (spoken,) = _spoken(loaded(tmp_path, CHAT | {"path": str(tmp_path / "chats.parquet")}))
    assert [role for role, _ in spoken] == ["user", "assistant", "tool", "user"] and '"door"' in spoken[1][1]


SYSTEM = {"role": "system", "content": "Be kind."}
ANSWERED = [QUESTION, {"role": "assistant", "content": "A cat."}]


def test_system_turns_and_last_answers_are_quarantined_or_dropped_and_counted(tmp_path: Path):
    source = _chats(
        tmp_path, [QUESTION], [SYSTEM, {"role": "user", "content": "Hello"}], [*ANSWERED, {"role": "user", "content": "More"}, ANSWERED[1]]
    )
    prompts = loaded(tmp_path, source)
    reasons = [row["reason"] for row in prompts.manifest["quarantined"]]
    assert prompts.counts["prompts"] == 1 and len(reasons) == 2
    assert "messages.0.role: a system turn" in reasons[0] and "end with a user turn" in reasons[1]
    prompts = loaded(tmp_path, source | {"system": "drop", "last_answer": "drop"})
    assert prompts.counts["prompts"] == 3
    assert prompts.manifest["sources"][0]["left_out"] == {"system turns": 1, "turns after the last user turn": 1}


def test_columns_values_and_constants_make_labels(tmp_path: Path):
    rows = [
        {"no": 7, "q": "first question", "hazard": "dfm", "safe": False, "extra": "ignored"},
        {"no": 8, "q": "second question", "hazard": "vcr", "safe": True},
        {"no": 9, "q": "third question", "safe": True},
    ]
    mapping = yaml.safe_load("""
        columns: {id: 'no', text: q, category: hazard, ideal_verdict: safe, ideal_clauses: hazard}
        constants: {cell: benign, category: violence}
        values:
          category: {dfm: harassment, vcr: violence}
          ideal_verdict: {true: comply, false: refuse}
          ideal_clauses: {dfm: [HA11, HA2], vcr: VI3}
    """)
    prompts = loaded(tmp_path, mapping | {"path": _jsonl(tmp_path / "rows.jsonl", rows)})
    first, second = sorted(_all(prompts), key=lambda prompt: prompt.id)
    assert (first.id, first.category, first.cell, first.group) == ("7", "harassment", "benign", "7")
    assert (first.ideal_verdict, first.ideal_clauses) == ("refuse", ("HA11", "HA2"))
    assert (second.category, second.ideal_verdict, second.ideal_clauses) == ("violence", "comply", ("VI3",))
    assert "rows.jsonl:3: ideal_clauses: Field required" in _reason(prompts)


def test_ids_that_are_made_are_stable(tmp_path: Path):
    rows = [{"q": f"question number {number}"} for number in range(3)]
    first = _all(loaded(tmp_path, TEXT | {"path": _jsonl(tmp_path / "some set.jsonl", rows)}))
    (tmp_path / "other").mkdir()
    other = _all(loaded(tmp_path, TEXT | {"path": _csv(tmp_path / "other" / "some set.csv", rows[::-1])}))
    assert {prompt.id for prompt in first} == {prompt.id for prompt in other} and first[0].id.startswith("some-set-")
    named = _all(loaded(tmp_path, TEXT | {"path": str(tmp_path / "some set.jsonl"), "name": "mine"}))
    assert named[0].id == first[0].id.replace("some-set-", "mine-") and named[0].group == named[0].id


def test_a_set_is_named_by_content_mapping_and_comparison(tmp_path: Path):
    path = _jsonl(tmp_path / "rows.jsonl", [{"q": "one question", "p": "another question"}])
    seen = {loaded(tmp_path, TEXT | {"path": path}).path}
    seen.add(loaded(tmp_path, TEXT | {"path": path, "columns": {"text": "p"}}).path)
    seen.add(loaded(tmp_path, TEXT | {"path": path, "constants": LABELS | {"split": "rl"}}).path)
    seen.add(loaded(tmp_path, TEXT | {"path": path}, overlap={"similarity": 0.5}).path)
    _jsonl(tmp_path / "rows.jsonl", [{"q": "one other question", "p": "another question"}])
    seen.add(loaded(tmp_path, TEXT | {"path": path}).path)
    assert len(seen) == 5


def test_a_byte_order_mark_and_skipped_lines(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfversion 3,,\nq;x\nwhat is it;1\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"q": "and that"}\n')
    csv_source = TEXT | {"path": str(tmp_path / "a.csv"), "skip_lines": 1, "delimiter": ";"}
    assert sorted(_spoken(loaded(tmp_path, csv_source, TEXT | {"path": str(tmp_path / "b.jsonl")}))) == [
        [("user", "and that")], [("user", "what is it")],
    ]  # fmt: skip


GOOD = b'{"q": "a good question"}\n'
BAD_ROWS: dict[str, tuple[str, bytes, str]] = {
    "latin-1 jsonl": ("x.jsonl", GOOD + '{"q": "caf\u00e9"}\n'.encode("latin-1"), r"x.jsonl:2: not UTF-8 at byte 10 (0xe9)"),
    "latin-1 csv": ("x.csv", "q,r\ngood,1\ncaf\u00e9,2\n".encode("latin-1"), "x.csv:3: q: not UTF-8 (byte 0xe9)"),
    "ragged csv": ("x.csv", b"q,r\ngood,1\nbad\n", "x.csv:3: 1 cells, but the header names 2 columns"),
    "too many cells": ("x.csv", b"q,r\ngood,1\nbad,2,3\n", "x.csv:3: 3 cells"),
    "open quote": ("x.csv", b'q,r\ngood,1\n"bad,2\n', "x.csv:3: not CSV: unexpected end of data"),
    "text after a quote": ("x.csv", b'q,r\ngood,1\n"bad"s,2\n', "x.csv:3: not CSV"),
    "empty cell": ("x.csv", b"q,r\ngood,1\n,2\n", "x.csv:3: text: nothing in the column 'q'"),
    "nul in csv": ("x.csv", b"q,r\ngood,1\nb\x00d,2\n", "x.csv:3: messages.0.content: NUL"),
    "nul in jsonl": ("x.jsonl", GOOD + b'{"q": "b\x00d"}\n', "x.jsonl:2: NUL at byte 8"),
    "escaped nul": ("x.jsonl", GOOD + b'{"q": "b\\u0000d"}\n', "x.jsonl:2: messages.0.content: NUL at character 1"),
    "lone surrogate": ("x.jsonl", GOOD + b'{"q": "b\\ud800d"}\n', "x.jsonl:2: "),
    "huge row": ("x.jsonl", GOOD + b'{"q": "' + b"long " * MAX_ROW_BYTES + b'"}\n', "x.jsonl:2: the row is longer than 4 MiB"),
    "huge line of csv": ("x.csv", b"q,r\ngood,1\n" + b"long " * MAX_ROW_BYTES + b",2\n", "x.csv:3: not CSV: the row is longer than 4 MiB"),
    "number for text": ("x.jsonl", GOOD + b'{"q": 5}\n', "x.jsonl:2: text: expected text, found int"),
    "no such column in a row": ("x.jsonl", GOOD + b'{"p": "x"}\n', "x.jsonl:2: text: nothing in the column 'q'"),
    "a list": ("x.jsonl", GOOD + b"[1]\n", "x.jsonl:2: expected an object, found list"),
    "deeply nested": ("x.jsonl", GOOD + b"[" * 100_000 + b"\n", "x.jsonl:2: not JSON"),
    "two columns of one name": ("x.csv", b"q,q\ngood,1\n", "two columns are named 'q'"),
    "missing column": ("x.csv", b"p,r\ngood,1\n", "x.csv: columns.text: no column 'q'; there are 'p', 'r'"),
    "empty csv": ("x.csv", b"", "x.csv: is empty"),
    "empty jsonl": ("x.jsonl", b"", "x.jsonl: not one usable prompt (0 rows"),
    "utf-16": ("x.jsonl", GOOD.decode().encode("utf-16"), "x.jsonl: not UTF-8: byte 0 is 0xff"),
    "latin-1 header": ("x.csv", "q,caf\u00e9\ngood,1\n".encode("latin-1"), "x.csv: not UTF-8: byte 0xe9 in the names"),
    "truncated gzip": ("x.jsonl.gz", gzip.compress(GOOD)[:-9], "x.jsonl.gz: cannot be read"),
    "no parquet": ("x.parquet", b"PAR1 and no more", "x.parquet: not a readable Parquet file"),
    "empty parquet": ("x.parquet", b"", "x.parquet: not a readable Parquet file"),
    "unknown format": ("x.xml", b"<q>good</q>", "x.xml: format: the suffix '.xml' does not say it; name one of jsonl, csv, parquet"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_what_cannot_be_read_is_said_with_file_and_field(tmp_path: Path, kind: str):
    """A bad row is quarantined and the others are read; a file that cannot be read at all stops the run."""
    name, content, expected = BAD_ROWS[kind]
    (tmp_path / name).write_bytes(content)
    try:
        prompts = loaded(tmp_path, TEXT | {"path": str(tmp_path / name)})
    except UserError as error:
        assert expected in str(error)
    else:
        assert prompts.counts == {"prompts": 1, "capability": 0, "quarantined": 1}
        assert expected in _reason(prompts)


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        (5, "messages: expected text or a list of turns, found int"),
        (["Hello"], "messages.0: expected a turn with role and content, found str"),
        ([{"role": "narrator", "content": "x"}], "messages.0.role: Input should be 'user'"),
        ([{"role": ["user"], "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": {"text": "x"}}], "messages.0.content: Input should be a valid string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content: a part of type 'image_url'"),
        ([QUESTION, {"role": "assistant", "tool_calls": 5}, QUESTION], "messages.1.tool_calls: expected a list, found int"),
        ([QUESTION, {"role": "assistant", "tool_calls": [{"id": 1}]}, QUESTION], "messages.1.tool_calls: a call without the name"),
        ([], "messages: Tuple should have at least 1 item"),
    ],
)
def test_chats_of_the_wrong_shape_are_quarantined(tmp_path: Path, chat: Any, expected: str):
    prompts = loaded(tmp_path, _chats(tmp_path, [QUESTION], chat))
    assert "chats.jsonl:2: " + expected in _reason(prompts)
    assert field_of(prompts.manifest["quarantined"][0]["reason"]) == "messages"


def test_an_unknown_category_and_a_wrong_label_are_quarantined(tmp_path: Path):
    rows = [{"q": "good"}, {"q": "bad", "c": "cooking"}, {"q": "worse", "v": "maybe"}]
    columns = {"text": "q", "category": "c", "ideal_verdict": "v"}
    prompts = loaded(tmp_path, {"path": _jsonl(tmp_path / "x.jsonl", rows), "columns": columns, "constants": LABELS})
    reasons = [row["reason"] for row in prompts.manifest["quarantined"]]
    assert reasons[0] == "category: 'cooking' is not in the policy" and reasons[1].startswith("ideal_verdict: Input should be")
    assert {field: found["rows"] for field, found in prompts.manifest["reasons"].items()} == {"category": 1, "ideal_verdict": 1}


def test_text_that_is_not_utf_8_in_parquet_is_one_row_less(tmp_path: Path):
    column = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 4, 8], np.int32)), pa.py_buffer(b"goodcaf\xe9"))
    pq.write_table(pa.table({"q": column}), tmp_path / "x.parquet")
    assert "x.parquet:2: q: cannot be read" in _reason(loaded(tmp_path, TEXT | {"path": str(tmp_path / "x.parquet")}))


def test_a_truncated_parquet_file_stops_the_run(tmp_path: Path):
    content = Path(_as_parquet(tmp_path)["path"]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut.parquet: not a readable Parquet file"):
        loaded(tmp_path, {"path": str(tmp_path / "cut.parquet")})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "DIR"}, r"no such prompt file, or a directory without \*.jsonl"),
        ({"path": "DIR/nothing.csv"}, "no such prompt file"),
        ({"dataset": "DIR/nothing"}, "dataset: no such directory"),
        ({"dataset": "DIR"}, "dataset: cannot be read"),
    ],
)
def test_a_source_without_files_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, str], expected: str):
    monkeypatch.setenv("SPECMILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=expected):
        loaded(tmp_path, {name: place.replace("DIR", str(tmp_path / "empty")) for name, place in source.items()})


def test_a_dataset_with_several_parts_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setenv("SPECMILL_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_list([{"q": "one question"}, {"q": "two questions"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match="part: the dataset has several; name one of train, test"):
        loaded(tmp_path, TEXT | {"dataset": str(tmp_path / "both")})
    with pytest.raises(UserError, match="part: there is no 'dev'"):
        loaded(tmp_path, TEXT | {"dataset": str(tmp_path / "both"), "part": "dev"})
    with pytest.raises(UserError, match=r"columns.text: no column 'p'; there are 'q'"):
        loaded(tmp_path, TEXT | {"dataset": str(tmp_path / "both"), "part": "test", "columns": {"text": "p"}})
    assert loaded(tmp_path, TEXT | {"dataset": str(tmp_path / "both"), "part": "test"}).counts["prompts"] == 2


def test_a_dataset_of_the_hub_is_known_by_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = []

    def load_dataset(*names: Any, **options: Any) -> Any:
        asked.append((*names, options["revision"]))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([{"q": f"question of {options['revision']}"}])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = TEXT | {"dataset": "some/questions", "subset": "en", "revision": "v1"}
    first, second = loaded(tmp_path, source), loaded(tmp_path, source | {"revision": "v2"})
    assert asked == [("some/questions", "en", "v1"), ("some/questions", "en", "v2")]
    assert first.path != second.path and first.manifest["sources"][0]["file"] == "some/questions[train]"
    assert _all(first)[0].id.startswith("some-questions-")


FOX = "the quick brown fox jumps over the lazy dog while the old farmer counts his seven sleepy sheep behind the red barn at dusk"
HEN = "please explain in plain words how compound interest works on a savings account that pays two percent each year"


@pytest.mark.parametrize(("config", "kept"), [("report", 3), ("drop", 2), ("off", 3)])
def test_near_duplicates_are_found_and_the_first_stays(tmp_path: Path, config: str, kept: int):
    rows = [{"q": FOX}, {"q": HEN}, {"q": FOX.upper().replace("DUSK", "dawn!")}]
    prompts = loaded(tmp_path, TEXT | {"path": _jsonl(tmp_path / "x.jsonl", rows)}, overlap={"duplicates": config})
    assert prompts.counts == {"prompts": kept, "capability": 0, "quarantined": 3 - kept}
    assert [prompt.messages[0].content for prompt in _all(prompts)][:2] == [FOX, HEN]
    found = prompts.manifest["overlap"]
    assert found["near_duplicates"] == (config != "off") and found["dropped"] == (config == "drop")
    if config != "off":
        (example,) = found["examples"]
        assert example["resembles"] == _all(prompts)[0].id and example["line"] == 3 and 0.8 < example["similarity"] < 1
        (file,) = [file["path"] for file in prompts.manifest["files"] if file["path"].startswith("overlap/")]
        assert prompts.store.read_table(f"{prompts.path}/{file}").to_pylist() == [example]
    if config == "drop":
        assert "x.jsonl:3: near-duplicate: 0.9" in _reason(prompts) and "x.jsonl:1)" in _reason(prompts)


@pytest.mark.parametrize(("config", "kept"), [("report", 3), ("drop", 2)])
def test_training_rows_like_evaluation_prompts(tmp_path: Path, config: str, kept: int):
    """Also those that come before the evaluation prompt, whose similar evaluation prompts stay."""
    rows = [{"q": FOX + " again", "s": "sft"}, {"q": HEN, "s": "sft"}, {"q": FOX, "s": "eval"}]
    source = {"path": _jsonl(tmp_path / "x.jsonl", rows), "columns": {"text": "q", "split": "s"}, "constants": LABELS}
    prompts = loaded(tmp_path, source, overlap={"contamination": config})
    assert (prompts.counts["prompts"], prompts.size("eval")) == (kept, 1)
    assert prompts.manifest["overlap"]["contaminated"] == 1 and prompts.manifest["overlap"]["near_duplicates"] == 0
    if config == "drop":
        (evaluated,) = prompts.prompts("eval")
        assert f"x.jsonl:1: contamination: 0.96 like the evaluation prompt {evaluated.id!r}" in _reason(prompts)


def test_rows_like_an_external_benchmark_are_dropped(tmp_path: Path):
    rows = [{"q": FOX}, {"q": HEN}]
    _csv(tmp_path / "bench.csv", [{"question": HEN + " or so"}, {"question": ""}, {"question": "unrelated words entirely"}])
    benchmark = {"path": str(tmp_path / "bench.csv"), "columns": {"text": "question"}}
    source = TEXT | {"path": _jsonl(tmp_path / "x.jsonl", rows)}
    prompts = loaded(tmp_path, source, overlap={"contamination": "drop", "benchmarks": benchmark})
    assert "x.jsonl:2: contamination: 0.89 like the evaluation prompt 'bench-" in _reason(prompts) and "bench.csv:2)" in _reason(prompts)
    (described,) = prompts.manifest["overlap"]["benchmarks"]
    assert (described["rows"], described["unusable"]) == (3, 1) and "bench.csv:3: text: nothing" in described["first_reason"]
    with pytest.raises(UserError, match=r"overlap.benchmarks: .*not one usable prompt"):
        loaded(tmp_path, source, overlap={"benchmarks": {"path": _jsonl(tmp_path / "none.jsonl", [{"q": 5}]), "columns": {"text": "q"}}})


def _rows(texts: list[str]) -> Rows:
    rows = Rows(3)
    rows.add([{"messages": [{"content": text}]} for text in texts])
    return rows


def test_pairs_are_those_of_comparing_all():
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(300, 40).astype(str)) for _ in range(300)]
    texts += [text.replace(text.split()[place], "changed") for place in (0, 20) for text in texts[:100]]
    texts += [texts[0]] * 50
    rows, grams = _rows(texts), [shingles([{"content": text}], 3) for text in texts]
    alike = {
        (left, right)
        for right in range(len(texts))
        for left in range(right)
        if len(grams[left] & grams[right]) / len(grams[left] | grams[right]) >= 0.8
    }
    found = {pair[:2] for pair in pairs_within(rows, 0.8)}
    assert found <= alike and {right for _, right in found} >= {right for left, right in alike if left < 100}
    some, references = np.arange(300, len(texts)), np.arange(300)
    assert {pair[:2] for pair in pairs_between(rows, some, rows, references, 0.8)} == {
        (right, left) for left, right in alike if left < 300 <= right
    }


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_hardly_miss_a_pair_at_the_threshold(threshold: float):
    width = band_width(threshold)
    assert width >= 1 and (1 - threshold**width) ** (128 // width) <= 0.006


def test_shingles_of_short_texts_and_of_scripts_without_spaces():
    assert shingles([{"content": "Stop!"}], 3) == {"stop"}
    assert shingles([{"content": "?!"}], 3) == {"?!"}
    assert shingles([{"content": "天気はどう"}], 3) == {"天 気 は", "気 は ど", "は ど う"}
    assert not pairs_within(Rows(3), 0.8)


def _run_file(folder: Path, content: dict[str, Any]) -> str:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "policy": str(SPECS / "policies" / "base"), **content}))
    return str(file)


def test_paths_in_a_run_file_are_relative_to_it(tmp_path: Path):
    (tmp_path / "saved").mkdir()
    prompts = ["a.jsonl", {"path": "b.csv"}, {"dataset": "saved"}, {"dataset": "some/hub-id"}, {"dataset": "./gone"}]
    config = load_run(RunRequest(file=_run_file(tmp_path, {"prompts": prompts, "overlap": {"benchmarks": "c.csv"}})))
    here = [str(tmp_path / name) for name in ("a.jsonl", "b.csv", "saved")]
    assert [source.place for source in config.prompts] == [*here, "some/hub-id", str(tmp_path / "gone")]
    assert config.overlap.benchmarks[0].place == str(tmp_path / "c.csv")
    assert "overlap" not in config.parameters()


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"path": "a.csv", "columns": {"txt": "q"}}, ["prompts.0.columns.txt", "unknown field"]),
        ({"path": "a.csv", "columns": {"category": "c"}}, ["prompts.0.columns", "`messages` and `text`"]),
        ({"path": "a.csv", "dataset": "b"}, ["prompts.0", "one of `path` and `dataset`"]),
        ({"path": "a.csv", "part": "train"}, ["prompts.0", "part: is for a `dataset`"]),
        ({"path": "a.csv", "constants": {"colour": "red"}}, ["prompts.0.constants.colour"]),
        ({"path": "a.csv", "format": "xml"}, ["prompts.0.format", "'jsonl', 'csv' or 'parquet'"]),
        ([], ["prompts", "at least 1 item"]),
        (5, ["prompts.0"]),
    ],
)
def test_mistakes_in_a_mapping_name_the_field(tmp_path: Path, prompts: Any, words: list[str]):
    with pytest.raises(UserError) as error:
        load_run(RunRequest(file=_run_file(tmp_path, {"prompts": prompts})))
    assert all(word in str(error.value) for word in ["run.yaml", *words])


def test_the_command_shows_sources_splits_reasons_and_overlap(tmp_path: Path):
    rows = [{"q": FOX, "s": "sft"}, {"q": FOX + " again", "s": "sft"}, {"q": FOX + " now", "s": "eval"}, {"q": HEN, "s": "dev"}]
    _jsonl(tmp_path / "x.jsonl", rows)
    prompts = {"path": "x.jsonl", "columns": {"text": "q", "split": "s"}, "constants": LABELS}
    file = _run_file(tmp_path, {"prompts": prompts, "overlap": {"duplicates": "drop"}})
    shown = CliRunner().invoke(app, ["prompts", "check", file, "--root", str(tmp_path / "root")])
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    assert f"{tmp_path}/x.jsonl 4 2 0 2" in lines and "harassment 1 0 1" in lines
    assert "1 near-duplicates, 2 rows like evaluation prompts, 1 dropped" in lines
    assert any(line.startswith("split 1 ") and "x.jsonl:4" in line for line in lines)
    assert any(line.startswith("near-duplicate 1 ") for line in lines)
    assert any(line.startswith("contamination: ") and "x.jsonl:3)" in line for line in lines)


def test_ailuminate_and_advbench(tmp_path: Path, test_data: Path):
    """Three of the twelve hazards are mapped to categories; rows of the others are quarantined, each with its reason."""
    source = {
        "path": str(test_data / "ailuminate-demo" / "airr_official_1.0_demo_en_us_prompt_set_release.csv"),
        "columns": {"id": "release_prompt_id", "text": "prompt_text", "category": "hazard", "ideal_clauses": "hazard"},
        "constants": {"cell": "violation", "ideal_verdict": "refuse"},
        "values": {
            "category": {"dfm": "harassment", "hte": "harassment", "vcr": "violence"},
            "ideal_clauses": {"dfm": "HA11", "hte": "HA11", "vcr": "VI10"},
        },
    }
    benchmark = {"path": str(test_data / "advbench"), "columns": {"text": "goal"}}
    prompts = loaded(tmp_path, source, overlap={"duplicates": "drop", "contamination": "drop", "benchmarks": benchmark})
    assert sum(prompts.counts.values()) == 1100 and prompts.manifest["overlap"]["benchmarks"][0]["unusable"] == 0
    assert prompts.counts["prompts"] + prompts.manifest["overlap"]["dropped"] == 300
    assert {part.category for part in prompts.parts} == {"harassment", "violence"}


def test_gsm8k_as_benchmark_of_itself_and_moderation_release(tmp_path: Path, test_data: Path):
    train = {"path": str(test_data / "gsm8k" / "train_sample_1500.jsonl"), "columns": {"text": "question"}}
    flagged = {
        "path": str(test_data / "moderation-release" / "samples-1680.jsonl.gz"),
        "columns": {"text": "prompt", "ideal_verdict": "HR"},
        "constants": LABELS | {"ideal_clauses": "HA11"},
        "values": {"ideal_verdict": {"0": "comply", "1": "refuse"}},
    }
    prompts = loaded(tmp_path, flagged, train | {"constants": LABELS}, overlap={"contamination": "drop", "benchmarks": train})
    flagged_rows, train_rows = prompts.manifest["sources"]
    assert (flagged_rows["rows"], train_rows["rows"]) == (1680, 1500)
    assert flagged_rows["prompts"] and (train_rows["prompts"], train_rows["quarantined"]) == (0, 1500)
