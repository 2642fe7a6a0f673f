"""The one door to PostgreSQL: a pool, named queries, deadlines, and one mapping of what can go wrong."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import asyncpg
import orjson

from orchestrator.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from asyncpg.pool import PoolConnectionProxy

    Connection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]

__all__ = ["Database", "connect", "sql"]

T = TypeVar("T")
Isolation = Literal["repeatable_read", "read_committed"]

CONNECT_TIMEOUT_S = 1.5
STATEMENT_TIMEOUT_S = 1.8  # waiting for a connection included: an answer within 2 s, whatever happens
GIVE_BACK_S = 0.1  # for a server to confirm that it has given up a statement; a silent one never does
NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@cache
def _queries() -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted((Path(__file__).parent / "queries").glob("*.sql")):
        _, *parts = NAME.split(path.read_text(encoding="utf-8"))
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            if name in found:
                raise ValueError(f"query {name} is defined twice")
            found[name] = text.strip()
    return found


def sql(name: str) -> str:
    """The query called `name` in `queries/*.sql`."""
    return _queries()[name]


def query_names() -> list[str]:
    return list(_queries())


_CONNECTION_ERRORS = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # it starts, ends, or was told to
    asyncpg.InsufficientResourcesError,  # connections, disk, memory
    asyncpg.InvalidAuthorizationSpecificationError,  # the password was changed meanwhile
    asyncpg.InvalidCatalogNameError,
    asyncpg.ObjectNotInPrerequisiteStateError,  # the database accepts no connections
    asyncpg.ReadOnlySQLTransactionError,  # a standby, before its promotion
    asyncpg.InternalClientError,  # the server's farewell came in between: "another operation is in progress"
)


def _unavailable(error: Exception) -> DatabaseUnavailable | None:
    """What a failure of the connection itself, or a deadline, means; None for every other error."""
    if isinstance(error, TimeoutError):
        return DatabaseUnavailable("no answer in time")
    if isinstance(error, (OSError, *_CONNECTION_ERRORS)):
        return DatabaseUnavailable(type(error).__name__)
    if isinstance(error, asyncpg.InterfaceError) and "clos" in str(error):  # "is closed", "is closing"
        return DatabaseUnavailable("the connection was closed")
    return None


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except Exception as error:  # whatever is not the connection's failure goes on as it is
        if (unavailable := _unavailable(error)) is None:
            raise
        raise unavailable from error


async def _init(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: orjson.dumps(value).decode(),
        decoder=orjson.loads,
    )


async def connect(url: str, *, timeout_s: float = 5) -> asyncpg.Connection[asyncpg.Record]:
    """One connection outside any pool. Raises `DatabaseUnavailable` with a reason that names no secret."""
    try:
        return await asyncpg.connect(url, timeout=timeout_s)
    except TimeoutError:
        raise DatabaseUnavailable("no answer to the connection attempt") from None
    except asyncpg.InvalidPasswordError:
        raise DatabaseUnavailable("it refuses the user or password of ORCH_DATABASE_URL") from None
    except asyncpg.InvalidAuthorizationSpecificationError:
        raise DatabaseUnavailable("it refuses the user of ORCH_DATABASE_URL") from None
    except asyncpg.InvalidCatalogNameError:
        raise DatabaseUnavailable("the database named in ORCH_DATABASE_URL does not exist") from None
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        raise DatabaseUnavailable(_reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused; is PostgreSQL running at ORCH_DATABASE_URL?"
    if isinstance(error, FileNotFoundError):
        return "no such socket; is PostgreSQL running at ORCH_DATABASE_URL?"
    return type(error).__name__


class Database:
    """A pool of connections. Every call raises `DatabaseUnavailable` in under 2 s when there is no answer.

    Sessions hold no state between two calls (no session locks, no LISTEN, no temporary objects), so nothing is
    reset when a connection goes back: that would cost each look-up a second round trip.
    """

    def __init__(self, url: str, *, size: int, pooler: bool = False) -> None:
        self._url = url
        self._size = size
        self._pooler = pooler
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self) -> None:
        probe = await connect(self._url)  # says clearly what is wrong, where the pool would not
        await probe.close()
        self._pool = asyncpg.create_pool(
            self._url,
            min_size=1,
            max_size=self._size,
            timeout=CONNECT_TIMEOUT_S,
            init=_init,
            reset=_keep,
            statement_cache_size=0 if self._pooler else 256,
            max_inactive_connection_lifetime=0 if not self._pooler else 300,
            server_settings={"application_name": "engine-orchestrator"} if not self._pooler else {},
        )
        async with _translated():
            await self._pool

    async def close(self) -> None:
        if self._pool is not None:
            try:
                await asyncio.wait_for(self._pool.close(), 2)
            except TimeoutError:
                self._pool.terminate()
            self._pool = None

    @property
    def pool(self) -> asyncpg.Pool[asyncpg.Record]:
        assert self._pool is not None, "open() was not called"
        return self._pool

    async def fetchrow(self, query: str, *args: Any, timeout_s: float = STATEMENT_TIMEOUT_S) -> asyncpg.Record | None:
        return await self._run(lambda connection: connection.fetchrow(query, *args), timeout_s)

    async def fetch(self, query: str, *args: Any, timeout_s: float = STATEMENT_TIMEOUT_S) -> list[asyncpg.Record]:
        return await self._run(lambda connection: connection.fetch(query, *args), timeout_s)

    async def fetchval(self, query: str, *args: Any, timeout_s: float = STATEMENT_TIMEOUT_S) -> Any:
        return await self._run(lambda connection: connection.fetchval(query, *args), timeout_s)

    async def execute(self, query: str, *args: Any, timeout_s: float = STATEMENT_TIMEOUT_S) -> str:
        return await self._run(lambda connection: connection.execute(query, *args), timeout_s)

    async def _run(self, call: Callable[[Connection], Awaitable[T]], timeout_s: float) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self.pool.acquire()
                try:
                    result = await call(connection)
                except BaseException:
                    await self._give_back(connection)
                    raise
                await self.pool.release(connection)
                return result
        except Exception as error:  # whatever is not the connection's failure goes on as it is
            if (unavailable := _unavailable(error)) is None:
                raise
            raise unavailable from error

    @asynccontextmanager
    async def transaction(
        self, *, timeout_s: float = STATEMENT_TIMEOUT_S, snapshot: bool = False
    ) -> AsyncIterator[Connection]:
        """A transaction that is rolled back on any error, and ended after `timeout_s` at the latest.

        `snapshot`: it only reads, and sees everything as it was at its beginning.

        That the database answers at all is known within `STATEMENT_TIMEOUT_S`, however long the rest may take.
        """
        async with _translated(), asyncio.timeout(STATEMENT_TIMEOUT_S) as limit:
            connection = await self.pool.acquire()
            try:
                isolation: Isolation = "repeatable_read" if snapshot else "read_committed"
                transaction = connection.transaction(isolation=isolation, readonly=snapshot)
                await transaction.start()
                limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
                try:
                    yield connection
                except BaseException:
                    await self._roll_back(connection, transaction)
                    raise
                await transaction.commit()
            except BaseException:
                await self._give_back(connection)
                raise
            await self.pool.release(connection)

    async def _roll_back(self, connection: Connection, transaction: asyncpg.transaction.Transaction) -> None:
        """Soon, or by the end of the connection, which the server understands as well."""
        try:
            async with asyncio.timeout(GIVE_BACK_S):
                await transaction.rollback()
        except Exception:  # noqa: BLE001 - whatever it was: no connection goes back to the pool in a transaction
            connection.terminate()

    async def _give_back(self, connection: PoolConnectionProxy[asyncpg.Record]) -> None:
        """After a failure. asyncpg waits without a limit for a server to confirm that a statement was given up."""
        with suppress(Exception):  # then the connection is ended, and the failure itself is what the caller hears
            await self.pool.release(connection, timeout=GIVE_BACK_S)


async def _keep(connection: Connection) -> None:
    return None
