"""What a device held, from change to change."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Final

#: Changes that are kept; at one a second, which is more than models move, an hour.
_MAX_SAMPLES: Final = 3600


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment, and what held until the next one."""

    time_s: float
    """In seconds since 1970."""
    used_bytes: int
    """Weights, contexts and activations, as the budget counts them."""
    models: dict[str, int]
    """Bytes of weights on the device, by model version; none that has none there."""


class Timeline:
    """The last samples of one device."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=_MAX_SAMPLES)

    def note(self, sample: Sample) -> None:
        """Keep a sample, unless nothing changed since the last one."""
        last = self._samples[-1] if self._samples else None
        if last is None or (last.used_bytes, last.models) != (sample.used_bytes, sample.models):
            self._samples.append(sample)

    def read(self) -> list[dict[str, Any]]:
        """Return the samples in plain types, the oldest first."""
        return [asdict(sample) for sample in self._samples]
