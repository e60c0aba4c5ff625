"""Holding a process that runs code of others to what it needs.

`make_rules` is called by the worker, which knows what is secret; `enter` by the executor, before it has run
anything. As a program (`python -I -S confinement.py BOUNDS COMMAND...`) this enters bounds and becomes
another program: an interpreter whose packages came with a model must not start before that.

Linux only, standard library only. What the kernel lacks is left out; `worker/bounds.py` says what holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import stat
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_KEEPCAPS: Final = 8
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_RAISE: Final = 2
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

#: CAP_DAC_READ_SEARCH, as a mask of one.
_CAN_READ: Final = 1 << 2
_CAPABILITY_VERSION: Final = 0x20080522
_CAPSET: Final = 126 if os.uname().machine == "x86_64" else 91
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_RULE_PATH_BENEATH: Final = 1
_VERSION: Final = 1

#: Rights of landlock's first version; 2 adds moving between folders, 3 truncation, 5 ioctl of devices.
_RIGHTS: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
_EXECUTE: Final = 1 << 0
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
#: All that a rule about a file, and not a folder, may grant: execute, write, read, truncate.
_OF_FILES: Final = _EXECUTE | 1 << 1 | _READ_FILE | 1 << 14
_READING: Final = _EXECUTE | _READ_FILE | _READ_DIR
#: From version 6 on: no abstract UNIX sockets and no signals to processes outside.
_SCOPED: Final = 3
_SCOPED_SINCE: Final = 6

#: In a home, what nobody misses once the server has ended.
TEMPORARY_NAME: Final = "tmp"
#: The kernel ends executors before anything of ours when memory is out.
_OOM_SCORE: Final = "800"

#: Opened before any fork: a child must not need the dynamic loader to confine itself.
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What an executor is held to."""

    uid: int = 0
    """User and group that it becomes; 0 stays the one it is."""
    is_held: bool = False
    """Whether root loses its capabilities, where it stays root."""
    reads_as_root: bool = False
    """Whether that user may read what root may, where rules allow it: for a Python in root's own home."""
    home: str = ""
    """Its home, in which it begins, with its temporary folder; empty leaves them."""
    memory_bytes: int = 0
    """Memory of its own that it may have; 0 means no limit."""
    num_processes: int = 0
    """Processes and threads that its user may have; 0 means no limit."""

    @classmethod
    def read(cls, text: str) -> Self:
        """Return what `write` wrote."""
        return cls(**json.loads(text))

    def write(self) -> str:
        """Return it as text, for a command line."""
        return json.dumps(asdict(self))


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def landlock_version() -> int:
    """Return which landlock the kernel has; 0 for none."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _VERSION)))


def make_rules(
    closed: Iterable[Path],
    readable: Iterable[Path],
    writable: Iterable[Path],
    *,
    is_read_only: bool,
) -> int:
    """Return a descriptor of rules that leave open all there is now but what is in `closed`.

    What comes later beside `closed`, or beside a folder that it is in, is closed as well.

    Args:
        closed: Files and folders that cannot be reached, as `os.path.realpath` gives them.
        readable: Folders in closed ones that can be read all the same.
        writable: Folders that are open, in closed ones or not.
        is_read_only: Whether everything else can only be read.

    Raises:
        OSError: If the kernel has no landlock.
    """
    version = landlock_version()
    rights = _RIGHTS[max(1, min(version, max(_RIGHTS)))]
    attributes = _RulesetAttributes(rights, 0, _SCOPED if version >= _SCOPED_SINCE else 0)
    # Older kernels take the structure only without what they do not know.
    size = ctypes.sizeof(attributes) if version >= _SCOPED_SINCE else ctypes.sizeof(ctypes.c_uint64)
    rules = _checked(_libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), size, 0))
    try:
        for place in _around({str(path) for path in closed}):
            _allow(rules, place, _READING if is_read_only else rights)
        for path in readable:
            _allow(rules, str(path), _READING)
        for path in writable:
            _allow(rules, str(path), rights)
    except BaseException:
        os.close(rules)
        raise
    return rules


def folders_above(paths: Iterable[Path]) -> set[str]:
    """Return every folder that one of these is in."""
    return {str(parent) for path in paths for parent in path.parents}


def _around(closed: set[str]) -> list[str]:
    """Return files and folders that together are everything except what is in `closed`."""
    above = folders_above(map(Path, closed))
    found: list[str] = []
    waiting = ["/"] if above else []
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.path in closed or entry.is_symlink():
                    continue
                (waiting if entry.path in above else found).append(entry.path)
    return found if above else ["/"]


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # it has gone
        return
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            rights &= _OF_FILES
        rule = _PathBeneath(rights, opened)
        _checked(
            _libc.syscall(_LANDLOCK_ADD_RULE, rules, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
        )
    finally:
        os.close(opened)


def enter(bounds: Bounds, rules: int | None, parent_pid: int) -> None:
    """Hold this process, and all that it starts, to `bounds` and `rules` for ever; closes `rules`.

    It ends with the thread that made it, which must live as long as the parent does.

    Raises:
        OSError: If the kernel refuses; then nothing of others may run here.
    """
    with contextlib.suppress(OSError):  # a container may forbid it
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    _limit(resource.RLIMIT_CORE, 0)
    if bounds.memory_bytes:
        _limit(resource.RLIMIT_DATA, bounds.memory_bytes)
    if bounds.num_processes:
        _limit(resource.RLIMIT_NPROC, bounds.num_processes)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if rules is not None:
        _checked(_libc.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0))
        os.close(rules)
    if bounds.uid:
        _become(bounds.uid, _CAN_READ if bounds.reads_as_root else 0)
    elif bounds.is_held and os.geteuid() == 0:
        # With `no_new_privs` no program brings any of it back.
        _set_capabilities(0)
    if bounds.home:
        temporary = Path(bounds.home, TEMPORARY_NAME)
        temporary.mkdir(mode=0o700, exist_ok=True)
        os.environ.update(HOME=bounds.home, TMPDIR=str(temporary))
        os.chdir(bounds.home)
    # Behind the change of users, which makes the kernel forget it.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def _become(uid: int, capabilities: int) -> None:
    """Become a user with nothing of root's but these capabilities, which its programs have, too."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    if capabilities:
        _prctl(_PR_SET_KEEPCAPS, 1)
    os.setresuid(uid, uid, uid)
    if capabilities:
        _set_capabilities(capabilities)
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capabilities.bit_length() - 1)


def _set_capabilities(mask: int) -> None:
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = _CapabilityHeader(_CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable; the upper halves follow.
    sets = (ctypes.c_uint32 * 6)(mask, mask, mask)
    _checked(_libc.syscall(_CAPSET, ctypes.byref(header), sets))


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (most, most))


def _prctl(option: int, value: int, second: int = 0) -> None:
    _checked(_libc.prctl(option, value, second, 0, 0))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def main() -> None:
    """Enter bounds, and become a command: `BOUNDS RULES PARENT COMMAND...`, RULES a descriptor or `-`."""
    bounds, rules, parent_pid, *command = sys.argv[1:]
    enter(Bounds.read(bounds), None if rules == "-" else int(rules), int(parent_pid))
    os.execv(command[0], command)  # noqa: S606 - that is what it is for


if __name__ == "__main__":
    main()
