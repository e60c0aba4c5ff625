"""The source of a class or function with the names it needs around it, so that it runs elsewhere.

The text is pieces, one after the other, each under a line `#!nos LINE NAME` that says where it stood: the
server compiles every piece under that name and line, so tracebacks point at the cell. Standard library only.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import inspect
import linecache
import logging
import math
import pathlib
import re
import symtable
import sys
import textwrap
import types
import typing
import warnings
from collections import ChainMap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from nos import _local_modules
from nos.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MISSING: Final = object()
_MAX_CONSTANT_CHARS: Final = 64 << 10
_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), type(...))
#: What says something rather than holding something: the statement that made it makes it elsewhere too.
_DECLARATIVE: Final = (
    *(typing.TypeVar, types.GenericAlias, types.UnionType),
    *(re.Pattern, pathlib.PurePath, logging.Logger),
)
_DECLARATIVE_NAMES: Final = frozenset(
    {("torch", "dtype"), ("torch", "device"), ("numpy", "dtype"), ("datetime", "timedelta")}
)


@dataclass(slots=True)
class Collected:
    """A source that stands alone."""

    text: str
    source_name: str
    """Where the class or function itself stood."""
    names: tuple[str, ...] = ()
    """What came along, in the order of need: `import numpy as np`, `SCALE = 3`, `def norm`, `file net.py`."""
    files: dict[str, pathlib.Path] = field(default_factory=dict)
    """Modules of the author's folder, by their path in the model's folder."""


def collect(target: Any) -> Collected:
    """Return the source of a class or function with what it needs of its notebook or module.

    Raises:
        InvalidRequestError: If its source cannot be found, or it needs something that cannot travel as
            source; names that.
    """
    namespace = _namespace_of(target)
    collector = _Collector(namespace, target.__name__)
    piece = _definition(target)
    collector.follow(piece)
    collector.pieces.append(piece)
    return collector.finish(piece.source_name)


def collect_text(text: str, source_name: str, namespace: Mapping[str, Any]) -> Collected:
    """Return a text that defines a model, with what it needs of a namespace and does not define itself.

    Raises:
        InvalidRequestError: As `collect`, or if the text is not Python.
    """
    piece = _Piece(text, source_name, 1)
    collector = _Collector(namespace, source_name)
    collector.follow(piece)
    if not (collector.imports or collector.pieces or collector.files):
        return Collected(text, source_name)
    collector.pieces.append(piece)
    return collector.finish(source_name)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some lines of a cell or file."""

    text: str
    source_name: str
    first_line: int


class _Collector:
    """Follows names from one piece to the next.

    Args:
        namespace: Where names are looked up.
        wanted_by: Names the model in errors.
    """

    def __init__(self, namespace: Mapping[str, Any], wanted_by: str) -> None:
        self._namespace = namespace
        self._module = namespace.get("__name__", "__main__")
        self._wanted_by = wanted_by
        self._seen: set[str] = set()
        self._has_future = False
        self.imports: list[str] = []
        #: Each after those it needs.
        self.pieces: list[_Piece] = []
        self.names: list[str] = []
        self.files: dict[str, pathlib.Path] = {}

    def finish(self, source_name: str) -> Collected:
        """Return all of it; the last piece is the model's."""
        lines = ["from __future__ import annotations\n"] if self._has_future else []
        lines += [f"{line}\n" for line in self.imports]
        for piece in self.pieces:
            lines.append(f"#!nos {piece.first_line} {piece.source_name}\n")
            lines.append(piece.text if piece.text.endswith("\n") else f"{piece.text}\n")
        names = [*self.names, *(f"file {path}" for path in sorted(self.files))]
        return Collected("".join(lines), source_name, tuple(names), self.files)

    def follow(self, piece: _Piece) -> None:
        """Bring whatever a piece needs."""
        for name in _free_names(piece):
            if name in self._seen:
                continue
            self._seen.add(name)
            value = self._namespace.get(name, _MISSING)
            # An unknown name may be a builtin, or fail on the server as it would here.
            if value is not _MISSING and value is not getattr(builtins, name, _MISSING):
                self._bring(name, value, piece)

    def note_future(self, code: types.CodeType) -> None:
        """Remember that annotations are text where this was compiled."""
        if code.co_flags & __future__.annotations.compiler_flag:
            self._has_future = True

    def _bring(self, name: str, value: Any, by: _Piece) -> None:
        if isinstance(value, types.ModuleType):
            self._import_module(name, value, by)
        elif (text := _constant(value)) is not None:
            self._add(_Piece(f"{name} = {text}", "<constants>", 1), f"{name} = {text}")
        elif self._is_own(value):
            self._define(name, value)
        elif (line := self._import_line(name, value)) is not None:
            self._import(line, sys.modules.get(getattr(value, "__module__", None) or ""))
        elif (piece := self._assignment(name, value)) is not None:
            self.follow(piece)
            self._add(piece, piece.text)
        else:
            raise self._stays_here(name, value)

    def _stays_here(self, name: str, value: Any) -> InvalidRequestError:
        kind = type(value)
        shown = (
            kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        )
        return InvalidRequestError(
            f"{self._wanted_by} needs {name}, a live object of this process, which cannot travel as source",
            name,
            "an import, a constant, a function or a class",
            shown,
            "Pass it as an argument of __init__ (init={...}), or register with pickle=True",
        )

    def _add(self, piece: _Piece, shown: str) -> None:
        self.pieces.append(piece)
        line = shown.partition("\n")[0]
        self.names.append(line if len(line) <= 80 else f"{line[:77]}...")  # noqa: PLR2004 - one line of a table

    def _import(self, line: str, module: types.ModuleType | None) -> None:
        if line not in self.imports:
            self.imports.append(line)
            self.names.append(line)
        if module is not None:
            self.files.update(_local_modules.files_of(module))

    def _import_module(self, name: str, module: types.ModuleType, by: _Piece) -> None:
        path = module.__name__
        if path == "__main__":
            raise self._stays_here(name, module)
        self._import(f"import {path}" if name == path else f"import {path} as {name}", module)
        # `import a.b` binds `a` alone: what is used of it says which of its modules are meant.
        for dotted in sorted(_dotted_uses(by, name)):
            full = path + dotted[len(name) :]
            found = sys.modules.get(full)
            if found is not None and name == path:
                self._import(f"import {full}", found)

    def _is_own(self, value: Any) -> bool:
        value = inspect.unwrap(value) if callable(value) else value
        is_definition = isinstance(value, type | types.FunctionType)
        return is_definition and value.__module__ == self._module

    def _define(self, name: str, value: Any) -> None:
        own = inspect.unwrap(value).__name__
        if own == "<lambda>":
            piece = self._assignment(name, value, is_certain=True)
            if piece is None:
                raise self._stays_here(name, value)
        else:
            piece = _definition(inspect.unwrap(value))
        closed = _closed_over(value)
        outer = self._namespace
        if closed:
            self._namespace = ChainMap(dict(closed), dict(outer))
        try:
            self.follow(piece)
        finally:
            self._namespace = outer
        self.note_future_of(value)
        self._add(piece, _headline(piece.text))
        if own not in {name, "<lambda>"}:
            self._add(_Piece(f"{name} = {own}", "<constants>", 1), f"{name} = {own}")

    def note_future_of(self, target: Any) -> None:
        """Remember whether annotations are text where a class or function was compiled."""
        for function in _functions(target):
            self.note_future(function.__code__)

    def _import_line(self, name: str, value: Any) -> str | None:
        """Return the statement that imports `value` under `name`, if there can be one."""
        module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if isinstance(module, str) and qualname and module not in {"__main__", self._module}:
            found = sys.modules.get(module)
            if getattr(found, qualname, _MISSING) is value:
                return _from(module, qualname, name)
        for node, _ in self._statements():
            if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                continue
            for alias in node.names:
                source = sys.modules.get(node.module)
                if (alias.asname or alias.name) == name and (
                    getattr(source, alias.name, _MISSING) is value
                ):
                    return _from(node.module, alias.name, name)
        return None

    def _assignment(self, name: str, value: Any, *, is_certain: bool = False) -> _Piece | None:
        """Return the statement that made `value`, where it makes the same elsewhere."""
        if not (is_certain or _is_declarative(value)):
            return None
        for node, (lines, source_name) in self._statements():
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign) and node.value is not None
                else []
            )
            if any(isinstance(item, ast.Name) and item.id == name for item in targets):
                text = "".join(lines[node.lineno - 1 : node.end_lineno])
                return _Piece(textwrap.dedent(text), source_name, node.lineno)
        return None

    def _statements(self) -> Iterator[tuple[ast.stmt, tuple[list[str], str]]]:
        """Yield the top-level statements of the module's file or the notebook's cells, the last first."""
        cells = self._namespace.get("In")
        if self._module == "__main__" and isinstance(cells, list):
            sources = [
                (text, f"<cell {number}>")
                for number, text in reversed(list(enumerate(cells)))
                if isinstance(text, str)
            ]
        else:
            file = self._namespace.get("__file__") or ""
            sources = [("".join(linecache.getlines(file)), file)]
        for text, source_name in sources:
            try:
                body = _parse(text).body
            except (SyntaxError, ValueError):
                continue
            for node in reversed(body):
                yield node, (text.splitlines(keepends=True), source_name)


def _namespace_of(target: Any) -> Mapping[str, Any]:
    function = next(_functions(target), None)
    module = sys.modules.get(target.__module__)
    outer: dict[str, Any] = vars(module) if module is not None else {}
    if function is not None:
        outer = function.__globals__
    closed = _closed_over(target)
    return ChainMap(dict(closed), outer) if closed else outer


def _functions(target: Any) -> Iterator[types.FunctionType]:
    """Yield a function, or those that a class's own body defines."""
    target = inspect.unwrap(target) if callable(target) else target
    if isinstance(target, types.FunctionType):
        yield target
    elif isinstance(target, type):
        for value in vars(target).values():
            if isinstance(value, property):
                value = value.fget  # noqa: PLW2901 - a property is its getter here
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__  # noqa: PLW2901 - likewise
            value = inspect.unwrap(value) if callable(value) else value  # noqa: PLW2901 - likewise
            if isinstance(value, types.FunctionType) and value.__module__ == target.__module__:
                yield value


def _closed_over(target: Any) -> dict[str, Any]:
    found = {}
    for function in _functions(target):
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # not set yet
                continue
    found.pop("__class__", None)
    return found


def _definition(target: Any) -> _Piece:
    """Return where a class or function is defined.

    Raises:
        InvalidRequestError: If that cannot be found.
    """
    file = next(_files(target), "")
    lines = linecache.getlines(file) if file else []
    path = [part for part in target.__qualname__.split(".") if part != "<locals>"]
    near = next((function.__code__.co_firstlineno for function in _functions(target)), None)
    node = _find(lines, path, near)
    if node is None:
        raise InvalidRequestError(
            f"the source of {target.__name__} cannot be found",
            "source",
            "a class or function that a cell or file defines",
            hint="Use %%nos model in a notebook, or give the source as text",
        )
    first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
    text = textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))
    return _Piece(text, _shown(file), first)


def _files(target: Any) -> Iterator[str]:
    """Yield where the source of a class or function may stand."""
    for function in _functions(target):
        file = function.__code__.co_filename
        linecache.checkcache(file)
        if linecache.getlines(file):
            yield file
    try:
        yield inspect.getsourcefile(target) or ""
    except TypeError:  # a class of a notebook, which has no methods of its own
        for file in reversed(list(linecache.cache)):
            if _shown(file) != file:
                lines = linecache.getlines(file)
                if _find(lines, [target.__name__], None) is not None:
                    yield file


def _find(
    lines: list[str], path: list[str], near: int | None
) -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the last definition of that name, or the one around line `near`."""
    try:
        tree = _parse("".join(lines))
    except (SyntaxError, ValueError):
        return None
    found = None
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name == path[-1]
        ):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            if near is None or first <= near <= (node.end_lineno or first):
                found = node
    return found


def _shown(file: str) -> str:
    """Return how the user knows a file: `<cell 3>` for a cell."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    format_name = getattr(getattr(shell, "compile", None), "format_code_name", None)
    named = format_name(file) if format_name is not None else None
    match = re.search(r"\d+", named[1]) if named else None
    return f"<cell {match[0]}>" if match else file


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _free_names(piece: _Piece) -> list[str]:
    """Return the names that a piece uses and does not define, in order of their use.

    Raises:
        InvalidRequestError: If it is not Python.
    """
    try:
        top = symtable.symtable(piece.text, piece.source_name, "exec")
        tree = _parse(piece.text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise InvalidRequestError(
            f"{piece.source_name} is not Python: line {line}: {error}", "source"
        ) from None
    own = {
        symbol.get_name()
        for symbol in top.get_symbols()
        if symbol.is_assigned() or symbol.is_imported()
    }
    used = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    waiting = list(top.get_children())
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        used |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_global() and symbol.is_referenced()
        }
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used |= _annotation_names(tree)
    names += sorted(used - set(names))
    return [name for name in dict.fromkeys(names) if name in used and name not in own]


def _annotation_names(tree: ast.Module) -> set[str]:
    """Return the names in annotations, which no scope has where annotations are text."""
    found: set[str] = set()
    for node in ast.walk(tree):
        annotations = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            annotations.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotations.append(node.returns)
        for annotation in filter(None, annotations):
            found |= _names_in(annotation)
    return found


def _names_in(annotation: ast.expr) -> set[str]:
    found = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                inner = ast.parse(node.value, mode="eval")
            except (SyntaxError, ValueError):  # a shape, or words
                continue
            found |= {item.id for item in ast.walk(inner) if isinstance(item, ast.Name)}
    return found


def _dotted_uses(piece: _Piece, name: str) -> set[str]:
    """Return the dotted names that start with `name`: `a.b` and `a.b.c` for `a.b.c`."""
    found = set()
    for node in ast.walk(_parse(piece.text)):
        parts: list[str] = []
        inner: ast.expr | ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id == name:
            parts = [name, *reversed(parts)]
            found |= {".".join(parts[:end]) for end in range(2, len(parts) + 1)}
    return found


def _from(module: str, attribute: str, name: str) -> str:
    suffix = "" if attribute == name else f" as {name}"
    return f"from {module} import {attribute}{suffix}"


def _headline(text: str) -> str:
    """Return `def norm` or `class Net` of a definition."""
    node = _parse(text).body[0]
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"def {node.name}" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else text


def _constant(value: Any) -> str | None:
    """Return an expression for plain data; None for everything else."""
    if not _is_plain(value, 0):
        return None
    text = repr(value)
    return text if len(text) <= _MAX_CONSTANT_CHARS else None


def _is_plain(value: Any, depth: int) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if type(value) in _PLAIN:
        return True
    if depth > 16:  # noqa: PLR2004 - deep enough for any constant, and ends where a list holds itself
        return False
    if type(value) in {list, tuple} or (type(value) is set and value):
        return all(_is_plain(item, depth + 1) for item in value)
    if type(value) is dict:
        return all(
            _is_plain(key, depth + 1) and _is_plain(item, depth + 1) for key, item in value.items()
        )
    return False


def _is_declarative(value: Any) -> bool:
    kind = type(value)
    return (
        isinstance(value, _DECLARATIVE)
        or kind.__module__ == "typing"
        or (kind.__module__, kind.__name__) in _DECLARATIVE_NAMES
    )
