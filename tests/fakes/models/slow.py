"""Models that take their time."""

import os
import time

import nos


@nos.model(name="fake/slow")
class Slow:
    """Sleeps."""

    def __call__(self, s: float) -> float:
        """Sleep for `s` seconds, and return them."""
        time.sleep(s)
        return s

    def pid(self) -> int:
        """Return the process id of its executor."""
        return os.getpid()

    def spin(self, s: float) -> int:
        """Keep a core busy for `s` seconds, and return how often it looked at the clock."""
        end, count = time.monotonic() + s, 0
        while time.monotonic() < end:
            count += 1
        return count


@nos.model(name="fake/slow-alone", isolation="process")
class SlowAlone(Slow):
    """Sleeps, in an executor of its own."""


@nos.model(name="fake/slow-load", isolation="process")
class SlowLoad:
    """Takes two seconds to load."""

    def __init__(self) -> None:
        time.sleep(2)

    def __call__(self, x: int) -> int:
        return x


@nos.model(name="fake/impatient", isolation="process", call_timeout_s=1.0)
class Impatient(Slow):
    """May run for one second per call."""
