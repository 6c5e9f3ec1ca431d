"""How often something was right, and how sure one can be of it."""

import math
from dataclasses import dataclass

from torch import Tensor

NORMAL_95 = 1.959964  # two-sided 95% quantile of the normal distribution


@dataclass(frozen=True)
class Rate:
    """`right` of `total`."""

    right: int
    total: int

    @classmethod
    def of(cls, flags: Tensor) -> "Rate":
        return cls(int(flags.sum()), flags.numel())

    @property
    def value(self) -> float:
        return self.right / self.total if self.total else math.nan

    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval: holds for few clips and for rates near 0 and 1."""
        if not self.total:
            return math.nan, math.nan
        n, p, z2 = self.total, self.value, NORMAL_95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = NORMAL_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        """In percent with the interval: "97.5 (95.5-98.6)"."""
        if not self.total:
            return "-"
        low, high = self.interval()
        return f"{100 * self.value:.1f} ({100 * low:.1f}-{100 * high:.1f})"

    def as_json(self) -> dict[str, float | int | list[float] | None]:
        if not self.total:
            return {"percent": None, "right": 0, "of": 0, "interval_95": None}
        interval = [round(100 * bound, 2) for bound in self.interval()]
        return {"percent": round(100 * self.value, 2), "right": self.right, "of": self.total, "interval_95": interval}


@dataclass(frozen=True)
class PairedRates:
    """The rates of two ways to make the same `total` things, compared thing by thing."""

    gained: int
    """Right now and wrong before."""
    lost: int
    """Wrong now and right before."""
    total: int

    @classmethod
    def of(cls, now: Tensor, before: Tensor) -> "PairedRates":
        """Flags (N,) of the same things in the same order."""
        return cls(int((now & ~before).sum()), int((~now & before).sum()), now.numel())

    @property
    def value(self) -> float:
        """Mean of the differences, each -1, 0 or 1."""
        return (self.gained - self.lost) / self.total if self.total else math.nan

    def interval(self) -> tuple[float, float]:
        """95% interval of Agresti and Min (Statistics in Medicine 24, 2005, 729-740).

        It is the normal approximation to the mean of the differences, with half a thing added to each of the four cells
        of right and wrong. Without that, as
        with a bootstrap, it has no width where nothing differs, and is too narrow where little does."""
        if not self.total:
            return math.nan, math.nan
        n, differ, change = self.total + 2, self.gained + self.lost + 1, self.gained - self.lost
        half = NORMAL_95 * math.sqrt(differ - change * change / n) / n
        return max(-1.0, change / n - half), min(1.0, change / n + half)
