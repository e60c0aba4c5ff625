"""A model that attacks its server. Each method says what came of it, and never does lasting harm."""

import os
import signal
import time
from pathlib import Path

#: More than an executor's user may have, and what a machine stands all the same.
NUM_FORKS = 1100


class Attacker:
    """Registered like any other model; it knows the paths and processes that it is told."""

    def read(self, path: str) -> str:
        """Read a file, or the memory or environment of a process."""
        try:
            with Path(path).open("rb") as file:
                return f"read {len(file.read(64))} bytes"
        except OSError as error:
            return type(error).__name__

    def write(self, path: str) -> str:
        """Change a file."""
        try:
            with Path(path).open("ab"):
                return "opened for writing"
        except OSError as error:
            return type(error).__name__

    def environment(self) -> str:
        """Show what it was given."""
        return "\n".join(f"{name}={value}" for name, value in os.environ.items())

    def kill(self, pid: int) -> str:
        """Signal a process of the server's; 0 only asks whether it could."""
        try:
            os.kill(pid, 0)
        except OSError as error:
            return type(error).__name__
        return "could be signalled"

    def fork(self) -> str:
        """Fork until that fails, and leave the children to themselves, in sessions of their own."""
        pids: list[int] = []
        try:
            while len(pids) < NUM_FORKS:
                if not (pid := os.fork()):
                    os.setsid()
                    time.sleep(600)
                    os._exit(0)
                pids.append(pid)
        except OSError as error:
            said = f"{type(error).__name__} before {NUM_FORKS} processes"
        else:
            said = f"{len(pids)} processes"
        for pid in pids[1:]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return said

    def daemon(self) -> int:
        """Leave a process behind that belongs to nobody; returns its pid."""
        reader, writer = os.pipe()
        if not os.fork():
            os.setsid()
            if not (pid := os.fork()):
                time.sleep(600)
            os.write(writer, str(pid).encode())
            os._exit(0)
        os.wait()
        return int(os.read(reader, 20))

    def fill(self, size: int) -> str:
        """Take memory and touch it."""
        try:
            taken = bytearray(size)
        except MemoryError:
            return "MemoryError"
        taken[::4096] = b"x" * len(taken[::4096])
        return f"took {len(taken)} bytes"

    def overwrite(self) -> str:
        """Shrink the memory that it shares with the worker, then write all over it."""
        refused = written = 0
        for entry in Path("/proc/self/fd").iterdir():
            try:
                if "memfd" not in str(entry.readlink()):
                    continue
                os.ftruncate(int(entry.name), 0)
            except PermissionError:
                refused += 1
                os.pwrite(int(entry.name), b"\xff" * (1 << 20), 0)
                written += 1
            except OSError:
                continue
        return f"{refused} not shrunk, {written} overwritten"

    def babble(self) -> str:
        """Say nonsense to the worker, on every socket that it holds."""
        for entry in Path("/proc/self/fd").iterdir():
            try:
                if "socket" in str(entry.readlink()):
                    os.write(int(entry.name), b"\xff\xff\xff\x7f" + os.urandom(4096))
            except OSError:
                continue
        return "said"

    def spin(self) -> None:
        """Hold the interpreter for ever."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
