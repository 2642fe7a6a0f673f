"""Bodies of the calls of operators: products, platform keys, the audit log, re-encryption."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, Field, StrictInt, StrictStr

from orchestrator.api.models import Answer, Request, Timestamp
from orchestrator.audit import ACTIONS

__all__ = ["BODIES"]

Scope = Literal["read", "admit", "manage"]


def _without_doubles(scopes: list[Scope]) -> list[Scope]:
    if len(set(scopes)) != len(scopes):
        raise ValueError("names a scope twice")
    return scopes


class ListedProduct(Answer):
    product_id: UUID
    slug: str
    display_name: str
    policy: dict[str, Any]
    engines: int


class ProductsAnswer(Answer):
    products: list[ListedProduct]


class DeletedProduct(Answer):
    product_id: UUID
    status: str = Field(description="`deleted`; `deleting` while engines are still being destroyed, which goes on")


class KeyRequest(Request):
    scopes: Annotated[list[Scope], Field(min_length=1), AfterValidator(_without_doubles)] = Field(
        description="`read`: GETs, without engine keys; `admit`: also engine keys, admit, keep-alive, wait; "
        "`manage`: everything",
        examples=[["admit"]],
    )
    expires_at: AwareDatetime | None = Field(None, description="with its zone; absent: never")


class RotatePlatformKeyRequest(Request):
    overlap_seconds: Annotated[StrictInt, Field(ge=0, le=86400)] = Field(
        300, description="how long the keys that it replaces stay valid"
    )


class IssuedKey(Answer):
    key_id: UUID
    platform_api_key: str = Field(description="shown only here", examples=["pk-sept-…"])
    scopes: list[str]
    expires_at: Timestamp | None


class ListedKey(Answer):
    key_id: UUID
    scopes: list[str]
    created_at: Timestamp
    expires_at: Timestamp | None
    last_used_at: Timestamp | None = Field(description="to the minute")


class KeysAnswer(Answer):
    keys: list[ListedKey]


class RevokedKey(Answer):
    key_id: UUID
    status: str = Field(examples=["revoked"])


class RewrapAnswer(Answer):
    status: str = Field(description="`idle`: keys wait for a POST; `running`; `done`: nothing is left to do")
    total: int = Field(description="stored keys")
    done: int = Field(description="of them under the current master key")
    remaining: int


class AuditEntry(Answer):
    id: int
    seq: int = Field(description="place in the product's chain, without a gap")
    timestamp: Timestamp = Field(description="when the action began")
    product_id: UUID | None = Field(None, description="only for the admin key over all products")
    user_id: str | None
    engine_id: UUID | None
    action: str
    actor: str = Field(description="`system`, `admin` or the product's slug")
    status: str | None
    metadata: dict[str, Any]
    duration_ms: int | None
    prev_hash: str
    hash: str


class AuditAnswer(Answer):
    entries: list[AuditEntry]
    next_cursor: str | None = Field(description="for the next page; null on the last one")


def _known_actions(events: list[str]) -> list[str]:
    for event in events:
        if event != "*" and event not in ACTIONS:
            raise ValueError(f"'{event[:40]}' is no action; one of {', '.join(sorted(ACTIONS))}, or * for all")
    return events


class WebhookRequest(Request):
    url: StrictStr = Field(examples=["https://hooks.example.com/engines"])
    events: Annotated[list[StrictStr], Field(max_length=100), AfterValidator(_known_actions)] = Field(
        default_factory=list, description="actions; empty or `*`: all", examples=[["provision", "health_failed"]]
    )

    def actions(self) -> list[str]:
        """The wanted actions in order, each once; empty for all."""
        return [] if "*" in self.events else sorted(set(self.events))


class Event(Answer):
    """The `data` of `/events`, and the body of a webhook."""

    seq: int
    timestamp: Timestamp
    action: str
    user_id: str | None
    engine_id: UUID | None
    status: str | None
    metadata: dict[str, Any]
    product_id: UUID | None = Field(None, description="only for the admin key over all products")


class ListedWebhook(Answer):
    webhook_id: UUID
    url: str
    events: list[str] = Field(description="empty: all")
    created_at: Timestamp


class CreatedWebhook(ListedWebhook):
    secret: str = Field(description="shown only here", examples=["whsec-sept-…"])


class WebhooksAnswer(Answer):
    webhooks: list[ListedWebhook]


class DeletedWebhook(Answer):
    webhook_id: UUID
    status: str = Field(examples=["deleted"])


class Delivery(Answer):
    delivery_id: str = Field(description="the `X-Orchestrator-Delivery` of every attempt")
    seq: int = Field(description="of the event")
    action: str
    status: str = Field(description="`delivered`; `pending`: is tried again; `parked`: given up after a day")
    attempts: int
    first_attempt_at: Timestamp
    last_attempt_at: Timestamp
    next_attempt_at: Timestamp | None
    response_status: int | None = Field(description="of the last answer; null when there was none")
    error: str | None


class DeliveriesAnswer(Answer):
    deliveries: list[Delivery]


BODIES = (KeyRequest, RotatePlatformKeyRequest, WebhookRequest, Event)
