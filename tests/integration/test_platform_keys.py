"""Issuing, listing, revoking and rotating platform keys; the master key's rotation."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.fernet import Fernet

from orchestrator.keys import KeyRing
from orchestrator.registry.platform_keys import MAX_KEYS
from orchestrator.rewrap import Rewrap
from tests.integration.checks import code_of, database, put_engine
from tests.integration.conftest import MASTER_KEY
from tests.integration.steps import accepted, until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Served

NOBODY = "0a8f1f4e-98b8-4a35-9d3c-0e8f5f5a4c11"


def with_key(served: Served, key: str) -> Api:
    return served.deployment.api(served.url, {"X-Platform-Key": key})


async def issue(admin: Api, path: str, *scopes: str, **fields: Any) -> dict[str, Any]:
    status, body = await admin.post(path, {"scopes": list(scopes), **fields})
    assert status == 200, body
    return dict(body)


async def actions(served: Served, product: Api) -> list[tuple[str, dict[str, Any]]]:
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        rows = await connection.fetch(
            "SELECT action, actor, metadata FROM audit_log WHERE action LIKE 'key%' ORDER BY id"
        )
    assert {row["actor"] for row in rows} == {"admin"}
    return [(row["action"], row["metadata"]) for row in rows]


async def test_a_key_has_its_scopes_and_its_end(served: Served, api: Api, admin: Api) -> None:
    path = f"/products/{api.headers['product_id']}/keys"
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    read = await issue(admin, path, "read", expires_at=later)
    manage = await issue(admin, path, "admit", "manage")
    assert read["platform_api_key"].startswith("pk-sept-")
    assert datetime.fromisoformat(read["expires_at"]) - datetime.fromisoformat(later) < timedelta(milliseconds=2)
    assert manage["expires_at"] is None
    reader = with_key(served, read["platform_api_key"])
    assert (await reader.get("/engines"))[0] == 200
    assert code_of(await reader.post("/engines/ann/stop")) == (403, "POLICY_DENIED")
    manager = with_key(served, manage["platform_api_key"])
    assert code_of(await manager.post("/engines/ann/stop")) == (404, "ENGINE_NOT_FOUND")

    status, listed = await admin.get(path)
    assert status == 200
    assert [key["scopes"] for key in listed["keys"]] == [["manage"], ["read"], ["admit", "manage"]]
    assert set(listed["keys"][0]) == {"key_id", "scopes", "created_at", "expires_at", "last_used_at"}
    assert "pk-sept-" not in str(listed)

    async def both_used() -> bool:
        _, body = await admin.get(path)
        return all(key["last_used_at"] for key in body["keys"][1:])

    await until(both_used, 30)
    assert await actions(served, api) == [
        ("key_issue", {"key_id": read["key_id"], "scopes": ["read"], "expires_at": read_at(read)}),
        ("key_issue", {"key_id": manage["key_id"], "scopes": ["admit", "manage"], "expires_at": None}),
    ]


def read_at(key: dict[str, Any]) -> Any:
    class SameMoment:
        def __eq__(self, other: object) -> bool:
            moment = datetime.fromisoformat(str(other))
            return abs(moment - datetime.fromisoformat(key["expires_at"])) < timedelta(milliseconds=2)

        __hash__ = None  # type: ignore[assignment]  # only compared

    return SameMoment()


async def test_a_revoked_key_is_refused_at_once(served: Served, api: Api, admin: Api) -> None:
    path = f"/products/{api.headers['product_id']}/keys"
    key = await issue(admin, path, "manage")
    holder = with_key(served, key["platform_api_key"])
    assert (await holder.post("/engines/ann/admit", {}))[0] == 200
    status, body = await admin.call("DELETE", f"{path}/{key['key_id']}")
    assert (status, body) == (200, {"key_id": key["key_id"], "status": "revoked"})
    assert code_of(await holder.post("/engines/ann/admit", {})) == (401, "INVALID_PLATFORM_KEY")
    assert code_of(await holder.get("/engines")) == (401, "INVALID_PLATFORM_KEY")
    assert code_of(await admin.call("DELETE", f"{path}/{key['key_id']}")) == (404, "KEY_NOT_FOUND")
    assert (await actions(served, api))[1:] == [("key_revoke", {"key_id": key["key_id"]})]


async def test_the_keys_of_another_product_are_not_found(served: Served, api: Api, admin: Api) -> None:
    other = await served.deployment.product(served.url, "other")
    key = await issue(admin, f"/products/{api.headers['product_id']}/keys", "read")
    path = f"/products/{other.headers['product_id']}/keys/{key['key_id']}"
    assert code_of(await admin.call("DELETE", path)) == (404, "KEY_NOT_FOUND")
    assert (await with_key(served, key["platform_api_key"]).get("/engines"))[0] == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["all"]}, "scopes.0"),
        ({"scopes": ["read", "read"]}, "scopes"),
        ({"scopes": ["read"], "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"scopes": ["read"], "expires_at": "2099-01-01T00:00:00"}, "expires_at"),
        ({"scopes": ["read"], "name": "x"}, "name"),
    ],
)
async def test_bad_input(api: Api, admin: Api, body: dict[str, Any], field: str) -> None:
    answer = await admin.post(f"/products/{api.headers['product_id']}/keys", body)
    assert code_of(answer) == (400, "INVALID_REQUEST")
    assert answer[1]["error"]["details"]["field"] == field


async def test_unknown_products_and_wrong_callers(api: Api, admin: Api) -> None:
    for product in (NOBODY, "x"):
        for method, path, body in (
            ("POST", "keys", {"scopes": ["read"]}),
            ("GET", "keys", None),
            ("DELETE", f"keys/{NOBODY}", None),
            ("POST", "rotate-platform-key", None),
        ):
            answer = await admin.call(method, f"/products/{product}/{path}", body)
            assert code_of(answer) == (404, "PRODUCT_NOT_FOUND"), path
            assert code_of(await api.call(method, f"/products/{product}/{path}", body)) == (401, "INVALID_ADMIN_KEY")


async def test_the_number_of_keys_is_exact_under_concurrency(served: Served, api: Api, admin: Api) -> None:
    product_id = str(api.headers["product_id"])
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute(
            "INSERT INTO platform_keys (product_id, key_hash, scopes, expires_at) "
            "SELECT $1, number::text, ARRAY['read'], CASE WHEN number > 200 THEN now() END "
            "FROM generate_series(1, $2) number",
            product_id,
            MAX_KEYS - 4,
        )
    answers = await asyncio.gather(
        *(accepted(lambda: admin.post(f"/products/{product_id}/keys", {"scopes": ["read"]})) for _ in range(8))
    )
    assert sorted(status for status, _ in answers) == [200] * 3 + [429] * 5
    refused = next(answer for answer in answers if answer[0] == 429)
    assert code_of(refused) == (429, "QUOTA_EXCEEDED")


async def test_rotation_leaves_the_old_key_for_the_overlap(served: Served, api: Api, admin: Api) -> None:
    product_id = api.headers["product_id"]
    reader = with_key(served, (await issue(admin, f"/products/{product_id}/keys", "read"))["platform_api_key"])
    status, rotated = await admin.post(f"/products/{product_id}/rotate-platform-key", {"overlap_seconds": 600})
    assert status == 200
    assert (rotated["scopes"], rotated["expires_at"]) == (["manage"], None)
    new = with_key(served, rotated["platform_api_key"])
    for caller in (api, new, reader):
        assert (await caller.get("/engines"))[0] == 200
    status, again = await admin.post(f"/products/{product_id}/rotate-platform-key", {"overlap_seconds": 0})
    assert status == 200
    for caller in (api, new):
        assert code_of(await caller.get("/engines")) == (401, "INVALID_PLATFORM_KEY")
        assert code_of(await caller.post("/engines/ann/admit", {})) == (401, "INVALID_PLATFORM_KEY")
    for caller in (reader, with_key(served, again["platform_api_key"])):
        assert (await caller.get("/engines"))[0] == 200
    for seconds in (-1, 86401, 1.5, "1"):
        path = f"/products/{product_id}/rotate-platform-key"
        assert code_of(await admin.post(path, {"overlap_seconds": seconds})) == (400, "INVALID_REQUEST")


# --- the master key -------------------------------------------------------------------------------------------


async def rewrapped(admin: Api) -> dict[str, Any]:
    async def is_done() -> bool:
        _, body = await admin.get("/admin/rewrap-keys")
        return bool(body["status"] == "done")

    await until(is_done, 60)
    _, body = await admin.get("/admin/rewrap-keys")
    return dict(body)


async def test_rewrap_moves_every_key_to_the_current_master_key(served: Served, api: Api, admin: Api) -> None:
    """As after `old,new` → `new,old`: keys stored under the old one are read before, meanwhile and afterwards."""
    old = Fernet.generate_key().decode()
    plane = served.plane
    plane.keyring._by_id |= KeyRing([old])._by_id
    engine_id = await put_engine(served, str(api.headers["product_id"]), "ann", "running")
    secret = "sk-sept-stored-under-the-old-master-key"
    ciphertext, old_id = KeyRing([old]).encrypt(secret)
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute("UPDATE engine_keys SET key_enc = $1, master_key_id = $2", ciphertext, old_id)
    assert (await admin.get("/admin/rewrap-keys"))[1] == {"status": "idle", "total": 1, "done": 0, "remaining": 1}
    assert (await api.admit("ann"))["engine"]["api_key"] == secret
    status, body = await admin.post("/admin/rewrap-keys")
    assert status == 200
    assert body["total"] == 1
    assert await rewrapped(admin) == {"status": "done", "total": 1, "done": 1, "remaining": 0}
    assert (await api.admit("ann"))["engine"]["api_key"] == secret
    assert await plane.registry.engines.master_key_ids() == {plane.keyring.current_id}
    (key,) = await plane.registry.engines.keys(engine_id)
    assert KeyRing([MASTER_KEY]).decrypt(key.key_enc, key.master_key_id) == secret
    await admin.post("/admin/rewrap-keys")
    assert (await rewrapped(admin))["total"] == 1


async def test_rewrap_goes_on_after_a_crash_on_any_replica_with_the_key(served: Served, api: Api, admin: Api) -> None:
    plane = served.plane
    new = Fernet.generate_key().decode()
    for number in range(7):
        await put_engine(served, str(api.headers["product_id"]), f"user-{number}", "stopped")
    ring = KeyRing([new, MASTER_KEY])
    elsewhere = Rewrap(plane.registry.rewrap, ring)
    await elsewhere.start()
    # It did one batch, and died.
    assert await plane.registry.rewrap.batch(ring.current_id, ring.rewrap, 3) == 3
    await plane.rewrap.round()  # a replica with another current key leaves the job alone
    status, body = await admin.get("/admin/rewrap-keys")
    assert (status, body) == (200, {"status": "running", "total": 7, "done": 3, "remaining": 4})
    third = Rewrap(plane.registry.rewrap, ring)
    await asyncio.gather(third.round(), elsewhere.round())
    await third.round()
    assert (await third.progress()).status == "done"
    assert await plane.registry.engines.master_key_ids() == {ring.current_id}
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        rows = await connection.fetch("SELECT status, metadata FROM audit_log WHERE action = 'rewrap' ORDER BY id")
    assert [row["status"] for row in rows] == ["running", "done"]
    assert rows[1]["metadata"]["total"] == 7
