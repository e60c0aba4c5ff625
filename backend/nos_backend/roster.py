"""Which processes a server on this machine consists of, with their command lines; starts none of them."""

from __future__ import annotations

import contextlib
import math
import os
import random
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from nos.errors import ConfigError
from nos.wire.local import LOG_FOLDER_NAME

from nos_backend.children import Child
from nos_backend.cluster.certificates import TlsFiles
from nos_backend.cluster.device import WorkerSettings, describe_device, find_devices
from nos_backend.cluster.launch import (
    Command,
    PlaneSettings,
    gateway_environ,
    scheduler_command,
    worker_command,
)
from nos_backend.public_tls import own_address

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nos_backend.config import Settings
    from nos_backend.public_tls import PublicTls

_LOOPBACK: Final = "127.0.0.1"
_DASHBOARD_PORT: Final = 8787
#: Below Linux's default range for connections (net.ipv4.ip_local_port_range).
_OWN_PORTS: Final = range(20000, 32768)
_PORT_TRIES: Final = 20
#: As many as `--workers` takes.
_MAX_CPU_WORKERS: Final = 64
#: Workers on one CUDA device: each has a context of its own there, of some 500 MB.
_MAX_SHARING: Final = 8
#: In the state folder: the homes of owners' users.
HOMES_NAME: Final = "homes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to start."""

    children: list[Child]
    """In the order of starting; they wait for each other by themselves."""
    workers: dict[str, Child]
    """All that there may be, by name, in the order of starting; the first `num_workers` are wanted."""
    num_workers: int
    tls: TlsFiles | None
    """What their Dask comms show each other; None if a scheduler without TLS is joined."""
    dashboard_url: str
    """Where the Dask dashboard will listen; empty for a scheduler that is joined."""


def plan_children(
    settings: Settings, run_dir: Path, token_file: Path, public: PublicTls | None = None
) -> Plan:
    """Choose devices and ports, and return the processes that serve with them.

    Args:
        settings: Of the server.
        run_dir: Folder for what lives as long as the run.
        token_file: Holds the token that the gateway asks for.
        public: What the gateway's port shows; None for a port without TLS.

    Raises:
        ConfigError: If a port is taken, there is no such device, or nothing leads to the scheduler.
    """
    devices, num_workers = choose_devices(settings)
    port = reserve_port(settings.host, settings.port, "--port")
    taken = {port}
    children, workers, dashboard_url = [], {}, ""
    comm_host = _LOOPBACK
    if settings.scheduler:
        scheduler = settings.scheduler
        comm_host = settings.worker_host or _own_address(scheduler)
        tls = TlsFiles(settings.tls_dir) if settings.tls_dir else None
        if tls is not None:
            tls.check()
        # A scheduler takes each name once, and others may have a cpu-0, too.
        devices = {
            f"{socket.gethostname()}-{os.getpid()}-{name}": at for name, at in devices.items()
        }
    else:
        tls = TlsFiles(run_dir / "tls")
        scheduler_port = _another_port(taken)
        scheduler = f"tls://{_LOOPBACK}:{scheduler_port}"
        dashboard_port = _choose_dashboard_port(settings.dashboard_port, taken)
        dashboard_url = f"http://{_LOOPBACK}:{dashboard_port}/status"
        command = scheduler_command(
            host=_LOOPBACK,
            port=scheduler_port,
            dashboard_port=dashboard_port,
            tls=tls,
            settings=PlaneSettings(drain_s=settings.drain_s, scale_down_s=settings.scale_down_s),
        )
        children.append(_child("scheduler", command, settings))
    for name, device in devices.items():
        ready_file = run_dir / f"{name}.ready"
        command = worker_command(
            name=name,
            scheduler=scheduler,
            host=comm_host,
            settings=WorkerSettings(
                device=device,
                capacity_bytes=settings.capacity_bytes,
                num_sharing=list(devices.values()).count(device),
                headroom_bytes=settings.headroom_bytes,
                eviction=settings.eviction,
                max_models=settings.max_models,
                idle_unload_s=settings.idle_unload_s,
                profile_s=settings.profile_s,
                host_bytes=settings.host_bytes,
                weights_dir=str(run_dir / "weights" / name),
                files_dir=str(settings.state_dir / "files" / name),
                environments_dir=str(settings.state_dir / "environments"),
                confinement=settings.confinement,
                closed_paths=os.pathsep.join(map(str, _closed_paths(settings))),
                readable_paths=os.pathsep.join(map(str, readable_paths(settings.state_dir))),
                homes_dir=str(settings.state_dir / HOMES_NAME),
                executor_bytes=settings.executor_bytes,
                max_streams=settings.max_streams,
                max_tenant_streams=settings.max_tenant_streams,
                max_queued=settings.max_queued,
                max_queued_bytes=settings.max_queued_bytes,
                load_timeout_s=settings.load_timeout_s,
                max_frame_bytes=settings.max_frame_bytes,
                max_image_pixels=settings.max_image_pixels,
                max_log_lines=settings.max_log_lines,
                host=settings.worker_host or comm_host,
                ready_file=str(ready_file),
            ),
            tls=tls,
            scratch=run_dir / "dask",
        )
        workers[name] = _child(f"worker-{name}", command, settings, ready_file)
    children += list(workers.values())[:num_workers]
    command = _gateway_command(settings, port, scheduler, tls, run_dir, token_file, public)
    children.append(_child("gateway", command, settings, run_dir / "gateway.ready"))
    return Plan(
        children=children,
        workers=workers,
        num_workers=num_workers,
        tls=tls,
        dashboard_url=dashboard_url,
    )


def readable_paths(state_dir: Path) -> list[Path]:
    """Return the folders of the state folder that models and their packages are read from."""
    return [state_dir / name for name in ("folders", "files", "environments")]


def _closed_paths(settings: Settings) -> list[Path]:
    """Return where secrets are: tokens, registry and keys."""
    keys = [settings.tls_key, settings.tls_dir]
    return [settings.state_dir, *(path.absolute() for path in keys if path is not None)]


def choose_devices(settings: Settings) -> tuple[dict[str, str], int]:
    """Return the names of all workers that there may be, with their devices, and how many to start with.

    Raises:
        ConfigError: If the machine has no such device, or too few for so many workers.
    """
    asked, num_workers = settings.device, settings.workers
    if asked == "none":
        if not settings.scheduler:
            raise ConfigError(
                "nobody would run models", "device", "a device, or --scheduler", "none"
            )
        return {}, 0
    found = find_devices(os.environ)
    if asked == "cuda" and found == ["cpu"]:
        raise ConfigError(
            "no such device",
            "device",
            "cuda, on a machine that has it",
            "no CUDA device",
            "Use --device cpu",
        )
    devices = found if asked in ("auto", "cuda") else [describe_device(asked, os.environ).name]
    if devices == ["cpu"]:
        return {f"cpu-{index}": "cpu" for index in range(_MAX_CPU_WORKERS)}, max(1, num_workers)
    return share(devices, num_workers), num_workers or len(devices)


def share(devices: Sequence[str], num_workers: int) -> dict[str, str]:
    """Return the names of workers with their CUDA devices, which share them where there are more workers.

    Raises:
        ConfigError: If they are more than make sense.
    """
    num_sharing = max(1, math.ceil(num_workers / len(devices)))
    if num_sharing > _MAX_SHARING:
        most = _MAX_SHARING * len(devices)
        raise ConfigError("bad --workers", "workers", f"at most {most}", str(num_workers))
    return {
        device.replace(":", "-") + (f"-{index}" if index else ""): device
        for index in range(num_sharing)
        for device in devices
    }


def reserve_port(host: str, port: int, flag: str) -> int:
    """Return `port`, or a free one for 0, after checking that it can be listened on.

    A free one is sought below those that the kernel gives to connections, one of which could take it before
    the process that it is for has started.

    Raises:
        ConfigError: If it cannot; it names `flag`.
    """
    if port == 0:
        for _ in range(_PORT_TRIES):
            with contextlib.suppress(ConfigError):
                return reserve_port(host, random.choice(_OWN_PORTS), flag)  # noqa: S311 - no secret
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # A bind beside a listener with the same option would succeed; a listen does not.
            probe.listen(1)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}",
                flag.removeprefix("--"),
                hint=f"Choose another with {flag}, or 0 for any free one",
            ) from error
        return int(probe.getsockname()[1])


def _own_address(scheduler: str) -> str:
    try:
        return own_address(urlsplit(scheduler).hostname or "")
    except OSError as error:
        raise ConfigError(
            f"nothing leads to the scheduler: {error.strerror}", "scheduler", got=scheduler
        ) from error


def _choose_dashboard_port(asked: int, taken: set[int]) -> int:
    if asked:
        return reserve_port(_LOOPBACK, asked, "--dashboard-port")
    try:
        return reserve_port(_LOOPBACK, _DASHBOARD_PORT, "")
    except ConfigError:
        return _another_port(taken)


def _another_port(taken: set[int]) -> int:
    """Return a free port that is none of those taken, none of which is listened on yet; it is one then."""
    while (port := reserve_port(_LOOPBACK, 0, "")) in taken:
        pass
    taken.add(port)
    return port


def _gateway_command(
    settings: Settings,
    port: int,
    scheduler: str,
    tls: TlsFiles | None,
    run_dir: Path,
    token_file: Path,
    public: PublicTls | None,
) -> Command:
    arguments = [
        *(sys.executable, "-m", "nos_backend.app"),
        *("--host", settings.host, "--port", str(port), "--scheduler", scheduler),
        *("--state-dir", str(settings.state_dir), "--run-dir", str(run_dir)),
        *("--token-file", str(token_file)),
        *("--idle-shutdown-s", f"{settings.idle_shutdown_s:g}", "--log-level", settings.log_level),
        *("--max-registered", str(settings.max_registered)),
        *("--max-source-bytes", str(int(settings.max_source_bytes))),
        *("--max-upload-bytes", str(int(settings.max_upload_bytes))),
        *("--max-tenant-upload-bytes", str(int(settings.max_tenant_upload_bytes))),
    ]
    if tls is not None:
        arguments += ["--tls-dir", str(tls.folder)]
    if public is not None:
        arguments += ["--tls-cert", str(public.cert), "--tls-key", str(public.key)]
    if settings.metrics_port:
        arguments += ["--metrics-port", str(settings.metrics_port)]
    for tenant, weight in settings.weights.items():
        arguments += ["--weight", f"{tenant}={weight:g}"]
    for folder in settings.models:
        arguments += ["--models", str(folder)]
    return Command(arguments=arguments, environ=gateway_environ(is_encrypted=tls is not None))


def _child(
    name: str, command: Command, settings: Settings, ready_file: Path | None = None
) -> Child:
    return Child(
        name=name,
        arguments=command.arguments,
        environ={
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            # Dask sets up the logging of its processes; ours in them would be silent otherwise.
            "DASK_LOGGING__NOS_BACKEND": settings.log_level,
            **command.environ,
        },
        log_path=settings.state_dir / LOG_FOLDER_NAME / f"{name}.log",
        ready_file=ready_file,
    )
