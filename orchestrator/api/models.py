"""Bodies of requests and answers, as documented and as checked."""

from __future__ import annotations

import re
import unicodedata
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, StrictBool, StrictInt, StrictStr

from orchestrator.policy import Policy

__all__ = ["user_id_problem"]

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def user_id_problem(user_id: str) -> str | None:
    """What is wrong with a user id; None when it is valid."""
    if not 1 <= len(user_id) <= 256:
        return "must have 1 to 256 characters"
    if user_id in (".", ".."):
        return "must not be '.' or '..'"
    if "/" in user_id:
        return "must not contain '/'"
    if not user_id.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in user_id):
        return "must not contain control characters"
    return None


def _valid_user_id(value: str) -> str:
    if (problem := user_id_problem(value)) is not None:
        raise ValueError(problem)
    return value


def _valid_slug(value: str) -> str:
    if not _SLUG.fullmatch(value):
        raise ValueError("must match ^[a-z0-9][a-z0-9-]{0,62}$")
    return value


def _printable(value: str) -> str:
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise ValueError("must not contain control characters")
    return value


def timestamp(value: datetime) -> str:
    """UTC with milliseconds, as `2026-04-27T12:34:56.000Z`."""
    return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")


UserId = Annotated[StrictStr, AfterValidator(_valid_user_id)]
Timestamp = Annotated[datetime, PlainSerializer(timestamp, return_type=str)]
Image = Annotated[StrictStr, Field(min_length=1, max_length=512), AfterValidator(_printable)]


class Answer(BaseModel):
    """What is answered; its schema is made when it is first needed, so that the server starts sooner."""

    model_config = ConfigDict(defer_build=True)


class Request(BaseModel):
    """Unknown fields are invalid."""

    model_config = ConfigDict(extra="forbid", defer_build=True)


class NoBody(Request):
    pass


class ProvisionRequest(Request):
    user_id: UserId = Field(description="unique within the product", examples=["demo-user-001"])
    engine_version: Image | None = Field(
        None, description="image of this engine; default: the product's, else ORCH_ENGINE_IMAGE"
    )


class AdmitRequest(Request):
    auto_provision: StrictBool = Field(False, description="make the engine when there is none")
    auto_wake: StrictBool = Field(False, description="wake a sleeping engine, restart a failed one")


class RotateKeyRequest(Request):
    overlap_seconds: Annotated[StrictInt, Field(ge=0, le=86400)] = Field(
        300, description="how long the old key stays valid beside the new one"
    )


class KeepAliveRequest(Request):
    seconds: Annotated[StrictInt, Field(ge=0, le=86400)] = Field(description="from now; 0 ends it")


class RegisterRequest(Request):
    slug: Annotated[StrictStr, AfterValidator(_valid_slug)] = Field(examples=["demo"])
    display_name: Annotated[StrictStr, Field(min_length=1, max_length=256), AfterValidator(_printable)] = Field(
        examples=["Demo"]
    )
    policy: Policy = Field(default_factory=Policy, description="`{}` sets no limits")


class PolicyRequest(Request):
    policy: Policy


class ProvisionAnswer(Answer):
    engine_id: UUID
    user_id: str
    status: str = Field(examples=["running"])
    url: str | None = Field(examples=["http://127.0.0.1:9001"])
    api_key: str | None = Field(None, description="absent for the admin key", examples=["sk-sept-…"])


class EngineAnswer(Answer):
    engine_id: UUID
    user_id: str
    status: str = Field(examples=["running"])
    url: str | None = Field(description="may be set when the engine is not running", examples=["http://127.0.0.1:9001"])
    api_key: str | None = Field(
        None, description="null for the scope `read`, absent for the admin key", examples=["sk-sept-…"]
    )
    engine_version: str = Field(examples=["september-engine:2.3.0"])
    created_at: Timestamp
    last_health_at: Timestamp | None


class AdmitAnswer(Answer):
    admitted: bool
    engine: EngineAnswer | None
    reason: str | None = Field(
        None,
        description="only when refused: `engine_not_found`, `engine_sleeping`, `engine_unhealthy`, `engine_stopped`, "
        "`engine_provisioning`, `engine_destroying`",
    )


class ListedEngine(Answer):
    engine_id: UUID
    user_id: str
    status: str
    url: str | None
    engine_version: str
    created_at: Timestamp
    last_health_at: Timestamp | None
    product_id: UUID | None = Field(None, description="only for the admin key over all products")


class ListAnswer(Answer):
    engines: list[ListedEngine]
    total: int = Field(description="of all pages")


class StartAnswer(Answer):
    status: str = Field(examples=["running"])
    url: str | None


class StatusAnswer(Answer):
    status: str
    engine_id: UUID


class RotateKeyAnswer(Answer):
    engine_id: UUID
    api_key: str | None = Field(None, description="absent for the admin key", examples=["sk-sept-…"])
    overlap_seconds: int = Field(description="how long the old key stays valid; 0 where nothing of the engine runs")
    restarted: bool = Field(description="the engine could not take the key while it ran and was created again")


class TimelinePhase(Answer):
    name: str = Field(examples=["pull"])
    started_at: Timestamp
    duration_ms: int | None = Field(description="null while it lasts")


class TimelineAnswer(Answer):
    engine_id: UUID
    operation: str | None = Field(description="under way, or the last one", examples=["provision"])
    status: str = Field(description="of the engine", examples=["provisioning"])
    started_at: Timestamp | None
    duration_ms: int | None = Field(description="so far, or of the whole")
    phases: list[TimelinePhase]
    stalled_on: str | None = Field(
        description="the phase that it is in, or that it failed in; null when it went well", examples=["pull"]
    )
    last_log: str | None = Field(description="progress of a pull, else the last line of the engine's log")


class KeepAliveAnswer(Answer):
    engine_id: UUID
    keep_alive_until: Timestamp | None


class LogEntry(Answer):
    timestamp: Timestamp | None = Field(description="null where the line does not tell and the backend does not know")
    stream: str = Field(description="`stdout` or `stderr`; a backend that does not tell them apart says `stdout`")
    line: str


class LogsAnswer(Answer):
    lines: list[LogEntry]


class ProductFleet(Answer):
    product_id: UUID
    total: int
    by_status: dict[str, int]


class Restarts(Answer):
    pending: int = Field(description="failed engines that are restarted when their back-off is over")
    parked: int = Field(description="failed engines whose restart waits for the end of an outage")
    gave_up: int = Field(description="failed engines that wait for `recover`, `start` or `admit`")


class FleetAnswer(Answer):
    total: int
    by_status: dict[str, int]
    health: str = Field(description="`ok`: none failed; `critical`: at least 25 % failed; else `degraded`")
    unhealthy_count: int
    restarts: Restarts
    products: list[ProductFleet] | None = Field(None, description="only for the admin key over all products")


class Percentiles(Answer):
    p50: float | None
    p95: float | None
    p99: float | None


class MetricsAnswer(Answer):
    provisions_1h: int
    crashes_1h: int
    restarts_1h: int
    avg_boot_ms: int | None = Field(description="over the last 100 provisions; null before the first one")
    boot_ms: Percentiles
    total_provisions: int
    total_destroys: int


class RegisterAnswer(Answer):
    product_id: UUID
    slug: str
    platform_api_key: str = Field(description="shown only here", examples=["pk-sept-…"])


class PolicyAnswer(Answer):
    policy: dict[str, Any]


class Subsystem(Answer):
    status: str = Field(examples=["ok"])
    detail: str


class HealthAnswer(Answer):
    status: str = Field(examples=["ok"])
    version: str
    subsystems: dict[str, Subsystem]
