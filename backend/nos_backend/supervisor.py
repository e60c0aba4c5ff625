"""`nos serve`: starts gateway, scheduler and workers, restarts what dies, ends all of it in order.

One thread and one `select`: idle, it runs nothing. Children die with it, even when it is killed. Needs Linux.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import selectors
import shutil
import signal
import socket
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from nos.errors import ConfigError, InternalError, NosError, UnavailableError
from nos.wire import local

from nos_backend.children import Child, adopt_orphans, kill_orphans, reap_orphans
from nos_backend.cluster.certificates import TlsFiles
from nos_backend.cluster.probe import check_scheduler
from nos_backend.control.crew import CREW_NAME, Crew
from nos_backend.executor.confinement import TEMPORARY_NAME
from nos_backend.own_memory import hide_memory
from nos_backend.public_tls import from_here, public_tls, reachable
from nos_backend.roster import HOMES_NAME, plan_children, readable_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nos_backend.config import Settings
    from nos_backend.public_tls import PublicTls

_logger = logging.getLogger(__name__)

#: What the gateway exits with when it had no client for `idle_shutdown_s`.
IDLE_EXIT_CODE: Final = 75

_START_S: Final = 90.0
_START_POLL_S: Final = 0.05
#: A child that ends so often before the server was ever ready will not get better.
_MAX_START_FAILURES: Final = 3
_ROTATE_S: Final = 60.0
#: How long each kind of child may take to drain, in the order in which they are ended.
_DRAIN_S: Final = {"gateway": 13.0, "worker": 13.0, "scheduler": 5.0}


class Supervisor:
    """A server and its processes; `run` is all of its life."""

    def __init__(
        self,
        settings: Settings,
        *,
        owner_pid: int = 0,
        on_ready: Callable[[local.BackendRecord], None],
    ) -> None:
        """Prepare nothing yet.

        Args:
            settings: What it is told.
            owner_pid: End when this process is gone; 0 for no owner.
            on_ready: Called once, when the server answers.
        """
        self._settings = settings
        self._owner_pid = owner_pid
        self._on_ready = on_ready
        self._run_dir = settings.state_dir / "run"
        self._token_file = settings.state_dir / local.TOKEN_NAME
        self._children: list[Child] = []
        self._dashboard_url = ""
        #: What the gateway's port shows; None for one without TLS.
        self._public: PublicTls | None = None
        self._selector = selectors.DefaultSelector()
        #: Signals that ask for the end, so far; the second one ends at once.
        self._num_stops = 0
        self._is_stopping = False
        #: Set by a signal when the crew's file was written anew.
        self._is_crew_changed = False
        #: All workers that there may be, by name.
        self._workers: dict[str, Child] = {}
        self._rotate_at_s = time.monotonic() + _ROTATE_S

    def run(self) -> None:
        """Serve until a signal, the owner's end, or idleness; the main thread is occupied meanwhile.

        Raises:
            ConfigError: If a port is taken, a folder cannot be written, or there is no such device.
            UnavailableError: If another server lives in the state folder, or no scheduler is where it was
                said to be.
            InternalError: If a process does not start; it names the process and its last words.
        """
        hide_memory()
        with contextlib.ExitStack() as stack:
            self._lock(stack)
            stack.enter_context(self._watched_signals())
            adopt_orphans()
            stack.callback(self._clean)
            try:
                self._prepare()
            except NosError:  # one that says more than the OSError that it also is
                raise
            except OSError as error:
                raise _cannot_write(self._settings.state_dir, error) from error
            stack.callback(self._stop)
            self._watch_owner(stack)
            for child in self._children:
                child.start()
            address = self._await_ready()
            if self._num_stops == 0:
                self._announce(address)
            while self._num_stops == 0:
                self._poll(self._next_timer_s())

    # Before anything starts.

    def _lock(self, stack: contextlib.ExitStack) -> None:
        folder = self._settings.state_dir
        try:
            stack.enter_context(local.lock(folder, "serve", wait=False))
        except BlockingIOError:
            raise _already_runs(folder) from None
        except OSError as error:
            raise _cannot_write(folder, error) from error

    def _prepare(self) -> None:
        folder = self._settings.state_dir
        self._public = public_tls(self._settings)
        plan = plan_children(self._settings, self._run_dir, self._token_file, self._public)
        shutil.rmtree(self._run_dir, ignore_errors=True)  # a killed server left it
        self._run_dir.mkdir(mode=0o700)
        (folder / local.LOG_FOLDER_NAME).mkdir(mode=0o700, exist_ok=True)
        self._prepare_folders()
        if self._settings.scheduler:
            check_scheduler(self._settings.scheduler, plan.tls)
        elif plan.tls is not None:
            TlsFiles.create(plan.tls.folder)
        self._write_token()
        self._children, self._dashboard_url = plan.children, plan.dashboard_url
        self._workers = plan.workers
        crew = Crew(
            supervisor_pid=os.getpid(), names=list(plan.workers), num_wanted=plan.num_workers
        )
        crew.write(self._run_dir / CREW_NAME)

    def _prepare_folders(self) -> None:
        """Make the folders that executors read; where owners have users, let these in, and no further."""
        folder = self._settings.state_dir
        has_users = os.geteuid() == 0 and self._settings.confinement != "off"
        for readable in readable_paths(folder):
            readable.mkdir(mode=0o700, exist_ok=True)
            if has_users:
                readable.chmod(0o711)
        if has_users:
            folder.chmod(folder.stat().st_mode | 0o111)
        self._empty_homes()

    def _empty_homes(self) -> None:
        for temporary in (self._settings.state_dir / HOMES_NAME).glob(f"*/{TEMPORARY_NAME}"):
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_token(self) -> None:
        self._token_file.unlink(missing_ok=True)
        descriptor = os.open(self._token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"nos_{secrets.token_urlsafe(32)}\n")

    # While it runs.

    @contextlib.contextmanager
    def _watched_signals(self) -> Iterator[None]:
        """Have SIGTERM, SIGINT, SIGCHLD and SIGUSR1 wake `_poll`."""
        reader, writer = socket.socketpair()
        with reader, writer, self._selector:
            reader.setblocking(False)
            writer.setblocking(False)
            self._selector.register(reader, selectors.EVENT_READ)
            before_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            before = {
                number: signal.signal(number, self._take_signal)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1)
            }
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(before_fd)

    def _take_signal(self, number: int, _: object) -> None:
        if number == signal.SIGUSR1:
            self._is_crew_changed = True
        elif number != signal.SIGCHLD:
            self._num_stops += 1

    def _watch_owner(self, stack: contextlib.ExitStack) -> None:
        if not self._owner_pid:
            return
        try:
            owner = os.pidfd_open(self._owner_pid)
        except OSError:
            raise ConfigError(
                "no such owner", "owner_pid", "the pid of a running process", str(self._owner_pid)
            ) from None
        stack.callback(os.close, owner)
        self._selector.register(owner, selectors.EVENT_READ, data="owner")

    def _poll(self, timeout_s: float) -> None:
        """Wait for the next event, and do what it asks for."""
        for key, _ in self._selector.select(max(0.0, timeout_s)):
            if key.data == "owner":
                _logger.info("the owner, process %d, is gone", self._owner_pid)
                self._selector.unregister(key.fileobj)
                self._num_stops += 1
            else:
                with contextlib.suppress(BlockingIOError):
                    os.read(key.fd, 4096)
        for child in list(self._children):
            if child.reap():
                self._take_end(child)
        reap_orphans({child.process.pid for child in self._children if child.process})
        now_s = time.monotonic()
        if not self._is_stopping:
            if self._is_crew_changed:
                self._change_crew()
            for child in self._children:
                if child.start_at_s <= now_s:
                    child.start()
        if now_s >= self._rotate_at_s:
            self._rotate_at_s = now_s + _ROTATE_S
            for child in self._children:
                child.rotate_log()

    def _take_end(self, child: Child) -> None:
        if self._is_stopping:
            return
        if child.name == "gateway" and child.exit_code == IDLE_EXIT_CODE:
            _logger.info("no client for %g s", self._settings.idle_shutdown_s)
            self._num_stops += 1
            return
        if child.is_leaving:
            _logger.info("%s has left", child.name)
            self._children.remove(child)
            return
        _logger.warning(
            "%s ended with exit code %s: %s", child.name, child.exit_code, child.last_words()
        )

    def _change_crew(self) -> None:
        """Start the workers that are wanted; those that are not are left to end by themselves."""
        self._is_crew_changed = False
        wanted = set(Crew.read(self._run_dir / CREW_NAME).wanted)
        for name, child in self._workers.items():
            child.is_leaving = name not in wanted
            if name in wanted and child not in self._children:
                self._children.append(child)
                child.start()

    def _next_timer_s(self) -> float:
        """Return the seconds until a child starts again or logs are looked at."""
        timers = [self._rotate_at_s, *(child.start_at_s for child in self._children)]
        return min(timers) - time.monotonic()

    def _await_ready(self) -> str:
        """Return the gateway's address once it and every worker serve; empty if asked to end before."""
        deadline_s = time.monotonic() + _START_S
        while self._num_stops == 0:
            waited_for = [child for child in self._children if not _is_ready(child)]
            if not waited_for:
                with contextlib.suppress(FileNotFoundError):  # it has just ended
                    return (self._run_dir / "gateway.ready").read_text(encoding="utf-8").strip()
            # One that ran before we came is not about to get its plane.
            most = 1 if self._settings.scheduler else _MAX_START_FAILURES
            for child in self._children:
                if child.num_failures >= most:
                    raise _did_not_start(child, f"ended {child.num_failures} times")
            if time.monotonic() > deadline_s:
                late = waited_for[0] if waited_for else self._children[-1]
                raise _did_not_start(late, f"was not ready within {_START_S:.0f} s")
            self._poll(_START_POLL_S)
        return ""

    def _announce(self, address: str) -> None:
        remote_address = ""
        if self._public is not None:
            remote_address = self._public.url(reachable(address))
            address = self._public.url(from_here(address))
        record = local.BackendRecord(
            address=address,
            remote_address=remote_address,
            pid=os.getpid(),
            token_file=str(self._token_file),
            dashboard_url=self._dashboard_url,
            version=version("nos-inference"),
            started_s=time.time(),
            start_ticks=local.start_ticks(os.getpid()),
        )
        local.write_backend(self._settings.state_dir, record)
        _logger.info("ready at %s", address)
        self._on_ready(record)

    # The end.

    def _stop(self) -> None:
        """End the gateway, then the workers, then the scheduler; after a second signal all at once."""
        self._is_stopping = True
        _logger.info("ending")
        num_stops = self._num_stops
        local.remove_backend(self._settings.state_dir, os.getpid())
        for kind, patience_s in _DRAIN_S.items():
            ending = [child for child in self._children if child.name.partition("-")[0] == kind]
            for child in ending:
                child.send(signal.SIGTERM)
            deadline_s = time.monotonic() + patience_s
            while any(child.is_running for child in ending) and self._num_stops <= max(
                1, num_stops
            ):
                if time.monotonic() >= deadline_s:
                    break
                self._poll(deadline_s - time.monotonic())
            for child in ending:
                if child.is_running:
                    _logger.warning("%s did not end in time and is killed", child.name)
                    child.send(signal.SIGKILL)
        while any(child.is_running for child in self._children):
            self._poll(_START_POLL_S)
        kill_orphans()

    def _clean(self) -> None:
        shutil.rmtree(self._run_dir, ignore_errors=True)
        self._empty_homes()
        self._token_file.unlink(missing_ok=True)


def _is_ready(child: Child) -> bool:
    return child.is_running and (child.ready_file is None or child.ready_file.exists())


def _did_not_start(child: Child, what: str) -> NosError:
    return InternalError(
        f"{child.name} {what}",
        got=child.last_words() or "no output",
        hint=f"Its log is {child.log_path}",
    )


def _cannot_write(folder: Path, error: OSError) -> NosError:
    return ConfigError(
        "cannot write the state folder",
        "state_dir",
        "a folder that this user may write",
        f"{folder}: {error.strerror}",
        "Choose another with --state-dir",
    )


def _already_runs(folder: Path) -> NosError:
    record = local.read_backend(folder)
    if record is None:
        return UnavailableError(
            f"another backend is starting or ending in {folder}", hint="Try again"
        )
    return UnavailableError(
        f"a backend already runs at {record.address} (pid {record.pid}) with the state folder {folder}",
        hint="Use it with nos.connect(), end it with `nos stop`, or choose another --state-dir",
    )


def describe(record: local.BackendRecord, token: str, start_s: float, log_folder: Path) -> str:
    """Return what a user needs to know of a fresh server: one screen."""
    fields = dataclasses.asdict(record)
    elsewhere = (
        "From elsewhere: tunnel to the address, then set NOS_ADDRESS and NOS_TOKEN_FILE"
        if not record.remote_address
        else f"""From elsewhere, with a copy of the token's file:
  nos.connect("{record.remote_address}", token_file="token")"""
    )
    return f"""NOS {record.version} is ready after {start_s:.1f} s

  address     {fields["address"]}
  token       {token}
              kept in {record.token_file}
  dashboard   {record.dashboard_url or "none of ours"}
  logs        {log_folder}

Connect on this machine with  nos.connect()  or  nos status
{elsewhere}
Stop with  nos stop  or Ctrl+C
"""
