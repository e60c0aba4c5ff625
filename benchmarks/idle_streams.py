"""What an idle stream costs: memory of the server for each, and how long opening and closing take.

Usage: `python benchmarks/idle_streams.py ADDRESS TOKEN_FILE [--streams N] [--json FILE]`, beside a server.

Streams are opened through the gateway over a few connections, since that costs most: each is a relayed
stream at the gateway and one at the worker. The client is bare gRPC, so that only the server is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import nos
import psutil
from nos.wire.limits import MODEL_KEY, TOKEN_KEY
from nos.wire.options import CHANNEL_OPTIONS
from nos.wire.v1 import inference_pb2
from report import write_json

MODEL = "nos/echo"
PATH = "/nos.v1.InferenceService/Stream"
PER_CONNECTION = 250


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one run."""

    num_streams: int
    gateway_bytes: float
    """Per stream."""
    worker_bytes: float
    """Per stream."""
    open_s: float
    close_s: float


def own_bytes(pid: int) -> int:
    """Return a process's memory that is nobody else's."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


async def open_stream(channel: grpc.aio.Channel, token: str) -> grpc.aio.StreamStreamCall:
    """Return a stream that was welcomed."""
    metadata = ((MODEL_KEY, MODEL), (TOKEN_KEY, f"Bearer {token}"))
    call = channel.stream_stream(PATH)(metadata=metadata)
    hello = inference_pb2.StreamRequest(hello=inference_pb2.Hello(versions=[1]))
    await call.write(hello.SerializeToString())
    welcome = inference_pb2.StreamResponse.FromString(await call.read())
    assert welcome.HasField("welcome")
    return call


async def measure(address: str, token: str, num_streams: int, pids: tuple[int, int]) -> Figures:
    """Open streams one after the other, look at gateway and worker, and close them."""
    num_channels = -(-num_streams // PER_CONNECTION)
    options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(num_channels)]
    # What the first ones cost once for all is none of the others' cost.
    kept = [await open_stream(channel, token) for channel in channels]
    before = [own_bytes(pid) for pid in pids]
    start_s = time.monotonic()
    calls = [await open_stream(channels[it % num_channels], token) for it in range(num_streams)]
    open_s = time.monotonic() - start_s
    gateway_bytes, worker_bytes = (
        (own_bytes(pid) - bytes_before) / num_streams
        for pid, bytes_before in zip(pids, before, strict=True)
    )
    start_s = time.monotonic()
    for call in (*calls, *kept):
        await call.done_writing()
    for call in (*calls, *kept):
        while await call.read() is not grpc.aio.EOF:
            pass
    close_s = time.monotonic() - start_s
    for channel in channels:
        await channel.close()
    return Figures(
        num_streams=num_streams,
        gateway_bytes=gateway_bytes,
        worker_bytes=worker_bytes,
        open_s=open_s,
        close_s=close_s,
    )


def server_pids(address: str, token_file: str) -> tuple[int, int]:
    """Return the processes of the gateway and of the worker that has the model."""
    with nos.connect(address, token_file=token_file) as client:
        client.load(MODEL)
        (worker,) = client.status().workers
    _, _, port = address.rpartition(":")
    connections = psutil.net_connections("tcp")
    listening = [it for it in connections if it.status == psutil.CONN_LISTEN and it.pid]
    gateway = next(it.pid for it in listening if it.laddr.port == int(port))
    return gateway, worker.pid


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address")
    parser.add_argument("token_file")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    token = Path(arguments.token_file).read_text().strip()
    pids = server_pids(arguments.address, arguments.token_file)
    found = asyncio.run(measure(arguments.address, token, arguments.streams, pids))
    print(
        f"{found.num_streams} idle streams: {found.gateway_bytes / 1024:.1f} KiB each at the gateway, "
        f"{found.worker_bytes / 1024:.1f} KiB at the worker; opened in {found.open_s:.1f} s, "
        f"closed in {found.close_s:.1f} s"
    )
    if arguments.json:
        write_json(arguments.json, asdict(found))


if __name__ == "__main__":
    main()
