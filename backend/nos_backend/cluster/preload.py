"""Makes a Dask scheduler ours: `dask scheduler --preload nos_backend.cluster.preload`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nos_backend.cluster.plane import ServePlane

if TYPE_CHECKING:
    from distributed import Scheduler


async def dask_setup(scheduler: Scheduler) -> None:
    """Install the ServePlane; Dask calls this when the scheduler starts."""
    plane = ServePlane()
    await plane.start(scheduler)
    scheduler.add_plugin(plane, idempotent=True)
