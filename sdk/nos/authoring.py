"""Marking classes as models, and finding their source. Standard library only."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nos.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_MARK: Final = "__nos_model__"


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
    queue_delay_s: float | None = None
    """How long a call waits for others to run with, in seconds; None: as short as pays."""
    env: Sequence[str] = ()
    """Packages that it needs besides the server's."""
    pin: bool = False
    """Whether it stays on its device whatever else wants the room."""
    idle_unload_s: float | None = None
    """After how long without use it leaves the device, in seconds; 0: never, None: as the server does."""


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
    env: Sequence[str] = (),
    pin: bool = False,
    idle_unload_s: float | None = None,
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
            a number is the most rows at once; False turns it off.
        queue_delay_s: The longest that a call waits for others to run with; without it a call waits for
            none but those that are known to come at once.
        env: Packages that it needs and the server has not, as in `["opencv-python-headless==4.*"]`. It runs
            in an environment of its own that has them, and the server's torch, numpy and safetensors.
        pin: Keep it on its device whatever else wants the room.
        idle_unload_s: Take it off the device after so many seconds without use, although nobody needs the
            room; 0 means never, and without it the server's own rule holds.
    """
    options = Options(
        name=name,
        device=device,
        isolation=isolation,
        call_timeout_s=call_timeout_s,
        batch=batch,
        queue_delay_s=queue_delay_s,
        env=env,
        pin=pin,
        idle_unload_s=idle_unload_s,
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
    name: str


def source_of(
    source: str | type | Callable[..., Any], class_name: str = "", source_name: str = ""
) -> Source:
    """Return source text and name of a class, function or text.

    Of a class's module, the imports that the class uses go with it, and nothing else: running a whole
    script or notebook on the server is nobody's intention. So what else it needs it must define inside,
    or the text of a whole file be given.

    Raises:
        InvalidRequestError: If a class is given whose source cannot be found.
    """
    if isinstance(source, str):
        return Source(source, class_name, source_name or "<registered>", "")
    if not (inspect.isclass(source) or inspect.isfunction(source)):
        raise InvalidRequestError(
            "no model's source", "source", "a class, a function or text", type(source).__name__
        )
    own = getattr(source, _MARK, None)
    name = own.name if isinstance(own, Options) else ""
    try:
        text = textwrap.dedent(inspect.getsource(source))
        file = inspect.getsourcefile(source) or ""
    except (OSError, TypeError) as error:
        raise InvalidRequestError(
            f"the source of {source.__name__} cannot be found",
            "source",
            hint="Use %%nos model in a notebook, or give the source as text",
        ) from error
    imports = _imports_for(source, text)
    return Source(
        imports + text, source.__name__, source_name or file or f"<{source.__name__}>", name
    )


def _imports_for(source: Any, text: str) -> str:
    """Return the top-level imports of the module of `source` whose names occur in its `text`."""
    try:
        module = ast.parse(inspect.getsource(inspect.getmodule(source) or source))
    except (OSError, TypeError, SyntaxError):  # a notebook's cells are no module's file
        return ""
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    lines = []
    for node in module.body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        kept = [name for name in node.names if (name.asname or name.name.partition(".")[0]) in used]
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            kept = node.names
        if kept:
            node.names = kept
            lines.append(f"{ast.unparse(node)}\n")
    return "".join(lines)
