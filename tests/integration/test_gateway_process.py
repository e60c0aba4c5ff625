"""The gateway as the supervisor runs it: a process beside a real scheduler, and how it ends."""

from __future__ import annotations

import signal
import socket
import sqlite3
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nos.wire.limits import TOKEN_KEY
from nos.wire.v1 import cluster_pb2, cluster_pb2_grpc
from nos_backend.control.blobs import BlobStore
from nos_backend.control.registry import FILE_NAME, Registry

from tests.gateways import START_S, TOKEN, flags, log_of, ready, scheduler, start
from tests.servers import wait_for

__all__ = ["flags", "scheduler", "start"]


def test_ready_gateway_serves_and_sigterm_ends_it(flags, start):
    process = start(flags)
    address = ready(flags, process)
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        metadata = ((TOKEN_KEY, f"Bearer {TOKEN}"),)
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        status = stub.GetStatus(cluster_pb2.GetStatusRequest(), metadata=metadata)
        assert (status.state, status.num_models) == ("starting", 4)
        watching = stub.WatchEvents(cluster_pb2.WatchEventsRequest(), metadata=metadata)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert watching.code() is grpc.StatusCode.UNAVAILABLE
    assert not (Path(flags["--run-dir"]) / "gateway.ready").exists()
    assert "Traceback" not in log_of(flags)
    assert TOKEN not in log_of(flags)


def test_idle_gateway_ends_though_it_is_asked_for_its_health(flags, start):
    process = start({**flags, "--idle-shutdown-s": "1"})
    with grpc.insecure_channel(ready(flags, process)) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def asked():
            health.Check(health_pb2.HealthCheckRequest(), timeout=1)
            return False

        with pytest.raises(grpc.RpcError):
            wait_for(asked, "the gateway ends", 10)
    assert process.wait(5) == 75


def test_gateway_with_a_client_is_not_idle(flags, start):
    process = start({**flags, "--idle-shutdown-s": "0.5"})
    with grpc.insecure_channel(ready(flags, process)) as channel:
        metadata = ((TOKEN_KEY, f"Bearer {TOKEN}"),)
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        request = cluster_pb2.WatchEventsRequest(status_interval_s=0.5)
        watching = stub.WatchEvents(request, metadata=metadata)
        assert [next(watching).kind for _ in range(5)] == ["status"] * 5
        watching.cancel()
        assert process.wait(10) == 75


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"--token-file": "/nowhere/token"}, "/nowhere/token"),
        ({"--host": "203.0.113.1"}, "a public address needs TLS"),
        ({"--models": "/nowhere/models"}, "/nowhere/models"),
    ],
)
def test_start_that_cannot_be_says_why_in_one_line(flags, start, changes, told):
    process = start({**flags, **changes})
    assert process.wait(START_S) == 1
    (line,) = [line for line in log_of(flags).splitlines() if line.startswith("nos gateway:")]
    assert told in line
    assert "Traceback" not in log_of(flags)


def test_registry_from_the_future_stops_the_start_and_is_left_alone(flags, start):
    folder = Path(flags["--state-dir"])
    Registry(folder, BlobStore(folder / "blobs")).close()
    with sqlite3.connect(folder / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 1000")
    connection.close()
    before = (folder / FILE_NAME).read_bytes()
    process = start(flags)
    assert process.wait(START_S) == 1
    (line,) = log_of(flags).splitlines()
    assert "written by a newer server" in line
    assert (folder / FILE_NAME).read_bytes() == before


def test_sigterm_ends_a_gateway_that_waits_for_its_scheduler(flags, start):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        process = start({**flags, "--scheduler": f"tcp://127.0.0.1:{silent.getsockname()[1]}"})
        silent.settimeout(START_S)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
    assert "Traceback" not in log_of(flags)


def test_port_in_use_is_refused(flags, start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start({**flags, "--port": str(port)})
        assert process.wait(START_S) == 1
    assert f"got 127.0.0.1:{port}" in log_of(flags)
