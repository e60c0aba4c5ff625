"""Which devices this machine has, asked of NVML: no torch, no CUDA context."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from nos.errors import ConfigError
from nos.wire.limits import FRAME_BYTES, MAX_STREAMS

from nos_backend.definition import LOAD_TIMEOUT_S
from nos_backend.executor.log_lines import LINES_PER_S
from nos_backend.executor.process import MAX_IMAGE_PIXELS
from nos_backend.scheduling.admission import MAX_QUEUED, MAX_QUEUED_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


#: Settings that are numbers of something.
_COUNTS: Final = (
    *("max_image_pixels", "max_log_lines", "max_models", "max_queued"),
    *("max_streams", "max_tenant_streams", "num_sharing"),
)
#: Of the largest number of 64 bits.
_MAX_DIGITS: Final = 19
#: Of files from the gateway, by default.
_MAX_FILES_BYTES: Final = 50 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker process is told by its environment, because Dask's command line has no room for it."""

    device: str = "auto"
    """`cpu`, `cuda:0`, or `auto`: the first CUDA device, else the processor. `NOS_WORKER_DEVICE`."""
    capacity_bytes: int | None = None
    """Bytes that its models may use; None means what the device has. `NOS_WORKER_CAPACITY_BYTES`."""
    num_sharing: int = 1
    """How many workers share its device; each has an equal part of the memory. `NOS_WORKER_NUM_SHARING`."""
    headroom_bytes: int = 0
    """Of these, what stays free always. `NOS_WORKER_HEADROOM_BYTES`."""
    eviction: str = "lru"
    """Which model leaves first: `lru`, `fifo`, `lfu`, `gdsf`. `NOS_WORKER_EVICTION`."""
    max_models: int = 0
    """Models on the device at once; 0 means as many as fit. `NOS_WORKER_MAX_MODELS`."""
    idle_unload_s: float = 0.0
    """Models leave after so long without use; 0 means never for that. `NOS_WORKER_IDLE_UNLOAD_S`."""
    profile_s: float = 2.0
    """Seconds that measuring a model's needs may take; 0 measures nothing. `NOS_WORKER_PROFILE_S`."""
    host_bytes: int | None = None
    """Bytes for copies in main memory; None means no limit. `NOS_WORKER_HOST_BYTES`."""
    weights_dir: str = ""
    """Where copies go that do not fit; empty means nowhere. `NOS_WORKER_WEIGHTS_DIR`."""
    files_dir: str = ""
    """Where files of models go that this machine does not see; empty means Dask's folder of the worker.
    `NOS_WORKER_FILES_DIR`."""
    files_bytes: int = _MAX_FILES_BYTES
    """What these may take. `NOS_WORKER_FILES_BYTES`."""
    environments_dir: str = ""
    """Where packages of models are installed; empty refuses them. `NOS_WORKER_ENVIRONMENTS_DIR`."""
    confinement: str = "auto"
    """`auto`: the most that this machine has; `off`: executors are ordinary processes.
    `NOS_WORKER_CONFINEMENT`."""
    closed_paths: str = ""
    """Files and folders with secrets, which executors cannot reach, as PATH has several.
    `NOS_WORKER_CLOSED_PATHS`."""
    readable_paths: str = ""
    """Folders in these that they can read all the same. `NOS_WORKER_READABLE_PATHS`."""
    homes_dir: str = ""
    """Where users of owners get homes; empty: owners have no users. `NOS_WORKER_HOMES_DIR`."""
    executor_bytes: int | None = None
    """Main memory that one executor may have; None means no limit. `NOS_WORKER_EXECUTOR_BYTES`."""
    max_streams: int = MAX_STREAMS
    """Streams that it serves at once. `NOS_WORKER_MAX_STREAMS`."""
    max_tenant_streams: int = 0
    """Of these, those of one tenant; 0 means all. `NOS_WORKER_MAX_TENANT_STREAMS`."""
    max_queued: int = MAX_QUEUED
    """Requests of one model that may wait. `NOS_WORKER_MAX_QUEUED`."""
    max_queued_bytes: int = MAX_QUEUED_BYTES
    """Bytes of these. `NOS_WORKER_MAX_QUEUED_BYTES`."""
    load_timeout_s: float = LOAD_TIMEOUT_S
    """Seconds that each step of a load may take. `NOS_WORKER_LOAD_TIMEOUT_S`."""
    max_frame_bytes: int = FRAME_BYTES
    """Bytes of one frame's arrays and media. `NOS_WORKER_MAX_FRAME_BYTES`."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Pixels of one encoded image. `NOS_WORKER_MAX_IMAGE_PIXELS`."""
    max_log_lines: int = LINES_PER_S
    """Lines a second that the models of one executor may print. `NOS_WORKER_MAX_LOG_LINES`."""
    host: str = ""
    """Where its data plane listens; empty means where the Dask worker does. `NOS_WORKER_HOST`."""
    ready_file: str = ""
    """Gets the data plane's address once the worker joined. `NOS_WORKER_READY_FILE`."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Read the `NOS_WORKER_` variables; what is missing or empty has its default.

        Raises:
            ConfigError: If one is not the number that it must be.
        """
        values: dict[str, Any] = {}
        for item in fields(cls):
            text = environ.get(_variable(item.name), "")
            if text:
                values[item.name] = _read(item.name, text)
        return cls(**values)

    def to_environ(self) -> dict[str, str]:
        """Return the variables that `from_environ` reads."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            _variable(name): "" if value is None else str(value) for name, value in values.items()
        }


def split_paths(text: str) -> list[Path]:
    """Return paths that are written as in PATH."""
    return [Path(part) for part in text.split(os.pathsep) if part]


def _variable(name: str) -> str:
    return f"NOS_WORKER_{name.upper()}"


def _read(name: str, text: str) -> str | int | float:
    if name.endswith("_s"):
        try:
            return float(text)
        except ValueError:
            raise ConfigError(
                f"bad {_variable(name)}", name, "a number of seconds", repr(text)
            ) from None
    if name.endswith("_bytes") or name in _COUNTS:
        if not text.isdecimal() or len(text) > _MAX_DIGITS:
            wanted = "a number of bytes" if name.endswith("_bytes") else "a number"
            raise ConfigError(f"bad {_variable(name)}", name, wanted, repr(text))
        return int(text)
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device, as people know it."""

    name: str
    """As torch writes it: `cpu`, `cuda:0`."""
    product: str
    """For instance `NVIDIA H200`."""
    memory_bytes: int
    """Its own memory; for `cpu`, the machine's."""


def find_devices(environ: Mapping[str, str]) -> list[str]:
    """Return the CUDA devices of this machine that `CUDA_VISIBLE_DEVICES` shows, else `["cpu"]`."""
    with _nvml() as nvml:
        if nvml is not None and (handles := _handles(nvml, environ)):
            return [f"cuda:{index}" for index in range(len(handles))]
    return ["cpu"]


def describe_device(name: str, environ: Mapping[str, str]) -> Device:
    """Return what is known of a device; `auto` is the first that `find_devices` returns.

    Raises:
        ConfigError: If this machine has no such device.
    """
    if name == "auto":
        name = find_devices(environ)[0]
    if name == "cpu":
        return Device(name="cpu", product=_cpu_product(), memory_bytes=_memory_bytes())
    kind, _, index = name.partition(":")
    with _nvml() as nvml:
        handles = _handles(nvml, environ) if nvml is not None else []
        if kind == "cuda" and (index or "0").isdecimal() and int(index or 0) < len(handles):
            handle = handles[int(index or 0)]
            return Device(
                name=f"cuda:{int(index or 0)}",
                product=str(nvml.nvmlDeviceGetName(handle)),
                memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
    known = ", ".join(["cpu", *(f"cuda:{index}" for index in range(len(handles)))])
    raise ConfigError("no such device", "device", f"auto or one of {known}", repr(name))


def free_bytes(name: str, environ: Mapping[str, str]) -> int | None:
    """Return what a CUDA device has free, whoever uses the rest; None of the processor, or if unknown."""
    _, _, index = name.partition(":")
    with _nvml() as nvml:
        handles = _handles(nvml, environ) if nvml is not None else []
        if name == "cpu" or int(index or 0) >= len(handles):
            return None
        return int(nvml.nvmlDeviceGetMemoryInfo(handles[int(index or 0)]).free)


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Give the NVML module, ready for use; None where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - the binding raises a class per cause, and all mean "no CUDA here"
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _handles(nvml: Any, environ: Mapping[str, str]) -> list[Any]:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [
            nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())
        ]
    handles = []
    for part in visible.split(","):
        # As CUDA does: everything behind the first unknown device is invisible.
        try:
            by_index = part.strip().isdecimal()
            lookup = nvml.nvmlDeviceGetHandleByIndex if by_index else nvml.nvmlDeviceGetHandleByUUID
            handles.append(lookup(int(part) if by_index else part.strip()))
        except nvml.NVMLError:
            break
    return handles


def _cpu_product() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _memory_bytes() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    return 0
