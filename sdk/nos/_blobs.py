"""Files to the server: each named by its sha256, sent once, resumed where an upload broke off."""

from __future__ import annotations

import hashlib
import io
import os
from typing import TYPE_CHECKING, Final

from nos._control import Rpc
from nos.errors import InvalidRequestError
from nos.wire.v1 import blobs_pb2, models_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from nos._engine import Engine

_BLOBS: Final = "/nos.v1.BlobService/"
_PIECE_BYTES: Final = 1 << 20


def upload(engine: Engine, files: Mapping[str, Path | bytes]) -> list[models_pb2.ModelFile]:
    """Bring files to the server that it does not have; returns them as a registration names them.

    Args:
        engine: The client's.
        files: By path in the model's folder: a file here, or its content.

    Raises:
        InvalidRequestError: If a file cannot be read.
        NosError: If the server does not take one.
    """
    return [_upload(engine, path, content) for path, content in files.items()]


def _upload(engine: Engine, path: str, content: Path | bytes) -> models_pb2.ModelFile:
    try:
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size_bytes = file.seek(0, os.SEEK_END)
            held = engine.wait(_stat(sha256))
            if not held.is_complete:
                requests = _requests(file, sha256, size_bytes, held.received_bytes)
                engine.send(_BLOBS + "Upload", requests)
    except OSError as error:
        raise InvalidRequestError(
            f"a file cannot be read: {error}", "files", "a readable file", str(content)[:200]
        ) from error
    return models_pb2.ModelFile(path=path, sha256=sha256, size_bytes=size_bytes)


def _stat(sha256: str) -> Rpc[blobs_pb2.StatResponse]:
    return Rpc(
        _BLOBS + "Stat", blobs_pb2.StatRequest(sha256=sha256), blobs_pb2.StatResponse.FromString
    )


def _requests(file: BinaryIO, sha256: str, size_bytes: int, offset_bytes: int) -> Iterator[bytes]:
    file.seek(offset_bytes)
    yield blobs_pb2.UploadRequest(
        sha256=sha256,
        size_bytes=size_bytes,
        offset_bytes=offset_bytes,
        data=file.read(_PIECE_BYTES),
    ).SerializeToString()
    while data := file.read(_PIECE_BYTES):
        yield blobs_pb2.UploadRequest(data=data).SerializeToString()
