"""PyAV, which only video and audio need."""

from __future__ import annotations

from typing import Any

from nos.errors import ConfigError


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
