"""How many replicas a model should have, from how long its calls wait and how busy its replicas are; pure.

More at once when calls wait, fewer only after a long time of being too many: a load costs seconds and a
replica too many costs nothing but room.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

#: Calls may wait so long before there are too few replicas.
MAX_QUEUE_S: Final = 0.25
#: So long they have waited before a replica is added: one burst is over before it could serve.
UP_AFTER_S: Final = 1.5
#: Rates are taken over so long.
_WINDOW_S: Final = 3.0
#: A replica that is busy for no more than this share of the time is not missed.
_SPARE: Final = 0.2
#: At most so many times the replicas there are, in one step.
_MAX_GROWTH: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How a model stood at some time."""

    num_pending: int
    """Calls that wait or run, on all replicas."""
    num_busy: int
    """Replicas that have any."""
    num_answered: int
    """Calls answered so far, by the replicas that there are."""
    num_serving: int
    """Replicas that answer."""


@dataclass(frozen=True, slots=True)
class Aim:
    """A number of replicas, and why."""

    target: int
    why: str


@dataclass(slots=True)
class _History:
    #: (time, sample), as far back as the longest window.
    samples: deque[tuple[float, Sample]] = field(default_factory=deque)
    #: Since when calls have waited too long; None while they do not.
    waiting_since_s: float | None = None
    #: When the number of replicas changed, or somebody asked for one.
    changed_s: float = 0.0


class Autoscaler:
    """Watches models whose number of replicas may change.

    Args:
        down_after_s: How long replicas must have been too many before one leaves.
    """

    def __init__(self, down_after_s: float) -> None:
        self._down_after_s = down_after_s
        self._histories: dict[str, _History] = {}

    def asked(self, key: str, now_s: float) -> None:
        """Take note that somebody asked for a model; it is not taken for idle right after."""
        self._histories.setdefault(key, _History()).changed_s = now_s

    def forget(self, key: str) -> None:
        """Forget a model."""
        self._histories.pop(key, None)

    def observe(
        self, key: str, sample: Sample, now_s: float, *, low: int, high: int, target: int
    ) -> Aim | None:
        """Take note of how a model stands; returns another number of replicas if there should be one.

        Args:
            key: The model.
            sample: Of now.
            now_s: By any clock that does not go back.
            low: The fewest replicas that it may have.
            high: The most.
            target: How many it should have so far.
        """
        history = self._histories.setdefault(key, _History(changed_s=now_s))
        samples = history.samples
        samples.append((now_s, sample))
        while samples[0][0] < now_s - max(self._down_after_s, _WINDOW_S):
            samples.popleft()
        aim = self._grow(history, now_s, high, target) or self._shrink(history, now_s, low, target)
        if aim is not None:
            history.changed_s, history.waiting_since_s = now_s, None
            samples.clear()
        return aim

    def _grow(self, history: _History, now_s: float, high: int, target: int) -> Aim | None:
        queue_s = self._queue_s(history, now_s)
        if queue_s <= MAX_QUEUE_S:
            history.waiting_since_s = None
            return None
        if history.waiting_since_s is None:
            history.waiting_since_s = now_s
        is_settled = history.samples[-1][1].num_serving >= target
        if target >= high or not is_settled or now_s - history.waiting_since_s < UP_AFTER_S:
            return None
        growth = min(_MAX_GROWTH, queue_s / MAX_QUEUE_S)
        wanted = min(high, max(target + 1, math.floor(target * growth)))
        waited = "and none was answered" if math.isinf(queue_s) else f"{queue_s:.2g} s"
        return Aim(wanted, f"calls waited {waited}")

    @staticmethod
    def _queue_s(history: _History, now_s: float) -> float:
        """Return how long a new call would wait, by Little's law; infinite while none is answered."""
        _, last = history.samples[-1]
        num_waiting = last.num_pending - last.num_busy
        if num_waiting <= 0:
            return 0.0
        recent = [item for item in history.samples if item[0] >= now_s - _WINDOW_S]
        first_s, first = recent[0]
        num_answered = last.num_answered - first.num_answered
        if num_answered <= 0:
            return math.inf if now_s - first_s >= UP_AFTER_S else 0.0
        return num_waiting * (now_s - first_s) / num_answered

    def _shrink(self, history: _History, now_s: float, low: int, target: int) -> Aim | None:
        if target <= low or now_s - history.changed_s < self._down_after_s:
            return None
        samples = [sample for _, sample in history.samples]
        if any(sample.num_pending > sample.num_busy for sample in samples):
            return None
        mean_busy = sum(sample.num_busy for sample in samples) / len(samples)
        num_new = samples[-1].num_answered - samples[0].num_answered
        if mean_busy == 0 and num_new <= 0:
            return Aim(low, f"no call for {self._down_after_s:g} s")
        wanted = max(low, 1, math.ceil(mean_busy - _SPARE))
        if wanted >= target:
            return None
        return Aim(wanted, f"{mean_busy:.1f} of {target} replicas were busy")
