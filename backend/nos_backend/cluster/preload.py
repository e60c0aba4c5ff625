"""Makes a Dask scheduler ours: `dask scheduler --preload nos_backend.cluster.preload`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nos_backend.cluster.launch import DASHBOARD_ON_DEMAND
from nos_backend.cluster.lazy_dashboard import LazyDashboard
from nos_backend.cluster.plane import ServePlane
from nos_backend.own_memory import hide_memory

if TYPE_CHECKING:
    from distributed import Scheduler

_is_lazy = DASHBOARD_ON_DEMAND.items() <= os.environ.items()
_link = None
if not _is_lazy:
    try:
        from nos_backend.cluster import dashboard
    except ImportError:  # without bokeh there is no dashboard, and a scheduler serves all the same
        pass
    else:
        # Now: a scheduler takes its pages before it starts.
        dashboard.install()
        _link = dashboard.link


async def dask_setup(scheduler: Scheduler) -> None:
    """Install the ServePlane; Dask calls this when the scheduler starts."""
    hide_memory()
    plane = ServePlane()
    await plane.start(scheduler)
    scheduler.add_plugin(plane, idempotent=True)
    if _is_lazy:
        LazyDashboard(scheduler)
    elif _link is not None:
        _link(scheduler)
