"""What a worker takes at most; beyond it callers are refused, and loads fail."""

from __future__ import annotations

from dataclasses import dataclass

from nos_backend.definition import LOAD_TIMEOUT_S
from nos_backend.scheduling.admission import MAX_QUEUED, MAX_QUEUED_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkLimits:
    """Of one worker."""

    max_queued: int = MAX_QUEUED
    """Requests of one model that wait."""
    max_queued_bytes: int = MAX_QUEUED_BYTES
    """Their bytes; one larger request is admitted alone."""
    load_timeout_s: float = LOAD_TIMEOUT_S
    """The longest that each step of a load may take."""
