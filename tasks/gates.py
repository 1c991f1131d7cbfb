"""Deterministic gates before any judge: each drops a completion for one named reason."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from pydantic import Field

from tasks.keys import digest
from tasks.policy import Policy, Spec
from tasks.thoughts import cited_clauses, cited_verdict
from tasks.validation import Strict

AnswerKind = Literal["refusal", "answer"]
GATES_VERSION = 1
"""Part of the identity of every decision: raised when a gate decides otherwise than before."""
REFUSAL_WORDS = 40
"""A refusal is short; a longer text that begins with an apology has more to say."""

_WORD = re.compile(r"[\w']+")
_APOLOGY = re.compile(r"\b(sorry|apologi[sz]e|regret|unfortunately)\b", re.IGNORECASE)
_UNABLE = (
    r"(can't|cannot|can not|won't|will not|am unable|'m unable|am not able|'m not able|am not going|'m not going|must decline|"
    r"have to decline)"
)
_INABILITY = re.compile(rf"\b{_UNABLE}\b", re.IGNORECASE)
_REFUSES_TO = re.compile(
    rf"\bI\b ?{_UNABLE}\b.{{0,20}}\b(assist|help|provide|share|give|do|support|answer|write|create|discuss|engage|fulfil|comply|continue)",
    re.IGNORECASE,
)
_DANGLING = re.compile(
    r"\b(polic(y|ies)|guidelines?|rules?|clauses?|spec(ification)?)\s+(\w+\s+){0,2}(above|below|provided|given|attached|in the prompt|"
    r"in the (system )?message)\b|\b(above|provided|given|attached)\s+(\w+\s+)?(polic(y|ies)|guidelines?|specification)\b",
    re.IGNORECASE,
)


class GateConfig(Strict):
    """Limits of the gates."""

    max_copied_words: int = Field(
        16, ge=4, title="Copied words", description="Longest run of consecutive words that may be copied from the policy."
    )


def answer_kind(answer: str) -> AnswerKind:
    """Whether an English answer is a refusal: short, with an inability, and either an apology or what the assistant will not do."""
    text = _straight(answer)
    if len(_WORD.findall(text)) > REFUSAL_WORDS:
        return "answer"
    return "refusal" if (apologises(text) and unable(text)) or _REFUSES_TO.search(text) else "answer"


def apologises(answer: str) -> bool:
    """Whether an English answer says that it is sorry."""
    return _APOLOGY.search(answer) is not None


def unable(answer: str) -> bool:
    """Whether an English answer says that something cannot or will not be done."""
    return _INABILITY.search(_straight(answer)) is not None


def _straight(text: str) -> str:
    return text.replace("\u2019", "'")


@dataclass(frozen=True)
class Gates:
    """What the gates compare with. `names`: ids of the clauses and principles that may be cited."""

    config: GateConfig
    names: frozenset[str]

    @classmethod
    def of(cls, config: GateConfig, policy: Policy) -> "Gates":
        """The gates of a run."""
        return cls(config, frozenset([*policy.clauses, *policy.principles]))

    @cached_property
    def hash(self) -> str:
        """Identity of their decisions, of which the spec is no part: it is part of a row's key."""
        return digest([GATES_VERSION, self.config.model_dump(), sorted(self.names)])[:16]


@lru_cache(maxsize=64)
def spec_ngrams(text: str, size: int) -> frozenset[tuple[str, ...]]:
    """All runs of `size` words of a spec's text."""
    return frozenset(_ngrams(text, size))


def gate(row: Mapping[str, object], gates: Gates, spec: Spec) -> str | None:
    """The reason why a completion row is dropped, or None."""
    if row.get("quarantined"):
        return "quarantined"
    if row["finish_reason"] == "length":
        return "truncated"
    if row["malformed"]:
        return str(row["malformed"])
    thought, answer = str(row["thought"]), str(row["answer"])
    if not thought:
        return "empty_thought"
    if not answer:
        return "empty_answer"
    size = gates.config.max_copied_words + 1
    copied = spec_ngrams(spec.text, size)
    if any(gram in copied for gram in _ngrams(f"{thought}\n{answer}", size)):
        return "copied_spec"
    if _DANGLING.search(thought):
        return "dangling_reference"
    clauses = cited_clauses(thought)
    if not clauses:
        return "no_clause_cited"
    if any(name not in gates.names for name in clauses):
        return "unknown_clause"
    verdict = cited_verdict(thought)
    if verdict is None:
        return "no_verdict"
    if (verdict == "refuse") != (answer_kind(answer) == "refusal"):
        return "verdict_disagrees"
    return None


def _ngrams(text: str, size: int) -> Iterable[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1))
