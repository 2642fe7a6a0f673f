"""Rows as typed values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    import asyncpg

__all__ = [
    "ALL_SCOPES",
    "NOBODY",
    "Attempt",
    "AuditHead",
    "AuditRow",
    "Caller",
    "ClaimedWebhook",
    "Engine",
    "EngineKey",
    "PlatformKey",
    "Product",
]

NOBODY = "nobody"  # owns the lease of an operation that waits to be taken over
ALL_SCOPES = frozenset({"read", "admit", "manage"})


@dataclass(frozen=True, slots=True)
class Caller:
    """A product as it calls: by one of its platform keys, or through an admin key (`key_id` is None)."""

    product_id: UUID
    slug: str
    scopes: frozenset[str]
    key_id: UUID | None

    @property
    def is_admin(self) -> bool:
        return self.key_id is None

    @property
    def actor(self) -> str:
        return "admin" if self.is_admin else self.slug

    def may(self, scope: str) -> bool:
        """`manage` holds all, `admit` holds `read`."""
        return "manage" in self.scopes or scope in self.scopes or (scope == "read" and "admit" in self.scopes)


@dataclass(frozen=True, slots=True)
class Product:
    id: UUID
    slug: str
    policy: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PlatformKey:
    """A platform key as it may be shown: never itself."""

    id: UUID
    product_id: UUID
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None


@dataclass(frozen=True, slots=True)
class EngineKey:
    """One key of an engine, in ciphertext; `overlap_s` is what is left of it after it was superseded."""

    generation: int
    key_hash: str
    key_enc: str
    master_key_id: str
    overlap_s: float | None


@dataclass(frozen=True, slots=True)
class Engine:
    """A row of `engines`."""

    id: UUID
    product_id: UUID
    user_id: str
    status: str
    engine_version: str
    image_id: str | None
    created_at: datetime
    location_id: UUID
    host: str | None
    port: int | None
    endpoint_port: int | None
    container_id: str | None
    incarnation: int
    spec_fingerprint: str | None
    operation: str | None
    operation_id: UUID | None
    operation_started_at: datetime | None
    operation_parameters: dict[str, Any]
    deadline_at: datetime | None
    former_status: str | None
    wish: str | None
    lease_generation: int
    lease_owner: str | None
    lease_until: datetime | None
    last_error: dict[str, Any] | None
    key_generation: int
    applied_generation: int
    first_healthy_at: datetime | None
    last_health_at: datetime | None
    boot_duration_ms: int | None
    restart_attempt: int
    restart_ended_at: datetime | None
    next_restart_at: datetime | None
    restart_parked_until: datetime | None
    keep_alive_until: datetime | None

    @classmethod
    def of(cls, record: asyncpg.Record) -> Self:
        return cls(**{name: record[name] for name in _ENGINE_COLUMNS})

    @property
    def ever_healthy(self) -> bool:
        return self.first_healthy_at is not None

    @property
    def is_settled(self) -> bool:
        """No operation is under way, and none is asked for."""
        return self.operation is None and self.wish is None

    @property
    def gave_up_for_now(self) -> bool:
        """The operation under way has failed (`last_error`) and will be tried again."""
        return self.lease_owner == NOBODY and self.last_error is not None

    @property
    def url(self) -> str | None:
        return engine_url(self.host, self.endpoint_port)


_ENGINE_COLUMNS = tuple(field.name for field in fields(Engine))


def engine_url(host: str | None, port: int | None) -> str | None:
    """The URL that a product calls; None until the engine was created once."""
    if host is None or port is None:
        return None
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The last row of a chain, and the one before its first (0 and empty, unless retention has removed rows)."""

    chain: str
    seq: int
    hash: str
    anchor_seq: int
    anchor_hash: str


@dataclass(frozen=True, slots=True)
class AuditRow:
    """A row of `audit_log`; `seq`, `position` and the hashes are None until the sequencer has placed it."""

    id: int
    timestamp: datetime
    product_id: UUID | None
    user_id: str | None
    engine_id: UUID | None
    action: str
    actor: str
    status: str | None
    metadata: dict[str, Any]
    duration_ms: int | None
    seq: int | None = None
    prev_hash: str | None = None
    hash: str | None = None
    position: int | None = None

    @classmethod
    def of(cls, record: asyncpg.Record) -> Self:
        return cls(**dict(record))


@dataclass(frozen=True, slots=True)
class ClaimedWebhook:
    """A webhook that one worker holds. `seq`: the last row dealt with; `attempts`: failures of the one after it."""

    id: UUID
    product_id: UUID
    url: str
    events: list[str]
    secret_enc: str
    master_key_id: str
    seq: int
    attempts: int
    lease_generation: int
    now_s: float  # the database's time of the claim, in Unix seconds


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a delivery. `status`: `delivered`, `pending` (again after `delay_s`) or `parked`."""

    seq: int
    action: str
    status: str
    response_status: int | None
    error: str | None
    delay_s: float
