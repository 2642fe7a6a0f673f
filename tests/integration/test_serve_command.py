"""`orchestrator serve`, `migrate` and `config` as processes: what a person can mend is one line, and no traceback."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
import httpx
import psutil
import pytest
from cryptography.fernet import Fernet

from orchestrator.registry.migrations import HEAD
from orchestrator.server import bind
from orchestrator.settings import Settings
from tests.conftest import url_of
from tests.integration.checks import database
from tests.integration.conftest import ADMIN_KEY, MASTER_KEY, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.integration.conftest import Deployment


@dataclass
class Ended:
    code: int | None
    out: str
    err: str


@dataclass
class Command:
    """Runs `orchestrator …` with these variables, in a directory of its own."""

    variables: dict[str, str]
    directory: Path

    async def __call__(self, *arguments: str, **changes: str | None) -> Ended:
        environment = {"PATH": os.environ["PATH"], **self.variables, "ORCH_PORT": "0", **changes}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "orchestrator",
            *arguments,
            env={name: value for name, value in environment.items() if value is not None},
            cwd=self.directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), 60)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        return Ended(process.returncode, out.decode(), err.decode())

    async def complains(self, *arguments: str, **changes: str | None) -> str:
        """The one line that it says on stderr before it ends with code 1."""
        ended = await self(*arguments, **changes)
        assert ended.code == 1, ended
        assert ended.out == ""
        assert len(ended.err.splitlines()) == 1, ended.err
        assert ended.err.startswith("error: ")
        for secret in (MASTER_KEY, ADMIN_KEY, "a-secret-password", "not-a-fernet-key"):
            assert secret not in ended.err
        return ended.err.strip()


@pytest.fixture
def command(variables: dict[str, str], tmp_path: Path) -> Command:
    return Command(variables, tmp_path)


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


async def refuses_password(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As a PostgreSQL that knows another password."""
    while True:
        length = int.from_bytes(await reader.readexactly(4), "big")
        packet = await reader.readexactly(length - 4)
        if packet[:4] != (80877103).to_bytes(4, "big"):
            break
        writer.write(b"N")  # no TLS
    fields = b'SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user "me"\0\0'
    writer.write(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
    writer.close()


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


# --- what stops the start -------------------------------------------------------------------------------------


async def test_pending_migrations(command: Command, empty_url: str, postgres_url: str) -> None:
    line, newer = await asyncio.gather(
        command.complains("serve", ORCH_DATABASE_URL=empty_url), _newer(command, command.variables["ORCH_DATABASE_URL"])
    )
    assert "orchestrator migrate" in line
    assert HEAD in line
    assert "newer" in newer


async def _newer(command: Command, url: str) -> str:
    async with database(url) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    return await command.complains("serve")


async def test_a_bad_setting_is_named(command: Command) -> None:
    bad: list[tuple[str, str | None]] = [
        ("ORCH_PORT", "eighty"),
        ("ORCH_PORT", "65536"),
        ("ORCH_MASTER_KEY", "not-a-fernet-key"),
        ("ORCH_ADMIN_KEY", "short"),
        ("ORCH_DATABASE_URL", "mysql://me:a-secret-password@host/db"),
        ("ORCH_DATABASE_URL", None),
        ("ORCH_ENGINE_BACKEND", "no-such-backend"),
        ("ORCH_LOG_LEVEL", "chatty"),
        ("ORCH_ENGINE_ENV_PASSTHROUGH", "ORCH_MASTER_KEY"),
    ]
    lines = await asyncio.gather(*(command.complains("serve", **{name: value}) for name, value in bad))
    for (name, _), line in zip(bad, lines, strict=True):
        assert line.startswith(f"error: {name}: ")
    assert len(set(lines)) == len(lines)


async def test_several_bad_settings_are_all_named(command: Command) -> None:
    line = await command.complains("serve", ORCH_PORT_MIN="x", ORCH_LEASE_S="0", ORCH_WORKERS="0")
    for name in ("ORCH_PORT_MIN", "ORCH_LEASE_S", "ORCH_WORKERS"):
        assert name in line


async def test_databases_that_cannot_be_used(command: Command, postgres_url: str) -> None:
    refusing = await asyncio.start_server(refuses_password, "127.0.0.1", 0)
    silent = await asyncio.start_server(says_nothing, "127.0.0.1", 0)
    try:
        ports = [server.sockets[0].getsockname()[1] for server in (refusing, silent)]
        urls = {
            f"postgresql://me:a-secret-password@127.0.0.1:{free_port()}/db": "connection refused",
            f"postgresql://me:a-secret-password@127.0.0.1:{ports[0]}/db": "user or password",
            f"postgresql://me:a-secret-password@127.0.0.1:{ports[1]}/db": "no answer",
            url_of(postgres_url, "no_such_database"): "does not exist",
        }
        names = "serve", "serve", "serve", "migrate"
        lines = await asyncio.gather(
            *(command.complains(name, ORCH_DATABASE_URL=url) for name, url in zip(names, urls, strict=True))
        )
        for line, reason in zip(lines, urls.values(), strict=True):
            assert "database is unavailable" in line
            assert reason in line
    finally:
        refusing.close()
        silent.close()
        await refusing.wait_closed()
        await silent.wait_closed()


async def test_a_taken_port(command: Command) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        ended = await command("serve", ORCH_PORT=port)
    assert ended.code == 1
    assert ended.err.splitlines() == [
        f"error: ORCH_HOST/ORCH_PORT: 127.0.0.1:{port} is taken by another process; choose another port."
    ]


async def test_keys_under_a_master_key_that_is_missing(command: Command) -> None:
    async with database(command.variables["ORCH_DATABASE_URL"]) as connection:
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
        line = await command.complains("serve", ORCH_MASTER_KEY=Fernet.generate_key().decode())
        assert "ORCH_MASTER_KEY" in line
        assert "deadbeef" in line
        await connection.execute("DELETE FROM engine_keys")
    assert "ORCH_DATA_ROOT" in await command.complains("serve"), "engines, and none of them lives here"


# --- serving ----------------------------------------------------------------------------------------------------


async def test_answers_do_not_wait_for_an_ack() -> None:
    """Whatever the event loop: Nagle's algorithm is off on what the bound socket accepts."""
    delays: list[int] = []

    async def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        delays.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    sock = bind("127.0.0.1", 0)
    async with await asyncio.start_server(look, sock=sock):
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        assert await reader.read() == b""
        writer.close()
    assert delays == [1]


@pytest.mark.parametrize("workers", [1, 2])
async def test_sigterm_ends_with_0_and_leaves_engines_running(deployment: Deployment, workers: int) -> None:
    replica = await deployment.serve(ORCH_WORKERS=str(workers))
    api = await deployment.product(replica.url)
    engine = await api.provision("ann")
    if workers > 1:
        children = psutil.Process(replica.process.pid).children()
        assert sum("spawn_main" in " ".join(child.cmdline()) for child in children) == workers
    answers = await asyncio.gather(*(api.call("POST", "/engines/ann/admit", {}) for _ in range(20)))
    assert all(body["admitted"] for _, body in answers)

    await api.client.aclose()
    code = await asyncio.to_thread(replica.stop)
    assert code == 0, replica.log.read_text()
    assert "Traceback" not in replica.log.read_text()
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"{engine['url']}/health")).status_code == 200


async def test_sigint_ends_with_0(deployment: Deployment) -> None:
    replica = await deployment.serve()
    replica.process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(replica.process.wait, 30) == 0
    assert "Traceback" not in replica.log.read_text()


# --- migrations -------------------------------------------------------------------------------------------------


async def test_two_processes_that_migrate_at_once_both_serve(empty_url: str, deployment: Deployment) -> None:
    deployment.variables["ORCH_DATABASE_URL"] = empty_url
    deployment.variables["ORCH_AUTO_MIGRATE"] = "true"
    first, second = await asyncio.gather(deployment.serve(), deployment.serve())
    api = await deployment.product(first.url)
    there = deployment.api(second.url, {"X-Platform-Key": api.client.headers["x-platform-key"]})
    assert (await there.get("/engines"))[0] == 200
    async with database(empty_url) as connection:
        assert await connection.fetchval("SELECT count(*) FROM deployment") == 1


async def test_migrate(command: Command, empty_url: str) -> None:
    ended = await asyncio.gather(*(command("migrate", ORCH_DATABASE_URL=empty_url) for _ in range(2)))
    assert [one.code for one in ended] == [0, 0], ended
    assert any(f"Migrated from nothing to {HEAD}." in one.out for one in ended)
    again = await command("migrate", ORCH_DATABASE_URL=empty_url)
    assert (again.code, again.out) == (0, f"Nothing to do: the database is at migration {HEAD}.\n")


# --- config -----------------------------------------------------------------------------------------------------


async def test_config_shows_everything_and_no_secret(command: Command, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("ORCH_ENGINE_NETWORK=from_the_file\nORCH_PORT=1\n")
    ended = await command(
        "config",
        ORCH_DATABASE_URL="postgresql://me:a-secret-password@host:5432/db?sslpassword=a-secret-too",
        ORCH_MASTER_KEY=f"{MASTER_KEY},{Fernet.generate_key().decode()}",
        ORCH_PORT="8123",
    )
    assert ended.code == 0, ended.err
    shown = dict(line.split("=", 1) for line in ended.out.splitlines())
    assert set(shown) == {f"ORCH_{name.upper()}" for name in Settings.model_fields}
    assert shown["ORCH_DATABASE_URL"] == "postgresql://me:********@host:5432/db?sslpassword=********"
    assert shown["ORCH_MASTER_KEY"] == "********,********"
    assert shown["ORCH_ADMIN_KEY"] == "********"
    assert shown["ORCH_PORT"] == "8123", "the environment wins over the file"
    assert shown["ORCH_ENGINE_NETWORK"] == "from_the_file"
    assert shown["ORCH_BOOT_TIMEOUT_S"] == "20"
    for secret in (MASTER_KEY, ADMIN_KEY, "a-secret"):
        assert secret not in ended.out + ended.err
