"""What a model prints, bounded: pure, bytes and the time in, lines out."""

from __future__ import annotations

from collections import deque
from typing import Final

LINE_BYTES: Final = 4096
LINES_PER_S: Final = 100
TAIL_LINES: Final = 200


class LogLines:
    """Cuts output into lines no longer than 4 KiB, and drops what exceeds so many lines a second."""

    def __init__(self, lines_per_s: int = LINES_PER_S) -> None:
        self._lines_per_s = lines_per_s
        #: The last lines that were let through.
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._pending = b""
        #: Whether the rest of the current line is beyond its limit.
        self._skipping = False
        #: Lines that may pass now: a bucket that fills by time.
        self._allowance = float(lines_per_s)
        self._filled_at_s = 0.0
        self._dropped = 0

    def feed(self, data: bytes, now_s: float) -> list[str]:
        """Return the lines that `data` completes; empty `data` means the output has ended."""
        pieces = (self._pending + data).split(b"\n")
        self._pending = b"" if not data else pieces.pop()
        raw = []
        for piece in pieces:
            if not self._skipping and (data or piece):
                raw.append(piece)
            self._skipping = False
        if self._skipping:
            self._pending = b""
        elif len(self._pending) > LINE_BYTES:
            raw.append(self._pending)
            self._pending, self._skipping = b"", True
        return self._limit(raw, now_s)

    def _limit(self, raw: list[bytes], now_s: float) -> list[str]:
        passed_s = max(0.0, now_s - self._filled_at_s)
        most = float(self._lines_per_s)
        self._allowance = min(most, self._allowance + passed_s * most)
        self._filled_at_s = now_s
        lines = []
        for piece in raw:
            if self._allowance < 1:
                self._dropped += 1
                continue
            if self._dropped:
                lines.append(f"[{self._dropped} lines dropped: over {self._lines_per_s} a second]")
                self._dropped = 0
            self._allowance -= 1
            lines.append(_text(piece))
        self.tail.extend(lines)
        return lines


def _text(piece: bytes) -> str:
    cut = piece[:LINE_BYTES].decode("utf-8", "replace").rstrip("\r")
    return cut + " [cut]" if len(piece) > LINE_BYTES else cut
