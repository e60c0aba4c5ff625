"""What packages a model's author asks for: a list, or a file of requirements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nos.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence


def packages(env: Sequence[str] | str | Path) -> list[str]:
    """Return the lines of an environment; the server checks them.

    Args:
        env: Packages, as in `["opencv-python-headless==4.*"]`, or the path of a requirements file.

    Raises:
        InvalidRequestError: If it is neither, or the file cannot be read or is one of conda.
    """
    if not isinstance(env, str | Path):
        lines = list(env)
        if not all(isinstance(line, str) for line in lines):
            raise InvalidRequestError("an environment's package is no text", "env", "texts")
        return lines
    path = Path(env)
    if path.suffix in {".yml", ".yaml"}:
        raise InvalidRequestError(
            "environments of conda are not built by this server",
            "env",
            "packages of PyPI, or a requirements file",
            str(path),
            "List its pip packages: conda's own are not on PyPI by the same names",
        )
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            "the requirements file cannot be read",
            "env",
            'a list, as in ["einops"], or the path of a requirements file',
            f"{path}: {error}",
        ) from error
