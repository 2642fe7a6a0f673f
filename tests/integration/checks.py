"""What several tests of the API look at: the shape of errors, and rows that no call makes by itself."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg

from orchestrator.keys import new_platform_key, sha256_hex

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.conftest import Api, Served

STATES = ("provisioning", "running", "sleeping", "stopped", "failed", "destroying")


def code_of(answer: tuple[int, Any]) -> tuple[int, str]:
    """Status and code of an error, after a look at its shape."""
    status, body = answer
    assert isinstance(body, dict), body
    assert list(body) == ["error"], body
    error = body["error"]
    assert set(error) in ({"code", "message"}, {"code", "message", "details"}), error
    assert isinstance(error["code"], str)
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "\n" not in error["message"]
    return status, error["code"]


def retry_after(api: Api) -> int:
    """The `Retry-After` of the last answer: whole seconds, at least one."""
    assert api.last is not None
    seconds = int(api.last.headers["retry-after"])
    assert seconds >= 1
    return seconds


@asynccontextmanager
async def database(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection of the test's own, with JSON as values."""
    connection = await asyncpg.connect(url)
    try:
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        yield connection
    finally:
        await connection.close()


async def put_engine(served: Served, product_id: str, user_id: str, status: str, **columns: Any) -> UUID:
    """An engine that is only a row, in any state; it lives elsewhere, and the replica under test leaves it alone."""
    engine_id = uuid4()
    ciphertext, master_key_id = served.plane.keyring.encrypt("sk-sept-of-a-row-without-a-process")
    values: dict[str, Any] = {
        "id": engine_id,
        "product_id": UUID(product_id),
        "user_id": user_id,
        "status": status,
        "engine_version": "mimic:1",
        "location_id": uuid4(),
        **columns,
    }
    if status in ("provisioning", "destroying"):
        values |= {
            "operation": "provision" if status == "provisioning" else "destroy",
            "operation_id": uuid4(),
            "lease_owner": "elsewhere",
            "lease_until": datetime.now(UTC) + timedelta(minutes=1),
        }
    names = ", ".join(values)
    places = ", ".join(f"${number}" for number in range(1, len(values) + 1))
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute(f"INSERT INTO engines ({names}) VALUES ({places})", *values.values())
        await connection.execute(
            "INSERT INTO engine_keys (engine_id, generation, key_hash, key_enc, master_key_id) "
            "VALUES ($1, 1, '', $2, $3)",
            engine_id,
            ciphertext,
            master_key_id,
        )
    return engine_id


async def fingerprint(url: str) -> dict[str, Any]:
    """Everything that a refused call must leave as it was."""
    async with database(url) as connection:
        return {
            table: [tuple(row) for row in await connection.fetch(f"SELECT {columns} FROM {table} ORDER BY 1")]
            for table, columns in {
                "products": "id, slug, display_name, policy",
                "platform_keys": "id, key_hash, scopes, expires_at",
                "engines": "id, user_id, status, engine_version, operation, key_generation, keep_alive_until",
                "engine_keys": "engine_id, generation, key_hash",
                "idempotency_keys": "key, body_hash, engine_id",
                "tombstones": "engine_id",
                "audit_log": "id, action",
                "rate_slots": "product_id, slot, free_at",
            }.items()
        }


async def put_key(served: Served, product_id: str, *scopes: str, expires_in_s: float | None = None) -> str:
    """A platform key with these scopes, as the calls on keys would issue it."""
    key = new_platform_key()
    expires_at = None if expires_in_s is None else datetime.now(UTC) + timedelta(seconds=expires_in_s)
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute(
            "INSERT INTO platform_keys (product_id, key_hash, scopes, expires_at) VALUES ($1, $2, $3, $4)",
            UUID(product_id),
            sha256_hex(key),
            list(scopes),
            expires_at,
        )
    return key


async def exchange(url: str, request: bytes) -> tuple[int, dict[str, str], Any]:
    """Send bytes as they are, which no HTTP client would; status, headers and JSON of the answer."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return int(head[0].split()[1]), headers, json.loads(body) if body else None
    finally:
        writer.close()


def request_bytes(method: str, target: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """A request as bytes; the target is sent as it is."""
    lines = [f"{method} {target} HTTP/1.1", "Host: test", *(f"{name}: {value}" for name, value in headers.items())]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body
