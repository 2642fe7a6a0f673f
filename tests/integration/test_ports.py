"""Ports: unique, for life, and never one that something else holds."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.integration.conftest import port_range
from tests.integration.steps import accepts, appears, data_of, database, disagreements, error, until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Served

LOW = port_range()[0] + 400
PORTS = 4


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    passed = {"ORCH_ENGINE_ENV_PASSTHROUGH": "MIMIC_BOOT_DELAY"}
    return variables | passed | {"ORCH_PORT_MIN": str(LOW), "ORCH_PORT_MAX": str(LOW + PORTS - 1)}


def holding(port: int) -> socket.socket:
    """Something else on this host that listens there."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", port))
    held.listen()
    return held


def port_of(engine: dict[str, str]) -> int:
    port = urlsplit(engine["url"]).port
    assert port is not None
    return port


async def test_unique_and_exhausted_without_a_row(api: Api, served: Served) -> None:
    answers = await asyncio.gather(
        *(api.post("/engines/provision", {"user_id": f"user-{number}"}) for number in range(PORTS + 3))
    )
    made = [body for status, body in answers if status == 200]
    assert sorted(port_of(engine) for engine in made) == list(range(LOW, LOW + PORTS))
    assert {error(answer) for answer in answers if answer[0] != 200} == {(503, "PORT_EXHAUSTION")}
    assert (await api.get("/engines"))[1]["total"] == PORTS
    assert (await api.call("DELETE", f"/engines/{made[1]['user_id']}"))[0] == 200
    assert port_of(await api.provision("late")) == port_of(made[1])  # freed by the destroy
    assert await disagreements(served.deployment) == []


async def test_a_held_port_is_skipped(api: Api) -> None:
    with closing(holding(LOW)), closing(holding(LOW + 2)):
        assert sorted([port_of(await api.provision(name)) for name in ("ann", "bob")]) == [LOW + 1, LOW + 3]
        assert error(await api.post("/engines/provision", {"user_id": "eve"})) == (503, "PORT_EXHAUSTION")
    assert (await api.get("/engines/eve"))[0] == 404


async def test_for_life(api: Api) -> None:
    engine = await api.provision("ann")
    for call in ("stop", "start", "sleep", "start", "rotate-key"):
        assert (await api.post(f"/engines/ann/{call}"))[0] == 200
        assert (await api.get("/engines/ann"))[1]["url"] == engine["url"]


async def test_a_port_lost_while_stopped(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    await api.post("/engines/ann/stop")
    with closing(holding(port_of(engine))):
        status, started = await api.post("/engines/ann/start")
        assert status == 200
        assert port_of(started) != port_of(engine)
        assert await accepts(started, engine["api_key"])
    assert (await api.get("/engines/ann"))[1]["url"] == started["url"]
    async with database(served.deployment) as connection:
        moved = await connection.fetchval("SELECT metadata FROM audit_log WHERE action = 'port_changed'")
    assert str(port_of(engine)) in moved
    assert str(port_of(started)) in moved
    assert await disagreements(served.deployment) == []


async def test_a_port_taken_between_choice_and_use(api: Api, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknowing(port: int) -> bool:
        return True

    monkeypatch.setattr(served.plane.backend, "is_port_free", unknowing)
    with closing(holding(LOW)):
        assert port_of(await api.provision("ann")) == LOW + 1
    with ExitStack() as stack:
        for port in (LOW, LOW + 2, LOW + 3):
            stack.enter_context(closing(holding(port)))
        assert error(await api.post("/engines/provision", {"user_id": "bob"})) == (503, "PORT_EXHAUSTION")
    assert (await api.get("/engines/bob"))[0] == 404  # leaves no row
    assert await disagreements(served.deployment) == []


async def test_a_port_lost_while_the_engine_starts(api: Api, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Another deployment's engine: healthy, but with another key."""
        path = (await reader.readline()).split()[1]
        body = b'{"status": "ok"}'
        line = b"200 OK" if path == b"/health" else b"401 Unauthorized"
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (line, len(body), body))
        await writer.drain()
        writer.close()

    with monkeypatch.context() as patch:
        patch.setenv("MIMIC_BOOT_DELAY", "1")
        provisioning = asyncio.create_task(api.provision("ann"))
        engine_id = await appears(api, "ann")

        async def spawned() -> bool:
            return data_of(served.deployment, engine_id).with_suffix(".process").exists()

        await until(spawned)
    async with await asyncio.start_server(stranger, "127.0.0.1", LOW):
        engine = await provisioning
    assert port_of(engine) != LOW
    assert await accepts(engine, engine["api_key"])
    assert await disagreements(served.deployment) == []
