"""Prompts in other formats: reading, mapping, and rows and files that cannot be used."""

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
from prompt_sources import LABELS, POLICY, SPECS, TEXT, all_prompts, loaded, only_reason, write_csv, write_jsonl, write_run_file

from cluster.errors import UserError
from flows.config import RunRequest, load_run
from tasks.importing import MAX_ROW_BYTES
from tasks.prompt_parts import field_of
from tasks.prompt_set import PromptSet, load_prompts
from tasks.prompts import prompt_hash
from tasks.store import Store

SHIPPED = [json.loads(line) for file in sorted((SPECS / "prompts").glob("*.jsonl")) for line in file.read_text().splitlines()]
CHAT = {"columns": {"messages": "chat"}, "constants": LABELS}


def _chats(path: Path, *chats: Any) -> dict[str, Any]:
    return CHAT | {"path": write_jsonl(path / "chats.jsonl", [{"chat": chat} for chat in chats])}


def _spoken(prompts: PromptSet) -> list[list[tuple[str, str]]]:
    return [[(turn.role, turn.content) for turn in prompt.messages] for prompt in all_prompts(prompts)]


def _as_csv(folder: Path) -> dict[str, Any]:
    return {"path": write_csv(folder / "all.csv", SHIPPED)}


def _as_csv_gz(folder: Path) -> dict[str, Any]:
    content = Path(write_csv(folder / "all.csv", SHIPPED)).read_bytes()
    (folder / "all.csv.gz").write_bytes(gzip.compress(content))
    return {"path": str(folder / "all.csv.gz")}


def _as_parquet(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.Table.from_pylist(SHIPPED, schema=_schema()), folder / "all.parquet", row_group_size=50)
    return {"path": str(folder / "all.parquet")}


def _as_mixed_directory(folder: Path) -> dict[str, Any]:
    mixed = folder / "mixed"
    mixed.mkdir()
    write_csv(mixed / "a.csv", SHIPPED[:100])
    pq.write_table(pa.Table.from_pylist(SHIPPED[100:150], schema=_schema()), mixed / "b.parquet")
    write_jsonl(mixed / "c.jsonl", SHIPPED[150:])
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
    assert all_prompts(prompts) == all_prompts(original) and prompts.capability == original.capability
    assert [prompt_hash(prompt.messages) for prompt in all_prompts(prompts)] == [
        prompt_hash(prompt.messages) for prompt in all_prompts(original)
    ]
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
    prompts = loaded(tmp_path, mapping | {"path": write_jsonl(tmp_path / "rows.jsonl", rows)})
    first, second = sorted(all_prompts(prompts), key=lambda prompt: prompt.id)
    assert (first.id, first.category, first.cell, first.group) == ("7", "harassment", "benign", "7")
    assert (first.ideal_verdict, first.ideal_clauses) == ("refuse", ("HA11", "HA2"))
    assert (second.category, second.ideal_verdict, second.ideal_clauses) == ("violence", "comply", ("VI3",))
    assert "rows.jsonl:3: ideal_clauses: Field required" in only_reason(prompts)


def test_ids_that_are_made_are_stable(tmp_path: Path):
    rows = [{"q": f"question number {number}"} for number in range(3)]
    first = all_prompts(loaded(tmp_path, TEXT | {"path": write_jsonl(tmp_path / "some set.jsonl", rows)}))
    (tmp_path / "other").mkdir()
    other = all_prompts(loaded(tmp_path, TEXT | {"path": write_csv(tmp_path / "other" / "some set.csv", rows[::-1])}))
    assert {prompt.id for prompt in first} == {prompt.id for prompt in other} and first[0].id.startswith("some-set-")
    named = all_prompts(loaded(tmp_path, TEXT | {"path": str(tmp_path / "some set.jsonl"), "name": "mine"}))
    assert named[0].id == first[0].id.replace("some-set-", "mine-") and named[0].group == named[0].id


def test_a_set_is_named_by_content_mapping_and_comparison(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "one question", "p": "another question"}])
    seen = {loaded(tmp_path, TEXT | {"path": path}).path}
    seen.add(loaded(tmp_path, TEXT | {"path": path, "columns": {"text": "p"}}).path)
    seen.add(loaded(tmp_path, TEXT | {"path": path, "constants": LABELS | {"split": "rl"}}).path)
    seen.add(loaded(tmp_path, TEXT | {"path": path}, overlap={"similarity": 0.5}).path)
    write_jsonl(tmp_path / "rows.jsonl", [{"q": "one other question", "p": "another question"}])
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
        assert expected in only_reason(prompts)


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
    assert "chats.jsonl:2: " + expected in only_reason(prompts)
    assert field_of(prompts.manifest["quarantined"][0]["reason"]) == "messages"


def test_an_unknown_category_and_a_wrong_label_are_quarantined(tmp_path: Path):
    rows = [{"q": "good"}, {"q": "bad", "c": "cooking"}, {"q": "worse", "v": "maybe"}]
    columns = {"text": "q", "category": "c", "ideal_verdict": "v"}
    prompts = loaded(tmp_path, {"path": write_jsonl(tmp_path / "x.jsonl", rows), "columns": columns, "constants": LABELS})
    reasons = [row["reason"] for row in prompts.manifest["quarantined"]]
    assert reasons[0] == "category: 'cooking' is not in the policy" and reasons[1].startswith("ideal_verdict: Input should be")
    assert {field: found["rows"] for field, found in prompts.manifest["reasons"].items()} == {"category": 1, "ideal_verdict": 1}


def test_text_that_is_not_utf_8_in_parquet_is_one_row_less(tmp_path: Path):
    column = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 4, 8], np.int32)), pa.py_buffer(b"goodcaf\xe9"))
    pq.write_table(pa.table({"q": column}), tmp_path / "x.parquet")
    assert "x.parquet:2: q: cannot be read" in only_reason(loaded(tmp_path, TEXT | {"path": str(tmp_path / "x.parquet")}))


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
    assert all_prompts(first)[0].id.startswith("some-questions-")


def test_paths_in_a_run_file_are_relative_to_it(tmp_path: Path):
    (tmp_path / "saved").mkdir()
    prompts = ["a.jsonl", {"path": "b.csv"}, {"dataset": "saved"}, {"dataset": "some/hub-id"}, {"dataset": "./gone"}]
    config = load_run(RunRequest(file=write_run_file(tmp_path, {"prompts": prompts, "overlap": {"benchmarks": "c.csv"}})))
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
        load_run(RunRequest(file=write_run_file(tmp_path, {"prompts": prompts})))
    assert all(word in str(error.value) for word in ["run.yaml", *words])
