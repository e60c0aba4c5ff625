"""What a fork of the user's process means for its clients.

gRPC does not survive a fork. Measured on grpcio 1.85 with a busy stream in the parent: without gRPC's own
fork support 28 % of the children crashed at their first call; with it every fork stopped the parent's
stream for 1 s, some for 5 s, and 10 % of the children hung. So a forked child never touches what it
inherited from gRPC: its clients forget their connections, and new ones run in a helper process that was
exec'd (`nos._bridge`). Forks then cost the parent nothing (120 of 120 children served, 1.2 ms a fork).
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Final, Protocol

# Read by grpc at its import, and the only switch there is: its fork handlers would write "skipping fork()
# handlers" to the notebook at each fork beside a live stream, and do nothing else. A user's choice stays.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Likewise: gRPC writes to standard error, at INFO, that a server went away; the error says that already.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


class Forgetful(Protocol):
    """Something that holds on to connections."""

    def forget(self) -> list[object]:
        """Become as new, without touching locks, threads or connections; return what was held."""


class _State:
    #: Whether this process ever used gRPC itself; then its forks must not.
    uses_grpc = False
    #: Whether this process is a fork of one that used gRPC.
    is_tainted = False


_holders: Final[weakref.WeakSet[Any]] = weakref.WeakSet()
#: What children inherited: kept, because destroying it would run gRPC's code.
_graveyard: Final[list[object]] = []


def register(holder: Forgetful) -> None:
    """Have `holder.forget()` called in every child that this process forks."""
    _holders.add(holder)


def note_use() -> None:
    """Say that this process uses gRPC."""
    _State.uses_grpc = True


def is_tainted() -> bool:
    """Return whether gRPC must not be used in this process."""
    return _State.is_tainted


def _after_in_child() -> None:
    if _State.uses_grpc:
        _State.is_tainted = True
    for holder in list(_holders):
        _graveyard.extend(holder.forget())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
