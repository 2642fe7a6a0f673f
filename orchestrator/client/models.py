"""What the orchestrator answers, typed.

Fields that a newer orchestrator adds are ignored. No key is in a `repr`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AuditEntry",
    "AuditPage",
    "CreatedWebhook",
    "DeletedProduct",
    "Delivery",
    "EngineInfo",
    "EngineList",
    "Event",
    "Fleet",
    "Health",
    "IssuedKey",
    "KeepAlive",
    "ListedEngine",
    "LogLine",
    "Metrics",
    "Percentiles",
    "Phase",
    "PlatformKey",
    "Product",
    "ProductFleet",
    "ProvisionedEngine",
    "RegisteredProduct",
    "Restarts",
    "Rewrap",
    "RotatedKey",
    "StartedEngine",
    "StatusChange",
    "Subsystem",
    "Timeline",
    "Webhook",
]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


# --- engines --------------------------------------------------------------------------------------------


class EngineInfo(Model):
    """One engine. `url` may be set while it does not run: look at `status`."""

    engine_id: UUID
    user_id: str
    status: str
    url: str | None
    api_key: str | None = Field(None, repr=False)
    engine_version: str
    created_at: datetime
    last_health_at: datetime | None


class ListedEngine(Model):
    engine_id: UUID
    user_id: str
    status: str
    url: str | None
    engine_version: str
    created_at: datetime
    last_health_at: datetime | None
    product_id: UUID | None = None


class EngineList(Model):
    """One page; `total` counts all pages."""

    engines: list[ListedEngine]
    total: int


class ProvisionedEngine(Model):
    engine_id: UUID
    user_id: str
    status: str
    url: str | None
    api_key: str | None = Field(None, repr=False)


class StartedEngine(Model):
    status: str
    url: str | None


class StatusChange(Model):
    status: str
    engine_id: UUID


class RotatedKey(Model):
    """`overlap_seconds`: how long the old key stays valid; 0 where the engine was `restarted` or does not run."""

    engine_id: UUID
    api_key: str | None = Field(None, repr=False)
    overlap_seconds: int
    restarted: bool


class KeepAlive(Model):
    engine_id: UUID
    keep_alive_until: datetime | None


class LogLine(Model):
    timestamp: datetime | None
    stream: str
    line: str


class LogList(Model):
    lines: list[LogLine]


class Phase(Model):
    name: str
    started_at: datetime
    duration_ms: float | None


class Timeline(Model):
    """The phases of the engine's last operation; `stalled_on` names the one that did not end."""

    engine_id: UUID
    operation: str | None
    status: str
    started_at: datetime | None
    duration_ms: float | None
    phases: list[Phase]
    stalled_on: str | None
    last_log: str | None


class AdmitAnswer(Model):
    admitted: bool
    engine: EngineInfo | None
    reason: str | None = None


# --- the fleet ------------------------------------------------------------------------------------------


class ProductFleet(Model):
    product_id: UUID
    total: int
    by_status: dict[str, int]


class Restarts(Model):
    """Failed engines: restarted when their back-off is over, waiting for the end of an outage, or for a person."""

    pending: int
    parked: int
    gave_up: int


class Fleet(Model):
    """`health`: `ok` (none failed), `degraded`, or `critical` (a quarter failed). `products`: admin key only."""

    total: int
    by_status: dict[str, int]
    health: str
    unhealthy_count: int
    restarts: Restarts | None = None
    products: list[ProductFleet] | None = None


class Percentiles(Model):
    p50: float | None
    p95: float | None
    p99: float | None


class Metrics(Model):
    provisions_1h: int
    crashes_1h: int
    restarts_1h: int
    avg_boot_ms: int | None
    boot_ms: Percentiles
    total_provisions: int
    total_destroys: int


class AuditEntry(Model):
    """One row of the audit log, with its place in the hash chain."""

    id: int
    seq: int
    timestamp: datetime
    product_id: UUID | None = None
    user_id: str | None
    engine_id: UUID | None
    action: str
    actor: str
    status: str | None = None
    metadata: dict[str, Any]
    duration_ms: int | None
    prev_hash: str | None = None
    hash: str | None = None


class AuditPage(Model):
    """`next_cursor` asks for the next page; None at the end."""

    entries: list[AuditEntry]
    next_cursor: str | None


class Event(Model):
    """`id` is where a later `events(last_event_id=…)` goes on from."""

    id: str = ""
    seq: int
    timestamp: datetime
    action: str
    user_id: str | None
    engine_id: UUID | None
    status: str | None
    metadata: dict[str, Any]
    product_id: UUID | None = None


# --- webhooks -------------------------------------------------------------------------------------------


class Webhook(Model):
    webhook_id: UUID
    url: str
    events: list[str]
    created_at: datetime


class CreatedWebhook(Webhook):
    """The only answer that has the secret."""

    secret: str = Field(repr=False)


class WebhookList(Model):
    webhooks: list[Webhook]


class Delivery(Model):
    delivery_id: str
    seq: int
    action: str
    status: str
    attempts: int
    first_attempt_at: datetime
    last_attempt_at: datetime
    next_attempt_at: datetime | None
    response_status: int | None
    error: str | None


class DeliveryList(Model):
    deliveries: list[Delivery]


# --- products and keys ----------------------------------------------------------------------------------


class Product(Model):
    product_id: UUID
    slug: str
    display_name: str
    policy: dict[str, Any]
    engines: int


class ProductList(Model):
    products: list[Product]


class DeletedProduct(Model):
    """`status`: `deleted`, or `deleting` while its engines are still being destroyed."""

    product_id: UUID
    status: str


class RegisteredProduct(Model):
    """`platform_api_key` is shown only here."""

    product_id: UUID
    slug: str
    platform_api_key: str = Field(repr=False)


class PolicyAnswer(Model):
    policy: dict[str, Any]


class PlatformKey(Model):
    key_id: UUID
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None


class KeyList(Model):
    keys: list[PlatformKey]


class IssuedKey(Model):
    """`platform_api_key` is shown only here."""

    key_id: UUID
    platform_api_key: str = Field(repr=False)
    scopes: list[str]
    expires_at: datetime | None


class Rewrap(Model):
    """Engine keys moving to the first master key."""

    status: str
    total: int
    done: int
    remaining: int


# --- the orchestrator -----------------------------------------------------------------------------------


class Subsystem(Model):
    status: str
    detail: str


class Health(Model):
    status: str
    version: str
    subsystems: dict[str, Subsystem]
