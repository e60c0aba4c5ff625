"""Messages joined and split by hand are the same bytes that generated stubs write and read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nos.errors import InvalidRequestError
from nos.wire import frames
from nos.wire.v1 import inference_pb2, values_pb2

SIZES = [0, 1, 127, 128, 16_383, 16_384, 100_000, 1 << 20]


@pytest.mark.parametrize("size", SIZES)
def test_a_joined_message_is_what_stubs_write(size):
    data = bytes(size)
    header = inference_pb2.StreamRequest(seq=7)
    header.frame.method = "m"
    whole = inference_pb2.StreamRequest()
    whole.CopyFrom(header)
    whole.data = data
    half = size // 2
    assert frames.join(header, [data[:half], data[half:]], size) == whole.SerializeToString()


@pytest.mark.parametrize("size", SIZES)
def test_a_message_of_stubs_is_split(size):
    whole = inference_pb2.StreamResponse(seq=7, data=b"x" * size)
    whole.result.more = True
    header, data = frames.split(inference_pb2.StreamResponse, whole.SerializeToString())
    assert (header.seq, header.result.more, header.data) == (7, True, b"")
    assert data == b"x" * size


def test_a_large_message_whose_data_is_not_last_is_read_too():
    data = inference_pb2.StreamRequest(data=b"x" * 40_000).SerializeToString()
    seq = inference_pb2.StreamRequest(seq=3).SerializeToString()
    header, view = frames.split(inference_pb2.StreamRequest, data + seq)
    assert (header.seq, view.nbytes) == (3, 40_000)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([0, 16_384]), st.binary(max_size=100))
def test_random_bytes_are_a_message_or_a_typed_error(head, gap, tail):
    try:
        frames.split(inference_pb2.StreamRequest, head + b"x" * gap + tail)
    except InvalidRequestError as error:
        assert "StreamRequest" in str(error)  # noqa: PT017 - some of the inputs are messages


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(1, 20))
def test_chunks_hold_the_same_bytes(buffers, chunk_bytes):
    groups = [b"".join(group) for group in frames.chunked(buffers, chunk_bytes)]
    assert b"".join(groups) == b"".join(buffers)
    assert all(len(group) == chunk_bytes for group in groups[:-1])
    assert all(groups)


@given(st.integers(1, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 300))
def test_headers_written_by_hand_are_those_of_stubs(seq, data_bytes, batch_size):
    value = values_pb2.Value(text="x" * batch_size)
    header = frames.result_header(
        seq, value.SerializeToString(), (0.25, 0.0, 1e-9, 2.0, batch_size), data_bytes
    )
    timings = inference_pb2.Timings(
        queue_s=0.25, compute_s=1e-9, server_s=2.0, batch_size=batch_size
    )
    result = inference_pb2.Result(value=value, timings=timings, data_bytes=data_bytes)
    assert frames.parse(inference_pb2.StreamResponse, header) == inference_pb2.StreamResponse(
        seq=seq, result=result
    )
    frame = inference_pb2.Frame(method="m", data_bytes=data_bytes)
    request = inference_pb2.StreamRequest(seq=seq, frame=frame)
    assert frames.request_header(seq, frame.SerializeToString()) == request.SerializeToString()
    chunk = inference_pb2.StreamResponse(seq=seq, chunk=inference_pb2.Chunk())
    assert frames.chunk_header(seq) == chunk.SerializeToString()


@pytest.mark.parametrize("acknowledged", [0, 1, 300, (1 << 64) - 1])
def test_a_frame_says_what_it_acknowledges_and_is_else_the_same(acknowledged):
    frame = inference_pb2.Frame(method="m", data_bytes=7)
    raw = frames.request_header(1000, frame.SerializeToString(), acknowledged)
    request = inference_pb2.StreamRequest(seq=1000, frame=frame, acknowledged=acknowledged)
    assert frames.parse(inference_pb2.StreamRequest, raw) == request
    plain = frames.request_header(1000, frame.SerializeToString())
    assert frames.split_seq(raw) == (1000, acknowledged, frames.split_seq(plain)[2])


def test_a_frame_that_is_sent_again_says_which_it_was():
    frame = inference_pb2.Frame(method="m", data_bytes=7)
    again = inference_pb2.Frame.FromString(frames.resumed(frame.SerializeToString(), 300))
    assert again == inference_pb2.Frame(method="m", data_bytes=7, resumes=300)


@pytest.mark.parametrize("raw", [b"", b"\x08", b"\x08\x80", b"\x1a\x00", b"\x10\x01"])
def test_a_message_that_starts_with_no_number_has_none(raw):
    assert frames.split_seq(raw) == (0, 0, b"")
