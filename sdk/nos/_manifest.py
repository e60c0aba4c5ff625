"""Files of models, as `nos apply` reads them: checked whole before anything is registered.

::

    models:
      - name: my/net
        source: net.py          # beside this file; or inline: the text itself
        class: Net              # needed where the source has several
        init: {width: 8}
        device: cpu             # auto, cpu or cuda
        isolation: process      # shared or process
        env: [einops]           # packages it needs; or a file of them beside this file
        pin: true               # stays on its device
        idle_unload_s: 600      # or leaves it after so long without use; 0: never
        replicas: {min: 0, max: 4}   # by load; or a number
        memory_bytes: 8000000000     # only on devices of whose memory models may use so much
        placement: pack              # on as few devices as can be; or spread
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from nos._environment import packages
from nos.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from pathlib import Path

_KEYS: Final = (
    "name",
    "source",
    "inline",
    "class",
    "init",
    "device",
    "isolation",
    "env",
    "pin",
    "idle_unload_s",
    "replicas",
    "memory_bytes",
    "placement",
)
_TEXTS: Final = frozenset(_KEYS) - {
    *("init", "env", "pin", "idle_unload_s", "replicas", "memory_bytes")
}
_CHOICES: Final = {
    "device": ("auto", "cpu", "cuda"),
    "isolation": ("shared", "process"),
    "placement": ("spread", "pack"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model of a file."""

    name: str
    source: str
    """The text."""
    source_name: str
    """Where it came from, for tracebacks."""
    class_name: str = ""
    init: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    isolation: str = ""
    env: list[str] = field(default_factory=list)
    pin: bool | None = None
    idle_unload_s: float | None = None
    replicas: tuple[int, int] | None = None
    """The fewest and the most; None leaves it to the server."""
    memory_bytes: int | None = None
    placement: str = ""


def read(path: Path) -> list[ModelEntry]:
    """Return the models of a file.

    Raises:
        ConfigError: If it cannot be read, or anything in it is wrong; names the line.
    """
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(
            "files of models need PyYAML", hint="pip install 'nos-inference[backend]'"
        ) from None
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the file cannot be read", "file", got=f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigError("the file is nested too deeply", "file", got=str(path)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{path}{line} is no YAML", "file", got=str(problem)) from error
    return _Reader(path, yaml).read(root)


class _Reader:
    """Walks the nodes of one file, which know their lines."""

    def __init__(self, path: Path, yaml: Any) -> None:
        self._path = path
        self._yaml = yaml

    def read(self, root: Any) -> list[ModelEntry]:
        if root is None:
            raise ConfigError(f"{self._path} is empty", "file", "models: and a list")
        (listed,) = self._members(root, ("models",), ("models",)).values()
        if not isinstance(listed, self._yaml.SequenceNode):
            raise self._wrong(listed, "models", "a list of models")
        entries: dict[str, ModelEntry] = {}
        for node in listed.value:
            entry = self._entry(node)
            if entry.name in entries:
                raise self._wrong(node, f"model {entry.name!r} is there twice", "each name once")
            entries[entry.name] = entry
        return list(entries.values())

    def _entry(self, node: Any) -> ModelEntry:
        members = self._members(node, _KEYS, ("name",))
        if ("source" in members) == ("inline" in members):
            raise self._wrong(node, "the model's code", "either source (a file) or inline (text)")
        texts = {key: self._text(key, members[key]) for key in members if key in _TEXTS}
        for key, choices in _CHOICES.items():
            if key in texts and texts[key] not in choices:
                raise self._wrong(members[key], key, " or ".join(choices), repr(texts[key]))
        init = self._value(members["init"]) if "init" in members else {}
        if not isinstance(init, dict) or not all(isinstance(key, str) for key in init):
            raise self._wrong(members["init"], "init", "arguments by name")
        source, source_name = texts.get("inline", ""), f"<{self._path.name}: {texts['name']}>"
        if "source" in texts:
            file = self._path.parent / texts["source"]
            source_name = str(file)
            try:
                source = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise self._wrong(
                    members["source"], "source", "a Python file", f"{file}: {error}"
                ) from error
        return ModelEntry(
            name=texts["name"],
            source=source,
            source_name=source_name,
            class_name=texts.get("class", ""),
            init=init,
            device=texts.get("device", ""),
            isolation=texts.get("isolation", ""),
            env=self._env(members.get("env")),
            pin=self._pin(members.get("pin")),
            idle_unload_s=self._seconds("idle_unload_s", members.get("idle_unload_s")),
            replicas=self._replicas(members.get("replicas")),
            memory_bytes=self._count("memory_bytes", members.get("memory_bytes")),
            placement=texts.get("placement", ""),
        )

    def _env(self, node: Any) -> list[str]:
        value = [] if node is None else self._value(node)
        if isinstance(value, str):
            value = self._path.parent / value
        elif not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(node, "env", "packages, or a file of them", reprlib.repr(value))
        try:
            return packages(value)
        except InvalidRequestError as error:
            raise self._wrong(node, "env", error.expected, error.got) from error

    def _pin(self, node: Any) -> bool | None:
        value = None if node is None else self._value(node)
        if node is not None and not isinstance(value, bool):
            raise self._wrong(node, "pin", "true or false", reprlib.repr(value))
        return value

    def _seconds(self, key: str, node: Any) -> float | None:
        if node is None:
            return None
        value = self._value(node)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(node, key, "seconds", reprlib.repr(value))
        if not 0 <= value < float("inf"):
            raise self._wrong(node, key, "seconds, at least 0", reprlib.repr(value))
        return float(value)

    def _replicas(self, node: Any) -> tuple[int, int] | None:
        if node is None:
            return None
        if isinstance(node, self._yaml.MappingNode):
            members = self._members(node, ("min", "max"), ("min", "max"))
            low, high = (self._count(key, members[key]) or 0 for key in ("min", "max"))
        else:
            low = high = self._count("replicas", node) or 0
        if not max(low, 1) <= high:
            raise self._wrong(node, "replicas", "a number, or min and max", f"{low} to {high}")
        return low, high

    def _count(self, key: str, node: Any) -> int | None:
        value = None if node is None else self._value(node)
        if node is not None and (type(value) is not int or value < 0):
            raise self._wrong(node, key, "a whole number, at least 0", reprlib.repr(value))
        return value

    def _members(
        self, node: Any, known: tuple[str, ...], needed: tuple[str, ...]
    ) -> dict[str, Any]:
        if not isinstance(node, self._yaml.MappingNode):
            raise self._wrong(node, "this", f"a mapping with {', '.join(known)}")
        members: dict[str, Any] = {}
        for key, value in node.value:
            name = str(key.value)
            if name not in known:
                raise self._wrong(key, f"unknown key {name[:80]!r}", f"one of {', '.join(known)}")
            if name in members:
                raise self._wrong(key, f"key {name!r} is there twice", "each key once")
            members[name] = value
        for name in needed:
            if name not in members:
                raise self._wrong(node, f"key {name!r} is missing", name)
        return members

    def _text(self, key: str, node: Any) -> str:
        value = self._value(node)
        if not isinstance(value, str) or not value:
            raise self._wrong(node, key, "text", reprlib.repr(value))
        return value

    def _value(self, node: Any) -> Any:
        try:
            return self._yaml.SafeLoader("").construct_document(node)
        except self._yaml.YAMLError as error:
            raise self._wrong(node, "this", "plain YAML", str(error.problem)) from error
        # A date that is none, for instance.
        except (ValueError, TypeError, RecursionError) as error:
            raise self._wrong(node, "this", "plain YAML", str(error)) from error

    def _wrong(self, node: Any, what: str, expected: str, got: str = "") -> ConfigError:
        line = node.start_mark.line + 1
        return ConfigError(f"{self._path}, line {line}: {what}", "file", expected, got)
