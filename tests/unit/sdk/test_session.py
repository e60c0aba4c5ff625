"""The state of a client's stream, message by message."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from nos._session import Done, Failed, Item, Leaving, Lost, Outgoing, Session, Welcomed
from nos.errors import (
    InternalError,
    OverloadedError,
    UnavailableError,
    VersionMismatchError,
)
from nos.wire import frames, status, values
from nos.wire.limits import CHUNK_BYTES
from nos.wire.v1 import inference_pb2

LOSS = UnavailableError("gone")


def outgoing(*args, timeout_s=0.0):
    nodes, payload = values.write_arguments([("", arg) for arg in args])
    frame = inference_pb2.Frame(
        method="__call__", arguments=nodes, timeout_s=timeout_s, data_bytes=payload.size
    )
    return Outgoing(frame.SerializeToString(), payload)


def welcome(frames=16, size=64 << 20, version=1):
    message = inference_pb2.Welcome(
        version=version,
        stream_id="s",
        model_version=3,
        window_frames=frames,
        window_bytes=size,
    )
    return inference_pb2.StreamResponse(welcome=message).SerializeToString()


def result(seq, value=None, *, more=False, chunk_bytes=CHUNK_BYTES):
    """Messages of a result, as a server writes them."""
    payload = values.Payload()
    body = inference_pb2.Result(more=more)
    values.write(value, body.value, payload, "result")
    body.data_bytes = payload.size
    header = inference_pb2.StreamResponse(seq=seq, result=body)
    messages = []
    for group in frames.chunked(payload.buffers, chunk_bytes):
        messages.append(frames.join(header, group, sum(piece.nbytes for piece in group)))
        header = inference_pb2.StreamResponse(seq=seq, chunk=inference_pb2.Chunk())
    return messages or [header.SerializeToString()]


def failure(seq, error):
    message = inference_pb2.StreamResponse(seq=seq, error=status.to_message(error))
    return message.SerializeToString()


@pytest.fixture
def session():
    opened = Session()
    opened.receive(welcome())
    return opened


def test_nothing_fits_before_the_welcome():
    session = Session()
    assert not session.has_room(0)
    assert session.receive(welcome()) == [Welcomed("s", 3)]
    assert session.has_room(0)


def test_frames_are_numbered_from_one_without_a_gap(session):
    assert [session.send(outgoing(x))[0] for x in range(3)] == [1, 2, 3]


def test_window_of_frames_is_kept():
    session = Session()
    session.receive(welcome(frames=2))
    session.send(outgoing(1))
    session.send(outgoing(2))
    assert not session.has_room(0)
    session.receive(result(1)[0])
    assert session.has_room(0)


def test_window_of_bytes_is_kept():
    session = Session()
    session.receive(welcome(size=100))
    session.send(outgoing(np.zeros(60, np.uint8)))
    assert session.has_room(40)
    assert not session.has_room(41)


def test_a_frame_above_the_window_goes_alone():
    session = Session()
    session.receive(welcome(size=100))
    assert session.has_room(1000)
    session.send(outgoing(1))
    assert not session.has_room(1000)


def test_credit_widens_the_window():
    session = Session()
    session.receive(welcome(frames=1))
    session.send(outgoing(1))
    credit = inference_pb2.StreamResponse(credit=inference_pb2.Credit(frames=1))
    session.receive(credit.SerializeToString())
    assert session.has_room(0)


def test_large_frames_go_in_chunks_that_the_server_can_join(session):
    array = np.arange(700_000, dtype=np.float32)
    seq, messages = session.send(outgoing(array))
    parts = [frames.split(inference_pb2.StreamRequest, raw) for raw in messages]
    assert [message.WhichOneof("event") for message, _ in parts] == ["frame", "chunk", "chunk"]
    assert {message.seq for message, _ in parts} == {seq}
    assert b"".join(data for _, data in parts) == array.tobytes()
    assert parts[0][0].frame.data_bytes == array.nbytes


def test_chunked_results_are_joined_in_memory_of_their_own(session):
    array = np.arange(1000, dtype=np.int64)
    session.send(outgoing(1))
    session.send(outgoing(2))
    first, second = result(1, array, chunk_bytes=3000), result(2, array + 1, chunk_bytes=3000)
    assert [session.receive(raw) for raw in first[:-1]] == [[], []]
    [done] = session.receive(first[-1])
    assert np.array_equal(done.value, array)
    assert done.value.flags.writeable
    assert next(event for raw in second for event in session.receive(raw)).seq == 2


def test_small_results_are_writable(session):
    session.send(outgoing(1))
    [done] = session.receive(result(1, np.zeros(3))[0])
    done.value[0] = 1


def test_bytes_beyond_the_announced_lose_the_stream(session):
    session.send(outgoing(1))
    messages = result(1, np.zeros(1000), chunk_bytes=3000)
    session.receive(messages[0])
    events = session.receive(messages[1]) + session.receive(messages[1])
    assert isinstance(events[0], Failed)
    assert isinstance(session.lost, InternalError)


def test_generator_items_come_before_the_end(session):
    session.send(outgoing(1))
    assert session.receive(result(1, 7, more=True)[0]) == [Item(1, 7)]
    [end] = session.receive(result(1)[0])
    assert isinstance(end, Done)
    assert session.num_open == 0


def test_a_failed_frame_leaves_the_stream_open(session):
    session.send(outgoing(1))
    session.send(outgoing(2))
    [failed] = session.receive(failure(1, OverloadedError("full")))
    assert isinstance(failed.error, OverloadedError)
    assert session.num_open == 1


def test_an_error_about_the_stream_ends_every_frame(session):
    session.send(outgoing(1))
    session.send(outgoing(2))
    events = session.receive(failure(0, LOSS))
    assert [type(event) for event in events] == [Failed, Failed, Lost]
    assert not session.has_room(0)


def test_loss_ends_every_frame_once(session):
    session.send(outgoing(1))
    assert [type(event) for event in session.lose(LOSS)] == [Failed, Lost]
    assert session.lose(LOSS) == []
    assert session.receive(result(1)[0]) == []


def test_the_answer_to_a_frame_that_ended_is_ignored(session):
    session.send(outgoing(1))
    session.receive(result(1)[0])
    assert session.receive(result(1)[0]) == []


def test_dropped_frames_end_oldest_first(session):
    for value in range(3):
        session.send(outgoing(value))
    dropped = inference_pb2.StreamResponse(seq=3, dropped=inference_pb2.Dropped(count=2))
    events = session.receive(dropped.SerializeToString())
    assert [event.seq for event in events] == [1, 2]
    assert all(isinstance(event.error, OverloadedError) for event in events)


def test_draining_lets_open_frames_end_and_no_new_ones_start(session):
    session.send(outgoing(1))
    draining = inference_pb2.StreamResponse(draining=inference_pb2.Draining(grace_s=5))
    assert session.receive(draining.SerializeToString()) == [Leaving(5.0)]
    assert not session.has_room(0)
    assert isinstance(session.receive(result(1)[0])[0], Done)


def test_another_protocol_version_loses_the_stream():
    session = Session()
    session.receive(welcome(version=9))
    assert isinstance(session.lost, VersionMismatchError)


def test_garbage_loses_the_stream(session):
    session.send(outgoing(1))
    events = session.receive(b"\xff\xff\xff\xff")
    assert isinstance(events[0].error, InternalError)


def test_cancel_of_an_ended_frame_says_nothing(session):
    session.send(outgoing(1))
    assert session.cancel(1) is not None
    session.receive(result(1)[0])
    assert session.cancel(1) is None


def test_a_snapshot_no_longer_follows_the_callers_array():
    array = np.zeros(4, np.uint8)
    frame = outgoing(array)
    frame.snapshot()
    array[:] = 9
    assert b"".join(frame.payload.buffers) == bytes(4)


class Stream(RuleBasedStateMachine):
    """Whatever the order of events: one end per frame, and the window is kept."""

    def __init__(self):
        super().__init__()
        self.session = Session()
        self.sent, self.ended = set(), []

    def take(self, events):
        self.ended += [event.seq for event in events if isinstance(event, Done | Failed)]

    @rule(frames=st.integers(1, 4), size=st.integers(1, 200))
    @precondition(lambda self: not self.session.is_welcomed)
    def welcomed(self, frames, size):
        self.take(self.session.receive(welcome(frames, size)))

    @rule(size=st.integers(0, 300))
    def send(self, size):
        if self.session.has_room(size):
            self.sent.add(self.session.send(outgoing(np.zeros(size, np.uint8)))[0])

    @rule(seq=st.integers(0, 12), more=st.booleans())
    def answer(self, seq, more):
        self.take(self.session.receive(result(seq, 1, more=more)[0]))

    @rule(seq=st.integers(1, 12), size=st.integers(1, 40), chunk=st.integers(1, 64))
    def answer_in_chunks(self, seq, size, chunk):
        for raw in result(seq, np.zeros(size, np.uint8), chunk_bytes=chunk):
            self.take(self.session.receive(raw))

    @rule(seq=st.integers(1, 12))
    def fail(self, seq):
        self.take(self.session.receive(failure(seq, OverloadedError("full"))))

    @rule(seq=st.integers(0, 12))
    def cancel(self, seq):
        self.session.cancel(seq)

    @rule(raw=st.binary(max_size=8))
    def garbage(self, raw):
        self.take(self.session.receive(raw))

    @rule()
    def lose(self):
        self.take(self.session.lose(LOSS))

    @invariant()
    def one_end_at_most(self):
        assert len(self.ended) == len(set(self.ended))
        assert set(self.ended) <= self.sent
        assert len(self.ended) + self.session.num_open == len(self.sent)

    @invariant()
    def window_is_kept(self):
        if self.session.num_open > 1:
            assert self.session.num_open <= self.session.window_frames
            assert self.session.open_bytes <= self.session.window_bytes

    def teardown(self):
        self.take(self.session.lose(LOSS))
        assert set(self.ended) == self.sent


Stream.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestStream = Stream.TestCase
