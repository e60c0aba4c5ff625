"""Models that raise."""

import builtins

import nos


@nos.model(name="fake/raise")
class Raise:
    """Raises what it is asked to."""

    def __call__(self, type_name: str, text: str) -> None:
        """Raise the builtin exception of that name."""
        raise getattr(builtins, type_name)(text)

    def odd(self, x: int) -> int:
        """Return an odd number; raise ValueError for an even one."""
        if x % 2 == 0:
            raise ValueError(f"{x} is even")
        return x

    def unsendable(self) -> object:
        """Return something that has no wire form."""
        return object()

    def chained(self, x: int) -> int:
        """Raise from another error, two functions deep."""
        try:
            return self.odd(x)
        except ValueError as error:
            raise RuntimeError("deeper") from error


@nos.model(name="fake/broken-init", isolation="process")
class BrokenInit:
    """Cannot be loaded."""

    def __init__(self) -> None:
        raise OSError("weights are missing")

    def __call__(self, x: int) -> int:
        return x
