"""Seed prompts: their format, reading them without losing a row, and the split by scenario group.

A malformed row never stops a run: it is quarantined with file, line and reason, and counted.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Quarantined:
    """A row that was not used: where it came from and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """Rows read, by kind; rows in = prompts + capability + quarantined."""

    prompts: list[Prompt]
    capability: list[CapabilityRow]
    quarantined: list[Quarantined]


def load_prompts(source: Path | str, policy: Policy) -> Loaded:
    """Reads a JSONL file or a directory of them. Raises UserError when there is no file or not one usable prompt."""
    root = Path(source)
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{root}: no such prompt file, or a directory without *.jsonl files.")
    loaded = Loaded([], [], [])
    ids: set[str] = set()
    conversations: dict[str, str] = {}
    splits: dict[str, Split | None] = {}
    for file in files:
        for number, row in _rows(file, loaded.quarantined):
            try:
                item = _parse(row, policy)
            except ValidationError as error:
                reason = "; ".join(line.removeprefix("row: ") for line in describe(error, "row"))
                loaded.quarantined.append(Quarantined(str(file), number, reason))
                continue
            except ValueError as error:
                loaded.quarantined.append(Quarantined(str(file), number, str(error)))
                continue
            if item.id in ids:
                loaded.quarantined.append(Quarantined(str(file), number, f"id: {item.id!r} is used by an earlier row"))
                continue
            content = prompt_hash(item.messages)
            if content in conversations:
                loaded.quarantined.append(Quarantined(str(file), number, f"messages: the same as those of {conversations[content]!r}"))
                continue
            if isinstance(item, Prompt) and splits.setdefault(item.group, item.split) != item.split:
                reason = f"split: {item.split or 'none'}, but an earlier row of group {item.group!r} says {splits[item.group] or 'none'}"
                loaded.quarantined.append(Quarantined(str(file), number, reason))
                continue
            ids.add(item.id)
            conversations[content] = item.id
            (loaded.prompts if isinstance(item, Prompt) else loaded.capability).append(item)  # type: ignore[arg-type]
    if not loaded.prompts:
        worst = "".join(f"\n  {row.file}:{row.line}: {row.reason}" for row in loaded.quarantined[:3])
        raise UserError(f"{root}: not one usable prompt ({len(loaded.quarantined)} rows quarantined).{worst}")
    return loaded


def split_groups(prompts: Iterable[Prompt], policy: Policy) -> dict[str, Split]:
    """Scenario group -> split: the one that its prompts name, else by the hash of its name, in shares of 4 : 2 : 2.

    A group goes to one split whole, so a violation and its benign twin are never on two sides, and no other group moves it. Groups with
    a clause that is never generated from are for evaluation only.
    """
    never = {name for name, (_, clause) in policy.clauses.items() if clause.generate == "never"}
    order = [split for split, share in SPLIT_SHARES.items() for _ in range(share)]
    splits: dict[str, Split] = {}
    reserved: set[str] = set()
    for prompt in prompts:
        slot = int.from_bytes(hashlib.sha256(prompt.group.encode()).digest()[:8], "big") % len(order)
        splits[prompt.group] = prompt.split or order[slot]
        if never.intersection(prompt.ideal_clauses):
            reserved.add(prompt.group)
    return splits | dict.fromkeys(reserved, "eval")


def prompt_hash(messages: Iterable[Message]) -> str:
    """sha256 over the turns of a conversation, in hexadecimal."""
    turns = [[message.role, message.content] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def _rows(file: Path, quarantined: list[Quarantined]) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                quarantined.append(Quarantined(str(file), number, f"not UTF-8 at byte {error.start}"))
                continue
            except (json.JSONDecodeError, RecursionError) as error:
                quarantined.append(Quarantined(str(file), number, f"not JSON: {error}"))
                continue
            if not isinstance(row, dict):
                quarantined.append(Quarantined(str(file), number, f"expected an object, found {type(row).__name__}"))
                continue
            yield number, row


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
