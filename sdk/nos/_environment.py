"""What packages a model's author asks for: a list, a file of requirements, or one of conda."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nos.errors import InvalidRequestError
from nos.wire.environment import CONDA_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence


def packages(env: Sequence[str] | str | Path) -> list[str]:
    """Return the lines of an environment; the server checks them.

    Args:
        env: Packages, as in `["opencv-python-headless==4.*"]`, or the path of a requirements file or of an
            `environment.yml` of conda, whose text is a line of its own.

    Raises:
        InvalidRequestError: If it is neither, or the file cannot be read.
    """
    if not isinstance(env, str | Path):
        lines = list(env)
        if not all(isinstance(line, str) for line in lines):
            raise InvalidRequestError("an environment's package is no text", "env", "texts")
        return lines
    path = Path(env)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            "the file of packages cannot be read",
            "env",
            'a list, as in ["einops"], or the path of a requirements file or an environment.yml',
            f"{path}: {error}",
        ) from error
    return [CONDA_FILE + text] if path.suffix in {".yml", ".yaml"} else text.splitlines()
