"""Migrations: Alembic keeps the order and the books, the SQL stands in `versions/*.sql`.

A migration only expands; what it makes superfluous is removed one release later, so that processes of both
releases can run on one database meanwhile. `HEAD` is known without importing Alembic: `serve` compares it at
start, and Alembic costs half a second.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from orchestrator.errors import ConfigurationError, DatabaseUnavailable
from orchestrator.registry.database import connect

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["HEAD", "applied_revision", "migrate", "require_migrated", "run_sql_file"]

DIRECTORY = Path(__file__).parent
HEAD: str = max(path.name.split("_", 1)[0] for path in (DIRECTORY / "versions").glob("[0-9]*_*.py"))


def run_sql_file(migration: str) -> None:
    """Run the `.sql` that stands beside the migration file `migration`, as one script."""
    from alembic import op

    script = Path(migration).with_suffix(".sql").read_text(encoding="utf-8")
    adapted: Any = op.get_bind().connection.dbapi_connection
    # SQLAlchemy prepares each statement, which allows one at a time; asyncpg itself takes a whole script.
    adapted.run_async(lambda connection: connection.execute(script))


async def applied_revision(database_url: str) -> str | None:
    """The revision that the database is at; None for an empty one. Raises `DatabaseUnavailable`."""
    connection = await connect(database_url)
    try:
        revision: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
        return revision
    except asyncpg.UndefinedTableError:
        return None
    finally:
        await connection.close()


async def require_migrated(database_url: str) -> None:
    """Raises `ConfigurationError` when migrations are pending, or the database is newer than this release."""
    revision = await applied_revision(database_url)
    if revision == HEAD:
        return
    if revision is not None and revision > HEAD:
        raise ConfigurationError(
            f"The database is at migration {revision}, newer than this release ({HEAD}); run the newer release."
        )
    raise ConfigurationError(
        f"The database is at migration {revision or 'none'}, this release needs {HEAD}; run 'orchestrator migrate' "
        "or set ORCH_AUTO_MIGRATE=true."
    )


async def migrate(database_url: str) -> tuple[str | None, str]:
    """Apply what is pending, under a lock; returns the revision before and after.

    Any number of processes may call it at once: one works, the others find nothing left to do.
    """
    before = await applied_revision(database_url)
    if before is None or before < HEAD:
        await asyncio.to_thread(_upgrade, database_url)
    return before, HEAD


def _upgrade(database_url: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(DIRECTORY))
    config.attributes["database_url"] = database_url
    command.upgrade(config, "head")


async def run_online(config: Any) -> None:
    """What `env.py` runs: the pending migrations in one transaction, serialised by an advisory lock."""
    from alembic import context
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    url = config.attributes["database_url"]
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: connect(url))

    def run(connection: Any) -> None:
        context.configure(connection=connection)
        with context.begin_transaction():
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('orchestrator.migrate'))"))
            context.run_migrations()

    try:
        connection: AsyncConnection
        async with engine.connect() as connection:
            await connection.run_sync(run)
            await connection.commit()
    except OSError as error:
        raise DatabaseUnavailable(type(error).__name__) from None
    finally:
        await engine.dispose()
