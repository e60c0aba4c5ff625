"""What outlives a run: registered models, tokens and the audit log.

Rows are in SQLite, sources in the blob store beside it. One thread writes, so that the loop of the gateway
never waits for the disk; what was acknowledged is on it. A source is there before the row that names it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf.message import DecodeError
from nos.errors import LoadError, NosError
from nos.wire.v1 import access_pb2, models_pb2

from nos_backend.control.blobs import disk_errors
from nos_backend.control.database import Database
from nos_backend.definition import ModelDefinition

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from nos_backend.control.blobs import BlobStore

T = TypeVar("T")

_logger = logging.getLogger(__name__)

FILE_NAME: Final = "registry.db"

#: What reading a row raises whose content makes no sense.
_DAMAGED: Final = (
    NosError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    DecodeError,
)
#: Types of what a token's row holds, in the order that they are read.
_TOKEN_ROW: Final = (str, bytes, str, int, str, float, float)
#: Fields of a definition that have columns, a table or a blob of their own; the others are in the row's JSON.
_COLUMNS: Final = frozenset({"name", "version", "owner", "source", "spec", "profiles"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who did something, for the audit log."""

    token_id: str
    """Of the token that was used; empty where none fits."""
    peer: str
    """Where the call came from, as gRPC writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredToken:
    """A token, of which only the hash is kept."""

    token_id: str
    sha256: bytes
    tenant: str
    role: access_pb2.Role.ValueType
    label: str
    created_s: float
    """Seconds since 1970."""
    expires_s: float
    """Seconds since 1970; 0 means never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many replicas of a version there may be, and what they want of their devices."""

    min_replicas: int
    max_replicas: int
    device: str = ""
    """`auto`, `cpu` or `cuda`; empty: as its author says."""
    memory_bytes: int | None = None
    """The least that models may use there; None: as its author says."""
    placement: str = ""
    """`spread` or `pack`; empty: as its author says."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"{self.min_replicas} to {self.max_replicas} replicas")


@dataclass(slots=True)
class StoredModel:
    """One name and what is kept of it."""

    owner: str
    last_version: int
    #: By number.
    definitions: dict[int, ModelDefinition] = field(default_factory=dict)
    #: Versions whose source is gone or damaged, and how.
    errors: dict[int, NosError] = field(default_factory=dict)
    is_deleted: bool = False


class Registry:
    """The registry of one state folder. Reading is for the start; what writes is for the gateway's loop."""

    def __init__(self, folder: Path, blobs: BlobStore) -> None:
        """Open it.

        Args:
            folder: Where its file is or will be.
            blobs: Holds the sources.

        Raises:
            ConfigError: If it is of a newer server, in use, or cannot be opened.
        """
        self._blobs = blobs
        self._database = Database(folder / FILE_NAME)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nos-registry")

    @property
    def notices(self) -> list[str]:
        """What an admin has to know of it, one sentence each."""
        return list(self._database.notices)

    def close(self) -> None:
        """Finish what is being written, and close the file."""
        self._writer.shutdown()
        self._database.close()

    def read_models(self) -> dict[str, StoredModel]:
        """Return all names, those deleted included, since their version numbers are not used again."""
        stored = {
            name: StoredModel(owner, last_version, is_deleted=bool(is_deleted))
            for name, owner, last_version, is_deleted in self._database.read(
                "SELECT name, owner, last_version, is_deleted FROM names"
            )
        }
        for name, version, sha256, fields, spec in self._database.read(
            "SELECT name, version, source_sha256, definition, spec FROM versions ORDER BY name, version"
        ):
            model = stored[name]
            try:
                source = self._blobs.load(sha256).decode()
                models_pb2.ModelSpec.FromString(spec)
                model.definitions[version] = ModelDefinition.from_dict(
                    {
                        **json.loads(fields),
                        "name": name,
                        "version": version,
                        "owner": model.owner,
                        "source": source,
                        "spec": spec,
                    }
                )
                _check_folder(model.definitions[version])
            except _DAMAGED as error:
                _logger.error("%s@v%d cannot be served: %s", name, version, error)  # noqa: TRY400
                model.definitions.pop(version, None)
                model.errors[version] = LoadError(
                    f"what was kept of {name}@v{version} is damaged: {error}",
                    hint="Register it again",
                )
        return stored

    def read_profiles(self) -> list[models_pb2.Profile]:
        """Return what was measured of models; what cannot be read is measured again."""
        found = []
        for (raw,) in self._database.read("SELECT profile FROM profiles"):
            try:
                found.append(models_pb2.Profile.FromString(raw))
            except (DecodeError, TypeError):
                _logger.warning("a profile in the registry is damaged")
        return found

    def read_limits(self) -> dict[str, Limits]:
        """Return how many replicas there may be of the versions that somebody said it of, by key."""
        found = {}
        for name, version, limits in self._database.read("SELECT * FROM limits"):
            try:
                found[f"{name}@v{version}"] = Limits(**json.loads(limits))
            except (ValueError, TypeError, RecursionError) as error:
                _logger.warning("the limits of %s@v%d are damaged: %s", name, version, error)
        return found

    def references(self) -> tuple[set[str], set[str]]:
        """Return what versions need: blobs by their sha256, and folders by their paths.

        Raises:
            LoadError: If that cannot be read of one.
        """
        blobs, folders = set(), set()
        for sha256, fields in self._database.read("SELECT source_sha256, definition FROM versions"):
            blobs.add(sha256)
            try:
                folders.add(json.loads(fields)["folder"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise LoadError("a version's row in the registry is damaged") from error
        return blobs, folders

    def read_tokens(self) -> list[StoredToken]:
        """Return the tokens that were not revoked, in order of creation; some may have expired."""
        found = []
        for row in self._database.read(
            "SELECT token_id, sha256, tenant, role, label, created_s, expires_s FROM tokens"
            " WHERE revoked_s IS NULL ORDER BY created_s, token_id"
        ):
            if tuple(map(type, row)) == _TOKEN_ROW and row[3] in access_pb2.Role.values():
                token_id, sha256, tenant, role, label, created_s, expires_s = row
                found.append(
                    StoredToken(
                        token_id=token_id,
                        sha256=sha256,
                        tenant=tenant,
                        role=role,
                        label=label,
                        created_s=created_s,
                        expires_s=expires_s,
                    )
                )
            else:
                _logger.warning("a token in the registry is damaged, and not accepted")
        return found

    async def add_version(self, definition: ModelDefinition, actor: Actor) -> None:
        """Keep a version for good.

        Raises:
            LimitExceededError: If the disk is full.
            UnavailableError: If it cannot be written.
        """
        await self._do(lambda: self._add_version(definition, actor))

    async def delete_model(self, name: str, actor: Actor) -> None:
        """Forget a name's versions, and keep the number of the last one.

        Raises:
            LimitExceededError: If the disk is full.
            UnavailableError: If it cannot be written.
        """

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM versions WHERE name = ?", (name,))
            connection.execute("DELETE FROM profiles WHERE name = ?", (name,))
            connection.execute("DELETE FROM limits WHERE name = ?", (name,))
            connection.execute("UPDATE names SET is_deleted = 1 WHERE name = ?", (name,))
            _record(connection, actor, "delete", name)

        await self._do(lambda: self._transact(work))

    async def add_profile(self, profile: models_pb2.Profile) -> None:
        """Keep what was measured of a version, in place of what was known for that kind of device.

        Raises:
            LimitExceededError: If the disk is full.
            UnavailableError: If it cannot be written.
        """
        name, _, version = profile.model.rpartition("@v")
        device = profile.device.partition(":")[0]
        row = (name, int(version), device, profile.product, profile.SerializeToString())

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO profiles VALUES (?, ?, ?, ?, ?)", row)

        await self._do(lambda: self._transact(work))

    async def set_limits(self, key: str, limits: Limits | None, actor: Actor) -> None:
        """Keep how many replicas of a version there may be; None forgets it.

        Raises:
            LimitExceededError: If the disk is full.
            UnavailableError: If it cannot be written.
        """
        name, _, version = key.rpartition("@v")
        said = "no limits" if limits is None else json.dumps(asdict(limits))

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "DELETE FROM limits WHERE name = ? AND version = ?", (name, int(version))
            )
            if limits is not None:
                row = (name, int(version), said)
                connection.execute("INSERT INTO limits VALUES (?, ?, ?)", row)
            _record(connection, actor, "scale", f"{key} {said}")

        await self._do(lambda: self._transact(work))

    async def add_token(self, token: StoredToken, actor: Actor) -> None:
        """Keep a token.

        Raises:
            LimitExceededError: If the disk is full.
            UnavailableError: If it cannot be written.
        """

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    *(token.token_id, token.sha256, token.tenant, token.role, token.label),
                    *(token.created_s, actor.token_id, token.expires_s),
                ),
            )
            role = access_pb2.Role.Name(token.role)
            _record(connection, actor, "create-token", f"{token.token_id} {token.tenant} {role}")

        await self._do(lambda: self._transact(work))

    async def revoke_token(self, token_id: str, actor: Actor) -> None:
        """End a token for good.

        Raises:
            LimitExceededError: If the disk is full.
            UnavailableError: If it cannot be written.
        """

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE tokens SET revoked_s = ? WHERE token_id = ?", (time.time(), token_id)
            )
            _record(connection, actor, "revoke-token", token_id)

        await self._do(lambda: self._transact(work))

    async def record(self, actor: Actor, action: str, about: str, outcome: str) -> None:
        """Add a line to the audit log for something that changed nothing else.

        Raises:
            LimitExceededError: If the disk is full.
            UnavailableError: If it cannot be written.
        """
        await self._do(
            lambda: self._transact(
                lambda connection: _record(connection, actor, action, about, outcome)
            )
        )

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    # On the writer's thread.

    def _transact(self, work: Callable[[sqlite3.Connection], None]) -> None:
        with self._database.write() as connection:
            work(connection)

    def _add_version(self, definition: ModelDefinition, actor: Actor) -> None:
        with disk_errors("source"):
            sha256 = self._blobs.put(definition.source.encode())

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO names VALUES (?, ?, ?, 0) ON CONFLICT (name) DO UPDATE SET"
                " owner = excluded.owner, last_version = excluded.last_version, is_deleted = 0",
                (definition.name, definition.owner, definition.version),
            )
            fields = {
                name: value for name, value in definition.to_dict().items() if name not in _COLUMNS
            }
            connection.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(definition.name, definition.version, sha256, json.dumps(fields)),
                    *(definition.spec, time.time(), actor.token_id),
                ),
            )
            action = "register" if definition.version == 1 else "update"
            _record(connection, actor, action, f"{definition.key} sha256:{sha256}")

        self._transact(work)


def _check_folder(definition: ModelDefinition) -> None:
    if definition.folder and not Path(definition.folder).is_dir():
        raise LoadError(f"the folder of its files is gone: {definition.folder}")


def _record(
    connection: sqlite3.Connection, actor: Actor, action: str, about: str, outcome: str = "ok"
) -> None:
    row: tuple[Any, ...] = (time.time(), actor.token_id, actor.peer, action, about, outcome)
    connection.execute(
        "INSERT INTO audit (time_s, actor, peer, action, object, outcome) VALUES (?, ?, ?, ?, ?, ?)",
        row,
    )
