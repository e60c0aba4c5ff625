"""The gateway's gRPC server: every service behind the guard, and the order in which it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from nos.errors import ConfigError, NosError, UnavailableError
from nos.wire.options import SERVER_OPTIONS
from nos.wire.v1 import (
    access_pb2_grpc,
    blobs_pb2_grpc,
    cluster_pb2_grpc,
    models_pb2_grpc,
)

from nos_backend.control.cluster import StateCache
from nos_backend.control.crew import Recruiter
from nos_backend.control.events import Event, Events
from nos_backend.control.folders import FolderStore
from nos_backend.control.logins import Logins
from nos_backend.control.profiles import Profiles
from nos_backend.control.registrar import Registrar
from nos_backend.control.resolver import Resolver
from nos_backend.control.scaling import Scaler
from nos_backend.control.tickets import TICKET_TTL_S
from nos_backend.rpc.blobs import BlobService
from nos_backend.rpc.channels import Channels
from nos_backend.rpc.cluster import ClusterService
from nos_backend.rpc.guard import Activity, Guard
from nos_backend.rpc.identity import AccessService
from nos_backend.rpc.metrics import Metrics
from nos_backend.rpc.models import ModelService
from nos_backend.rpc.relay import Relay

if TYPE_CHECKING:
    from pathlib import Path

    from nos_backend.cluster.link import ClusterEvent
    from nos_backend.control.blobs import BlobStore
    from nos_backend.control.catalogue import Catalogue
    from nos_backend.control.cluster import Cluster
    from nos_backend.control.logins import Failures
    from nos_backend.control.registry import Registry
    from nos_backend.control.tickets import TicketSigner
    from nos_backend.control.tokens import Tokens

_logger = logging.getLogger(__name__)

_TELLING_S: Final = 3.0
_SERVICES: Final = ("Access", "Blob", "Cluster", "Inference", "Model")


class GatewayServer:
    """What clients talk to; belongs to one asyncio loop."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        catalogue: Catalogue,
        blobs: BlobStore,
        registry: Registry,
        tokens: Tokens,
        signer: TicketSigner,
        failures: Failures | None = None,
        ticket_ttl_s: float = TICKET_TTL_S,
        crew_file: Path | None = None,
        ca_certificate: bytes = b"",
        max_tenant_upload_bytes: int = 0,
    ) -> None:
        """Put the server together; nothing listens yet.

        Args:
            cluster: Where models run.
            catalogue: Which there are.
            blobs: Files that clients send.
            registry: What is kept.
            tokens: Who may come in.
            signer: Of tickets.
            failures: Counts failed logins; None for one with the usual limit.
            ticket_ttl_s: How long tickets last.
            crew_file: Where the supervisor says which workers there may be; None without one.
            ca_certificate: PEM of what signed the workers' certificates; empty where none encrypts.
            max_tenant_upload_bytes: What one tenant may upload as long as it lives; 0 means no limit.

        Raises:
            ConfigError: If a served method declares no permission.
        """
        self.activity = Activity()
        self._cluster = cluster
        self._events = Events()
        states = StateCache(cluster)
        self._states = states
        self._metrics: Metrics | None = None
        self._profiles = Profiles(registry, cluster)
        self._resolver = Resolver(catalogue, cluster, signer, ticket_ttl_s, self._profiles.of)
        self._scaler = Scaler(catalogue, registry, self._resolver)
        self._channels = Channels(ca_certificate)
        self._recruiter = Recruiter(crew_file, cluster)
        self._clusters = ClusterService(
            cluster,
            catalogue,
            states,
            self._resolver,
            self._events,
            self._recruiter,
            registry.notices,
            ca_certificate,
        )
        self._relay = Relay(self._resolver, self._channels)
        self._health = health.aio.HealthServicer()

        guard = self._guard = Guard(tokens, self.activity, Logins(registry, failures))
        self._relay.add_to(guard)
        # Generated code is typed for servers; the guard has the one method of theirs that it calls.
        server: Any = guard
        models_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(
                catalogue,
                Registrar(catalogue, registry),
                FolderStore(blobs.folder.with_name("folders"), blobs),
                states,
                self._resolver,
                self._events,
                self._profiles,
                self._scaler,
            ),
            server,
        )
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self._clusters, server)
        blobs_pb2_grpc.add_BlobServiceServicer_to_server(
            BlobService(blobs, max_tenant_upload_bytes), server
        )
        access_pb2_grpc.add_AccessServiceServicer_to_server(
            AccessService(tokens, registry, self._on_revoked), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [f"nos.v1.{name}Service" for name in _SERVICES]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
            reflection.aio.ReflectionServicer(
                [*names, health.SERVICE_NAME, reflection.SERVICE_NAME]
            ),
            server,
        )
        self.methods = guard.methods
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((guard,))
        self._ends = [
            cluster.subscribe(self._on_cluster_event),
            catalogue.subscribe(self._on_catalogue_event),
        ]
        cluster.on_reconnected = self._on_reconnected

    async def start(
        self,
        host: str,
        port: int,
        tls: tuple[bytes, bytes] | None = None,
        metrics_port: int = 0,
    ) -> str:
        """Listen; calls are answered, while health says that it is not serving yet.

        Args:
            host: Address of this machine.
            port: 0 for any free one.
            tls: Private key and certificate chain, PEM; None for a port without TLS.
            metrics_port: Of Prometheus metrics, on loopback; 0 for none.

        Returns:
            The address, `host:port`.

        Raises:
            ConfigError: If a port is in use, or the host is none of this machine.
        """
        if metrics_port:
            self._metrics = Metrics(self._states, metrics_port)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        bracketed = f"[{host}]" if ":" in host else host
        try:
            if tls is None:
                bound = self._server.add_insecure_port(f"{bracketed}:{port}")
            else:
                credentials = grpc.ssl_server_credentials([tls])
                bound = self._server.add_secure_port(f"{bracketed}:{port}", credentials)
        except RuntimeError as error:
            raise ConfigError(
                "the gateway cannot listen there",
                "port",
                "a free port of this machine",
                f"{bracketed}:{port}",
                "Choose another with --port, or 0 for any",
            ) from error
        await self._server.start()
        return f"{bracketed}:{bound}"

    async def open(self) -> None:
        """Ask the cluster for the replicas that there are to be, and say that it serves.

        Raises:
            UnavailableError: If the scheduler does not answer.
        """
        await self._scaler.restore()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def is_idle(self, idle_s: float) -> bool:
        """Tell whether no client has called for so long, and none is connected to a worker."""
        if self.activity.idle_s < idle_s:
            return False
        state = await self._states.read()
        busy = ("num_streams", "num_running", "num_queued")
        if any(worker["status"].get(name) for worker in state["workers"] for name in busy):
            return False
        return self.activity.idle_s >= idle_s

    async def drain(self, grace_s: float) -> None:
        """Take leave: tell health and streams, refuse new calls, wait for those in flight."""
        _logger.info("draining %d calls, at most %.0f s", self.activity.num_in_flight, grace_s)
        self._clusters.is_draining = True
        await self._health.enter_graceful_shutdown()
        leaving = UnavailableError(
            "the server is shutting down", hint="Connect again when it is back"
        )
        self._guard.refusal = leaving
        self._events.end(leaving)
        await self._relay.tell_draining(grace_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self.activity.wait_quiet()

    async def close(self) -> None:
        """End all calls and free the port."""
        if self._metrics is not None:
            await self._metrics.close()
        for end in self._ends:
            end()
        self._cluster.on_reconnected = None
        await self._recruiter.close()
        await self._server.stop(None)
        await self._channels.close()

    async def _set_health(self, state: int) -> None:
        for name in ("", *(f"nos.v1.{service}Service" for service in _SERVICES)):
            await self._health.set(name, state)

    def _on_cluster_event(self, event: ClusterEvent) -> None:
        self._profiles.on_event(event)
        for placement in self._resolver.on_event(event):
            self._channels.retire(placement.address)
        self._events.tell(
            Event(
                time_s=event.time_s,
                kind=event.kind,
                model=event.model,
                worker=event.worker,
                message=event.message,
            )
        )

    def _on_catalogue_event(self, kind: str, name: str) -> None:
        if kind == "deleted":
            self._profiles.forget(name)
        self._events.tell(
            Event(time_s=time.time(), kind=kind, model=name, message=f"{name} was {kind}")
        )

    def _on_revoked(self, token_id: str) -> asyncio.Future[None]:
        num_cut = self._guard.calls.cut(token_id)
        _logger.info("token %s was revoked; %d calls were cut", token_id, num_cut)
        return asyncio.ensure_future(self._tell_revoked(token_id))

    async def _tell_revoked(self, token_id: str) -> None:
        try:
            async with asyncio.timeout(_TELLING_S):
                await self._cluster.revoke(token_id)
        except (NosError, TimeoutError) as error:
            # The link tells it again; until then the tickets that are out run for at most a minute.
            _logger.warning("not all workers heard that %s was revoked: %s", token_id, error)

    async def _on_reconnected(self) -> None:
        self._resolver.forget_all()
