"""`nos stream`: files, a video or a camera in, a line for each result or a video out."""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nos import video
from nos._cli_values import parse_input
from nos.client import MAX_IN_FLIGHT
from nos.errors import InvalidRequestError, NosError, OverloadedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nos._stream import Policy
    from nos.client import Method, Stream
    from nos.types import MethodInfo, Result

_VIDEOS: Final = frozenset(
    {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"}
)
_CAMERA: Final = "camera"


class Source:
    """What goes into the stream.

    Args:
        names: Files of one frame each, or one video file, or `camera` or `camera:1`.
        method: What takes the frames.

    Raises:
        InvalidRequestError: If a video is mixed with others, or cannot be read.
        UnavailableError: If there is no such camera.
    """

    def __init__(self, names: Sequence[str], method: MethodInfo) -> None:
        self._names = names
        self._method = method
        self._frames: video.Video | video.Camera | None = None
        kind, _, number = names[0].partition(":")
        #: Whether frames come in their own time and those that are late are dropped.
        self.is_live = kind == _CAMERA
        is_video = self.is_live or Path(names[0]).suffix.lower() in _VIDEOS
        if is_video and len(names) > 1:
            raise InvalidRequestError(
                "a video is streamed alone", "SOURCES", names[0], f"{len(names)} sources"
            )
        size = video.frame_size(method)
        if self.is_live:
            device = int(number) if number.isdecimal() else number or 0
            self._frames = video.Camera(device, size=size)
        elif is_video:
            self._frames = video.Video(names[0], size=size)
        #: Frames per second, for a video of the results.
        self.rate_hz = self._frames.rate_hz if self._frames else video.DEFAULT_RATE_HZ

    def __iter__(self) -> Iterator[Any]:
        if self._frames is not None:
            return iter(self._frames)
        return (parse_input(name, self._method) for name in self._names)

    def __length_hint__(self) -> int:
        """Return how many frames there will be; 0 if that is not known."""
        return operator.length_hint(self._names if self._frames is None else self._frames)

    def name(self, seq: int) -> str:
        """Return how a frame is called, by its number."""
        return self._names[seq - 1] if self._frames is None else f"frame {seq}"

    def close(self) -> None:
        """Let go of the file or camera."""
        if self._frames is not None:
            self._frames.close()


def run(
    method: Method, source: Source, out: Path | None, say: Callable[[int, Result], None]
) -> int:
    """Stream everything.

    Args:
        method: What runs on each frame.
        source: The frames; closed by the caller.
        out: The video that is made of the results; None for none.
        say: Told each result and the number of its frame, unless it became a frame of `out`.

    Returns:
        How many frames failed. Those that a live stream drops are no failures.

    Raises:
        InvalidRequestError: If a frame or the video cannot be read, or `out` not be written.
        InvalidTensorError: If a result is no picture for `out`.
    """
    num_failed = num_dropped = 0
    policy: Policy = "latest" if source.is_live else "block"
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(video.Writer(out, source.rate_hz)) if out else None
        frames = stack.enter_context(method.stream(max_pending=MAX_IN_FLIGHT, policy=policy))
        sender = _Sender(frames, source)
        sender.start()
        for result in _progress(frames, operator.length_hint(source)):
            if source.is_live and isinstance(result.error, OverloadedError):
                num_dropped += 1
            elif writer is not None and result.error is None:
                writer.write(result.value)
            else:
                num_failed += result.error is not None
                say(result.seq, result)
        sender.check()
    if num_dropped:
        sys.stderr.write(
            f"nos: {num_dropped} frames were dropped: the model is slower than they come\n"
        )
    return num_failed


def _progress(frames: Stream, total: int) -> Iterator[Result]:
    if not sys.stderr.isatty():
        yield from frames
        return
    from tqdm import tqdm

    with tqdm(total=total or None, unit="frame", file=sys.stderr) as bar:
        for result in frames:
            yield result
            if not result.more:
                bar.update()


class _Sender(threading.Thread):
    """Sends frames while the results are read."""

    def __init__(self, frames: Stream, source: Source) -> None:
        super().__init__(name="nos-sender", daemon=True)
        self._frames, self._source = frames, source
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            for frame in self._source:
                self._frames.send(frame)
        except (NosError, OSError) as error:
            self._error = error
        finally:
            self._frames.finish()

    def check(self) -> None:
        """Raise what stopped the sending."""
        self.join()
        if self._error is not None:
            raise self._error
