"""The thirteen documented endpoints, and sleep, recover, keep-alive and wait: every field, status and error code."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest

from tests.conftest import url_of
from tests.integration.checks import STATES, code_of, database, put_engine, retry_after

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Served

ENGINE_FIELDS = {
    "engine_id",
    "user_id",
    "status",
    "url",
    "api_key",
    "engine_version",
    "created_at",
    "last_health_at",
}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
FLAGS = ("MIMIC_BOOT_DELAY", "MIMIC_FAIL_HEALTH", "MIMIC_CRASH_AFTER", "MIMIC_UNREADY_FOR", "MIMIC_NO_ADMIN")
BOTH = {"auto_provision": True, "auto_wake": True}


@pytest.fixture
def changes() -> dict[str, str]:
    """Settings that one test wants otherwise: parametrize it."""
    return {}


@pytest.fixture
def variables(variables: dict[str, str], changes: dict[str, str]) -> dict[str, str]:
    return variables | {"ORCH_ENGINE_ENV_PASSTHROUGH": ",".join(FLAGS)} | changes


async def product_id(api: Api) -> str:
    return str(api.headers["product_id"])


# --- lifecycle ----------------------------------------------------------------------------------------------


async def test_provision(api: Api) -> None:
    status, body = await api.post("/engines/provision", {"user_id": "ann", "engine_version": "mimic:2"})
    assert status == 200
    assert set(body) == {"engine_id", "user_id", "status", "url", "api_key"}
    assert UUID(body["engine_id"]).version == 4
    assert (body["user_id"], body["status"]) == ("ann", "running")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", body["url"])
    assert re.fullmatch(r"sk-sept-[A-Za-z0-9_-]{43}", body["api_key"])
    assert (await api.get("/engines/ann"))[1]["engine_version"] == "mimic:2"

    again = await api.post("/engines/provision", {"user_id": "ann"})
    assert code_of(again) == (409, "ENGINE_ALREADY_EXISTS")


@pytest.mark.parametrize("concurrent", [5])
async def test_concurrent_provisions_of_one_user(api: Api, concurrent: int) -> None:
    answers = await asyncio.gather(
        *(api.call("POST", "/engines/provision", {"user_id": "ann"}) for _ in range(concurrent))
    )
    assert sorted(status for status, _ in answers) == [200] + [409] * (concurrent - 1)
    assert {code_of(answer) for answer in answers if answer[0] != 200} == {(409, "ENGINE_ALREADY_EXISTS")}


async def test_user_ids_of_every_kind(api: Api) -> None:
    """Opaque strings: whatever the rule allows works in bodies and in paths."""
    for user_id in ("a b", "ü@example.org", "100%", "a%2Fb", "a?b#c", "…", "provision", "x" * 256, "𝕏" * 256, "\ufffd"):
        engine = await api.provision(user_id)
        path = "/engines/" + "".join(f"%{byte:02X}" for byte in user_id.encode())
        status, found = await api.get(path)
        assert (status, found["user_id"]) == (200, user_id)
        assert await api.call("DELETE", path) == (200, {"status": "destroyed", "engine_id": engine["engine_id"]})


async def test_destroy(api: Api) -> None:
    engine = await api.provision("ann")
    assert await api.call("DELETE", "/engines/ann") == (200, {"status": "destroyed", "engine_id": engine["engine_id"]})
    for method, path in (("DELETE", ""), ("GET", ""), ("POST", "/start"), ("POST", "/rotate-key")):
        assert code_of(await api.call(method, f"/engines/ann{path}")) == (404, "ENGINE_NOT_FOUND")
    anew = await api.provision("ann")
    assert anew["engine_id"] != engine["engine_id"]
    assert anew["api_key"] != engine["api_key"]


async def test_start_and_stop(api: Api) -> None:
    engine = await api.provision("ann")
    assert code_of(await api.post("/engines/ann/start")) == (409, "ENGINE_ALREADY_RUNNING")
    stopped = {"status": "stopped", "engine_id": engine["engine_id"]}
    assert await api.post("/engines/ann/stop") == (200, stopped)
    assert code_of(await api.post("/engines/ann/stop")) == (409, "ENGINE_NOT_RUNNING")
    assert (await api.get("/engines/ann"))[1]["url"] == engine["url"]
    assert await api.post("/engines/ann/start", {}) == (200, {"status": "running", "url": engine["url"]})
    for call in ("start", "stop", "sleep", "recover"):
        assert code_of(await api.post(f"/engines/nobody/{call}")) == (404, "ENGINE_NOT_FOUND")


async def test_rotate_key(api: Api) -> None:
    engine = await api.provision("ann")
    status, rotated = await api.post("/engines/ann/rotate-key")
    assert status == 200
    assert set(rotated) == {"engine_id", "api_key", "overlap_seconds", "restarted"}
    assert rotated["engine_id"] == engine["engine_id"]
    assert rotated["api_key"].startswith("sk-sept-")
    assert rotated["api_key"] != engine["api_key"]
    assert (rotated["overlap_seconds"], rotated["restarted"]) == (300, False)
    assert (await api.get("/engines/ann"))[1]["api_key"] == rotated["api_key"]

    assert (await api.post("/engines/ann/rotate-key", {"overlap_seconds": 0}))[1]["overlap_seconds"] == 0
    assert (await api.post("/engines/ann/rotate-key", {"overlap_seconds": 86400}))[1]["overlap_seconds"] == 86400
    await api.post("/engines/ann/stop")
    status, while_stopped = await api.post("/engines/ann/rotate-key", {})
    assert status == 200
    assert (await api.get("/engines/ann"))[1]["api_key"] == while_stopped["api_key"]
    assert code_of(await api.post("/engines/nobody/rotate-key")) == (404, "ENGINE_NOT_FOUND")


async def test_rotate_key_of_an_engine_that_cannot_take_one(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMIC_NO_ADMIN", "1")
    engine = await api.provision("ann")
    status, rotated = await api.post("/engines/ann/rotate-key", {"overlap_seconds": 60})
    assert status == 200
    assert (rotated["overlap_seconds"], rotated["restarted"]) == (0, True)
    assert rotated["api_key"] != engine["api_key"]
    assert (await api.get("/engines/ann"))[1]["url"] == engine["url"]


@pytest.mark.parametrize("changes", [{"ORCH_PORT_MIN": "19700", "ORCH_PORT_MAX": "19700"}])
async def test_port_exhaustion_leaves_no_row(api: Api) -> None:
    await api.provision("ann")
    for call in (
        api.post("/engines/provision", {"user_id": "bob"}),
        api.post("/engines/bob/admit", BOTH),
    ):
        assert code_of(await call) == (503, "PORT_EXHAUSTION")
        retry_after(api)
    assert code_of(await api.get("/engines/bob")) == (404, "ENGINE_NOT_FOUND")
    await api.call("DELETE", "/engines/ann")
    await api.provision("bob")


@pytest.mark.parametrize("changes", [{"ORCH_BOOT_TIMEOUT_S": "1"}])
async def test_boot_timeout_and_another_try(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMIC_FAIL_HEALTH", "1")
    provision = asyncio.create_task(api.call("POST", "/engines/provision", {"user_id": "ann"}))
    while (await api.get("/engines/ann"))[0] == 404:  # noqa: ASYNC110 - the row is the event
        await asyncio.sleep(0)
    answers = await asyncio.gather(provision, *(api.call("POST", "/engines/ann/admit", BOTH) for _ in range(3)))
    assert {code_of(answer) for answer in answers} == {(504, "BOOT_TIMEOUT")}, "for all who joined"
    failed = (await api.get("/engines/ann"))[1]
    assert (failed["status"], failed["last_health_at"]) == ("failed", None)
    assert (await api.admit("ann", auto_provision=False))["reason"] == "engine_unhealthy"

    monkeypatch.delenv("MIMIC_FAIL_HEALTH")
    status, engine = await api.post("/engines/provision", {"user_id": "ann", "engine_version": "mimic:2"})
    assert status == 200, engine
    assert (engine["engine_id"], engine["api_key"], engine["url"]) == (
        failed["engine_id"],
        failed["api_key"],
        failed["url"],
    ), "the same id, key and port"
    assert (await api.get("/engines/ann"))[1]["engine_version"] == "mimic:2"
    assert code_of(await api.post("/engines/provision", {"user_id": "ann"})) == (409, "ENGINE_ALREADY_EXISTS")


async def test_an_engine_that_exits_while_it_boots(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMIC_UNREADY_FOR", "60")
    monkeypatch.setenv("MIMIC_CRASH_AFTER", "0.01")
    answer = await api.post("/engines/provision", {"user_id": "ann"})
    assert code_of(answer) == (502, "BACKEND_ERROR")
    assert answer[1]["error"]["details"] == {"reason": "exited"}
    monkeypatch.delenv("MIMIC_UNREADY_FOR")
    monkeypatch.delenv("MIMIC_CRASH_AFTER")
    assert (await api.admit("ann"))["admitted"] is True, "admit with auto_provision tries it again"


async def test_image_that_the_policy_forbids(served: Served) -> None:
    api = await served.deployment.product(served.url)
    wrong = {"user_id": "ann", "engine_version": "other/image:1"}
    assert code_of(await api.post("/engines/provision", wrong)) == (403, "POLICY_DENIED")
    strict = await served.deployment.product(served.url, "strict", {"allowed_images": ["mimic:9.*", "exact:1"]})
    for image, expected in (("mimic:9.1", 200), ("mimic:8", 403), ("exact:1", 200), ("exact:11", 403)):
        status, body = await strict.post("/engines/provision", {"user_id": image, "engine_version": image})
        assert status == expected, body
    assert code_of(await strict.get("/engines/mimic:8")) == (404, "ENGINE_NOT_FOUND")


# --- discovery ----------------------------------------------------------------------------------------------


async def test_look_up(api: Api) -> None:
    engine = await api.provision("ann")
    status, found = await api.get("/engines/ann")
    assert status == 200
    assert set(found) == ENGINE_FIELDS
    assert {name: found[name] for name in engine} == engine
    assert found["engine_version"] == "mimic:1"
    assert TIME.fullmatch(found["created_at"])
    assert TIME.fullmatch(found["last_health_at"])
    assert code_of(await api.get("/engines/nobody")) == (404, "ENGINE_NOT_FOUND")


async def test_admit_provisions_and_answers_as_look_up(api: Api) -> None:
    assert await api.post("/engines/ann/admit") == (
        200,
        {"admitted": False, "engine": None, "reason": "engine_not_found"},
    )
    status, body = await api.post("/engines/ann/admit", {"auto_provision": True})
    assert status == 200
    assert set(body) == {"admitted", "engine"}
    assert body["admitted"] is True
    assert set(body["engine"]) == ENGINE_FIELDS
    assert body["engine"] == (await api.get("/engines/ann"))[1]


async def test_admit_joins_and_a_caller_who_goes_away_cancels_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIMIC_UNREADY_FOR", "0.3")
    impatient = asyncio.create_task(api.client.post("/engines/ann/admit", json=BOTH))
    while (await api.get("/engines/ann"))[0] == 404:  # noqa: ASYNC110 - the row is the event
        await asyncio.sleep(0)
    assert (await api.admit("ann", auto_provision=False, auto_wake=False))["reason"] == "engine_provisioning"
    impatient.cancel()
    answers = await asyncio.gather(*(api.admit("ann") for _ in range(5)))
    assert {answer["engine"]["api_key"] for answer in answers} == {answers[0]["engine"]["api_key"]}
    assert all(answer["admitted"] for answer in answers)
    assert (await api.get("/metrics"))[1]["total_provisions"] == 1


async def test_reason_of_every_state(served: Served, api: Api) -> None:
    """Without flags `admit` changes nothing and says which state it met."""
    reasons = {
        "provisioning": "engine_provisioning",
        "sleeping": "engine_sleeping",
        "stopped": "engine_stopped",
        "failed": "engine_unhealthy",
        "destroying": "engine_destroying",
    }
    for state, reason in reasons.items():
        await put_engine(served, await product_id(api), state, state)
        assert await api.post(f"/engines/{state}/admit", {}) == (
            200,
            {"admitted": False, "engine": None, "reason": reason},
        )
        assert await api.status_of(state) == state
    assert (await api.admit("stopped"))["reason"] == "engine_stopped", "stopped waits for a person, whatever the flags"


async def test_admit_of_a_failed_engine_waits_for_the_backoff(served: Served, api: Api) -> None:
    engine = await api.provision("ann")
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute("UPDATE engines SET status = 'failed', restart_ended_at = now()")
        assert await api.admit("ann") == {"admitted": False, "engine": None, "reason": "engine_unhealthy"}
        assert 1 <= retry_after(api) <= 5
        await connection.execute(
            "UPDATE engines SET restart_ended_at = NULL, restart_parked_until = now() + interval '1 minute'"
        )
        assert (await api.admit("ann"))["reason"] == "engine_unhealthy"
        assert 50 <= retry_after(api) <= 60
        await connection.execute("UPDATE engines SET restart_parked_until = now()")
    assert (await api.admit("ann", auto_wake=False))["reason"] == "engine_unhealthy"
    assert api.last is not None
    assert "retry-after" not in api.last.headers
    assert (await api.admit("ann"))["engine"]["api_key"] == engine["api_key"]


# --- fleet --------------------------------------------------------------------------------------------------


async def test_list_pages_filters_and_shows_no_key(served: Served, api: Api) -> None:
    product = await product_id(api)
    for number in range(7):
        await put_engine(served, product, f"user-{number}", STATES[number % 6])
    stranger = await served.deployment.product(served.url, "stranger")
    await put_engine(served, await product_id(stranger), "of-another", "running")

    status, everything = await api.get("/engines")
    assert status == 200
    assert set(everything) == {"engines", "total"}
    assert everything["total"] == 7
    assert [engine["user_id"] for engine in everything["engines"]] == [f"user-{number}" for number in range(7)]
    assert {frozenset(engine) for engine in everything["engines"]} == {frozenset(ENGINE_FIELDS - {"api_key"})}

    pages: list[Any] = []
    for offset in range(0, 9, 3):
        status, page = await api.get(f"/engines?limit=3&offset={offset}")
        assert (status, page["total"]) == (200, 7)
        pages += page["engines"]
    assert pages == everything["engines"]
    for state in STATES:
        status, page = await api.get(f"/engines?status={state}")
        found = [engine["status"] for engine in page["engines"]]
        assert (page["total"], found) == (len(found), [state] * (2 if state == "provisioning" else 1))
    assert (await api.get("/engines?limit=1000&offset=7"))[1] == {"engines": [], "total": 7}


async def test_status(served: Served, api: Api) -> None:
    restarts = {"pending": 0, "parked": 0, "gave_up": 0}
    nothing = {
        "total": 0,
        "by_status": dict.fromkeys(STATES, 0),
        "health": "ok",
        "unhealthy_count": 0,
        "restarts": restarts,
    }
    assert await api.get("/status") == (200, nothing)
    product = await product_id(api)
    for number in range(3):
        await put_engine(served, product, f"running-{number}", "running")
    assert (await api.get("/status"))[1]["health"] == "ok"
    await put_engine(served, product, "failed-0", "failed")
    status, body = await api.get("/status")
    assert (status, set(body)) == (200, {"total", "by_status", "health", "unhealthy_count", "restarts"})
    assert (body["total"], body["by_status"]["running"], body["by_status"]["failed"]) == (4, 3, 1)
    assert (body["health"], body["unhealthy_count"]) == ("critical", 1), "one of four is 25 %"
    await put_engine(served, product, "sleeping-0", "sleeping")
    assert (await api.get("/status"))[1]["health"] == "degraded"


async def test_metrics(served: Served, api: Api) -> None:
    assert await api.get("/metrics") == (
        200,
        {
            "provisions_1h": 0,
            "crashes_1h": 0,
            "restarts_1h": 0,
            "avg_boot_ms": None,
            "boot_ms": {"p50": None, "p95": None, "p99": None},
            "total_provisions": 0,
            "total_destroys": 0,
        },
    )
    await api.provision("ann")
    await api.provision("bob")
    await api.call("DELETE", "/engines/bob")
    product = UUID(await product_id(api))
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute(
            "INSERT INTO audit_totals (product_id, action, count) VALUES ($1, 'provision', 40), ($1, 'destroy', 30)",
            product,
        )
        for action, age in (
            ("health_failed", "5 minutes"),
            ("auto_restart_start", "1 minute"),
            ("provision", "2 hours"),
        ):
            await connection.execute(
                f"INSERT INTO audit_log (product_id, action, timestamp) VALUES ($1, $2, now() - interval '{age}')",
                product,
                action,
            )
    body = (await api.get("/metrics"))[1]
    assert (body["provisions_1h"], body["crashes_1h"], body["restarts_1h"]) == (2, 1, 1)
    assert (body["total_provisions"], body["total_destroys"]) == (43, 31), "totals survive what retention removed"
    assert 0 < body["boot_ms"]["p50"] <= body["boot_ms"]["p95"] <= body["boot_ms"]["p99"]
    assert body["avg_boot_ms"] > 0
    stranger = await served.deployment.product(served.url, "stranger")
    assert (await stranger.get("/metrics"))[1]["total_provisions"] == 0


# --- admin --------------------------------------------------------------------------------------------------


async def test_register(admin: Api) -> None:
    body = {"slug": "demo", "display_name": "Demo", "policy": {"max_engines": 1000, "rate_limit_rpm": 600}}
    status, product = await admin.post("/products/register", body)
    assert status == 200
    assert set(product) == {"product_id", "slug", "platform_api_key"}
    assert product["slug"] == "demo"
    assert UUID(product["product_id"])
    assert re.fullmatch(r"pk-sept-[A-Za-z0-9_-]{43}", product["platform_api_key"])
    again = await admin.post("/products/register", {"slug": "demo", "display_name": "Other"})
    assert code_of(again) == (409, "PRODUCT_SLUG_EXISTS")
    for slug in ("a", "0", "a-b", "x" * 63):
        assert (await admin.post("/products/register", {"slug": slug, "display_name": "X"}))[0] == 200


async def test_policy_is_replaced_whole_and_at_once(served: Served, admin: Api) -> None:
    api = await served.deployment.product(served.url, policy={"max_engines": 5, "engine_image": "mimic:7"})
    await api.provision("ann")
    await api.provision("bob")
    path = f"/products/{await product_id(api)}/policy"
    policy = {
        "max_engines": 1,
        "rate_limit_rpm": 600,
        "idle_sleep_threshold_s": 0.5,
        "idle_stop_threshold_s": 0,
        "engine_memory": "512m",
        "engine_cpus": 1.5,
        "allowed_images": ["mimic:*"],
        "warm_pool": 2,
        "warm_pool_frozen": True,
        "snapshot_interval_s": 3600,
        "snapshot_keep": 3,
        "snapshot_max_age_s": 86400,
    }
    assert await admin.call("PUT", path, {"policy": policy}) == (200, {"policy": policy})
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        assert await connection.fetchval("SELECT policy FROM products") == policy, "nothing of the old one is left"
    assert code_of(await api.post("/engines/provision", {"user_id": "cid"})) == (429, "QUOTA_EXCEEDED")
    assert (await api.get("/engines"))[1]["total"] == 2, "a tightened limit destroys nothing"
    assert await admin.call("PUT", path, {"policy": {}}) == (200, {"policy": {}})
    assert (await api.get(f"/engines/{(await api.provision('cid'))['user_id']}"))[1]["engine_version"] == "mimic:1"


@pytest.mark.parametrize("unknown", ["0a8f1f4e-98b8-4a35-9d3c-0e8f5f5a4c11", "demo", "0", "%00", "{x}"])
async def test_policy_of_an_unknown_product(admin: Api, unknown: str) -> None:
    answer = await admin.call("PUT", f"/products/{unknown}/policy", {"policy": {}})
    assert code_of(answer) == (404, "PRODUCT_NOT_FOUND")


# --- health -------------------------------------------------------------------------------------------------


async def test_health(served: Served) -> None:
    anybody = served.deployment.api(served.url, {})
    status, body = await anybody.get("/health")
    assert status == 200
    assert set(body) == {"status", "version", "subsystems"}
    assert body["status"] == "ok"
    assert set(body["subsystems"]) == {"database", "backend", "loops"}
    for subsystem in body["subsystems"].values():
        assert set(subsystem) == {"status", "detail"}
        assert subsystem["status"] == "ok"

    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        for damage in ("UPDATE alembic_version SET version_num = '0000'", "DROP TABLE alembic_version"):
            await connection.execute(damage)
            status, body = await anybody.get("/health")
            assert (status, body["status"], body["subsystems"]["database"]["status"]) == (503, "degraded", "down")
            assert "migrate" in body["subsystems"]["database"]["detail"]


async def test_without_the_database(served: Served, api: Api) -> None:
    """Everything answers in time with its code, and works again when the database is back."""
    url = served.deployment.variables["ORCH_DATABASE_URL"]
    name = urlsplit(url).path.removeprefix("/")
    async with database(url_of(url, "postgres")) as connection:
        await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        try:
            for method, path in (("POST", "/engines/ann/admit"), ("GET", "/engines"), ("GET", "/engines/ann")):
                assert code_of(await api.call(method, path)) == (503, "DATABASE_UNAVAILABLE")
                retry_after(api)
            status, body = await api.get("/health")
            assert (status, body["subsystems"]["database"]["status"]) == (503, "down")
        finally:
            await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    assert (await api.get("/health"))[0] == 200
    assert (await api.admit("ann", auto_provision=False))["reason"] == "engine_not_found"


# --- what is added -------------------------------------------------------------------------------------------


async def test_sleep_and_start(api: Api) -> None:
    engine = await api.provision("ann")
    asleep = {"status": "sleeping", "engine_id": engine["engine_id"]}
    assert await api.post("/engines/ann/sleep") == (200, asleep)
    assert await api.post("/engines/ann/sleep") == (200, asleep), "asleep already"
    assert await api.post("/engines/ann/start") == (200, {"status": "running", "url": engine["url"]})
    await api.post("/engines/ann/stop")
    assert code_of(await api.post("/engines/ann/sleep")) == (409, "ENGINE_NOT_RUNNING")


async def test_sleep_with_a_turn_in_flight(served: Served, api: Api) -> None:
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], busy=1)
    assert code_of(await api.post("/engines/ann/sleep")) == (409, "ENGINE_BUSY")
    assert await api.status_of("ann") == "running"


async def test_recover(served: Served, api: Api) -> None:
    engine = await api.provision("ann")
    assert code_of(await api.post("/engines/ann/recover")) == (409, "ENGINE_ALREADY_RUNNING")
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute("UPDATE engines SET status = 'failed', restart_ended_at = now()")
    assert await api.post("/engines/ann/recover") == (200, {"status": "running", "engine_id": engine["engine_id"]})
    await api.post("/engines/ann/stop")
    assert code_of(await api.post("/engines/ann/recover")) == (409, "ENGINE_NOT_RUNNING")


async def test_keep_alive(served: Served, api: Api) -> None:
    engine = await api.provision("ann")
    for seconds in (1, 86400):
        status, body = await api.post("/engines/ann/keep-alive", {"seconds": seconds})
        assert status == 200
        assert set(body) == {"engine_id", "keep_alive_until"}
        assert body["engine_id"] == engine["engine_id"]
        assert TIME.fullmatch(body["keep_alive_until"])
    assert (await api.post("/engines/ann/keep-alive", {"seconds": 0}))[1]["keep_alive_until"] is None
    for wrong in ({}, {"seconds": -1}, {"seconds": 86401}, {"seconds": 1.5}, {"seconds": "1"}, {"seconds": True}):
        assert code_of(await api.post("/engines/ann/keep-alive", wrong)) == (400, "INVALID_REQUEST")
    await api.post("/engines/ann/sleep")
    answer = await api.post("/engines/ann/keep-alive", {"seconds": 1})
    assert code_of(answer) == (409, "ENGINE_NOT_RUNNING")
    await put_engine(served, await product_id(api), "going", "destroying")
    assert code_of(await api.post("/engines/going/keep-alive", {"seconds": 1})) == (409, "ENGINE_BUSY")
    assert code_of(await api.post("/engines/nobody/keep-alive", {"seconds": 1})) == (404, "ENGINE_NOT_FOUND")


async def test_wait(api: Api) -> None:
    engine = await api.provision("ann")
    status, found = await api.get("/engines/ann/wait?status=running")
    assert (status, set(found)) == (200, ENGINE_FIELDS)
    assert found["api_key"] == engine["api_key"]
    late = await api.get("/engines/ann/wait?status=stopped&timeout_s=0.01")
    assert code_of(late) == (408, "WAIT_TIMEOUT")

    waiting = asyncio.create_task(api.client.get("/engines/ann/wait?status=stopped"))
    await api.post("/engines/ann/stop")
    stopped = (await waiting).json()
    assert (stopped["status"], stopped["engine_id"]) == ("stopped", engine["engine_id"])

    waiting = asyncio.create_task(api.client.get("/engines/ann/wait?status=destroyed"))
    await api.status_of("ann")
    await api.call("DELETE", "/engines/ann")
    destroyed = await waiting
    assert destroyed.status_code == 200
    assert destroyed.json() == stopped | {"status": "destroyed", "url": None, "api_key": None}
    assert code_of(await api.get("/engines/ann/wait?status=destroyed")) == (404, "ENGINE_NOT_FOUND")
    for query in ("", "?status=", "?status=asleep", "?status=running&timeout_s=301", "?status=running&timeout_s=-1"):
        assert code_of(await api.get(f"/engines/ann/wait{query}")) == (400, "INVALID_REQUEST")
    for query in ("nan", "x", "", "1e9", "inf"):
        answer = await api.get(f"/engines/ann/wait?status=running&timeout_s={query}")
        assert code_of(answer) == (400, "INVALID_REQUEST")
        assert answer[1]["error"]["details"]["field"] == "timeout_s"
