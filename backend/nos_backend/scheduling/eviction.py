"""Which model leaves a device first: one score per policy, the smallest leaves.

Pure: facts and the time in, a number out.

`gdsf` is Greedy-Dual-Size-Frequency (Cherkasova 1998): H = L + frequency * reload seconds / bytes, where
L is the H of the last victim, so that what was popular long ago ages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: After how long a past use counts half.
HALF_LIFE_S: Final = 600.0


@dataclass(slots=True)
class Usage:
    """What the policies know of one model."""

    loaded_s: float = 0.0
    """When it was loaded last."""
    used_s: float = 0.0
    """When it was used last."""
    frequency: float = 0.0
    """Uses, each counting half after every `HALF_LIFE_S`, as of `used_s`."""
    floor: float = 0.0
    """`gdsf`: the L in force at its last use."""

    def use(self, now_s: float, floor: float) -> None:
        """Count one use."""
        self.frequency = self.frequency_at(now_s) + 1.0
        self.used_s = now_s
        self.floor = floor

    def frequency_at(self, now_s: float) -> float:
        """Return the uses as they count now."""
        return self.frequency * math.exp2(-max(0.0, now_s - self.used_s) / HALF_LIFE_S)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may leave."""

    usage: Usage
    """How it was used."""
    weight_bytes: int
    """What its leaving frees."""
    reload_s: float
    """What its coming back costs, in seconds, from the tier where it would wait."""


Policy = Callable[[Candidate, float], float]


def lru(candidate: Candidate, now_s: float) -> float:
    """Least recently used leaves first."""
    del now_s
    return candidate.usage.used_s


def fifo(candidate: Candidate, now_s: float) -> float:
    """First loaded leaves first."""
    del now_s
    return candidate.usage.loaded_s


def lfu(candidate: Candidate, now_s: float) -> float:
    """Least frequently used leaves first."""
    return candidate.usage.frequency_at(now_s)


def gdsf(candidate: Candidate, now_s: float) -> float:
    """What is cheapest to bring back per byte and use leaves first."""
    worth = candidate.usage.frequency_at(now_s) * candidate.reload_s
    return candidate.usage.floor + worth / max(1, candidate.weight_bytes)


POLICIES: Final[dict[str, Policy]] = {"lru": lru, "fifo": fifo, "lfu": lfu, "gdsf": gdsf}
