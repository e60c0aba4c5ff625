"""Which batch is worth its wait: from what a few sizes were measured to take, in time and in memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The batch chosen has at least this share of the best throughput that was measured.
GOOD_SHARE: Final = 0.9
#: A point within this share of the line through the first and the last is on the line.
_LINEAR_TOLERANCE: Final = 0.02
#: Batches that take so many times as long, or so much less, are not those that were measured.
_OFF: Final = 2.0
_AROUND_S: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Choice:
    """The batch that was chosen, and the line that its times follow."""

    rows: int
    why: str
    """One sentence, with figures."""
    t0_s: float
    """Of a batch whatever its size."""
    row_s: float
    """Of each row."""


def choose(times: Sequence[tuple[int, float]]) -> Choice:
    """Return the smallest batch that has nine tenths of the best throughput.

    Args:
        times: (rows, seconds that such a batch takes), of different sizes.

    Raises:
        ValueError: If there is none, or one of no rows or no time.
    """
    if not times or any(rows < 1 or took_s <= 0 for rows, took_s in times):
        raise ValueError(f"no times to choose from: {times}")
    points = sorted(times)
    rate_hz = {rows: rows / took_s for rows, took_s in points}
    best = max(rate_hz, key=lambda rows: rate_hz[rows])
    chosen = min(rows for rows in rate_hz if rate_hz[rows] >= GOOD_SHARE * rate_hz[best])
    if chosen == best:
        why = f"no other size measured is within 10 % of its {rate_hz[best]:,.0f} items/s"
        if best == points[0][0]:
            why = f"larger batches are no faster than its {rate_hz[best]:,.0f} items/s"
    else:
        why = (
            f"the smallest size within 10 % of the best throughput: {rate_hz[chosen]:,.0f} of"
            f" {rate_hz[best]:,.0f} items/s at {best}"
        )
    return Choice(chosen, why, *_line(points))


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit t0 + a rows by least squares of the relative errors, neither below 0."""
    weights = [1.0 / (took_s * took_s) for _, took_s in points]
    total = sum(weights)
    x = sum(w * rows for w, (rows, _) in zip(weights, points, strict=True)) / total
    y = sum(w * took_s for w, (_, took_s) in zip(weights, points, strict=True)) / total
    spread = sum(w * (rows - x) ** 2 for w, (rows, _) in zip(weights, points, strict=True))
    if not spread:
        return y, 0.0
    slope = (
        sum(w * (rows - x) * (t - y) for w, (rows, t) in zip(weights, points, strict=True)) / spread
    )
    slope = min(max(slope, 0.0), y / x)
    return y - slope * x, slope


@dataclass(frozen=True, slots=True)
class ActivationFit:
    """Peak bytes over the batch size: a line where it is one, else the points."""

    base_bytes: float
    """At batch size 0."""
    item_bytes: float
    """Per item."""
    points: tuple[tuple[int, int], ...]
    """(batch size, peak bytes), in order."""
    is_linear: bool
    """Whether all points lie on the line."""

    def at(self, batch_size: int) -> int:
        """Return the bytes to expect; never below a measured point of a smaller batch."""
        line = round(self.base_bytes + self.item_bytes * batch_size)
        return max([line, *(peak for size, peak in self.points if size <= batch_size)])

    def rows_within(self, num_bytes: int, most: int) -> int:
        """Return the largest batch of at most `most` that needs no more than so many bytes; at least 1."""
        fitting = (rows for rows in range(most, 1, -1) if self.at(rows) <= num_bytes)
        return next(fitting, 1)


def fit_activations(points: Sequence[tuple[int, int]]) -> ActivationFit:
    """Fit a line through the first and the last of (batch size, peak bytes) and see who lies on it.

    Raises:
        ValueError: If there is none.
    """
    if not points:
        raise ValueError("no measurement to fit")
    ordered = tuple(sorted(points))
    (first, low), (last, high) = ordered[0], ordered[-1]
    slope = (high - low) / (last - first) if last > first else 0.0
    base = low - slope * first
    is_linear = all(
        abs(base + slope * size - peak) <= _LINEAR_TOLERANCE * max(1, peak)
        for size, peak in ordered
    )
    if not is_linear:
        slope = max(slope, *(peak / size for size, peak in ordered))
        base = 0.0
    return ActivationFit(base, slope, ordered, is_linear)


def is_off(expected_s: float, took_s: float) -> bool:
    """Whether what batches take is so far from what a profile says that it is worth another one.

    What lies around a batch, under a millisecond, is not in a profile.
    """
    return not expected_s / _OFF <= took_s <= _OFF * expected_s + _AROUND_S
