"""Settings of `nos serve`: from flags, then the environment (`NOS_PORT`), then a TOML file.

Only the composition roots read them.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from pathlib import Path  # noqa: TC003 - pydantic looks it up
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from nos.errors import ConfigError
from nos.wire.host import is_loopback
from nos.wire.limits import MAX_STREAMS
from nos.wire.local import state_dir
from pydantic import ByteSize, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_PREFIX: Final = "NOS_"
#: Variables of ours that are no setting of the server.
_OTHER_VARIABLES: Final = frozenset({"NOS_ADDRESS", "NOS_TOKEN_FILE", "NOS_WEIGHTS_DIR"})
_OTHER_PREFIXES: Final = ("NOS_WORKER_", "NOS_PLANE_")

_MIN_WEIGHT: Final = 0.01
_MAX_WEIGHT: Final = 100.0

_Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseSettings):
    """What a server is told. A docstring says the unit, how to disable, and why this default."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, extra="forbid", use_attribute_docstrings=True, frozen=True
    )

    host: str = "127.0.0.1"
    """Address that the gateway listens on; other than loopback, for instance 0.0.0.0, it encrypts."""
    port: _Port = 50051
    """Port that the gateway listens on; 0 takes any free one."""
    tls_cert: Path | None = None
    """Certificate chain of the gateway, PEM; without one, a public address gets one of its own making."""
    tls_key: Annotated[Path | None, Field(validate_default=True)] = None
    """Private key of the certificate, PEM."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|none)$")] = "auto"
    """auto (every CUDA device, else the processor), cpu, cuda (every one), cuda:N, or none: no worker here,
    where a scheduler is joined that has its own."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of workers; 0 means one per device. On CUDA, more than there are devices share them and their
    memory in equal parts."""
    scheduler: str = ""
    """Join the Dask scheduler at this address (tls://host:port, or tcp:// on loopback); empty starts one."""
    tls_dir: Annotated[Path | None, Field(validate_default=True)] = None
    """Folder with ca.pem, cert.pem and key.pem for a scheduler that is joined with TLS."""
    worker_host: str = ""
    """Address of this machine that the workers' ports listen on, with TLS unless it is loopback; empty means
    loopback, or with a scheduler elsewhere, the address that leads there."""
    capacity_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Bytes of device memory that models of one worker may use, for instance 8GiB; default: what there is."""
    headroom_bytes: ByteSize = ByteSize(0)
    """Of the capacity, what stays free always."""
    eviction: Literal["lru", "fifo", "lfu", "gdsf"] = "lru"
    """Which model leaves a full device: least recently used, first loaded, least often used, or cheapest to
    bring back per byte and use."""
    max_models: Annotated[int, Field(ge=0)] = 0
    """Models on one device at once; 0 means as many as fit."""
    idle_unload_s: Annotated[float, Field(ge=0)] = 0.0
    """Models leave the device after so many seconds without use; 0 means only when room is needed."""
    profile_s: Annotated[float, Field(ge=0, le=600)] = 2.0
    """Seconds that measuring what a model needs may take, once, while the device is idle; 0: nothing is
    measured, and batches have the usual limit."""
    host_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Bytes of main memory for copies of models; beyond it they go to files. Default: no limit."""
    confinement: Literal["auto", "off"] = "auto"
    """How code of models is held: auto is the strongest that this machine has (a user of its own for every
    owner, landlock); off leaves it what the server's own user may do."""
    executor_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Bytes of main memory that one executor may have for itself; beyond it models run out of memory.
    Default: no limit, but where memory ends the kernel ends executors first."""
    max_streams: Annotated[int, Field(ge=1, le=100_000)] = MAX_STREAMS
    """Streams that one worker serves at once; the next is refused. An idle one costs some 80 KiB in all."""
    max_tenant_streams: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Of these, how many one tenant may have; 0 means all."""
    max_queued: Annotated[int, Field(ge=1)] = 256
    """Requests of one model that may wait on a worker; the next is refused with a time to come back."""
    max_queued_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(512 << 20)
    """Bytes of these; one larger request is taken alone."""
    load_timeout_s: Annotated[float, Field(gt=0, le=300)] = 300.0
    """Seconds that each step of loading a model may take; then it has failed. Clients wait no longer than
    for the default."""
    max_frame_bytes: Annotated[ByteSize, Field(gt=0, le=2 << 30)] = ByteSize(2 << 30)
    """Bytes of the arrays and media of one frame or call; the default is the most that the protocol has."""
    max_image_pixels: Annotated[int, Field(ge=1, le=150_000_000)] = 50_000_000
    """Pixels of one image that comes as a file."""
    max_log_lines: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Lines a second that the models of one executor may print; what exceeds them is dropped and counted."""
    max_source_bytes: Annotated[ByteSize, Field(gt=0, le=8 << 20)] = ByteSize(1 << 20)
    """Bytes of the source of one model."""
    max_registered: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Names of models that there may be, those of the server and of --models among them."""
    max_upload_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(20 << 30)
    """Bytes of the files of one model together, and of each of them."""
    max_tenant_upload_bytes: Annotated[ByteSize, Field(ge=0)] = ByteSize(0)
    """Bytes that one tenant may upload as long as the server lives; 0 means no limit."""
    scale_down_s: Annotated[float, Field(gt=0)] = 60.0
    """Replicas of a model that may have several leave after they have been too many for so many seconds."""
    drain_s: Annotated[float, Field(gt=0)] = 30.0
    """Streams may stay so many seconds on a replica that leaves; what they sent is answered all the same."""
    weights: Annotated[dict[str, float], NoDecode] = {}
    """Shares of a busy device by tenant, 1 where none is said: ann=4,bob=0.5; at least 0.01, at most 100."""
    state_dir: Path = Field(default_factory=state_dir)
    """Folder for the token, the logs and what the gateway keeps."""
    models: Annotated[list[Path], NoDecode] = []
    """Folder of Python files, each of which is a model; may be given several times."""
    idle_shutdown_s: Annotated[float, Field(ge=0)] = 0.0
    """End after so many seconds without a client; 0 never does."""
    dashboard_port: _Port = 0
    """Port of the Dask dashboard, on loopback; 0 takes 8787 if it is free, else any."""
    metrics_port: _Port = 0
    """Port of the Prometheus metrics, on loopback, for every user of this machine; 0 serves none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much the logs hold."""

    @field_validator("weights", mode="before")
    @classmethod
    def _split_weights(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        pairs = [part.partition("=") for part in given.split(",") if part.strip()]
        return {tenant.strip(): weight for tenant, _, weight in pairs}

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, given: dict[str, float]) -> dict[str, float]:
        for tenant, weight in given.items():
            if not tenant or not _MIN_WEIGHT <= weight <= _MAX_WEIGHT:
                raise ValueError(f"tenant=share, 0.01 <= share <= 100, got {tenant}={weight:g}")
        return given

    @field_validator("models", mode="before")
    @classmethod
    def _split_folders(cls, given: object) -> object:
        return (
            [part for part in given.split(os.pathsep) if part] if isinstance(given, str) else given
        )

    @field_validator("models")
    @classmethod
    def _check_folders(cls, given: list[Path]) -> list[Path]:
        for folder in given:
            try:
                is_there = folder.is_dir()
            except OSError:  # a name that no folder can have
                is_there = False
            if not is_there:
                raise ValueError(f"an existing folder, got {str(folder)[:200]!r}")
        return [folder.absolute() for folder in given]

    @field_validator("state_dir")
    @classmethod
    def _expand(cls, given: Path) -> Path:
        return _absolute(given)

    @field_validator("worker_host")
    @classmethod
    def _check_worker_host(cls, given: str) -> str:
        if given and cls._check_host(given) in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            raise ValueError(f"one address that clients can use, got {given!r}")
        return cls._check_host(given) if given else given

    @field_validator("host")
    @classmethod
    def _check_host(cls, given: str) -> str:
        if given == "localhost":
            return "127.0.0.1"
        try:
            return str(ipaddress.ip_address(given))
        except ValueError:
            raise ValueError(f"an IP address of this machine, or 0.0.0.0, got {given!r}") from None

    @field_validator("tls_key")
    @classmethod
    def _check_pair(cls, given: Path | None, info: ValidationInfo) -> Path | None:
        if (given is None) != (info.data.get("tls_cert") is None):
            raise ValueError("both --tls-cert and --tls-key, or neither, got one")
        return given

    @field_validator("scheduler")
    @classmethod
    def _check_scheduler(cls, given: str) -> str:
        if given:
            place = urlsplit(given)
            if place.scheme not in ("tcp", "tls") or not place.hostname or not _port_of(given):
                raise ValueError(f"tls://host:port or tcp://host:port, got {given!r}")
            if place.scheme == "tcp" and not is_loopback(place.hostname):
                # Whoever reaches a scheduler runs code there.
                raise ValueError(f"tls:// for a scheduler elsewhere, got {given!r}")
        return given

    @field_validator("tls_dir")
    @classmethod
    def _check_tls_dir(cls, given: Path | None, info: ValidationInfo) -> Path | None:
        needs_tls = str(info.data.get("scheduler", "")).startswith("tls://")
        if needs_tls != (given is not None):
            raise ValueError(
                "--tls-dir with a scheduler at tls://, and only there, got "
                + ("none" if needs_tls else str(given))
            )
        return _absolute(given) if given is not None else None


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"a folder, got {str(path)!r}: {error}") from error


def _port_of(url: str) -> int:
    """Return the port of an address; 0 if it has none that is a number."""
    try:
        return urlsplit(url).port or 0
    except ValueError:
        return 0


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Return the settings from flags, environment and file.

    Args:
        flags: What the command line gave, by field name.
        config: A TOML file, or None.

    Raises:
        ConfigError: If one is unknown or wrong; it names the setting, where it came from, and what would do.
    """
    from_file = _read_file(config) if config is not None else {}

    class _WithFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

    try:
        return _WithFile(**flags)
    except ValidationError as invalid:
        raise _first_error(invalid, flags, from_file, config) from None


def unknown_variables(environ: Iterable[str]) -> list[str]:
    """Return what to say of each `NOS_` variable that nothing reads."""
    known = {f"{_PREFIX}{name.upper()}" for name in Settings.model_fields} | _OTHER_VARIABLES
    return [
        f"unknown variable {name} is ignored. {suggest(name, known)}".rstrip()
        for name in sorted(environ)
        if name.startswith(_PREFIX) and name not in known and not name.startswith(_OTHER_PREFIXES)
    ]


def suggest(word: str, known: Iterable[str]) -> str:
    """Return "Did you mean X?", or nothing if nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {close[0]}?" if close else ""


def _read_file(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "cannot read the settings file", "config", got=f"{path}: {error.strerror}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the settings file is not TOML", "config", got=f"{path}: {error}"
        ) from error
    for key in found:
        if key not in Settings.model_fields:
            hint = suggest(key, Settings.model_fields)
            raise ConfigError(f"unknown setting {key} in {path}", key, hint=hint)
    return found


def _first_error(
    invalid: ValidationError,
    flags: Mapping[str, Any],
    from_file: Mapping[str, Any],
    path: Path | None,
) -> ConfigError:
    first = invalid.errors()[0]
    name = str(first["loc"][0])
    variable = f"{_PREFIX}{name.upper()}"
    if name in flags:
        place = flag_of(name)
    elif variable in os.environ:
        place = variable
    elif name in from_file:
        place = f"{name} in {path}"
    else:
        place = name
    wanted = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if ", got " in wanted:
        return ConfigError(f"bad {place}: expected {wanted}", name)
    if first["type"] == "string_pattern_mismatch":
        wanted = "auto, cpu, cuda, cuda:N or none"
    elif first["type"] == "byte_size":
        wanted = "a number of bytes greater than 0, or a size such as 4GiB"
    return ConfigError(f"bad {place}", name, wanted, repr(first["input"]))


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"
