"""The worker's data plane: a real gRPC client, real executors, no Dask and no gateway."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nos.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    InvalidTensorError,
    LimitExceededError,
    MethodNotFoundError,
    ModelError,
    NosError,
    OverloadedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
    VersionMismatchError,
)
from nos.wire.limits import MODEL_KEY, TICKET_KEY
from nos.wire.v1 import access_pb2, inference_pb2, values_pb2
from nos_backend.worker.streams import WINDOW_FRAMES

from tests.accept import Accept
from tests.plane import Plane, definitions, fake_models, running_plane, to_error
from tests.servers import wait_for

ECHO = """
import time
from typing import Annotated
import numpy as np
import torch

class Echo:
    def __call__(self, x):
        return x
    def typed(self, x: Annotated[torch.Tensor, "float32[batch, 3]"], scale: float = 1.0):
        return x * scale
    def late(self, x):
        time.sleep(0.5)
        return x
    def _secret(self):
        return 1
"""
KEY = "echo@v1"
SLOW, STREAM, RAISE = "fake/slow@v1", "fake/stream@v1", "fake/raise@v1"


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    (echo,) = definitions(
        ECHO.replace("class Echo", "@nos.model(name='echo')\nclass Echo").replace(
            "import numpy", "import nos\nimport numpy"
        ),
        "echo.py",
    )
    slow = fake_models("slow")["fake/slow"]
    models = {
        "echo": echo,
        "slow": slow,
        **{
            name: item
            for name, item in fake_models("streaming", "failing").items()
            if "broken" not in name
        },
    }
    with running_plane(models) as running:
        yield running


VALUES: list[Any] = [
    *(
        np.arange(12).reshape(3, 4).astype(name)
        for name in [
            "bool",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
            "int8",
            "int16",
            "int32",
            "int64",
        ]
    ),
    *(
        np.arange(6).astype(name)
        for name in ["float16", "float32", "float64", "complex64", "complex128"]
    ),
    np.arange(6).astype(ml_dtypes.bfloat16),
    np.array([np.nan, np.inf, -np.inf, -0.0]),
    np.float32(3),
    np.zeros((0, 3)),
    np.arange(2**8).reshape((2,) * 8),
    np.arange(20)[::3],
    np.arange(5).astype(">i4"),
    None,
    True,
    -5,
    2.5,
    "text",
    b"bytes",
    [1, (2, "three"), {"four": [np.arange(3), b"five"]}],
]


@pytest.mark.accept("A8")
@pytest.mark.parametrize("value", VALUES)
def test_a_value_comes_back_equal(plane: Plane, value: Any) -> None:
    stream = plane.stream(KEY)
    stream.send(value)
    assert_equal(stream.results()[1], value)


def assert_equal(found: Any, value: Any) -> None:
    if isinstance(value, np.ndarray | np.generic):
        assert found.dtype == value.dtype.newbyteorder("=")
        assert found.shape == value.shape
        np.testing.assert_array_equal(found, value)
    elif isinstance(value, dict):
        assert found.keys() == value.keys()
        for key in value:
            assert_equal(found[key], value[key])
    elif isinstance(value, list | tuple):
        assert type(found) is type(value)
        for ours, theirs in zip(found, value, strict=True):
            assert_equal(ours, theirs)
    else:
        assert found == value
        assert type(found) is type(value)


@pytest.mark.accept("A9")
def test_a_large_frame_travels_in_chunks_both_ways(plane: Plane) -> None:
    large = np.random.default_rng(0).integers(0, 255, 5_000_001, np.uint8)
    stream = plane.stream(KEY)
    stream.send(large)
    stream.send(3)
    found = stream.results()
    np.testing.assert_array_equal(found[1], large)
    assert found[2] == 3


def test_the_window_is_told_first(plane: Plane) -> None:
    stream = plane.stream(KEY)
    welcome = stream.hello()
    assert (welcome.version, welcome.model_version) == (1, 1)
    assert (welcome.window_frames, welcome.window_bytes) == (16, 64 << 20)
    stream.call.cancel()


def test_an_unknown_protocol_version_is_refused(plane: Plane) -> None:
    stream = plane.stream(KEY)
    stream.say(hello=inference_pb2.Hello(versions=[7]))
    with pytest.raises(VersionMismatchError):
        stream.read()


def test_results_come_in_the_order_of_frames_with_their_timings(plane: Plane) -> None:
    stream = plane.stream(SLOW)
    for pause_s in (0.2, 0.0, 0.1):
        stream.send(pause_s)
    assert [stream.result() for _ in range(3)] == [(1, 0.2), (2, 0.0), (3, 0.1)]
    timings = stream.timings
    assert timings.batch_size == 1
    assert timings.compute_s >= 0.1
    assert timings.queue_s >= 0.19  # it came a little after the first had started
    assert timings.server_s >= timings.queue_s + timings.compute_s
    stream.half_close()


@pytest.mark.accept("A11")
@pytest.mark.parametrize(
    ("args", "method", "cls", "text"),
    [
        ((np.zeros((2, 3)),), "typed", InvalidTensorError, "expected float32, got float64"),
        (
            (np.zeros((2, 4), np.float32),),
            "typed",
            InvalidTensorError,
            "expected (batch, 3), got (2, 4)",
        ),
        ((), "typed", InvalidRequestError, "misses 'x'"),
        ((1, 2, 3), "typed", InvalidRequestError, "takes 2 arguments"),
        ((1,), "_secret", MethodNotFoundError, "expected one of __call__, typed"),
        ((1,), "nothing", MethodNotFoundError, "expected one of __call__, typed"),
    ],
)
def test_a_misfit_fails_its_frame_only(
    plane: Plane, args: tuple[Any, ...], method: str, cls: type[NosError], text: str
) -> None:
    stream = plane.stream(KEY)
    stream.send(1)
    stream.send(*args, method=method)
    stream.send(3)
    found = stream.results()
    assert (found[1], found[3]) == (1, 3)
    assert isinstance(found[2], cls)
    assert text in str(found[2])


@pytest.mark.accept("A11")
def test_a_tensor_beyond_its_bytes_is_refused(plane: Plane) -> None:
    tensor = values_pb2.Tensor(dtype=values_pb2.DTYPE_FLOAT32, shape=[1000, 1000])
    argument = values_pb2.Argument(value=values_pb2.Value(tensor=tensor))
    stream = plane.stream(KEY)
    stream.say(seq=1, frame=inference_pb2.Frame(arguments=[argument]), data=b"1234")
    stream.half_close()
    assert isinstance(stream.result()[1], InvalidTensorError)


def test_a_frame_over_the_window_is_refused_and_the_others_run(plane: Plane) -> None:
    stream = plane.stream(SLOW)
    stream.send(0.5)
    for _ in range(WINDOW_FRAMES + 3):
        stream.send(0.0)
    found = stream.results()
    assert len(found) == WINDOW_FRAMES + 4
    refused = [seq for seq, value in found.items() if isinstance(value, LimitExceededError)]
    assert refused == list(range(WINDOW_FRAMES + 1, WINDOW_FRAMES + 5))


def test_a_frame_over_the_windows_bytes_is_refused_unless_it_is_alone(plane: Plane) -> None:
    large = np.zeros(65 << 20, np.uint8)
    stream = plane.stream(KEY)
    # It is under way when the next one comes.
    stream.send(large, method="late")
    stream.send(large[:1000])
    found = stream.results()
    assert len(found[1]) == len(large)
    assert isinstance(found[2], LimitExceededError)


def test_a_frame_out_of_order_ends_the_stream(plane: Plane) -> None:
    stream = plane.stream(KEY)
    stream.say(seq=2, frame=inference_pb2.Frame())
    with pytest.raises(InvalidRequestError, match="expected 1, got 2"):
        stream.read()


def test_garbage_ends_the_stream_with_a_typed_error(plane: Plane) -> None:
    call = plane.channel.stream_stream("/nos.v1.InferenceService/Stream")(
        iter([b"\xff" * 100]), timeout=10, metadata=plane.metadata(KEY)
    )
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert isinstance(to_error(caught.value), InvalidRequestError)


def test_half_closing_within_a_frame_fails_that_frame(plane: Plane) -> None:
    stream = plane.stream(KEY)
    stream.send(np.zeros(3 << 20, np.uint8), num_chunks=2)
    found = stream.results()
    assert isinstance(found[1], InvalidRequestError)
    assert "expected 3145728 bytes, got 2097152" in str(found[1])


@pytest.mark.accept("D3")
def test_a_cancelled_frame_never_runs_and_the_next_does(plane: Plane) -> None:
    answered = plane.model(SLOW)["num_answered"]
    stream = plane.stream(SLOW)
    stream.send(0.3)
    stream.send(5.0)
    stream.send(0.0)
    stream.say(seq=2, cancel=inference_pb2.Cancel())
    found = stream.results()
    assert isinstance(found[2], CancelledError)
    assert (found[1], found[3]) == (0.3, 0.0)
    assert plane.model(SLOW)["num_answered"] == answered + 2


@pytest.mark.accept("D3")
def test_a_frame_past_its_deadline_fails_and_never_runs(plane: Plane) -> None:
    answered = plane.model(SLOW)["num_answered"]
    stream = plane.stream(SLOW)
    stream.send(0.3)
    stream.send(5.0, timeout_s=0.05)
    found = stream.results()
    assert found[1] == 0.3
    # Refused at once where it is known that the first one takes longer.
    assert isinstance(found[2], DeadlineExceededError | OverloadedError)
    assert plane.model(SLOW)["num_answered"] == answered + 1


def test_a_deadline_passes_while_the_call_runs(plane: Plane) -> None:
    stream = plane.stream(SLOW)
    stream.send(3.0, timeout_s=0.1)
    started = time.monotonic()
    assert isinstance(stream.result()[1], DeadlineExceededError)
    assert time.monotonic() - started < 2.5
    stream.half_close()


@pytest.mark.accept("D3", "A6")
def test_a_client_that_goes_away_takes_its_queued_frames_along(plane: Plane) -> None:
    wait_for(lambda: plane.model(SLOW)["num_pending"] == 0, "earlier tests' frames")
    answered = plane.model(SLOW)["num_answered"]
    stream = plane.stream(SLOW)
    for _ in range(10):
        stream.send(0.3)
    wait_for(lambda: plane.model(SLOW)["num_pending"] == 10, "the frames are there")
    stream.call.cancel()
    wait_for(lambda: plane.model(SLOW)["num_pending"] <= 1, "queued frames are gone", 10)
    wait_for(lambda: plane.model(SLOW)["num_pending"] == 0, "the running one is over")
    assert plane.model(SLOW)["num_answered"] <= answered + 1


@pytest.mark.accept("D4")
def test_a_generators_items_come_one_by_one_in_order(plane: Plane) -> None:
    stream = plane.stream(STREAM)
    stream.send(1000, method="count")
    stream.send(3, method="count")
    found = stream.results()
    assert found[1] == list(range(1000))
    assert found[2] == [0, 1, 2]


@pytest.mark.accept("D4")
def test_an_error_after_three_items_arrives_after_three(plane: Plane) -> None:
    stream = plane.stream(STREAM)
    stream.send(3, method="fail_after")
    assert [stream.read().result.value.integer for _ in range(3)] == [0, 1, 2]
    seq, error = stream.result()
    assert seq == 1
    assert isinstance(error, ModelError)
    assert error.type_name == "ValueError"
    stream.half_close()


@pytest.mark.accept("D3")
def test_cancelling_a_generator_closes_it(plane: Plane, tmp_path: Path, accept: Accept) -> None:
    told = tmp_path / "end"
    stream = plane.stream(STREAM)
    stream.send(str(told), method="tell_end")
    stream.read()
    started_s = time.monotonic()
    stream.call.cancel()
    wait_for(told.exists, "the generator's finally ran", 30)
    accept.figure(time.monotonic() - started_s, 1, "s")


def test_a_reader_that_does_not_read_stops_the_generator(plane: Plane, tmp_path: Path) -> None:
    told = tmp_path / "end"
    stream = plane.stream(STREAM)
    stream.send(str(told), method="tell_end")
    stream.read()
    time.sleep(0.5)
    stream.call.cancel()
    wait_for(told.exists, "the generator's finally ran", 10)


@pytest.mark.accept("A10")
def test_an_owner_sees_the_traceback_and_others_an_id(plane: Plane) -> None:
    for role, tenant, sees in (
        (access_pb2.ROLE_USER, "local", True),
        (access_pb2.ROLE_ADMIN, "boss", True),
        (access_pb2.ROLE_AUTHOR, "eve", False),
    ):
        stream = plane.stream(RAISE, tenant=tenant, role=role)
        stream.send("ValueError", "secret 42")
        error = stream.results()[1]
        assert isinstance(error, ModelError)
        assert error.type_name == "ValueError"
        assert ("secret 42" in str(error.remote_message)) == sees
        assert ("failing.py" in error.remote_traceback) == sees
        assert ("secret" in str(error)) <= sees
        assert bool(error.error_id) != sees


def test_one_call_needs_no_stream(plane: Plane) -> None:
    np.testing.assert_array_equal(plane.run(KEY, "", np.arange(5)), np.arange(5))
    np.testing.assert_array_equal(
        plane.run(KEY, "typed", np.ones((1, 3), np.float32), scale=2.0),
        np.full((1, 3), 2, np.float32),
    )
    assert plane.run(STREAM, "count", 4) == [0, 1, 2, 3]
    assert plane.run(STREAM, "count", 0) == []
    with pytest.raises(ModelError) as caught:
        plane.run(RAISE, "", "ValueError", "x")
    assert caught.value.remote_message == "x"
    with pytest.raises(DeadlineExceededError):
        plane.run(SLOW, "", 0.5, timeout_s=0.05)


RPCS = [
    "/nos.v1.InferenceService/Run",
    "/nos.v1.InferenceService/Stream",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/nos.v1.ModelService/ListModels",
    "/nos.v1.Unknown/Method",
]


def call(plane: Plane, rpc: str, metadata: tuple[tuple[str, str | bytes], ...]) -> NosError | None:
    try:
        list(plane.channel.stream_stream(rpc)(iter([b""]), timeout=10, metadata=metadata))
    except grpc.RpcError as error:
        return to_error(error)
    return None


@pytest.mark.parametrize("rpc", RPCS)
def test_every_rpc_is_refused_without_a_ticket(plane: Plane, rpc: str) -> None:
    assert isinstance(call(plane, rpc, ()), UnauthenticatedError)
    for raw in (b"garbage", plane.ticket(KEY, ttl_s=-1), Plane.ticket(other_signer(), KEY)):
        metadata = ((MODEL_KEY, KEY), (TICKET_KEY, raw))
        assert isinstance(call(plane, rpc, metadata), UnauthenticatedError)


def other_signer() -> Any:
    from types import SimpleNamespace

    from nos_backend.control.tickets import TicketSigner

    return SimpleNamespace(signer=TicketSigner.generate())


@pytest.mark.parametrize("rpc", RPCS[:2])
def test_a_ticket_opens_its_own_model_for_users_only(plane: Plane, rpc: str) -> None:
    wrong_model = ((MODEL_KEY, "fake/slow"), (TICKET_KEY, plane.ticket(KEY)))
    assert isinstance(call(plane, rpc, wrong_model), PermissionDeniedError)
    viewer = plane.metadata(KEY, role=access_pb2.ROLE_VIEWER)
    assert isinstance(call(plane, rpc, viewer), PermissionDeniedError)


def test_a_model_that_is_not_here_is_unavailable(plane: Plane) -> None:
    with pytest.raises(UnavailableError, match="elsewhere@v1 is not loaded"):
        plane.stream("elsewhere@v1").read()


def test_health_answers_with_a_ticket(plane: Plane) -> None:
    stub = health_pb2_grpc.HealthStub(plane.channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10, metadata=plane.metadata(KEY))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_stream_is_cut_soon_after_its_ticket_expired(plane: Plane) -> None:
    stream = plane.stream(KEY, ttl_s=0.5)
    started = time.monotonic()
    stream.send(1)
    assert stream.result() == (1, 1)
    with pytest.raises(UnauthenticatedError, match="expired"):
        stream.read()
    assert time.monotonic() - started < 15


def test_a_renewed_stream_lives_on(plane: Plane) -> None:
    stream = plane.stream(KEY, ttl_s=0.5)
    stream.say(renewal=inference_pb2.Renewal(ticket=plane.ticket(KEY)))
    time.sleep(2.0)
    stream.send(1)
    assert stream.results() == {1: 1}


def test_a_renewal_for_another_model_cuts_the_stream(plane: Plane) -> None:
    stream = plane.stream(KEY)
    stream.say(renewal=inference_pb2.Renewal(ticket=plane.ticket(SLOW)))
    with pytest.raises(UnauthenticatedError, match="not for this stream"):
        stream.read()


def test_revoking_a_token_cuts_its_streams_at_once(plane: Plane) -> None:
    stream, other = plane.stream(KEY, token_id="gone"), plane.stream(KEY, token_id="kept")
    stream.hello()
    other.hello()
    plane.verifier.revoke(["gone"])
    plane.data_plane.revoke(["gone"])
    with pytest.raises(UnauthenticatedError, match="revoked"):
        stream.read()
    other.send(1)
    assert other.results() == {1: 1}


def test_a_silent_stream_is_told_that_its_server_lives(plane: Plane) -> None:
    stream = plane.stream(KEY)
    assert next(stream.call).HasField("heartbeat")
    stream.half_close()


@pytest.mark.accept("D2")
def test_a_client_that_does_not_read_holds_up_nobody(plane: Plane) -> None:
    large = np.zeros(4 << 20, np.uint8)
    stuck = plane.stream(KEY)
    for _ in range(WINDOW_FRAMES - 1):
        stuck.send(large)
    wait_for(lambda: plane.model(KEY)["num_pending"] == 0, "its frames ran")
    started = time.monotonic()
    for _ in range(10):
        assert plane.run(KEY, "", 1) == 1
    assert time.monotonic() - started < 20
    stuck.call.cancel()


@pytest.mark.accept("A5")
def test_a_saturated_model_does_not_starve_another_executor(plane: Plane) -> None:
    alone = fake_models("slow")["fake/slow-alone"]
    plane.load(alone)
    stuck = plane.stream(alone.key)
    for _ in range(8):
        stuck.send(0.2)
    stream = plane.stream(KEY)
    for index in range(1, 21):
        stream.send(index)
        assert stream.result() == (index, index)
    assert plane.model(alone.key)["num_pending"] > 0
    stream.half_close()
    assert len(stuck.results()) == 8


@pytest.mark.accept("A5")
def test_a_load_does_not_hold_up_another_executor(plane: Plane) -> None:
    slow = fake_models("slow")["fake/slow-load"]
    loading = threading.Thread(target=plane.load, args=(slow,))
    loading.start()
    wait_for(lambda: any(item["key"] == slow.key for item in plane.status()["models"]), "the load")
    for index in range(20):
        assert plane.run(KEY, "", index) == index
    assert plane.model(slow.key)["state"] == "loading"
    loading.join()
    assert plane.run(slow.key, "", 1) == 1


def test_loads_of_one_model_at_once_are_one_load(plane: Plane) -> None:
    slow = fake_models("slow")["fake/slow-load"]
    plane.unload(slow.key)
    before = len([event for event in plane.events if event[:2] == ("loaded", slow.key)])
    threads = [threading.Thread(target=plane.load, args=(slow,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [event for event in plane.events if event[:2] == ("loaded", slow.key)]
    assert len(events) == before + 1


@pytest.mark.accept("B3")
def test_unloading_waits_for_the_work_in_flight() -> None:
    slow = fake_models("slow")["fake/slow"]
    with running_plane({"slow": slow}) as plane:
        stream = plane.stream(SLOW)
        stream.send(0.5)
        wait_for(lambda: plane.model(SLOW)["num_pending"] == 1, "the frame runs")
        plane.unload(SLOW)
        assert stream.result() == (1, 0.5)
        stream.send(0.1)
        assert isinstance(stream.result()[1], UnavailableError)
        assert plane.status()["num_executors"] == 0


def test_stopping_tells_clients_and_answers_what_is_in_flight() -> None:
    slow = fake_models("slow")["fake/slow"]
    with running_plane({"slow": slow}) as plane:
        stream = plane.stream(SLOW)
        stream.send(0.5)
        wait_for(lambda: plane.model(SLOW)["num_pending"] == 1, "the frame runs")
        stopping = threading.Thread(target=plane.data_plane.stop, args=(5.0,))
        stopping.start()
        assert stream.read().HasField("draining")
        assert stream.result() == (1, 0.5)
        with pytest.raises(UnavailableError):
            stream.read()
        stopping.join(5)
        assert not stopping.is_alive()
