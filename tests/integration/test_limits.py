"""Quota, rate limit and idempotency: exact under concurrency."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from orchestrator.control_plane import ControlPlane
from orchestrator.errors import OrchestratorError
from tests.integration.conftest import settings_of

if TYPE_CHECKING:
    from tests.integration.conftest import Served


async def test_a_hundred_provisions_at_a_limit_of_ten_make_ten(served: Served) -> None:
    api = await served.deployment.product(served.url, "small", {"max_engines": 10})
    answers = await asyncio.gather(
        *(api.post("/engines/provision", {"user_id": f"user-{number}"}) for number in range(100))
    )
    assert [status for status, _ in answers].count(200) == 10
    assert {body["error"]["code"] for status, body in answers if status != 200} == {"QUOTA_EXCEEDED"}
    _, listed = await api.get("/engines")
    assert listed["total"] == 10
    status, body = await api.post("/engines/one-more/admit", {"auto_provision": True})
    assert (status, body["error"]["code"]) == (429, "QUOTA_EXCEEDED")
    assert api.last is not None
    assert int(api.last.headers["retry-after"]) >= 1


async def test_exactly_n_admits_pass_over_two_replicas(served: Served) -> None:
    api = await served.deployment.product(served.url, "limited", {"rate_limit_rpm": 50})
    key = api.client.headers["X-Platform-Key"]
    other = ControlPlane(settings_of(served.deployment.variables))
    await other.open()

    async def admit(plane: ControlPlane) -> str:
        try:
            await plane.discovery.admit(key, "nobody", auto_provision=False, auto_wake=False)
        except OrchestratorError as error:
            return error.code
        return "passed"

    try:
        codes = await asyncio.gather(*(admit(plane) for plane in (served.plane, other) * 60))
        assert codes.count("passed") == 50
        assert codes.count("RATE_LIMITED") == 70
    finally:
        await other.close()
    status, body = await api.post("/engines/nobody/admit")
    assert (status, body["error"]["code"]) == (429, "RATE_LIMITED")
    assert api.last is not None
    assert 1 <= int(api.last.headers["retry-after"]) <= 60


async def test_a_large_limit_is_never_exceeded_and_hardly_refused_early(served: Served) -> None:
    api = await served.deployment.product(served.url, "large", {"rate_limit_rpm": 1000})
    key = api.client.headers["X-Platform-Key"]
    passed = 0
    for _ in range(24):
        answers = await asyncio.gather(
            *(served.plane.discovery.admit(key, "nobody", auto_provision=False, auto_wake=False) for _ in range(50)),
            return_exceptions=True,
        )
        passed += sum(not isinstance(answer, BaseException) for answer in answers)
    assert 980 <= passed <= 1000


async def test_a_changed_limit_remembers_what_was_counted(served: Served) -> None:
    api = await served.deployment.product(served.url, "moving", {"rate_limit_rpm": 20})
    admin = served.deployment.admin(served.url)
    path = f"/products/{api.headers['product_id']}/policy"

    async def admits(number: int) -> int:
        answers = [await api.post("/engines/nobody/admit") for _ in range(number)]
        return sum(status == 200 for status, _ in answers)

    assert await admits(15) == 15
    assert (await admin.call("PUT", path, {"policy": {"rate_limit_rpm": 18}}))[0] == 200
    assert await admits(5) == 3
    assert (await admin.call("PUT", path, {"policy": {"rate_limit_rpm": 1000}}))[0] == 200
    assert await admits(3) == 3
    assert (await admin.call("PUT", path, {"policy": {"rate_limit_rpm": 22}}))[0] == 200
    assert await admits(5) <= 4
    assert (await admin.call("PUT", path, {"policy": {}}))[0] == 200
    assert await admits(5) == 5


async def test_an_idempotency_key_gives_one_answer(served: Served) -> None:
    api = await served.deployment.product(served.url)
    headers = {"Idempotency-Key": "abc"}
    answers = await asyncio.gather(
        *(api.post("/engines/provision", {"user_id": "ann"}, headers=headers) for _ in range(5))
    )
    assert [status for status, _ in answers] == [200] * 5
    assert all(body == answers[0][1] for _, body in answers)
    again = await api.post("/engines/provision", {"user_id": "ann"}, headers=headers)
    assert again == answers[0]
    status, body = await api.post("/engines/provision", {"user_id": "ben"}, headers=headers)
    assert (status, body["error"]["code"]) == (409, "IDEMPOTENCY_CONFLICT")
    status, body = await api.post("/engines/provision", {"user_id": "ann"}, headers={"Idempotency-Key": "other"})
    assert (status, body["error"]["code"]) == (409, "ENGINE_ALREADY_EXISTS")
    other = await served.deployment.product(served.url, "other")
    assert (await other.post("/engines/provision", {"user_id": "ann"}, headers=headers))[0] == 200
    assert (await api.call("DELETE", "/engines/ann"))[0] == 200
    status, body = await api.post("/engines/provision", {"user_id": "ann"}, headers=headers)
    assert status == 200
    assert body["engine_id"] != answers[0][1]["engine_id"]
