"""Live frames through a model: of the page's camera or a video file, or of the notebook."""

from __future__ import annotations

import sys
import threading
import time
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import anywidget
import nos
from nos.errors import NosError
from nos.types import Media

from nos_jupyter import frames, page
from nos_jupyter.following import Follower, start_thread
from nos_jupyter.rendering import describe
from nos_jupyter.stills import Still
from nos_jupyter.views import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from nos import Event, Result, Stream

    from nos_jupyter.views import MimeBundle

#: Frames of the notebook that pages may be behind.
WINDOW = 16
#: How long a page that says nothing holds them up: on ipykernel 6 a cell that runs stops all that it says.
_SILENCE_S = 1.0
_STATUS_S = 2.0
#: Of the picture that a saved notebook shows, and of the line under it.
_MAX_STILL_BYTES, _MAX_STILL_TEXT = 200 << 10, 200
_JPEG = b"\xff\xd8\xff"
#: How long a cell that computes keeps other threads waiting while frames go through the kernel. Each frame
#: waits some eight times; Python's own 5 ms gave 11 frames per second beside such a cell.
_SWITCH_S = 0.0005


class _QuickSwitches:
    """Python's switch interval is short while at least one player is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Players inside; under the lock.
        self._num_inside = 0
        #: What to restore behind the last.
        self._usual_s = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._usual_s, _SWITCH_S))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                sys.setswitchinterval(self._usual_s)


_quick_switches = _QuickSwitches()


class StreamPlayer(anywidget.AnyWidget):
    """Plays frames through a model and shows what comes out, with frames per second, latency and drops.

    Frames of the page go over the Jupyter server where its extension uses the same backend, so that a busy
    kernel does not matter; else through this widget's own messages.

    Args:
        model: Its name; one of its parameters is an image.
        frames_of_notebook: Images to play in place of the page's camera: arrays or `nos.Media`.
        method: Which method.
        fps: The most frames per second.
        source: The client to use, which stays the caller's; or a function that connects.
    """

    _esm = page.script("page", "camera", "results", "stream_player")
    _css = page.style("page", "calls", "stream_player")

    def __init__(
        self,
        model: str,
        frames_of_notebook: Iterable[Any] | None = None,
        *,
        method: str = "__call__",
        fps: float = 30.0,
        source: nos.Client | Callable[[], nos.Client] = nos.connect,
    ) -> None:
        super().__init__()
        self._model = model
        self._method = method
        self._frames = frames_of_notebook
        self._fps = fps
        self._changed = threading.Condition()
        #: The stream of the page that plays; None while none does.
        self._stream: Stream | None = None
        #: Where the frames go, and the page's number of each that is under way.
        self._parameter = ""
        self._numbers: dict[int, Any] = {}
        #: Of frames of the notebook: how many the page said that it drew.
        self._num_drawn = 0
        #: What a page showed last: a JPEG, and a line with its figures; both may be empty.
        self._last = b"", ""
        self._still = Still(self._picture)
        self.on_msg(self._on_message)
        self._follower: Follower[Event] = Follower(
            source,
            lambda client: client.events(status_interval_s=_STATUS_S),
            lambda _: None,
            self._tell,
        )

    def close(self) -> None:
        """Stop playing and take the widget off the page."""
        self._end()
        self._follower.close()
        super().close()

    def _tell(self, message: dict[str, Any]) -> None:
        self.send(message)
        if message["name"] == "live":
            self._introduce()

    def _introduce(self) -> None:
        """Tell pages what they play, and at which backend."""
        try:
            address = self._follower.client().address
        except NosError:
            return
        self.send(
            {
                "type": "player",
                "model": self._model,
                "method": self._method,
                "source": "page" if self._frames is None else "kernel",
                "address": address,
                "fps": self._fps,
            }
        )

    def _on_message(
        self, _: object, content: dict[str, Any], buffers: Sequence[memoryview]
    ) -> None:
        kind = content.get("type")
        if kind == "frames":
            for header, payload in zip(content["headers"], buffers, strict=False):
                self._take_frame(header, bytes(payload))
        elif kind == "begin":
            start_thread(self._begin, name="nos-play")
        elif kind == "end":
            self._end()
        elif kind == "ack":
            with self._changed:
                self._num_drawn = max(self._num_drawn, int(content["seq"]))
                self._changed.notify_all()
        elif kind == "still":
            self._keep(content, buffers)
        else:
            self._follower.on_page(kind)

    def _begin(self) -> None:
        try:
            handle = self._follower.client().model(self._model)
            method = handle.method(self._method)
            parameter = frames.image_parameter(handle.spec, method.info)
            # Pages send several frames together, and no more than the model takes soon.
            policy = "drop_oldest" if self._frames is None else "block"
            stream = method.stream(policy=policy, ordered=False)
        except NosError as error:
            self.send({"type": "ended", **describe(error)})
            return
        with self._changed:
            self._parameter, self._stream = parameter, stream
            self._num_drawn = 0
        if self._frames is not None:
            start_thread(self._play, stream, self._frames, name="nos-frames")
        try:
            with _quick_switches:
                for result in stream:
                    self._show(result)
        except NosError as error:
            self.send({"type": "ended", **describe(error)})
        else:
            self.send({"type": "ended"})
        finally:
            stream.close()

    def _show(self, result: Result) -> None:
        with self._changed:
            seq = self._numbers.pop(result.seq, result.seq)
        header, payload = frames.answer(result, seq)
        self.send({"type": "frame", **header}, [payload])

    def _take_frame(self, header: dict[str, Any], payload: bytes) -> None:
        """Send a frame of the page, where the stream is there; one that is no image fails alone."""
        with self._changed:
            stream = self._stream
        if stream is None:
            self.send({"type": "frame", "seq": header.get("seq"), "dropped": True}, [b""])
            return
        try:
            number = stream.send(**{self._parameter: Media.from_bytes(payload)})
        except NosError as error:
            failed, _ = frames.failure(error, header.get("seq"))
            self.send({"type": "frame", **failed}, [b""])
            return
        with self._changed:
            self._numbers[number] = header.get("seq")

    def _play(self, stream: Stream, images: Iterable[Any]) -> None:
        """Send the frames of the notebook, no faster than pages draw them."""
        try:
            for number, image in enumerate(images, 1):
                if not self._is_wanted(stream, number):
                    return
                time.sleep(1 / self._fps)
                stream.send(**{self._parameter: image})
            stream.finish()
        except NosError as error:
            self.send({"type": "ended", **describe(error)})

    def _is_wanted(self, stream: Stream, number: int) -> bool:
        """Wait until pages are near a frame, and say whether the stream still plays."""
        with self._changed:
            self._changed.wait_for(lambda: number - self._num_drawn <= WINDOW, _SILENCE_S)
            return self._stream is stream

    def _end(self) -> None:
        with self._changed:
            stream, self._stream = self._stream, None
            self._numbers.clear()
        if stream is not None:
            stream.close()

    def _keep(self, content: dict[str, Any], buffers: Sequence[memoryview]) -> None:
        """Keep what a page showed last, and how it went."""
        picture = bytes(buffers[0]) if buffers else b""
        if len(picture) > _MAX_STILL_BYTES or not picture.startswith(_JPEG):
            picture = b""
        self._last = picture, str(content.get("text", ""))[:_MAX_STILL_TEXT]
        self._still.change()

    def _picture(self) -> MimeBundle:
        picture, said = self._last
        command = f"%nos stream {self._model}"
        bundle = Message(f"{command}: {said or 'live frames while the notebook runs'}")
        html = bundle._repr_mimebundle_()["text/html"]
        if picture:
            source = f"data:image/jpeg;base64,{b64encode(picture).decode()}"
            html = f'<img alt="the last frame" src="{source}"><div>{html}</div>'
        return {"text/plain": bundle.text, "text/html": html}

    def _repr_mimebundle_(self, **options: Any) -> Any:
        data, metadata = super()._repr_mimebundle_(**options) or ({}, {})
        return {**data, **self._still.show()}, metadata
