"""A bare gRPC bidirectional echo of raw bytes: the floor that other paths are compared with.

Run as a program it serves on a free loopback port, prints the port and ends with its standard input.
It has nothing of ours but the channel options, so that only our own work makes the difference.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
from nos.wire.options import SERVER_OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

METHOD = "/floor.Echo/Stream"
#: Answers with the first bytes of each message only.
SHORT_METHOD = "/floor.Echo/Short"
SHORT_BYTES = 64


class _Echo(grpc.GenericRpcHandler):
    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if handler_call_details.method == METHOD:
            return grpc.stream_stream_rpc_method_handler(self._echo)
        if handler_call_details.method == SHORT_METHOD:
            return grpc.stream_stream_rpc_method_handler(self._short)
        return None

    async def _echo(
        self, requests: AsyncIterator[bytes], _context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        async for message in requests:
            yield message

    async def _short(
        self, requests: AsyncIterator[bytes], _context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        async for message in requests:
            yield message[:SHORT_BYTES]


async def _serve() -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(grace=None)


@contextmanager
def running() -> Iterator[tuple[int, int]]:
    """Run the echo server in a process of its own; gives its port and process id."""
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield int(process.stdout.readline()), process.pid
        process.stdin.close()


if __name__ == "__main__":
    asyncio.run(_serve())
