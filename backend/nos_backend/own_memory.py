"""What other processes of the same user may see of this one."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from distributed import Nanny

_PR_SET_DUMPABLE: Final = 4


def hide_memory() -> None:
    """Keep other processes of the same user from reading this one's memory and environment."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def dask_setup(_nanny: Nanny) -> None:
    """Do so in a nanny: `dask worker --preload-nanny nos_backend.own_memory`."""
    hide_memory()
