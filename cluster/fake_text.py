"""Random text that an EBNF grammar or a JSON schema allows: what the fake engine says. Seeded, and thousands of texts a second.

Understands the part of both languages that Specmill's own requests use, and says so when it meets another.
"""

import json
import re
import string
from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Any

Node = Callable[[Random], str]
MANY = 8
"""Most repetitions of `*`, `+` and of a list without an upper bound."""
WORDS = [
    "about", "after", "anyone", "before", "between", "change", "clear", "decide", "enough", "explain", "give", "help", "idea", "keep",
    "know", "list", "make", "mean", "more", "never", "often", "other", "person", "plan", "possible", "reader", "rest", "same",
    "small", "step", "such", "than", "their", "then", "these", "thing", "those", "time", "under", "way", "what", "where", "while",
    "why", "word"
]  # fmt: skip

_TOKEN = re.compile(r'\s*(::=|"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|\{\d+,\d+\}|[()|?*+]|[A-Za-z_][A-Za-z0-9_]*)')


@lru_cache(maxsize=64)
def from_grammar(grammar: str) -> Node:
    """A generator of texts of the rule `root`. Raises ValueError for a construct that it does not know."""
    rules: dict[str, Node] = {}
    for line in grammar.splitlines():
        name, found, body = line.partition("::=")
        if line.strip() and not found:
            raise ValueError(f"a rule without `::=`: {line!r}")
        if found:
            rules[name.strip()] = _Parser(_tokens(body), rules).alternatives()
    if "root" not in rules:
        raise ValueError("the grammar has no rule `root`")
    return rules["root"]


@lru_cache(maxsize=64)
def from_schema(schema: str) -> Node:
    """A generator of JSON texts that fit a schema. Raises ValueError for a type that it does not know."""
    make = _value(json.loads(schema))
    return lambda random: json.dumps(make(random), separators=(",", ":"))


def words(random: Random, characters: int) -> str:
    """Words in lower case, cut to a length."""
    return " ".join(random.choices(WORDS, k=characters // 4 + 1))[:characters].ljust(characters, "s")


class _Parser:
    """Recursive descent over the tokens of one rule."""

    def __init__(self, tokens: list[str], rules: dict[str, Node]) -> None:
        self.tokens, self.rules, self.at = tokens, rules, 0

    def alternatives(self) -> Node:
        ways = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            ways.append(self._sequence())
        return ways[0] if len(ways) == 1 else lambda random: random.choice(ways)(random)

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while (token := self._peek()) is not None and token not in "|)":
            parts.append(self._repeated())
        return lambda random: "".join([part(random) for part in parts])

    def _repeated(self) -> Node:
        token = self.tokens[self.at]
        self.at += 1
        if token == "(":
            node = self.alternatives()
            self.at += 1
        elif token[0] == '"':
            text = str(json.loads(token))
            node = lambda random: text  # noqa: E731
        elif token[0] == "[":
            return self._characters(token)
        else:
            node = lambda random: self.rules[token](random)  # noqa: E731
        low, high = self._bounds()
        if (low, high) == (1, 1):
            return node
        return lambda random: "".join([node(random) for _ in range(random.randint(low, high))])

    def _characters(self, token: str) -> Node:
        """A class of characters: words, if it allows them, or the characters that it names."""
        allowed = re.compile(token)
        low, high = self._bounds()
        if all(map(allowed.fullmatch, f"{string.ascii_lowercase} ")):
            return lambda random: words(random, random.randint(low, high))
        letters = [character for character in token[1:-1] if allowed.fullmatch(character)]
        if not letters:
            raise ValueError(f"no character to choose in {token}")
        return lambda random: "".join(random.choices(letters, k=random.randint(low, high)))

    def _bounds(self) -> tuple[int, int]:
        token = self._peek() or ""
        if token[:1] == "{":
            low, _, high = token[1:-1].partition(",")
            bounds = int(low), int(high)
        elif token in ("?", "*", "+"):
            bounds = {"?": (0, 1), "*": (0, MANY), "+": (1, MANY)}[token]
        else:
            return 1, 1
        self.at += 1
        return bounds

    def _peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise ValueError(f"unknown in a grammar: {text[at : at + 20]!r}")
        found.append(match[1])
        at = match.end()
    return found


def _value(schema: dict[str, Any]) -> Callable[[Random], Any]:
    if "enum" in schema:
        return lambda random: random.choice(schema["enum"])
    kind = schema.get("type")
    if kind == "integer":
        low, high = schema.get("minimum", 0), schema.get("maximum", 9)
        return lambda random: random.randint(low, high)
    if kind == "string":
        return lambda random: words(random, 12)
    if kind == "boolean":
        return lambda random: random.random() < 0.5
    if kind == "array":
        items = [_value(item) for item in schema.get("prefixItems", [])] or [_value(schema["items"])] * schema.get("minItems", 1)
        return lambda random: [item(random) for item in items]
    if kind == "object":
        fields = {name: _value(field) for name, field in schema.get("properties", {}).items()}
        return lambda random: {name: field(random) for name, field in fields.items()}
    raise ValueError(f"unknown in a JSON schema: {schema}")
