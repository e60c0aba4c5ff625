"""What others use of the machine and the device, and what follows: host copies go first, then models.

Looked at once a second. The probes are given from outside, so that tests make up a machine that is full.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nos.errors import NosError

from nos_backend.executor.host_memory import host_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos_backend.worker.loader import Loader
    from nos_backend.worker.memory import DeviceMemory

_logger = logging.getLogger(__name__)

_LOOK_S: Final = 1.0
#: Main memory that stays free for others.
_HOST_FLOOR_BYTES: Final = 256 << 20
#: Share of the last ten seconds in which every process waited for memory.
_STALLED: Final = 0.1
#: A capacity that changes by less than this share of itself is the same.
_SAME: Final = 0.01


def memory_stalls(path: Path = Path("/proc/pressure/memory")) -> float:
    """Return the share of the last ten seconds in which all processes waited for memory; 0 if unknown."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0.0
    for line in lines:
        kind, *fields = line.split()
        if kind == "full":
            values = dict(field.split("=", 1) for field in fields)
            return float(values.get("avg10", 0.0)) / 100
    return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Probes:
    """How a worker looks at what others use."""

    host_room_bytes: Callable[[], int] = host_memory_bytes
    """What main memory can still give."""
    host_stalls: Callable[[], float] = memory_stalls
    """The share of time in which everything waits for main memory."""
    device_room_bytes: Callable[[], int | None] = lambda: None
    """What the device has free; None where that is unknown, or is main memory."""


class Surroundings:
    """Belongs to one event loop.

    Args:
        probes: How to look.
        memory: The device's models; its capacity is followed here.
        loader: Has the host copies.
        capacity_bytes: What the models may use at most.
    """

    def __init__(
        self, probes: Probes, memory: DeviceMemory, loader: Loader, capacity_bytes: int
    ) -> None:
        self._probes = probes
        self._memory = memory
        self._loader = loader
        self._limit_bytes = capacity_bytes
        #: What the models may use now.
        self.capacity_bytes = capacity_bytes

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.look()
            except (NosError, OSError) as error:
                _logger.warning("memory cannot be looked after now: %s", error)

    async def look(self) -> None:
        """See what others use, and make room or take it back."""
        missing_bytes = _HOST_FLOOR_BYTES - self._probes.host_room_bytes()
        if missing_bytes > 0 or self._probes.host_stalls() > _STALLED:
            await self._loader.park_idle(max(1, missing_bytes))
        room_bytes = await asyncio.to_thread(self._probes.device_room_bytes)
        if room_bytes is not None:
            self._follow_device(room_bytes)

    def _follow_device(self, room_bytes: int) -> None:
        found = max(1, min(self._limit_bytes, self._memory.used_bytes + room_bytes))
        is_back = found == self._limit_bytes and self.capacity_bytes != found
        if is_back or abs(found - self.capacity_bytes) > _SAME * self.capacity_bytes:
            _logger.info(
                "models may use %d bytes of the device, not %d", found, self.capacity_bytes
            )
            self.capacity_bytes = found
            self._memory.set_capacity(found)
