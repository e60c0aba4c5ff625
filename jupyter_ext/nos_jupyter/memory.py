"""Device memory over time: samples taken from status snapshots, their history, and a still picture of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from nos_jupyter.views import OTHER, format_bytes, other_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nos.types import Device, Event, Worker

#: Events that the chart marks; that a model is back it sees by itself.
_MARKED = frozenset(
    {"loading", "loaded", "evicted", "unloaded", "failed", "worker-lost", "executor-lost"}
)
#: Ten minutes at 2 Hz.
MAX_SAMPLES = 1200
MAX_MARKS = 200
_INSTANT_S = 1e-3
#: A chart is so much higher than its peak.
_HEADROOM = 1.2
#: Colours of the stack, readable on light and dark; the widget's module has the same ones.
PALETTE = ("#4c8dd6", "#e08a3c", "#3fa37c", "#c05fa0", "#8f7fd8", "#c9a227", "#4fb3bf", "#d65c5c")


@dataclass(frozen=True, slots=True)
class Sample:
    """All devices at one moment."""

    time_s: float
    """By the server's clock, in seconds since 1970."""
    workers: tuple[Worker, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as the widget's module reads it."""
        return {
            "t": self.time_s,
            "devices": [
                {
                    "worker": worker.name,
                    "name": worker.device.name,
                    "product": worker.device.product,
                    "capacity": worker.device.capacity_bytes,
                    "used": worker.device.used_bytes,
                    "models": [
                        [part.model, part.device_bytes]
                        for part in worker.device.models
                        if part.device_bytes
                    ],
                }
                for worker in self.workers
            ],
        }


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened."""

    time_s: float
    kind: str
    model: str

    def to_json(self) -> dict[str, Any]:
        """Return it as the widget's module reads it."""
        return {"t": self.time_s, "kind": self.kind, "model": self.model}


class History:
    """The last samples and marks, oldest first."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self.marks: deque[Mark] = deque(maxlen=MAX_MARKS)
        #: Models that left to make room, and whether a sample has shown their absence.
        self._evicted: dict[str, bool] = {}

    def take(self, event: Event) -> list[Sample | Mark]:
        """Keep what an event says; return what is new by it."""
        if event.status is None:
            if event.kind not in _MARKED:
                return []
            name = event.model.partition("@")[0]
            self._evicted.pop(name, None)
            if event.kind == "evicted":
                self._evicted[name] = False
            return [self._mark(event.time_s, event.kind, event.model)]
        sample = Sample(event.time_s, event.status.workers)
        self.samples.append(sample)
        there = {
            part.model.partition("@")[0]
            for worker in sample.workers
            for part in worker.device.models
            if part.device_bytes
        }
        back = [name for name, was_away in self._evicted.items() if was_away and name in there]
        self._evicted = {
            name: was_away or name not in there
            for name, was_away in self._evicted.items()
            if name not in back
        }
        return [sample, *(self._mark(event.time_s, "reloaded", name) for name in back)]

    def _mark(self, time_s: float, kind: str, model: str) -> Mark:
        mark = Mark(time_s, kind, model)
        self.marks.append(mark)
        return mark

    @property
    def peak_bytes(self) -> int:
        """The most that any one device had in use."""
        used = (worker.device.used_bytes for sample in self.samples for worker in sample.workers)
        return max(used, default=0)

    def to_html(self) -> str:
        """Return a picture that needs no script: one chart per device of the last sample."""
        if not self.samples:
            return "<span>no memory sample yet</span>"
        return "".join(_chart(self.samples, worker) for worker in self.samples[-1].workers)


def _chart(samples: Sequence[Sample], worker: Worker) -> str:
    """Return one device's stacked chart and its legend."""
    width, height = 480.0, 96.0
    last = worker.device
    history = [
        (sample.time_s, then.device)
        for sample in samples
        for then in sample.workers
        if then.name == worker.name
    ]
    if len(history) == 1:
        # One moment has no width; drawn as if it had lasted.
        history = [(history[0][0] - _INSTANT_S, history[0][1]), *history]
    peak = max(1, *(device.used_bytes for _, device in history))
    top = _HEADROOM * peak
    begin_s = history[0][0]
    span_s = max(_INSTANT_S, history[-1][0] - begin_s)
    names = list(dict.fromkeys(part.model for _, device in history for part in device.models))
    below = [0.0] * len(history)
    shapes: list[str] = []
    legend: list[str] = []
    for index, name in enumerate([*names, OTHER]):
        color = PALETTE[index % len(PALETTE)] if name != OTHER else "#8a8f98"
        sizes = [_part_bytes(device, name) for _, device in history]
        above = [low + size for low, size in zip(below, sizes, strict=True)]
        xs = [(time_s - begin_s) / span_s * width for time_s, _ in history]
        upper = [f"{x:.1f},{height - y / top * height:.1f}" for x, y in zip(xs, above, strict=True)]
        lower = [f"{x:.1f},{height - y / top * height:.1f}" for x, y in zip(xs, below, strict=True)]
        shapes.append(f'<polygon fill="{color}" points="{" ".join(upper + lower[::-1])}"/>')
        below = above
        if sizes[-1]:
            dot = f'<span style="color:{color}" aria-hidden="true">&#9632;</span>'
            legend.append(f"{dot} {escape(name)} {format_bytes(sizes[-1])}")
    used = f"{format_bytes(last.used_bytes)} of {format_bytes(last.capacity_bytes)}"
    lasted = f" in {span_s:.0f} s" if span_s >= 1 else ""
    return (
        f'<div style="margin-bottom:8px"><div>{escape(last.name)} {escape(last.product)}: {used},'
        f" peak {format_bytes(peak)}{lasted}</div>"
        f'<svg role="img" aria-label="memory of {escape(last.name)} over time"'
        f' width="{width:.0f}" height="{height:.0f}">'
        f'<rect width="100%" height="100%" fill="#8a8f98" fill-opacity="0.1"/>{"".join(shapes)}</svg>'
        f"<div>{' &nbsp; '.join(legend)}</div></div>"
    )


def _part_bytes(device: Device, name: str) -> int:
    if name == OTHER:
        return other_bytes(device)
    return sum(part.device_bytes for part in device.models if part.model == name)
