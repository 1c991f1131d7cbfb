"""The table of bad input: whatever a person hands in, one message that names file and field, the right exit code, no traceback.

Every case goes through the command itself. What prompts of other formats can be is in test_importers.py, what a root in test_bad_root.py.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_run import BUNDLE, ENGINE, RUN, Command, category, row, told, write_run

from cluster.models import resolve_model

HEAD = "version: 1\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def with_run(**changes: Any) -> bytes:
    return yaml.safe_dump(RUN | changes).encode()


RUN_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["expected a mapping", "NoneType"]),
    "a list": (b"- version: 1\n", ["expected a mapping", "list"]),
    "a number": (b"1\n", ["expected a mapping", "int"]),
    "latin-1": ("version: 1\nname: caf\u00e9\n".encode("latin-1"), ["not UTF-8", "byte 20"]),
    "utf-16": ((HEAD + "name: x\n").encode("utf-16"), ["not UTF-8", "byte 0"]),
    "NUL": (b"version: 1\nname: a\x00b\n", ["cannot be read", "#x0000"]),
    "escaped NUL": (b'version: 1\npolicy: "a\\0b"\n', ["a control character", "a\\x00b", "line 2"]),
    "half a character": (b'version: 1\npolicy: "\\ud800"\n', ["cannot be read", "Unicode character", "line 2"]),
    "tabs": (b"version: 1\ngenerate:\n\tn: 2\n", ["cannot be read", "line 3"]),
    "a key twice": (b"version: 1\ngenerate: {n: 2, n: 3}\n", ["'n' is there twice", "line 2"]),
    "a key twice at the top": (b"version: 1\nname: a\nname: b\n", ["'name' is there twice", "line 3"]),
    "aliases of aliases": (f"{HEAD}{BOMB}".encode(), ["more than 100,000 values"]),
    "merged aliases of aliases": (f"{HEAD}{BOMB}policy:\n  <<: *i\n".encode(), ["more than 100,000 values"]),
    "an alias of what holds it": (b"version: 1\nprompts: &all [*all]\n", ["more than 100,000 values"]),
    "no end of brackets": (HEAD.encode() + b"name: " + b"[" * 1000, ["nested too deeply"]),
    "a tag": (b"version: 1\nname: !!binary aGVsbG8=\n", ["the tag", "binary", "line 2"]),
    "a tag of Python's": (b"version: 1\nname: !!python/object/apply:os.system [ls]\n", ["the tag", "line 2"]),
    "a set": (b"version: 1\nprompts: !!set {a, b}\n", ["the tag", "set", "line 2"]),
    "a list as key": (b"version: 1\n? [a]\n: b\n", ["a key that is no text", "line 2"]),
    "no number": (b"version: 1\nlease_seconds: !!float many\n", ["cannot be read", "many"]),
    "endless digits": (b"version: 1\nlease_seconds: 0x" + b"f" * 5000, ["more than 40 digits", "line 2"]),
    "two documents": (b"version: 1\n---\nversion: 1\n", ["cannot be read", "document"]),
    "no version": (b"name: x\n", ["version", "missing"]),
    "another version": (b"version: 2\n", ["version: Input should be 1", "2"]),
    "an unknown field": (with_run(colour="red"), ["colour: unknown field"]),
    "an unknown field within": (with_run(judge={"engine": ENGINE | {"gpu": 1}}), ["judge.engine.gpu: unknown field"]),
    "text for a number": (with_run(lease_seconds="long"), ["lease_seconds", "long"]),
    "a number for a group": (with_run(select=5), ["select", "found 5"]),
    "nothing for a group": (with_run(select=None), ["select", "None"]),
    "NaN": (with_run(lease_seconds=float("nan")), ["lease_seconds", "finite"]),
    "infinity": (with_run(rl={"training": {"learning_rate": float("inf")}}), ["rl.training.learning_rate", "finite"]),
    "NaN in an engine": (with_run(judge={"engine": ENGINE | {"kv_cache_gib": float("nan")}}), ["judge.engine.kv_cache_gib", "finite"]),
    "too small a number": (with_run(judge={"engine": ENGINE, "k": 0}), ["judge.k", "greater than or equal to 1"]),
    "more samples than there can be": (with_run(generate={"engine": ENGINE, "n": 10**9}), ["generate.n", "less than or equal to 1000"]),
    "a threshold out of range": (with_run(select={"threshold": 9}), ["select.threshold", "less than or equal to 5"]),
    "a category's threshold out of range": (with_run(select={"category_threshold": {"pets": 300}}), ["select.category_threshold.pets"]),
    "a category's threshold that is text": (with_run(select={"category_threshold": {"pets": "low"}}), ["category_threshold.pets", "low"]),
    "a quotation mark between cells": (with_run(prompts={"path": "a.csv", "delimiter": '"'}), ["prompts.0.delimiter"]),
    "its own parent": (b"version: 1\nextends: run.yaml\n", ["extends: run.yaml extends another file itself"]),
    "several parents": (b"version: 1\nextends: [a.yaml, b.yaml]\n", ["extends: expected the path of one"]),
    "a missing parent": (b"version: 1\nextends: gone.yaml\n", ["gone.yaml: no such file"]),
    "a folder as parent": (b"version: 1\nextends: policy\n", ["policy: cannot be read"]),
    "a grandparent": (b"version: 1\nextends: parent.yaml\n", ["extends: parent.yaml extends another file itself"]),
    "an address without scheme": (
        with_run(judge={"engine": {"backend": "openai", "revision": "1", "endpoint": {"url": "example.com/v1"}}}),
        ["judge.engine.endpoint.url", "http"],
    ),
    "an address that is none": (
        with_run(judge={"engine": {"backend": "openai", "revision": "1", "endpoint": {"url": "http://[::1"}}}),
        ["judge.engine.endpoint.url"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUN_FILES)
def test_a_bad_run_file(specmill: Command, run_file: Path, kind: str):
    content, words = RUN_FILES[kind]
    run_file.with_name("parent.yaml").write_text("version: 1\nextends: run.yaml\n")
    run_file.write_bytes(content)
    told(
        specmill("plan", run_file, "--root", run_file.parent / "root"),
        2,
        [".yaml" * ("folder as" not in kind), *words],
        1 + ("quotation" in kind),
    )


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "a field without value": (["--set", "judge.k"], ["--set 'judge.k'", "field=value"]),
    "a value without field": (["--set", "=5"], ["--set '=5'", "field=value"]),
    "a value that is no YAML": (["--set", "judge.k=["], ["--set 'judge.k=['", "not YAML"]),
    "endless brackets": (["--set", "judge.k=" + "[" * 1000], ["--set", "not YAML"]),
    "a field of a field": (["--set", "judge.k.x=5"], ["--set judge.k.x", "'k' is not a group"]),
    "an unknown field": (["--set", "judge.m=5"], ["run.yaml: judge.m: unknown field"]),
    "a field without name": (["--set", "judge..k=5"], ["run.yaml: judge.", "unknown field"]),
    "an empty root": (["--root", ""], ["run.yaml: root", "at least 1 character"]),
    "an unknown model": (["--set", "generate.engine.model=./nowhere"], ["model './nowhere'", "no such directory"]),
    "a model of another kind": (["--set", "generate.engine.model={folder}"], ["model", "has no config.json"]),
    "a policy that is not there": (["--set", "policy={folder}/gone"], ["gone/bundle.yaml: no such file"]),
    "a policy that is a file": (["--set", "policy={folder}/run.yaml"], ["run.yaml/bundle.yaml: cannot be read"]),
    "prompts that are not there": (["--set", "prompts={folder}/gone.jsonl"], ["gone.jsonl: no such prompt file"]),
    "prompts with an endless name": (["--set", "prompts=" + 5000 * "x"], ["xxx", "no such prompt file"]),
    "a folder without prompts": (["--set", "prompts={folder}/policy"], ["policy: no such prompt file"]),
    "an unknown category": (["--set", "select.category_threshold.cars=3"], ["select.category_threshold: 'cars' is no category"]),
    "an unknown category to send": (["--set", "sent_to.cars=[a.example]"], ["sent_to: 'cars' is no category"]),
    "a root that is a file": (["--root", "{folder}/run.yaml"], ["run.yaml", "cannot be written"]),
    "a root under a file": (["--root", "{folder}/run.yaml/root"], ["run.yaml/root", "cannot be written"]),
    "a root that cannot be written": (["--root", "/proc/nothing"], ["/proc/nothing", "cannot be written"]),
    "an unknown scheme": (["--root", "nothing://root"], ["nothing://root", "cannot be opened"]),
    "a scheme that wants more": (["--root", "github://root"], ["github://root", "cannot be opened"]),
    "too few tokens": (["--set", "generate.max_tokens=20"], ["generate.max_tokens", "longest output"]),
    "an engine that may not be spoken to": (
        ["--set", "judge.engine={backend: openai, model: m, revision: '1', endpoint: {url: 'https://a.example/v1'}}"],
        ["judge.engine.endpoint", "sending pets, theft to a.example"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_bad_argument(specmill: Command, run_file: Path, kind: str):
    arguments, words = MISTAKES[kind]
    told(specmill("plan", run_file, *(part.replace("{folder}", str(run_file.parent)) for part in arguments)), 2, words)


def test_off_is_a_value_and_no_false(specmill: Command, run_file: Path):
    run_file.write_text(run_file.read_text() + "overlap: {duplicates: off, contamination: off}\n")
    assert specmill("plan", run_file, "--set", "judge.overlap=off", "--set", "judge.sequential=no")[0] == 0


@pytest.mark.parametrize("command", [["plan"], ["run"], ["prompts", "check"]], ids=" ".join)
@pytest.mark.parametrize("place", ["gone.yaml", "policy", "gone/run.yaml", "run.yaml/run.yaml", "n" * 5000], ids=lambda place: place[:20])
def test_a_run_file_that_is_none(specmill: Command, run_file: Path, command: list[str], place: str):
    told(specmill(*command, run_file.parent / place), 2, [place[:20]])


def clause(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["clauses"][0].update(changes)


POLICIES: dict[str, tuple[str, bytes | Callable[[dict[str, Any]], None], list[str]]] = {
    "an empty category": ("pets", b"", ["expected a mapping"]),
    "a list": ("pets", b"- 1\n", ["expected a mapping", "list"]),
    "latin-1": ("pets", "title: caf\u00e9\n".encode("latin-1"), ["not UTF-8", "byte 10"]),
    "a key twice": ("pets", b"version: 1\nid: pets\nid: theft\n", ["'id' is there twice", "line 3"]),
    "NUL in a rule": ("pets", b'version: 1\ntitle: "a\\0"\n', ["a control character", "a\\x00", "line 2"]),
    "half a character": ("pets", b'version: 1\ntitle: "\\ud83d"\n', ["Unicode character"]),
    "tabs": ("pets", b"version: 1\nstyle:\n\trefuse: []\n", ["cannot be read", "line 3"]),
    "another version": ("pets", lambda c: c.update(version=2), ["category pets: version"]),
    "no version": ("pets", lambda c: c.pop("version"), ["category pets: version", "required"]),
    "no clause": ("pets", lambda c: c.update(clauses=[]), ["category pets: clauses", "at least 1 item"]),
    "clauses that are a mapping": ("pets", lambda c: c.update(clauses={"PE1": "yes"}), ["category pets: clauses"]),
    "a clause that is text": ("pets", lambda c: c.update(clauses=["No."]), ["category pets: clause number 1"]),
    "an unknown field": ("pets", clause(colour="red"), ["clause PE1: colour: unknown field"]),
    "an unknown verdict": ("pets", clause(verdict="maybe"), ["clause PE1: verdict", "maybe"]),
    "an empty rule": ("pets", clause(text="  "), ["clause PE1: text", "at least 1 character"]),
    "a number as rule": ("pets", clause(text=5), ["clause PE1: text", "found 5"]),
    "an id of another form": ("pets", clause(id="one"), ["clause one: id", "pattern"]),
    "an id that is a list": ("pets", clause(id=["PE1"]), ["clause ['PE1']: id"]),
    "an id of another clause": ("pets", clause(id="PE2"), ["clause PE2: id: also used in category pets"]),
    "an id of another category": ("pets", clause(id="TH1"), ["theft.yaml", "clause TH1: id: also used in category pets"]),
    "an id of a principle": ("pets", clause(id="GP1"), ["clause GP1: id: also that of a principle"]),
    "an exclusion of itself": ("pets", clause(excludes=["PE1"]), ["clause PE1: excludes: cycle PE1 -> PE1"]),
    "exclusions in a circle": ("pets", lambda c: c["clauses"][1].update(excludes=["PE1"]), ["excludes: cycle", "PE1 -> PE2", "PE2 -> PE1"]),
    "an exclusion of nothing": ("pets", clause(excludes=["PE9"]), ["clause PE1: excludes: no clause PE9"]),
    "an exclusion that is text": ("pets", clause(excludes="PE2"), ["clause PE1: excludes", "PE2"]),
    "what nothing is generated for, but helped with": ("pets", clause(generate="never"), ["clause PE1: generate: `never` needs"]),
    "another category's id": ("pets", lambda c: c.update(id="theft"), ["pets.yaml: id: is 'theft'"]),
    "a category that is not there": ("bundle", lambda c: c["categories"].append("cars"), ["cars.yaml: no such file"]),
    "a category twice": ("bundle", lambda c: c["categories"].append("pets"), ["categories: pets more than once"]),
    "a principle twice": ("bundle", lambda c: c["principles"].append(c["principles"][0]), ["principles: GP1 more than once"]),
    "a category out of the folder": ("bundle", lambda c: c.update(categories=["../pets"]), ["categories.0", "pattern"]),
    "no category": ("bundle", lambda c: c.update(categories=[]), ["categories", "at least 1 item"]),
    "no style": ("bundle", lambda c: c.pop("style"), ["style", "required"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", POLICIES)
def test_a_bad_policy(specmill: Command, run_file: Path, kind: str):
    name, spoil, words = POLICIES[kind]
    file = run_file.parent / "policy" / f"{name}.yaml"
    if isinstance(spoil, bytes):
        file.write_bytes(spoil)
    else:
        content = dict(BUNDLE, categories=list(BUNDLE["categories"]), principles=list(BUNDLE["principles"]))
        content = category(name) if name != "bundle" else content
        spoil(content)
        file.write_text(yaml.safe_dump(content))
    words = words if any(".yaml" in word for word in words) else [f"{name}.yaml", *words]
    answer = specmill("spec", "lint", file.parent)
    told(answer, 2, words, lines=len(answer[2].splitlines()))
    told(specmill("plan", run_file), 2, words, lines=len(answer[2].splitlines()))


def test_clauses_may_exclude_each_other_in_a_long_chain(specmill: Command, run_file: Path):
    names = [f"{letters}{number}" for letters in ("PA", "PB") for number in range(550)]
    clauses = [{"id": one, "verdict": "comply", "text": "Yes.", "excludes": [other]} for one, other in pairwise(names)]
    last = {"id": names[-1], "verdict": "comply", "text": "Yes."}
    file = run_file.parent / "policy" / "pets.yaml"
    file.write_text(yaml.safe_dump(category("pets") | {"clauses": [*clauses, last]}))
    assert specmill("spec", "lint", file.parent)[0] == 0
    file.write_text(yaml.safe_dump(category("pets") | {"clauses": [*clauses, last | {"excludes": names[:1]}]}))
    told(specmill("spec", "lint", file.parent), 2, ["pets.yaml", "excludes: cycle"])


def test_a_category_to_render_that_is_none(specmill: Command, run_file: Path):
    told(specmill("spec", "render", run_file.parent / "policy", "--category", "cars"), 2, ["unknown category 'cars'", "pets, theft"])


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ROWS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{no", "not JSON"),
    "a list": ([1], "expected an object, found list"),
    "NUL": (b'{"id": "\x00"}', "NUL at byte 8"),
    "latin-1": ('{"id": "\u00e9"}'.encode("latin-1"), "not UTF-8 at byte 8 (0xe9)"),
    "10 MB": (row("pets", 1, messages=asked("long " * 2_000_000)), "the row is longer than 4 MiB"),
    "endless brackets": (b"[" * 100_000, "not JSON"),
    "an endless number": (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
    "half a character": (row("pets", 1, messages=asked("\ud800")), "messages.0.content"),
    "half a character as field": (row("pets", 1) | {"\ud800": 1}, "(found '\\ud800')"),
    "half a character as id": (row("pets", 1, id="\ud800"), "id: "),
    "half a character as clause": (row("pets", 1, ideal_clauses=["\ud800"]), "ideal_clauses"),
    "half a character as field of a turn": (row("pets", 1, messages=[{"role": "user", "content": "x", "\ud800": 1}]), "messages.0"),
    "an endless field": (row("pets", 1) | {"x" * 1_000_000: 1}, "xxx': unknown field"),
    "a field of two lines": (row("pets", 1) | {"a\nb": 1}, "'a\\nb': unknown field"),
    "an id that is a number": (row("pets", 1, id=1.5), "id: Input should be a valid string"),
    "an id that is a sentence": (row("pets", 1, id="two words"), "id: String should match pattern"),
    "an id that is there": (row("pets", 1, id="pets-0"), "id: 'pets-0' is used by an earlier row"),
    "a row that is there": (row("pets", 0), "id: 'pets-0' is used by an earlier row"),
    "a question that is there": (row("pets", 1, messages=row("pets")["messages"]), "messages: the same as those of an earlier row"),
    "a group that is elsewhere": (row("pets", 1, group="pets-0", split="eval"), "split: eval, but an earlier row of group 'pets-0'"),
    "an unknown category": (row("pets", 1, category="cars"), "category: 'cars' is not in the policy"),
    "a category that is a list": (row("pets", 1, category=["pets"]), "category: Input should be a valid string"),
    "an unknown cell": (row("pets", 1, cell="middle"), "cell: Input should be 'violation'"),
    "an unknown verdict": (row("pets", 1, ideal_verdict="perhaps"), "ideal_verdict: Input should be 'comply'"),
    "another verdict than the clause's": (row("pets", 1, ideal_verdict="refuse"), "ideal_verdict: is refuse, but clause PE1 decides"),
    "an unknown clause": (row("pets", 1, ideal_clauses=["PE9"]), "ideal_clauses: no clause 'PE9'"),
    "no clause": (row("pets", 1, ideal_clauses=[]), "ideal_clauses: Tuple should have at least 1 item"),
    "clauses that are a number": (row("pets", 1, ideal_clauses=5), "ideal_clauses"),
    "an unknown split": (row("pets", 1, split="test"), "split: Input should be 'sft'"),
    "a group that is null": (row("pets", 1, group=None), "group: Input should be a valid string"),
    "an unknown field": (row("pets", 1, colour="red"), "colour: unknown field"),
    "no turn": (row("pets", 1, messages=[]), "messages: Tuple should have at least 1 item"),
    "a turn that is text": (row("pets", 1, messages=["Hi"]), "messages.0: expected a turn"),
    "a turn of nobody": (row("pets", 1, messages=[{"role": "narrator", "content": "x"}]), "messages.0.role: Input should be 'user'"),
    "a turn without text": (row("pets", 1, messages=[{"role": "user"}]), "messages.0.content: Input should be a valid string"),
    "an empty turn": (row("pets", 1, messages=asked("   ")), "messages.0.content: String should have at least 1 character"),
    "a system turn": (row("pets", 1, messages=[{"role": "system", "content": "x"}, *asked("x")]), "messages.0.role: a system turn"),
    "an answer at the end": (row("pets", 1, messages=[*asked("x"), {"role": "assistant", "content": "x"}]), "end with a user turn"),
    "a skill that is a number": ({"id": "s", "skill": 5, "messages": asked("x"), "thought": "t", "answer": "a"}, "skill: Input should"),
    "an everyday task without answer": ({"id": "s", "skill": "sums", "messages": asked("x"), "thought": "t"}, "answer: Field required"),
}  # fmt: skip


def line(item: Any) -> bytes:
    """A row as a line."""
    return item if isinstance(item, bytes) else json.dumps(item).encode()


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_is_put_aside_and_the_rest_goes_on(specmill: Command, run_file: Path, kind: str):
    bad, reason = ROWS[kind]
    file = run_file.parent / "prompts" / "pets.jsonl"
    file.write_bytes(b"\n".join([line(row("pets")), line(bad), line(row("pets", 2))]) + b"\n")
    code, out, err = specmill("prompts", "check", run_file)
    assert (code, err) == (0, ""), err
    counts = next(text.split() for text in out.splitlines() if text.startswith(str(file)))
    assert counts[1:] == ["3", "2", "0", "1"], out
    assert "pets.jsonl:2: " in out and reason in out, out
    assert len(out) < 5000, "no message repeats what is long"


def test_a_row_as_deep_as_the_reader_just_takes_ends_nothing(specmill: Command, run_file: Path):
    """What is read but cannot be written again is put aside too."""
    call = {"role": "assistant", "function_call": {"name": "f", "arguments": "N"}}
    rows = [row("pets", depth, messages=[*asked("x"), call, *asked(f"y {depth}")]) for depth in range(500, 1000)]
    deep = [line(item).replace(b'"N"', b"[" * depth + b"]" * depth) for depth, item in enumerate(rows, start=500)]
    (run_file.parent / "prompts" / "pets.jsonl").write_bytes(b"\n".join(deep) + b"\n")
    code, out, _ = specmill("prompts", "check", run_file, "--set", "overlap={duplicates: off, contamination: off}")
    assert code == 0 and "nested too deeply" in out, out


FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "an empty file": ("x.jsonl", b"", ["not one usable prompt (0 rows"]),
    "a file of blank lines": ("x.jsonl", b"\n \n\n", ["not one usable prompt (0 rows"]),
    "only bad rows": ("x.jsonl", b"{}\n", ["not one usable prompt (1 rows", "x.jsonl:1: id: Field required"]),
    "utf-16": ("x.jsonl", '{"id": 1}\n'.encode("utf-16"), ["not UTF-8: byte 0 is 0xff (UTF-16)"]),
    "no gzip": ("x.jsonl.gz", b"plain", ["cannot be read", "gzip"]),
    "half a gzip": ("x.jsonl.gz", gzip.compress(b"x" * 1000)[:20], ["cannot be read"]),
    "no Parquet": ("x.parquet", b"PAR1", ["not a readable Parquet file"]),
    "a CSV without text": ("x.csv", b"", ["is empty"]),
    "a CSV with a column twice": ("x.csv", b"id,id\n1,2\n", ["two columns are named 'id'"]),
    "an unknown format": ("x.xml", b"<a/>", ["format: the suffix '.xml'"]),
    "a name that is no text": ("caf\udce9.jsonl", b"{}\n", ["caf\\udce9.jsonl", "the name is not UTF-8"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_prompt_file_without_a_prompt(specmill: Command, run_file: Path, kind: str):
    name, content, words = FILES[kind]
    file = run_file.parent / "files" / name
    file.parent.mkdir()
    file.write_bytes(content)
    answer = specmill("prompts", "check", run_file, "--set", f"prompts={file if name.isascii() else file.parent}")
    told(answer, 2, [name if name.isascii() else "files", *words], lines=1 + ("only" in kind))


def test_truncated_parquet_with_good_rows(specmill: Command, run_file: Path):
    file = run_file.parent / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row("pets", number) for number in range(100)]), file)
    file.write_bytes(file.read_bytes()[:-100])
    told(specmill("prompts", "check", run_file, "--set", f"prompts={file}"), 2, ["x.parquet: not a readable Parquet file"])


def test_prompts_of_a_clause_that_nothing_is_generated_for_make_no_run(specmill: Command, run_file: Path):
    """Whatever split they name, they are for evaluation alone."""
    rows = [row("pets", number, ideal_verdict="refuse", ideal_clauses=["PE3", "PE2"]) for number in range(4)]
    for file in (run_file.parent / "prompts").glob("*.jsonl"):
        file.write_bytes(b"\n".join(map(line, rows)) if file.stem == "pets" else b"\n")
    told(specmill("plan", run_file), 2, ["prompts", "not one scenario group falls to the split 'sft'"])


MODELS: dict[str, tuple[str, bytes, list[str]]] = {
    "a tokenizer that is no JSON": ("tokenizer.json", b"{", ["tokenizer.json", "cannot be read"]),
    "a tokenizer that is a list": ("tokenizer.json", b"[]", ["tokenizer.json", "expected an object"]),
    "a tokenizer of nothing": ("tokenizer.json", b"{}", ["tokenizer.json", "no tokenizer"]),
    "a tokenizer that is latin-1": ("tokenizer.json", b'{"\xe9": 1}', ["tokenizer.json", "cannot be read"]),
    "settings that are no JSON": ("tokenizer_config.json", b"{", ["tokenizer_config.json", "cannot be read"]),
    "several templates": ("tokenizer_config.json", b'{"chat_template": [{"name": "a", "template": "b"}]}', ["no chat template"]),
    "a template that is none": ("chat_template.jinja", b"{% for", ["chat template"]),
    "a template that is latin-1": ("chat_template.jinja", b"\xe9", ["chat_template.jinja"]),
    "a template without turns": ("chat_template.jinja", b"Hello", ["chat template", "'user' turn exactly once"]),
    "a record that is no JSON": ("specmill_model.json", b"{", ["specmill_model.json", "not JSON"]),
    "no weights": ("model.safetensors", b"", ["holds no *.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_damaged_model(specmill: Command, run_file: Path, kind: str):
    name, content, words = MODELS[kind]
    parent, model = Path(resolve_model("default").path), run_file.parent / "model"
    model.mkdir()
    for file in parent.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, model)
    (model / "model.safetensors").write_bytes(b"")
    if name == "tokenizer_config.json" and b"template" in content:
        (model / "chat_template.jinja").unlink()
    if name == "model.safetensors":
        (model / name).unlink()
        (model / "specmill_model.json").unlink()
    else:
        (model / name).write_bytes(content)
    told(specmill("plan", run_file, "--set", f"generate.engine.model={model}"), 2, [str(model), *words])
