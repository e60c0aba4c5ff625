"""What may go into a stream, each in its own form; and what of it is bad, which fails its frame only."""

import io
import struct
import time
import zlib

import nos
import numpy as np
import pytest
import torch
from nos.errors import InvalidTensorError, LimitExceededError
from nos.types import Media
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)


def encoded(kind, array=PIXELS):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def bomb(width, height):
    """A small PNG whose header promises a large picture."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.accept("A8")
def test_frames_of_every_form_arrive(client):
    sound = np.sin(np.arange(16_000, dtype=np.float32))
    frames = {
        "numpy": (PIXELS, PIXELS),
        "torch": (torch.from_numpy(PIXELS), PIXELS),
        "torch, bfloat16": (torch.ones(3, dtype=torch.bfloat16), np.ones(3)),
        "torch, with gradient": (torch.ones(3, requires_grad=True), np.ones(3)),
        "picture": (Image.fromarray(PIXELS), PIXELS),
        "grey picture": (Image.fromarray(PIXELS[..., 0]), PIXELS[..., 0]),
        "sound, float32 PCM": (sound, sound),
        "text": ("grüße", "grüße"),
        "bytes": (b"\x00\xff", b"\x00\xff"),
    }
    with client.model("nos/echo").stream() as stream:
        for frame, _ in frames.values():
            stream.send(frame)
        stream.finish()
        for result, (name, (_, expected)) in zip(stream, frames.items(), strict=True):
            if isinstance(expected, np.ndarray):
                np.testing.assert_array_equal(
                    np.asarray(result.value, expected.dtype), expected, name
                )
            else:
                assert result.value == expected


def test_encoded_pictures_are_sent_as_they_are_and_decoded_beside_the_model(client):
    png, jpeg = encoded("PNG"), encoded("JPEG")
    echo, edges = client.model("nos/echo"), client.model("nos/edges")
    np.testing.assert_array_equal(echo(Media.from_bytes(png)), PIXELS)
    np.testing.assert_array_equal(edges(Media.from_bytes(png)), edges(PIXELS))
    assert edges(Media.from_bytes(jpeg)).shape == PIXELS.shape[:2]


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (encoded("JPEG")[:400], InvalidTensorError, "truncated or broken"),
        (encoded("PNG")[:-60], InvalidTensorError, "truncated or broken"),
        (b"\xff\xd8\xff" + bytes(100), InvalidTensorError, "not an image|truncated or broken"),
        (bomb(16_000, 3_000), LimitExceededError, "too many bytes for its size"),
        (bomb(100_000, 100_000), LimitExceededError, "the image is too large"),
    ],
)
def test_a_bad_picture_fails_its_frame_only(client, data, error, text):
    with client.model("nos/edges").stream() as stream:
        stream.send(PIXELS)
        stream.send(Media("image/png" if data.startswith(b"\x89") else "image/jpeg", data))
        stream.send(PIXELS)
        stream.finish()
        first, bad, last = stream
    assert first.value.shape == last.value.shape == PIXELS.shape[:2]
    with pytest.raises(error, match=text):
        _ = bad.value


def test_endless_iterators_are_taken_as_needed(client):
    taken = 0

    def numbers():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = client.model("nos/echo").map(numbers(), max_in_flight=4)
    assert [next(results) for _ in range(10)] == list(range(1, 11))
    results.close()
    assert taken <= 20


@pytest.mark.asyncio
async def test_asynchronous_iterators_are_taken_as_needed(server):
    async def numbers():
        for number in range(10):
            yield number

    client = await nos.AsyncClient.connect(server.address, token_file=server.token_file)
    async with client:
        model = await client.model("nos/echo")
        assert [it async for it in model.map(numbers())] == list(range(10))


@pytest.mark.accept("D1")
def test_timings_add_up_to_the_time_that_passed(client, accept):
    shares = []
    with client.model("fake/slow").stream() as stream:
        for _ in range(5):
            start_s = time.perf_counter()
            stream.send(0.1)
            timings = next(stream).timings
            passed_s = time.perf_counter() - start_s
            parts_s = timings.queue_s + timings.batch_wait_s + timings.compute_s
            assert timings.compute_s >= 0.1
            assert parts_s <= timings.server_s + 1e-3
            assert timings.server_s <= timings.total_s
            shares.append(abs(passed_s - parts_s - timings.transport_s) / passed_s)
    accept.figure(sorted(shares)[2], 0.05, "of the time that passed")
