"""What the gateway hands to a worker so that it can serve a model: plain data, no Dask, no gRPC, no torch."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_CALL_TIMEOUT_S = 30.0
LOAD_TIMEOUT_S = 300.0

#: In a model's folder: bytes of the tensors and media that `__init__` is called with.
INIT_FILE = ".nos/init"
#: In a model's folder: the state that the model, a network, takes after its construction.
WEIGHTS_FILE = ".nos/weights.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDefinition:
    """One version of a model, complete: a worker on any host of the cluster can serve it from this."""

    name: str
    """For instance `nos/digits`."""
    version: int
    """1, 2, 3, ..."""
    owner: str
    """The tenant that registered it; `nos` for built-in models."""
    source: str
    """Python source; run by executors only."""
    source_name: str
    """Where the source came from, for tracebacks: a path, or `<notebook cell 7>`."""
    class_name: str
    """The top-level class or function of the source that is the model."""
    folder: str = ""
    """Folder of the source, where its files lie and its sibling modules are imported from; empty if none."""
    init: list[tuple[str, Any]] = field(default_factory=list)
    """What `__init__` is called with: (parameter, JSON node), as calls of executors have them."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    isolation: str = "shared"
    """`shared`: one executor for all models of the owner; `process`: an executor of its own."""
    environment: list[str] = field(default_factory=list)
    """Packages it needs besides the server's, as PEP 508 writes them; normalized."""
    call_timeout_s: float = DEFAULT_CALL_TIMEOUT_S
    """The longest that one call may run; then its executor is ended. 0 means no limit."""
    spec: bytes = b""
    """The serialized `nos.v1.ModelSpec`: interface for argument checks and for clients."""

    profiles: list[bytes] = field(default_factory=list)
    """What was measured of it before, each a serialized `nos.v1.Profile`; on whatever devices."""

    @property
    def key(self) -> str:
        """Names this version everywhere: `name@v3`."""
        return f"{self.name}@v{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain containers, as Dask's comms carry it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Return what `to_dict` gave; lists that came back as tuples are lists again."""
        init = [(name, value) for name, value in fields["init"]]
        return cls(**{**fields, "init": init})


def folder_name(digests: Mapping[str, str]) -> str:
    """Name a folder by what is in it: the sha256 of its files' paths and sha256s, lower-case hex."""
    listed = "".join(f"{path}\0{sha256}\n" for path, sha256 in sorted(digests.items()))
    return hashlib.sha256(listed.encode()).hexdigest()
