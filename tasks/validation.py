"""Reads what a person writes, and turns what is wrong with it into messages to act on: file, place, field, what is wrong."""

import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import UserError

T = TypeVar("T", bound=BaseModel)
SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_DEPTH = 100
MAX_VALUES = 100_000
"""No file that a person writes has more; one whose aliases repeat aliases has billions."""
MAX_DIGITS = 40
SHOWN = 60
"""Characters of a wrong value or name that a message repeats."""
_REPR = reprlib.Repr()  # of what is long or deep only the beginning
_REPR.maxstring = _REPR.maxother = SHOWN
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Strict(BaseModel):
    """Base of everything a person writes: an unknown field is an error, never ignored, and so is a number that is none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping; raises UserError that names the file and, for broken YAML, the line."""
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from error
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of fields, found {type(content).__name__}.")
    return content


def load_yaml(text: str) -> Any:
    """The content of a YAML text: what JSON can say too, dates, `yes` and `off` being text. Raises yaml.YAMLError.

    A key that is there twice is an error, since all but the last would silently not count. What an alias names is copied.
    """
    _check_depth(text)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check(root)
        return _apart(loader.construct_document(root))
    except (ValueError, LookupError) as error:
        raise yaml.YAMLError(str(error)) from error
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    finally:
        loader.dispose()


def _apart(value: Any) -> Any:
    """A copy in which what an alias stands for is a value of its own, so that a change in one place is none in another."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value


class _Loader(SafeLoader):
    """Leaves dates as they are written, and, as YAML 1.2 does, `yes`, `no`, `on` and `off`: these are values of ours.

    libyaml's, where PyYAML has it: a policy takes 0.02 s instead of 0.3 s.
    """


_Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag != "tag:yaml.org,2002:timestamp" and (tag != "tag:yaml.org,2002:bool" or letter in "tTfF")
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _check_depth(text: str) -> None:
    """Raises yaml.YAMLError before anything descends into what is nested without end."""
    depth = 0
    for event in yaml.parse(text, SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested too deeply{event.start_mark}")


def _check(root: yaml.Node) -> None:
    """Looks at every value as often as aliases repeat it. Raises yaml.YAMLError."""
    waiting = [root]
    for _ in range(MAX_VALUES):
        if not waiting:
            return
        node = waiting.pop()
        if node.tag not in _TAGS:
            raise _wrong(node, f"the tag {node.tag!r}, which no field takes")
        if isinstance(node, yaml.MappingNode):
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise _wrong(key, "a key that is no text")
                if (key.tag, key.value) in seen:
                    raise _wrong(key, f"{key.value!r} is there twice")
                seen.add((key.tag, key.value))
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif _NO_TEXT.search(node.value):
            raise _wrong(node, f"text with a control character or half a character: {_short(node.value)}")
        elif node.tag != "tag:yaml.org,2002:str" and len(node.value) > MAX_DIGITS:
            raise _wrong(node, f"a number of more than {MAX_DIGITS} digits")
    raise _wrong(root, f"more than {MAX_VALUES:,} values, those that aliases repeat included")


def _wrong(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def parse(model: type[T], content: Any, path: Path | str, place: Callable[[tuple], str] | None = None) -> T:
    """Validates `content` as `model`; raises UserError with one line for every problem."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(describe(error, path, place))) from error


def describe(error: ValidationError, path: Path | str, place: Callable[[tuple], str] | None = None) -> list[str]:
    """One line for every problem: `file: place: what`. `place` turns pydantic's location into words."""
    lines = []
    for problem in error.errors(include_url=False):
        location = place(problem["loc"]) if place else ".".join(map(name_of, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown field"
        elif problem["type"] != "missing":
            message += f" (found {_short(problem['input'])})"
        lines.append(f"{path}: {location}: {message}" if location else f"{path}: {message}")
    return lines


def name_of(part: Any) -> str:
    """A part of a location; what a row calls its fields may be anything."""
    text = str(part)
    return text if text and text.isprintable() and len(text) <= SHOWN else _short(part)


def _short(value: Any) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
