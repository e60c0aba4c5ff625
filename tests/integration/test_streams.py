"""Streams of clients on the worker's host, and what a stream promises whatever carries it."""

import gc
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import nos
import numpy as np
import psutil
import pytest
from nos._local import LocalStream
from nos._session import Session
from nos.errors import (
    InvalidRequestError,
    LimitExceededError,
    NosError,
    OverloadedError,
    UnauthenticatedError,
)
from nos.wire import status, values
from nos.wire.shared import HEAD
from nos.wire.v1 import inference_pb2

from tests.plane import fake_models, running_plane
from tests.servers import ROOT, wait_for

FRAME = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)


def connect(server, via="auto"):
    return nos.connect(server.address, token_file=server.token_file, via=via)


@pytest.fixture
def local(server):
    with connect(server, "local") as client:
        yield client


def test_clients_of_the_host_use_shared_memory_by_themselves(server):
    with connect(server) as client:
        client.model("nos/echo")(1)
        assert set(client.status().routes.values()) == {"through shared memory"}


def test_shared_memory_is_off_by_flag(server):
    with connect(server, "direct") as client:
        client.model("nos/echo")(1)
        assert all(way.startswith("direct to") for way in client.status().routes.values())


@pytest.mark.accept("D5")
@pytest.mark.accept("D5")
def test_local_frames_of_many_threads_are_never_mixed_up(local):
    model = local.model("nos/echo")
    num_threads, num_calls = 8, 2000
    wrong = []

    def run(index):
        for number in range(num_calls // num_threads):
            frame = np.full((480, 640, 3), (index * 31 + number) % 256, np.uint8)
            frame[0, 0] = index, number % 256, number // 256
            if not np.array_equal(model(frame), frame):
                wrong.append((index, number))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("size", [0, 4096, 4097, 1 << 20, (1 << 20) + 1, 70 << 20])
def test_local_frames_of_any_size_come_back(local, size):
    data = np.arange(size, dtype=np.uint8)
    np.testing.assert_array_equal(local.model("nos/echo")(data), data)


@pytest.mark.accept("D5")
@pytest.mark.parametrize("via", ["local", "direct"])
def test_frames_that_were_written_into_buffers_of_the_stream_come_back_as_they_were(server, via):
    with connect(server, via) as client, client.model("nos/echo").stream() as stream:
        for number in range(80):  # more than the shared memory holds
            frame = stream.buffer((480, 640, 3))
            assert (frame.shape, frame.dtype) == ((480, 640, 3), np.uint8)
            np.add(FRAME, number, out=frame)
            stream.send(frame)
            if number >= 8:
                np.testing.assert_array_equal(next(stream).value, FRAME + np.uint8(number - 8))
        is_shared = stream.buffer(1 << 16).base is not None
        assert is_shared == (via == "local")
        unsent = [stream.buffer((480, 640, 3)) for _ in range(30)]
        stream.send(unsent[-1][:100])
        assert sum(1 for _ in stream) == 9
    unsent[0][:] = 1  # it is the caller's as long as it was not sent


def test_a_local_result_stays_when_its_memory_is_used_again(local):
    echo = local.model("nos/echo")
    first = echo(FRAME)
    for _ in range(5):
        echo(np.zeros_like(FRAME))
    np.testing.assert_array_equal(first, FRAME)


@pytest.mark.accept("D5")
@pytest.mark.accept("D5")
def test_nothing_is_left_of_a_killed_local_client(server):
    code = f"""
import nos, numpy as np, sys
client = nos.connect({server.address!r}, token_file={str(server.token_file)!r}, via="local")
client.model("nos/echo")(np.zeros((480, 640, 3), np.uint8))
print("ready", flush=True)
sys.stdin.read()
"""
    with connect(server) as client:
        (worker,) = client.status().workers

    def mappings():
        return sum("nos-stream" in it.path for it in psutil.Process(worker.pid).memory_maps(False))

    gc.collect()
    before = wait_for(lambda: (mappings(),), "the worker's mappings")[0]
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        assert mappings() > before
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: mappings() <= before, "the worker lets go of the memory", 30)
    assert not list(Path("/dev/shm").glob("nos*"))


@pytest.fixture(scope="module")
def plane():
    with running_plane(fake_models("slow", "signatures")) as running:
        yield running


def hello(plane, **changes):
    metadata = dict(plane.metadata("fake/slow@v1"))
    fields = {
        "model": metadata["nos-model"],
        "ticket": metadata["nos-ticket-bin"],
        "request_bytes": mmap.PAGESIZE,
        "result_bytes": mmap.PAGESIZE,
    }
    return inference_pb2.LocalHello(**{**fields, **changes}).SerializeToString()


def knock(plane, first, descriptors):
    """Send the first bytes; return what comes before the server hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(plane.data_plane.unix_socket.replace("@", "\0", 1))
        socket.send_fds(connection, [first], descriptors)
        answer = b""
        try:
            while data := connection.recv(1 << 16):
                answer += data
        except ConnectionResetError:
            pass
        return answer


@pytest.mark.parametrize("kind", ["unsealed", "file", "short", "huge", "none", "nonsense"])
def test_strange_memory_is_refused_and_the_next_client_is_served(plane, kind, tmp_path):
    memory = os.memfd_create("nos-test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, 2 * mmap.PAGESIZE)
        raw = hello(plane)
        descriptors = [memory]
        if kind == "file":
            (tmp_path / "x").write_bytes(bytes(2 * mmap.PAGESIZE))
            os.close(memory)
            memory = os.open(tmp_path / "x", os.O_RDWR)
            descriptors = [memory]
        elif kind == "short":
            raw = hello(plane, request_bytes=8 * mmap.PAGESIZE)
        elif kind == "huge":
            raw = hello(plane, request_bytes=1 << 60)
        elif kind == "none":
            descriptors = []
        elif kind == "nonsense":
            raw = b"\xff" * 40
        assert knock(plane, struct.pack("<I", len(raw)) + raw, descriptors) == b""
    finally:
        os.close(memory)
    stream = LocalStream(plane.data_plane.unix_socket, plane.metadata("fake/slow@v1"))
    stream.put(stream.wrap(Session().hello("test")))
    assert next(messages(stream)).HasField("welcome")
    stream.close()


def messages(stream):
    """Yield a local stream's messages until it ends, an error last."""
    try:
        for message, _ in stream.messages():
            yield message
    except NosError as error:
        yield error


def test_a_bad_ticket_opens_no_local_stream(plane):
    stream = LocalStream(
        plane.data_plane.unix_socket, (("nos-model", "fake/slow"), ("nos-ticket-bin", b"bad"))
    )
    [message] = messages(stream)
    assert isinstance(status.from_message(message.error), UnauthenticatedError)


def test_a_slot_out_of_range_ends_its_stream_only(plane):
    stream = LocalStream(plane.data_plane.unix_socket, plane.metadata("fake/slow@v1"))
    nodes, _ = values.write_arguments([("", 0.0)])
    frame = inference_pb2.Frame(arguments=nodes, data_bytes=1 << 20)
    raw = inference_pb2.StreamRequest(seq=1, frame=frame).SerializeToString()
    stream.put(HEAD.pack(len(raw), 0, 1 << 40, 1 << 20) + raw)
    [message] = messages(stream)
    assert isinstance(status.from_message(message.error), InvalidRequestError)
    assert plane.run("fake/slow@v1", "", 0.0) == 0.0


SIGNATURE = "fake/signature@v1"


def images(rows, side=8):
    return np.ones((rows, 3, side, side), np.float32)


def test_another_shape_mid_stream_fails_only_where_the_model_forbids_it(plane):
    stream = plane.stream(SIGNATURE)
    for array in (images(2), images(5), images(2, side=9), images(0), images(1)):
        stream.send(array)
    found = stream.results()
    assert [len(found[seq]) for seq in (1, 2, 4, 5)] == [2, 5, 0, 1]
    assert isinstance(found[3], InvalidRequestError)
    assert "(batch, 3, 8, 8), got (2, 3, 9, 9)" in str(found[3])


def test_a_chunk_with_more_than_was_announced_fails_its_frame_only(plane):
    stream = plane.stream(SIGNATURE)
    stream.send(images(1), num_chunks=1)
    nodes, payload = values.write_arguments([("", images(2000))])
    header = inference_pb2.Frame(arguments=nodes, data_bytes=payload.size)
    stream.say(seq=2, frame=header, data=bytes(1 << 20))
    stream.say(seq=2, chunk=inference_pb2.Chunk(), data=bytes(3 << 20))
    stream.say(seq=2, chunk=inference_pb2.Chunk(), data=bytes(1 << 20))
    stream._last_seq = 2
    stream.send(images(3))
    found = stream.results()
    assert (len(found[1]), len(found[3])) == (1, 3)
    assert isinstance(found[2], InvalidRequestError)
    assert "more bytes than it said" in str(found[2])


@pytest.mark.parametrize("size", [(2 << 30) + 1, 1 << 50, (1 << 64) - 1])
def test_a_frame_over_the_limit_fails_alone_and_reserves_nothing(plane, size):
    stream = plane.stream(SIGNATURE)
    nodes, _ = values.write_arguments([("", images(1))])
    stream.say(seq=1, frame=inference_pb2.Frame(arguments=nodes, data_bytes=size))
    stream._last_seq = 1
    stream.send(images(3))
    found = stream.results()
    assert isinstance(found[1], LimitExceededError)
    assert f"got {size}" in str(found[1])
    assert len(found[2]) == 3


@pytest.mark.parametrize("seq", [0, 1, 3, (1 << 64) - 1])
def test_a_number_that_is_repeated_or_skipped_ends_its_stream_only(plane, seq):
    stream, other = plane.stream("fake/slow@v1"), plane.stream("fake/slow@v1")
    nodes, _ = values.write_arguments([("", 0.0)])
    for number in (1, seq):
        stream.say(seq=number, frame=inference_pb2.Frame(arguments=nodes))
    with pytest.raises(InvalidRequestError, match=f"expected 2, got {seq}"):
        list(iter(stream.read, None))
    other.send(0.0)
    assert other.results() == {1: 0.0}


def test_a_chunk_of_no_frame_ends_its_stream_only(plane):
    stream, other = plane.stream("fake/slow@v1"), plane.stream("fake/slow@v1")
    stream.say(seq=7, chunk=inference_pb2.Chunk(), data=b"x")
    with pytest.raises(InvalidRequestError, match="the chunk belongs to no frame"):
        stream.read()
    other.send(0.0)
    assert other.results() == {1: 0.0}


def test_a_stream_too_many_is_refused_at_once_and_the_next_finds_room():
    with running_plane(fake_models("slow"), max_streams=2) as small:
        streams = [small.stream("fake/slow@v1") for _ in range(2)]
        for stream in streams:
            stream.hello()
        with pytest.raises(OverloadedError, match="no room for another stream: expected at most 2"):
            small.stream("fake/slow@v1").hello()
        assert streams[0].results() == {}
        wait_for(lambda: small.data_plane.num_streams == 1, "there is room", 30)
        assert small.stream("fake/slow@v1").hello().version == 1


def test_a_tenant_with_all_its_streams_leaves_room_for_others():
    with running_plane(fake_models("slow"), max_tenant_streams=2) as shared:
        streams = [shared.stream("fake/slow@v1", tenant="ann") for _ in range(2)]
        for stream in streams:
            stream.hello()
        with pytest.raises(OverloadedError, match="expected at most 2 of one tenant"):
            shared.stream("fake/slow@v1", tenant="ann").hello()
        assert shared.stream("fake/slow@v1", tenant="bob").hello().version == 1


@pytest.mark.accept("D2")
def test_an_idle_stream_costs_little(server, accept, tmp_path):
    num_streams = 1000 if accept.strict else 200
    script, report = ROOT / "benchmarks" / "idle_streams.py", tmp_path / "report.json"
    place = (server.address, str(server.token_file), "--streams", str(num_streams))
    command = [sys.executable, str(script), *place, "--json", str(report)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    figures = json.loads(report.read_text())["figures"]
    assert figures["num_streams"] == num_streams
    accept.figure(figures["gateway_bytes"] / 1024, 64, "KiB at the gateway")
    accept.figure(figures["worker_bytes"] / 1024, 64, "KiB at the worker")


@pytest.mark.accept("A8")
def test_a_client_made_from_the_protocol_alone_streams_frames_of_several_tensors(server):
    script = ROOT / "examples" / "plain_client.py"
    assert "import nos" not in script.read_text()
    done = subprocess.run(
        [sys.executable, script, server.address, server.token_file],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "8 of 8 frames came back as they were\n"), (
        done.stderr
    )


@pytest.fixture(params=["local", "direct", "relay"])
def via(request, server):
    with connect(server, request.param) as client:
        yield client


@pytest.mark.accept("D1")
def test_results_come_between_sends_and_in_order(via):
    with via.model("fake/slow").stream() as stream:
        stream.send(0.0)
        assert next(stream).value == 0.0
        for pause_s in (0.1, 0.0, 0.05):
            stream.send(pause_s)
        stream.finish()
        assert [result.value for result in stream] == [0.1, 0.0, 0.05]


@pytest.mark.accept("D1")
def test_unordered_results_come_as_they_are_there(via):
    with via.model("fake/slow").stream(ordered=False) as stream:
        stream.send(1.0)
        stream.send(0.0, timeout_s=0.2)
        stream.finish()
        assert [result.seq for result in stream] == [2, 1]


@pytest.mark.accept("D2")
@pytest.mark.parametrize("policy", ["latest", "drop_oldest"])
def test_a_live_stream_never_waits_and_tells_each_drop(via, policy):
    num_frames = 60
    with via.model("fake/slow").stream(policy=policy) as stream:
        stream.send(0.0)
        assert next(stream).value == 0.0
        start_s = time.monotonic()
        for _ in range(num_frames):
            stream.send(0.02)
        assert time.monotonic() - start_s < num_frames * 0.02
        stream.finish()
        ends = list(stream)
    dropped = [end.seq for end in ends if isinstance(end.error, OverloadedError)]
    answered = [end.seq for end in ends if end.error is None]
    assert sorted(dropped + answered) == list(range(2, num_frames + 2))
    assert dropped == sorted(dropped)
    assert answered == sorted(answered)
    assert dropped
    assert answered[-1] == num_frames + 1


def test_an_unknown_policy_is_named(via):
    with pytest.raises(InvalidRequestError, match="block, drop_oldest or latest"):
        via.model("nos/echo").stream(policy="newest")


@pytest.mark.accept("D3")
def test_closing_a_stream_withdraws_its_frames(via):
    model = via.model("fake/slow")
    with model.stream() as stream:
        for _ in range(8):
            stream.send(0.5)
    start_s = time.monotonic()
    assert model(0.0) == 0.0
    assert time.monotonic() - start_s < 3.5


@pytest.mark.accept("A9")
@pytest.mark.parametrize("way", ["direct", "relay"])
def test_a_large_array_comes_back_in_bounded_memory(server, way, accept):
    size = 1 << 30 if accept.strict else 96 << 20
    data = np.arange(size // 8, dtype=np.int64)
    pids = [os.getpid(), *(process.pid for process in server.processes())]
    before = {pid: peak_bytes(pid) for pid in pids}
    with connect(server, way) as client:
        back = client.model("nos/echo")(data)
    assert np.array_equal(back, data)
    for pid, bytes_before in before.items():
        own_bytes = size if pid == os.getpid() else 0
        assert peak_bytes(pid) - bytes_before - own_bytes < 2 * size, psutil.Process(pid).cmdline()


def peak_bytes(pid):
    """Return the most that a process ever had in memory of its own."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0
