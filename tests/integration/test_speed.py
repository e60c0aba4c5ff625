"""What a frame takes on its way, beside a bare gRPC echo of the same run; figures under `--accept` only."""

import statistics
import time
from contextlib import ExitStack, contextmanager

import nos
import numpy as np
import psutil
import pytest

from tests.accept import ROOT

SHAPE = (480, 640, 3)
FRAME = np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)


@contextmanager
def echoing(server, via):
    """The echo model, as a client reaches it this way."""
    with nos.connect(server.address, token_file=server.token_file, via=via) as client:
        yield client.model("nos/echo")


def took_s(model, num_calls):
    """Seconds of each call beyond the model's own time."""
    times_s = []
    for _ in range(num_calls):
        started_s = time.perf_counter()
        call = model.submit(FRAME)
        call.result(60)
        times_s.append(time.perf_counter() - started_s - call.timings.compute_s)
    return times_s


@pytest.mark.accept("D5")
def test_a_local_frame_takes_a_fraction_of_one_by_grpc(server, accept):
    with echoing(server, "local") as local, echoing(server, "direct") as direct:
        for model in (local, direct):
            np.testing.assert_array_equal(model(FRAME), FRAME)
        if not accept.strict:  # a busy machine says nothing about time
            return
        rounds = [(took_s(local, 200), took_s(direct, 50)) for _ in range(7)]
        shared_s = statistics.median(statistics.median(it) for it, _ in rounds)
        ratio = statistics.median(
            statistics.median(slow) / statistics.median(fast) for fast, slow in rounds
        )
        accept.figure(shared_s * 1e6, 200, "us above the model's own time")
        accept.figure(ratio, 5, "of gRPC's rate", at_least=True)


@pytest.mark.accept("D6")
def test_frames_by_grpc_come_back_in_order_whatever_their_kind(server):
    """Those like the one before are not taken apart again: every frame still has its own bytes and shape."""
    with echoing(server, "direct") as model, model.stream() as stream:
        kinds = [FRAME, FRAME[:7], FRAME[:7].astype(np.float32), FRAME[0, 0], FRAME[:, :5]]
        sent = [kinds[number // 3 % len(kinds)] + number for number in range(60)]
        taken = []
        for number, frame in enumerate(sent):
            stream.send(frame)
            if number >= 15:
                taken.append(next(stream).value)
        taken += [next(stream).value for _ in range(15)]
    for frame, result in zip(sent, taken, strict=True):
        assert (result.dtype, result.shape) == (frame.dtype, frame.shape)
        np.testing.assert_array_equal(result, frame)


@pytest.mark.accept("D6")
@pytest.mark.parametrize(("in_flight", "bound"), [(1, 0.6), (16, 0.9)])
def test_frames_by_grpc_are_about_as_fast_as_bare_bytes(
    server, accept, monkeypatch, in_flight, bound
):
    if not accept.strict:
        pytest.skip("a busy machine says nothing about time: run `make accept`")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import grpc_echo
    import streams

    with ExitStack() as stack:
        port, pid = stack.enter_context(grpc_echo.running())
        bare = stack.enter_context(streams.grpc_road(port, pid))
        client = stack.enter_context(
            nos.connect(server.address, token_file=server.token_file, via="direct")
        )
        ours = streams.our_road(client, "nos/echo", {"client": [psutil.Process()]}, stack)
        lanes = [(road, [road.open()]) for road in (bare, ours)]
        ratios = []
        for _ in range(9):
            floor, run = (
                streams.measure_once(road, lane, FRAME, 128, in_flight) for road, lane in lanes
            )
            ratios.append(floor.frame_s / run.frame_s)
        accept.figure(statistics.median(ratios), bound, "of a bare gRPC echo", at_least=True)
