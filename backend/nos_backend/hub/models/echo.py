"""`nos/echo`: gives back what it gets, to try a connection with."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class Echo:
    """Gives back what it gets: arrays of any type, images, text, lists and dicts.

    Example:
        >>> client.model("nos/echo")({"a": [1, 2.5, "three"]})
        {'a': [1, 2.5, 'three']}
    """

    def __call__(self, x: Any) -> Any:
        """Return `x`."""
        return x

    def digest(self, x: Any) -> str:
        """Return the sha256 of the bytes of `x`, in hex.

        Args:
            x: An array (its row-major bytes), bytes, text (as UTF-8), or a list or dict of such: the bytes of
                the members (of a dict: each key, then its value), one after the other.
        """
        digest = hashlib.sha256()
        _feed(digest, x)
        return digest.hexdigest()

    def count(self, n: int) -> Iterator[int]:
        """Give 0, 1, 2, ... one by one.

        Args:
            n: How many.
        """
        yield from range(n)

    def repeat(self, x: Any, n: int) -> Iterator[Any]:
        """Give `x` again and again.

        Args:
            x: Anything.
            n: How often.
        """
        for _ in range(n):
            yield x


def _feed(digest: Any, x: Any) -> None:
    """Add the bytes of `x`."""
    if isinstance(x, torch.Tensor):
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(x, np.ndarray):
        digest.update(x.tobytes())
    elif isinstance(x, str):
        digest.update(x.encode())
    elif isinstance(x, dict):
        for key, value in x.items():
            _feed(digest, key)
            _feed(digest, value)
    elif isinstance(x, list | tuple):
        for value in x:
            _feed(digest, value)
    elif isinstance(x, bytes | bytearray | memoryview):
        digest.update(x)
    else:
        digest.update(str(x).encode())
