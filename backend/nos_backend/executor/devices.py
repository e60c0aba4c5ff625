"""Devices as the executor sees them: where weights live, what memory is left, what an error means.

The interface follows `torch.accelerator`: another kind of device (`xpu`, `mps`, a vendor's plug-in) is
one more class here and one line in `DEVICES`; see `docs/devices.md`.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Final, Protocol

import torch

from nos_backend.executor.host_memory import host_memory_bytes
from nos_backend.executor.process import trim_heap
from nos_backend.executor.residence import CpuResidence, CudaResidence, Residence

if TYPE_CHECKING:
    from collections.abc import Callable

#: What libraries say instead of raising torch.OutOfMemoryError.
_OUT_OF_MEMORY_TEXTS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA out of memory",
    "can't allocate memory",
    "not enough memory",
)
#: After one of these nothing in the process may be trusted: the CUDA context is gone.
_STICKY_TEXTS = (
    "CUDA error",
    "cuDNN error",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "device-side assert",
    "an illegal memory access",
    "unspecified launch failure",
    "uncorrectable ECC error",
    "Xid",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device has no room; freeing some and retrying may help."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in _OUT_OF_MEMORY_TEXTS
    )


def is_sticky(error: BaseException) -> bool:
    """Return whether an error says that this process has lost its device and must end."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return any(text in str(error) for text in _STICKY_TEXTS)


def return_memory() -> None:
    """Give what was freed back: to the device, if this process has one open, and to the system."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_heap()


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given; a device runs behind the code that feeds it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Device(Protocol):
    """One device, as its executor uses it; from the executor's main thread only."""

    name: str
    """As torch writes it."""

    def reside(self, fd: int, size_bytes: int) -> Residence:
        """Prepare a flat run whose host copy is the memfd `fd`; not loaded yet."""

    def room_bytes(self) -> int:
        """Return what is free on the device, for whoever asks first."""

    def start_measuring(self) -> None:
        """Forget the peak."""

    def peak_bytes(self) -> int:
        """Return the most that was allocated above the level at `start_measuring`; 0 if unknown."""

    def trim(self) -> None:
        """Give memory that nobody uses back to the device: the first step when there is no room."""


class CpuDevice:
    """The CPU: weights are mapped, and only the kernel knows peaks."""

    name = "cpu"

    def reside(self, fd: int, size_bytes: int) -> Residence:
        """See `Device.reside`."""
        return CpuResidence(fd, size_bytes)

    def room_bytes(self) -> int:
        """Return what the kernel can still give, cgroups considered."""
        return host_memory_bytes()

    def start_measuring(self) -> None:
        """Do nothing: `footprint.measure` counts on the CPU."""

    def peak_bytes(self) -> int:
        """Return 0: the resident set says what the allocator recycled, not what a model needed."""
        return 0

    def trim(self) -> None:
        """Collect garbage and give the C library's free lists back to the kernel."""
        return_memory()


class CudaDevice:
    """One CUDA device.

    Args:
        name: For instance `cuda:0`.

    Raises:
        RuntimeError: If torch finds no such device.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._device = torch.device(name)
        self._copy_stream: torch.cuda.Stream = torch.cuda.Stream(self._device)
        self._base_bytes = 0

    def reside(self, fd: int, size_bytes: int) -> Residence:
        """See `Device.reside`."""
        return CudaResidence(fd, size_bytes, self._device, self._copy_stream)

    def room_bytes(self) -> int:
        """Return what the driver can still give, and what this process holds and does not use."""
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        reserved_bytes = torch.cuda.memory_reserved(self._device)
        return free_bytes + reserved_bytes - torch.cuda.memory_allocated(self._device)

    def start_measuring(self) -> None:
        """See `Device.start_measuring`."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._base_bytes = torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        """See `Device.peak_bytes`."""
        return torch.cuda.max_memory_allocated(self._device) - self._base_bytes

    def trim(self) -> None:
        """See `Device.trim`."""
        return_memory()


#: What serves a kind of device, by what torch calls that kind.
DEVICES: Final[dict[str, Callable[[str], Device]]] = {
    "cpu": lambda _: CpuDevice(),
    "cuda": CudaDevice,
}


def open_device(name: str) -> Device:
    """Return the device of that name.

    Raises:
        ValueError: If no class here serves it.
    """
    make = DEVICES.get(torch.device(name).type)
    if make is None:
        raise ValueError(f"no support for device {name!r}: expected one of {', '.join(DEVICES)}")
    return make(name)
