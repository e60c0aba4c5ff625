"""Who uses what, all workers together; pure."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

from nos.wire.v1 import cluster_pb2

if TYPE_CHECKING:
    from nos_backend.control.cluster import State

_OTHERS: Final = "(others)"


def tenants(state: State, tenant: str | None) -> list[cluster_pb2.TenantUsage]:
    """Describe what tenants use, the most device-seconds first.

    Args:
        state: Of the cluster.
        tenant: The only one that is named; None names all.
    """
    found: defaultdict[str, cluster_pb2.TenantUsage] = defaultdict(cluster_pb2.TenantUsage)

    def of(name: str) -> cluster_pb2.TenantUsage:
        return found[name if tenant in {None, name} else _OTHERS]

    for worker in state["workers"]:
        for name, num_streams in worker["status"].get("streams", {}).items():
            of(name).num_streams += num_streams
        for model in worker["status"].get("models", ()):
            if model["device_bytes"]:
                of(model["owner"]).device_bytes += model["device_bytes"]
            for name, used_s in (model.get("statistics") or {}).get("device_s", {}).items():
                of(name).device_s += used_s
    for name, used in found.items():
        used.tenant = name
    return sorted(found.values(), key=lambda used: (-used.device_s, used.tenant))
