"""Engines: claims, leases and ends of operations, each one statement or one short transaction.

A method that writes for an operation takes the `Lease` of its claim and returns None (or False) when that lease
is not the current one any more: the caller must then stop acting.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from orchestrator.errors import IdempotencyConflict, PortExhaustion, ProductNotFound, QuotaExceeded
from orchestrator.registry.database import Database, sql
from orchestrator.registry.rows import Engine, EngineKey

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    import asyncpg

__all__ = ["EngineRegistry", "Finish", "Inserted", "NewEngine", "Then"]


class Inserted(StrEnum):
    """What `insert` found."""

    NEW = "new"
    EXISTS = "exists"  # the user has an engine
    REPLAYED = "replayed"  # the Idempotency-Key stands for this engine


@dataclass(frozen=True, slots=True)
class NewEngine:
    """What a provision wants recorded before anything is done."""

    engine_id: UUID
    product_id: UUID
    user_id: str
    engine_version: str
    location_id: UUID
    ports: tuple[int, int] | None  # None: nothing is published on the host
    is_port_free: Callable[[int], Awaitable[bool]]
    key_hash: str
    key_enc: str
    master_key_id: str
    actor: str
    deadline_s: float
    owner: str
    lease_s: float
    idempotency: tuple[str, str] | None  # (key, hash of the body)


class Then(StrEnum):
    """What follows an end in `failed`."""

    KEEP = "keep"  # no failure, or one that changes nothing of what is to follow
    RESTART = "restart"  # by itself, after `restart_in_s`
    GIVE_UP = "give_up"  # not until somebody asks for it
    NOTHING = "nothing"  # not restarted by itself: it never was healthy


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an operation; written with its audit row in one statement."""

    status: str
    action: str | None = None
    metadata: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    healthy: bool = False
    boot_ms: int | None = None
    applied_generation: int | None = None
    key_generation: int | None = None
    answers_wish: str | None = None
    active_ago_s: float | None = None  # since the last work that the engine has told of
    then: Then = Then.KEEP
    restart_in_s: float | None = None
    refund: bool = False  # the attempt did not come to anything, and does not count
    unloaded: bool = False  # asleep, and its process has ended
    last_log: list[str] | None = None
    restarts_seen: int | None = None  # the backend's own, while it booted: they are no crashes of a running engine


INSERT_TIMEOUT_S = 10.0  # other processes may be inserting for the same product


class EngineRegistry:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._turns: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()

    # --- provision ------------------------------------------------------------------------------------

    async def insert(self, new: NewEngine) -> tuple[Engine, Inserted]:
        """Record a new engine with its port, key and lease; or find the one there is.

        Exact under concurrency: `max_engines` is checked under the product's row lock, ports are given out under
        the location's advisory lock. Raises `QuotaExceeded`, `PortExhaustion`, `IdempotencyConflict`,
        `ProductNotFound`; then no row is left.
        """
        # One connection at a time waits for the product's row, so that a burst leaves the pool to others.
        turn = self._turns.setdefault(new.product_id, asyncio.Lock())
        async with turn, self._database.transaction(timeout_s=INSERT_TIMEOUT_S) as connection:
            if new.idempotency is not None:
                key, body_hash = new.idempotency
                await connection.execute(sql("idempotency_lock"), str(new.product_id), key)
                known = await connection.fetchrow(sql("idempotency_take"), new.product_id, key)
                if known is not None:
                    if known["body_hash"] != body_hash:
                        raise IdempotencyConflict
                    row = await connection.fetchrow(sql("engine_by_id"), known["engine_id"])
                    if row is not None:
                        return Engine.of(row), Inserted.REPLAYED
            product = await connection.fetchrow(sql("lock_product"), new.product_id)
            if product is None:
                raise ProductNotFound(str(new.product_id))
            existing = await connection.fetchrow(sql("engine_by_user"), new.product_id, new.user_id)
            if existing is not None:
                return Engine.of(existing), Inserted.EXISTS
            max_engines = product["policy"].get("max_engines")
            if (
                max_engines is not None
                and await connection.fetchval(sql("count_engines"), new.product_id) >= max_engines
            ):
                raise QuotaExceeded(max_engines)
            port = None
            if new.ports is not None:
                await connection.execute(sql("lock_ports"), str(new.location_id))
                port = await _free_port(connection, new.location_id, new.ports, new.is_port_free)
            row = await connection.fetchrow(
                sql("insert_engine"),
                new.engine_id,
                new.product_id,
                new.user_id,
                new.engine_version,
                new.location_id,
                port,
                new.actor,
                new.deadline_s,
                new.owner,
                new.lease_s,
            )
            assert row is not None  # the product's lock is held: nobody else inserts for this user
            await connection.execute(sql("insert_key"), new.engine_id, 1, new.key_hash, new.key_enc, new.master_key_id)
            if new.idempotency is not None:
                await connection.execute(sql("idempotency_put"), new.product_id, *new.idempotency, new.engine_id)
            return Engine.of(row), Inserted.NEW

    async def put_idempotency_key(self, product_id: UUID, idempotency: tuple[str, str], engine_id: UUID) -> None:
        """Let the key stand for an engine whose provision is tried again."""
        await self._database.execute(sql("idempotency_put"), product_id, *idempotency, engine_id)

    async def expire_idempotency_keys(self) -> None:
        await self._database.execute(sql("idempotency_expire"))

    # --- reading --------------------------------------------------------------------------------------

    async def by_id(self, engine_id: UUID) -> Engine | None:
        row = await self._database.fetchrow(sql("engine_by_id"), engine_id)
        return None if row is None else Engine.of(row)

    async def by_user(self, product_id: UUID, user_id: str) -> Engine | None:
        row = await self._database.fetchrow(sql("engine_by_user"), product_id, user_id)
        return None if row is None else Engine.of(row)

    async def keys(self, engine_id: UUID) -> list[EngineKey]:
        """From the key that the engine has to the newest one."""
        return [EngineKey(**dict(row)) for row in await self._database.fetch(sql("engine_keys"), engine_id)]

    async def here(self, location_id: UUID, engine_id: UUID | None = None) -> list[asyncpg.Record]:
        """A narrow row for every engine of this location, or for one of them."""
        return await self._database.fetch(sql("engines_here"), location_id, engine_id, timeout_s=10)

    async def master_key_ids(self) -> set[str]:
        """Under which master keys the engines' keys are stored."""
        return {row["master_key_id"] for row in await self._database.fetch(sql("master_key_ids"))}

    async def locations(self) -> set[UUID]:
        return {row["location_id"] for row in await self._database.fetch(sql("locations"))}

    # --- leases ---------------------------------------------------------------------------------------

    async def claim(
        self,
        engine_id: UUID,
        *,
        operation: str,
        from_statuses: frozenset[str],
        status: str,
        owner: str,
        lease_s: float,
        actor: str,
        deadline_s: float,
        parameters: dict[str, Any] | None = None,
        override: bool = False,
        engine_version: str | None = None,
        generation: int | None = None,
        action: str | None = None,
    ) -> Engine | None:
        """Take the engine for an operation and show `status`; None when state, a wish or another's lease forbids it.

        `override`: also from a holder whose lease has run out, or who has not answered a wish for one lease time.
        `generation`: only if nobody has claimed it since. `action`: also an audit row, with the parameters.
        The owner `NOBODY` leaves the operation to whoever takes it over.
        """
        row = await self._database.fetchrow(
            sql("claim"),
            engine_id,
            list(from_statuses),
            owner,
            lease_s,
            operation,
            status,
            actor,
            deadline_s,
            override,
            engine_version,
            generation,
            parameters or {},
            action,
        )
        return None if row is None else Engine.of(row)

    async def take_over(
        self, location_id: UUID, *, owner: str, lease_s: float, limit: int, operations: list[str]
    ) -> list[tuple[Engine, float]]:
        """Claim operations whose owner is gone, as they are; each with the seconds left of its deadline."""
        rows = await self._database.fetch(sql("take_over"), location_id, owner, lease_s, limit, operations)
        return [(Engine.of(row), row["deadline_left_s"] or 0.0) for row in rows]

    async def renew(self, held: list[tuple[UUID, int]], lease_s: float) -> dict[tuple[UUID, int], str | None]:
        """The leases that are still held, each with the wish that waits for it."""
        rows = await self._database.fetch(
            sql("renew"), [engine_id for engine_id, _ in held], [generation for _, generation in held], lease_s
        )
        return {(row["id"], row["lease_generation"]): row["wish"] for row in rows}

    async def set_wish(self, engine: Engine, wish: str, actor: str) -> bool:
        """Ask for an end of the operation that `engine` shows, by `wake`, `stop` or `destroy`.

        False when that operation is over, or a wish at least as strong waits already.
        """
        return await self._database.fetchrow(sql("set_wish"), engine.id, engine.operation_id, wish, actor) is not None

    async def due_wishes(self, location_id: UUID, lease_s: float, limit: int) -> list[asyncpg.Record]:
        """`id`, `wish`, `wish_actor`, `lease_generation` of engines whose wish nobody carries out."""
        return await self._database.fetch(sql("due_wishes"), location_id, lease_s, limit)

    # --- what an operation writes on its way ------------------------------------------------------------

    async def begin_create(self, engine: Engine, fingerprint: str, image_id: str) -> Engine | None:
        """One more incarnation, recorded before `create` is called."""
        row = await self._database.fetchrow(
            sql("begin_create"), engine.id, engine.lease_generation, fingerprint, image_id, timeout_s=5
        )
        return None if row is None else Engine.of(row)

    async def record_endpoint(
        self, engine: Engine, *, host: str, port: int, container_id: str | None, deadline_s: float
    ) -> Engine | None:
        """Where the engine is; its boot clock starts now."""
        row = await self._database.fetchrow(
            sql("record_endpoint"),
            engine.id,
            engine.lease_generation,
            host,
            port,
            container_id,
            deadline_s,
            timeout_s=5,
        )
        return None if row is None else Engine.of(row)

    async def change_port(
        self, engine: Engine, ports: tuple[int, int], taken: set[int], is_port_free: Callable[[int], Awaitable[bool]]
    ) -> Engine | None:
        """Another port for an engine whose port turned out to be taken. Raises `PortExhaustion`."""
        async with self._database.transaction(timeout_s=5) as connection:
            await connection.execute(sql("lock_ports"), str(engine.location_id))
            port = await _free_port(connection, engine.location_id, ports, is_port_free, taken)
            row = await connection.fetchrow(sql("change_port"), engine.id, engine.lease_generation, port, engine.port)
            return None if row is None else Engine.of(row)

    async def record_next_key(self, engine: Engine, key: EngineKey, overlap_s: float) -> None:
        """The next key, before the engine hears of it; one that is there already stays. No effect without the lease."""
        await self._database.execute(
            sql("rotated_key"),
            engine.id,
            engine.lease_generation,
            key.generation,
            key.key_hash,
            key.key_enc,
            key.master_key_id,
            overlap_s,
            timeout_s=5,
        )

    async def finish(self, engine: Engine, end: Finish, *, probe_interval_s: float) -> Engine | None:
        """End the operation with its audit row; None when the lease is lost or a stronger wish has arrived."""
        row = await self._database.fetchrow(
            sql("finish"),
            engine.id,
            engine.lease_generation,
            end.status,
            end.error,
            end.healthy,
            end.boot_ms,
            end.applied_generation,
            end.key_generation,
            end.answers_wish,
            end.action,
            end.metadata or {},
            end.active_ago_s,
            end.then.value,
            end.restart_in_s,
            probe_interval_s,
            int(end.refund),
            end.unloaded,
            end.last_log,
            end.restarts_seen,
            timeout_s=5,
        )
        return None if row is None else Engine.of(row)

    async def release(self, engine: Engine) -> bool:
        """Give the lease up for a stronger wish, leaving state and wish as they are."""
        return await self._database.fetchrow(sql("release"), engine.id, engine.lease_generation) is not None

    async def requeue(self, engine: Engine, error: dict[str, Any] | None, delay_s: float) -> bool:
        """Give the lease up with the operation still wanted, to be taken over after `delay_s`."""
        row = await self._database.fetchrow(sql("requeue"), engine.id, engine.lease_generation, error, delay_s)
        return row is not None

    async def remove(self, engine: Engine, action: str, status: str, metadata: dict[str, Any] | None = None) -> bool:
        """The end of an operation after which there is no engine: the row gives way to a tombstone."""
        row = await self._database.fetchrow(
            sql("remove_engine"), engine.id, engine.lease_generation, action, status, metadata or {}, timeout_s=5
        )
        return row is not None

    async def restart_wait_s(self, engine_id: UUID, base_s: float) -> float:
        """Seconds until an admit may restart a failed engine; 0 when it may now."""
        return float(await self._database.fetchval(sql("restart_wait"), engine_id, base_s) or 0)

    async def set_keep_alive(self, engine_id: UUID, from_statuses: frozenset[str], seconds: float) -> Engine | None:
        row = await self._database.fetchrow(sql("set_keep_alive"), engine_id, list(from_statuses), seconds)
        return None if row is None else Engine.of(row)


async def _free_port(
    connection: Any,
    location_id: UUID,
    ports: tuple[int, int],
    is_port_free: Callable[[int], Awaitable[bool]],
    taken: set[int] | None = None,
) -> int:
    skipped = set(taken or ())
    while (port := await connection.fetchval(sql("free_port"), location_id, *ports, list(skipped))) is not None:
        if await is_port_free(port):
            return int(port)
        skipped.add(port)
    raise PortExhaustion(*ports)
