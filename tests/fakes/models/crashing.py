"""A model that takes its process down."""

import ctypes
import os
import signal
import time

import nos


@nos.model(name="fake/crash", isolation="process", call_timeout_s=60.0)
class Crash:
    """Ends, hangs or leaks when asked to; answers otherwise."""

    def __init__(self) -> None:
        self.leaked: list[bytearray] = []

    def __call__(self, x: int) -> int:
        """Return `x`: it is alive."""
        return x

    def pid(self) -> int:
        """Return the process id of its executor."""
        return os.getpid()

    def exit(self, code: int = 3) -> None:
        """End at once, without cleaning up."""
        os._exit(code)

    def leave(self) -> None:
        """Raise SystemExit, as `sys.exit()` does."""
        raise SystemExit(3)

    def segfault(self) -> None:
        """Read address 0."""
        ctypes.string_at(0)

    def kill(self) -> None:
        """SIGKILL itself."""
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self) -> None:
        """Never return, and hear no signal but SIGKILL."""
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        while True:
            time.sleep(60)

    def leak(self, num_bytes: int) -> int:
        """Keep so many bytes more, and return how many it has kept."""
        self.leaked.append(bytearray(num_bytes))
        return sum(map(len, self.leaked))
