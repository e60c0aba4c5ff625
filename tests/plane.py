"""A real data plane with real executors, without Dask and gateway, and a bare client of its wire."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from nos.errors import NosError
from nos.wire import frames, status, values
from nos.wire.limits import CHUNK_BYTES, MAX_STREAMS, MODEL_KEY, TICKET_KEY
from nos.wire.options import CHANNEL_OPTIONS
from nos.wire.v1 import access_pb2, inference_pb2, inference_pb2_grpc, models_pb2
from nos_backend.control.describe import describe
from nos_backend.control.tickets import TicketSigner, TicketVerifier
from nos_backend.definition import ModelDefinition
from nos_backend.worker.manager import ModelManager
from nos_backend.worker.service import DataPlane

CALL_TIMEOUT_S = 60.0
FAKE_MODELS = Path(__file__).parent / "fakes" / "models"


def definitions(source: str, source_name: str, *, owner: str = "local") -> list[ModelDefinition]:
    """Return the models of a source, as the gateway would hand them out."""
    found = []
    for item in describe(source, source_name=source_name):
        item.spec.version = 1
        item.spec.owner = owner
        definition = ModelDefinition(
            name=item.spec.name,
            version=1,
            owner=owner,
            source=source,
            source_name=source_name,
            class_name=item.class_name,
            device=item.spec.device or "auto",
            isolation=item.spec.isolation or "shared",
            call_timeout_s=item.spec.call_timeout_s,
            spec=item.spec.SerializeToString(),
        )
        found.append(definition)
    return found


def fake_models(*names: str) -> dict[str, ModelDefinition]:
    """Return the models of these files of `tests/fakes/models`, by name."""
    paths = [FAKE_MODELS / f"{name}.py" for name in names]
    found = [item for path in paths for item in definitions(path.read_text(), str(path))]
    return {item.name: item for item in found}


class Plane:
    """A running data plane."""

    def __init__(
        self,
        *,
        max_streams: int = MAX_STREAMS,
        max_tenant_streams: int = 0,
        weights: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        self.signer = TicketSigner.generate(weights)
        self.verifier = TicketVerifier(self.signer.public_key_bytes)
        self.events: list[tuple[str, str, str]] = []
        self._options = options
        self.manager: ModelManager
        self.data_plane = DataPlane(
            self._make_manager,
            lambda raw: self.verifier.verify(raw, time.time()),
            "127.0.0.1",
            max_streams=max_streams,
            max_tenant_streams=max_tenant_streams,
        )
        self.data_plane.start()
        self.channel = grpc.insecure_channel(self.data_plane.address, options=CHANNEL_OPTIONS)

    def _make_manager(self) -> ModelManager:
        self.manager = ModelManager(
            device="cpu", on_event=lambda *event: self.events.append(event), **self._options
        )
        return self.manager

    def load(self, definition: ModelDefinition) -> None:
        """Load a model and wait for it."""
        self.data_plane.submit_coroutine(lambda: self.manager.load(definition)).result(60)

    def pin(self, definition: ModelDefinition, *, is_pinned: bool = True) -> None:
        """Load a model, pinned or not."""
        spec = models_pb2.ModelSpec.FromString(definition.spec)
        spec.is_pinned = is_pinned
        self.load(replace(definition, spec=spec.SerializeToString()))

    def unload(self, key: str) -> None:
        """Unload a model and wait for it."""
        self.data_plane.submit_coroutine(lambda: self.manager.unload(key)).result(60)

    def status(self) -> dict[str, Any]:
        """Return the manager's status."""

        async def ask() -> dict[str, Any]:
            return self.manager.status()

        return self.data_plane.submit_coroutine(ask).result(10)

    def model(self, key: str) -> dict[str, Any]:
        """Return what the status says of one model."""
        return next(item for item in self.status()["models"] if item["key"] == key)

    def executor_pids(self) -> dict[str, int]:
        """Return the executors' processes."""

        async def ask() -> dict[str, int]:
            return self.manager.executor_pids()

        return self.data_plane.submit_coroutine(ask).result(10)

    def ticket(self, key: str, *, tenant: str = "local", ttl_s: float = 60.0, **more: Any) -> bytes:
        """Return a ticket for a model."""
        role = more.get("role", access_pb2.ROLE_USER)
        return self.signer.sign(key, tenant, role, more.get("token_id", "t1"), ttl_s)

    def metadata(self, key: str, **ticket: Any) -> tuple[tuple[str, str | bytes], ...]:
        """Return what a call of a model carries."""
        return (MODEL_KEY, key.rpartition("@")[0]), (TICKET_KEY, self.ticket(key, **ticket))

    def stream(self, key: str, *, timeout_s: float = CALL_TIMEOUT_S, **ticket: Any) -> Wire:
        """Open a stream that may last so long."""
        return Wire(self.channel, self.metadata(key, **ticket), timeout_s)

    def run(self, key: str, method: str, *args: Any, timeout_s: float = 0.0, **kwargs: Any) -> Any:
        """Run one unary call and return its value."""
        return self.run_as(self.metadata(key), method, *args, timeout_s=timeout_s, **kwargs)

    def run_as(
        self,
        metadata: tuple[tuple[str, str | bytes], ...],
        method: str,
        *args: Any,
        timeout_s: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """Run one unary call with other metadata."""
        nodes, payload = values.write_arguments([*(("", item) for item in args), *kwargs.items()])
        request = inference_pb2.RunRequest(
            method=method,
            arguments=nodes,
            timeout_s=timeout_s,
            data=b"".join(bytes(item) for item in payload.buffers),
        )
        stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        try:
            response = stub.Run(request, timeout=CALL_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            raise to_error(error) from None
        return values.read(response.value, memoryview(response.data))

    def close(self) -> None:
        """Stop it."""
        self.channel.close()
        self.data_plane.stop(0.1)


@contextmanager
def running_plane(models: Mapping[str, ModelDefinition], **options: Any) -> Iterator[Plane]:
    """A data plane with these models loaded."""
    plane = Plane(**options)
    try:
        for definition in models.values():
            plane.load(definition)
        yield plane
    finally:
        plane.close()


def with_timeout(definition: ModelDefinition, call_timeout_s: float) -> ModelDefinition:
    """Return the model with another time limit for its calls."""
    return replace(definition, call_timeout_s=call_timeout_s)


def to_error(error: grpc.RpcError) -> NosError:
    """Return the typed error of a failed call."""
    return status.from_status(error.code(), error.details() or "", error.trailing_metadata())


class Wire:
    """A stream, message by message, through the generated stub: nothing of the SDK."""

    def __init__(
        self,
        channel: grpc.Channel,
        metadata: tuple[tuple[str, str | bytes], ...],
        timeout_s: float,
    ) -> None:
        self._outgoing: queue.SimpleQueue[inference_pb2.StreamRequest | None] = queue.SimpleQueue()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        requests = iter(self._outgoing.get, None)
        self.call = stub.Stream(requests, timeout=timeout_s, metadata=metadata)
        self._last_seq = 0

    def say(self, **fields: Any) -> None:
        """Send any message."""
        self._outgoing.put(inference_pb2.StreamRequest(**fields))

    def hello(self) -> inference_pb2.Welcome:
        """Open with a hello, and return the welcome."""
        self.say(hello=inference_pb2.Hello(versions=[1]))
        return self.read().welcome

    def send(
        self, *args: Any, method: str = "", timeout_s: float = 0.0, num_chunks: int | None = None
    ) -> int:
        """Send a frame in as many messages as it takes, or only the first few; return its number."""
        self._last_seq += 1
        nodes, payload = values.write_arguments([("", item) for item in args])
        header = inference_pb2.Frame(
            method=method, arguments=nodes, timeout_s=timeout_s, data_bytes=payload.size
        )
        message = inference_pb2.StreamRequest(seq=self._last_seq, frame=header)
        groups = list(frames.chunked(payload.buffers, CHUNK_BYTES)) or [[]]
        for group in groups[:num_chunks]:
            message.data = b"".join(group)
            self._outgoing.put(message)
            message = inference_pb2.StreamRequest(seq=self._last_seq, chunk=inference_pb2.Chunk())
        return self._last_seq

    def half_close(self) -> None:
        """Send nothing more."""
        self._outgoing.put(None)

    def read(self) -> inference_pb2.StreamResponse:
        """Return the next message that is no heartbeat; raises the stream's own error."""
        try:
            while (message := next(self.call)).HasField("heartbeat"):
                pass
        except grpc.RpcError as error:
            raise to_error(error) from None
        return message

    def result(self) -> tuple[int, Any]:
        """Return the next frame's number and its value, its items as a list, or its error."""
        items: list[Any] = []
        while True:
            message = self.read()
            if message.HasField("error"):
                return message.seq, status.from_message(message.error)
            assert message.HasField("result"), message
            data = bytearray(message.data)
            while len(data) < message.result.data_bytes:
                chunk = self.read()
                assert chunk.HasField("chunk")
                assert chunk.seq == message.seq
                data += chunk.data
            value = values.read(message.result.value, memoryview(bytes(data)))
            if message.result.more:
                items.append(value)
            elif message.result.HasField("value"):
                self.timings = message.result.timings
                return message.seq, value
            else:
                self.timings = message.result.timings
                return message.seq, items

    def results(self) -> dict[int, Any]:
        """Half-close, and return every frame's outcome by its number."""
        self.half_close()
        found: dict[int, Any] = {}
        try:
            while True:
                seq, value = self.result()
                assert seq not in found, f"frame {seq} has two ends"
                found[seq] = value
        except StopIteration:
            return found
