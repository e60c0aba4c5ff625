"""Command lines and Dask settings of the processes of a cluster on this machine. Imports no Dask."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, Self

from nos.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nos_backend.cluster.certificates import TlsFiles
    from nos_backend.cluster.device import WorkerSettings

#: Dask settings by environment, which wins over any configuration file of the user's.
#:
#: * ticks and monitors: an idle worker costs 0.25 % of a core instead of 2.25 %
#: * `daemon: false`: executors are children of a worker
#: * memory management off: a paused worker would refuse control; we guard memory ourselves
#: * worker-ttl: below the longest hold of the interpreter lock it would restart healthy workers
#: * idle-timeout off: Dask does not see our streams and would end the cluster under them
DASK_SETTINGS: Final[dict[str, str]] = {
    f"DASK_DISTRIBUTED__{name}": value
    for name, value in {
        "SCHEDULER__WORKER_TTL": "30s",
        "SCHEDULER__IDLE_TIMEOUT": "None",
        "SCHEDULER__ACTIVE_MEMORY_MANAGER__INTERVAL": "60s",
        "SCHEDULER__DASHBOARD__BOKEH_APPLICATION__ALLOW_WEBSOCKET_ORIGIN": "['localhost', '127.0.0.1']",
        "WORKER__DAEMON": "False",
        "WORKER__PROFILE__ENABLED": "False",
        "WORKER__MEMORY__TARGET": "False",
        "WORKER__MEMORY__SPILL": "False",
        "WORKER__MEMORY__PAUSE": "False",
        "WORKER__MEMORY__TERMINATE": "False",
        "DEPLOY__LOST_WORKER_TIMEOUT": "5s",
        "ADMIN__TICK__INTERVAL": "500ms",
        "ADMIN__SYSTEM_MONITOR__INTERVAL": "2s",
        "ADMIN__SYSTEM_MONITOR__DISK": "False",
        "ADMIN__SYSTEM_MONITOR__GIL__ENABLED": "False",
        "COMM__REQUIRE_ENCRYPTION": "True",
    }.items()
}

#: The nanny's default of 64 KiB turns off glibc's adaptive threshold and makes frames 4 to 5 times slower;
#: 32 MiB is the largest mmap threshold that glibc takes. A value in the nanny's own environment wins.
#: Each arena keeps what its threads freed: with one for each of gRPC's threads, six streams of 500 KB frames
#: left 72 MiB in the gateway and 50 in the worker; with two arenas 25 and 27.
MALLOC_SETTINGS: Final[dict[str, str]] = {
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_ARENA_MAX": "2",
}

#: What a worker that somebody started by hand takes where Dask's own defaults stand.
WORKER_DEFAULTS: Final[dict[str, str]] = {
    **{name: value for name, value in DASK_SETTINGS.items() if "ENCRYPTION" not in name},
    "DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON": repr(
        {**MALLOC_SETTINGS, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    ),
}

#: With `--no-dashboard`, a scheduler makes its pages when somebody first asks for one.
DASHBOARD_ON_DEMAND: Final[dict[str, str]] = {"NOS_PLANE_DASHBOARD": "on-demand"}

#: Dask tasks (bulk inference) of a worker that may block at the same time.
_NUM_TASK_THREADS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSettings:
    """What the plane is told by its scheduler's environment."""

    drain_s: float = 30.0
    """How long streams may stay on a replica that is to leave; what they sent is answered all the same.
    `NOS_PLANE_DRAIN_S`."""
    scale_down_s: float = 60.0
    """How long replicas must have been too many before one leaves. `NOS_PLANE_SCALE_DOWN_S`."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Read the `NOS_PLANE_` variables; what is missing or empty has its default.

        Raises:
            ConfigError: If one is not a number of seconds.
        """
        values = {}
        for item in fields(cls):
            variable = f"NOS_PLANE_{item.name.upper()}"
            if text := environ.get(variable, ""):
                try:
                    values[item.name] = float(text)
                except ValueError:
                    wanted = "a number of seconds"
                    raise ConfigError(f"bad {variable}", item.name, wanted, repr(text)) from None
        return cls(**values)

    def to_environ(self) -> dict[str, str]:
        """Return the variables that `from_environ` reads."""
        return {
            f"NOS_PLANE_{item.name.upper()}": str(getattr(self, item.name)) for item in fields(self)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A process to start."""

    arguments: list[str]
    """Its command line."""
    environ: dict[str, str]
    """Variables to add to the supervisor's own."""


def scheduler_command(
    *,
    host: str,
    port: int,
    dashboard_port: int,
    tls: TlsFiles,
    settings: PlaneSettings | None = None,
) -> Command:
    """Return the Dask scheduler with the ServePlane, its dashboard on loopback and made on demand."""
    arguments = [
        *(sys.executable, "-m", "distributed.cli.dask_scheduler"),
        *("--protocol", "tls", "--host", host, "--port", str(port)),
        *("--dashboard-address", f"127.0.0.1:{dashboard_port}", "--no-dashboard"),
        *("--preload", "nos_backend.cluster.preload"),
        *tls.to_flags(),
    ]
    plane = settings or PlaneSettings()
    environ = {**DASK_SETTINGS, **plane.to_environ(), **DASHBOARD_ON_DEMAND}
    return Command(arguments=arguments, environ=environ)


def worker_command(
    *,
    name: str,
    scheduler: str,
    host: str,
    settings: WorkerSettings,
    tls: TlsFiles | None,
    scratch: Path,
) -> Command:
    """Return a nanny with one serving worker, bound to the device of `settings`."""
    arguments = [
        *(sys.executable, "-m", "distributed.cli.dask_worker", scheduler),
        *("--worker-class", "nos_backend.cluster.ServingWorker"),
        *("--name", name, "--nworkers", "1", "--nthreads", str(_NUM_TASK_THREADS)),
        *("--memory-limit", "0", "--no-dashboard", "--host", host),
        *("--preload-nanny", "nos_backend.own_memory"),
        *("--dashboard-address", f"{host}:0"),
        *("--local-directory", str(scratch), "--death-timeout", "120"),
        *(tls.to_flags() if tls else ()),
    ]
    environ = {
        **DASK_SETTINGS,
        **MALLOC_SETTINGS,
        **settings.to_environ(),
        # So that cuda:0 means the same device to NVML and to torch.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    if tls is None:
        environ["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] = "None"
    return Command(arguments=arguments, environ=environ)


def gateway_environ(*, is_encrypted: bool) -> dict[str, str]:
    """Return the variables of a gateway process, which is a Dask client."""
    environ = {**DASK_SETTINGS, **MALLOC_SETTINGS}
    if not is_encrypted:
        environ["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] = "None"
    return environ
