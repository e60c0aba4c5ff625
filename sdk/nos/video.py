"""Video: files and cameras as frames, and frames as files.

    >>> from nos import video
    >>> edges = client.model("nos/edges")
    >>> with video.Video("in.mp4") as frames, video.Writer("out.mp4", frames.rate_hz) as out:
    ...     for result in edges.map(frames, progress=True):
    ...         out.write(result)

A frame is a uint8 array (height, width, 3), red first. Takes PyAV, the extra `video` of the distribution.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nos._av import FileWriter, import_av
from nos.errors import (
    InvalidRequestError,
    InvalidTensorError,
    NosError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from nos.types import MethodInfo

Frame = np.ndarray[Any, np.dtype[np.uint8]]

#: A sink should keep up with its stream; encoders that know no presets ignore it.
_ENCODER_OPTIONS: Final = {"preset": "veryfast"}
#: What FFmpeg calls a camera, by platform.
_CAMERA_FORMATS: Final = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
#: Of sources that do not say.
DEFAULT_RATE_HZ: Final = 30.0
#: Rates are written as fractions; NTSC's 30000/1001 is one.
_MAX_DENOMINATOR: Final = 1001
_RGB: Final = 3


def frame_size(method: MethodInfo) -> tuple[int, int] | None:
    """Return the height and width of the frames that a method declares, None if it takes any.

    A method that takes `Annotated[torch.Tensor, "uint8[480, 640, 3]"]` declares 480 and 640.
    """
    first = method.parameters[0] if method.parameters else None
    if first is None or first.shape is None or len(first.shape) != _RGB:
        return None
    height, width, channels = first.shape
    if not (isinstance(height, int) and isinstance(width, int)) or channels != _RGB:
        return None
    return height, width


class _Source:
    """Frames that FFmpeg reads. Iterate over it in one thread, once."""

    def __init__(
        self,
        place: str,
        size: tuple[int, int] | None,
        input_format: str | None,
        options: dict[str, str],
        refusal: type[NosError],
    ) -> None:
        self._place = place
        self._size = size
        av = self._av = import_av("video")
        try:
            self._container = av.open(place, format=input_format, options=options)
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", "") or str(error)
            raise refusal(
                f"no video can be read there: {reason}", "video", "a video", place
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise InvalidRequestError("there are no frames in it", "video", "a video", place)
        stream = self._container.streams.video[0]
        if stream.codec_context is None:
            self._container.close()
            raise InvalidRequestError("nothing here decodes it", "video", "a video", place)
        stream.thread_type = "AUTO"
        #: Frames per second, as the source says.
        self.rate_hz = float(stream.average_rate or stream.base_rate or DEFAULT_RATE_HZ)
        #: Height and width of its frames.
        self.size = size or (stream.codec_context.height, stream.codec_context.width)
        self._num_announced = int(stream.frames)

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames in order.

        Raises:
            InvalidRequestError: If it holds none, or is broken; says after how many frames.
        """
        num_read = 0
        try:
            for picture in self._container.decode(video=0):
                yield self._to_array(picture)
                num_read += 1
        except self._av.FFmpegError as error:
            raise InvalidRequestError(
                f"the video is broken after {num_read} frames", "video", "", self._place
            ) from error
        if not num_read:
            raise InvalidRequestError("there are no frames in it", "video", "a video", self._place)

    def _to_array(self, picture: Any) -> Frame:
        if self._size is not None and self._size != (picture.height, picture.width):
            height, width = self._size
            picture = picture.reformat(width=width, height=height)
        array: Frame = picture.to_ndarray(format="rgb24")
        return array

    def close(self) -> None:
        """Let go of the file or camera; idempotent."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Video(_Source):
    """The frames of a video file.

    Args:
        path: The file, of any kind that FFmpeg knows.
        size: Height and width to which frames are scaled; None leaves them. `frame_size` says what a model
            wants.

    Raises:
        InvalidRequestError: If it is no video, or has no frames.
        ConfigError: If PyAV is not installed.
    """

    def __init__(self, path: str | Path, *, size: tuple[int, int] | None = None) -> None:
        super().__init__(str(path), size, None, {}, InvalidRequestError)

    def __length_hint__(self) -> int:
        """Return how many frames the file says it has; 0 if it does not say."""
        return self._num_announced


class Camera(_Source):
    """The frames of a camera, as they come; it has no end.

    Send them over `model.stream(policy="latest")`: a model that is slower than the camera then gets the
    newest frame each time, and the camera is never held up.

    Args:
        device: Its number, or what FFmpeg calls it.
        size: Height and width to which frames are scaled; None leaves them.
        rate_hz: Frames per second that it is asked for; None takes what it gives.
        input_format: FFmpeg's name for the kind of device, by default that of this platform.

    Raises:
        UnavailableError: If there is no such camera, or another program has it.
        ConfigError: If PyAV is not installed.
    """

    def __init__(
        self,
        device: int | str = 0,
        *,
        size: tuple[int, int] | None = None,
        rate_hz: float | None = None,
        input_format: str = "",
    ) -> None:
        place = str(device)
        if isinstance(device, int):
            place = f"/dev/video{device}" if sys.platform == "linux" else f"video={device}"
            place = str(device) if sys.platform == "darwin" else place
        options = {"framerate": str(rate_hz)} if rate_hz else {}
        kind = input_format or _CAMERA_FORMATS.get(sys.platform, "v4l2")
        super().__init__(place, size, kind, options, UnavailableError)


class Writer(FileWriter):
    """A video file in the making. Its size is that of the first frame.

    Args:
        path: The file; its suffix says of which kind. An existing one is replaced.
        rate_hz: Frames per second.

    Raises:
        InvalidRequestError: If it cannot be written there, or is no kind of video file.
        ConfigError: If PyAV is not installed.
    """

    def __init__(self, path: str | Path, rate_hz: float = DEFAULT_RATE_HZ) -> None:
        self._rate = Fraction(rate_hz).limit_denominator(_MAX_DENOMINATOR)
        super().__init__(path, "video", "out.mp4")
        self._shape: tuple[int, ...] = ()
        self.num_frames = 0

    def write(self, frame: Any) -> None:
        """Append a frame.

        Args:
            frame: uint8 (height, width, 3) or (height, width); of bools, True is white.

        Raises:
            InvalidTensorError: If it is no picture, or has another size than the first.
        """
        picture = self._to_picture(frame)
        self._check_open()
        if self._stream is None:
            self._open_stream(picture)
        picture.pts = self.num_frames
        picture.time_base = 1 / self._rate
        self._encode(picture)
        self.num_frames += 1

    def _open_stream(self, picture: Any) -> None:
        codec = self._container.default_video_codec
        stream = self._add_stream(codec, rate=self._rate, options=_ENCODER_OPTIONS)
        stream.width, stream.height = picture.width, picture.height
        # Colour at half the resolution plays everywhere, but has no odd sizes.
        is_even = picture.width % 2 == 0 and picture.height % 2 == 0
        wanted = "yuv420p" if is_even else "yuv444p"
        formats = [it.name for it in stream.codec_context.codec.video_formats or ()]
        stream.pix_fmt = wanted if not formats or wanted in formats else formats[0]
        self._stream = stream

    def _to_picture(self, frame: Any) -> Any:
        array = np.asarray(frame)
        if array.dtype == bool:
            array = array.astype(np.uint8) * np.uint8(255)
        is_grey = array.ndim == _RGB - 1
        is_picture = (
            array.dtype == np.uint8
            and array.size
            and (is_grey or (array.ndim == _RGB and array.shape[2] == _RGB))
        )
        if not is_picture or self._shape not in {(), array.shape}:
            raise InvalidTensorError(
                "the frame does not fit into the video",
                "frame",
                f"uint8 {self._shape or '(height, width, 3) or (height, width)'}",
                f"{array.dtype} {array.shape}" if array.ndim else type(frame).__name__,
            )
        self._shape = array.shape
        form = "gray" if is_grey else "rgb24"
        return self._av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=form)
