"""What executors are held to on this machine: the strongest that it has, and what that means in words."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import stat
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import nos_backend
from nos_backend.executor import confinement
from nos_backend.executor.confinement import Bounds, folders_above, landlock_version, make_rules

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_logger = logging.getLogger(__name__)

_OFF: Final = "off"
_PROBE_S: Final = 20.0
#: Run under trial bounds: what an executor imports and reads has to be within its reach.
_PROBE: Final = "import os, sys; [os.stat(path + '/.') for path in sys.argv[1:]]"

#: Where users of owners begin, and how many there are; the first that this user namespace has is taken.
_USERS: Final = ((0x6E000000, 1 << 24), (40000, 20000))
#: Users of owners, users that read as root, landlock: from the strongest to what is always there.
_TIERS: Final = (
    (True, False, True),
    (True, True, True),
    (True, False, False),
    (False, False, True),
    (False, False, False),
)
#: Where programs of any user write.
_SCRATCH: Final = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - names of places
_DEVICES: Final = Path("/dev")
_FOLDERS_OF_DEVICES: Final = frozenset({"dri", "infiniband", "mqueue", "nvidia-caps", "pts", "shm"})
_COMPUTING_DEVICES: Final = ("kfd", "nvidia")
#: Processes and threads of one owner's user.
_NUM_PROCESSES: Final = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundsOptions:
    """What is to be kept from executors, and where they may go."""

    is_off: bool = False
    """Whether executors are ordinary processes of the server's user."""
    closed: Sequence[Path] = ()
    """Files and folders that hold secrets."""
    readable: Sequence[Path] = ()
    """Folders within closed ones that models are read from."""
    homes: Path | None = None
    """Where each owner's user gets a home; None: owners have no users of their own."""
    memory_bytes: int | None = None
    """Main memory of its own that one executor may have; None means no limit."""


class Confinement:
    """Gives each owner's executors their bounds. Belongs to one event loop.

    Finding out what the machine has starts up to four short processes.
    """

    def __init__(self, options: BoundsOptions) -> None:
        self._options = options
        self._first_uid, self._num_uids = _find_users()
        self.has_users = self.has_landlock = False
        #: Whether these users can only run because they read what root may.
        self._reads_as_root = False
        closed = [Path(os.path.realpath(path)) for path in options.closed if path.exists()]
        self._closed = [*closed, *_root_devices()] if os.geteuid() == 0 else closed
        #: By home, what the last rules were made for and their descriptor.
        self._rules: dict[str, tuple[tuple[int, ...], int]] = {}
        #: Why there is nothing stronger; empty if there is not.
        self.lacks = ""
        #: Whether root loses its capabilities, where owners have no users.
        self._is_held = not options.is_off
        if not options.is_off:
            self._find()
        _logger.info("executors: %s%s", self.tier, f" ({self.lacks})" if self.lacks else "")

    @property
    def tier(self) -> str:
        """What holds them, in words."""
        user = "own user that reads as root" if self._reads_as_root else "own user"
        parts = [user] * self.has_users + ["landlock"] * self.has_landlock
        return " + ".join(parts) or ("own process" if self._is_held else "off")

    def bounds(self, owner: str) -> Bounds:
        """Return what an owner's executors are held to; makes the owner's home.

        Raises:
            OSError: If the home cannot be made.
        """
        memory_bytes = self._options.memory_bytes or 0
        homes = self._options.homes
        if not self.has_users or homes is None:
            return Bounds(is_held=self._is_held, memory_bytes=memory_bytes)
        uid = self._uid(owner)
        home = homes / str(uid)
        homes.mkdir(mode=0o711, exist_ok=True)
        with suppress(FileExistsError):
            home.mkdir(mode=0o700)
            os.chown(home, uid, uid)
        return Bounds(
            uid=uid,
            reads_as_root=self._reads_as_root,
            home=str(home),
            memory_bytes=memory_bytes,
            num_processes=_NUM_PROCESSES,
        )

    def rules(self, bounds: Bounds) -> int | None:
        """Return a descriptor of landlock's rules as of now, the caller's to close; None without landlock."""
        if not self.has_landlock:
            return None
        seen = tuple(_changed_ns(folder) for folder in sorted(folders_above(self._closed)))
        known, rules = self._rules.get(bounds.home, ((), -1))
        if seen != known:
            if rules >= 0:
                os.close(rules)
            writable = [Path(bounds.home)] if bounds.home else []
            # Root writes anywhere, with or without capabilities.
            is_read_only = os.geteuid() == 0 and not bounds.uid
            if is_read_only:
                above = folders_above(self._closed)
                places = (*_SCRATCH, *_DEVICES.iterdir())
                writable += [path for path in places if str(path) not in above]
            rules = make_rules(
                self._closed,
                self._options.readable,
                [path for path in writable if path not in self._closed],
                is_read_only=is_read_only,
            )
            self._rules[bounds.home] = seen, rules
        return os.dup(rules)

    def describe(self) -> dict[str, Any]:
        """Return it in plain types, as the worker's status has it."""
        return {"tier": self.tier, "covers": list(self._covers()), "lacks": self.lacks}

    def _covers(self) -> Iterator[str]:
        yield "the server's memory and environment cannot be read, no program gives more rights"
        if self.has_landlock:
            yield "the server's files are closed, nothing outside can be signalled"
        if self.has_users:
            yield "other owners' files and processes are closed, processes are counted"
        if self._options.memory_bytes:
            yield f"{self._options.memory_bytes} bytes of memory for one executor"

    def _uid(self, owner: str) -> int:
        """Return an owner's user: the same for all workers of a server, others for another server's."""
        named = f"{self._options.homes}\0{owner}".encode()
        digest = int.from_bytes(hashlib.sha256(named).digest()[:8], "big")
        return self._first_uid + digest % self._num_uids

    def _find(self) -> None:
        """Take the strongest that works here."""
        has_users = os.geteuid() == 0 and self._options.homes is not None and self._num_uids > 0
        has_landlock = landlock_version() > 0
        lacks = [] if has_landlock else ["the kernel has no landlock"]
        if os.geteuid() != 0:
            lacks.append("only root gives owners users of their own")
        for self.has_users, self._reads_as_root, self.has_landlock in _TIERS:
            if self.has_users <= has_users and self.has_landlock <= has_landlock:
                problem = self._probe()
                if not problem:
                    break
                lacks.append(f"{self.tier}: {problem}")
        else:
            self._is_held = False
        self.lacks = "; ".join(lacks)

    def _probe(self) -> str:
        """Try the bounds on a process that reads what executors read; returns what is wrong."""
        rules = None
        try:
            bounds = self.bounds("")
            rules = self.rules(bounds)
            command = confined(
                [sys.executable, "-I", "-S", "-c", _PROBE, *map(str, self._needed())],
                bounds,
                rules,
            )
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_PROBE_S,
                check=False,
                pass_fds=() if rules is None else (rules,),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        finally:
            if rules is not None:
                os.close(rules)
        said = done.stderr.strip().splitlines()
        return said[-1] if done.returncode and said else "it fails" if done.returncode else ""

    def _needed(self) -> list[Path]:
        torch = importlib.util.find_spec("torch")
        folders = [Path(nos_backend.__path__[0]), *self._options.readable]
        if torch is not None and torch.origin:
            folders.append(Path(torch.origin).parent)
        return [folder for folder in folders if folder.is_dir()]


def _root_devices() -> Iterator[Path]:
    """Yield the devices that are root's alone, the disks for instance; those that compute are not."""
    for parent, folders, names in os.walk(_DEVICES):
        folders[:] = [name for name in folders if name not in _FOLDERS_OF_DEVICES]
        for name in names:
            path = Path(parent, name)
            with suppress(OSError):
                mode = path.lstat().st_mode
                is_open = mode & stat.S_IROTH and mode & stat.S_IWOTH
                is_open = is_open or name.startswith(_COMPUTING_DEVICES)
                if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not is_open):
                    yield path


def _changed_ns(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116 - often
    except OSError:
        return 0


def confined(command: list[str], bounds: Bounds, rules: int | None) -> list[str]:
    """Return a command line that enters bounds first; `rules` has to be passed to it."""
    program = [sys.executable, "-I", "-S", confinement.__file__]
    given = "-" if rules is None else str(rules)
    return [*program, bounds.write(), given, str(os.getpid()), *command]


def _find_users() -> tuple[int, int]:
    """Return the first user for owners and how many there are; none if the namespace has too few."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            first, _, count = map(int, line.split())
            for begin, number in _USERS:
                if first <= begin and begin + number <= first + count:
                    return begin, number
    return 0, 0
