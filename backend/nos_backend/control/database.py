"""The registry's file: opened, checked, brought to this version's schema, and written by one thread.

SQLite in WAL mode with `synchronous=FULL`: what `write` returned from survives the process and the power. The
file belongs to one process, which locks it; readers at run time read what that process has in memory.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from typing import TYPE_CHECKING, Any, Final

from nos.errors import ConfigError, LimitExceededError, NosError, UnavailableError

from nos_backend.control.blobs import sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_logger = logging.getLogger(__name__)

#: "NOSr", so that another program's file is not taken for ours.
APPLICATION_ID: Final = 0x4E4F5372
_LOCK_WAIT_S: Final = 10.0
_FORGED: Final = "FOR EACH ROW BEGIN SELECT RAISE(ABORT, 'rows of this table never change'); END"

#: What makes version n + 1 of the schema of version n; released ones never change.
MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        """CREATE TABLE names (
            name TEXT PRIMARY KEY,
            owner TEXT NOT NULL,
            last_version INTEGER NOT NULL,
            is_deleted INTEGER NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE versions (
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            source_sha256 TEXT NOT NULL,
            definition TEXT NOT NULL,
            spec BLOB NOT NULL,
            created_s REAL NOT NULL,
            created_by TEXT NOT NULL,
            PRIMARY KEY (name, version)
        ) WITHOUT ROWID""",
        """CREATE TABLE tokens (
            token_id TEXT PRIMARY KEY,
            sha256 BLOB NOT NULL UNIQUE,
            tenant TEXT NOT NULL,
            role INTEGER NOT NULL,
            label TEXT NOT NULL,
            created_s REAL NOT NULL,
            created_by TEXT NOT NULL,
            expires_s REAL NOT NULL,
            revoked_s REAL
        ) WITHOUT ROWID""",
        """CREATE TABLE audit (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            time_s REAL NOT NULL,
            actor TEXT NOT NULL,
            peer TEXT NOT NULL,
            action TEXT NOT NULL,
            object TEXT NOT NULL,
            outcome TEXT NOT NULL
        )""",
        f"CREATE TRIGGER versions_never_change BEFORE UPDATE ON versions {_FORGED}",
        f"CREATE TRIGGER audit_never_changes BEFORE UPDATE ON audit {_FORGED}",
        f"CREATE TRIGGER audit_never_shrinks BEFORE DELETE ON audit {_FORGED}",
    ),
    (
        """CREATE TABLE profiles (
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            device TEXT NOT NULL,
            product TEXT NOT NULL,
            profile BLOB NOT NULL,
            PRIMARY KEY (name, version, device, product)
        ) WITHOUT ROWID""",
    ),
    (
        """CREATE TABLE limits (
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            limits TEXT NOT NULL,
            PRIMARY KEY (name, version)
        ) WITHOUT ROWID""",
    ),
)

_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class Database:
    """One connection; every method is for the thread that writes, or for the start."""

    def __init__(
        self,
        path: Path,
        *,
        migrations: Sequence[Sequence[str]] = MIGRATIONS,
        lock_wait_s: float = _LOCK_WAIT_S,
    ) -> None:
        """Open or make the file; a damaged one is put aside and an empty one is begun.

        Args:
            path: The file.
            migrations: Statements that lead from each version of the schema to the next.
            lock_wait_s: How long to wait for another process that has the file.

        Raises:
            ConfigError: If it is of a newer server or another program, in use, or cannot be opened.
        """
        #: What an admin has to know of the opening; one sentence each.
        self.notices: list[str] = []
        self._path = path
        self._migrations = migrations
        self._lock_wait_s = lock_wait_s
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._connection = self._open()
            except sqlite3.DatabaseError as error:
                if _primary(error) not in _CORRUPT:
                    raise
                self._quarantine(error)
                self._connection = self._open()
        except (OSError, sqlite3.Error) as error:
            in_use = isinstance(error, sqlite3.Error) and _primary(error) == sqlite3.SQLITE_BUSY
            raise ConfigError(
                "the registry cannot be opened",
                "state_dir",
                f"a file that this server may read and write: {path}",
                "one that another server is using" if in_use else str(error),
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def read(self, statement: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        return self._connection.execute(statement).fetchall()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Make one transaction of what happens inside: all of it is on the disk, or none.

        Raises:
            LimitExceededError: If the disk is full.
            UnavailableError: If it fails otherwise.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException as error:
            # The same connection goes on: one opened anew could find what it never acknowledged.
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise _failed(error) from error
            raise

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=self._lock_wait_s, isolation_level=None, check_same_thread=False
        )
        try:
            self._path.chmod(0o600)
            # Exclusive first: then WAL needs no shared memory file beside it.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            self._check_ours(version, application, _is_empty(connection))
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            _check_whole(connection)
            self._migrate(connection, version)
            sync_folder(self._path.parent)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_ours(self, version: int, application: int, is_empty: bool) -> None:
        if application != APPLICATION_ID and not is_empty:
            raise ConfigError(
                "the registry is another program's file", "state_dir", got=str(self._path)
            )
        if version > len(self._migrations):
            raise ConfigError(
                "the registry was written by a newer server",
                "state_dir",
                f"schema {len(self._migrations)} or older",
                f"schema {version} in {self._path}",
                "Use that version of nos-inference, or another --state-dir",
            )

    def _migrate(self, connection: sqlite3.Connection, version: int) -> None:
        for number, statements in enumerate(self._migrations[version:], version + 1):
            connection.execute("BEGIN IMMEDIATE")
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")

    def _quarantine(self, error: sqlite3.Error) -> None:
        folder = self._path.parent / "quarantine"
        folder.mkdir(mode=0o700, exist_ok=True)
        target = (
            folder
            / f"{self._path.name}.{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
        )
        for suffix in ("", "-wal", "-journal"):
            part = self._path.with_name(self._path.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                part.rename(target.with_name(target.name + suffix))
        notice = (
            f"The registry was damaged ({error}): it was moved to {target}, and an empty one begun; "
            "models and tokens made before are not in it"
        )
        _logger.error("%s", notice)
        self.notices.append(notice)


def _check_whole(connection: sqlite3.Connection) -> None:
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        damaged = sqlite3.DatabaseError(found)
        damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damaged


def _is_empty(connection: sqlite3.Connection) -> bool:
    tables: Sequence[Any] = connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
    return not tables


def _primary(error: sqlite3.Error) -> int:
    """Return the error's code without its details."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _failed(error: sqlite3.OperationalError) -> NosError:
    if _primary(error) == sqlite3.SQLITE_FULL:
        return LimitExceededError(
            "the server's disk is full",
            "state_dir",
            hint="Free space in its state folder, then retry",
        )
    return UnavailableError(
        f"the registry cannot be written: {error}",
        "state_dir",
        hint="Nothing was changed; look at the disk of the server's state folder",
    )
