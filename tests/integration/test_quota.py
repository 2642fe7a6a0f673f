"""`max_engines`: exact, over all states, and a refusal leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from tests.integration.checks import STATES, code_of, database, put_engine, retry_after

if TYPE_CHECKING:
    from tests.integration.conftest import Served


async def test_parallel_provisions_and_admits_share_one_limit(served: Served) -> None:
    api = await served.deployment.product(served.url, policy={"max_engines": 4})
    flags = {"auto_provision": True}
    answers = await asyncio.gather(
        *(api.call("POST", "/engines/provision", {"user_id": f"p-{n}"}) for n in range(20)),
        *(api.call("POST", f"/engines/a-{n}/admit", flags) for n in range(20)),
    )
    assert Counter(status for status, _ in answers) == {200: 4, 429: 36}
    refused = [answer for answer in answers if answer[0] == 429]
    assert {code_of(answer) for answer in refused} == {(429, "QUOTA_EXCEEDED")}
    assert {answer[1]["error"]["message"] for answer in refused} == {"Product at max_engines limit (4)."}
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        for table in ("engines", "engine_keys", "audit_log WHERE action = 'provision'"):
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 4, table


async def test_every_state_counts_and_a_destroyed_engine_does_not(served: Served) -> None:
    api = await served.deployment.product(served.url, policy={"max_engines": len(STATES)})
    other = await served.deployment.product(served.url, "other", {"max_engines": 0})
    for state in STATES:
        await put_engine(served, api.headers["product_id"], state, state)
    for call in (
        ("/engines/provision", {"user_id": "one-more"}),
        ("/engines/provision", {"user_id": "one-more", "engine_version": "mimic:2"}),
        ("/engines/one-more/admit", {"auto_provision": True, "auto_wake": True}),
    ):
        assert code_of(await api.post(*call)) == (429, "QUOTA_EXCEEDED")
        retry_after(api)
        assert code_of(await api.get("/engines/one-more")) == (404, "ENGINE_NOT_FOUND")
    answer = await api.post("/engines/provision", {"user_id": "one-more"}, headers={"Idempotency-Key": "k"})
    assert code_of(answer) == (429, "QUOTA_EXCEEDED")
    assert code_of(await api.post("/engines/provision", {"user_id": "stopped"})) == (409, "ENGINE_ALREADY_EXISTS")
    assert (await api.admit("one-more", auto_provision=False))["reason"] == "engine_not_found", "looking is free"
    assert code_of(await other.post("/engines/provision", {"user_id": "x"})) == (429, "QUOTA_EXCEEDED")

    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute("DELETE FROM engines WHERE user_id = 'failed'")
    answer = await api.post(
        "/engines/provision", {"user_id": "one-more", "engine_version": "mimic:3"}, headers={"Idempotency-Key": "k"}
    )
    assert answer[0] == 200, "429 freed the key, also for another body"
