"""Marking classes as models, and finding their source. Standard library only."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nos.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")

_MARK: Final = "__nos_model__"
_ENTRY: Final = "model.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a class says about itself as a model."""

    name: str = ""
    """The model's name; empty leaves it to whoever registers the class."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    isolation: str = "shared"
    """`shared`: one process for all models of the owner; `process`: one of its own."""
    call_timeout_s: float = 30.0
    """The longest that one call may run, in seconds; then its process is ended. 0 means no limit."""
    batch: bool | int | None = None
    """Whether concurrent calls run as one, or how many rows at most; None: where the annotations say so."""
    exact: bool = False
    """Whether a row's result must not depend, to the last bit, on what runs beside it."""
    check_batch: bool = False
    """Whether the first batch is repeated call by call and compared."""
    pad: str = ""
    """The dimension whose length may differ within a batch."""
    queue_delay_s: float | None = None
    """How long a call waits for others to run with, in seconds; None: as short as pays."""
    env: Sequence[str] = ()
    """Packages that it needs besides the server's."""
    pin: bool = False
    """Whether it stays on its device whatever else wants the room."""
    idle_unload_s: float | None = None
    """After how long without use it leaves the device, in seconds; 0: never, None: as the server does."""
    memory_bytes: int = 0
    """The least that models may use of a device's memory where it runs; 0 for any."""
    placement: str = "spread"
    """`spread`: replicas on as many devices as can be; `pack`: on as few."""


def model(
    cls: T | None = None,
    /,
    *,
    name: str = "",
    device: str = "auto",
    isolation: str = "shared",
    call_timeout_s: float = 30.0,
    batch: bool | int | None = None,
    queue_delay_s: float | None = None,
    exact: bool = False,
    check_batch: bool = False,
    pad: str = "",
    env: Sequence[str] = (),
    pin: bool = False,
    idle_unload_s: float | None = None,
    memory_bytes: int = 0,
    placement: str = "spread",
) -> Any:
    """Mark a class (or function) as a model; it is returned unchanged and works here as before.

    Its public methods can be called remotely, with plain Python values, arrays and images. The server
    reads these options from the source: they must be literals.

    Args:
        cls: The class, where the decorator is used without parentheses.
        name: The model's name, for instance `me/scorer`.
        device: Which devices it may run on: `auto`, `cpu` or `cuda`.
        isolation: `shared` with the owner's other models, or a `process` of its own.
        call_timeout_s: The longest that one call may run, in seconds; 0 means no limit.
        batch: A method whose tensors all have a first dimension named `batch` (or `*batch`: any number of
            leading dimensions), parameters and result alike, runs many calls as one. True also lets
            methods that take lists and give one item or row for each, and results in dicts and tuples;
            methods that take a single array or image are run over those that wait, one after the other.
            A number is the most rows at once, and a call with more runs in pieces; False turns it off.
        queue_delay_s: The longest that a call waits for others to run with; without it a call waits for
            none but those that are known to come at once.
        exact: Every run has exactly as many rows as `batch` says (16 if it says none), missing ones being
            repeated, so that a row's result is the same to the last bit whatever runs beside it. Costs the
            time of full batches.
        check_batch: The first batch is repeated call by call and compared. Where rows depend on each other,
            each call runs alone from then on.
        pad: Name of the dimension behind `batch` whose length may differ between the calls of a batch.
            Shorter rows are filled up with zeros; the method takes a parameter `mask` of
            `bool[batch, <name>]` or None, which the server gives, true where an element is real (None:
            everywhere). A result with that dimension is cut to each call's own length.
        env: Packages that it needs and the server has not, as in `["opencv-python-headless==4.*"]`. It runs
            in an environment of its own that has them, and the server's torch, numpy and safetensors.
        pin: Keep it on its device whatever else wants the room.
        idle_unload_s: Take it off the device after so many seconds without use, although nobody needs the
            room; 0 means never, and without it the server's own rule holds.
        memory_bytes: Run it only on devices of whose memory models may use at least as much.
        placement: Where it has several replicas: `spread` over as many devices as can be, or `pack` on few.
    """
    options = Options(
        name=name,
        device=device,
        isolation=isolation,
        call_timeout_s=call_timeout_s,
        batch=batch,
        queue_delay_s=queue_delay_s,
        exact=exact,
        check_batch=check_batch,
        pad=pad,
        env=env,
        pin=pin,
        idle_unload_s=idle_unload_s,
        memory_bytes=memory_bytes,
        placement=placement,
    )

    def mark(target: T) -> T:
        setattr(target, _MARK, options)
        return target

    return mark if cls is None else mark(cls)


@dataclass(frozen=True, slots=True)
class Source:
    """A model's source."""

    text: str
    class_name: str
    source_name: str
    #: What its decorator calls it; empty if it does not.
    name: str = ""
    #: What came along, in words.
    collected: tuple[str, ...] = ()
    #: By path in the model's folder: a file here, or its content.
    files: Mapping[str, Path | bytes] = field(default_factory=dict)


def source_of(
    source: Any,
    class_name: str = "",
    source_name: str = "",
    namespace: Mapping[str, Any] | None = None,
) -> Source:
    """Return the source of a class, function, text, file or folder, with what it needs beside it.

    Args:
        source: As in `Client.register`.
        class_name: Which top-level name of a text or file is the model; empty leaves it to the server.
        source_name: Names a text in tracebacks.
        namespace: Where the names are found that a text needs; None: it stands alone.

    Raises:
        InvalidRequestError: If there is no source to be found, or it needs what cannot travel.
    """
    from nos import _collect  # takes a while, and most clients never register

    if isinstance(source, os.PathLike):
        return _of_path(Path(source), class_name)
    if isinstance(source, str):
        source_name = source_name or "<registered>"
        if namespace is None:
            return Source(source, class_name, source_name)
        found = _collect.collect_text(source, source_name, namespace)
        return Source(found.text, class_name, found.source_name, "", found.names, dict(found.files))
    if not (inspect.isclass(source) or inspect.isfunction(source)):
        raise InvalidRequestError(
            "no model's source",
            "source",
            "a class, a function, text or a path",
            type(source).__name__,
        )
    own = getattr(source, _MARK, None)
    name = own.name if isinstance(own, Options) else ""
    found = _collect.collect(source)
    return Source(
        found.text, source.__name__, found.source_name, name, found.names, dict(found.files)
    )


def _of_path(path: Path, class_name: str) -> Source:
    """Return a file's source, or a folder's with everything in it.

    Raises:
        InvalidRequestError: If it cannot be read, or the folder does not say which file is the model.
    """
    files: dict[str, Path | bytes] = {}
    entry = path
    if path.is_dir():
        entry = _entry_of(path)
        files.update(
            (found.relative_to(path).as_posix(), found)
            for found in sorted(path.rglob("*"))
            if found.is_file() and not _is_hidden(found.relative_to(path))
        )
    try:
        text = entry.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"the source cannot be read: {error}", "source", "a Python file or a folder", str(path)
        ) from error
    name = entry.name if files else str(entry)
    return Source(text, class_name, name, "", tuple(f"file {found}" for found in files), files)


def _entry_of(folder: Path) -> Path:
    found = [path for path in folder.glob("*.py") if not path.name.startswith("_")]
    named = [path for path in found if path.name == _ENTRY]
    if len(named or found) == 1:
        return (named or found)[0]
    raise InvalidRequestError(
        "the folder does not say which file is the model",
        "source",
        f"{_ENTRY}, or one Python file at its top",
        ", ".join(sorted(path.name for path in found))[:200] or "no Python file",
    )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
