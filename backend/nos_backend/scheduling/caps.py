"""How many rows go together, as failures teach it: halved by each, tried upward again after a while. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

#: For how long batches keep to what was learnt before twice as many rows are tried.
FIRST_WAIT_S: Final = 600.0
#: The same after tries that failed, each of which doubles it.
MAX_WAIT_S: Final = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cap:
    """What one model's batches keep to since one of them failed as a whole and its requests alone did not."""

    rows: int
    """Of a batch, at most; from 1 up."""
    failed_rows: int
    """The largest batch that did not go. One that goes ends the cap."""
    since_s: float
    """When `rows` was set, on the caller's clock."""
    wait_s: float = FIRST_WAIT_S
    """For how long `rows` stays; infinite for ever."""
    is_trial: bool = False
    """Whether `rows` was raised since a batch failed last."""


def lowered(cap: Cap | None, rows: int, now_s: float, *, is_final: bool = False) -> Cap:
    """Return the cap after a batch of `rows` failed as a whole.

    Args:
        cap: The one before; None for none.
        rows: Of the batch.
        now_s: The time.
        is_final: Whether rows do not mix at all, so that none is ever to run with another.
    """
    if is_final:
        return Cap(rows=1, failed_rows=rows, since_s=now_s, wait_s=float("inf"))
    lower = max(1, rows // 2)
    if cap is None:
        return Cap(rows=lower, failed_rows=rows, since_s=now_s)
    return Cap(
        rows=min(lower, cap.rows),
        failed_rows=max(rows, cap.failed_rows),
        since_s=now_s,
        wait_s=min(2 * cap.wait_s, MAX_WAIT_S) if cap.is_trial else cap.wait_s,
    )


def after_run(cap: Cap, rows: int, now_s: float) -> Cap | None:
    """Return the cap after a batch of `rows` went well: lifted, raised when it is time, or the same."""
    if rows >= cap.failed_rows and cap.wait_s < float("inf"):
        return None
    if now_s - cap.since_s < cap.wait_s or cap.rows >= cap.failed_rows:
        return cap
    return replace(cap, rows=min(2 * cap.rows, cap.failed_rows), since_s=now_s, is_trial=True)
