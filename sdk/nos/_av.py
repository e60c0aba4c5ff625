"""PyAV, which only video and audio need, and what files of both have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nos.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from typing import Self


def import_av(what: str) -> Any:
    """Return PyAV's module.

    Raises:
        ConfigError: If it is not installed; names `what` needs it.
    """
    try:
        import av  # an extra: its wheel holds all of FFmpeg
    except ImportError as error:
        raise ConfigError(
            f"{what} needs PyAV", "av", hint="Install it: pip install 'nos-inference[video]'"
        ) from error
    return av


class FileWriter:
    """A file in the making, of one stream that is opened when it is known what goes into it.

    Args:
        path: The file; its suffix says of which kind. An existing one is replaced.
        what: `video` or `audio`.
        example: A name of such a file, for errors.

    Raises:
        InvalidRequestError: If it cannot be written there, or is no kind of such a file.
        ConfigError: If PyAV is not installed.
    """

    def __init__(self, path: str | Path, what: str, example: str) -> None:
        av = self._av = import_av(what)
        self._path, self._what, self._example = str(path), what, example
        #: None before the first write.
        self._stream: Any = None
        try:
            if not Path(path).parent.is_dir():
                raise FileNotFoundError("there is no such folder")
            self._container = av.open(self._path, "w")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Write what is left and close the file; idempotent. Nothing is left of one that got nothing."""
        container, self._container = self._container, None
        if container is None:
            return
        if self._stream is None:
            container.close()
            Path(self._path).unlink(missing_ok=True)
            return
        try:
            container.mux(self._stream.encode())
        except (self._av.FFmpegError, OSError) as error:
            raise self._refused(error) from error
        finally:
            container.close()

    def _check_open(self) -> None:
        if self._container is None:
            raise InvalidRequestError(f"the {self._what} is closed", "path", got=self._path)

    def _add_stream(self, codec: str, **options: Any) -> Any:
        try:
            return self._container.add_stream(codec, **options)
        except (self._av.FFmpegError, ValueError) as error:
            raise self._refused(error) from error

    def _encode(self, frame: Any) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> InvalidRequestError:
        reason = getattr(error, "strerror", "") or str(error)
        return InvalidRequestError(
            f"no {self._what} can be written there: {reason}",
            "path",
            f"a file as {self._example}",
            self._path,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
