"""What a worker takes at most; beyond it callers are refused, and loads fail."""

from __future__ import annotations

from dataclasses import dataclass

from nos.errors import LimitExceededError
from nos.wire.limits import FRAME_BYTES

from nos_backend.definition import LOAD_TIMEOUT_S
from nos_backend.executor.log_lines import LINES_PER_S
from nos_backend.executor.process import MAX_IMAGE_PIXELS
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
    max_frame_bytes: int = FRAME_BYTES
    """Bytes of one frame's arrays and media."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Pixels of one encoded image."""
    max_log_lines: int = LINES_PER_S
    """Lines a second that the models of one executor may print."""

    def check_frame(self, data_bytes: int) -> None:
        """Check the size of one frame's arrays and media.

        Raises:
            LimitExceededError: If it is too large.
        """
        if data_bytes > self.max_frame_bytes:
            raise LimitExceededError(
                "the frame is too large",
                "data_bytes",
                f"at most {self.max_frame_bytes} bytes",
                str(data_bytes),
            )
