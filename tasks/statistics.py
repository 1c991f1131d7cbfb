"""Intervals: Wilson's for proportions, never of zero width, so that "0 of 56" is no certainty; a clustered bootstrap for differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """`count` of `total`, with the 95 % Wilson interval [low, high] (Wilson 1927)."""

    count: int
    total: int

    @property
    def value(self) -> float | None:
        """The share, or None of nothing."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval; [0, 1] of nothing."""
        if not self.total:
            return 0.0, 1.0
        n, p, z2 = self.total, self.count / self.total, Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def as_json(self) -> dict[str, float | int | None]:
        """For manifests."""
        low, high = self.interval
        return {"count": self.count, "total": self.total, "value": self.value, "low": low, "high": high}


def clustered_mean(clusters: Sequence[Sequence[float]], resamples: int, seed: int = 0) -> dict[str, float]:
    """Mean of all values with the 95 % percentile interval of a bootstrap that draws whole clusters with replacement."""
    totals = np.array([sum(values) for values in clusters])
    sizes = np.array([len(values) for values in clusters])
    drawn = np.random.default_rng(seed).integers(len(clusters), size=(resamples, len(clusters)))
    means = totals[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(totals.sum() / sizes.sum()), "low": float(low), "high": float(high)}
