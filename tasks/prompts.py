"""Seed prompts: their format, reading them without losing a row, and the split by scenario group.

A malformed row never stops a run: the reason takes its place, and `tasks.prompt_set` quarantines and counts it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from cluster.errors import UserError
from tasks.policy import CategoryId, Policy, Text, Verdict
from tasks.validation import Strict, describe

Cell = Literal["violation", "borderline", "benign", "transformation"]
CELLS: tuple[Cell, ...] = ("violation", "borderline", "benign", "transformation")
Split = Literal["sft", "rl", "eval"]
SPLIT_SHARES: dict[Split, int] = {"sft": 4, "rl": 2, "eval": 2}
"""Scenario groups of every eight that go to each split."""

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


def named_split(group: str) -> Split:
    """The split of a scenario group whose prompts name none: its name's hash decides, in shares of 4 : 2 : 2.

    A group goes to one split whole, so a violation and its benign twin are never on two sides, and no other group moves it.
    """
    order = [split for split, share in SPLIT_SHARES.items() for _ in range(share)]
    return order[int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % len(order)]


def prompt_hash(messages: Iterable[Message]) -> str:
    """sha256 over the turns of a conversation, in hexadecimal."""
    turns = [[message.role, message.content] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def source_files(source: Path | str) -> list[Path]:
    """The JSONL files that a path names: itself, or those in a directory. Raises UserError when there is none."""
    root = Path(source)
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{root}: no such prompt file, or a directory without *.jsonl files.")
    return files


def read_rows(files: Iterable[Path], policy: Policy) -> Iterator[tuple[Path, int, Prompt | CapabilityRow | str]]:
    """File, line number, and the row, or the reason why it is none."""
    for file in files:
        with file.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    yield file, number, _row(raw, policy)


def _row(raw: bytes, policy: Policy) -> Prompt | CapabilityRow | str:
    try:
        row = json.loads(raw.decode("utf-8"))
        return _parse(row, policy) if isinstance(row, dict) else f"expected an object, found {type(row).__name__}"
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except (json.JSONDecodeError, RecursionError) as error:
        return f"not JSON: {error}"
    except ValidationError as error:
        return "; ".join(line.removeprefix("row: ") for line in describe(error, "row"))
    except ValueError as error:
        return str(error)


def _parse(row: dict[str, Any], policy: Policy) -> Prompt | CapabilityRow:
    if "skill" in row:
        return CapabilityRow.model_validate(row)
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
