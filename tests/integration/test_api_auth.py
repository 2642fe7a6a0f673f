"""Who may call what: platform keys with their scopes, admin keys, and revocation that works at once."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from orchestrator.keys import sha256_hex
from tests.integration.checks import code_of, database, put_engine, put_key
from tests.integration.conftest import ADMIN_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.conftest import Api, Served

SECOND_ADMIN_KEY = "another-admin-key"

# Every product call: method, path, body, the scope that it needs.
CALLS: tuple[tuple[str, str, Any, str], ...] = (
    ("GET", "/engines", None, "read"),
    ("GET", "/status", None, "read"),
    ("GET", "/metrics", None, "read"),
    ("GET", "/engines/ann", None, "read"),
    ("GET", "/engines/ann/wait?status=running", None, "admit"),
    ("POST", "/engines/ann/admit", {"auto_wake": True}, "admit"),
    ("POST", "/engines/ann/keep-alive", {"seconds": 1}, "admit"),
    ("POST", "/engines/ann/rotate-key", None, "manage"),
    ("POST", "/engines/ann/recover", None, "manage"),
    ("POST", "/engines/ann/sleep", None, "manage"),
    ("POST", "/engines/ann/start", None, "manage"),
    ("POST", "/engines/ann/stop", None, "manage"),
    ("POST", "/engines/provision", {"user_id": "ann"}, "manage"),
    ("DELETE", "/engines/ann", None, "manage"),
)
HOLDS = {"read": {"read"}, "admit": {"read", "admit"}, "manage": {"read", "admit", "manage"}}


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {"ORCH_ADMIN_KEY": f"{ADMIN_KEY}, {SECOND_ADMIN_KEY}"}


@asynccontextmanager
async def connection_to(served: Served) -> AsyncIterator[Any]:
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        yield connection


def fields(value: Any) -> set[str]:
    """The names of all fields, however deep."""
    if isinstance(value, dict):
        return set(value).union(*(fields(inner) for inner in value.values()))
    if isinstance(value, list):
        return set().union(*(fields(inner) for inner in value))
    return set()


# --- scopes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", HOLDS)
async def test_scopes(served: Served, api: Api, scope: str) -> None:
    engine = await api.provision("ann")
    key = await put_key(served, api.headers["product_id"], scope)
    holder = served.deployment.api(served.url, {"X-Platform-Key": key})
    for method, path, body, needed in CALLS:
        status, answer = await holder.call(method, path, body)
        if needed in HOLDS[scope]:
            assert status != 403, (path, answer)
            assert status in (200, 409), (path, answer)
        else:
            assert code_of((status, answer)) == (403, "POLICY_DENIED"), path
            assert answer["error"]["details"] == {"required_scope": needed}
    if scope == "read":
        assert (await holder.get("/engines/ann"))[1]["api_key"] is None
    if scope == "admit":
        assert (await holder.get("/engines/ann"))[1]["api_key"] == engine["api_key"]
        assert (await holder.get("/engines/ann/wait?status=running"))[1]["api_key"] == engine["api_key"]


async def test_a_key_without_any_scope(served: Served, api: Api) -> None:
    key = await put_key(served, api.headers["product_id"])
    holder = served.deployment.api(served.url, {"X-Platform-Key": key})
    for method, path, body, needed in CALLS:
        answer = await holder.call(method, path, body)
        assert code_of(answer) == (403, "POLICY_DENIED")
        assert answer[1]["error"]["details"] == {"required_scope": needed}


async def test_a_call_without_scope_does_not_count(served: Served) -> None:
    api = await served.deployment.product(served.url, policy={"rate_limit_rpm": 3})
    key = await put_key(served, api.headers["product_id"], "read")
    holder = served.deployment.api(served.url, {"X-Platform-Key": key})
    for _ in range(2):
        assert code_of(await holder.post("/engines/ann/admit")) == (403, "POLICY_DENIED")
        assert (await api.post("/engines/ann/admit"))[0] == 200
    async with connection_to(served) as connection:
        assert await connection.fetchval("SELECT count(*) FROM rate_slots WHERE free_at > now()") == 2


# --- keys ---------------------------------------------------------------------------------------------------


async def test_keys_that_are_none(served: Served, api: Api, admin: Api) -> None:
    right = api.client.headers["x-platform-key"]
    anybody = served.deployment.api(served.url, {})
    wrong = (
        None,
        "",
        "x",
        right[:-1],
        right + "x",
        right.swapcase(),
        sha256_hex(right),
        ADMIN_KEY,
        "\xff\xfe",
        "a" * 9000,
    )
    for key in wrong:
        headers = {} if key is None else {"X-Platform-Key": key.encode("latin-1")}
        for method, path, body, _ in CALLS:
            answer = await anybody.call(method, path, body, headers=headers)
            assert code_of(answer) == (401, "INVALID_PLATFORM_KEY"), (key, path)
    product = admin.headers.get("product_id") or api.headers["product_id"]
    for key in (None, "", "x", ADMIN_KEY[:-1], ADMIN_KEY + "x", f"{ADMIN_KEY}, {SECOND_ADMIN_KEY}", right, "\xff"):
        headers = {} if key is None else {"X-Admin-Key": key.encode("latin-1")}
        for method, path in (("POST", "/products/register"), ("PUT", f"/products/{product}/policy")):
            answer = await anybody.call(method, path, {}, headers=headers)
            assert code_of(answer) == (401, "INVALID_ADMIN_KEY"), key
        if key is not None:
            headers["X-Product-Id"] = product.encode()
            for method, path, body, _ in CALLS:
                answer = await anybody.call(method, path, body, headers=headers)
                assert code_of(answer) == (401, "INVALID_ADMIN_KEY"), (key, path)
    assert code_of(await api.post("/products/register", {})) == (401, "INVALID_ADMIN_KEY")


async def test_expiry(served: Served, api: Api) -> None:
    product = api.headers["product_id"]
    valid = await put_key(served, product, "manage", expires_in_s=600)
    expired = await put_key(served, product, "manage", expires_in_s=-0.001)
    for key, expected in ((valid, 200), (expired, 401)):
        holder = served.deployment.api(served.url, {"X-Platform-Key": key})
        assert (await holder.get("/engines"))[0] == expected
        assert (await holder.post("/engines/ann/admit"))[0] == expected


@pytest.mark.parametrize("policy", [{}, {"rate_limit_rpm": 600}, {"rate_limit_rpm": 6000}])
async def test_revocation_is_immediate(served: Served, policy: dict[str, Any]) -> None:
    api = await served.deployment.product(served.url, policy=policy)
    other = await put_key(served, api.headers["product_id"], "admit")
    holder = served.deployment.api(served.url, {"X-Platform-Key": other})
    for _ in range(3):
        assert (await holder.post("/engines/ann/admit"))[0] == 200
    async with connection_to(served) as connection:
        await connection.execute("DELETE FROM platform_keys WHERE key_hash = $1", sha256_hex(other))
        assert code_of(await holder.post("/engines/ann/admit")) == (401, "INVALID_PLATFORM_KEY")
        assert code_of(await holder.get("/engines/ann")) == (401, "INVALID_PLATFORM_KEY")
        assert (await api.post("/engines/ann/admit"))[0] == 200, "the product's other key goes on"
        await connection.execute("UPDATE platform_keys SET scopes = '{read}'")
    assert code_of(await api.post("/engines/ann/admit")) == (403, "POLICY_DENIED")


async def test_only_a_hash_is_stored_and_use_is_noted(served: Served, api: Api) -> None:
    key = api.client.headers["x-platform-key"]
    await api.get("/engines")
    await served.plane.activity.flush()
    async with connection_to(served) as connection:
        row = await connection.fetchrow("SELECT * FROM platform_keys")
    assert row["key_hash"] == sha256_hex(key)
    assert row["scopes"] == ["manage"]
    assert row["last_used_at"] is not None
    assert key not in str(dict(row))


async def test_a_product_cannot_act_as_another(served: Served, api: Api) -> None:
    stranger = await served.deployment.product(served.url, "stranger")
    await put_engine(served, api.headers["product_id"], "ann", "stopped")
    headers = {"X-Product-Id": api.headers["product_id"]}
    assert code_of(await stranger.get("/engines/ann", headers=headers)) == (404, "ENGINE_NOT_FOUND")
    assert (await stranger.get("/engines", headers=headers))[1]["total"] == 0


# --- the admin key ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [ADMIN_KEY, SECOND_ADMIN_KEY])
async def test_admin_as_a_product(served: Served, api: Api, key: str) -> None:
    headers = {"X-Admin-Key": key, "X-Product-Id": api.headers["product_id"]}
    acting = served.deployment.api(served.url, headers)
    assert (await acting.post("/engines/provision", {"user_id": "bob"}))[0] == 200
    status, answer = await acting.post("/engines/ann/admit", {"auto_provision": True})
    assert (status, answer["admitted"]) == (200, True)
    assert "api_key" not in answer["engine"]
    for method, path, body, _ in CALLS:
        status, answer = await acting.call(method, path, body)
        assert status in (200, 409), (path, answer)
        assert "api_key" not in fields(answer), path
        assert "sk-sept-" not in str(answer)
        assert "product_id" not in fields(answer), "only over all products"
    assert (await api.get("/engines/bob"))[1]["api_key"].startswith("sk-sept-")
    async with connection_to(served) as connection:
        actors = await connection.fetch("SELECT DISTINCT actor FROM audit_log WHERE engine_id IS NOT NULL")
    assert [row["actor"] for row in actors] == ["admin"]


async def test_admin_over_all_products(served: Served, api: Api, admin: Api) -> None:
    stranger = await served.deployment.product(served.url, "stranger")
    products = api.headers["product_id"], stranger.headers["product_id"]
    await put_engine(served, products[0], "ann", "running")
    await put_engine(served, products[1], "ann", "failed")
    await put_engine(served, products[1], "bob", "running")

    status, listed = await admin.get("/engines")
    assert (status, listed["total"]) == (200, 3)
    assert [engine["product_id"] for engine in listed["engines"]] == [products[0], products[1], products[1]]
    assert "api_key" not in fields(listed)
    fleet = (await admin.get("/status"))[1]
    assert (fleet["total"], fleet["by_status"]["running"], fleet["unhealthy_count"]) == (3, 2, 1)
    assert {row["product_id"]: row["total"] for row in fleet["products"]} == {products[0]: 1, products[1]: 2}
    async with connection_to(served) as connection:
        for product in products:
            await connection.execute(
                "INSERT INTO audit_log (product_id, action) VALUES ($1, 'provision')", UUID(product)
            )
    assert (await admin.get("/metrics"))[1]["total_provisions"] == 2
    for one in (api, stranger):
        assert (await one.get("/metrics"))[1]["total_provisions"] == 1
        assert "product_id" not in fields((await one.get("/engines"))[1])

    for method, path, body, _ in CALLS[3:]:
        answer = await admin.call(method, path, body)
        assert code_of(answer) == (400, "INVALID_REQUEST"), path
        assert answer[1]["error"]["details"]["field"] == "X-Product-Id"
    for unknown in ("0a8f1f4e-98b8-4a35-9d3c-0e8f5f5a4c11", "acme", "", "%00", "\xff"):
        for method, path, body, _ in CALLS:
            answer = await admin.call(method, path, body, headers={"X-Product-Id": unknown.encode("latin-1")})
            assert code_of(answer) == (404, "PRODUCT_NOT_FOUND"), (unknown, path)


async def test_what_needs_no_key(served: Served) -> None:
    anybody = served.deployment.api(served.url, {})
    for headers in ({}, {"X-Platform-Key": "wrong"}, {"X-Admin-Key": "wrong"}):
        for path in ("/health", "/docs", "/openapi.json"):
            assert (await anybody.client.get(path, headers=headers)).status_code == 200
