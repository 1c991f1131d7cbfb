"""Intervals for proportions: Wilson's, which is never of zero width, so that "0 of 56" is not reported as certainty."""

import math
from dataclasses import dataclass

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

    def __str__(self) -> str:
        if not self.total:
            return "-"
        low, high = self.interval
        return f"{100 * self.count / self.total:.0f} % [{100 * low:.0f}, {100 * high:.0f}] ({self.count}/{self.total})"

    def as_json(self) -> dict[str, float | int | None]:
        """For manifests."""
        low, high = self.interval
        return {"count": self.count, "total": self.total, "value": self.value, "low": low, "high": high}
