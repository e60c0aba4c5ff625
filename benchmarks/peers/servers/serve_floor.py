"""The floor: a bare grpc.aio server that calls the model in its event loop. PORT."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import workloads

WORKLOAD = workloads.served()
MODEL = workloads.Model(WORKLOAD)


async def call(message: bytes, _: Any) -> bytes:
    """Answer one request."""
    return MODEL.one(WORKLOAD.tensor(message)).tobytes()


async def stream(messages: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
    """Answer one request after the other."""
    async for message in messages:
        yield MODEL.one(WORKLOAD.tensor(message)).tobytes()


async def main(port: int) -> None:
    """Serve until killed."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    handlers = {
        "Call": grpc.unary_unary_rpc_method_handler(call),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("floor.Floor", handlers),)
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
