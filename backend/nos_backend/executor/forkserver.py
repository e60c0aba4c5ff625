"""`python -m nos_backend.executor.forkserver FD`: makes executors in milliseconds, by forking.

It has torch imported and has run no operation of it: a child of a process that ran one hangs at its own
first operation. For the same reason it has one thread, which is checked before every fork. It ends with
its socket and takes its children with it. What an executor leaves behind ends when one of them does.

Messages are packets, JSON, with descriptors beside them::

    worker -> fork server   fork    id, name, device, num_threads,
                                    max_image_pixels, bounds
                                                                      + socket, input, output, log, rules?
    fork server -> worker   ready
                            forked  id, pid                           + pidfd
                            failed  id, message
                            exited  pid, status                       as waitpid gives it
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch  # noqa: F401 - to have it imported is what this process is for

from nos_backend.executor import loop
from nos_backend.executor.confinement import Bounds, enter
from nos_backend.executor.process import (
    Start,
    adopt_orphans,
    close_all_but,
    num_threads_now,
    redirect_output,
    set_title,
)

PACKET_BYTES: Final = 1 << 16
_NUM_DESCRIPTORS: Final = 5


class ForkServer:
    """The single loop of the process."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._poll = select.poll()
        self._poll.register(peer, select.POLLIN)
        #: pidfd to pid of every child that was not reaped.
        self._children: dict[int, int] = {}

    def run(self) -> Start | None:
        """Serve until the socket ends; in a child, return what it starts with."""
        self._send({"op": "ready"})
        while True:
            for fd, _ in self._poll.poll():
                if fd != self._peer.fileno():
                    self._reap(fd)
                    continue
                packet, fds, _, _ = socket.recv_fds(self._peer, PACKET_BYTES, _NUM_DESCRIPTORS)
                if not packet:
                    return None
                start = self._fork(json.loads(packet), fds)
                if start is not None:
                    return start

    def close(self) -> None:
        """End the children."""
        for pidfd, pid in self._children.items():
            _kill_group(pid)
            os.waitpid(pid, 0)
            os.close(pidfd)
        self._children.clear()
        self._end_orphans()

    def _fork(self, request: dict[str, Any], fds: list[int]) -> Start | None:
        """Make a child; returns there with its start, and here with None."""
        threads = num_threads_now()
        if threads != 1:
            message = f"the fork server has {threads} threads"
            self._send({"op": "failed", "id": request["id"], "message": message})
            _close(fds)
            return None
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            return _become(request, fds, parent)
        _close(fds)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        self._send({"op": "forked", "id": request["id"], "pid": pid}, pidfd)
        return None

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        # Before it is reaped its number cannot be anybody else's.
        _kill_group(pid)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        self._end_orphans()
        self._send({"op": "exited", "pid": pid, "status": status})

    def _end_orphans(self) -> None:
        """End what executors started that outlived its parent; whose it was is not known any more."""
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        known = set(self._children.values())
        while children.exists():  # not in every kernel
            orphans = {int(pid) for pid in children.read_text().split()} - known
            if not orphans:
                return
            for pid in orphans:
                _kill_group(pid)
            for pid in orphans:
                os.waitpid(pid, 0)

    def _send(self, message: dict[str, Any], *fds: int) -> None:
        with suppress(ConnectionError):  # then the next receive says that the worker is gone
            socket.send_fds(self._peer, [json.dumps(message).encode()], fds)


def main() -> None:
    """Serve on the inherited socket; in a child, run the executor."""
    set_title("nos:forkserver")
    adopt_orphans()
    with socket.socket(fileno=int(sys.argv[1])) as peer:
        peer.set_inheritable(False)
        gc.collect()
        # What is here now is never garbage; left alone, its pages stay shared with the children.
        gc.freeze()
        server = ForkServer(peer)
        start = server.run()
        if start is None:
            server.close()
            return
        peer.detach()
    loop.run(start)


def _become(request: dict[str, Any], fds: list[int], parent: int) -> Start:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    socket_fd, input_fd, output_fd, log_fd, *rules = fds
    redirect_output(log_fd)
    close_all_but((socket_fd, input_fd, output_fd, *rules))
    enter(Bounds.read(request["bounds"]), rules[0] if rules else None, parent)
    np.random.seed()  # models may use the old generator, and no two the same numbers
    return Start(
        name=request["name"],
        device=request["device"],
        num_threads=request["num_threads"],
        max_image_pixels=request["max_image_pixels"],
        socket_fd=socket_fd,
        input_fd=input_fd,
        output_fd=output_fd,
    )


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


if __name__ == "__main__":
    main()
