"""`GET /events`: in order and without a gap, whatever happens to readers, replicas and sequencers."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import httpx
import pytest
from httpx_sse import aconnect_sse

from orchestrator.api import streams
from orchestrator.api.routes import events
from orchestrator.registry.database import sql
from tests.integration.checks import code_of, database
from tests.integration.steps import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from httpx_sse import ServerSentEvent

    from tests.integration.conftest import Api, Deployment, Served

DEADLINE_S = 60


async def read(api: Api, count: int, after: int | None = None) -> list[ServerSentEvent]:
    """Connect, and read until `count` events have come."""
    async with asyncio.timeout(DEADLINE_S):
        return [event async for event in take(api, count, after)]


async def take(api: Api, count: int, after: int | None = None) -> AsyncIterator[ServerSentEvent]:
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    async with aconnect_sse(api.client, "GET", "/events", headers=headers) as source:
        assert source.response.status_code == 200
        if count:
            async for event in source.aiter_sse():
                yield event
                count -= 1
                if not count:
                    return


async def insert(served: Served, count: int, product_id: str | None = None, size: int = 0) -> None:
    for number in range(count):
        await served.plane.registry.audit.insert(
            action="health_check",
            product_id=None if product_id is None else UUID(product_id),
            metadata={"number": number, "filling": "x" * size},
        )


async def listening(served: Served, count: int = 1) -> None:
    async def connected() -> bool:
        return served.plane.notifications.audit_subscribers == count

    await until(connected, DEADLINE_S)


async def sequenced(served: Served) -> None:
    async def all_placed() -> bool:
        return not (await served.plane.registry.audit.unsequenced())[0]

    await until(all_placed, DEADLINE_S)


async def test_events_come_as_they_happen(served: Served, api: Api) -> None:
    await sequenced(served)
    reading = asyncio.create_task(read(api, 3))
    await listening(served)
    engine = await api.provision("ann")
    await api.post("/engines/ann/stop")
    await api.call("DELETE", "/engines/ann")
    received = await reading
    assert [event.event for event in received] == ["provision", "stop", "destroy"]
    data = [event.json() for event in received]
    assert [event.id for event in received] == [str(body["seq"]) for body in data] == ["2", "3", "4"]
    assert list(data[0]) == ["seq", "timestamp", "action", "user_id", "engine_id", "status", "metadata"]
    assert data[0]["engine_id"] == engine["engine_id"]
    assert [(body["action"], body["user_id"], body["status"]) for body in data] == [
        ("provision", "ann", "running"),
        ("stop", "ann", "stopped"),
        ("destroy", "ann", "destroyed"),
    ]


async def test_a_reader_goes_on_where_it_was(served: Served, api: Api) -> None:
    await insert(served, 9, str(api.headers["product_id"]))
    first = await read(api, 4, 0)
    rest = await read(api, 6, int(first[-1].id))
    assert [int(event.id) for event in first + rest] == list(range(1, 11))
    assert [event.json() for event in await read(api, 10, 0)] == [event.json() for event in first + rest]
    # Ids of a database that was restored since: what comes next is new.
    reading = asyncio.create_task(read(api, 1, 10**17))
    await listening(served)
    await insert(served, 1, str(api.headers["product_id"]))
    assert [event.id for event in await reading] == ["11"]
    for bad in ("x", "-1", "1" * 19):
        assert code_of(await api.get("/events", headers={"Last-Event-ID": bad})) == (400, "INVALID_REQUEST")


async def test_the_admin_key_reads_all_products_in_one_order(served: Served, api: Api, admin: Api) -> None:
    other = await served.deployment.product(served.url, "other")
    mine, theirs = str(api.headers["product_id"]), str(other.headers["product_id"])
    for _ in range(3):
        await asyncio.gather(insert(served, 5, mine), insert(served, 5, theirs), insert(served, 5))
    await sequenced(served)
    received = await read(admin, 20, 0)
    received += await read(admin, 27, int(received[-1].id))
    assert [int(event.id) for event in received] == list(range(1, 48))
    by_product: dict[str | None, list[int]] = {mine: [], theirs: [], None: []}
    for event in received:
        body = event.json()
        assert body["seq"] == int(event.id)
        if event.event == "health_check":
            by_product[body["product_id"]].append(body["metadata"]["number"])
    assert set(by_product) == {mine, theirs, None}
    for numbers in by_product.values():
        assert numbers == [0, 1, 2, 3, 4] * 3
    as_mine = await read(served.deployment.admin(served.url, mine), 16, 0)
    assert [event.id for event in as_mine] == [event.id for event in await read(api, 16, 0)]
    assert {event.json().get("product_id") for event in as_mine} == {None}


@pytest.mark.timeout(300)
async def test_no_gap_across_reconnects_replicas_and_killed_sequencers(deployment: Deployment) -> None:
    """Rows are committed out of order all the while; the reader changes replicas, and two are killed."""
    replicas = [await deployment.serve(), await deployment.serve()]
    product = await deployment.product(replicas[0].url)
    product_id = UUID(str(product.headers["product_id"]))
    total = 240
    insert_row = "INSERT INTO audit_log (product_id, action, metadata) VALUES ($1, 'health_check', $2)"

    async def write(writer: int) -> None:
        async with database(deployment.variables["ORCH_DATABASE_URL"]) as connection:
            for number in range(total // 8):
                async with connection.transaction():
                    await connection.execute(insert_row, product_id, {"writer": writer, "number": number})
                    await asyncio.sleep(0.002 * (writer % 4))  # its id is older than those committed meanwhile
                await asyncio.sleep(0.03)

    writers = [asyncio.create_task(write(writer)) for writer in range(8)]
    received: list[dict[str, Any]] = []
    after = 0
    turn = 0
    async with asyncio.timeout(200):
        while len(received) < total + 1:
            turn += 1
            if turn in (4, 9):
                replicas.pop(0).kill()
                replicas.append(await deployment.serve())
            api = deployment.api(replicas[turn % 2].url, {"X-Platform-Key": product.client.headers["x-platform-key"]})
            wanted = min(7 + 3 * turn, total + 1 - len(received))
            async for event in take(api, wanted, after):
                received.append(event.json())
                after = int(event.id)
    await asyncio.gather(*writers)
    assert turn >= 9, "the kills did not happen"
    assert [body["seq"] for body in received] == list(range(1, total + 2))
    numbers: dict[int, list[int]] = {}
    for body in received[1:]:
        numbers.setdefault(body["metadata"]["writer"], []).append(body["metadata"]["number"])
    assert {tuple(found) for found in numbers.values()} == {tuple(range(total // 8))}
    assert len(numbers) == 8


async def test_a_sequencer_that_stands_still_is_cut_off(served: Served, api: Api) -> None:
    product_id = str(api.headers["product_id"])
    await sequenced(served)
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as stuck:
        await stuck.execute("BEGIN")
        while not await stuck.fetchval(sql("lock_chain"), product_id):  # the real one has it just now
            await stuck.execute("ROLLBACK; BEGIN")
        await stuck.execute("SET LOCAL idle_in_transaction_session_timeout = '1s'")  # 10 s in the query
        await insert(served, 1, product_id)
        assert [event.id for event in await read(api, 1, 1)] == ["2"]
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
            await stuck.fetchval("SELECT 1")


async def test_streams_end_in_order_when_the_server_stops(deployment: Deployment) -> None:
    replica = await deployment.serve()
    api = await deployment.product(replica.url)
    received = []
    async with aconnect_sse(api.client, "GET", "/events", headers={"Last-Event-ID": "0"}) as source:
        async for event in source.aiter_sse():  # a connection that was torn down would raise
            received.append(event.event)
            stopping = asyncio.create_task(asyncio.to_thread(replica.stop))
    assert received == ["policy_register"]
    assert await stopping == 0


async def test_a_reader_that_takes_nothing_is_cut_off(
    served: Served, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SEND_TIMEOUT_S", 0.5)
    parts = urlsplit(served.url)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((parts.hostname, parts.port))
    key = api.client.headers["x-platform-key"]
    slow.sendall(f"GET /events HTTP/1.1\r\nHost: x\r\nLast-Event-ID: 0\r\nX-Platform-Key: {key}\r\n\r\n".encode())
    await listening(served)
    await insert(served, 400, str(api.headers["product_id"]), size=30_000)
    await listening(served, 0)
    slow.close()
    assert len(await read(api, 401, 0)) == 401  # others are served


async def test_a_revoked_key_ends_its_stream(
    served: Served, api: Api, admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "ALLOWED_S", 0)
    reading = asyncio.create_task(read(api, 1000))
    await listening(served)
    path = f"/products/{api.headers['product_id']}"
    await admin.post(f"{path}/rotate-platform-key", {"overlap_seconds": 0})
    received = await reading
    assert {event.event for event in received} <= {"policy_register", "key_issue", "key_revoke"}


async def test_the_number_of_streams_is_bounded(served: Served, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_STREAMS", 1)
    async with api.client.stream("GET", "/events") as stream:
        assert stream.status_code == 200
        await listening(served)
        assert code_of(await api.get("/events")) == (429, "RATE_LIMITED")
    await listening(served, 0)
    assert len(await read(api, 1, 0)) == 1


async def test_who_may_read(served: Served, api: Api) -> None:
    anybody = served.deployment.api(served.url, {})
    assert code_of(await anybody.get("/events")) == (401, "INVALID_PLATFORM_KEY")
    other = await served.deployment.product(served.url, "other")
    assert [json.loads(event.data)["metadata"]["slug"] for event in await read(other, 1, 0)] == ["other"]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(other, 2, 0), 1)  # nothing of another product
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"{served.url}/events", headers={"X-Admin-Key": "wrong"})
        assert answer.status_code == 401
