"""Generators, in all their ways to end."""

import time
from collections.abc import Iterator
from pathlib import Path

import nos


@nos.model(name="fake/stream")
class Stream:
    """Gives items one by one."""

    def count(self, n: int, pause_s: float = 0.0) -> Iterator[int]:
        """Give 0 .. n-1, with a pause before each."""
        for index in range(n):
            time.sleep(pause_s)
            yield index

    def fail_after(self, n: int) -> Iterator[int]:
        """Give 0 .. n-1, then raise ValueError."""
        yield from range(n)
        raise ValueError(f"after {n}")

    def tell_end(self, path: str) -> Iterator[int]:
        """Count for ever; write how far it came to `path` when it is closed."""
        index = 0
        try:
            while True:
                yield index
                index += 1
                time.sleep(0.01)
        finally:
            Path(path).write_text(str(index))
