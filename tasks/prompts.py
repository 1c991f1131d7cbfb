"""Seed prompts: their format, checking rows without losing one, and the split by scenario group.

A malformed row never stops a run: the reason takes its place, and `tasks.prompt_set` quarantines and counts it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, overload

from pydantic import Field, StringConstraints, ValidationError, model_validator

from tasks.conversations import converted
from tasks.importing import read_source
from tasks.keys import digest
from tasks.policy import CategoryId, Policy, Text, Verdict
from tasks.sources import Source, SourceFile
from tasks.validation import Strict, describe

Cell = Literal["violation", "borderline", "benign", "transformation"]
CELLS: tuple[Cell, ...] = ("violation", "borderline", "benign", "transformation")
CELL_OF: dict[Verdict, Cell] = {"refuse": "violation", "safe_complete": "borderline", "comply": "benign"}
"""What a case of a clause is, by the verdict of its clause."""
Split = Literal["sft", "rl", "dev", "eval"]
SPLIT_SHARES: dict[Split, int] = {"sft": 4, "rl": 1, "dev": 1, "eval": 2}
"""Scenario groups of every eight that go to each split. What is measured while a model is made (dev) is not what is reported (eval)."""

RowId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,120}$")]


class Message(Strict):
    """One turn of the conversation that a model is asked to continue."""

    role: Literal["user", "assistant", "tool"]
    content: Text


class Conversation(Strict):
    """What every kind of row has: an id and turns that end with the user's."""

    id: RowId
    messages: tuple[Message, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ends_with_user(self) -> "Conversation":
        if self.messages[0].role != "user" or self.messages[-1].role != "user":
            raise ValueError("messages have to begin and end with a user turn")
        return self


class Prompt(Conversation):
    """A seed prompt with its labels. The ideal verdict never appears in the generator's request.

    `split` says where its scenario group goes; left out, the group's name decides.
    """

    category: CategoryId
    cell: Cell
    group: RowId
    split: Split | None = None
    ideal_verdict: Verdict
    ideal_clauses: tuple[str, ...] = Field(min_length=1)


class CapabilityRow(Conversation):
    """A worked answer to an everyday task, mixed into SFT so that the model does not talk about policy everywhere."""

    skill: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z-]{1,40}$")]
    thought: Text
    answer: Text


def may_be_helped(ideal_verdict: str, cell: str) -> bool:
    """Whether a refusal of a prompt would be over-refusal."""
    return ideal_verdict != "refuse" and cell in ("benign", "borderline")


def named_split(group: str) -> Split:
    """The split of a scenario group whose prompts name none: its name's hash decides, in shares of 4 : 1 : 1 : 2.

    A group goes to one split whole, so a violation and its benign twin are never on two sides, and no other group moves it.
    """
    order = [split for split, share in SPLIT_SHARES.items() for _ in range(share)]
    return order[int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % len(order)]


def prompt_hash(messages: Iterable[Message]) -> str:
    """sha256 over the turns of a conversation, in hexadecimal."""
    turns = [[message.role, message.content] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def read_rows(files: Iterable[SourceFile], policy: Policy) -> Iterator[tuple[SourceFile, int, Prompt | CapabilityRow | str]]:
    """File, line or row number, and the row, or the reason why it is none."""
    for file in files:
        for number, row in read_source(file):
            yield file, number, row if isinstance(row, str) else _checked(row, file, policy)


def case_prompts(policy: Policy) -> SourceFile:
    """The cases of a policy's clauses as prompts of the SFT split, but for those of clauses that are never generated from.

    They illustrate the policy, so they are learnt from, and none is evaluated.
    """
    rows = [
        {
            "id": (name := f"case-{clause.id}-{digest(case.prompt)[:8]}"),
            "category": category.id,
            "cell": CELL_OF[clause.verdict],
            "group": name,
            "split": "sft",
            "ideal_verdict": clause.verdict,
            "ideal_clauses": [clause.id],
            "messages": [{"role": "user", "content": case.prompt}],
        }
        for category, clause in policy.clauses.values()
        if clause.generate != "never"
        for case in clause.cases
    ]
    return SourceFile(Source(path=f"cases of {policy.bundle.id}"), f"cases of {policy.bundle.id}", "rows", digest(rows), rows)


def read_conversations(file: SourceFile) -> Iterator[tuple[int, Conversation | str]]:
    """Line or row number, and the conversation of a file whose rows need no labels, or the reason why it is none."""
    for number, row in read_source(file):
        yield number, row if isinstance(row, str) else _checked(row, file, None)


@overload
def _checked(row: dict[str, Any], file: SourceFile, policy: Policy) -> Prompt | CapabilityRow | str: ...
@overload
def _checked(row: dict[str, Any], file: SourceFile, policy: None) -> Conversation | str: ...
def _checked(row: dict[str, Any], file: SourceFile, policy: Policy | None) -> Conversation | str:
    try:
        fields = converted(row, file.source, file.left_out)
        if policy is None:
            fields = {name: fields[name] for name in Conversation.model_fields if name in fields}
        if "id" not in fields and file.source.columns.named:
            unnamed = Conversation.model_validate({"id": "unnamed", "messages": fields["messages"]})
            fields["id"] = f"{file.name}-{prompt_hash(unnamed.messages)[:16]}"
        return Conversation.model_validate(fields) if policy is None else _parse(fields, file, policy)
    except ValidationError as error:
        return "; ".join(line.removeprefix("row: ") for line in describe(error, "row"))
    except RecursionError:
        return "nested too deeply"
    except ValueError as error:
        return str(error)


def _parse(row: dict[str, Any], file: SourceFile, policy: Policy) -> Prompt | CapabilityRow:
    if "skill" in row:
        return CapabilityRow.model_validate(row)
    if file.source.columns.named:
        row.setdefault("group", row["id"])
    prompt = Prompt.model_validate(row)
    if prompt.category not in policy.categories:
        raise ValueError(f"category: {prompt.category!r} is not in the policy")
    clauses = policy.clauses
    for name in prompt.ideal_clauses:
        if name not in clauses:
            raise ValueError(f"ideal_clauses: no clause {name!r} in the policy")
    decided = clauses[prompt.ideal_clauses[0]][1].verdict
    if decided != prompt.ideal_verdict:
        raise ValueError(f"ideal_verdict: is {prompt.ideal_verdict}, but clause {prompt.ideal_clauses[0]} decides {decided}")
    return prompt
