"""Whatever is written into policies, run files, rows and verdicts: it is taken, or told with file and field, and no row is lost.

In the everyday tests the cases are the same every time; `pytest -m soak tests/test_fuzz.py` draws thousands of new ones.
"""

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import BUNDLE, CATEGORIES, RUN, category, row, write_run

from cluster.chat import Chat
from cluster.errors import UserError
from cluster.models import resolve_model
from flows.config import RunConfig, RunRequest, load_run
from flows.opening import prepare
from flows.plan import describe_plan, plan
from tasks.judge import HIGHEST, LOWEST, parse_scores
from tasks.policy import BundleFile, Category, Clause, lint, load_policy, render
from tasks.prompt_parts import field_of
from tasks.prompt_set import load_prompts
from tasks.prompts import SPLIT_SHARES, CapabilityRow, Prompt
from tasks.sources import Columns, Source
from tasks.store import Store
from tasks.thoughts import Malformed, Parts, split

FIXED = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
CHAT = Chat(resolve_model("default").path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sound run."""
    return write_run(tmp_path_factory.mktemp("fuzz") / "run").parent


def often(*strategies: st.SearchStrategy[Any], few: int, many: int) -> Callable[[Callable[..., None]], Any]:
    """The same few cases every time, and many new ones on request."""

    def both(test: Callable[..., None]) -> Any:
        @pytest.mark.parametrize("new", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["fixed", "new"])
        def run(new: bool, place: Path) -> None:
            limits = {"max_examples": many, "derandomize": False} if new else {"max_examples": few}
            settings(**FIXED | limits)(given(*strategies)(test))(place)

        run.__doc__ = test.__doc__
        return run

    return both


ANY_TEXT = st.text(st.characters(codec=None), max_size=20)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-2, max_value=10),
    st.floats(),
    ANY_TEXT,
    st.sampled_from(
        ["", "PE1", "PE2", "TH1", "GP1", "pets", "theft", "../x", "never", "refuse", "fake", "openai", "vllm", "x" * 5000, "a\nb"]
    ),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=6)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a structure."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for name, item in items for place in places(item, (*path, name)))]


@st.composite
def changed(draw: st.DrawFn, sound: Any) -> Any:
    """A structure with up to three places replaced, removed, or given a neighbour."""
    content = {"": copy.deepcopy(sound)}
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(content)[1:]))
        around: Any = content
        for name in way:
            around = around[name]
        action = draw(st.sampled_from(["replace", "remove", "insert"]))
        if action == "replace" or not way:
            around[last] = draw(VALUES)
        elif action == "remove":
            del around[last]
        elif isinstance(around, dict):
            around[draw(ANY_TEXT)] = draw(VALUES)
        else:
            around.insert(last, draw(VALUES))
    return content[""]


@st.composite
def as_yaml(draw: st.DrawFn, sound: Any) -> bytes:
    """A changed structure as YAML, or its text with bytes changed."""
    if draw(st.booleans()):
        return yaml.dump(draw(changed(sound)), allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    text = bytearray(yaml.safe_dump(sound).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text) - 1))
        text[at : at + draw(st.integers(0, 3))] = draw(
            st.binary(max_size=4) | st.sampled_from([b"\t", b": ", b"- ", b"\n", b"&a ", b"*a", b"!!set ", b"{", b"["])
        )
    return bytes(text)


def said(error: UserError, *files: str) -> None:
    """Checks that every line of a message names one of the files."""
    for line in str(error).split("\n"):
        assert any(file in line for file in files), str(error)
        assert not CONTROL.search(line), repr(line)


NO_FIELD = re.compile(
    r"(no such file|not UTF-8|cannot be read|expected a mapping of fields).*|"  # the file
    r".*: (unknown field|Keys should be strings \(found .*)|"  # what is none
    r".*clause (number \d+|[A-Z]+\d+): Input should be a valid dictionary.*"  # a whole clause
)


def said_of_a_field(error: UserError, file: str, fields: Iterable[str]) -> None:
    """Checks that every line names the file, and the field if there is one to name."""
    said(error, file)
    names = re.compile(rf"(.*: )?({'|'.join(fields)})[.:]")
    for line in str(error).split("\n"):
        told = line.split(file, 1)[1]
        assert names.match(told) or NO_FIELD.fullmatch(told), line


@often(
    st.sampled_from(["bundle", *CATEGORIES]).flatmap(
        lambda name: st.tuples(st.just(name), as_yaml(BUNDLE if name == "bundle" else category(name)))
    ),
    few=80,
    many=2000,
)
def test_a_policy_is_taken_or_told(place: Path, case: tuple[str, bytes]):
    name, content = case
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(place / "policy", folder, dirs_exist_ok=True)
        Path(folder, f"{name}.yaml").write_bytes(content)
        try:
            policy = load_policy(folder)
        except UserError as error:
            said_of_a_field(error, ".yaml: ", {*BundleFile.model_fields, *Category.model_fields, *Clause.model_fields})
            return
        lint(policy)
        for one in policy.categories:
            assert render(policy, one).hash and render(policy, one, "full").hash


@often(as_yaml(RUN), few=60, many=1000)
def test_a_run_file_is_taken_or_told(place: Path, content: bytes):
    (place / "changed.yaml").write_bytes(content)
    request = RunRequest(file=str(place / "changed.yaml"), root=str(place / "root"))
    try:
        load_run(request)
    except UserError as error:
        said_of_a_field(error, "changed.yaml: ", {*RunConfig.model_fields, "extends"})
        return
    try:
        describe_plan(*plan(prepare(request, trains=False)))
    except UserError as error:
        assert str(error).startswith((f"{place / 'changed.yaml'}: ", load_run(request).policy, load_run(request).root)), str(error)
        assert not CONTROL.search(str(error))


ROW = row("pets", 1) | {"skill": "sums", "thought": "t", "answer": "a", "text": "t", "q": "t"}
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "tool", "system", "human"]) | SCALARS,
            "content": ANY_TEXT | VALUES,
            "from": SCALARS,
            "value": SCALARS,
            "tool_calls": VALUES,
            "function_call": VALUES,
        },
    ),
    max_size=4,
)
ROWS = st.one_of(
    changed(row("pets", 1)),
    changed(ROW),
    st.builds(lambda turns: row("pets", 1, messages=turns), TURNS),
    st.dictionaries(st.sampled_from([*ROW]), VALUES),
    VALUES,
)
LINES = st.lists(ROWS.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40), max_size=12)
SOURCES = st.sampled_from(
    [
        {},
        {"columns": {"messages": "messages"}},
        {"columns": {"messages": "messages", "id": "id", "category": "category"}, "system": "drop", "last_answer": "drop"},
        {"columns": {"text": "q", "id": "id", "ideal_clauses": "ideal_clauses"}, "values": {"ideal_clauses": {"PE1": ["PE1", "PE2"]}}},
        {"columns": {"text": "text", "skill": "skill", "thought": "thought", "answer": "answer"}},
    ]
)  # fmt: skip
LABELS = {"category": "pets", "cell": "benign", "ideal_verdict": "comply", "ideal_clauses": "PE1"}
FIELDS = {*Prompt.model_fields, *CapabilityRow.model_fields, *Columns.model_fields, "role", "row"}


def balance(place: Path, file: Path, source: dict[str, Any]) -> None:
    """Reads rows beside one that is sound; each is taken, or put aside with a reason that names a field, or is about the row."""
    sound = place / "sound.jsonl"
    sound.write_text(json.dumps(row("theft", 0)) + "\n")
    labels = {"constants": LABELS} if source else {}
    sources = [Source(path=str(sound)), Source.model_validate(source | labels | {"path": str(file)})]
    try:
        prompts = load_prompts(Store(str(place / "root")), sources, load_policy(place / "policy"))
    except UserError as error:
        said(error, file.name)
        return
    for counted in prompts.manifest["sources"]:
        assert counted["rows"] == counted["prompts"] + counted["capability"] + counted["quarantined"]
    put_aside = [row for path in prompts.manifest["files"] if path["path"].startswith("quarantined/")
                 for row in prompts.store.read_table(f"{prompts.path}/{path['path']}").to_pylist()]  # fmt: skip
    assert len(put_aside) == prompts.counts["quarantined"]
    for bad in put_aside:
        assert bad["file"].endswith(file.name) and bad["line"] >= 1 and bad["reason"].isprintable() and len(bad["reason"]) < 2000
    if file.suffix == ".jsonl":
        lines = [raw for raw in file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if raw.strip()]
        assert prompts.manifest["sources"][1]["rows"] == len(lines)
    assert sum(prompts.size(split) for split in SPLIT_SHARES) == prompts.counts["prompts"]
    assert len(prompts.capability) == prompts.counts["capability"]
    assert all(field_of(bad["reason"]) for bad in put_aside)


@often(LINES, SOURCES, few=50, many=2000)
def test_no_row_of_jsonl_is_lost(place: Path, lines: list[bytes], source: dict[str, Any]):
    (place / "rows.jsonl").write_bytes(b"\n".join(lines))
    balance(place, place / "rows.jsonl", source)


CELLS = st.binary(max_size=10) | st.sampled_from([b'"', b"a", b"\n", b'"a\nb"', b"[", b"PE1"])


@often(st.lists(st.lists(CELLS, max_size=4).map(b",".join), max_size=8), few=30, many=1000)
def test_no_row_of_csv_is_lost(place: Path, lines: list[bytes]):
    (place / "rows.csv").write_bytes(b"q,id,ideal_clauses\n" + b"\n".join(lines))
    balance(place, place / "rows.csv", {"columns": {"text": "q", "id": "id", "ideal_clauses": "ideal_clauses"}})


@often(
    ANY_TEXT | VALUES.map(json.dumps) | st.lists(st.integers(0, 6) | SCALARS, max_size=5).map(json.dumps),
    few=300,
    many=20_000,
)
def test_a_verdict_is_scores_or_missing(place: Path, raw: str):
    order = ("compliance", "helpfulness", "correctness")
    scores = parse_scores(raw, order)
    assert scores is None or (
        tuple(scores) == order and all(type(score) is int and LOWEST <= score <= HIGHEST for score in scores.values())
    )
    if scores:
        assert json.loads(raw) == list(scores.values())


@often(
    st.lists(
        st.one_of(
            st.integers(0, 49151).map(lambda id: [id]),
            st.sampled_from(["<think>", "</think>", "\n", "<", "think>", "</", "Verdict: refuse\n", "<think>\n"]).map(CHAT.text),
            st.just([CHAT.end_of_turn]),
        ),
        max_size=12,
    ),
    few=150,
    many=10_000,
)
def test_what_a_model_draws_is_taken_apart_or_malformed(place: Path, pieces: list[list[int]]):
    ids = [id for piece in pieces for id in piece]
    parts = split(ids, CHAT)
    assert isinstance(parts, Parts | Malformed)
    if isinstance(parts, Parts):
        assert parts.thought_tokens <= len(ids) and "<think>" not in parts.thought
