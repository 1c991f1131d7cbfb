"""The thought: how it is marked, held by a grammar, split from the answer on token ids, and what it cites.

The only module that knows the markers. A completion is `<think>` newline thought newline `</think>` newline answer. A model with a single
token for a marker is split on that token; one without (SmolLM2) on the sequence of ids that spells it. Some chat templates write the
first marker themselves (`opened`); then completions begin inside the thought.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from cluster.chat import Chat
from cluster.engine import Completion
from tasks.policy import VERDICTS, Policy, Verdict

OPEN, CLOSE = "<think>", "</think>"
FORMAT_VERSION = 1
NO_THOUGHT = "no_thought"
"""The fault of a completion that holds neither marker: all of it is an answer."""
WITHHELD = "thought_withheld"
"""The fault of an endpoint's completion that came without the field for its thought: there is nothing to judge or to learn."""
BYTES_PER_CHARACTER = 4
"""UTF-8's longest character; a byte-level tokenizer spends at most one token on a byte."""

_VERDICT = re.compile(r"^\s*verdict:\s*(comply|refuse|safe_complete)\b", re.IGNORECASE | re.MULTILINE)
_CLAUSE = re.compile(r"\b[A-Z]{1,6}[0-9]{1,3}\b")
_CLAUSE_LINE = re.compile(r"^\s*clauses?:\s*(.+)$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Parts:
    """A completion taken apart. `thought_tokens` counts the ids before the answer, markers included."""

    thought: str
    answer: str
    thought_tokens: int


@dataclass(frozen=True)
class Malformed:
    """A completion without exactly one closed thought; `reason` names the fault."""

    reason: str


def opened(prompt_ids: Sequence[int], chat: Chat) -> bool:
    """Whether a prompt ends inside a thought, because the chat template begins the assistant's turn with one."""
    tail = "".join(chat.pieces(prompt_ids[-12:]))
    return tail.rstrip().endswith(OPEN)


def parts_of(drawn: Completion, chat: Chat | None) -> Parts | Malformed:
    """Thought and answer: split on token ids, or, where an endpoint drew (`chat` is None), as it gave them, which marks neither."""
    if chat is not None:
        return split(drawn.token_ids, chat, opened(drawn.prompt_ids, chat))
    if drawn.thought is None:
        return Malformed(WITHHELD)
    if any(marker in text for marker in (OPEN, CLOSE) for text in (drawn.thought, drawn.text)):
        return Malformed("several_thoughts")
    return Parts(drawn.thought.strip(), drawn.text.strip(), 0)


def split(ids: Sequence[int], chat: Chat, opened: bool = False) -> Parts | Malformed:
    """Splits the token ids of a completion, up to the end of the turn, into thought and answer.

    Text that merely spells a marker does not count for a model whose marker is a token of its own.
    """
    ids = list(takewhile(lambda token: token != chat.end_of_turn, ids))
    pieces = chat.pieces(ids)
    opens, closes = _find(ids, pieces, OPEN, chat), _find(ids, pieces, CLOSE, chat)
    if opened:
        opens = [(0, 0), *opens]
    if not opens:
        return Malformed("unopened_thought" if closes else NO_THOUGHT)
    if not closes:
        return Malformed("unterminated_thought")
    if len(opens) > 1 or len(closes) > 1:
        return Malformed("several_thoughts")
    (open_start, open_end), (close_start, close_end) = opens[0], closes[0]
    if "".join(pieces[:open_start]).strip() or close_start < open_end:
        return Malformed("text_before_thought")
    thought, answer = chat.decode(ids[open_end:close_start]).strip(), chat.decode(ids[close_end:]).strip()
    # without the special tokens that stood between its pieces, text may spell a marker that the ids do not
    if CLOSE not in chat.added and any(marker in text for marker in (OPEN, CLOSE) for text in (thought, answer)):
        return Malformed("several_thoughts")
    return Parts(thought, answer, close_end)


def join(thought: str, answer: str, chat: Chat, opened: bool = False) -> list[int]:
    """The token ids of a completion, as a model is trained to write it."""
    before, middle, after = "" if opened else OPEN, f"\n{thought}\n", f"\n{answer}"
    if CLOSE not in chat.added:
        return chat.text(f"{before}{middle}{CLOSE}{after}" if before else f"{thought}\n{CLOSE}{after}")
    marker = [chat.added[OPEN]] if before else []
    return [*marker, *chat.text(middle if before else f"{thought}\n"), chat.added[CLOSE], *chat.text(after)]


def cited_verdict(thought: str) -> Verdict | None:
    """The verdict that the thought ends with, if it states one."""
    found = _VERDICT.findall(thought)
    return found[-1].lower() if found else None


def cited_clauses(thought: str) -> list[str]:
    """Ids on the thought's clause lines, in order, each once."""
    return list(dict.fromkeys(_CLAUSE.findall("\n".join(_CLAUSE_LINE.findall(thought)))))


def grammar(policy: Policy, thought_characters: int, answer_characters: int, opened: bool = False, category: str | None = None) -> str:
    """An EBNF that holds a model to the format: it offers every verdict, and every clause id of the bundle or those of one `category`.

    A refusal opens with an apology and is one sentence; the other verdicts are free text. `<` cannot occur, so no marker can be forged.
    """
    offered = [name for name, (home, _) in policy.clauses.items() if category in (None, home.id)]
    clauses = " | ".join(f'"{name}"' for name in sorted(offered))
    begin = "" if opened else '"<think>\\n" '
    return "\n".join(
        [
            f'root ::= {begin}text "\\nClauses: " clause (", " clause)? "\\nVerdict: " ruling',
            f"text ::= [^<\\n]{{20,{thought_characters}}}",
            f"clause ::= {clauses}",
            'ruling ::= "refuse\\n</think>\\nI\'m sorry, but I can\'t " sentence "." | helpful "\\n</think>\\n" answer',
            'helpful ::= "comply" | "safe_complete"',
            "sentence ::= [^<.\\n]{8,80}",
            f"answer ::= [^<]{{20,{answer_characters}}}",
        ]
    )


def longest_output(policy: Policy, thought_characters: int, answer_characters: int) -> int:
    """An upper bound, in tokens, of what the grammar can produce; `max_tokens` may not be below it."""
    ids = 2 * (max(len(name) for name in policy.clauses) + 2)
    fixed = len(f"{OPEN}\n\n{CLOSE}\n") + len("\nClauses: \nVerdict: I'm sorry, but I can't .") + max(len(verdict) for verdict in VERDICTS)
    return fixed + ids + BYTES_PER_CHARACTER * (thought_characters + max(answer_characters, 80)) + 1


def _find(ids: Sequence[int], pieces: Sequence[str], marker: str, chat: Chat) -> list[tuple[int, int]]:
    """Token ranges [start, end) that hold the marker."""
    if marker in chat.added:
        return [(position, position + 1) for position, token in enumerate(ids) if token == chat.added[marker]]
    text = "".join(pieces)
    starts = _offsets(pieces)
    ranges = []
    at = text.find(marker)
    while at >= 0:
        first = max(index for index, start in enumerate(starts) if start <= at and pieces[index])
        last = next(index for index in range(first, len(pieces)) if starts[index] + len(pieces[index]) >= at + len(marker))
        ranges.append((first, last + 1))
        at = text.find(marker, at + len(marker))
    return ranges


def _offsets(pieces: Iterable[str]) -> list[int]:
    starts, total = [], 0
    for piece in pieces:
        starts.append(total)
        total += len(piece)
    return starts
