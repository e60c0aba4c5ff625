"""BlobService: files in and out, in pieces, resumable, verified."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from nos.errors import InvalidRequestError, LimitExceededError
from nos.wire.v1 import blobs_pb2, blobs_pb2_grpc

from nos_backend.rpc.guard import caller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from nos_backend.control.blobs import BlobStore, BlobWriter
    from nos_backend.rpc.guard import Context

_PIECE_BYTES: Final = 1 << 20


class BlobService(blobs_pb2_grpc.BlobServiceServicer):
    """Serves `nos.v1.BlobService`."""

    def __init__(self, store: BlobStore, max_tenant_bytes: int = 0) -> None:
        """Serve a store.

        Args:
            store: The blobs.
            max_tenant_bytes: What one tenant may send as long as this server lives; 0 means no limit.
        """
        self._store = store
        self._max_tenant_bytes = max_tenant_bytes
        #: By tenant: what it sent, whole blobs or not.
        self._sent_bytes: Counter[str] = Counter()

    async def Stat(
        self, request: blobs_pb2.StatRequest, context: Context
    ) -> blobs_pb2.StatResponse:
        """Say how much of a blob is here."""
        received_bytes, is_complete = await asyncio.to_thread(self._store.stat, request.sha256)
        return blobs_pb2.StatResponse(received_bytes=received_bytes, is_complete=is_complete)

    async def Upload(
        self, requests: AsyncIterator[blobs_pb2.UploadRequest], context: Context
    ) -> blobs_pb2.UploadResponse:
        """Take a blob, or its rest."""
        first = await anext(aiter(requests), None)
        if first is None:
            raise InvalidRequestError("the upload names no blob", "sha256", "a first message")
        received_bytes, is_complete = await asyncio.to_thread(self._store.stat, first.sha256)
        if is_complete:
            return blobs_pb2.UploadResponse(size_bytes=received_bytes)
        with _disk_errors():
            writer = await self._open(first)
            try:
                await self._write(writer, first.data)
                async for request in requests:
                    await self._write(writer, request.data)
                await asyncio.to_thread(writer.finish)
            finally:
                await asyncio.to_thread(writer.close)
        return blobs_pb2.UploadResponse(size_bytes=first.size_bytes)

    async def Fetch(
        self, request: blobs_pb2.FetchRequest, context: Context
    ) -> AsyncIterator[blobs_pb2.FetchResponse]:
        """Give a blob from an offset on."""
        file, size_bytes = await asyncio.to_thread(
            self._store.read, request.sha256, request.offset_bytes
        )
        with file:
            data = await asyncio.to_thread(file.read, _PIECE_BYTES)
            yield blobs_pb2.FetchResponse(size_bytes=size_bytes, data=data)
            while data := await asyncio.to_thread(file.read, _PIECE_BYTES):
                yield blobs_pb2.FetchResponse(data=data)

    async def _write(self, writer: BlobWriter, data: bytes) -> None:
        tenant, most = caller().tenant, self._max_tenant_bytes
        sent_bytes = self._sent_bytes[tenant] + len(data)
        if most and sent_bytes > most:
            raise LimitExceededError(
                f"{tenant} has uploaded too much",
                "data",
                f"at most {most} bytes until the server starts again",
                str(sent_bytes),
            )
        self._sent_bytes[tenant] = sent_bytes
        await asyncio.to_thread(writer.write, data)

    async def _open(self, first: blobs_pb2.UploadRequest) -> BlobWriter:
        opening = asyncio.ensure_future(
            asyncio.to_thread(self._store.open, first.sha256, first.size_bytes, first.offset_bytes)
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The thread goes on; what it opens must not stay marked as being written.
            opening.add_done_callback(_close_opened)
            raise


def _close_opened(opening: asyncio.Future[BlobWriter]) -> None:
    if opening.exception() is None:
        opening.result().close()


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Say in a typed error that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise LimitExceededError(
            "the server's disk is full", "data", hint="Free space in its state folder, then resume"
        ) from error
