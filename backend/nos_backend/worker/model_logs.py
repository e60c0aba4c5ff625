"""What models printed, by model: the last lines of each, kept over crashes and unloads."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import Final

MAX_LINES: Final = 1000
MAX_BYTES: Final = 256 << 10
MAX_MODELS: Final = 256


class _Lines:
    """The last lines of one model."""

    __slots__ = ("num_bytes", "rows")

    def __init__(self) -> None:
        #: (seconds since 1970, text).
        self.rows: deque[tuple[float, str]] = deque()
        self.num_bytes = 0

    def add(self, time_s: float, text: str) -> None:
        self.rows.append((time_s, text))
        self.num_bytes += len(text.encode())
        while len(self.rows) > MAX_LINES or self.num_bytes > MAX_BYTES:
            self.num_bytes -= len(self.rows.popleft()[1].encode())


class ModelLogs:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        #: By key, the one that printed last at the end.
        self._models: OrderedDict[str, _Lines] = OrderedDict()

    def add(self, key: str, text: str) -> None:
        """Keep a line of a model; the oldest lines go, of its own first."""
        lines = self._models.setdefault(key, _Lines())
        self._models.move_to_end(key)
        lines.add(time.time(), text)
        if len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)

    def lines(self, key: str, max_lines: int) -> list[tuple[float, str]]:
        """Return a model's last lines with their times in seconds since 1970, the oldest first."""
        found = self._models.get(key)
        rows = list(found.rows) if found else []
        return rows[-max_lines:] if max_lines else rows
