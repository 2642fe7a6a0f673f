"""PostgreSQL goes away and returns: callers hear it soon, no engine is touched, what was under way ends once.

Between the orchestrator and the database stands a proxy, which can end, fall silent, or lose what was open.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit, urlunsplit

import pytest

from tests.integration.steps import (
    PASSTHROUGH,
    database,
    disagreements,
    error,
    heal,
    objects_of,
    pid_of,
    reaches,
    settled,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.conftest import Deployment

CALLS = [
    ("GET", "/engines/ann", None),
    ("POST", "/engines/ann/admit", {"auto_wake": True}),
    ("POST", "/engines/bob/admit", {"auto_wake": True}),
    ("POST", "/engines/provision", {"user_id": "dora"}),
    ("POST", "/engines/ann/rotate-key", None),
]
AWAY_S = 6.0  # several times the lease


class Proxy:
    """In front of a server: `open` forwards; `ended`: refused; `silent`: nothing passes; `lost`: nor ever again."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._parts = parts
        sockets = parse_qs(parts.query).get("host", [""])[0]
        self._socket = f"{sockets}/.s.PGSQL.{parts.port or 5432}" if sockets.startswith("/") else None
        self._passes = asyncio.Event()
        self._passes.set()
        self._pipes: dict[asyncio.Task[None], asyncio.Event] = {}
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        user = f"{self._parts.username}:{self._parts.password or ''}@" if self._parts.username else ""
        return urlunsplit(self._parts._replace(netloc=f"{user}127.0.0.1:{self.port}", query=""))

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        passes = self._pipes[task] = asyncio.Event()
        passes.set()
        try:
            await self._passes.wait()
            if self._socket is not None:
                upstream, downstream = await asyncio.open_unix_connection(self._socket)
            else:
                upstream, downstream = await asyncio.open_connection(self._parts.hostname, self._parts.port or 5432)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, downstream, passes))
                    group.create_task(self._pump(upstream, writer, passes))
            finally:
                downstream.close()
        except* (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._pipes.pop(task, None)
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: asyncio.Event) -> None:
        while data := await reader.read(65536):
            await self._passes.wait()
            await passes.wait()
            writer.write(data)
            await writer.drain()
        raise EOFError

    async def go(self, how: str) -> None:
        match how:
            case "ended":
                assert self._server is not None
                self._server.close()
                await self._end_pipes()
            case "lost":
                for passes in self._pipes.values():
                    passes.clear()
                self._passes.clear()
            case "silent":
                self._passes.clear()

    async def come_back(self, how: str) -> None:
        if how == "ended":
            await self.open()
        self._passes.set()

    async def _end_pipes(self) -> None:
        pipes = list(self._pipes)
        for task in pipes:
            task.cancel()
        if pipes:
            await asyncio.wait(pipes)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._end_pipes()


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[Proxy]:
    made = Proxy(database_url)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return (
        variables
        | PASSTHROUGH
        | {
            "ORCH_LEASE_S": "2",
            "ORCH_BOOT_TIMEOUT_S": "60",
            "ORCH_HEALTH_CHECK_INTERVAL_S": "1",
            "ORCH_IDLE_SLEEP_THRESHOLD_S": "600",
        }
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["ended", "silent", "lost"])
async def test_away_and_back(deployment: Deployment, proxy: Proxy, how: str) -> None:
    replica = await deployment.serve(ORCH_DATABASE_URL=proxy.url)
    api = await deployment.product(replica.url)
    ann, _, carl = [await api.provision(user_id) for user_id in ("ann", "bob", "carl")]
    pid = await pid_of(ann)
    await api.post("/engines/bob/sleep")
    await api.post("/engines/carl/stop")
    deployment.mimic_flags(carl["engine_id"], fail_health=True)
    start = asyncio.create_task(api.post("/engines/carl/start"))

    async def under_way() -> bool:
        async with database(deployment) as connection:
            return bool(await connection.fetchval("SELECT operation = 'start' FROM engines WHERE user_id = 'carl'"))

    await until(under_way)
    before = {one.engine_id: one.state for one in (await objects_of(deployment)).values()}
    await proxy.go(how)
    began = time.monotonic()
    slowest = 0.0
    while time.monotonic() < began + AWAY_S:
        for method, path, body in CALLS:
            asked = time.monotonic()
            assert error(await api.call(method, path, body)) == (503, "DATABASE_UNAVAILABLE"), path
            slowest = max(slowest, time.monotonic() - asked)
            assert api.last is not None
            assert int(api.last.headers["Retry-After"]) >= 1
    print(f"{how}: the slowest 503 took {slowest:.2f} s")
    assert (await api.get("/health"))[0] == 503
    after = {one.engine_id: one.state for one in (await objects_of(deployment)).values()}
    assert {engine_id: after.get(engine_id) for engine_id in before} == before
    async with database(deployment) as connection:
        back_at = await connection.fetchval("SELECT clock_timestamp()")
    await proxy.come_back(how)
    await heal(deployment, carl["engine_id"])

    async def answers() -> bool:
        return (await api.get("/engines/ann"))[0] == 200

    await until(answers, 60)
    await start  # whatever its caller was told meanwhile
    await reaches(api, "carl", "running", 60)
    await settled(deployment)
    # A provision that was refused may have been written all the same (its answer was lost): then it is finished.
    status, dora = await api.get("/engines/dora")
    assert status == 404 or dora["status"] == "running"

    async def loops_are_back() -> bool:
        async with database(deployment) as connection:
            return bool(
                await connection.fetchval(
                    "SELECT bool_and(last_health_at > $1) FROM engines WHERE status = 'running'", back_at
                )
            )

    await until(loops_are_back, 60)

    async def listens() -> bool:
        async with database(deployment) as connection:
            # A connection that only fell silent goes on; every other one was opened since.
            return bool(
                await connection.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND application_name <> 'engine-orchestrator' AND (query LIKE 'LISTEN%' OR query = 'SELECT 1') "
                    "AND ($2 OR backend_start > $1)",
                    back_at,
                    how == "silent",
                )
            )

    await until(listens, 60)
    assert (await api.get("/health"))[0] == 200
    assert await api.status_of("ann") == "running"
    assert await api.status_of("bob") == "sleeping"
    assert await pid_of(ann) == pid
    assert (await api.admit("bob"))["admitted"]
    assert await disagreements(deployment) == []
    async with database(deployment) as connection:
        assert await connection.fetchval("SELECT count(*) FROM audit_log WHERE action = 'start'") == 1
        for action in ("sleep", "stop"):
            assert await connection.fetchval("SELECT count(*) FROM audit_log WHERE action = $1", action) == 1
        assert await connection.fetchval("SELECT count(*) FROM audit_log WHERE action LIKE 'auto_restart%'") == 0
    assert await asyncio.to_thread(replica.stop) == 0


@pytest.mark.timeout(200)
async def test_it_can_be_ended_while_the_database_is_silent(deployment: Deployment, proxy: Proxy) -> None:
    replica = await deployment.serve(ORCH_DATABASE_URL=proxy.url)
    api = await deployment.product(replica.url)
    ann = await api.provision("ann")
    pid = await pid_of(ann)
    await proxy.go("silent")
    assert await asyncio.to_thread(replica.stop) == 0
    assert await pid_of(ann) == pid
