"""Row F7, and of F6 the pickle: any bytes to any method of a real gateway and a real worker's port."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import pickle
import socket
import struct
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from nos.errors import InternalError, LimitExceededError, NosError
from nos.wire import status
from nos.wire.limits import TICKET_KEY
from nos.wire.options import SERVER_OPTIONS
from nos.wire.shared import HEAD, INLINE
from nos.wire.v1 import access_pb2, blobs_pb2, inference_pb2, models_pb2
from nos.wire.values import write_arguments

from tests.integration.test_gateway import ADMIN, EVERY_METHOD, SOURCE, Gateway
from tests.malformed import changed, examples, messages
from tests.plane import definitions, running_plane

#: Methods that last have said nothing bad by then.
PATIENCE_S = 0.05
#: Of each method.
EXAMPLES = 6
#: What the process may grow by over all of it, gateway, workers and tests together.
GROWTH_BYTES = 512 << 20


class Trap:
    """Pickled, it opens a file wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.open, (str(self.path), os.O_CREAT)


def real_requests(method: str) -> list[bytes]:
    """Return what an honest client sends, where nothing near it comes of single fields."""
    nodes, payload = write_arguments([("", 2)])
    data = b"".join(map(bytes, payload.buffers))
    frame = inference_pb2.Frame(arguments=nodes, data_bytes=payload.size)
    found: dict[str, list[Message]] = {
        "Run": [inference_pb2.RunRequest(arguments=nodes, data=data)],
        "Stream": [
            inference_pb2.StreamRequest(seq=1, frame=frame, data=data),
            inference_pb2.StreamRequest(seq=1, cancel=inference_pb2.Cancel()),
            inference_pb2.StreamRequest(seq=1, chunk=inference_pb2.Chunk()),
        ],
        "RegisterModel": [models_pb2.RegisterModelRequest(name="double", source=SOURCE)],
    }
    return [message.SerializeToString() for message in found.get(method.rpartition("/")[2], [])]


def requests(method: str, extra: bytes) -> st.SearchStrategy[bytes]:
    service, _, name = method.strip("/").partition("/")
    described = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    whole = messages(described.input_type, extra=extra).map(lambda it: it.SerializeToString())
    if real := real_requests(method):
        whole |= st.sampled_from(real)
    return whole | changed(whole) | st.binary(max_size=200) | st.just(extra)


class Target:
    """Something to send bytes to, from this thread."""

    def __init__(self, channel: Any, metadata: Any) -> None:
        self.channel, self.metadata = channel, metadata

    def send(
        self, method: str, kind: tuple[bool, bool], *raws: bytes, patience_s: float = PATIENCE_S
    ) -> list[NosError]:
        """Return what comes of some messages, or of the only one."""
        name = f"{'stream' if kind[0] else 'unary'}_{'stream' if kind[1] else 'unary'}"
        call = getattr(self.channel, name)(method)
        given = iter(raws) if kind[0] else raws[0]
        errors = []
        try:
            answer = call(given, metadata=self.metadata, timeout=patience_s)
            for raw in answer if kind[1] else ():
                if method.endswith("/Stream"):
                    response = inference_pb2.StreamResponse.FromString(raw)
                    if response.HasField("error"):
                        errors.append(status.from_message(response.error))
        except grpc.RpcError as error:
            errors.append(status.from_status(error.code(), "", error.trailing_metadata()))
        return errors


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A gateway in a thread of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    started: Future[str] = Future()
    ended = threading.Event()

    async def serve() -> None:
        running = Gateway(folder)
        await running.start()
        started.set_result(running.address)
        await asyncio.to_thread(ended.wait)
        await running.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    with grpc.insecure_channel(started.result(60)) as channel:
        yield Target(channel, ADMIN)
    ended.set()
    thread.join()


@pytest.fixture(scope="module")
def plane() -> Any:
    """A worker's data plane, with a model."""
    models = definitions(SOURCE, "double.py")
    with running_plane({model.name: model for model in models}) as running:
        running.key = models[0].key
        yield running


@pytest.fixture(scope="module")
def worker(plane: Any) -> Target:
    """A worker's port."""
    ticket = plane.ticket(plane.key, role=access_pb2.ROLE_ADMIN)
    return Target(plane.channel, ((TICKET_KEY, ticket),))


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trap") / "sprung"


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous"))


def attack(target: Target, method: str, kind: tuple[bool, bool], trap: Path) -> None:
    payload = pickle.dumps(Trap(trap))
    # Without one, a stream is refused before it is listened to.
    hello = inference_pb2.StreamRequest(hello=inference_pb2.Hello(versions=[1]))
    opening = (hello.SerializeToString(),) if method.endswith("/Stream") else ()

    @examples(EXAMPLES)
    @given(raws=st.lists(requests(method, payload), min_size=1, max_size=3), greets=st.booleans())
    def send(raws: list[bytes], greets: bool) -> None:
        errors = target.send(method, kind, *(opening if greets else ()), *raws)
        # What a model raises is its own; nothing else may be said to be the server's defect.
        assert not any(isinstance(error, InternalError) for error in errors), (raws, errors)

    before_bytes = anonymous_bytes()
    send()
    assert anonymous_bytes() - before_bytes < GROWTH_BYTES
    assert not trap.exists()


@pytest.mark.accept("F6", "F7")
@pytest.mark.parametrize(("method", "kind"), EVERY_METHOD)
def test_no_bytes_break_a_method_of_the_gateway(gateway, method, kind, trap):
    attack(gateway, method, kind, trap)
    found = gateway.channel.unary_unary("/nos.v1.ModelService/ListModels")(
        b"", metadata=ADMIN, timeout=30
    )
    models_pb2.ListModelsResponse.FromString(found)


@pytest.mark.accept("F6", "F7")
@pytest.mark.parametrize(
    ("method", "kind"), [it for it in EVERY_METHOD if "InferenceService" in it.values[0]]
)
def test_no_bytes_break_a_method_of_a_workers_port(worker, method, kind, trap):
    attack(worker, method, kind, trap)


def knock(plane: Any, raw: bytes) -> None:
    """Say some bytes to the port of local clients, with memory to share, and wait until it hangs up."""
    memory = os.memfd_create("nos-test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, 2 * mmap.PAGESIZE)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(30)
            connection.connect(plane.data_plane.unix_socket.replace("@", "\0", 1))
            try:
                socket.send_fds(connection, [raw[:4]], [memory])
                connection.sendall(raw[4:])
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass
    finally:
        os.close(memory)


@pytest.mark.accept("F7")
def test_no_bytes_break_the_port_of_local_clients(plane, caplog):
    metadata = dict(plane.metadata(plane.key))
    hello = inference_pb2.LocalHello(
        model=metadata["nos-model"],
        ticket=metadata["nos-ticket-bin"],
        request_bytes=mmap.PAGESIZE,
        result_bytes=mmap.PAGESIZE,
    ).SerializeToString()
    frames = real_requests("/nos.v1.InferenceService/Stream")
    said = b"".join(HEAD.pack(len(raw), 0, INLINE, 0) + raw for raw in frames)
    opened = struct.pack("<I", len(hello)) + hello

    @examples(3 * EXAMPLES)
    @given(changed(st.just(opened)), changed(st.just(said)), st.booleans())
    def say(first: bytes, then: bytes, is_known: bool) -> None:
        knock(plane, (opened if is_known else first) + then)

    say()
    assert plane.run(plane.key, "", 21) == 42
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.accept("F7")
@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_a_message_of_the_limit_is_taken_and_no_larger_one(gateway, excess):
    size = dict(SERVER_OPTIONS)["grpc.max_receive_message_length"] + excess
    request = blobs_pb2.UploadRequest(sha256="0" * 64, size_bytes=1 << 40, data=b"x")
    request.data = bytes(size - request.ByteSize() - 2)
    request.data += bytes(size - request.ByteSize())
    assert request.ByteSize() == size
    method = "/nos.v1.BlobService/Upload"
    (error,) = gateway.send(method, (True, False), request.SerializeToString(), patience_s=30)
    assert ("the blob is too large" in str(error)) == (excess <= 0)
    assert isinstance(error, LimitExceededError)


def test_the_trap_springs_where_something_unpickles(trap):
    other = trap.with_name("sprung here")
    os.close(pickle.loads(pickle.dumps(Trap(other))))
    assert other.exists()
