"""The catalogue: which models there are, in which versions; what is on which worker it does not know."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from nos.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    LimitExceededError,
    LoadError,
    ModelNotFoundError,
    NosError,
)
from nos.wire.v1 import models_pb2

from nos_backend.control.describe import MAX_SOURCE_BYTES, Description, describe
from nos_backend.control.names import check_name, parse_reference
from nos_backend.definition import ModelDefinition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from nos_backend.control.registry import Limits, StoredModel

_logger = logging.getLogger(__name__)

#: Who owns the built-in models, and the first part of their names.
BUILT_IN_OWNER: Final = "nos"
#: Who owns the models of local folders and of the generated token.
LOCAL_OWNER: Final = "local"

MAX_MODELS: Final = 10_000
MAX_SOURCES_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a model; never changes."""

    definition: ModelDefinition
    spec: models_pb2.ModelSpec
    """The same as the definition's `spec`, parsed; to be read only."""

    @property
    def key(self) -> str:
        """`name@v3`."""
        return self.definition.key


@dataclass(slots=True)
class Entry:
    """One name of the catalogue."""

    name: str
    owner: str
    versions: dict[int, Version] = field(default_factory=dict)
    """By number; without any, `error` says why."""
    error: NosError | None = None
    """Why the newest source is not served."""
    lost: dict[int, NosError] = field(default_factory=dict)
    """Versions whose kept source is gone, by number, and how."""
    is_kept: bool = False
    """Whether it came from the registry."""

    @property
    def newest(self) -> Version | None:
        """The version that the bare name means."""
        number = max((*self.versions, *self.lost), default=0)
        return self.versions.get(number)


class Catalogue:
    """Models by name, in memory; belongs to the gateway's loop. What is to stay goes through `Registrar`."""

    def __init__(
        self, max_models: int = MAX_MODELS, max_source_bytes: int = MAX_SOURCE_BYTES
    ) -> None:
        self._max_models = max_models
        #: Of one source that comes from somebody.
        self.max_source_bytes = max_source_bytes
        self._entries: dict[str, Entry] = {}
        #: The highest number that each name ever had; survives deletion, so that no version is reused.
        self._last_versions: dict[str, int] = {}
        self._watchers: list[Callable[[str, str], None]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self, pattern: str = "") -> list[Entry]:
        """Return the entries whose names contain `pattern`, in order of names."""
        return [self._entries[name] for name in sorted(self._entries) if pattern in name]

    def entry(self, reference: str) -> Entry:
        """Return the entry of a reference, whether or not it can be served.

        Raises:
            InvalidRequestError: If the reference is malformed.
            ModelNotFoundError: If there is no such name; suggests one that is close.
        """
        name, _ = parse_reference(reference)
        try:
            return self._entries[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "`nos models` lists those there are"
            raise ModelNotFoundError(f"there is no model {name!r}", "model", "", "", hint) from None

    def get(self, name: str) -> Entry | None:
        """Return the entry of a name, if there is one."""
        return self._entries.get(name)

    def find(self, reference: str) -> Version:
        """Return the version that a reference means.

        Raises:
            InvalidRequestError: If the reference is malformed.
            ModelNotFoundError: If there is no such name or version.
            LoadError: If the source of the name cannot be served.
        """
        _, number = parse_reference(reference)
        entry = self.entry(reference)
        if number is None:
            if entry.newest is None:
                raise LoadError(f"{entry.name} cannot be served: {entry.error}", "model")
            return entry.newest
        if number in entry.lost:
            raise entry.lost[number].with_traceback(None)
        try:
            return entry.versions[number]
        except KeyError:
            there = ", ".join(f"v{version}" for version in sorted(entry.versions)[-10:])
            raise ModelNotFoundError(
                f"there is no such version of {entry.name!r}", "model", there, f"v{number}"
            ) from None

    def add(self, definition: ModelDefinition, description: Description) -> Version:
        """Take a source as a model's newest version; the same one again changes nothing.

        Raises:
            NosError: As `prepare` does.
        """
        version = self.prepare(definition, description)
        self.publish(version)
        return version

    def prepare(self, definition: ModelDefinition, description: Description) -> Version:
        """Return what a source would be; the newest version where nothing differs. Changes nothing.

        Args:
            definition: Without version and spec. Its device and isolation hold where they are not the
                default; otherwise the source's decorator decides.
            description: Of its source.

        Raises:
            InvalidRequestError: If the name is none.
            AlreadyExistsError: If the name is another owner's.
            LimitExceededError: If the catalogue is full.
        """
        check_name(definition.name)
        entry = self._entries.get(definition.name)
        self._check_room(definition, entry)
        spec = models_pb2.ModelSpec()
        spec.CopyFrom(description.spec)
        definition = replace(
            definition,
            class_name=description.class_name,
            device=_chosen(spec.device, definition.device, "auto"),
            isolation=_chosen(spec.isolation, definition.isolation, "shared"),
            environment=definition.environment or list(spec.environment),
            call_timeout_s=spec.call_timeout_s,
        )
        newest = entry.newest if entry is not None else None
        if newest is not None and _content(newest) == _content(Version(definition, spec)):
            return newest
        spec.name = definition.name
        spec.version = self._last_versions.get(definition.name, 0) + 1
        spec.owner = definition.owner
        spec.device = definition.device
        spec.isolation = definition.isolation
        spec.environment[:] = definition.environment
        definition = replace(definition, version=spec.version, spec=spec.SerializeToString())
        return Version(definition, spec)

    def pin(self, version: Version, *, is_pinned: bool) -> Version:
        """Return the version as pinned or not, and serve it so until the server ends."""
        spec = models_pb2.ModelSpec()
        spec.CopyFrom(version.spec)
        spec.is_pinned = is_pinned
        return self._respecify(version, spec)

    def constrain(self, version: Version, limits: Limits) -> Version:
        """Return the version with what its replicas want of their devices, and serve it so."""
        spec = models_pb2.ModelSpec()
        spec.CopyFrom(version.spec)
        spec.device = limits.device or spec.device
        spec.placement = limits.placement or spec.placement
        if limits.memory_bytes is not None:
            spec.memory_bytes = limits.memory_bytes
        return self._respecify(version, spec) if spec != version.spec else version

    def _respecify(self, version: Version, spec: models_pb2.ModelSpec) -> Version:
        changed = Version(replace(version.definition, spec=spec.SerializeToString()), spec)
        entry = self._entries.get(version.definition.name)
        if entry is not None and version.definition.version in entry.versions:
            entry.versions[version.definition.version] = changed
        return changed

    def publish(self, version: Version) -> None:
        """Serve a version that was prepared; one that is served already stays as it is."""
        definition = version.definition
        entry = self._entries.setdefault(definition.name, Entry(definition.name, definition.owner))
        if definition.version in entry.versions:
            return
        entry.versions[definition.version] = version
        entry.error = None
        self._last_versions[definition.name] = definition.version
        self._tell("registered", definition.name)

    def restore(self, stored: Mapping[str, StoredModel]) -> None:
        """Take what the registry kept, before all others: a registered model hides a file of its name."""
        for name, model in stored.items():
            self._last_versions[name] = model.last_version
            if model.is_deleted:
                continue
            entry = Entry(name, model.owner, lost=dict(model.errors), is_kept=True)
            self._entries[name] = entry
            for number, definition in model.definitions.items():
                spec = models_pb2.ModelSpec.FromString(definition.spec)
                entry.versions[number] = Version(definition, spec)
            if entry.newest is None:
                entry.error = model.errors.get(max(model.errors, default=0))

    def add_built_ins(self, definitions: Iterable[ModelDefinition]) -> None:
        """Take the built-in models."""
        for definition in definitions:
            try:
                (description,) = describe(
                    definition.source,
                    class_name=definition.class_name,
                    source_name=definition.source_name,
                )
                self.add(replace(definition, owner=BUILT_IN_OWNER), description)
            except NosError as error:
                self._fail(definition.name, BUILT_IN_OWNER, error, definition.source_name)

    def add_folder(self, folder: Path) -> None:
        """Take every Python file that lies directly in `folder`; `_x.py` is a file's own business.

        A file that cannot be served becomes an entry that says why.

        Raises:
            InvalidRequestError: If there is no such folder.
        """
        if not folder.is_dir():
            raise InvalidRequestError(
                "the folder of models is not there", "models", "a folder", str(folder)
            )
        for path in sorted(folder.resolve().glob("*.py")):
            if not path.name.startswith("_"):
                self._add_file(path)

    def delete(self, name: str) -> list[Version]:
        """Forget a model; returns its versions.

        Raises:
            ModelNotFoundError: If there is none.
        """
        entry = self.entry(name)
        del self._entries[entry.name]
        self._tell("deleted", entry.name)
        return list(entry.versions.values())

    def subscribe(self, callback: Callable[[str, str], None]) -> Callable[[], None]:
        """Have `callback(kind, name)` called for `registered` and `deleted`; returns what ends that."""
        self._watchers.append(callback)
        return lambda: self._watchers.remove(callback)

    def _add_file(self, path: Path) -> None:
        name = path.stem
        try:
            source = path.read_text(encoding="utf-8")
            descriptions = describe(source, source_name=str(path), max_bytes=self.max_source_bytes)
        except (OSError, UnicodeDecodeError) as error:
            self._fail(name, LOCAL_OWNER, LoadError(f"{path} cannot be read: {error}"), str(path))
            return
        except NosError as error:
            self._fail(name, LOCAL_OWNER, error, str(path))
            return
        for description in descriptions:
            name = description.spec.name or (
                path.stem if len(descriptions) == 1 else f"{path.stem}/{description.class_name}"
            )
            entry = self._entries.get(name)
            if entry is not None and entry.is_kept:
                _logger.warning("%s is not served: %s was registered, and goes before", path, name)
                continue
            definition = ModelDefinition(
                name=name,
                version=0,
                owner=LOCAL_OWNER,
                source=source,
                source_name=str(path),
                class_name=description.class_name,
                folder=str(path.parent),
            )
            try:
                self.add(definition, description)
            except NosError as error:
                self._fail(path.stem, LOCAL_OWNER, error, str(path))

    def _check_room(self, definition: ModelDefinition, entry: Entry | None) -> None:
        owner = definition.owner
        if owner != BUILT_IN_OWNER and definition.name.split("/")[0] == BUILT_IN_OWNER:
            raise AlreadyExistsError(
                f"names under '{BUILT_IN_OWNER}/' are the server's own", "name", "", definition.name
            )
        if entry is not None and entry.owner != owner:
            raise AlreadyExistsError(
                f"the name {definition.name!r} is taken", "name", hint="Choose another name"
            )
        if entry is None and len(self._entries) >= self._max_models:
            raise LimitExceededError(
                "the catalogue is full",
                "name",
                f"at most {self._max_models} models",
                hint="Delete some, or start the server with a larger --max-registered",
            )
        held = sum(
            len(version.definition.source)
            for other in self._entries.values()
            for version in other.versions.values()
        )
        if held + len(definition.source) > MAX_SOURCES_BYTES:
            raise LimitExceededError(
                "the catalogue is full",
                "source",
                f"at most {MAX_SOURCES_BYTES} bytes of sources",
                hint="Delete models with many versions",
            )

    def _fail(self, name: str, owner: str, error: NosError, source_name: str) -> None:
        _logger.warning("%s is not served: %s", source_name, error)
        entry = self._entries.setdefault(name, Entry(name, owner))
        if entry.owner == owner:
            entry.error = error

    def _tell(self, kind: str, name: str) -> None:
        for callback in list(self._watchers):
            callback(kind, name)


def _content(version: Version) -> tuple[Any, ...]:
    """Return what makes two versions the same."""
    definition, spec = version.definition, version.spec
    return (
        definition.source,
        definition.class_name,
        definition.folder,
        definition.init,
        definition.device,
        definition.isolation,
        definition.environment,
        definition.call_timeout_s,
        spec.is_pinned,
        spec.idle_unload_s if spec.HasField("idle_unload_s") else None,
    )


def _chosen(from_source: str, from_request: str, default: str) -> str:
    """Return an option: the request's, unless that is the default and the source says otherwise."""
    return from_request if from_request and from_request != default else from_source
