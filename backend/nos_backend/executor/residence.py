"""Where a flat run of weights is: in device memory, or only in its host copy.

The host copy is a memfd that the worker owns, sealed against writing; it outlives the executor. On the
CPU the device copy is a private mapping of that very memory: loading copies nothing. Evicting moves the
mapping aside with its page tables and loading moves it back (mremap, 0.1 ms for 400 MB here, where
unmapping takes 12 ms and faulting the pages in again 30 ms), always to the same address, so that no tensor
has to be bound again and no page to be faulted in again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import Protocol

import torch

_PROT_NONE, _PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED, _MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x10, 0x4000, 0x100000
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_HUGE_PAGE_BYTES = 2 << 20
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]


class Residence(Protocol):
    """The device side of one model's flat run; one per (model, executor)."""

    flat: torch.Tensor
    """uint8, (size_bytes,), on the device. Reading it while it is not loaded is an error of the caller:
    the executor refuses calls to such a model before they reach it."""
    is_loaded: bool
    """Whether the bytes are on the device."""
    keeps_writes: bool
    """Whether what was written to the run is there again after an eviction, as its host copy knows nothing
    of it; else the caller copies it out before and back after."""

    def load(self) -> None:
        """Bring the bytes of the host copy to the device."""

    def evict(self) -> None:
        """Free the device memory; the host copy stays.

        What was written to the run is lost, unless it `keeps_writes`.
        """

    def close(self) -> None:
        """Give everything back; no tensor bound to `flat` may be used after."""


class CpuResidence:
    """A flat run on the CPU: the host copy itself, mapped privately.

    What the model writes to its buffers goes to private pages of the mapping and is there again after an
    eviction. Used from the executor's main thread only.

    Args:
        fd: The host copy, a memfd of at least `size_bytes`; kept open by the caller.
        size_bytes: Length of the run.

    Raises:
        OSError: If the address ranges cannot be reserved.
    """

    keeps_writes = True

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._size = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE or mmap.PAGESIZE
        # Both ranges start at huge-page boundaries: then whole page tables move, not entries.
        self._span = -(-self._size // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        self._reservation = _map(None, 2 * self._span + _HUGE_PAGE_BYTES, _PROT_NONE, _RESERVED, -1)
        #: Never changes while the residence lives: tensors bound to `flat` stay valid over evictions.
        self._address = -(-self._reservation // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        self._aside = self._address + self._span
        self._is_mapped = False
        memory = (ctypes.c_char * self._size).from_address(self._address)
        self.flat = torch.frombuffer(memory, dtype=torch.uint8)[:size_bytes]
        self.is_loaded = False

    def load(self) -> None:
        """Map the host copy, or bring its mapping back; pages come in as they are touched first.

        Raises:
            OSError: If the kernel refuses.
        """
        if self._is_mapped:
            self._move(self._aside, self._address)
        else:
            flags = mmap.MAP_PRIVATE | _MAP_FIXED
            _map(self._address, self._size, _PROT_READ_WRITE, flags, self._fd)
            self._is_mapped = True
        self.is_loaded = True

    def evict(self) -> None:
        """Move the mapping aside; touching the run from now on ends the process.

        Raises:
            OSError: If the kernel refuses.
        """
        self._move(self._address, self._aside)
        self.is_loaded = False

    def close(self) -> None:
        """Give everything back; no tensor bound to `flat` may be used after."""
        if self._reservation:
            _libc.munmap(self._reservation, 2 * self._span + _HUGE_PAGE_BYTES)
            self._reservation = 0
            self.is_loaded = False

    def _move(self, source: int, target: int) -> None:
        moved = _libc.mremap(
            source, self._size, self._size, _MREMAP_MAYMOVE | _MREMAP_FIXED, target
        )
        if moved != target:
            raise _last_error(f"moving {self._size} bytes of weights")
        # Reserve what was left, and never over what another thread may have put there meanwhile.
        _map(source, self._size, _PROT_NONE, _RESERVED | _MAP_FIXED_NOREPLACE, -1)


class CudaResidence:
    """A flat run on a CUDA device, copied from its host copy in one piece.

    Freeing and filling happen with the copy stream current, so that the caching allocator orders the reuse of
    the block on that stream: an evicted run's memory is not written by the next owner before the last
    kernel that read it has ended, and no kernel starts before the bytes are there. No device-wide
    synchronisation. FSDP frees and refills its flat parameter the same way.

    Used from the executor's main thread only.

    Args:
        fd: The host copy, a memfd of at least `size_bytes`; kept open by the caller.
        size_bytes: Length of the run.
        device: As torch writes it, for instance `cuda:0`.
        copy_stream: The device's one stream for copies of weights.
    """

    keeps_writes = False

    def __init__(
        self, fd: int, size_bytes: int, device: torch.device, copy_stream: torch.cuda.Stream
    ) -> None:
        self._size = size_bytes
        self._copy_stream = copy_stream
        self._device = device
        self._mapping = mmap.mmap(fd, max(1, size_bytes), mmap.MAP_PRIVATE)
        self._host = torch.frombuffer(self._mapping, dtype=torch.uint8)[:size_bytes]
        self._pinning = threading.Thread(target=self._pin, name="pin weights", daemon=True)
        self._pinning.start()
        self._ready = torch.cuda.Event()
        self.flat = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.flat.untyped_storage().resize_(0)
        self.is_loaded = False

    def load(self) -> None:
        """Copy the host copy to the device; kernels started after this see it.

        Raises:
            torch.OutOfMemoryError: If the device has no room; nothing is held then.
        """
        with torch.cuda.stream(self._copy_stream):
            self.flat.untyped_storage().resize_(self._size)
            self.flat.copy_(self._host, non_blocking=True)
            self._ready.record(self._copy_stream)
        torch.cuda.current_stream(self._device).wait_event(self._ready)
        self.is_loaded = True

    def evict(self) -> None:
        """Give the device memory back once the kernels that read it have ended; moves no byte."""
        last_batch = torch.cuda.Event()
        last_batch.record(torch.cuda.current_stream(self._device))
        self._copy_stream.wait_event(last_batch)
        with torch.cuda.stream(self._copy_stream):
            self.flat.untyped_storage().resize_(0)
        self.is_loaded = False

    def close(self) -> None:
        """Give everything back; no tensor bound to `flat` may be used after."""
        if self.is_loaded:
            self.evict()
        self._pinning.join()
        torch.cuda.synchronize(self._device)
        if self._host.is_pinned():
            torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())

    def _pin(self) -> None:
        """Register the host copy as pinned: slow (GB/s), so off the road; until then copies are staged.

        torch's own pinned memory rounds up to a power of two and is not used.
        """
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostRegister(self._host.data_ptr(), self._size, 0)


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, size, protection, flags, fd, 0)
    if result == _FAILED or result is None:
        raise _last_error(f"mapping {size} bytes of weights")
    return int(result)


def _last_error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
