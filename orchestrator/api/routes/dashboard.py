"""The dashboard: its page, its files, and the questions that only it asks.

The page needs no key; every question needs the admin key. What the page does beyond asking goes through the public
API. These questions follow the page, not a promise to callers, so they are not in the OpenAPI document.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator import __version__
from orchestrator.api.auth import plane_of, require_admin
from orchestrator.api.http import dumps
from orchestrator.api.models import timestamp
from orchestrator.errors import InvalidRequest, NotFound
from orchestrator.lifecycle import State
from orchestrator.registry.dashboard import SORTS
from orchestrator.registry.rows import engine_url

if TYPE_CHECKING:
    from datetime import datetime
    from importlib.resources.abc import Traversable

    import asyncpg

router = APIRouter(include_in_schema=False)

STATES: Final = tuple(state.value for state in State)
STEPS: Final = 120
MAX_HOURS: Final = 24 * 31
AUDIT_PAGE: Final = 200

TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

# Nothing but this page's own files runs or is loaded; nobody frames it; no text becomes markup or code.
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Name → content, type and tag of every file that the page may ask for."""
    found: dict[str, tuple[bytes, str, str]] = {}

    def add(directory: Traversable, prefix: str) -> None:
        for entry in directory.iterdir():
            name = prefix + entry.name
            if entry.is_dir():
                add(entry, name + "/")
            elif (kind := TYPES.get(name[name.rfind(".") :])) is not None:
                content = entry.read_bytes()
                found[name] = content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    add(importlib.resources.files("orchestrator") / "dashboard", "")
    return found


def _file(request: Request, name: str) -> Response:
    if name not in _files():
        raise NotFound(f"No such path: {request.url.path[:200]}")
    content, kind, tag = _files()[name]
    headers = {**HEADERS, "ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


@router.get("/dashboard")
async def page(request: Request) -> Response:
    return _file(request, "index.html")


@router.get("/dashboard/assets/{name:path}")
async def asset(request: Request) -> Response:
    return _file(request, request.path_params["name"])


# --- questions -----------------------------------------------------------------------------------------------


@router.get("/dashboard/data/fleet")
async def fleet(request: Request) -> Response:
    """The fleet now, and over the last `hours` in steps of equal length."""
    require_admin(request)
    product_id = _product_id(request)
    hours = _integer(request, "hours", 24, 1, MAX_HOURS)
    plane = plane_of(request)
    questions = plane.registry.dashboard
    now = await questions.now()
    step_s = hours * 3600 / STEPS
    since = now - timedelta(hours=hours)
    counts = dict.fromkeys(STATES, 0)
    for row in await plane.registry.fleet.by_status(product_id):
        counts[row["status"]] += row["engines"]
    metrics = await plane.registry.fleet.metrics(product_id)
    p50, p95, p99 = metrics["boot_ms"] or (None, None, None)
    return _answer(
        {
            "version": __version__,
            "deployment": plane.settings.deployment_id or str(plane.deployment_id),
            "backend": plane.settings.engine_backend,
            "now": timestamp(now),
            "total": sum(counts.values()),
            "by_status": counts,
            "provisions_1h": metrics["provisions"],
            "crashes_1h": metrics["crashes"],
            "restarts_1h": metrics["restarts"],
            "boot_ms": {"p50": p50, "p95": p95, "p99": p99},
            "products": _products(await questions.products()),
            "history": {
                "step_s": step_s,
                "times": [since.timestamp() + step_s * (step + 1) for step in range(STEPS)],
                "states": _states(await questions.states(product_id, since, step_s), counts),
                "series": _series(await questions.series(product_id, since, step_s)),
            },
        }
    )


def _states(rows: list[asyncpg.Record], now: dict[str, int]) -> dict[str, list[int]]:
    """How many engines were in each state at the end of each step: from the present backwards."""
    present = dict.fromkeys(STATES, 0)
    changes: dict[int, dict[str, int]] = {}
    for row in rows:
        if row["state"] not in present:
            continue  # `destroyed` is no state of an engine that there is
        if row["step"] is None:
            present[row["state"]] += row["change"]
        else:
            # A row that was written while we asked belongs to the last step.
            changes.setdefault(min(row["step"], STEPS - 1), {})[row["state"]] = row["change"]
    history: dict[str, list[int]] = {state: [0] * STEPS for state in STATES}
    for step in reversed(range(STEPS)):
        for state in STATES:
            history[state][step] = max(0, present[state])
            present[state] -= changes.get(step, {}).get(state, 0)
    for state in STATES:
        history[state][-1] = now[state]
    return history


def _series(rows: list[asyncpg.Record]) -> dict[str, list[Any]]:
    counts = ("provisions", "wakes", "failures", "restarts", "gave_up", "rate_limited", "refused")
    series: dict[str, list[Any]] = {name: [0] * STEPS for name in counts}
    for name in ("boot_p50_ms", "boot_p95_ms", "wake_p50_ms", "wake_p95_ms"):
        series[name] = [None] * STEPS
    for row in rows:
        step = min(row["step"], STEPS - 1)
        for name in counts:
            series[name][step] += row[name]
        for name in ("boot", "wake"):
            if row[f"{name}_ms"] is not None:
                series[f"{name}_p50_ms"][step], series[f"{name}_p95_ms"][step] = row[f"{name}_ms"]
    return series


@router.get("/dashboard/data/engines")
async def engines(request: Request) -> Response:
    """One page of the engines that `search`, `status` and `product_id` leave."""
    require_admin(request)
    query = request.query_params
    search = query.get("search", "").strip()
    if len(search) > 256 or "\x00" in search:
        raise InvalidRequest("search", "at most 256 characters, none of them NUL")
    status = query.get("status") or None
    if status is not None and status not in STATES:
        raise InvalidRequest("status", f"one of {', '.join(STATES)}")
    sort = query.get("sort") or SORTS[0]
    if sort not in SORTS:
        raise InvalidRequest("sort", f"one of {', '.join(SORTS)}")
    limit = _integer(request, "limit", 100, 1, 1000)
    offset = _integer(request, "offset", 0, 0, 2**31 - 1)
    rows, found = await plane_of(request).registry.dashboard.engines(
        _product_id(request), search, status, sort, limit, offset
    )
    by_status = dict.fromkeys(STATES, 0) | found
    return _answer(
        {
            "engines": [
                {
                    "engine_id": str(row["id"]),
                    "product_id": str(row["product_id"]),
                    "product": row["slug"],
                    "user_id": row["user_id"],
                    "status": row["status"],
                    "url": engine_url(row["host"], row["endpoint_port"]),
                    "engine_version": row["engine_version"],
                    "created_at": timestamp(row["created_at"]),
                    "last_health_at": _time(row["last_health_at"]),
                    "operation": row["operation"],
                    "restart_attempt": row["restart_attempt"],
                    "error_code": row["error_code"],
                }
                for row in rows
            ],
            "total": sum(by_status.values()) if status is None else by_status[status],
            "by_status": by_status,
        }
    )


@router.get("/dashboard/data/products")
async def products(request: Request) -> Response:
    """What a filter by product needs."""
    require_admin(request)
    return _answer({"products": _products(await plane_of(request).registry.dashboard.products())})


def _products(rows: list[asyncpg.Record]) -> list[dict[str, Any]]:
    return [
        {
            "product_id": str(row["id"]),
            "slug": row["slug"],
            "display_name": row["display_name"],
            "engines": row["engines"],
        }
        for row in rows
    ]


@router.get("/dashboard/data/engines/{engine_id}")
async def engine(request: Request) -> Response:
    """One engine with the newest part of its audit; `before` (an id) gives only the part before that row."""
    require_admin(request)
    text: str = request.path_params["engine_id"]
    try:
        engine_id = UUID(text)
    except ValueError:
        raise NotFound(f"No engine has the id '{text[:100]}'.") from None
    before = _integer(request, "before", 0, 0, 2**53) or None
    questions = plane_of(request).registry.dashboard
    row = await questions.engine(engine_id)
    described: dict[str, Any]
    if row is not None:
        described = _described(row)
    elif (tombstone := await questions.tombstone(engine_id)) is not None:
        described = {
            "engine_id": text,
            "product_id": str(tombstone["product_id"]),
            "product": tombstone["slug"],
            "user_id": tombstone["user_id"],
            "status": "destroyed",
            "destroyed_at": timestamp(tombstone["destroyed_at"]),
        }
    else:
        raise NotFound(f"No engine has the id '{text}'.")
    rows = await questions.audit(engine_id, before, AUDIT_PAGE + 1)
    audit = [
        {
            "id": entry["id"],
            "seq": entry["seq"],
            "timestamp": timestamp(entry["timestamp"]),
            "action": entry["action"],
            "actor": entry["actor"],
            "status": entry["status"],
            "metadata": entry["metadata"],
            "duration_ms": entry["duration_ms"],
        }
        for entry in rows[:AUDIT_PAGE]
    ]
    return _answer({"engine": described, "audit": audit, "has_more": len(rows) > AUDIT_PAGE})


_PLAIN = ("user_id", "status", "engine_version", "image_id", "container_id", "incarnation", "operation", "wish",
          "last_error", "key_generation", "applied_generation", "consecutive_failures", "restart_attempt",
          "boot_duration_ms", "port")  # fmt: skip
_TIMES = ("created_at", "operation_started_at", "deadline_at", "first_healthy_at", "running_since", "last_health_at",
          "next_probe_at", "next_restart_at", "restart_parked_until", "slept_at", "keep_alive_until",
          "last_admit_at")  # fmt: skip


def _described(row: asyncpg.Record) -> dict[str, Any]:
    return {
        "engine_id": str(row["id"]),
        "product_id": str(row["product_id"]),
        "product": row["slug"],
        "url": engine_url(row["host"], row["endpoint_port"]),
        **{name: row[name] for name in _PLAIN},
        **{name: _time(row[name]) for name in _TIMES},
    }


def _answer(body: dict[str, Any]) -> Response:
    return Response(dumps(body), media_type="application/json", headers={"Cache-Control": "no-store"})


def _time(value: datetime | None) -> str | None:
    return None if value is None else timestamp(value)


def _product_id(request: Request) -> UUID | None:
    text = request.query_params.get("product_id")
    if not text:
        return None
    try:
        return UUID(text)
    except ValueError:
        raise InvalidRequest("product_id", "a UUID") from None


def _integer(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16) or not low <= int(text) <= high:
        raise InvalidRequest(name, f"an integer from {low} to {high}")
    return int(text)
