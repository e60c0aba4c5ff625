"""The deployment for Ray Serve; a module of its own, since Ray's processes import it by name."""

from typing import Any

import grpc
import workloads
from google.protobuf.wrappers_pb2 import BytesValue
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


def add_to_server(servicer: Any, server: Any) -> None:
    """Serve `rpc Call(BytesValue) returns (BytesValue)`, as generated code would."""
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.Call,
        request_deserializer=BytesValue.FromString,
        response_serializer=BytesValue.SerializeToString,
    )
    handlers = grpc.method_handlers_generic_handler("peers.Peer", {"Call": handler})
    server.add_generic_rpc_handlers((handlers,))


def application(name: str, wait_s: float) -> Any:
    """Return the application that serves a workload."""
    workload = workloads.WORKLOADS[name]

    @serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0.5})
    class Peer:
        def __init__(self) -> None:
            self.model = workloads.Model(workload)

        @serve.batch(max_batch_size=workload.max_batch, batch_wait_timeout_s=wait_s)
        async def many(self, inputs: list[workloads.Array]) -> list[workloads.Array]:
            return self.model.many(inputs)

        async def answer(self, data: bytes) -> bytes:
            x = workload.tensor(data)
            y = await self.many(x) if workload.max_batch > 1 else self.model.one(x)
            return bytes(y.tobytes())

        async def __call__(self, request: Request) -> Response:
            data = await self.answer(await request.body())
            return Response(data, media_type="application/octet-stream")

        async def Call(self, message: BytesValue) -> BytesValue:  # noqa: N802 - gRPC's name
            return BytesValue(value=await self.answer(message.value))

    return Peer.bind()
