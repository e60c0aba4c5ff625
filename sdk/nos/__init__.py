"""One GPU, every notebook: the client of the NOS inference server.

    >>> import nos
    >>> client = nos.start()                     # or nos.connect("host:50051")
    >>> digits = client.model("nos/digits")
    >>> digits.labels(images)

Everything public is here; the rest of the package is not for import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nos import _fork as _fork  # before anything imports grpc
from nos._version import __version__

if TYPE_CHECKING:
    from nos._bench import Bench
    from nos._profile import Profile
    from nos._stats import ModelStats, StatsList
    from nos.aio import AsyncClient, AsyncModelHandle, AsyncStream
    from nos.authoring import model
    from nos.client import Client, ModelHandle, Stream, connect
    from nos.errors import NosError
    from nos.local import start, stop
    from nos.types import (
        Event,
        Media,
        ModelInfo,
        ModelSpec,
        Result,
        Status,
        Timings,
    )

__all__ = [
    "AsyncClient",
    "AsyncModelHandle",
    "AsyncStream",
    "Bench",
    "Client",
    "Event",
    "Media",
    "ModelHandle",
    "ModelInfo",
    "ModelSpec",
    "ModelStats",
    "NosError",
    "Profile",
    "Result",
    "StatsList",
    "Status",
    "Stream",
    "Timings",
    "__version__",
    "connect",
    "errors",
    "model",
    "start",
    "stop",
    "types",
]

# Loaded on first use: the backend's processes share nos.wire, and some of them must not import grpc.
_HOMES = {
    "AsyncClient": "nos.aio",
    "AsyncModelHandle": "nos.aio",
    "AsyncStream": "nos.aio",
    "Bench": "nos._bench",
    "Client": "nos.client",
    "Event": "nos.types",
    "Media": "nos.types",
    "ModelHandle": "nos.client",
    "ModelInfo": "nos.types",
    "ModelSpec": "nos.types",
    "ModelStats": "nos._stats",
    "NosError": "nos.errors",
    "Profile": "nos._profile",
    "Result": "nos.types",
    "StatsList": "nos._stats",
    "Status": "nos.types",
    "Stream": "nos.client",
    "Timings": "nos.types",
    "connect": "nos.client",
    "model": "nos.authoring",
    "start": "nos.local",
    "stop": "nos.local",
}


def __getattr__(name: str) -> Any:
    if name in {"errors", "types"}:
        return importlib.import_module(f"nos.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'nos' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(shell: Any) -> None:
    """Add `%nos` and `%%nos` to IPython; called by `%load_ext nos`."""
    from nos_jupyter import load_ipython_extension as load  # an extra of the distribution

    load(shell)
