"""The worker's side of a lost connection: the next stream brings the ends, and nothing runs twice."""

import itertools

import pytest
from nos.errors import UnavailableError
from nos.wire import values
from nos.wire.limits import RESUME
from nos.wire.v1 import inference_pb2

from tests.plane import definitions, running_plane
from tests.servers import wait_for

COUNTING = """
import collections
import time
import nos

runs = collections.Counter()

@nos.model(name="counting")
def counting(number: int, s: float = 0.0) -> int:
    runs[number] += 1
    time.sleep(s)
    return runs[number]
"""
KEY = "counting@v1"
#: No test calls the model with the numbers of another.
numbers = itertools.count(0, 10)


@pytest.fixture(scope="module")
def plane():
    (model,) = definitions(COUNTING, "counting.py")
    with running_plane({"counting": model}) as running:
        yield running


def opened(plane, resumes="", **ticket):
    """Open a stream that may be resumed; return it and its name."""
    stream = plane.stream(KEY, **ticket)
    stream.say(hello=inference_pb2.Hello(versions=[1], features=[RESUME], resumes=resumes))
    welcome = stream.read().welcome
    assert list(welcome.features) == [RESUME]
    return stream, welcome.stream_id


def send(stream, number, s=0.0, resumes=0):
    stream._last_seq += 1
    nodes, _ = values.write_arguments([("", number), ("", s)])
    frame = inference_pb2.Frame(arguments=nodes, resumes=resumes)
    stream.say(seq=stream._last_seq, frame=frame)


def num_running(plane):
    return plane.status()["num_running"]


@pytest.mark.accept("D7", "A6")
@pytest.mark.parametrize("is_noticed", [True, False])
def test_frames_that_ran_answer_as_they_did_and_others_run(plane, is_noticed):
    first = next(numbers)
    stream, name = opened(plane)
    send(stream, first)
    assert stream.result() == (1, 1)
    send(stream, first + 1)
    assert stream.result() == (2, 1)  # on its way to a client that never saw it, say
    send(stream, first + 2, 1.0)
    send(stream, first + 3)
    wait_for(lambda: num_running(plane) == 1, "the third frame runs")
    if is_noticed:
        stream.call.cancel()
        wait_for(lambda: plane.data_plane.num_streams == 0, "the worker noticed")
    again, _ = opened(plane, resumes=name)
    for seq in (2, 3, 4):
        send(again, first + seq - 1, resumes=seq)
    send(again, first + 4)
    assert again.results() == {1: 1, 2: 1, 3: 1, 4: 1}


def test_what_was_acknowledged_is_taken_for_new(plane):
    number = next(numbers)
    stream, name = opened(plane)
    send(stream, number)
    assert stream.result() == (1, 1)
    nodes, _ = values.write_arguments([("", number + 1)])
    stream.say(seq=2, acknowledged=1, frame=inference_pb2.Frame(arguments=nodes))
    stream._last_seq = 2
    assert stream.result() == (2, 1)
    again, _ = opened(plane, resumes=name)
    send(again, number, resumes=1)
    send(again, number + 1, resumes=2)
    assert again.results() == {1: 2, 2: 1}


@pytest.mark.parametrize("stranger", ["other tenant", "no such stream"])
def test_a_stranger_gets_nothing_of_a_stream_and_nothing_runs(plane, stranger):
    number = next(numbers)
    stream, name = opened(plane)
    send(stream, number)
    assert stream.result() == (1, 1)
    tenant = "other" if stranger == "other tenant" else "local"
    again, _ = opened(plane, "f" * 16 if tenant == "local" else name, tenant=tenant)
    send(again, number, resumes=1)
    send(again, number + 1)
    found = again.results()
    assert isinstance(found[1], UnavailableError)
    assert "lost with its connection" in str(found[1])
    assert found[2] == 1
    check, _ = opened(plane)
    send(check, number)
    assert check.results() == {1: 2}
