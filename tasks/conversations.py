"""Makes rows of other formats into ours: the columns that a source names, its labels, and chats in the shapes that data sets have.

Whatever cannot be converted raises ValueError with the field and what is wrong with it.
"""

import json
import re
from collections import Counter
from contextlib import suppress
from typing import Any

from tasks.importing import MAX_ROW_BYTES
from tasks.sources import Source

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "system": "system",
    "developer": "system",
}
OPENAI_FIELDS = {"name", "tool_calls", "tool_call_id", "function_call", "weight"}
"""What a turn of OpenAI's format may have beside role and content."""


def converted(row: dict[str, Any], source: Source, left_out: Counter[str]) -> dict[str, Any]:
    """A row with our field names; adds to `left_out` the turns that the source's configuration drops."""
    columns = source.columns.named
    fields = {field: row[column] for field, column in columns.items() if row.get(column) not in (None, "")} if columns else dict(row)
    for field, table in source.values.items():
        if field in fields:
            fields[field] = _translated(fields[field], table)
    for field, value in source.constants.items():
        fields.setdefault(field, list(value) if isinstance(value, tuple) else value)
    if isinstance(clauses := fields.get("ideal_clauses"), str):
        fields["ideal_clauses"] = _clauses(clauses)
    if isinstance(fields.get("id"), int):
        fields["id"] = str(fields["id"])
    if "text" in columns:
        fields["messages"] = _plain(fields.pop("text", None), columns["text"])
    elif "messages" in fields:
        fields["messages"] = _turns(fields["messages"], source, left_out)
    elif columns:
        raise ValueError(f"messages: nothing in the column {columns['messages']!r}")
    _check_text(fields)
    return fields


def _translated(value: Any, table: dict[str, Any]) -> Any:
    if not isinstance(value, list):
        found = table.get(str(value), value)
        return list(found) if isinstance(found, tuple) else found
    translated: list[Any] = []
    for item in value:
        found = table.get(str(item), item)
        translated += found if isinstance(found, tuple) else [found]
    return translated


def _clauses(text: str) -> Any:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"ideal_clauses: not JSON: {error}") from None
    return [name for name in re.split(r"[\s,;]+", text) if name]


def _plain(text: Any, column: str) -> list[dict[str, Any]]:
    if text is None:
        raise ValueError(f"text: nothing in the column {column!r}")
    if not isinstance(text, str):
        raise ValueError(f"text: expected text, found {type(text).__name__}")
    return [{"role": "user", "content": text}]


def _turns(value: Any, source: Source, left_out: Counter[str]) -> Any:
    """Turns with `role` and `content`. What no format has is left for the check of the row."""
    if isinstance(value, str):
        value = _chat_in(value)
    if not isinstance(value, list):
        raise ValueError(f"messages: expected text or a list of turns, found {type(value).__name__}")
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise ValueError(f"messages.{number}: expected a turn with role and content, found {type(turn).__name__}")
        plain = _turn(turn, f"messages.{number}", strict=not source.columns.named)
        if plain["role"] != "system":
            turns.append(plain)
        elif source.system == "drop":
            left_out["system turns"] += 1
        else:
            raise ValueError(f"messages.{number}.role: a system turn, which prompts do not have (`system: drop` leaves such turns out)")
    if source.last_answer == "drop":
        kept = max((number for number, turn in enumerate(turns, start=1) if turn["role"] == "user"), default=0)
        left_out["turns after the last user turn"] += len(turns) - kept
        turns = turns[:kept]
    return turns


def _chat_in(text: str) -> Any:
    """The chat that a text holds as JSON, or the text as one user turn."""
    if text.lstrip().startswith("["):
        try:
            chat = json.loads(text)
        except (ValueError, RecursionError):
            chat = None
        if isinstance(chat, list) and chat and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in chat):
            return chat
    return [{"role": "user", "content": text}]


def _turn(turn: dict[str, Any], place: str, strict: bool) -> dict[str, Any]:
    """One turn. With `strict`, fields that no format knows stay, so that the check of the row finds them."""
    share_gpt = "from" in turn and "role" not in turn
    role, content = (turn["from"], turn.get("value")) if share_gpt else (turn.get("role"), turn.get("content"))
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{place}.content") for part in content)
    called = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if called:
        if not isinstance(called, list):
            raise ValueError(f"{place}.tool_calls: expected a list, found {type(called).__name__}")
        said = [content] if isinstance(content, str) and content else []
        content = "\n".join(said + [_call(call, f"{place}.tool_calls") for call in called])
    known = {"from", "value"} if share_gpt else {"role", "content", *OPENAI_FIELDS}
    rest = {name: value for name, value in turn.items() if name not in known} if strict else {}
    return {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content, **rest}


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"{place}: a part of type {kind!r}; only text can be used")


def _call(call: Any, place: str) -> str:
    """A call of a tool as one line of JSON, the arguments as the model wrote them."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place}: a call without the name of a function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def _check_text(fields: dict[str, Any]) -> None:
    """Raises ValueError for text that is too long or holds NUL, which no terminal and few tools pass on."""
    turns = fields["messages"] if isinstance(fields.get("messages"), list) else []
    texts = {f"messages.{number}.content": turn.get("content") for number, turn in enumerate(turns)}
    texts |= {name: fields.get(name) for name in ("thought", "answer")}
    for place, text in texts.items():
        if isinstance(text, str) and "\x00" in text:
            raise ValueError(f"{place}: NUL at character {text.index(chr(0))}")
    if sum(len(text) for text in texts.values() if isinstance(text, str)) > MAX_ROW_BYTES:
        raise ValueError(f"messages: longer than {MAX_ROW_BYTES >> 20} Mi characters")
