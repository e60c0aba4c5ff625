"""Audio: files as samples, and samples as files.

    >>> from nos import audio
    >>> with audio.Audio("talk.mp3", rate_hz=16_000, num_channels=1) as blocks:
    ...     for words in model.map(blocks, progress=True):
    ...         print(words)

A block is a float32 array of samples between -1 and 1 (PCM): (num_samples,) where there is one channel, else
(num_samples, num_channels). Takes PyAV, the extra `video` of the distribution.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nos._av import FileWriter, import_av
from nos.errors import InvalidRequestError, InvalidTensorError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

Samples = np.ndarray[Any, np.dtype[np.float32]]

_MAX_RATE_HZ: Final = 1_000_000
_LAYOUTS: Final = {1: "mono", 2: "stereo"}


class Audio:
    """The samples of an audio file, or of a video's sound, block by block.

    Iterate over it in one thread, once.

    Args:
        path: The file, of any kind that FFmpeg knows.
        rate_hz: Samples per second and channel to which it is resampled; None leaves them.
        num_channels: 1 or 2, to which channels are mixed; None leaves them.
        block_s: Length of a block in seconds; the last one is as long as what is left.

    Raises:
        InvalidRequestError: If it holds no audio, or an argument is out of range.
        ConfigError: If PyAV is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rate_hz: int | None = None,
        num_channels: int | None = None,
        block_s: float = 1.0,
    ) -> None:
        if rate_hz is not None:
            _check_rate(rate_hz)
        if num_channels is not None and num_channels not in _LAYOUTS:
            raise InvalidRequestError(
                "wrong num_channels", "num_channels", "1, 2 or None", str(num_channels)[:80]
            )
        if not 0 < block_s < math.inf:
            raise InvalidRequestError("wrong block_s", "block_s", "seconds above 0", str(block_s))
        self._place = str(path)
        av = self._av = import_av("audio")
        try:
            self._container = av.open(self._place)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._refused(getattr(error, "strerror", "") or str(error)) from error
        stream = next(iter(self._container.streams.audio), None)
        if stream is None or stream.codec_context is None or not stream.codec_context.sample_rate:
            self._container.close()
            raise self._refused("there is no sound in it that anything here decodes")
        #: Samples per second and channel of its blocks.
        self.rate_hz: int = rate_hz or stream.codec_context.sample_rate
        #: Of its blocks.
        self.num_channels: int = num_channels or len(stream.codec_context.layout.channels)
        self._layout = _LAYOUTS.get(num_channels or 0, stream.codec_context.layout.name)
        self._block_size = max(1, round(block_s * self.rate_hz))
        duration_s = float((stream.duration or 0) * (stream.time_base or 0))
        self._num_announced = math.ceil(duration_s * self.rate_hz / self._block_size)

    def __length_hint__(self) -> int:
        """Return how many blocks the file says it has; 0 if it does not say."""
        return self._num_announced

    def __iter__(self) -> Iterator[Samples]:
        """Yield the blocks in order.

        Raises:
            InvalidRequestError: If it holds none, or is broken; says after how many seconds.
        """
        resampler = self._av.AudioResampler("flt", self._layout, self.rate_hz)
        fifo = self._av.AudioFifo()
        num_read = 0
        try:
            for frame in self._decoded():
                for piece in resampler.resample(frame):
                    # Where files say when a piece is to be heard, gaps are not filled.
                    piece.pts = None
                    num_read += piece.samples
                    fifo.write(piece)
                for block in fifo.read_many(self._block_size):
                    yield self._to_array(block)
        except (self._av.FFmpegError, ValueError) as error:
            raise InvalidRequestError(
                f"the audio is broken after {num_read / self.rate_hz:.1f} s",
                "audio",
                "",
                self._place,
            ) from error
        if not num_read:
            raise self._refused("there are no samples in it")
        if (rest := fifo.read()) is not None:
            yield self._to_array(rest)

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._container.close()

    def _decoded(self) -> Iterator[Any]:
        """Yield what is decoded, and at last None, which empties a resampler."""
        yield from self._container.decode(audio=0)
        yield None

    def _to_array(self, frame: Any) -> Samples:
        samples: Samples = frame.to_ndarray().reshape(-1, self.num_channels)
        return samples[:, 0].copy() if self.num_channels == 1 else samples

    def _refused(self, reason: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"no audio can be read there: {reason}", "audio", "an audio file", self._place
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(
    path: str | Path, *, rate_hz: int | None = None, num_channels: int | None = None
) -> Samples:
    """Return all samples of a file.

    Args:
        path: As of `Audio`.
        rate_hz: As of `Audio`.
        num_channels: As of `Audio`.

    Returns:
        (num_samples,) where there is one channel, else (num_samples, num_channels).

    Raises:
        InvalidRequestError: As `Audio`.
        ConfigError: If PyAV is not installed.
    """
    with Audio(path, rate_hz=rate_hz, num_channels=num_channels) as blocks:
        return np.concatenate(list(blocks))


class Writer(FileWriter):
    """An audio file in the making. Its channels are those of the first block.

    Args:
        path: The file; its suffix says of which kind (`.wav`, `.flac`, `.mp3`). An existing one is replaced.
        rate_hz: Samples per second and channel.

    Raises:
        InvalidRequestError: If it cannot be written there, or is no kind of audio file.
        ConfigError: If PyAV is not installed.
    """

    def __init__(self, path: str | Path, rate_hz: int) -> None:
        _check_rate(rate_hz)
        super().__init__(path, "audio", "out.wav")
        self._rate_hz = rate_hz
        self._num_channels = 0
        self.num_samples = 0

    def write(self, samples: Any) -> None:
        """Append a block.

        Args:
            samples: Floats (num_samples,) or (num_samples, num_channels), of 1 or 2 channels; what is beyond
                -1 and 1 is cut.

        Raises:
            InvalidTensorError: If it is none, or has other channels than the first.
        """
        self._check_open()
        array = np.asarray(samples)
        wide = array[:, None] if array.ndim == 1 else array
        fits = array.dtype.kind == "f" and wide.ndim == len(("samples", "channels"))
        num_channels = wide.shape[1] if fits else 0
        if num_channels not in _LAYOUTS or self._num_channels not in {0, num_channels}:
            raise InvalidTensorError(
                "the block does not fit into the file",
                "samples",
                f"floats (num_samples, {self._num_channels or '1 or 2 channels'})",
                f"{array.dtype} {array.shape}",
            )
        if not wide.size:
            return
        if self._stream is None:
            codec, layout = self._container.default_audio_codec, _LAYOUTS[num_channels]
            self._stream = self._add_stream(codec, rate=self._rate_hz, layout=layout)
            self._num_channels = num_channels
        packed = np.clip(wide, -1, 1).astype(np.float32, copy=False).reshape(1, -1)
        frame = self._av.AudioFrame.from_ndarray(
            np.ascontiguousarray(packed), format="flt", layout=_LAYOUTS[num_channels]
        )
        frame.sample_rate, frame.pts = self._rate_hz, self.num_samples
        self._encode(frame)
        self.num_samples += len(wide)


def _check_rate(rate_hz: object) -> None:
    if not (isinstance(rate_hz, int) and 0 < rate_hz <= _MAX_RATE_HZ):
        raise InvalidRequestError(
            "wrong rate_hz", "rate_hz", f"1 to {_MAX_RATE_HZ} samples per second", str(rate_hz)[:80]
        )
