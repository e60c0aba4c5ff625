"""Models whose answers or prints are out of the ordinary."""

import sys
from typing import Annotated

import nos
import numpy as np
import torch


@nos.model(name="fake/big")
class Big:
    """Gives large arrays."""

    def __call__(self, num_bytes: int, fill: int = 1) -> np.ndarray:
        """Return so many bytes of `fill`."""
        return np.full(num_bytes, fill, np.uint8)


@nos.model(name="fake/wrong-rows")
class WrongRows:
    """Returns one row less than it got."""

    def __call__(
        self, rows: Annotated[torch.Tensor, "float32[batch, width]"]
    ) -> Annotated[torch.Tensor, "float32[batch, width]"]:
        return rows[1:]


@nos.model(name="fake/chatty")
class Chatty:
    """Prints a lot."""

    def __call__(self, num_lines: int, width: int = 80) -> int:
        """Print so many lines to each of stdout and stderr."""
        for index in range(num_lines):
            print(f"{index} ".ljust(width, "x"))
            sys.stderr.write(f"{index} ".ljust(width, "y") + "\n")
        return num_lines
