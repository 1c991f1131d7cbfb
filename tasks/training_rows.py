"""Token rows for SFT: the conversation as a user has it, then thought and answer, which alone are learnt.

No policy text: the model has to bring the policy itself. Capability rows are mixed in at a configured ratio.
"""

import hashlib

import pyarrow as pa

from cluster.chat import Chat
from tasks import tables
from tasks.compose import plain_turns
from tasks.dataset import Dataset
from tasks.prompts import CapabilityRow, Message
from tasks.sft import SftConfig
from tasks.store import Store
from tasks.thoughts import join, opened


def training_rows(store: Store, dataset: Dataset, capability: list[CapabilityRow], chat: Chat, config: SftConfig) -> pa.Table:
    """Rows of TRAINING_ROWS: the dataset's, then the capability rows."""
    rows = []
    for path in dataset.training_files:
        for number, row in enumerate(store.read_table(path).to_pylist()):
            messages = tuple(Message.model_validate(turn) for turn in row["messages"])
            rows.append(_row(f"{row['prompt_id']}/{number}", messages, row["thought"], row["answer"], chat))
    for item in capability_mix(capability, len(rows), config.capability_ratio):
        rows.append(_row(item.id, item.messages, item.thought, item.answer, chat))
    return pa.Table.from_pylist(rows, schema=tables.TRAINING_ROWS)


def capability_mix(capability: list[CapabilityRow], policy_rows: int, ratio: float) -> list[CapabilityRow]:
    """`ratio` capability rows per policy row, as far as there are any, in an order that hashes of their ids fix."""
    ranked = sorted(capability, key=lambda row: hashlib.sha256(row.id.encode()).digest())
    return ranked[: round(ratio * policy_rows)]


def _row(id: str, messages: tuple[Message, ...], thought: str, answer: str, chat: Chat) -> dict[str, object]:
    prompt = chat.prompt(plain_turns(messages))
    learnt = [*join(thought, answer, chat, opened(prompt, chat)), chat.end_of_turn]
    return {"row_id": id, "input_ids": [*prompt, *learnt], "prompt_length": len(prompt)}
