"""Selection: threshold, best of n, quotas, and the funnel that names every row that left and why."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cluster.errors import SpecmillError
from tasks.validation import Strict


class PairConfig(Strict):
    """Which pairs of completions a dataset holds."""

    per_prompt: int = Field(1, ge=0, title="Pairs per prompt", description="Most pairs of a prompt; a completion is in one pair at most.")
    margin: float = Field(
        1.0, gt=0, le=4, title="Margin", description="Least difference of the two mean scores, on the judge's scale of 1 to 5."
    )
    sampling: Literal["extremes", "rso"] = Field(
        "extremes",
        title="Sampling",
        description="extremes: the best against the worst, the second best against the second worst; rso: of what statistical rejection "
        "sampling accepts (arXiv 2309.06657), two at a time.",
    )
    rso_beta: float = Field(
        0.5, gt=0, title="RSO beta", description="rso: a completion d points below the best is accepted with probability exp(-d / beta)."
    )


class SelectConfig(Strict):
    """Which judged rows become training data."""

    threshold: int = Field(4, ge=1, le=5, title="Threshold", description="Lowest row score (minimum over k runs) that is kept.")
    category_threshold: dict[str, Annotated[int, Field(ge=1, le=5)]] = Field(
        {}, title="Thresholds by category", description="Overrides the threshold."
    )
    best_of: int = Field(1, ge=1, title="Best of n", description="Kept samples per prompt, the best first.")
    max_per_category: int | None = Field(None, ge=1, title="Category quota", description="Most rows of one category.")
    max_per_verdict: int | None = Field(None, ge=1, title="Verdict quota", description="Most rows of one verdict within a category.")
    spare: int = Field(
        3,
        ge=0,
        title="Spare rows",
        description="Most rows of a prompt that pass the threshold beyond best of n and quotas; the stage `rejection` takes them too.",
    )
    pairs: PairConfig = Field(PairConfig(), title="Pairs", description="Preference pairs, from which the stage `dpo` learns.")
    min_categories: int = Field(2, ge=1, title="Categories needed", description="Fewer categories with kept rows stop the run.")

    def limit(self, category: str) -> int:
        """The threshold of a category."""
        return self.category_threshold.get(category, self.threshold)


@dataclass
class Candidates:
    """Completions on their way through the funnel: arrays of one length, ties going to the lower sample number, then to the first.

    `category` counts `categories`, `verdict` the verdicts that are cited, `prompt` the prompts. `scores` has a column for each judge run,
    at most 0 where there is no score. `reason` counts `reasons`, of which the first, None, means: still in.
    """

    categories: list[str]
    category: npt.NDArray[np.uint8]
    verdict: npt.NDArray[np.uint8]
    prompt: npt.NDArray[np.uint32]
    sample: npt.NDArray[np.uint16]
    scores: npt.NDArray[np.int8]
    reason: npt.NDArray[np.uint8]
    reasons: list[str | None]

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Which are still in."""
        return self.reason == 0

    @property
    def score(self) -> npt.NDArray[np.int8]:
        """The minimum over k runs; 0 unless all runs have a score: a missing verdict is missing data."""
        return lowest(self.scores)

    def take(self, index: npt.NDArray[np.int64]) -> "Candidates":
        """Some of them."""
        arrays = {name: getattr(self, name)[index] for name in ("category", "verdict", "prompt", "sample", "scores", "reason")}
        return replace(self, **arrays)

    def drop(self, which: npt.NDArray[Any] | int, reason: str) -> None:
        """Takes completions out for a reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.reason[which] = self.reasons.index(reason)


SPARE = ("not_best_of_n", "verdict_quota", "category_quota")
"""Reasons of completions that passed the threshold and were more than was wanted."""


def passed(found: Candidates) -> npt.NDArray[np.bool_]:
    """Which completions passed the threshold, those that were more than was wanted included."""
    return np.array([reason is None or reason in SPARE for reason in found.reasons])[found.reason]


def spare(found: Candidates, most: int) -> npt.NDArray[np.bool_]:
    """Of those that were more than was wanted the best, at most so many of a prompt."""
    chosen = np.zeros(len(found.reason), np.bool_)
    left = np.flatnonzero(passed(found) & ~found.kept) if most else np.empty(0, np.int64)
    ranked = left[np.lexsort((found.sample[left], -found.score[left], found.prompt[left]))]
    prompt = found.prompt[ranked]
    places = np.arange(len(ranked)) - np.searchsorted(prompt, prompt)
    chosen[ranked[places < most]] = True
    return chosen


def lowest(scores: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """The score of each row of (completion, run); 0 where a run has none."""
    return np.where((scores > 0).all(axis=1), scores.min(axis=1), 0)


def select(found: Candidates, config: SelectConfig) -> None:
    """Takes out what is not kept, each completion for one reason."""
    per_prompt = np.zeros(int(found.prompt.max(initial=0)) + 1, np.uint16)
    for category, name in enumerate(found.categories):
        left = np.flatnonzero(found.kept & (found.category == category))
        scores = found.scores[left]
        found.drop(left[((scores > 0) & (scores < config.limit(name))).any(axis=1)], "below_threshold")
        score = lowest(scores)
        found.drop(left[found.kept[left] & (score == 0)], "judgement_missing")
        _rank(found, left[np.lexsort((found.sample[left], -score))], per_prompt, config)


def _rank(found: Candidates, ranked: npt.NDArray[np.int64], per_prompt: npt.NDArray[np.uint16], config: SelectConfig) -> None:
    """Takes out, of the completions of a category, best first, what is more than enough of a prompt, a verdict or the category."""
    kept, per_verdict = 0, Counter[int]()
    for index in ranked[found.kept[ranked]]:
        prompt, verdict = int(found.prompt[index]), int(found.verdict[index])
        if per_prompt[prompt] >= config.best_of:
            found.drop(index, "not_best_of_n")
        elif config.max_per_verdict is not None and per_verdict[verdict] >= config.max_per_verdict:
            found.drop(index, "verdict_quota")
        elif config.max_per_category is not None and kept >= config.max_per_category:
            found.drop(index, "category_quota")
        else:
            per_prompt[prompt] += 1
            per_verdict[verdict] += 1
            kept += 1


def funnel(found: Candidates) -> dict[str, dict[str, int]]:
    """Category -> {kept, and every drop reason -> count}; the counts of a category add up to its completions."""
    table: dict[str, dict[str, int]] = {}
    for number, name in enumerate(found.categories):
        counts = np.bincount(found.reason[found.category == number], minlength=len(found.reasons))
        table[name] = {reason or "kept": int(count) for reason, count in zip(found.reasons, counts, strict=True) if count}
    return {name: dict(sorted(counts.items())) for name, counts in table.items() if counts}


def funnel_markdown(table: dict[str, dict[str, int]]) -> str:
    """The funnel as a Markdown table: one row per category, one column per way out."""
    reasons = sorted({reason for counts in table.values() for reason in counts} - {"kept"})
    columns = ["kept", *reasons]
    lines = ["| category | completions | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for category, counts in table.items():
        cells = [str(counts.get(column, 0)) for column in columns]
        lines.append(f"| {category} | {sum(counts.values())} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def require_kept(table: dict[str, dict[str, int]], config: SelectConfig) -> None:
    """Stops the run, showing the funnel, when too few categories have kept rows."""
    kept = {category: counts["kept"] for category, counts in table.items() if counts.get("kept")}
    if len(kept) < config.min_categories:
        raise SpecmillError(
            f"the selection kept {sum(kept.values())} rows in {len(kept)} categories; {config.min_categories} categories are needed. "
            f"Lower select.threshold, raise generate.n, or look at the drop reasons:\n\n{funnel_markdown(table)}"
        )
