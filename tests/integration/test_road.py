"""The whole road, as a user walks it: what is sent comes back right, wrong calls say what is wrong."""

import statistics
import subprocess
import sys
import threading
import time

import grpc
import ml_dtypes
import nos
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nos import errors
from nos.wire.values import DTYPE_NUMBERS

BUSY_S = 5.0


def p99(times):
    return statistics.quantiles(times, n=100)[-1]


def clock(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@pytest.fixture(params=["direct", "relay"])
def via(request, server):
    with nos.connect(server.address, token_file=server.token_file, via=request.param) as client:
        yield client


@pytest.mark.accept("A2")
def test_the_client_alone_is_light_and_a_call_works(server, accept):
    code = f"""
import sys, time
start = time.perf_counter()
import nos
took = time.perf_counter() - start
with nos.connect({server.address!r}, token_file={str(server.token_file)!r}) as client:
    assert client.model("nos/echo")(41) == 41
heavy = {{"torch", "dask", "distributed", "pydantic", "tornado"}} & set(sys.modules)
assert not heavy, heavy
print(took)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    accept.figure(float(done.stdout), 1.0, "s to import nos")


@pytest.mark.accept("A8")
@pytest.mark.parametrize("dtype", [name for name in DTYPE_NUMBERS if name != "bfloat16"])
def test_every_dtype_and_rank_comes_back_equal(via, dtype):
    echo = via.model("nos/echo")
    for rank in range(9):
        array = np.arange(2**rank).reshape((2,) * rank).astype(dtype)
        back = echo(array)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


@pytest.mark.accept("A8")
def test_odd_arrays_come_back_equal(via):
    echo = via.model("nos/echo")
    for array in (
        np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(4, dtype=">f8"),
        np.zeros((0, 3), np.float32),
        np.arange(10)[::-3],
        np.arange(3).astype(ml_dtypes.bfloat16),
    ):
        back = echo(array)
        assert back.shape == array.shape
        np.testing.assert_array_equal(back, array)


@pytest.mark.accept("A8")
def test_trees_text_and_bytes_come_back_equal(via):
    tree = {"a": [1, 2.5, None, True, ("x", b"\x00y")], "b": {"c": "ü", "d": []}, "e": float("inf")}
    assert via.model("nos/echo")(tree) == tree


@pytest.mark.accept("A7")
def test_no_frame_gets_the_answer_of_another(server, accept):
    num_streams, num_frames = 32, (100_000 if accept.strict else 3_200)
    wrong: list[int] = []

    def run(index: int) -> None:
        frames = [f"{index}/{number}" for number in range(num_frames // num_streams)]
        with (
            nos.connect(server.address, token_file=server.token_file) as client,
            client.model("nos/echo").stream() as stream,
        ):
            for frame in frames:
                stream.send(frame)
            stream.finish()
            wrong.append(sum(r.value != frame for r, frame in zip(stream, frames, strict=True)))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(num_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == num_streams
    assert sum(wrong) == 0


@pytest.mark.accept("A10")
def test_an_error_of_the_model_arrives_with_its_traceback(via):
    with pytest.raises(errors.ModelError) as caught:
        via.model("fake/raise")("ValueError", "x is odd")
    error = caught.value
    assert (error.type_name, error.remote_message) == ("ValueError", "x is odd")
    assert "failing.py" in error.remote_traceback
    assert "raise getattr(builtins, type_name)(text)" in error.remote_traceback
    assert "nos_backend" not in error.remote_traceback


@pytest.mark.accept("A10")
def test_an_error_leaves_the_stream_and_the_model_alive(client):
    with client.model("fake/raise").odd.stream() as stream:
        for number in range(20):
            stream.send(number)
        stream.finish()
        results = list(stream)
    assert [r.seq for r in results if r.error is None] == [n + 1 for n in range(20) if n % 2]
    assert all(isinstance(r.error, errors.ModelError) for r in results if (r.seq - 1) % 2 == 0)


IMAGES = np.zeros((2, 3, 8, 8), np.float32)


@pytest.mark.accept("A11")
@pytest.mark.parametrize(
    ("args", "kwargs", "field", "says"),
    [
        ((), {}, "images", "misses"),
        ((IMAGES, None, 1.0, 4), {}, "", "3"),
        ((IMAGES,), {"sclae": 2.0}, "sclae", "scale"),
        ((IMAGES,), {"images": IMAGES}, "images", ""),
        ((IMAGES.astype(np.float64),), {}, "images", "float64"),
        ((IMAGES[0],), {}, "images", "(3, 8, 8)"),
        ((IMAGES[:, :2],), {}, "images", "2"),
        (([1, 2],), {}, "images", "list"),
        ((np.array([object()]),), {}, "images", "object"),
        ((IMAGES, np.zeros(3, np.float32)), {}, "weights", "batch"),
        ((IMAGES,), {"scale": "fast"}, "scale", "fast"),
    ],
)
def test_wrong_arguments_are_refused_before_transport(client, args, kwargs, field, says):
    with pytest.raises(errors.InvalidRequestError) as caught:
        client.model("fake/signature")(*args, **kwargs)
    assert field in f"{caught.value.field} {caught.value}"
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.accept("A11")
def test_choices_are_told(client):
    with pytest.raises(errors.InvalidRequestError, match="exact"):
        client.model("fake/signature").mode("slow")


@pytest.mark.accept("A12")
def test_public_methods_are_callable_by_name_and_private_ones_never(via):
    model = via.model("fake/signature")
    assert model.mode("fast", repeat=2) == "fastfast"
    assert model.many(1, 2, a="x") == ["1", "2", "a=x"]
    assert "mode" in dir(model)
    assert "_private" not in dir(model)
    with pytest.raises(AttributeError):
        model._private()


@pytest.mark.accept("A12")
def test_the_server_refuses_a_private_method_too(server, client):
    from nos.wire.limits import MODEL_KEY, TOKEN_KEY
    from nos.wire.v1 import inference_pb2, inference_pb2_grpc

    client.load("fake/signature")
    metadata = ((TOKEN_KEY, f"Bearer {server.token}"), (MODEL_KEY, "fake/signature"))
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for method in ("_private", "__init__", "__class__"):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Run(inference_pb2.RunRequest(method=method), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.accept("A4")
def test_health_does_not_wait_for_busy_models(server, client, accept):
    spin, alone = client.model("fake/slow").spin, client.model("fake/slow-alone").spin
    client.load("fake/slow")
    client.load("fake/slow-alone")
    busy = [method.submit(BUSY_S) for method in (spin, spin, alone, alone)]
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        stub.Check(request)
        times = [clock(stub.Check, request) for _ in range(50)]
    assert not busy[0].done()
    for call in busy:
        call.cancel()
    accept.figure(p99(times), 0.050, "s p99 of a health check")


@pytest.mark.accept("A5")
def test_a_saturated_model_does_not_slow_a_neighbour_that_sleeps(client, accept):
    slow, neighbour = client.model("fake/slow-alone"), client.model("fake/slow")
    count = 100 if accept.strict else 30

    def times():
        return [clock(neighbour, 0.02) for _ in range(count)]

    slow(0.0)
    neighbour(0.0)
    alone = times()
    saturating = [slow.submit(0.25) for _ in range(64)]
    beside = times()
    assert not saturating[-1].done()
    for call in saturating:
        call.cancel()
    accept.figure(p99(beside) / p99(alone), 2.0, "x the p99 alone")


@pytest.mark.accept("A5")
def test_contending_for_the_device_waits_two_batches_at_most(client, accept):
    spin, neighbour = client.model("fake/slow-alone").spin, client.model("fake/slow").spin
    batch_s, own_s = 0.2, 0.02
    spin(0.0)
    neighbour(0.0)
    saturating = [spin.submit(batch_s) for _ in range(64)]
    times = [clock(neighbour, own_s) for _ in range(30)]
    assert not saturating[-1].done()
    for call in saturating:
        call.cancel()
    accept.figure(p99(times), own_s + 2 * batch_s, "s p99 beside a saturated model")


@pytest.mark.accept("A5")
def test_a_slow_load_does_not_hold_up_a_neighbour(client, accept):
    neighbour = client.model("fake/slow")
    neighbour(0.0)
    alone = [clock(neighbour, 0.02) for _ in range(30)]
    loading = threading.Thread(target=client.load, args=("fake/slow-load",))
    client.unload("fake/slow-load")
    loading.start()
    beside = [clock(neighbour, 0.02) for _ in range(30)]
    assert loading.is_alive()
    loading.join()
    accept.figure(p99(beside) / p99(alone), 2.0, "x the p99 alone")
