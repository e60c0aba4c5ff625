"""A stream that takes the place of a lost one: no frame runs twice, and none has two ends."""

from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from nos._session import Done, Failed, Outgoing, Session
from nos.errors import UnavailableError
from nos.wire import frames, status, values
from nos.wire.limits import RESUMABLE_BYTES, RESUME
from nos.wire.v1 import inference_pb2
from nos_backend.worker.resuming import Remains

LOST = UnavailableError("lost")
WINDOW = 4
WELCOME = inference_pb2.StreamResponse(
    welcome=inference_pb2.Welcome(
        version=1, stream_id="s", window_frames=WINDOW, window_bytes=1 << 20, features=[RESUME]
    )
).SerializeToString()


def header_of(seq, name):
    body = inference_pb2.Result(data_bytes=8)
    payload = values.Payload()
    values.write(name.to_bytes(8, "little"), body.value, payload, "result")
    return inference_pb2.StreamResponse(seq=seq, result=body).SerializeToString()


def end(remains, seq, name=0, data=bytes(8)):
    return remains.keep(seq, header_of(seq, name), memoryview(data))


def claimed(remains, seq):
    """What a frame ended with, None if that is forgotten; it must be known."""
    told = []
    assert remains.claim(seq, told.append)
    return told[0] if told else "later"


@pytest.fixture
def remains():
    return Remains("m@v1", "tenant")


def test_a_frame_that_never_ran_is_unknown(remains):
    end(remains, 1)
    assert not remains.claim(2, pytest.fail)


def test_an_end_is_given_once(remains):
    end(remains, 1, data=b"abcdefgh")
    assert claimed(remains, 1)[1] == b"abcdefgh"
    assert claimed(remains, 1) is None


def test_an_end_in_several_messages_is_whole(remains):
    data = bytes(range(256)) * 20_000
    assert len(end(remains, 1, data=data)) > 1
    assert claimed(remains, 1)[1] == data


def test_what_was_acknowledged_is_not_kept(remains):
    for seq in (1, 2, 3):
        end(remains, seq)
    remains.acknowledge(2)
    assert not remains.claim(2, pytest.fail)
    assert claimed(remains, 3)[1] == bytes(8)
    assert remains.num_bytes == 0


def test_what_is_kept_is_bounded(remains):
    for seq in range(1, 20):
        end(remains, seq, data=bytes(4 << 20))
    assert remains.num_bytes < 40 << 20
    assert claimed(remains, 1) is None
    assert claimed(remains, 19) is not None


def test_an_end_that_is_too_large_is_forgotten_and_said_to_be(remains):
    assert end(remains, 1, data=bytes(RESUMABLE_BYTES + 1)) is None
    assert claimed(remains, 1) is None


def test_the_end_of_a_frame_that_runs_on_is_told_when_it_is_there(remains):
    told = []
    remains.runs_on(1)
    assert remains.claim(1, told.append)
    assert told == []
    end(remains, 1, data=b"abcdefgh")
    assert told[0][1] == b"abcdefgh"
    assert claimed(remains, 1) is None


class Server:
    """One stream of a worker: what arrives runs in order, one frame at a time, and ends in order."""

    def __init__(self, inherited, runs):
        self.inherited, self.runs = inherited, runs
        self.remains = Remains("m@v1", "tenant")
        self.names, self.queued, self.running = {}, deque(), None
        #: Set to a list of messages while there is a connection.
        self.down = deque()
        self.is_lost = False

    def receive(self, raw):
        header, data = frames.cut(raw)
        seq, acknowledged, _ = frames.split_seq(header)
        self.remains.acknowledge(acknowledged)
        frame = frames.parse(inference_pb2.StreamRequest, header).frame
        self.names[seq] = int.from_bytes(data, "little")
        if not frame.resumes:
            self.queued.append(seq)
        elif self.inherited is None:
            self.answer_failed(seq)
        elif not self.inherited.claim(frame.resumes, lambda last: self.answer_as(seq, last)):
            self.queued.append(seq)

    def start(self):
        if self.running is None and self.queued:
            self.running = self.queued.popleft()
            self.runs[self.names[self.running]] += 1

    def finish(self):
        if self.running is not None:
            seq, self.running = self.running, None
            name = self.names[seq]
            self.write(seq, header_of(seq, name), name.to_bytes(8, "little"))

    def answer_as(self, seq, last):
        if last is None:
            self.answer_failed(seq)
        else:
            self.write(seq, frames.renumbered(seq, last[0]), last[1])

    def answer_failed(self, seq):
        message = inference_pb2.StreamResponse(seq=seq, error=status.to_message(LOST))
        self.write(seq, message.SerializeToString(), b"")

    def write(self, seq, header, data):
        if self.is_lost and seq not in self.remains._running:
            return  # of a frame that was itself waiting for the stream before
        self.down.extend(self.remains.keep(seq, header, memoryview(data)))

    def lose(self):
        self.is_lost = True
        self.queued.clear()
        if self.running is not None:
            self.remains.runs_on(self.running)


class Lossy(RuleBasedStateMachine):
    """Connections that are lost at any moment, with everything on its way."""

    def __init__(self):
        super().__init__()
        self.runs, self.ends = Counter(), {}
        self.num_sent = 0
        self.servers = []
        self.connect([])

    def connect(self, again):
        self.session = Session()
        self.session.receive(WELCOME)
        self.up = deque()
        inherited = self.servers[-1].remains if self.servers else None
        self.servers.append(Server(inherited, self.runs))
        #: By number on this stream: the frame's name, its header, and whether it was sent before.
        self.open = {}
        for name, header in again:
            self.submit(name, header, is_again=True)

    def submit(self, name, header, *, is_again):
        payload = values.Payload()
        payload.add(name.to_bytes(8, "little"), 8)
        seq, messages = self.session.send(Outgoing(header, payload))
        self.open[seq] = name, header, is_again
        self.up.extend(messages)

    @rule(count=st.integers(1, 3))
    def send(self, count):
        for _ in range(count):
            if self.session.has_room(8):
                self.num_sent += 1
                header = inference_pb2.Frame(data_bytes=8).SerializeToString()
                self.submit(self.num_sent, header, is_again=False)

    @rule(num_up=st.integers(0, 4), num_ended=st.integers(0, 4), num_down=st.integers(0, 4))
    def go_on(self, num_up, num_ended, num_down):
        """Some frames arrive, some end and the next one runs, some results come back."""
        server = self.servers[-1]
        for _ in range(min(num_up, len(self.up))):
            server.receive(self.up.popleft())
        for _ in range(num_ended):
            server.start()
            server.finish()
        server.start()
        for _ in range(min(num_down, len(server.down))):
            for event in self.session.receive(server.down.popleft()):
                assert isinstance(event, Done | Failed)
                self.note(self.open.pop(event.seq)[0], event)

    @rule(age=st.integers(1, 2))
    def end_what_runs_on(self, age):
        self.servers[-1 - age % len(self.servers)].finish()

    def note(self, name, event):
        assert name not in self.ends
        self.ends[name] = event
        if isinstance(event, Done):
            assert event.value == name.to_bytes(8, "little")
            assert self.runs[name] == 1

    @rule()
    def lose(self):
        self.servers[-1].lose()
        again = []
        for seq, (name, header, is_again) in self.open.items():
            if is_again:
                self.note(name, Failed(seq, LOST))
            else:
                again.append((name, frames.resumed(header, seq)))
        self.connect(again)

    @invariant()
    def no_frame_runs_twice(self):
        assert all(count == 1 for count in self.runs.values())

    def teardown(self):
        for server in self.servers:
            server.finish()
        for _ in range(2):
            self.go_on(2 * WINDOW, 2 * WINDOW, 2 * WINDOW)
        assert set(self.ends) == set(range(1, self.num_sent + 1))


Lossy.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestLossy = Lossy.TestCase
