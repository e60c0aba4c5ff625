"""Making executors, and learning how they end: by a fork server, or spawned.

Everything here belongs to one event loop. A spawned executor dies with the thread that spawned it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from nos.errors import ExecutorLostError

import nos_backend
from nos_backend.worker.bounds import confined

if TYPE_CHECKING:
    from nos_backend.executor.confinement import Bounds

logger = logging.getLogger(__name__)

#: torch is imported on the way; a cold disk and busy cores make that slow.
START_TIMEOUT_S: Final = 120.0
_CLOSE_TIMEOUT_S: Final = 2.0
_PACKET_BYTES: Final = 1 << 16

#: What an executor may inherit of our environment, and what it may not whatever its name.
_ENVIRONMENT: Final = frozenset(
    {"HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV"}
)
_ENVIRONMENT_PREFIXES: Final = ("CUDA_", "HF_", "LC_", "NCCL_", "NVIDIA_", "TORCH", "XDG_CACHE_")
_SECRET_PARTS: Final = ("KEY", "PASSWORD", "SECRET", "TOKEN")
#: How model hubs are reached; inherited unless there are credentials in it.
_NETWORK: Final = frozenset(
    {"ALL_PROXY", "CURL_CA_BUNDLE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE"}
    | {"SSL_CERT_DIR", "SSL_CERT_FILE"}
)
_THREAD_VARIABLES: Final = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Process(Protocol):
    """A child, however it was made."""

    pid: int
    #: Resolves with an exit code or signal in words.
    exited: asyncio.Future[str]

    def kill(self) -> None:
        """End it at once; once it has ended this does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessRequest:
    """What it takes to make an executor: its options and its descriptors."""

    name: str
    device: str
    num_threads: int
    max_image_pixels: int
    python: str
    socket_fd: int
    input_fd: int
    output_fd: int
    log_fd: int
    bounds: Bounds
    """What it is held to; of a fork server that is held to them already, nothing more."""
    rules_fd: int | None = None
    """Rules of landlock beside them."""


class ForkServer:
    """Makes executors by forking a process that has torch imported; one per Python environment."""

    def __init__(self, process: _Spawned, peer: socket.socket) -> None:
        self._process = process
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ids = itertools.count(1)
        self._requests: dict[int, asyncio.Future[_Forked]] = {}
        #: Children that have not ended.
        self._children: dict[int, _Forked] = {}
        self._is_closed = False
        self._loop.add_reader(peer, self._receive)

    @classmethod
    async def start(
        cls,
        python: str = sys.executable,
        bounds: Bounds | None = None,
        rules_fd: int | None = None,
    ) -> ForkServer:
        """Start one and wait until it has imported torch.

        Args:
            python: The interpreter.
            bounds: What it is held to, with its executors; None: nothing.
            rules_fd: Rules of landlock beside them; closed here.

        Raises:
            ExecutorLostError: If it ends or does not get ready; executors can be spawned without it.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        command = [python, "-P", "-m", "nos_backend.executor.forkserver", str(theirs.fileno())]
        fds: tuple[int, ...] = (theirs.fileno(),)
        if bounds is not None:
            command = confined(command, bounds, rules_fd)
            fds += () if rules_fd is None else (rules_fd,)
        with theirs:
            try:
                process = _Spawned(command, fds, None, python)
            finally:
                if rules_fd is not None:
                    os.close(rules_fd)
        self = cls(process, ours)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._ready
        except (ExecutorLostError, TimeoutError) as error:
            await self.close()
            raise ExecutorLostError("the fork server did not start", got=str(error)) from error
        except asyncio.CancelledError:
            process.kill()
            await self.close()
            raise
        return self

    @property
    def is_alive(self) -> bool:
        """Whether it can make executors."""
        return not self._is_closed

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    async def close(self) -> None:
        """End it and all executors that it made."""
        self._end()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await asyncio.shield(self._process.exited)
        except TimeoutError:
            self._process.kill()
            await self._process.exited

    async def fork(self, request: ProcessRequest) -> _Forked:
        """Make an executor.

        Raises:
            ExecutorLostError: If the fork server cannot.
        """
        if self._is_closed:
            raise ExecutorLostError("the fork server has ended")
        request_id = next(self._ids)
        future: asyncio.Future[_Forked] = self._loop.create_future()
        self._requests[request_id] = future
        message = {
            "op": "fork",
            "id": request_id,
            "name": request.name,
            "device": request.device,
            "num_threads": request.num_threads,
            "max_image_pixels": request.max_image_pixels,
            "bounds": request.bounds.write(),
        }
        fds = [request.socket_fd, request.input_fd, request.output_fd, request.log_fd]
        if request.rules_fd is not None:
            fds.append(request.rules_fd)
        try:
            socket.send_fds(self._peer, [json.dumps(message).encode()], fds)
            async with asyncio.timeout(START_TIMEOUT_S):
                return await future
        except (OSError, TimeoutError) as error:
            raise ExecutorLostError("the fork server does not answer", got=str(error)) from error
        finally:
            self._requests.pop(request_id, None)

    def _receive(self) -> None:
        while not self._is_closed:
            try:
                packet, fds, _, _ = socket.recv_fds(self._peer, _PACKET_BYTES, 1)
            except BlockingIOError:
                return
            except OSError:
                packet, fds = b"", []
            if not packet:
                self._end()
                return
            message = json.loads(packet)
            if message["op"] == "forked" and not fds:
                # We have no descriptors left: a child that we cannot hold must not live.
                self._end()
                return
            self._handle(message, fds)

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        match message["op"]:
            case "ready":
                self._ready.set_result(None)
            case "forked":
                child = _Forked(message["pid"], fds[0], self._loop.create_future())
                self._children[child.pid] = child
                future = self._requests.get(message["id"])
                if future is None or future.done():
                    child.kill()
                else:
                    future.set_result(child)
            case "failed":
                future = self._requests.get(message["id"])
                if future is not None and not future.done():
                    future.set_exception(ExecutorLostError(message["message"]))
            case "exited":
                child_that_ended = self._children.pop(message["pid"], None)
                if child_that_ended is not None:
                    code = os.waitstatus_to_exitcode(message["status"])
                    child_that_ended.exited.set_result(_in_words(code))

    def _end(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._peer)
        self._peer.close()
        error = ExecutorLostError("the fork server has ended")
        if not self._ready.done():
            self._ready.set_exception(error)
        for future in self._requests.values():
            if not future.done():
                future.set_exception(error)
        for child in self._children.values():
            child.kill()
            child.exited.set_result("ended with its fork server")
        self._children.clear()


class _Forked:
    """An executor that a fork server made, and reaps."""

    def __init__(self, pid: int, pidfd: int, exited: asyncio.Future[str]) -> None:
        self.pid = pid
        self.exited = exited
        self._pidfd = pidfd
        exited.add_done_callback(lambda _: os.close(pidfd))

    def kill(self) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class _Spawned:
    """A process that we started and reap."""

    def __init__(
        self, command: list[str], fds: tuple[int, ...], output_fd: int | None, python: str
    ) -> None:
        self._popen = (
            subprocess.Popen(  # blocks for milliseconds; a thread's child would die with it
                command,
                stdin=subprocess.DEVNULL,
                stdout=output_fd,
                stderr=output_fd,
                pass_fds=fds,
                env=_scrubbed_environment(python),
                process_group=0,
            )
        )
        self.pid = self._popen.pid
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[str] = self._loop.create_future()
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    def kill(self) -> None:
        if not self.exited.done():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Before it is reaped its number cannot be anybody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.exited.set_result(_in_words(self._popen.wait()))


async def make_process(request: ProcessRequest, forkserver: ForkServer | None) -> Process:
    """Make an executor; one that a living fork server cannot make is spawned.

    Raises:
        ExecutorLostError: If the fork server is dead: its caller makes a new one, or asks without.
    """
    if forkserver is not None:
        try:
            return await forkserver.fork(request)
        except ExecutorLostError as error:
            if not forkserver.is_alive:
                raise
            logger.warning("spawning executor %s: %s", request.name, error)
    options = {
        "--name": request.name,
        "--device": request.device,
        "--num-threads": request.num_threads,
        "--max-image-pixels": request.max_image_pixels,
        "--socket-fd": request.socket_fd,
        "--input-fd": request.input_fd,
        "--output-fd": request.output_fd,
    }
    arguments = [f"{option}={value}" for option, value in options.items()]
    command = [request.python, "-P", "-m", "nos_backend.executor", *arguments]
    fds = (request.socket_fd, request.input_fd, request.output_fd)
    return _Spawned(
        confined(command, request.bounds, request.rules_fd),
        fds if request.rules_fd is None else (*fds, request.rules_fd),
        request.log_fd,
        request.python,
    )


def _scrubbed_environment(python: str) -> dict[str, str]:
    """Return what an executor may know of our environment: nothing secret, and one thread."""
    kept = {name: value for name, value in os.environ.items() if _is_harmless(name, value)}
    if python == sys.executable:
        # This package may be elsewhere than the others; an environment of a model's has it by itself.
        kept["PYTHONPATH"] = str(Path(nos_backend.__path__[0]).parent)
    kept["PYTHONNOUSERSITE"] = "1"
    kept.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    kept["OMP_WAIT_POLICY"] = "PASSIVE"
    return kept


def _is_harmless(name: str, value: str) -> bool:
    if name.upper() in _NETWORK:
        return "@" not in value
    is_known = name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    return is_known and not any(part in name for part in _SECRET_PARTS)


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
