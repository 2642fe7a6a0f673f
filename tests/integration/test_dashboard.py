"""The dashboard as served: its files and headers, and what its questions answer."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

import orchestrator
from tests.integration.checks import code_of, database, put_engine
from tests.integration.steps import until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Served

FILES = Path(orchestrator.__file__).parent / "dashboard"
SVG = "http://www.w3.org/2000/svg"
QUESTIONS = ("fleet", "engines", "products", "engines/0a8f1f4e-98b8-4a35-9d3c-0e8f5f5a4c11")


# --- the page ----------------------------------------------------------------------------------------------------


async def test_page_and_every_file_need_no_key_and_nothing_from_elsewhere(served: Served) -> None:
    anybody = served.deployment.api(served.url, {}).client
    names = [
        path.relative_to(FILES).as_posix() for path in FILES.rglob("*.*") if path.suffix in (".js", ".css", ".svg")
    ]
    assert len(names) > 10
    for path in ("/dashboard", *(f"/dashboard/assets/{name}" for name in names)):
        response = await anybody.get(path)
        assert response.status_code == 200, path
        policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert set(policy.values()) <= {"'none'", "'self'", "'script'"}, "nothing is loaded from elsewhere"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["referrer-policy"] == "no-referrer"
        if "vendor" not in path:
            elsewhere = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", response.text.replace(SVG, ""))
            assert not elsewhere, (path, elsewhere)
            assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", response.text), path
            assert "localStorage" not in response.text, "the key must not be stored"
    page = (await anybody.get("/dashboard")).text
    for asset in re.findall(r"(?:src|href)=\"(dashboard/[^\"]+)\"", page):
        assert (await anybody.get(f"/{asset}")).status_code == 200
    assert not re.search(r"<script(?![^>]*src)|<style|\son\w+=|style=", page), "inline code is refused by the policy"


async def test_a_file_is_sent_again_only_when_it_changed(served: Served) -> None:
    anybody = served.deployment.api(served.url, {}).client
    first = await anybody.get("/dashboard/assets/app.js")
    again = await anybody.get("/dashboard/assets/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["nothing.js", "../api/app.py", "%2e%2e/api/app.py", "vendor/README.md", "vendor", "pages/", ""]
)
async def test_only_the_page_s_own_files_are_served(served: Served, path: str) -> None:
    anybody = served.deployment.api(served.url, {})
    assert code_of(await anybody.get(f"/dashboard/assets/{path}")) == (404, "NOT_FOUND")


def test_third_party_files_are_as_published() -> None:
    listed = (FILES / "vendor/README.md").read_text()
    files = [path for path in (FILES / "vendor").rglob("*") if path.suffix in (".js", ".css")]
    assert files
    for path in files:
        name = path.relative_to(FILES / "vendor").as_posix()
        assert f"`{name}`" in listed
        assert hashlib.sha256(path.read_bytes()).hexdigest() in listed
        assert (path.parent / "LICENSE").is_file()


# --- its questions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
async def test_questions_need_the_admin_key(served: Served, api: Api, question: str) -> None:
    assert code_of(await api.get(f"/dashboard/data/{question}")) == (401, "INVALID_ADMIN_KEY")
    wrong = served.deployment.api(served.url, {"X-Admin-Key": "wrong"})
    assert code_of(await wrong.get(f"/dashboard/data/{question}")) == (401, "INVALID_ADMIN_KEY")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("engines?status=odd", "status"),
        ("engines?sort=password", "sort"),
        ("engines?limit=0", "limit"),
        ("engines?limit=1001", "limit"),
        ("engines?offset=-1", "offset"),
        ("engines?product_id=x", "product_id"),
        (f"engines?search={'a' * 257}", "search"),
        ("engines?search=%00", "search"),
        ("fleet?hours=0", "hours"),
        ("fleet?hours=100000", "hours"),
        ("fleet?product_id=x", "product_id"),
    ],
)
async def test_bad_questions_name_the_field(admin: Api, query: str, field: str) -> None:
    status, body = await admin.get(f"/dashboard/data/{query}")
    assert (status, body["error"]["code"]) == (400, "INVALID_REQUEST")
    assert field in body["error"]["message"]


async def users(admin: Api, query: str) -> list[str]:
    status, body = await admin.get(f"/dashboard/data/engines?{query}")
    assert status == 200, body
    return [engine["user_id"] for engine in body["engines"]]


async def test_search_filters_sorts_and_pages(served: Served, api: Api, admin: Api) -> None:
    product_id = str(api.headers["product_id"])
    other = await served.deployment.product(served.url, "other")
    ids = {
        name: await put_engine(served, product_id, name, state, **columns)
        for name, state, columns in (
            ("Ann.Smith@example.org", "running", {}),
            ("bob_50%", "sleeping", {"engine_version": "special:9"}),
            ("cid", "failed", {"last_error": {"code": "BOOT_TIMEOUT", "message": "slow"}}),
            ("dora", "provisioning", {}),
        )
    }
    await put_engine(served, str(other.headers["product_id"]), "ann", "running")

    assert set(await users(admin, "search=ANN")) == {"Ann.Smith@example.org", "ann"}
    assert await users(admin, "search=%25") == ["bob_50%"], "no character is a pattern"
    assert await users(admin, "search=_") == ["bob_50%"]
    assert await users(admin, "search=special") == ["bob_50%"]
    digits = ids["cid"].hex
    for search in (digits[:8], digits, str(ids["cid"]), f"engine-{digits[:12]}", digits[:8].upper()):
        assert await users(admin, f"search={search}") == ["cid"]
    assert await users(admin, "status=failed") == ["cid"]
    assert await users(admin, f"search=ann&product_id={product_id}") == ["Ann.Smith@example.org"]
    assert await users(admin, "search=nothing-like-this") == []
    by_user = await users(admin, "sort=user_id")
    assert by_user == list(reversed(await users(admin, "sort=-user_id")))
    assert await users(admin, "sort=user_id&limit=2&offset=2") == by_user[2:4]

    _, body = await admin.get("/dashboard/data/engines?search=ann&status=running&limit=1")
    assert body["total"] == 2
    assert body["by_status"]["running"] == 2
    assert sum(body["by_status"].values()) == 2
    _, body = await admin.get("/dashboard/data/engines?status=failed")
    assert body["total"] == 1
    assert sum(body["by_status"].values()) == 5, "the other filters say what they would find"
    assert body["engines"][0]["error_code"] == "BOOT_TIMEOUT"
    assert body["engines"][0]["product"] == "acme"
    assert "api_key" not in str(body)


@pytest.mark.parametrize("sort", ["created_at", "-created_at", "status", "-status", "product", "last_health_at"])
async def test_every_order_gives_everything(served: Served, api: Api, admin: Api, sort: str) -> None:
    for number in range(4):
        await put_engine(served, str(api.headers["product_id"]), f"user-{number}", "running")
    pages = [await users(admin, f"sort={sort}&limit=2&offset={offset}") for offset in (0, 2)]
    assert sorted(pages[0] + pages[1]) == [f"user-{number}" for number in range(4)]


async def test_one_engine_with_its_story(served: Served, api: Api, admin: Api) -> None:
    engine = await api.provision("ann")
    await api.post("/engines/ann/sleep")
    path = f"/dashboard/data/engines/{engine['engine_id']}"

    async def told(*actions: str) -> None:
        async def is_so() -> bool:
            status, body = await admin.get(path)
            assert status == 200
            return [row["action"] for row in body["audit"]] == list(actions)

        await until(is_so, 60)

    await told("sleep", "provision")
    _, body = await admin.get(path)
    assert body["engine"]["status"] == "sleeping"
    assert body["engine"]["user_id"] == "ann"
    assert body["engine"]["product"] == "acme"
    assert body["engine"]["url"] == engine["url"]
    assert body["engine"]["slept_at"] is not None
    assert engine["api_key"] not in str(body)
    assert "key_enc" not in str(body)
    assert body["has_more"] is False
    older = f"{path}?before={body['audit'][0]['id']}"
    _, before = await admin.get(older)
    assert [row["action"] for row in before["audit"]] == ["provision"]

    await api.call("DELETE", "/engines/ann")
    await told("destroy", "sleep", "provision")
    _, body = await admin.get(path)
    assert body["engine"]["status"] == "destroyed"
    assert body["engine"]["destroyed_at"]
    for unknown in (str(uuid4()), "nonsense"):
        assert code_of(await admin.get(f"/dashboard/data/engines/{unknown}")) == (404, "NOT_FOUND")


# --- the past ------------------------------------------------------------------------------------------------------

AUDIT = """
INSERT INTO audit_log (product_id, user_id, engine_id, timestamp, action, status, metadata, duration_ms)
VALUES ($1, $2, $3, now() - $4 * interval '1 minute', $5, $6, $7, $8)
"""


async def test_history_follows_from_the_audit(served: Served, api: Api, admin: Api) -> None:
    product_id = UUID(str(api.headers["product_id"]))
    always = await put_engine(served, str(product_id), "always", "running")
    failed = await put_engine(served, str(product_id), "failed", "failed")
    under_way = await put_engine(served, str(product_id), "under-way", "provisioning")
    gone = uuid4()
    rows: list[tuple[str, UUID, float, str, str | None, dict[str, Any], int | None]] = [
        ("always", always, 300, "provision", "running", {"boot_ms": 100, "cold": True}, 120),
        ("failed", failed, 100, "provision", "running", {"boot_ms": 400, "cold": True}, 420),
        ("failed", failed, 50, "sleep", "sleeping", {}, 10),
        ("failed", failed, 40, "wake", "running", {"boot_ms": 3, "cold": False}, 7),
        ("failed", failed, 20, "health_failed", "failed", {}, None),
        ("failed", failed, 19, "auto_restart_start", "provisioning", {}, None),
        ("failed", failed, 18, "auto_restart_failed", "failed", {}, None),
        ("under-way", under_way, 200, "provision", "running", {"boot_ms": 600, "cold": True}, 620),
        ("under-way", under_way, 45, "stop", "stopped", {}, 100),
        ("gone", gone, 400, "provision", "running", {"boot_ms": 100}, 100),
        ("gone", gone, 30, "destroy", "destroyed", {}, 50),
    ]
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        for user, engine_id, minutes, action, status, metadata, ms in rows:
            await connection.execute(AUDIT, product_id, user, engine_id, minutes, action, status, metadata, ms)
        for reason, minutes, count in (("RATE_LIMITED", 10, 7), ("engine_sleeping", 10, 3), ("RATE_LIMITED", 400, 9)):
            await connection.execute(
                AUDIT, product_id, "ann", None, minutes, "admit_denied", None, {"reason": reason, "count": count}, None
            )
        await connection.execute(
            "INSERT INTO admit_denials VALUES ($1, 'ann', 'RATE_LIMITED', date_trunc('minute', now()), 5)", product_id
        )

    answered, body = await admin.get(f"/dashboard/data/fleet?hours=2&product_id={product_id}")
    assert answered == 200
    states, series = body["history"]["states"], body["history"]["series"]
    assert body["history"]["step_s"] == 60

    def at(minutes: int) -> dict[str, int]:
        """The counts that many minutes ago, at the end of the step that ends half a minute later."""
        return {state: counts[-minutes] for state, counts in states.items() if counts[-minutes]}

    assert at(110) == {"running": 3}  # always, under-way, gone
    assert at(60) == {"running": 4}
    assert at(47) == {"running": 3, "sleeping": 1}
    assert at(42) == {"running": 2, "sleeping": 1, "stopped": 1}
    assert at(35) == {"running": 3, "stopped": 1}
    assert at(25) == {"running": 2, "stopped": 1}
    assert at(10) == {"running": 1, "stopped": 1, "failed": 1}
    assert at(1) == {"running": 1, "provisioning": 1, "failed": 1} == {k: v for k, v in body["by_status"].items() if v}
    assert sum(series["failures"]) == 1
    assert sum(series["restarts"]) == 1
    assert sum(series["rate_limited"]) == 12
    assert sum(series["refused"]) == 3
    assert [value for value in series["wake_p50_ms"] if value is not None] == [7]
    assert [value for value in series["boot_p95_ms"] if value is not None] == [400]
    assert len(body["history"]["times"]) == len(series["boot_p50_ms"]) == len(states["running"]) == 120

    _, other = await admin.get(f"/dashboard/data/fleet?product_id={uuid4()}")
    assert other["total"] == 0
    assert not any(any(counts) for counts in other["history"]["states"].values())
    _, everything = await admin.get("/dashboard/data/fleet")
    assert everything["total"] == 3
    assert [product["slug"] for product in everything["products"]] == ["acme"]
