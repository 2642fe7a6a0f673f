"""Brings a brain to this engine's schema.

Migrations are the files `migrations/NNNN_name.sql`, numbered from 1 without a gap. Each runs in one transaction with
the new value of `PRAGMA user_version`: it is applied completely or not at all, and never twice.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NamedTuple

from engine.errors import BrainCorrupt, BrainError, MigrationRequired

DIRECTORY = Path(__file__).parent / "migrations"


class Migration(NamedTuple):
    version: int
    path: Path


def known(directory: Path = DIRECTORY) -> list[Migration]:
    """The migrations this engine brings, in order."""
    found = sorted(Migration(int(path.name[:4]), path) for path in directory.glob("[0-9][0-9][0-9][0-9]_*.sql"))
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise BrainError(f"{directory}: migrations must be numbered from 0001 without a gap")
    return found


def bring_up_to_date(connection: sqlite3.Connection, path: Path, migrations: list[Migration]) -> int:
    """Applies what is missing and returns the schema version.

    Raises MigrationRequired, having changed nothing, when the brain is newer than `migrations`. `connection` must be
    in autocommit mode.
    """
    current: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if current > len(migrations):
        raise MigrationRequired(
            f"MIGRATION_REQUIRED: {path} has schema {current}, this engine knows up to {len(migrations)}: "
            "start it with the engine that wrote it, or a newer one"
        )
    if current == 0 and connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        raise BrainCorrupt(f"{path} is a SQLite database, but not an engine's brain; the file was left as it is")
    for migration in migrations[current:]:
        script = migration.path.read_text(encoding="utf-8")
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{script}\n;PRAGMA user_version = {migration.version};\nCOMMIT;"
            )
        except sqlite3.Error as exc:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise BrainError(f"{path}: migration {migration.path.name} failed and was undone: {exc}") from None
    return len(migrations)
