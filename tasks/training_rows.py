"""Token rows for SFT and DPO: the conversation as a user has it, then thought and answer, which alone are learnt.

No policy text: the model has to bring the policy itself. In SFT, capability rows are mixed in at a configured ratio.
"""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import pyarrow as pa

from cluster.chat import Chat
from tasks import tables
from tasks.compose import plain_turns
from tasks.prompts import CapabilityRow, Message
from tasks.stage_config import SftConfig
from tasks.store import Store
from tasks.thoughts import join, opened


def training_rows(store: Store, files: Sequence[str], capability: list[CapabilityRow], chat: Chat, config: SftConfig) -> pa.Table:
    """Rows of TRAINING_ROWS: those of files of TRAINING_VIEW, then capability rows in the configured ratio."""
    rows = []
    for name, row in _fewer([pair for path in files for pair in enumerate(store.read_table(path).to_pylist())], config.rows):
        prompt, learnt = tokens_of(_messages(row), row["thought"], row["answer"], chat)
        rows.append(_row(f"{row['prompt_id']}/{name}", prompt, learnt))
    for item in capability_mix(capability, len(rows), config.capability_ratio):
        rows.append(_row(item.id, *tokens_of(item.messages, item.thought, item.answer, chat)))
    return pa.Table.from_pylist(rows, schema=tables.TRAINING_ROWS)


def preference_rows(store: Store, files: Sequence[str], chat: Chat) -> pa.Table:
    """Rows of PREFERENCE_ROWS: those of files of PREFERENCES."""
    rows = []
    for path in files:
        for number, row in enumerate(store.read_table(path).to_pylist()):
            (prompt, chosen), (_, rejected) = (
                tokens_of(_messages(row), row[f"{side}_thought"], row[f"{side}_answer"], chat) for side in ("chosen", "rejected")
            )
            ids = {"chosen_ids": [*prompt, *chosen], "rejected_ids": [*prompt, *rejected]}
            rows.append({"row_id": f"{row['prompt_id']}/{number}", "prompt_length": len(prompt)} | ids)
    return pa.Table.from_pylist(rows, schema=tables.PREFERENCE_ROWS)


def capability_mix(capability: list[CapabilityRow], policy_rows: int, ratio: float) -> list[CapabilityRow]:
    """`ratio` capability rows per policy row, as far as there are any, in an order that hashes of their ids fix."""
    ranked = sorted(capability, key=lambda row: hashlib.sha256(row.id.encode()).digest())
    return ranked[: round(ratio * policy_rows)]


def _fewer(rows: list[tuple[int, dict[str, Any]]], most: int | None) -> list[tuple[int, dict[str, Any]]]:
    """At most so many rows, in their order: of each category as many, those whose ids' hashes come first."""
    if most is None or most >= len(rows):
        return rows
    places: dict[str, list[int]] = {}
    for place, (_, row) in sorted(enumerate(rows), key=lambda pair: hashlib.sha256(pair[1][1]["prompt_id"].encode()).digest()):
        places.setdefault(row["category"], []).append(place)
    turns = [place for turn in zip_longest(*(places[name] for name in sorted(places))) for place in turn if place is not None]
    return [rows[place] for place in sorted(turns[:most])]


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(Message.model_validate(turn) for turn in row["messages"])


def tokens_of(messages: tuple[Message, ...], thought: str, answer: str, chat: Chat) -> tuple[list[int], list[int]]:
    """Token ids of what is given, and of what is learnt."""
    prompt = chat.prompt(plain_turns(messages))
    return prompt, [*join(thought, answer, chat, opened(prompt, chat)), chat.end_of_turn]


def _row(id: str, prompt: list[int], learnt: list[int]) -> dict[str, object]:
    return {"row_id": id, "input_ids": [*prompt, *learnt], "prompt_length": len(prompt)}
