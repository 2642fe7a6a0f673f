"""`Idempotency-Key` on provision: one engine for one key, whoever asks and however often."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.checks import code_of, database, fingerprint

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Served


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {"ORCH_ENGINE_ENV_PASSTHROUGH": "MIMIC_UNREADY_FOR,MIMIC_CRASH_AFTER"}


async def provision(api: Api, key: str, user_id: str = "ann", **more: Any) -> tuple[int, Any]:
    body = {"user_id": user_id, **more}
    return await api.post("/engines/provision", body, headers={"Idempotency-Key": key})


async def test_same_key_and_body(served: Served, api: Api) -> None:
    first = await provision(api, "k1")
    assert first[0] == 200
    assert await provision(api, "k1") == first
    assert await provision(api, "k1", engine_version=None) == first, "the same body, written otherwise"
    state = await fingerprint(served.deployment.variables["ORCH_DATABASE_URL"])
    assert code_of(await provision(api, "k1", "bob")) == (409, "IDEMPOTENCY_CONFLICT")
    assert code_of(await provision(api, "k1", engine_version="mimic:2")) == (409, "IDEMPOTENCY_CONFLICT")
    assert code_of(await provision(api, "k2")) == (409, "ENGINE_ALREADY_EXISTS")
    assert await fingerprint(served.deployment.variables["ORCH_DATABASE_URL"]) == state
    for row in state["idempotency_keys"]:
        assert first[1]["api_key"] not in str(row), "never the plaintext"
    await api.post("/engines/ann/rotate-key")
    again = await provision(api, "k1")
    assert (again[0], again[1]["engine_id"]) == (200, first[1]["engine_id"])
    assert again[1]["api_key"] == (await api.get("/engines/ann"))[1]["api_key"], "the key in force"


async def test_calls_at_once_join(served: Served, api: Api) -> None:
    answers = await asyncio.gather(*(provision(api, "k") for _ in range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == 200
    conflicts = await asyncio.gather(*(provision(api, "other", f"user-{n}") for n in range(5)))
    assert sorted(status for status, _ in conflicts) == [200, 409, 409, 409, 409]
    assert (await api.get("/engines"))[1]["total"] == 2


async def test_keys_are_of_one_product(served: Served, api: Api) -> None:
    stranger = await served.deployment.product(served.url, "stranger")
    mine, theirs = await provision(api, "k", "ann"), await provision(stranger, "k", "bob")
    assert (mine[0], theirs[0]) == (200, 200)
    assert mine[1]["engine_id"] != theirs[1]["engine_id"]


async def test_destroying_the_engine_drops_the_key(api: Api) -> None:
    first = await provision(api, "k")
    await api.call("DELETE", "/engines/ann")
    anew = await provision(api, "k", "bob")
    assert anew[0] == 200, anew
    assert anew[1]["engine_id"] != first[1]["engine_id"]


async def test_a_key_is_kept_for_a_day(served: Served, api: Api) -> None:
    first = await provision(api, "k")
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute("UPDATE idempotency_keys SET created_at = now() - interval '23 h 59 min'")
        assert await provision(api, "k") == first
        await connection.execute("UPDATE idempotency_keys SET created_at = now() - interval '24 h'")
    assert code_of(await provision(api, "k")) == (409, "ENGINE_ALREADY_EXISTS"), "forgotten: as without a key"
    assert (await provision(api, "k", "bob"))[0] == 200


async def test_a_failure_frees_the_key(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMIC_UNREADY_FOR", "60")
    monkeypatch.setenv("MIMIC_CRASH_AFTER", "0.01")
    assert code_of(await provision(api, "k")) == (502, "BACKEND_ERROR")
    assert code_of(await provision(api, "k")) == (502, "BACKEND_ERROR"), "tried again, not remembered"
    monkeypatch.delenv("MIMIC_UNREADY_FOR")
    monkeypatch.delenv("MIMIC_CRASH_AFTER")
    retried = await provision(api, "k", engine_version="mimic:2")
    assert retried[0] == 200, "freed, also for another body"
    assert await provision(api, "k", engine_version="mimic:2") == retried
    assert code_of(await provision(api, "k")) == (409, "IDEMPOTENCY_CONFLICT")


async def test_a_boot_that_was_stopped_frees_the_key(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMIC_UNREADY_FOR", "60")
    booting = asyncio.create_task(provision(api, "k"))
    while (await api.call("GET", "/engines/ann"))[0] == 404:  # noqa: ASYNC110 - the row is the event
        await asyncio.sleep(0)
    assert (await api.call("POST", "/engines/ann/stop"))[0] == 200
    assert (await booting)[0] == 409
    monkeypatch.delenv("MIMIC_UNREADY_FOR")
    assert (await provision(api, "k", "bob"))[0] == 200


async def test_keys_that_are_none(served: Served, api: Api) -> None:
    for key in ("", "x" * 256, "caf\u00e9", "a\tb"):
        answer = await api.post("/engines/provision", {"user_id": "ann"}, headers={"Idempotency-Key": key.encode()})
        assert code_of(answer) == (400, "INVALID_REQUEST"), key
        assert answer[1]["error"]["details"]["field"] == "Idempotency-Key"
    assert (await provision(api, "x" * 255))[0] == 200
