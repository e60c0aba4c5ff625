# ruff: noqa: D102 - what clients override is said in `Client`
"""How the load generator speaks to each peer.

All HTTP peers are spoken to by one small client of our own, which costs less than a library's, so that no
server is charged for its client. What speaks gRPC does it through grpc.aio with messages made of bytes. Our
own server is spoken to by our own client, as a user would.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np
from workloads import Array, Workload

Caller = Callable[[Array], Awaitable[Array]]

_HOST: Final = "127.0.0.1"
_TRITON_TYPES: Final = {"float32": "FP32", "uint8": "UINT8"}


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send what."""

    workload: Workload
    port: int
    path: str
    folder: str
    """The server's own."""


class Client:
    """One peer's protocol; makes callers, each of which has at most one request under way."""

    #: Whether it runs on any event loop.
    is_plain: ClassVar[bool] = False

    def __init__(self, target: Target) -> None:
        self.target = target
        self.workload = target.workload

    async def open(self) -> None:
        """Connect, where callers share something."""

    async def caller(self) -> Caller:
        """Return a function that sends one request and returns its answer."""
        raise NotImplementedError

    async def close(self) -> None:
        """Give back what `open` took."""


# HTTP.


class _Connection(asyncio.Protocol):
    """A connection with one request under way: enough of HTTP/1.1 for what the peers answer."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[tuple[dict[bytes, bytes], bytes]] | None = None
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"closed: {exc}"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        received = self._received
        head_bytes = received.find(b"\r\n\r\n")
        if head_bytes < 0 or self._answer is None:
            return
        status, *lines = bytes(received[:head_bytes]).split(b"\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in lines)
        }
        start = head_bytes + 4
        if b"content-length" in headers:
            end = start + int(headers[b"content-length"])
            if len(received) < end:
                return
            body = bytes(received[start:end])
        else:
            if not received.endswith(b"0\r\n\r\n"):
                return
            body = b"".join(_chunks(received, start))
        received.clear()
        answer, self._answer = self._answer, None
        if status.split(b" ", 2)[1] == b"200":
            answer.set_result((headers, body))
        else:
            answer.set_exception(RuntimeError(f"{status!r}: {body[:200]!r}"))

    def send(self, message: bytes) -> asyncio.Future[tuple[dict[bytes, bytes], bytes]]:
        """Send a request and return what will be its answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        return self._answer


def _chunks(received: bytearray, at: int) -> list[bytes]:
    found = []
    while True:
        line_end = received.index(b"\r\n", at)
        size = int(bytes(received[at:line_end]).split(b";")[0], 16)
        if not size:
            return found
        found.append(bytes(received[line_end + 2 : line_end + 2 + size]))
        at = line_end + 4 + size


class Http(Client):
    """The tensor's bytes as the body, both ways."""

    is_plain = True

    async def caller(self) -> Caller:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, _HOST, self.target.port)

        async def call(x: Array) -> Array:
            return self.decode(*await connection.send(self.encode(x)))

        return call

    def head(self, num_bytes: int, kind: str = "application/octet-stream", more: str = "") -> bytes:
        """Return what comes before a body."""
        return (
            f"POST {self.target.path} HTTP/1.1\r\nHost: {_HOST}\r\nContent-Type: {kind}\r\n"
            f"{more}Content-Length: {num_bytes}\r\n\r\n"
        ).encode()

    def encode(self, x: Array) -> bytes:
        """Return a request."""
        body = x.tobytes()
        return self.head(len(body)) + body

    def decode(self, headers: dict[bytes, bytes], body: bytes) -> Array:
        """Return what an answer says."""
        del headers
        return self.workload.answer(body)


class HttpJson(Http):
    """Nested lists, both ways."""

    def encode(self, x: Array) -> bytes:
        body = json.dumps({"x": x.tolist()}).encode()
        return self.head(len(body), "application/json") + body

    def decode(self, headers: dict[bytes, bytes], body: bytes) -> Array:
        del headers
        return np.asarray(json.loads(body), np.float32).reshape(self.workload.answer_shape)


class TritonHttp(Http):
    """The Open Inference Protocol, with tensors as bytes behind its JSON."""

    def __init__(self, target: Target) -> None:
        super().__init__(replace(target, path=f"/v2/models/{target.workload.name}/infer"))
        it = self.workload
        described = {
            "name": "x",
            "shape": _triton_shape(it),
            "datatype": _TRITON_TYPES[it.dtype],
            "parameters": {"binary_data_size": it.num_bytes},
        }
        output = {"name": "y", "parameters": {"binary_data": True}}
        text = json.dumps({"inputs": [described], "outputs": [output]}).encode()
        more = f"Inference-Header-Content-Length: {len(text)}\r\n"
        self._head = self.head(len(text) + it.num_bytes, more=more) + text

    def encode(self, x: Array) -> bytes:
        return self._head + x.tobytes()

    def decode(self, headers: dict[bytes, bytes], body: bytes) -> Array:
        return self.workload.answer(body, int(headers[b"inference-header-content-length"]))


def _triton_shape(workload: Workload) -> list[int]:
    return [1, *workload.shape] if workload.name == "frame" else list(workload.shape)


# gRPC.


class Grpc(Client):
    """One call of a method for each request, the tensor's bytes as the message."""

    method: ClassVar[str] = "/floor.Floor/Call"
    metadata: ClassVar[tuple[tuple[str, str], ...] | None] = None

    async def open(self) -> None:
        import grpc

        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(f"{_HOST}:{self.target.port}", options)

    async def caller(self) -> Caller:
        method = self.channel.unary_unary(self.method)

        async def call(x: Array) -> Array:
            return self.decode(await method(self.encode(x), metadata=self.metadata))

        return call

    async def close(self) -> None:
        await self.channel.close()

    def encode(self, x: Array) -> bytes:
        """Return a request."""
        return x.tobytes()

    def decode(self, message: bytes) -> Array:
        """Return what an answer says."""
        return self.workload.answer(message)


class GrpcStream(Grpc):
    """A stream for each caller."""

    method = "/floor.Floor/Stream"

    async def caller(self) -> Caller:
        stream = self.channel.stream_stream(self.method)()

        async def call(x: Array) -> Array:
            await stream.write(self.encode(x))
            return self.decode(await stream.read())

        return call


class RayGrpc(Grpc):
    """A `google.protobuf.BytesValue` both ways."""

    method = "/peers.Peer/Call"
    metadata = (("application", "default"),)

    def encode(self, x: Array) -> bytes:
        return _field(x.tobytes())

    def decode(self, message: bytes) -> Array:
        return self.workload.answer(_first_field(message))


class TorchNosGrpc(Grpc):
    """Pickled inputs in a pickled request in a field of bytes, as its own client sends them."""

    method = "/nos.inference.InferenceService/Run"

    def encode(self, x: Array) -> bytes:
        request = {
            "id": f"peers/{self.workload.name}",
            "method": "__call__",
            "inputs": {"x": pickle.dumps(x)},
        }
        return _field(pickle.dumps(request))

    def decode(self, message: bytes) -> Array:
        answer = pickle.loads(_first_field(message))  # noqa: S301 - of a server of our own making
        return np.asarray(answer).reshape(self.workload.answer_shape)


class TritonStream(Client):
    """NVIDIA's own client, a bidirectional stream for each caller."""

    async def open(self) -> None:
        import tritonclient.grpc as triton
        import tritonclient.grpc.aio as triton_aio

        self._triton = triton
        self._client = triton_aio.InferenceServerClient(f"{_HOST}:{self.target.port}")
        self._outputs = [triton.InferRequestedOutput("y")]

    async def caller(self) -> Caller:
        waiting: asyncio.Queue[Array] = asyncio.Queue()
        shape = _triton_shape(self.workload)
        kind = _TRITON_TYPES[self.workload.dtype]

        async def requests() -> Any:
            while True:
                x = await waiting.get()
                given = self._triton.InferInput("x", shape, kind)
                given.set_data_from_numpy(x.reshape(shape))
                yield {
                    "model_name": self.workload.name,
                    "inputs": [given],
                    "outputs": self._outputs,
                }

        answers = self._client.stream_infer(requests()).__aiter__()

        async def call(x: Array) -> Array:
            waiting.put_nowait(x)
            result, error = await anext(answers)
            if error:
                raise error
            answer: Array = result.as_numpy("y").reshape(self.workload.answer_shape)
            return answer

        return call

    async def close(self) -> None:
        await self._client.close()


class TritonShared(Client):
    """NVIDIA's own client, with tensors in shared memory and gRPC to say so."""

    async def open(self) -> None:
        import tritonclient.grpc as triton
        import tritonclient.grpc.aio as triton_aio
        from tritonclient.utils import shared_memory

        self._triton = triton
        self._shared = shared_memory
        self._client = triton_aio.InferenceServerClient(f"{_HOST}:{self.target.port}")
        self._regions: dict[str, Any] = {}

    async def caller(self) -> Caller:
        it, shared = self.workload, self._shared
        name = f"peers-{Path(self.target.folder).name}-{len(self._regions)}"
        in_bytes, out_bytes = it.num_bytes, it.num_answer_bytes
        region = shared.create_shared_memory_region(name, f"/{name}", in_bytes + out_bytes)
        self._regions[name] = region
        await self._client.register_system_shared_memory(name, f"/{name}", in_bytes + out_bytes)
        given = self._triton.InferInput("x", _triton_shape(it), _TRITON_TYPES[it.dtype])
        given.set_shared_memory(name, in_bytes)
        wanted = self._triton.InferRequestedOutput("y")
        wanted.set_shared_memory(name, out_bytes, in_bytes)

        async def call(x: Array) -> Array:
            shared.set_shared_memory_region(region, [x])
            await self._client.infer(it.name, [given], outputs=[wanted])
            found = shared.get_contents_as_numpy(region, np.float32, it.answer_shape, in_bytes)
            return np.array(found)

        return call

    async def close(self) -> None:
        for name, region in self._regions.items():
            await self._client.unregister_system_shared_memory(name)
            self._shared.destroy_shared_memory_region(region)
        await self._client.close()


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _field(content: bytes) -> bytes:
    """Return a protobuf message whose field 1 is `content`."""
    return b"\x0a" + _varint(len(content)) + content


def _first_field(message: bytes) -> bytes:
    """Return field 1 of a message that has no other."""
    size, at = 0, 1
    while True:
        byte = message[at]
        size |= (byte & 127) << 7 * (at - 1)
        at += 1
        if byte < 128:
            return message[at : at + size]


# Ours.


class Nos(Client):
    """Our own client for asyncio, a stream for each caller; through shared memory."""

    via: ClassVar[Literal["local", "direct"]] = "local"

    async def open(self) -> None:
        import nos

        self._client = await nos.AsyncClient.connect(
            f"{_HOST}:{self.target.port}",
            token_file=Path(self.target.folder) / "state" / "token",
            via=self.via,
        )
        self._model = await self._client.model(f"peers/{self.workload.name}")

    async def caller(self) -> Caller:
        stream = await self._model.stream().__aenter__()

        async def call(x: Array) -> Array:
            await stream.send(x)
            answer: Array = (await anext(stream)).value
            return answer

        return call

    async def close(self) -> None:
        await self._client.close()


class NosDirect(Nos):
    """The same over gRPC, as from another host."""

    via = "direct"


CLIENTS: Final[dict[str, type[Client]]] = {
    "http": Http,
    "http-json": HttpJson,
    "triton-http": TritonHttp,
    "triton-stream": TritonStream,
    "triton-shared": TritonShared,
    "grpc": Grpc,
    "grpc-stream": GrpcStream,
    "ray-grpc": RayGrpc,
    "torch-nos": TorchNosGrpc,
    "nos": Nos,
    "nos-direct": NosDirect,
}
