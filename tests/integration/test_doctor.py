"""`orchestrator doctor`: what it finds amiss on a real database and this host, and what it says to do."""

from __future__ import annotations

import secrets
import socket
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
import pytest
from cryptography.fernet import Fernet

from orchestrator.doctor import Finding, Level, examine
from orchestrator.registry.migrations import HEAD
from tests.conftest import url_of
from tests.integration.checks import database
from tests.integration.commands import Commands
from tests.integration.conftest import MASTER_KEY, free_port, port_range, settings_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.integration.conftest import Served

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {"ORCH_PORT": str(free_port())}


@pytest.fixture
async def empty_url(postgres_url: str) -> AsyncIterator[str]:
    """A database without any table."""
    name = f"empty_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f'CREATE DATABASE "{name}"')
    try:
        yield url_of(postgres_url, name)
    finally:
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await connection.close()


async def found(variables: dict[str, str], check: str, **changes: str) -> list[Finding]:
    """What is said about `check`, with these variables changed; every problem comes with advice."""
    findings = [finding async for finding in examine(settings_of(variables | changes))]
    for finding in findings:
        assert (finding.advice is not None) == (finding.level in (Level.WARN, Level.FAIL)), finding
        assert MASTER_KEY not in str(finding)
    return [finding for finding in findings if finding.check == check]


async def test_all_is_well(variables: dict[str, str]) -> None:
    findings = [finding async for finding in examine(settings_of(variables))]
    checks = {finding.check for finding in findings}
    assert checks == {
        "database", "migrations", "master key", "clock", "backend", "engine", "address", "ports", "permissions",
    }  # fmt: skip
    assert not [finding for finding in findings if finding.level is Level.FAIL]


async def test_no_database(variables: dict[str, str]) -> None:
    url = f"postgresql://me:a-secret-password@127.0.0.1:{free_port()}/db"
    (finding,) = await found(variables, "database", ORCH_DATABASE_URL=url)
    assert finding.level is Level.FAIL
    assert "connection refused" in finding.detail
    assert "a-secret-password" not in str(finding)


async def test_too_many_connections(variables: dict[str, str]) -> None:
    _, finding = await found(variables, "database", ORCH_DATABASE_POOL="900", ORCH_WORKERS="4")
    assert finding.level is Level.FAIL
    assert "ORCH_DATABASE_POOL" in str(finding.advice)


async def test_migrations(variables: dict[str, str], empty_url: str) -> None:
    (pending,) = await found(variables, "migrations", ORCH_DATABASE_URL=empty_url)
    assert pending.level is Level.FAIL
    assert pending.detail == f"at none of {HEAD}"
    assert pending.advice == "run: orchestrator migrate"
    (by_itself,) = await found(variables, "migrations", ORCH_DATABASE_URL=empty_url, ORCH_AUTO_MIGRATE="true")
    assert by_itself.level is Level.OK
    async with database(variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    (newer,) = await found(variables, "migrations")
    assert newer.level is Level.FAIL
    assert "newer" in newer.detail


async def test_master_keys(variables: dict[str, str]) -> None:
    newer = Fernet.generate_key().decode()
    (unused,) = await found(variables, "master key", ORCH_MASTER_KEY=f"{newer},{MASTER_KEY}")
    assert unused.level is Level.WARN
    async with database(variables["ORCH_DATABASE_URL"]) as connection:
        product = await connection.fetchval("INSERT INTO products (slug, display_name) VALUES ('a', 'A') RETURNING id")
        await connection.execute(
            "INSERT INTO engines (id, product_id, user_id, status, engine_version, location_id) "
            "VALUES ($1, $2, 'ann', 'stopped', 'mimic:1', $1)",
            UUID(int=4),
            product,
        )
        await connection.execute(
            "INSERT INTO engine_keys (engine_id, generation, key_hash, key_enc, master_key_id) "
            "VALUES ($1, 1, '', '', 'deadbeef')",
            UUID(int=4),
        )
    (missing,) = await found(variables, "master key")
    assert missing.level is Level.FAIL
    assert "deadbeef" in missing.detail


async def test_the_address(variables: dict[str, str], served: Served) -> None:
    ours_alone = str(port_range()[1])
    (free,) = await found(variables, "address", ORCH_PORT=ours_alone)
    assert (free.level, "is free" in free.detail) == (Level.OK, True)
    (ours,) = await found(variables, "address", ORCH_PORT=served.url.rpartition(":")[2])
    assert ours.level in (Level.OK, Level.WARN), "a busy machine may make its loops late"
    assert "an orchestrator" in ours.detail
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        (taken,) = await found(variables, "address", ORCH_PORT=str(bound.getsockname()[1]))
    assert taken.level is Level.FAIL


async def test_ports(variables: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        first, *_ = await found(variables, "ports", ORCH_PORT_MIN=port, ORCH_PORT_MAX=port)
    assert first.level is Level.FAIL
    assert "ORCH_PORT_MIN" in str(first.advice)
    both = await found(variables, "ports", ORCH_PORT="9100", ORCH_PORT_MIN="9001", ORCH_PORT_MAX="9999")
    assert both[0].level is Level.OK
    assert [one.level for one in both if "ORCH_PORT 9100" in one.detail] == [Level.WARN]
    overlap = await found(variables, "ports", ORCH_PORT_MIN="9001", ORCH_PORT_MAX="65000")
    assert "outgoing connections" in overlap[-1].detail


async def test_permissions(variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a-file"
    file.touch()
    first, *_ = await found(variables, "permissions", ORCH_DATA_ROOT=str(file / "data"))
    assert first.level is Level.FAIL
    assert "ORCH_DATA_ROOT" in str(first.advice)
    missing = await found(variables, "permissions", ORCH_CATALOG_MOUNT_PATH=str(tmp_path / "none"))
    assert "ORCH_CATALOG_MOUNT_PATH" in str(missing[-1].advice)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").touch()
    (tmp_path / ".env").chmod(0o644)
    loose = await found(variables, "permissions")
    assert any("chmod 600 '.env'" in str(finding.advice) for finding in loose)


async def test_backends_and_their_command(variables: dict[str, str]) -> None:
    (unknown,) = await found(variables, "backend", ORCH_ENGINE_BACKEND="none")
    assert unknown.level is Level.FAIL
    assert "docker" in str(unknown.advice)
    (missing,) = await found(variables, "engine", ORCH_SUBPROCESS_COMMAND="no-such-program --flag")
    assert missing.level is Level.FAIL
    assert "no-such-program" in missing.detail


async def test_a_docker_that_is_not_there(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    findings = [one async for one in examine(settings_of(variables | {"ORCH_ENGINE_BACKEND": "docker"}))]
    (missing,) = [one for one in findings if one.check == "docker"]
    assert missing.level is Level.FAIL
    assert "DOCKER_HOST" in str(missing.advice)
    assert {one.check for one in findings if one.level is Level.SKIPPED} == {"image", "network", "firewall"}


async def test_the_command(variables: dict[str, str], tmp_path: Path) -> None:
    run = Commands(variables, tmp_path)
    told = (await run("doctor", "--json")).json
    assert told["healthy"] is True
    assert {row["check"] for row in told["findings"]} >= {"database", "migrations", "ports", "clock", "permissions"}
    shown = await run("doctor")
    assert shown.code == 0
    assert "✓ database" in shown.out
    broken = await run("doctor", ORCH_DATABASE_URL="postgresql://me:a-secret-password@127.0.0.1:1/db")
    assert broken.code == 1
    assert "✗ database" in broken.out
    assert "→ start PostgreSQL" in broken.out
    assert "a-secret-password" not in broken.out + broken.err
    unset = await run("doctor", "--json", ORCH_DATABASE_URL=None)
    assert unset.code == 1
    assert "ORCH_DATABASE_URL" in unset.out
