"""What the dashboard shows, worked out of what workers count: rates, waits and latencies over time. Pure.

Workers send counts since each model was loaded with their heartbeats anyway; what changed from one look to
the next is what happened between them, so the page costs the workers nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from nos_backend.control.statistics import quantile_s

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: How far back the lines go.
SHOWN_S: Final = 120.0
#: A point of a line is over so much of the past.
WINDOW_S: Final = 5.0
#: One point of each line per second.
_STEP_S: Final = 1.0
#: Batches are counted over so much of the past.
BATCHES_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Point:
    """One model at one time, over the `WINDOW_S` before it."""

    time_s: float
    #: Answers per second.
    answers_hz: float
    #: Mean time that answered requests had waited for the device.
    queue_s: float
    #: What 99 of 100 answers took at most, on the worker.
    p99_s: float


@dataclass(slots=True)
class _Change:
    """What one replica did between two looks."""

    time_s: float
    worker: str
    key: str
    num_answered: int
    queue_s: float
    latencies: Counter[int]
    batches: Counter[int]


@dataclass(slots=True)
class Figures:
    """What happened lately. `observe` is called some times a second."""

    #: By model version, the oldest first.
    points: dict[str, deque[Point]] = field(default_factory=dict)
    #: Of the last `BATCHES_S`, the oldest first.
    _changes: deque[_Change] = field(default_factory=deque)
    #: What each replica had counted, by worker and model version.
    _last: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _began_s: float | None = None
    _drawn_s: float = 0.0

    def observe(self, workers: Iterable[Mapping[str, Any]], now_s: float) -> None:
        """Take the workers as `ClusterLink.state` has them."""
        last, self._last = self._last, {}
        for worker in workers:
            for model in worker["status"].get("models", ()):
                found = model.get("statistics")
                if not found:
                    continue
                place = (str(worker["name"]), str(model["key"]))
                self._last[place] = found
                # What was there before the page was opened happened before.
                if self._began_s is not None:
                    self._note(place, last.get(place), found, now_s)
        self._began_s = self._began_s or now_s
        while self._changes and self._changes[0].time_s < now_s - BATCHES_S:
            self._changes.popleft()
        if now_s >= self._drawn_s + _STEP_S:
            self._drawn_s = now_s
            self._draw(now_s)

    def _note(
        self,
        place: tuple[str, str],
        before: Mapping[str, Any] | None,
        now: Mapping[str, Any],
        now_s: float,
    ) -> None:
        num_answered = int(now["outcomes"].get("answered", 0))
        if before is not None and num_answered < before["outcomes"].get("answered", 0):
            before = None  # it was loaded again, and counts from zero
        before = before or {"outcomes": {}, "latencies": {}, "batches": {}, "seconds": {}}
        change = _Change(
            now_s,
            *place,
            num_answered=num_answered - int(before["outcomes"].get("answered", 0)),
            queue_s=now["seconds"].get("queue", 0.0) - before["seconds"].get("queue", 0.0),
            latencies=_more(now["latencies"], before["latencies"]),
            batches=_more(now["batches"], before["batches"]),
        )
        if change.num_answered or change.batches:
            self._changes.append(change)

    def _draw(self, now_s: float) -> None:
        keys = {key for _, key in self._last} | set(self.points)
        for key in keys:
            line = self.points.setdefault(key, deque())
            line.append(self.now(key, now_s))
            while line[0].time_s < now_s - SHOWN_S:
                line.popleft()
            if not any(point.answers_hz for point in line) and all(
                it != key for _, it in self._last
            ):
                del self.points[key]

    def now(self, key: str, now_s: float, worker: str | None = None) -> Point:
        """Return how a model does, on all workers or on one."""
        found = [
            change
            for change in self._changes
            if change.key == key
            and change.time_s > now_s - WINDOW_S
            and worker in {None, change.worker}
        ]
        num_answered = sum(change.num_answered for change in found)
        latencies: Counter[int] = Counter()
        for change in found:
            latencies.update(change.latencies)
        span_s = min(WINDOW_S, max(now_s - (self._began_s or now_s), _STEP_S))
        return Point(
            time_s=now_s,
            answers_hz=num_answered / span_s,
            queue_s=sum(change.queue_s for change in found) / max(1, num_answered),
            p99_s=quantile_s(latencies, 0.99),
        )

    def batches(self) -> dict[str, Counter[int]]:
        """Return how many batches of each size each model ran in the last minute."""
        found: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for change in self._changes:
            found[change.key].update(change.batches)
        return dict(found)


def _more(now: Mapping[int, int], before: Mapping[int, int]) -> Counter[int]:
    return Counter(
        {name: more for name, count in now.items() if (more := count - before.get(name, 0)) > 0}
    )


def stacked(parts: Iterable[tuple[str, str, float]]) -> list[tuple[str, str, float, float]]:
    """Put parts on top of each other: (place, name, size) become (place, name, start, end)."""
    tops: defaultdict[str, float] = defaultdict(float)
    found = []
    for place, name, size in parts:
        start = tops[place]
        tops[place] = start + size
        found.append((place, name, start, start + size))
    return found
