"""The state × call table of the contract, cell by cell, over HTTP."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.steps import PASSTHROUGH, appears, boots_fail, data_of, error, fail, heal, reaches, until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tests.integration.conftest import Api, Served

    Answer = tuple[int, Any]
    Caller = Callable[[Api, str], Coroutine[Any, Any, Answer]]


def _post(path: str, body: Any = None) -> Caller:
    return lambda api, user_id: api.post(f"/engines/{user_id}/{path}", body)


def _admit(*, auto_provision: bool = False, auto_wake: bool = False) -> Caller:
    return _post("admit", {"auto_provision": auto_provision, "auto_wake": auto_wake})


CALLS: dict[str, Caller] = {
    "provision": lambda api, user_id: api.post("/engines/provision", {"user_id": user_id}),
    "start": _post("start"),
    "stop": _post("stop"),
    "sleep": _post("sleep"),
    "recover": _post("recover"),
    "keep-alive": _post("keep-alive", {"seconds": 60}),
    "rotate-key": _post("rotate-key"),
    "admit": _admit(),
    "admit-provision": _admit(auto_provision=True),
    "admit-wake": _admit(auto_wake=True),
    "destroy": lambda api, user_id: api.call("DELETE", f"/engines/{user_id}"),
}
AE, AR = (409, "ENGINE_ALREADY_EXISTS"), (409, "ENGINE_ALREADY_RUNNING")
NR, BUSY = (409, "ENGINE_NOT_RUNNING"), (409, "ENGINE_BUSY")
GONE = "destroyed"


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | PASSTHROUGH | {"ORCH_RESTART_BACKOFF_BASE_S": "200"}


async def check(api: Api, call: str, answer: Answer, expected: tuple[Any, str | None]) -> None:
    """`expected`: a refusal, `200`, or for admit the reason (`None`: admitted); then the state that follows."""
    outcome, state = expected
    status, body = answer
    if isinstance(outcome, tuple):
        assert error(answer) == outcome, (call, answer)
    else:
        assert status == 200, (call, answer)
    if call.startswith("admit"):
        assert (body["admitted"], body.get("reason")) == (outcome is None, outcome), call
    if state == GONE:
        assert error(await api.get(f"/engines/{call}")) == (404, "ENGINE_NOT_FOUND")
    elif state is not None:
        assert await api.status_of(call) == state, call


async def check_all(api: Api, cells: dict[str, tuple[Any, str | None]]) -> None:
    """Each call on an engine of its own, whose user is called like the call."""
    assert set(cells) == set(CALLS)

    async def one(call: str) -> None:
        await check(api, call, await CALLS[call](api, call), cells[call])

    await asyncio.gather(*(one(call) for call in cells))


async def provision_all(api: Api) -> None:
    await asyncio.gather(*(api.provision(call) for call in CALLS))


async def test_running(api: Api) -> None:
    await provision_all(api)
    await check_all(
        api,
        {
            "provision": (AE, "running"),
            "start": (AR, "running"),
            "stop": (200, "stopped"),
            "sleep": (200, "sleeping"),
            "recover": (AR, "running"),
            "keep-alive": (200, "running"),
            "rotate-key": (200, "running"),
            "admit": (None, "running"),
            "admit-provision": (None, "running"),
            "admit-wake": (None, "running"),
            "destroy": (200, GONE),
        },
    )


async def test_a_turn_in_flight_is_not_put_to_sleep(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], busy=1)
    assert error(await api.post("/engines/ann/sleep")) == BUSY
    assert await api.status_of("ann") == "running"


async def test_sleeping(api: Api) -> None:
    await provision_all(api)
    await asyncio.gather(*(api.post(f"/engines/{call}/sleep") for call in CALLS))
    await check_all(
        api,
        {
            "provision": (AE, "sleeping"),
            "start": (200, "running"),
            "stop": (200, "stopped"),
            "sleep": (200, "sleeping"),
            "recover": (NR, "sleeping"),
            "keep-alive": (NR, "sleeping"),
            "rotate-key": (200, "sleeping"),
            "admit": ("engine_sleeping", "sleeping"),
            "admit-provision": ("engine_sleeping", "sleeping"),
            "admit-wake": (None, "running"),
            "destroy": (200, GONE),
        },
    )


async def test_stopped(api: Api) -> None:
    await provision_all(api)
    await asyncio.gather(*(api.post(f"/engines/{call}/stop") for call in CALLS))
    await check_all(
        api,
        {
            "provision": (AE, "stopped"),
            "start": (200, "running"),
            "stop": (NR, "stopped"),
            "sleep": (NR, "stopped"),
            "recover": (NR, "stopped"),
            "keep-alive": (NR, "stopped"),
            "rotate-key": (200, "stopped"),
            "admit": ("engine_stopped", "stopped"),
            "admit-provision": ("engine_stopped", "stopped"),
            "admit-wake": ("engine_stopped", "stopped"),
            "destroy": (200, GONE),
        },
    )


async def back_off_is_over(served: Served) -> None:
    """An admit may wake a failed engine again; the loops would restart it by themselves only much later."""
    async with served.plane.database.transaction() as connection:
        await connection.execute("UPDATE engines SET restart_ended_at = now() - interval '1 hour'")


async def test_failed_after_it_was_healthy(api: Api, served: Served) -> None:
    await provision_all(api)
    await asyncio.gather(*(fail(served.deployment, api, call) for call in CALLS))
    await back_off_is_over(served)
    await check_all(
        api,
        {
            "provision": (AE, "failed"),
            "start": (200, "running"),
            "stop": (200, "stopped"),
            "sleep": (NR, "failed"),
            "recover": (200, "running"),
            "keep-alive": (NR, "failed"),
            "rotate-key": (200, "failed"),
            "admit": ("engine_unhealthy", "failed"),
            "admit-provision": ("engine_unhealthy", "failed"),
            "admit-wake": (None, "running"),
            "destroy": (200, GONE),
        },
    )


async def test_failed_and_never_healthy(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async with boots_fail(monkeypatch):
        for call in CALLS:
            assert error(await CALLS["provision"](api, call)) == (502, "BACKEND_ERROR")
    await check_all(
        api,
        {
            "provision": (200, "running"),
            "start": (200, "running"),
            "stop": (200, "stopped"),
            "sleep": (NR, "failed"),
            "recover": (200, "running"),
            "keep-alive": (NR, "failed"),
            "rotate-key": (200, "failed"),
            "admit": ("engine_unhealthy", "failed"),
            "admit-provision": (None, "running"),
            "admit-wake": ("engine_unhealthy", "failed"),
            "destroy": (200, GONE),
        },
    )


async def test_provisioning(api: Api, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MIMIC_FAIL_HEALTH", "1")
        boots = {call: asyncio.create_task(CALLS["provision"](api, call)) for call in CALLS}
        ids = {call: await appears(api, call) for call in CALLS}
        for engine_id in ids.values():  # its object is made while the flag stands in the environment
            await spawned(served, engine_id)
    at_once = {
        "provision": (AE, "provisioning"),
        "stop": (200, "stopped"),
        "sleep": (BUSY, "provisioning"),
        "keep-alive": (200, "provisioning"),
        "admit": ("engine_provisioning", "provisioning"),
        "destroy": (200, GONE),
    }
    for call, expected in at_once.items():
        await check(api, call, await CALLS[call](api, call), expected)
    joining = ("start", "recover", "rotate-key", "admit-provision", "admit-wake")
    joined = {call: asyncio.create_task(CALLS[call](api, call)) for call in joining}
    done, _ = await asyncio.wait(joined.values(), timeout=0.3)
    assert not done
    for call in CALLS:
        if call not in ("stop", "destroy"):
            await heal(served.deployment, ids[call])
    for call, task in joined.items():
        expected_admit = None if call.startswith("admit") else 200
        await check(api, call, await task, (expected_admit, "running"))
    for call, boot in boots.items():
        answer = await boot
        if call == "stop":
            assert error(answer) == NR
        elif call == "destroy":
            assert error(answer) in ((404, "ENGINE_NOT_FOUND"), BUSY)
        else:
            assert answer[0] == 200, (call, answer)


async def spawned(served: Served, engine_id: str) -> None:
    """The engine's process exists: from now on only its `mimic.json` changes it."""

    async def recorded() -> bool:
        return data_of(served.deployment, engine_id).with_suffix(".process").exists()

    await until(recorded)


async def test_destroying(api: Api, served: Served) -> None:
    await provision_all(api)
    hold = asyncio.Event()
    destroy = served.plane.backend.destroy

    async def held(engine_id: Any) -> None:
        await hold.wait()
        await destroy(engine_id)

    served.plane.backend.destroy = held  # type: ignore[method-assign]  # the very call that keeps the cell open
    first = {call: asyncio.create_task(CALLS["destroy"](api, call)) for call in CALLS}
    for call in CALLS:
        await reaches(api, call, "destroying")
    for call in ("provision", "start", "stop", "sleep", "recover", "keep-alive", "rotate-key"):
        await check(api, call, await CALLS[call](api, call), (BUSY, "destroying"))
    for call in ("admit", "admit-wake"):
        await check(api, call, await CALLS[call](api, call), ("engine_destroying", "destroying"))
    joined = {call: asyncio.create_task(CALLS[call](api, call)) for call in ("destroy", "admit-provision")}
    done, _ = await asyncio.wait(joined.values(), timeout=0.3)
    assert not done
    hold.set()
    destroyed = {call: await task for call, task in first.items()}
    assert {status for status, _ in destroyed.values()} == {200}
    await check(api, "destroy", await joined["destroy"], (200, GONE))
    assert (await joined["destroy"])[1] == destroyed["destroy"][1]
    await check(api, "admit-provision", await joined["admit-provision"], (None, "running"))
    _, anew = await joined["admit-provision"]
    assert anew["engine"]["engine_id"] != destroyed["admit-provision"][1]["engine_id"]


async def test_absent(api: Api) -> None:
    await check_all(
        api,
        {
            "provision": (200, "running"),
            **dict.fromkeys(
                ("start", "stop", "sleep", "recover", "keep-alive", "rotate-key", "destroy"),
                ((404, "ENGINE_NOT_FOUND"), None),
            ),
            "admit": ("engine_not_found", None),
            "admit-wake": ("engine_not_found", None),
            "admit-provision": (None, "running"),
        },
    )


async def test_a_failed_engine_is_not_woken_within_the_back_off(api: Api, served: Served) -> None:
    await api.provision("ann")
    await fail(served.deployment, api, "ann")
    await back_off_is_over(served)
    async with served.plane.database.transaction() as connection:
        await connection.execute("UPDATE engines SET restart_parked_until = now() + interval '30 s'")
    answer = await CALLS["admit-wake"](api, "ann")
    assert answer == (200, {"admitted": False, "engine": None, "reason": "engine_unhealthy"})
    assert api.last is not None
    assert 28 <= int(api.last.headers["Retry-After"]) <= 30
