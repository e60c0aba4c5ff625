"""Each limit: one below it and it itself pass, one above is refused by the limit's own error."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nos.errors import InvalidRequestError, LimitExceededError, NosError
from nos.wire.limits import FRAME_BYTES, MAX_DEPTH, MAX_RANK, MAX_STREAMS
from nos.wire.v1 import access_pb2, models_pb2, values_pb2
from nos.wire.values import Payload, check, tensor_bytes
from nos_backend.cluster.device import WorkerSettings
from nos_backend.config import load_settings
from nos_backend.control.blobs import MAX_BLOB_BYTES, BlobStore
from nos_backend.control.catalogue import MAX_MODELS, Catalogue
from nos_backend.control.describe import MAX_SOURCE_BYTES, describe
from nos_backend.control.describe_apart import describe_apart
from nos_backend.control.folders import MAX_FILES, check_files
from nos_backend.control.names import MAX_NAME_LENGTH, check_name
from nos_backend.control.requirements import MAX_REQUIREMENTS, normalize
from nos_backend.control.tokens import make_token
from nos_backend.definition import LOAD_TIMEOUT_S, ModelDefinition
from nos_backend.executor import images
from nos_backend.executor.failures import RefusedError
from nos_backend.executor.log_lines import LINES_PER_S, LogLines
from nos_backend.executor.messages import MAX_MESSAGE_BYTES, Decoder, MalformedError
from nos_backend.executor.process import MAX_IMAGE_PIXELS
from nos_backend.executor.values import ANY, Inputs
from nos_backend.scheduling.admission import MAX_QUEUED, MAX_QUEUED_BYTES
from nos_backend.worker.limits import WorkLimits

pytestmark = pytest.mark.accept("F7")

CPU = torch.device("cpu")
F = "def f(x: int) -> int: return x\n"


def source(size: int) -> None:
    describe(F.ljust(size, "#"))


def source_of_200(size: int) -> None:
    asyncio.run(describe_apart(F.ljust(size, "#"), "", "x", 200))


def lines(count: int) -> None:
    said = LogLines(7).feed(b"x\n" * count, 0.0)
    if len(said) < count:
        raise OverflowError


def models(count: int) -> None:
    catalogue = Catalogue(max_models=3)
    (found,) = describe(F)
    for number in range(count):
        definition = ModelDefinition(
            name=f"m{number}", version=0, owner="ann", source=F, source_name="x", class_name="f"
        )
        catalogue.add(definition, found)


def files(count: int) -> None:
    check_files(models_pb2.ModelFile(path=f"{n}", sha256="0" * 64) for n in range(count))


def bytes_of_files(size: int) -> None:
    half = size // 2
    check_files(
        [
            models_pb2.ModelFile(path=path, sha256="0" * 64, size_bytes=part)
            for path, part in (("a", half), ("b", size - half))
        ],
        100,
    )


def path_bytes(size: int) -> None:
    path = "/".join(["x" * 120] * 9)[: size - 1] + "x"
    check_files([models_pb2.ModelFile(path=path, sha256="0" * 64)])


def rank(count: int) -> None:
    tensor_bytes(values_pb2.Tensor(dtype=values_pb2.DTYPE_UINT8, shape=[1] * count), "x")


def depth(levels: int) -> None:
    node = values_pb2.Value()
    inner = node
    for _ in range(levels):
        inner = inner.items.items.add()
    inner.integer = 1
    check(node, 0, "x")


def picture(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + -(-width // 8))), 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, data) for name, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


def message(size: int) -> None:
    # Of one that is not refused, the rest is waited for.
    Decoder().feed(struct.pack("<I", size))


def pixels(count: int) -> None:
    node = {"m": ["image/png", 0, len(block := picture(count, 1))]}
    Inputs(memoryview(bytearray(block)), CPU, 50).read(node, ANY, "x")


LIMITS: dict[str, tuple[int, Callable[[int], Any], type[Exception]]] = {
    "bytes of a source": (MAX_SOURCE_BYTES, source, LimitExceededError),
    "bytes of a source, as set": (200, source_of_200, LimitExceededError),
    "names of models": (3, models, LimitExceededError),
    "files of a model": (MAX_FILES, files, LimitExceededError),
    "bytes of a model's files": (100, bytes_of_files, LimitExceededError),
    "bytes of a path": (1024, path_bytes, InvalidRequestError),
    "characters of a name": (MAX_NAME_LENGTH, lambda n: check_name("n" * n), InvalidRequestError),
    "characters of a file's name": (
        255,
        lambda n: check_files([models_pb2.ModelFile(path="n" * n, sha256="0" * 64)]),
        InvalidRequestError,
    ),
    "packages of an environment": (
        MAX_REQUIREMENTS,
        lambda n: normalize(f"p{number}" for number in range(n)),
        InvalidRequestError,
    ),
    "characters of a package": (200, lambda n: normalize(["p" * n]), InvalidRequestError),
    "characters of a label": (
        100,
        lambda n: make_token("ann", access_pb2.ROLE_USER, 0.0, "l" * n),
        InvalidRequestError,
    ),
    "characters of a tenant": (
        64,
        lambda n: make_token("t" * n, access_pb2.ROLE_USER, 0.0, ""),
        InvalidRequestError,
    ),
    "bytes of a frame": (FRAME_BYTES, lambda n: Payload().add(b"", n), LimitExceededError),
    "bytes of a frame, as set": (
        100,
        WorkLimits(max_frame_bytes=100).check_frame,
        LimitExceededError,
    ),
    "pixels of an image, as set": (50, pixels, RefusedError),
    "lines a second, as set": (7, lines, OverflowError),
    "dimensions": (MAX_RANK, rank, NosError),
    "depth": (MAX_DEPTH, depth, LimitExceededError),
    "bytes of an executor's message": (MAX_MESSAGE_BYTES, message, MalformedError),
    "pixels of a side": (
        images.MAX_SIDE,
        lambda n: images.decode(picture(n, 1), "x"),
        RefusedError,
    ),
    "lines of an image": (
        images.MAX_SIDE,
        lambda n: images.decode(picture(1, n), "x"),
        RefusedError,
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_itself_passes_and_no_more(name: str) -> None:
    limit, use, refusal = LIMITS[name]
    use(limit - 1)
    use(limit)
    with pytest.raises(refusal):
        use(limit + 1)


def test_a_blob_of_the_limit_is_taken_and_no_larger_one(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, max_bytes=10)
    for number, size in enumerate((9, 10)):
        store.open(f"{number}" * 64, size, 0).close()
    with pytest.raises(LimitExceededError, match="at most 10, got 11"):
        store.open("3" * 64, 11, 0)


@pytest.mark.parametrize("height", [9_999, 10_000, 10_001])
def test_an_image_may_have_fifty_million_pixels(height: int) -> None:
    assert MAX_IMAGE_PIXELS == 5_000 * 10_000
    # As large a file as the image needs, so that only the number of pixels counts.
    if height <= 10_000:
        images._check_size(5_000, height, 5_000 * height, "x")
    else:
        with pytest.raises(RefusedError, match="50000000 pixels"):
            images._check_size(5_000, height, 5_000 * height, "x")


@pytest.mark.parametrize("ratio", [99, 100, 101])
def test_an_image_may_decode_to_a_hundred_times_its_size(ratio: int) -> None:
    width, height = 5000, 5000
    encoded_bytes = width * height * 3 // ratio + (width * height * 3 % ratio > 0)
    if ratio <= images.MAX_RATIO:
        images._check_size(width, height, encoded_bytes, "x")
    else:
        with pytest.raises(RefusedError, match="100 times"):
            images._check_size(width, height, encoded_bytes, "x")


def test_what_the_server_is_told_are_the_usual_limits_unless_somebody_says_otherwise() -> None:
    settings, worker = load_settings({}), WorkerSettings()
    assert settings.max_streams == worker.max_streams == MAX_STREAMS
    assert settings.max_queued == worker.max_queued == MAX_QUEUED
    assert settings.max_queued_bytes == worker.max_queued_bytes == MAX_QUEUED_BYTES
    assert settings.load_timeout_s == worker.load_timeout_s == LOAD_TIMEOUT_S
    assert settings.max_frame_bytes == worker.max_frame_bytes == FRAME_BYTES
    assert settings.max_image_pixels == worker.max_image_pixels == MAX_IMAGE_PIXELS
    assert settings.max_log_lines == worker.max_log_lines == LINES_PER_S
    assert settings.max_source_bytes == MAX_SOURCE_BYTES
    assert settings.max_registered == MAX_MODELS
    assert settings.max_upload_bytes == MAX_BLOB_BYTES
