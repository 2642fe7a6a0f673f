"""PostgreSQL as the orchestrator will find it: reachable, new enough, migrated, with room, and its clock."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from orchestrator.doctor.checks import Finding, fail, ok, run_check, warn
from orchestrator.errors import ConfigurationError
from orchestrator.keys import KeyRing
from orchestrator.registry.database import connect
from orchestrator.registry.migrations import HEAD

if TYPE_CHECKING:
    import asyncpg

    from orchestrator.settings import Settings

__all__ = ["database"]

OLDEST = 140000  # PostgreSQL 14
SLOW_MS = 20.0
SKEW_WARN_S = 2.0


async def database(settings: Settings) -> list[Finding]:
    url = settings.database_url.get_secret_value()
    advice = "start PostgreSQL, or mend ORCH_DATABASE_URL"

    async def check() -> list[Finding]:
        connection = await connect(url)
        try:
            found = await _server(connection, settings)
            found += await run_check(
                "migrations", lambda: _migrations(connection, settings), "run: orchestrator migrate"
            )
            found += await run_check("clock", lambda: _clock(connection), "let a time service (chrony, ntpd) set it")
        finally:
            await connection.close()
        if settings.listen_url != url:
            listening = await connect(settings.listen_url)
            await listening.close()
            found.append(ok("database", "ORCH_DATABASE_LISTEN_URL answers"))
        elif settings.database_pooler:
            found.append(
                warn(
                    "database",
                    "ORCH_DATABASE_POOLER is set and there is no URL past the pooler",
                    "set ORCH_DATABASE_LISTEN_URL to PostgreSQL itself: a transaction pooler carries no LISTEN",
                )
            )
        return found

    return await run_check("database", check, advice)


async def _server(connection: asyncpg.Connection[Any], settings: Settings) -> list[Finding]:
    began = time.perf_counter()
    version, version_number, most, reserved, used = await connection.fetchrow(  # type: ignore[misc]  # one row, always
        "SELECT current_setting('server_version'), current_setting('server_version_num')::int, "
        "current_setting('max_connections')::int, current_setting('superuser_reserved_connections')::int, "
        "(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')"
    )
    took_ms = (time.perf_counter() - began) * 1000
    if version_number < OLDEST:
        return [fail("database", f"PostgreSQL {version}", "upgrade it: 14 is the oldest that works")]
    found = [ok("database", f"PostgreSQL {version}, answers in {took_ms:.0f} ms")]
    if took_ms > SLOW_MS:
        found[0] = warn(
            "database",
            f"PostgreSQL {version} needs {took_ms:.0f} ms for an answer",
            "put it nearer, or relieve it: each admit waits for one answer",
        )
    wanted = (settings.database_pool + 2) * settings.workers  # a pool, LISTEN, and one for a migration
    free = most - reserved
    if wanted > free:
        found.append(
            fail(
                "database",
                f"one replica may open {wanted} connections, PostgreSQL has {free} ({used} in use)",
                "lower ORCH_DATABASE_POOL or ORCH_WORKERS, or raise max_connections",
            )
        )
    return found


async def _migrations(connection: asyncpg.Connection[Any], settings: Settings) -> list[Finding]:
    exists = await connection.fetchval("SELECT to_regclass('alembic_version') IS NOT NULL")
    revision = await connection.fetchval("SELECT version_num FROM alembic_version") if exists else None
    if revision == HEAD:
        return [ok("migrations", f"at {HEAD}"), *await _contents(connection, settings)]
    if revision is not None and revision > HEAD:
        line = f"the database is at {revision}, newer than this release ({HEAD})"
        return [fail("migrations", line, "run the newer release")]
    line = f"at {revision or 'none'} of {HEAD}"
    if not await connection.fetchval("SELECT has_schema_privilege(current_user, 'public', 'CREATE')"):
        advice = "let the user create tables: GRANT CREATE ON SCHEMA public, then run: orchestrator migrate"
        return [fail("migrations", f"{line}, and this user may not create tables", advice)]
    if settings.auto_migrate:
        return [ok("migrations", f"{line}; serve applies the rest (ORCH_AUTO_MIGRATE)")]
    return [fail("migrations", line, "run: orchestrator migrate")]


async def _contents(connection: asyncpg.Connection[Any], settings: Settings) -> list[Finding]:
    stored = {row[0] for row in await connection.fetch("SELECT DISTINCT master_key_id FROM engine_keys")}
    keyring = KeyRing(settings.master_keys())
    try:
        keyring.require(stored)
    except ConfigurationError as error:
        return [fail("master key", error.message, "add the older key to ORCH_MASTER_KEY, after the current one")]
    if len(settings.master_keys()) > 1:
        if stored <= {keyring.current_id}:
            line = "all engine keys are under the first master key"
            return [warn("master key", line, "take the older ones out of ORCH_MASTER_KEY: they are no longer needed")]
        line = "some engine keys are still under an older master key"
        return [warn("master key", line, "run: orchestrator keys rewrap")]
    return [ok("master key", "opens all stored engine keys" if stored else "no engine keys are stored yet")]


async def _clock(connection: asyncpg.Connection[Any]) -> list[Finding]:
    before = datetime.now(UTC)
    theirs: datetime = await connection.fetchval("SELECT clock_timestamp()")
    after = datetime.now(UTC)
    skew = max((before - theirs).total_seconds(), (theirs - after).total_seconds(), 0.0)
    if skew > SKEW_WARN_S:
        line = f"this host and PostgreSQL differ by {skew:.1f} s"
        return [warn("clock", line, "let a time service (chrony, ntpd) set both clocks; logs and metrics mislead")]
    return [ok("clock", "agrees with PostgreSQL's")]
