"""Turns conversations into token ids so that no text in them can end a turn or open another.

A chat template is rendered with a placeholder for every content; only the template's own text is tokenised with control tokens on.
Contents are tokenised by a copy of the tokenizer that has no added tokens at all, so `<|im_end|>` in a prompt stays nine letters and signs.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, TypedDict

from tokenizers import Tokenizer

from cluster.errors import UserError

LONG_TEXT = 2000
"""Texts of so many characters are remembered: a policy, which takes ten milliseconds to tokenise, begins thousands of requests."""
ROLES = ("system", "user", "assistant", "tool")


class Turn(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Chat:
    """The tokenizer and chat template of one model."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        definition, self._config = self._read("tokenizer.json"), self._read("tokenizer_config.json")
        template = self.path / "chat_template.jinja"
        try:
            found: Any = template.read_text(encoding="utf-8") if template.exists() else self._config.get("chat_template")
        except (OSError, ValueError) as error:
            raise UserError(f"model {path}: {template.name}: cannot be read: {error}") from error
        if not found or not isinstance(found, str):
            raise UserError(f"model {path}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json).")
        self.template = found
        self._control = self._tokenizer({**definition, "truncation": None, "padding": None})
        self._plain = self._tokenizer({**definition, "added_tokens": [], "truncation": None, "padding": None, "post_processor": None})
        self.added = {token["content"]: int(token["id"]) for token in definition.get("added_tokens", [])}
        self.control_ids = frozenset(int(token["id"]) for token in definition.get("added_tokens", []) if token["special"])
        self._long = lru_cache(maxsize=64)(self._ids)
        self._frame = lru_cache(maxsize=256)(self._make_frame)
        self._piece = cache(lambda token: str(self._control.decode([token], skip_special_tokens=False)))
        self._borders = {id for content, id in self.added.items() if id not in self._plain.encode(content, add_special_tokens=False).ids}

    @property
    def hash(self) -> str:
        """sha256 of the chat template: part of the identity of everything generated with it."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    @cached_property
    def end_of_turn(self) -> int:
        """The id that ends an assistant's turn: the first that the template writes after one."""
        slots = [f"SLOT{number:04d}{'Q' * 8}" for number in range(3)]
        roles = ("user", "assistant", "user")
        rendered = self._render([{"role": role, "content": slot} for role, slot in zip(roles, slots, strict=True)])
        after = rendered.partition(slots[1])[2].partition(slots[2])[0]
        for token in self._border(after):
            if token in self._borders:
                return token
        raise UserError(
            f"model {self.path}: its chat template ends an assistant's turn with no token of its own: a model could not learn to stop."
        )

    def text(self, text: str) -> list[int]:
        """Token ids of untrusted text; contains no control token, whatever the text spells."""
        return list(self._long(text) if len(text) >= LONG_TEXT else self._ids(text))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if self.control_ids.intersection(ids):
            raise UserError(f"model {self.path}: its tokenizer maps plain text to control tokens; it cannot be used safely.")
        return ids

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a conversation up to the point where the assistant's next turn begins.

        Raises UserError when the template leaves out or repeats a turn, which would silently train or judge something else, and when
        it parts turns by ordinary text, which a prompt could imitate.
        """
        *befores, end = self._frame(tuple(turn["role"] for turn in turns))
        ids: list[int] = []
        for before, turn in zip(befores, turns, strict=True):
            ids += before
            ids += self.text(turn["content"])
        return ids + end

    def _make_frame(self, roles: tuple[str, ...]) -> list[list[int]]:
        """What the template writes before each turn of a conversation, and after the last."""
        slots = [f"SLOT{number:04d}{'Q' * 8}" for number in range(len(roles))]
        rest = self._render([{"role": role, "content": slot} for role, slot in zip(roles, slots, strict=True)])
        frame: list[list[int]] = []
        for role, slot in zip(roles, slots, strict=True):
            before, found, rest = rest.partition(slot)
            if not found or slot in rest:
                raise UserError(f"model {self.path}: its chat template does not render a {role!r} turn exactly once.")
            frame.append(self._border(before) if frame else self._control.encode(before, add_special_tokens=False).ids)
        return [*frame, self._border(rest)]

    def _border(self, text: str) -> list[int]:
        """What the template writes after a turn; in it there has to be a token that no text can imitate."""
        ids: list[int] = self._control.encode(text, add_special_tokens=False).ids
        if not self._borders.intersection(ids):
            raise UserError(f"model {self.path}: its chat template parts turns by ordinary text ({text!r}), which a prompt could imitate.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control tokens are left out."""
        return str(self._control.decode([token for token in ids if token not in self.control_ids], skip_special_tokens=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of every single token; half characters appear as replacement signs."""
        return [self._piece(token) for token in ids]

    def _render(self, turns: list[dict[str, str]]) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self._template.render(messages=turns, add_generation_prompt=True, **self._specials))
        except TemplateError as error:
            roles = " ".join(turn["role"] for turn in turns)
            raise UserError(f"model {self.path}: its chat template refuses the turns {roles}: {error}") from error

    @cached_property
    def _specials(self) -> dict[str, Any]:
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: self._config.get(name) for name in names}
        return {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items() if token}

    @cached_property
    def _template(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda _format: ""
        return environment.from_string(self.template)

    def _tokenizer(self, definition: dict[str, Any]) -> Tokenizer:
        try:
            return Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"model {self.path}: tokenizer.json: no tokenizer: {error}") from error

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"model {self.path}: no {name}; a Hugging Face fast tokenizer is needed.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"model {self.path}: {name}: cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"model {self.path}: {name}: expected an object, found {type(content).__name__}.")
        return content


@lru_cache(maxsize=4)
def chat_of(path: str) -> Chat:
    """The tokenizer of a model, read once per process."""
    return Chat(path)


def _raise(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)
