"""Modules of the author's own folder: which they are, and the files that they consist of."""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_INSTALLED: Final = frozenset({"site-packages", "dist-packages"})


def files_of(module: ModuleType) -> dict[str, Path]:
    """Return the files of a module of the author's folder and of those there that it imports.

    A package goes with all its Python files. An installed module has none: the server has it, or its
    environment does. Keys are paths as the import system finds them, for instance `net/layers.py`.
    """
    found: dict[str, Path] = {}
    root = root_of(module)
    if root is not None:
        _add(root, module.__name__.partition(".")[0], found)
    return found


def root_of(module: ModuleType) -> Path | None:
    """Return the author's folder that a module was imported from; None for one that is installed."""
    return _root_of(module, _folders())


def imported() -> list[ModuleType]:
    """Return all modules of the author's folder that are imported now."""
    folders = _folders()
    # Programs put other things there, too.
    modules: list[object] = list(sys.modules.values())
    return [
        module
        for module in modules
        if isinstance(module, ModuleType) and _root_of(module, folders) is not None
    ]


def _root_of(module: ModuleType, folders: set[Path]) -> Path | None:
    file = getattr(module, "__file__", None)
    name = module.__name__
    if not isinstance(file, str) or name == "__main__" or name.split(".")[0].startswith("nos"):
        return None
    path = Path(os.path.abspath(file))  # noqa: PTH100 - resolve() asks the disk, for thousands of modules
    parents = path.parents
    depth = name.count(".") + (path.name == "__init__.py")
    return parents[depth] if depth < len(parents) and parents[depth] in folders else None


def _folders() -> set[Path]:
    """Return the notebook's folder, and that of the script."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    folders = {Path.cwd()}
    if main:
        folders.add(Path(os.path.abspath(main)).parent)  # noqa: PTH100 - as it was imported, links and all
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    return {it for it in folders if it not in installed and not _INSTALLED & set(it.parts)}


def _add(root: Path, name: str, found: dict[str, Path]) -> None:
    for path in _python_files(root, name):
        key = path.relative_to(root).as_posix()
        if key in found:
            continue
        found[key] = path
        for imported in _imports(path):
            _add(root, imported, found)


def _python_files(root: Path, name: str) -> list[Path]:
    package = root / name
    if (package / "__init__.py").is_file():
        return [path for path in sorted(package.rglob("*.py")) if "__pycache__" not in path.parts]
    file = root / f"{name}.py"
    return [file] if file.is_file() else []


def _imports(path: Path) -> Iterator[str]:
    """Yield the top-level modules that a file imports by their full names."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # it fails where it is imported, with its own error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
