"""The format of local streams: what one end packs, the other reads; what makes no sense is refused."""

import pytest
from nos.errors import InvalidRequestError
from nos.wire import frames, shared
from nos.wire.shared import HEAD, INLINE, Blocks, SharedEnd
from nos.wire.v1 import inference_pb2

REQUEST = inference_pb2.StreamRequest
SIZE = 1 << 20


@pytest.fixture
def ends():
    requests, results = memoryview(bytearray(SIZE)), memoryview(bytearray(SIZE))
    return SharedEnd(requests, results), SharedEnd(results, requests)


def frame(seq, size):
    return REQUEST(seq=seq, frame=inference_pb2.Frame(data_bytes=size)).SerializeToString()


def seq_of(header):
    return frames.parse(REQUEST, header).seq


def send(client, server, seq, data):
    raw = b"".join(client.pack(seq, frame(seq, len(data)), [data], len(data)))
    return [(seq_of(header), bytes(block)) for header, block in server.feed(raw)]


@pytest.mark.parametrize("size", [0, 1, 4096, 5000, SIZE])
def test_a_frame_comes_out_as_it_went_in(ends, size):
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert send(*ends, 1, data) == [(1, data)]


def test_messages_may_come_in_any_pieces(ends):
    client, server = ends
    raw = b"".join(client.pack(1, frame(1, 9000), [bytes(9000)], 9000)) + client.finish()
    seen = [seq_of(header) for byte in raw for header, _ in server.feed(bytes([byte]))]
    assert seen == [1]
    assert server.is_finished


def test_what_finds_no_room_goes_inline(ends):
    client, server = ends
    assert send(client, server, 1, bytes(SIZE)) == [(1, bytes(SIZE))]
    [(seq, data)] = send(client, server, 2, b"x" * 5000)
    assert (seq, data) == (2, b"x" * 5000)


def test_a_frame_above_the_memory_goes_in_pieces(ends):
    data = bytes(range(256)) * (3 * SIZE // 256)
    pieces = send(*ends, 1, data)
    assert len(pieces) > 1
    assert b"".join(block for _, block in pieces) == data


def test_blocks_come_free_as_the_reader_says(ends):
    client, server = ends
    for seq in range(1, 100):
        data = bytes([seq]) * (SIZE // 3)
        assert send(client, server, seq, data) == [(seq, data)]
        answer = server.wrap(inference_pb2.StreamResponse(seq=seq).SerializeToString())
        assert len(list(client.feed(answer))) == 1
    assert client._blocks.num_used == 0


def test_a_block_outside_the_memory_is_refused(ends):
    _, server = ends
    raw = frame(1, 5000)
    for offset, size in ((SIZE - 10, 5000), (1 << 62, 5000), (0, SIZE + 1)):
        with pytest.raises(InvalidRequestError, match="not in the shared memory"):
            list(server.feed(HEAD.pack(len(raw), 0, offset, size) + raw))
        server._received.clear()


def test_what_was_never_given_cannot_be_given_back(ends):
    _, server = ends
    with pytest.raises(InvalidRequestError, match="gave back"):
        list(server.feed(HEAD.pack(0, 1, INLINE, 0)))


def test_a_message_above_the_limit_is_refused_by_its_head(ends):
    with pytest.raises(InvalidRequestError, match="too large"):
        list(ends[1].feed(HEAD.pack(1 << 31, 0, INLINE, 0)))


def test_blocks_in_use_never_overlap():
    blocks = Blocks(memoryview(bytearray(1000)))
    first, second = blocks.put([b"a" * 100], 100), blocks.put([b"b" * 100], 100)
    assert (first, second) == (0, 128)
    blocks.free_until(1)
    assert blocks.put([b"c" * 64], 64) == 0
    assert blocks.put([b"d" * 800], 800) is None


def test_what_lies_in_its_room_is_sent_as_it_lies(ends):
    client, server = ends
    room = client.room(6000)
    room[:] = 7
    raw = b"".join(client.pack(1, frame(1, 6000), [memoryview(room)], 6000))
    room[:] = 8  # nobody has read it yet: were it copied, this would not be seen
    [(_, block)] = server.feed(raw)
    assert bytes(block) == b"\x08" * 6000


def test_rooms_never_overlap_and_come_free_with_their_last_array(ends):
    client, server = ends
    first, second = client.room(SIZE // 2), client.room(SIZE // 2)
    first[:], second[:] = 1, 2
    assert not (first == 2).any()
    assert client.room(5000) is None
    part = second.reshape(2, -1)[1:]
    del second
    assert client.room(5000) is None, "an array of it is still there"
    del part
    assert client.room(SIZE // 2) is not None
    assert send(client, server, 1, b"x" * 5000) == [(1, b"x" * 5000)]


def test_part_of_a_room_is_sent_as_any_other_data(ends):
    client, server = ends
    room = client.room(12000)
    room[:] = 3
    assert send(client, server, 1, room[:6000]) == [(1, b"\x03" * 6000)]
    assert send(client, server, 2, room) == [(2, b"\x03" * 12000)]


def test_a_room_is_a_block_once_it_was_sent(ends):
    client, server = ends
    for seq in range(1, 40):
        room = client.room(SIZE // 2)
        assert room is not None, seq
        room[:] = seq
        [(_, data)] = send(client, server, seq, room)
        assert set(data) == {seq}
        del room
        for _ in client.feed(server.wrap(b"")):
            pass


def test_inline_messages_are_those_of_grpc(ends):
    raw = frames.with_data(frame(1, 10), [bytes(10)], 10)
    [(header, data)] = ends[1].feed(ends[0].wrap(raw))
    assert (seq_of(header), bytes(data)) == (1, bytes(10))
    assert shared.HEAD.size == 28
