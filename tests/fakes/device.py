"""A device whose capacity, fragmentation, copy time and errors are made up, behind the real interface.

Its memory is the host's, handed out by a first-fit allocator over a made-up address range, so that it
runs out and fragments like a real one, the same way every time. A model's source puts it in the place of
the CPU, in the executor that runs it, with `install`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from nos_backend.executor import devices


class Memory:
    """A first-fit allocator over `capacity_bytes`."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        #: (offset, size), in order of offset; they do not overlap.
        self.taken: list[tuple[int, int]] = []
        self.peak_bytes = 0

    @property
    def used_bytes(self) -> int:
        return sum(size for _, size in self.taken)

    def allocate(self, size: int) -> int:
        offset = 0
        for start, length in self.taken:
            if start - offset >= size:
                break
            offset = start + length
        if offset + size > self.capacity_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes; {self.used_bytes} in use"
            )
        self.taken = sorted([*self.taken, (offset, size)])
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return offset

    def free(self, offset: int) -> None:
        self.taken = [(start, size) for start, size in self.taken if start != offset]


class FakeResidence:
    """A run on the fake device; copies take made-up time."""

    keeps_writes = False

    def __init__(self, device: FakeDevice, fd: int, size_bytes: int) -> None:
        self._device, self._fd, self._size = device, os.dup(fd), size_bytes
        self._offset = -1
        self.flat = torch.zeros(size_bytes, dtype=torch.uint8)
        self.is_loaded = False

    def load(self) -> None:
        self._device.fail_by_script("load")
        self._offset = self._device.memory.allocate(self._size)
        self._device.now_s += self._size / self._device.bytes_per_s
        host = torch.from_file(f"/proc/self/fd/{self._fd}", size=self._size, dtype=torch.uint8)
        self.flat.copy_(host)
        self.is_loaded = True

    def evict(self) -> None:
        self._device.fail_by_script("evict")
        self._device.memory.free(self._offset)
        self.flat.fill_(0xA5)
        self.is_loaded = False

    def close(self) -> None:
        if self.is_loaded:
            self.evict()
        os.close(self._fd)


class FakeDevice:
    """Behind `nos_backend.executor.devices.Device`.

    Args:
        capacity_bytes: What it has.
        bytes_per_s: How fast it copies, in made-up seconds of `now_s`.
        script: For an operation, which of its calls (from 1) raises what.
    """

    name = "fake"

    def __init__(
        self,
        capacity_bytes: int,
        bytes_per_s: float = 50e9,
        script: dict[tuple[str, int], Exception] | None = None,
    ) -> None:
        self.memory = Memory(capacity_bytes)
        self.bytes_per_s = bytes_per_s
        self.now_s = 0.0
        self._script = script or {}
        self._calls: dict[str, int] = defaultdict(int)
        self._base_bytes = 0

    def reside(self, fd: int, size_bytes: int) -> FakeResidence:
        return FakeResidence(self, fd, size_bytes)

    def start_measuring(self) -> None:
        self._base_bytes = self.memory.peak_bytes = self.memory.used_bytes

    def peak_bytes(self) -> int:
        return self.memory.peak_bytes - self._base_bytes

    def trim(self) -> None:
        self.fail_by_script("trim")

    def room_bytes(self) -> int:
        return self.memory.capacity_bytes - self.memory.used_bytes

    @contextmanager
    def activations(self, size_bytes: int) -> Iterator[None]:
        """What a forward pass holds while it runs."""
        self.fail_by_script("forward")
        offset = self.memory.allocate(size_bytes)
        try:
            yield
        finally:
            self.memory.free(offset)

    def fail_by_script(self, operation: str) -> None:
        self._calls[operation] += 1
        error = self._script.get((operation, self._calls[operation]))
        if error is not None:
            raise error


def install(
    capacity_bytes: int, script: dict[tuple[str, int], Exception] | None = None
) -> FakeDevice:
    """Make the CPU of this process a fake device; the first call counts, the others get the same one."""
    known = devices.DEVICES["cpu"]("cpu")
    if isinstance(known, FakeDevice):
        return known
    device = FakeDevice(capacity_bytes, script=script)
    devices.DEVICES["cpu"] = lambda _: device
    return device
