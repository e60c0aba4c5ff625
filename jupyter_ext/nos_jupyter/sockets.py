"""Websockets: the backend's events, and live frames through a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from jupyter_server.auth.decorator import authorized, ws_authenticated
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.base.websocket import WebSocketMixin
from jupyter_server.extension.handler import ExtensionHandlerMixin
from nos.errors import InvalidRequestError, NosError
from nos.types import Media
from tornado import web
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from nos_jupyter import frames

if TYPE_CHECKING:
    from nos import AsyncStream

    from nos_jupyter.extension import NosApp

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.1, 2.0
#: Close codes of RFC 6455, and the most that their reason may be long.
GOING_AWAY, WRONG, BROKEN, TRY_LATER = 1001, 1008, 1011, 1013
_MAX_REASON_BYTES = 120


class NosSocket(ExtensionHandlerMixin, WebSocketMixin, WebSocketHandler, JupyterHandler):
    """What the websockets share; none of its methods answers a request.

    Pages of other origins are refused by Jupyter's own check.
    """

    _track_activity = False
    #: What works for the page as long as it is there; None before it came.
    task: asyncio.Task[None] | None = None

    def set_default_headers(self) -> None:
        """Leave out what makes no sense for a websocket."""

    def get_compression_options(self) -> None:
        """Compress nothing: frames are compressed or come often."""

    @property
    def max_message_size(self) -> int:
        """The most bytes of a message from the page."""
        return frames.MAX_FRAME_BYTES

    @property
    def app(self) -> NosApp:
        """The extension."""
        return cast("NosApp", self.extensionapp)

    def on_close(self) -> None:
        """End what works for the page."""
        if self.task is not None:
            self.task.cancel()
        super().on_close()

    def end(self, code: int, reason: str) -> None:
        """Close with a sentence."""
        cut = reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
        self.close(code, cut)


class EventsSocket(NosSocket):
    """The backend's events, as JSON text."""

    @ws_authenticated
    @authorized("read", resource="nos")  # type: ignore[untyped-decorator]
    async def get(self) -> None:  # type: ignore[override]
        """Open it; `interval_s` says how often a snapshot of the status comes, 0.1 to 2 s."""
        try:
            wanted_s = float(self.get_query_argument("interval_s", "0.5"))
        except ValueError:
            raise web.HTTPError(400, "interval_s expects seconds") from None
        self.interval_s = min(max(wanted_s, MIN_INTERVAL_S), MAX_INTERVAL_S)
        await super().get()

    async def open(self) -> None:
        """Start to tell."""
        super().open()
        self.task = asyncio.create_task(self._tell())

    def on_message(self, message: str | bytes) -> None:
        """Ignore what the page says: there is nothing to say."""

    async def _tell(self) -> None:
        try:
            client = await self.app.link.client()
            async with client.events(status_interval_s=self.interval_s) as feed:
                async for event in feed:
                    await self.write_message(json.dumps(asdict(event)))
        except NosError as error:
            self.end(BROKEN, f"backend: {error}")
        except WebSocketClosedError:
            return
        else:
            self.end(GOING_AWAY, "backend: ended the stream")


class StreamSocket(NosSocket):
    """Frames of one page through one model, over a gRPC stream of its own; the newest frame goes first.

    The page's first message is text: `{"method": "...", "arguments": {...}}`. Frames both ways are as in
    `nos_jupyter.frames`.
    """

    @ws_authenticated
    @authorized("execute", resource="nos.infer")  # type: ignore[untyped-decorator]
    async def get(self, name: str) -> None:  # type: ignore[override]
        """Open it, unless too many are open."""
        if self.app.num_streams >= self.app.max_streams:
            raise web.HTTPError(429, f"{self.app.max_streams} streams are open already")
        await super().get(name)

    async def open(self, name: str) -> None:
        """Wait for the page to say which method."""
        super().open(name)
        self.model = name
        self.app.num_streams += 1
        #: None before the page said which method.
        self.frames: AsyncStream | None = None
        #: The page's number of each frame under way, by the stream's.
        self.numbers: dict[int, Any] = {}

    async def on_message(self, message: str | bytes) -> None:
        """Take the first text, then frames."""
        try:
            if isinstance(message, str):
                await self._begin(json.loads(message))
            else:
                await self._send(message)
        except NosError as error:
            self.end(WRONG if isinstance(error, InvalidRequestError) else BROKEN, str(error))
        except (ValueError, KeyError, TypeError):
            self.end(WRONG, "the first message is JSON with method and arguments")

    async def _begin(self, wanted: dict[str, Any]) -> None:
        handle = await self.app.link.ask(lambda client: client.model(self.model))
        method = handle.method(str(wanted["method"]))
        self.parameter = frames.image_parameter(handle.spec, method.info)
        self.arguments = dict(wanted.get("arguments") or {})
        self.arguments.pop(self.parameter, None)
        if self.frames is None:
            self.frames = method.stream(policy="latest", ordered=False)
            self.task = asyncio.create_task(self._answer(self.frames))

    async def _send(self, message: bytes) -> None:
        header, payload = frames.unpack(message)
        if self.frames is None:
            raise InvalidRequestError("a frame came before the first text message")
        try:
            image = Media.from_bytes(payload)
            number = await self.frames.send(**{self.parameter: image}, **self.arguments)
        except InvalidRequestError as error:
            await self.write_message(
                frames.pack(*frames.failure(error, header.get("seq"))), binary=True
            )
            return
        self.numbers[number] = header.get("seq")

    async def _answer(self, stream: AsyncStream) -> None:
        try:
            async for result in stream:
                header, payload = frames.answer(result, self.numbers.pop(result.seq, None))
                await self.write_message(frames.pack(header, payload), binary=True)
        except NosError as error:
            self.end(BROKEN, f"backend: {error}")
        except WebSocketClosedError:
            return
        finally:
            with contextlib.suppress(NosError):
                await stream.close()

    def on_close(self) -> None:
        """End the stream."""
        self.app.num_streams -= 1
        super().on_close()
