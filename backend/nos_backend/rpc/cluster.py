"""ClusterService: how the server stands, what happens on it, and the way to a model."""

from __future__ import annotations

import time
from importlib import metadata
from typing import TYPE_CHECKING, Final

from nos.wire.v1 import access_pb2, cluster_pb2, cluster_pb2_grpc

from nos_backend.control import report, usage
from nos_backend.rpc.guard import caller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from nos_backend.control.catalogue import Catalogue
    from nos_backend.control.cluster import Cluster, StateCache
    from nos_backend.control.crew import Recruiter
    from nos_backend.control.events import Event, Events
    from nos_backend.control.resolver import Resolver
    from nos_backend.rpc.guard import Context

_VERSION: Final = metadata.version("nos-inference")
_MIN_INTERVAL_S: Final = 0.1
_MAX_INTERVAL_S: Final = 10.0
#: How soon a client in use hears of other replicas; asking takes the gateway about 0.3 ms.
_REFRESH_S: Final = 2.0


class ClusterService(cluster_pb2_grpc.ClusterServiceServicer):
    """Serves `nos.v1.ClusterService`."""

    def __init__(
        self,
        cluster: Cluster,
        catalogue: Catalogue,
        states: StateCache,
        resolver: Resolver,
        events: Events,
        recruiter: Recruiter,
        notices: Sequence[str] = (),
        ca_certificate: bytes = b"",
    ) -> None:
        self._cluster = cluster
        self._catalogue = catalogue
        self._states = states
        self._resolver = resolver
        self._events = events
        self._recruiter = recruiter
        self._notices = notices
        self._ca_certificate = ca_certificate
        self._started_s = time.monotonic()
        #: Set by whoever drains the server.
        self.is_draining = False

    async def GetStatus(
        self, request: cluster_pb2.GetStatusRequest, context: Context
    ) -> cluster_pb2.GetStatusResponse:
        """Describe the server."""
        return await self._status()

    async def WatchEvents(
        self, request: cluster_pb2.WatchEventsRequest, context: Context
    ) -> AsyncIterator[cluster_pb2.WatchEventsResponse]:
        """Send events as they happen, and snapshots at the interval asked for."""
        interval_s = None
        if request.status_interval_s > 0:
            interval_s = min(max(request.status_interval_s, _MIN_INTERVAL_S), _MAX_INTERVAL_S)
        next_s = time.monotonic()
        with self._events.watch() as watcher:
            while True:
                if interval_s is not None and time.monotonic() >= next_s:
                    yield cluster_pb2.WatchEventsResponse(
                        time_s=time.time(), kind="status", status=await self._status()
                    )
                    next_s = max(next_s + interval_s, time.monotonic())
                timeout_s = None if interval_s is None else next_s - time.monotonic()
                for event in await watcher.take(timeout_s):
                    yield _told(event)

    async def GetMemoryHistory(
        self, request: cluster_pb2.GetMemoryHistoryRequest, context: Context
    ) -> cluster_pb2.GetMemoryHistoryResponse:
        """Say what the devices held."""
        samples = [
            cluster_pb2.MemorySample(worker=worker, device=device, **sample)
            for worker, device, history in await self._cluster.memory_history()
            for sample in history
        ]
        samples.sort(key=lambda sample: sample.time_s)
        return cluster_pb2.GetMemoryHistoryResponse(samples=samples)

    async def Resolve(
        self, request: cluster_pb2.ResolveRequest, context: Context
    ) -> cluster_pb2.ResolveResponse:
        """Load the model if need be, and say how to reach it."""
        way = await self._resolver.resolve(request.model, caller())
        return cluster_pb2.ResolveResponse(
            endpoints=[
                cluster_pb2.Endpoint(
                    worker=placement.worker,
                    address=placement.address,
                    unix_socket=placement.unix_socket,
                    host_id=placement.host_id,
                    is_encrypted=placement.is_encrypted,
                    num_pending=placement.num_pending,
                )
                for placement in way.placements
            ],
            ticket=way.ticket,
            ticket_ttl_s=self._resolver.ttl_s(caller()),
            ca_certificate=self._ca_certificate,
            spec=way.version.spec,
            refresh_s=_REFRESH_S,
        )

    async def ScaleWorkers(
        self, request: cluster_pb2.ScaleWorkersRequest, context: Context
    ) -> cluster_pb2.ScaleWorkersResponse:
        """Have so many workers on this machine."""
        names = await self._recruiter.scale(request.min_workers, request.max_workers)
        return cluster_pb2.ScaleWorkersResponse(workers=names)

    async def _status(self) -> cluster_pb2.GetStatusResponse:
        found = await self._states.read()
        workers = report.workers(found)
        tenant = None if caller().role == access_pb2.ROLE_ADMIN else caller().tenant
        state = "ready" if workers else "starting"
        return cluster_pb2.GetStatusResponse(
            version=_VERSION,
            uptime_s=time.monotonic() - self._started_s,
            workers=workers,
            num_models=len(self._catalogue),
            dashboard_url=self._cluster.dashboard_url,
            scheduler_address=self._cluster.address,
            state="draining" if self.is_draining else state,
            notices=self._notices,
            models=report.replicas(found),
            tenants=usage.tenants(found, tenant),
            events=map(_told, self._events.recent),
        )


def _told(event: Event) -> cluster_pb2.WatchEventsResponse:
    return cluster_pb2.WatchEventsResponse(
        time_s=event.time_s,
        kind=event.kind,
        model=event.model,
        worker=event.worker,
        message=event.message,
    )
