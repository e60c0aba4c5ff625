"""What the ModelManager knows of each model and each executor."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nos.errors import NosError
    from nos.wire.v1 import models_pb2

    from nos_backend.definition import ModelDefinition
    from nos_backend.worker.executors import Executor
    from nos_backend.worker.host_store import HostCopy

#: So many crashes of a model within so long quarantine it.
MAX_CRASHES: Final = 3
CRASH_WINDOW_S: Final = 60.0


class Crashes:
    """When something crashed, as far back as it matters."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def add(self, now_s: float) -> int:
        """Count one; return how many there were within the window."""
        self._times.append(now_s)
        while self._times[0] <= now_s - CRASH_WINDOW_S:
            self._times.popleft()
        return len(self._times)


@dataclass(slots=True, eq=False)
class Slot:
    """The place of one executor, from one crash to the next."""

    name: str
    #: Whose models it has.
    owner: str
    device: str
    #: Packages of its Python environment besides the server's.
    requirements: tuple[str, ...] = ()
    executor: Executor | None = None
    #: One load, restart or end at a time.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: The model that is loading, to be blamed for a crash.
    loading: Entry | None = None
    #: Those that no model can be blamed for.
    crashes: Crashes = field(default_factory=Crashes)


@dataclass(slots=True, eq=False)
class Entry:
    """One model version on this device."""

    definition: ModelDefinition
    spec: models_pb2.ModelSpec
    slot: Slot
    #: Resolves when it can answer or has failed; a new one for each attempt.
    ready: asyncio.Future[None]
    load_s: float = 0.0
    #: Its weights and skeleton, once it was constructed.
    copy: HostCopy | None = None
    #: Where it was constructed, until it is served; it stays there if it cannot be moved.
    scratch: Executor | None = None
    #: Why it has an executor of its own, or has tensors outside its run; empty if all is well.
    note: str = ""
    #: Whether it has tensors outside its run of weights.
    is_loose: bool = False
    #: Whether its slot's executor has it, on the device or evicted.
    is_bound: bool = False
    #: The most that one of its calls needs on the device beside its weights; 0 while nobody knows.
    activation_bytes: int = 0
    #: Rows of a batch for which there is memory by what was predicted of it; 0 where all fit.
    predicted_rows: int = 0
    #: When it left the device last, on the loop's clock.
    left_s: float = 0.0
    #: One bind, eviction or move of its host copy at a time.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Set exactly while it failed.
    error: NosError | None = None
    crashes: Crashes = field(default_factory=Crashes)
    is_isolated: bool = False
    #: Set while it is being unloaded; resolves when it is gone.
    gone: asyncio.Future[None] | None = None

    @property
    def key(self) -> str:
        """The version, `name@v3`."""
        return self.definition.key

    @property
    def weight_bytes(self) -> int:
        """Of its flat run."""
        return self.copy.size_bytes if self.copy else 0

    @property
    def is_movable(self) -> bool:
        """Whether any executor can make it again without its constructor."""
        return self.copy is not None and self.copy.skeleton_bytes > 0

    @property
    def can_leave(self) -> bool:
        """Whether it can be taken off the device and brought back."""
        return self.is_movable or (self.weight_bytes > 0 and not self.is_loose)
