"""Calls of models that pages ask for, run in the kernel, and what came of them."""

from __future__ import annotations

import threading
import time
from concurrent import futures
from typing import TYPE_CHECKING, Any

from nos.errors import CancelledError, LimitExceededError, NosError

from nos_jupyter import forms
from nos_jupyter.following import start_thread
from nos_jupyter.rendering import describe, render

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import nos

#: As the page's own limit.
MAX_UPLOAD_BYTES = 200 << 20


class Uploads:
    """Large buffers that arrive in pieces, because one large message would end the page's connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: What came so far, by name; under the lock.
        self._parts: dict[str, bytearray] = {}

    def add(self, upload: str, piece: memoryview | bytes) -> None:
        """Append a piece.

        Raises:
            LimitExceededError: If all that is under way is larger than the limit; it is forgotten.
        """
        with self._lock:
            self._parts.setdefault(upload, bytearray()).extend(piece)
            total = sum(map(len, self._parts.values()))
            if total > MAX_UPLOAD_BYTES:
                self._parts.clear()
                raise LimitExceededError(
                    "the upload is too large", "upload", f"{MAX_UPLOAD_BYTES} bytes", f"{total}"
                )

    def take(self, names: Sequence[str]) -> list[bytes]:
        """Return the buffers of these names, and forget them."""
        with self._lock:
            return [bytes(self._parts.pop(name, b"")) for name in names]


class Desk:
    """Runs what pages ask for, each call in a thread of its own, so that the kernel stays free.

    Args:
        connection: Returns a client, or raises UnavailableError.
        send: Sends a message and its buffers to the pages.
    """

    def __init__(self, connection: Callable[[], nos.Client], send: Callable[..., None]) -> None:
        self._connection = connection
        self._send = send
        self._uploads = Uploads()
        self._lock = threading.Lock()
        #: What ends each call that is under way; under the lock.
        self._running: dict[str, Callable[[], object]] = {}
        #: What the last call that succeeded gave; None before.
        self.value: Any = None

    def take(self, content: dict[str, Any], buffers: Sequence[memoryview]) -> bool:
        """Carry out a page's message; return whether it was one of those that end here.

        `chunk` {upload} and a piece of a buffer; `run` {id, model, method, arguments, uploads};
        `cancel` {id}. Answers: `got` {upload}; `item` and `result` {id, view}, `done` {id, total_s},
        `failed` {id, name, sentence, traceback}.
        """
        kind = content.get("type")
        if kind == "chunk":
            try:
                self._uploads.add(str(content["upload"]), buffers[0])
            except LimitExceededError as error:
                self._fail(str(content["upload"]), error)
            self._send({"type": "got", "upload": content["upload"]})
        elif kind == "run":
            uploads = content.get("uploads")
            given = self._uploads.take(uploads) if uploads else [bytes(it) for it in buffers]
            start_thread(self._run, content, given, name="nos-desk")
        elif kind == "cancel":
            with self._lock:
                end = self._running.pop(str(content.get("id")), None)
            if end is not None:
                end()
        return kind in ("chunk", "run", "cancel")

    def close(self) -> None:
        """End all calls."""
        with self._lock:
            running, self._running = self._running, {}
        for end in running.values():
            end()

    def _run(self, content: dict[str, Any], buffers: Sequence[bytes]) -> None:
        call_id = str(content["id"])
        begin_s = time.monotonic()
        try:
            self._call(call_id, content, buffers)
        except NosError as error:
            self._fail(call_id, error)
        except futures.CancelledError:
            self._fail(call_id, CancelledError("the call was cancelled"))
        else:
            self._send({"type": "done", "id": call_id, "total_s": time.monotonic() - begin_s})
        finally:
            with self._lock:
                self._running.pop(call_id, None)

    def _call(self, call_id: str, content: dict[str, Any], buffers: Sequence[bytes]) -> None:
        handle = self._connection().model(str(content["model"]))
        method = handle.method(str(content["method"]))
        arguments = forms.arguments(method.info, content["arguments"], buffers)
        if method.info.is_generator:
            items = method(**arguments)
            with self._lock:
                self._running[call_id] = items.close
            values = []
            for value in items:
                values.append(value)
                self._show(call_id, "item", value)
            self.value = values
            return
        call = method.submit(**arguments)
        with self._lock:
            self._running[call_id] = call.cancel
        self.value = value = call.result()
        self._show(call_id, "result", value)

    def _show(self, call_id: str, kind: str, value: Any) -> None:
        rendered = render(value)
        self._send({"type": kind, "id": call_id, "view": rendered.view}, [rendered.data])

    def _fail(self, call_id: str, error: NosError) -> None:
        self._send({"type": "failed", "id": call_id, **describe(error)})
