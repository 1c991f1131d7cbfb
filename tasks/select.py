"""Selection: threshold, best of n, quotas, and the funnel that names every row that left and why."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field

from cluster.errors import SpecmillError
from tasks.validation import Strict


class SelectConfig(Strict):
    """Which judged rows become training data."""

    threshold: int = Field(4, ge=1, le=5, title="Threshold", description="Lowest row score (minimum over k runs) that is kept.")
    category_threshold: dict[str, int] = Field({}, title="Thresholds by category", description="Overrides the threshold.")
    best_of: int = Field(1, ge=1, title="Best of n", description="Kept samples per prompt, the best first.")
    max_per_category: int | None = Field(None, ge=1, title="Category quota", description="Most rows of one category.")
    max_per_verdict: int | None = Field(None, ge=1, title="Verdict quota", description="Most rows of one verdict within a category.")
    min_categories: int = Field(2, ge=1, title="Categories needed", description="Fewer categories with kept rows stop the run.")

    def limit(self, category: str) -> int:
        """The threshold of a category."""
        return self.category_threshold.get(category, self.threshold)


@dataclass
class Candidate:
    """A completion on its way through the funnel. `scores`: one per judge run that could be parsed."""

    key: bytes
    prompt_id: str
    category: str
    verdict: str | None
    sample: int
    scores: tuple[int, ...]
    runs_wanted: int
    drop_reason: str | None = None

    @property
    def score(self) -> int | None:
        """The minimum over k runs; None unless all runs were parsed: a missing verdict is missing data."""
        return min(self.scores) if self.scores and len(self.scores) == self.runs_wanted else None


def select(candidates: Iterable[Candidate], config: SelectConfig) -> list[Candidate]:
    """Marks candidates that are not kept with a drop reason; returns the kept ones. Ties go to the lower sample number, then the key."""
    pending = [candidate for candidate in candidates if candidate.drop_reason is None]
    for candidate in pending:
        limit = config.limit(candidate.category)
        if candidate.scores and min(candidate.scores) < limit:
            candidate.drop_reason = "below_threshold"
        elif candidate.score is None:
            candidate.drop_reason = "judgement_missing"
    ranked = sorted((c for c in pending if c.drop_reason is None), key=lambda c: (-(c.score or 0), c.sample, c.key))
    per_prompt: Counter[str] = Counter()
    per_category: Counter[str] = Counter()
    per_verdict: Counter[tuple[str, str | None]] = Counter()
    kept = []
    for candidate in ranked:
        cell = (candidate.category, candidate.verdict)
        if per_prompt[candidate.prompt_id] >= config.best_of:
            candidate.drop_reason = "not_best_of_n"
        elif config.max_per_verdict is not None and per_verdict[cell] >= config.max_per_verdict:
            candidate.drop_reason = "verdict_quota"
        elif config.max_per_category is not None and per_category[candidate.category] >= config.max_per_category:
            candidate.drop_reason = "category_quota"
        else:
            per_prompt[candidate.prompt_id] += 1
            per_category[candidate.category] += 1
            per_verdict[cell] += 1
            kept.append(candidate)
    return kept


def funnel(candidates: Iterable[Candidate]) -> dict[str, dict[str, int]]:
    """Category -> {kept, and every drop reason -> count}; the counts of a category add up to its completions."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for candidate in candidates:
        table[candidate.category][candidate.drop_reason or "kept"] += 1
    return {category: dict(sorted(counts.items())) for category, counts in sorted(table.items())}


def funnel_markdown(table: dict[str, dict[str, int]]) -> str:
    """The funnel as a Markdown table: one row per category, one column per way out."""
    reasons = sorted({reason for counts in table.values() for reason in counts} - {"kept"})
    columns = ["kept", *reasons]
    lines = ["| category | completions | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for category, counts in table.items():
        cells = [str(counts.get(column, 0)) for column in columns]
        lines.append(f"| {category} | {sum(counts.values())} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def require_kept(kept: list[Candidate], table: dict[str, dict[str, int]], config: SelectConfig) -> None:
    """Stops the run, showing the funnel, when too few categories have kept rows."""
    categories = {candidate.category for candidate in kept}
    if len(categories) < config.min_categories:
        raise SpecmillError(
            f"the selection kept {len(kept)} rows in {len(categories)} categories; {config.min_categories} categories are needed. "
            f"Lower select.threshold, raise generate.n, or look at the drop reasons:\n\n{funnel_markdown(table)}"
        )
