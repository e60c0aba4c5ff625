"""Everything that knows Dask: worker, plane, the link between gateway and plane, launching, certificates.

Importing the package imports no Dask: the supervisor takes launch arguments and certificates from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nos_backend.cluster.worker import HostPlugin, ServingWorker

__all__ = ["HostPlugin", "ServingWorker"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from nos_backend.cluster import worker

        return getattr(worker, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
