"""Webhooks: signed, in order, at least once; retried, parked, bounded; and never into private networks."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from aiohttp import web
from cryptography.fernet import Fernet

from orchestrator import webhooks
from orchestrator.keys import KeyRing
from orchestrator.registry.rows import Attempt
from orchestrator.registry.webhooks import KEPT_DELIVERIES, MAX_WEBHOOKS
from orchestrator.webhooks import signature
from tests.integration.checks import code_of, database
from tests.integration.steps import accepted, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.integration.conftest import Api, Deployment, Served

NOBODY = "0a8f1f4e-98b8-4a35-9d3c-0e8f5f5a4c11"
DEADLINE_S = 60.0


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {"ORCH_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.0/8"}


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "retry_delay_s", lambda attempts: 0.01 * attempts)


@dataclass
class Receiver:
    """An HTTP server that keeps what it is sent; `status_of` decides the answer."""

    url: str = ""
    received: list[tuple[dict[str, str], bytes, dict[str, Any]]] = field(default_factory=list)
    status_of: Callable[[dict[str, Any]], int] = lambda _event: 204

    @property
    def seqs(self) -> list[int]:
        return [event["seq"] for _, _, event in self.received]

    async def has(self, *seqs: int) -> None:
        async def all_there() -> bool:
            return set(seqs) <= set(self.seqs)

        try:
            await until(all_there, DEADLINE_S)
        except TimeoutError:
            raise AssertionError(f"received {self.seqs}, not {seqs}") from None

    async def handle(self, request: web.Request) -> web.Response:
        event = await request.json()
        self.received.append((dict(request.headers), await request.read(), event))
        status = self.status_of(event)
        headers = {"Location": f"{self.url}/elsewhere"} if 300 <= status < 400 else {}
        return web.Response(status=status, headers=headers)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    receiver.url = f"http://{host}:{port}"
    try:
        yield receiver
    finally:
        await runner.cleanup()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


async def hook(api: Api, receiver: Receiver, *events: str) -> dict[str, Any]:
    status, body = await api.post("/webhooks", {"url": f"{receiver.url}/hook", "events": list(events)})
    assert status == 200, body
    return dict(body)


async def insert(served: Served, api: Api, *actions: str) -> None:
    for action in actions:
        await served.plane.registry.audit.insert(action=action, product_id=UUID(str(api.headers["product_id"])))


async def placed(served: Served) -> None:
    async def all_placed() -> bool:
        return not (await served.plane.registry.audit.unsequenced())[0]

    await until(all_placed, DEADLINE_S)


async def deliveries(api: Api, webhook: dict[str, Any]) -> list[dict[str, Any]]:
    status, body = await api.get(f"/webhooks/{webhook['webhook_id']}/deliveries")
    assert status == 200, body
    found: list[dict[str, Any]] = body["deliveries"]
    return found


async def test_events_are_delivered_signed_and_in_order(served: Served, api: Api, receiver: Receiver) -> None:
    await placed(served)
    webhook = await hook(api, receiver)
    engine = await api.provision("ann")
    await api.post("/engines/ann/stop")
    await insert(served, api, "wake", "start", "stop")
    await receiver.has(2, 3, 4, 5, 6)
    assert receiver.seqs == [2, 3, 4, 5, 6]
    for headers, body, event in receiver.received:
        timestamp = int(headers["X-Orchestrator-Signature"].partition(",")[0].removeprefix("t="))
        assert headers["X-Orchestrator-Signature"] == signature(webhook["secret"], timestamp, body)
        assert headers["X-Orchestrator-Event"] == event["action"]
        assert headers["X-Orchestrator-Delivery"] == f"{webhook['webhook_id']}:{event['seq']}"
        assert headers["Content-Type"] == "application/json"
        assert list(event) == ["seq", "timestamp", "action", "user_id", "engine_id", "status", "metadata"]
    first = receiver.received[0][2]
    assert (first["action"], first["user_id"], first["engine_id"]) == ("provision", "ann", engine["engine_id"])

    async def all_recorded() -> bool:
        return len(await deliveries(api, webhook)) == 5

    await until(all_recorded, DEADLINE_S)
    newest = (await deliveries(api, webhook))[0]
    assert (newest["seq"], newest["delivery_id"]) == (6, f"{webhook['webhook_id']}:6")
    assert (newest["status"], newest["attempts"], newest["response_status"]) == ("delivered", 1, 204)
    assert (newest["error"], newest["next_attempt_at"]) == (None, None)
    status, listed = await api.get("/webhooks")
    assert status == 200
    assert listed["webhooks"] == [{name: value for name, value in webhook.items() if name != "secret"}]
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        assert webhook["secret"] not in str(await connection.fetch("SELECT * FROM webhooks"))


async def test_only_the_events_that_are_wanted(served: Served, api: Api, receiver: Receiver) -> None:
    async with receiving() as everything:
        await hook(api, receiver, "stop", "wake", "stop")
        await hook(api, everything, "*")
        other = await served.deployment.product(served.url, "other")
        await insert(served, other, "stop")
        await placed(served)
        await insert(served, api, "start", "stop", "sleep", "wake", "sleep", "stop")
        await receiver.has(3, 5, 7)
        assert receiver.seqs == [3, 5, 7]
        await everything.has(2, 3, 4, 5, 6, 7)
        answer = await api.post("/webhooks", {"url": f"{receiver.url}/hook", "events": ["wake", "wakeup"]})
        assert code_of(answer) == (400, "INVALID_REQUEST")
        assert "'wakeup'" in answer[1]["error"]["message"]


async def test_a_failure_is_tried_again_and_holds_back_what_follows(
    served: Served, api: Api, receiver: Receiver
) -> None:
    failing = 4

    def status_of(event: dict[str, Any]) -> int:
        nonlocal failing
        if event["action"] == "stop" and failing:
            failing -= 1
            return 302 if failing == 2 else 500
        return 200

    receiver.status_of = status_of
    await placed(served)
    webhook = await hook(api, receiver)
    await insert(served, api, "start", "stop", "wake")
    await receiver.has(4)
    assert receiver.seqs == [2, 3, 3, 3, 3, 3, 4]  # no redirect was followed, either

    async def recorded() -> bool:
        found = {delivery["seq"]: delivery for delivery in await deliveries(api, webhook)}
        return {seq: (found[seq]["status"], found[seq]["attempts"]) for seq in found} == {
            2: ("delivered", 1),
            3: ("delivered", 5),
            4: ("delivered", 1),
        }

    await until(recorded, DEADLINE_S)


async def test_an_event_of_a_day_ago_is_parked_after_some_attempts(
    served: Served, api: Api, receiver: Receiver
) -> None:
    receiver.status_of = lambda event: 503 if event["action"] == "stop" else 200
    await placed(served)
    webhook = await hook(api, receiver)
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute(
            "INSERT INTO audit_log (product_id, action, timestamp) VALUES ($1, 'stop', $2)",
            UUID(str(api.headers["product_id"])),
            datetime.now(UTC) - timedelta(hours=25),
        )
    await placed(served)
    await insert(served, api, "wake")
    await receiver.has(3)
    assert receiver.seqs == [2] * webhooks.LEAST_ATTEMPTS + [3]

    async def recorded() -> bool:
        return len(await deliveries(api, webhook)) == 2

    await until(recorded, DEADLINE_S)
    parked = (await deliveries(api, webhook))[1]
    assert (parked["seq"], parked["status"], parked["attempts"]) == (2, "parked", webhooks.LEAST_ATTEMPTS)
    assert (parked["response_status"], parked["error"]) == (503, "HTTP 503")


async def test_a_receiver_that_is_away_gets_everything_later(served: Served, api: Api) -> None:
    await placed(served)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        status, webhook = await api.post("/webhooks", {"url": f"http://127.0.0.1:{port}/hook"})
        assert status == 200
        await insert(served, api, "start", "stop")

        async def tried() -> bool:
            found = await deliveries(api, webhook)
            return bool(found) and found[0]["attempts"] >= 2

        await until(tried, DEADLINE_S)
    (waiting,) = await deliveries(api, webhook)
    assert (waiting["seq"], waiting["status"], waiting["response_status"]) == (2, "pending", None)
    assert waiting["error"] == "connection refused"
    assert waiting["next_attempt_at"] is not None
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    try:
        await receiver.has(2, 3)
        assert receiver.seqs == [2, 3]
    finally:
        await runner.cleanup()


@pytest.mark.timeout(240)
async def test_every_event_arrives_though_workers_are_killed(deployment: Deployment, receiver: Receiver) -> None:
    replicas = [await deployment.serve(), await deployment.serve()]
    api = await deployment.product(replicas[0].url)
    await hook(api, receiver)
    async with database(deployment.variables["ORCH_DATABASE_URL"]) as connection:
        for number in range(60):
            await connection.execute(
                "INSERT INTO audit_log (product_id, action) VALUES ($1, 'health_check')",
                UUID(str(api.headers["product_id"])),
            )
            if number in (20, 40):
                await receiver.has(number // 2)
                replicas.pop(0).kill()
                # Its lease would run out by itself; a minute is long for a test.
                await connection.execute("UPDATE webhooks SET lease_until = now()")
                replicas.append(await deployment.serve())
        await receiver.has(*range(2, 62))
    in_order = list(dict.fromkeys(receiver.seqs))
    assert in_order == sorted(in_order)


async def test_a_worker_whose_lease_is_gone_changes_nothing(served: Served, api: Api, receiver: Receiver) -> None:
    registry = served.plane.registry.webhooks
    await placed(served)
    await served.plane.loops.stop()
    await hook(api, receiver)
    await insert(served, api, "stop")
    await served.plane.registry.audit.place(str(api.headers["product_id"]), _placed)
    (stale,) = await registry.claim(lease_s=0, longest_wait_s=60, limit=5)
    (current,) = await registry.claim(lease_s=60, longest_wait_s=60, limit=5)
    assert await registry.claim(lease_s=60, longest_wait_s=60, limit=5) == []
    attempt = Attempt(2, "stop", "delivered", 200, None, 0)
    assert not await registry.record(stale, attempt, lease_s=60)
    await registry.release(stale, 2)
    assert await registry.claim(lease_s=60, longest_wait_s=60, limit=5) == []
    assert await registry.record(current, attempt, lease_s=60)
    await registry.release(current, 2)
    assert await registry.claim(lease_s=60, longest_wait_s=60, limit=5) == []


def _placed(seq: int, _hash: str, rows: list[Any]) -> list[tuple[int, int, str, str]]:
    return [(row.id, number, "", "") for number, row in enumerate(rows, seq + 1)]


async def test_the_list_of_deliveries_is_bounded(served: Served, api: Api, receiver: Receiver) -> None:
    await placed(served)
    webhook = await hook(api, receiver)
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute(
            "INSERT INTO webhook_deliveries (webhook_id, seq, action, status, attempts, first_attempt_at, "
            "last_attempt_at) SELECT $1, -number, 'stop', 'delivered', 1, now(), now() "
            "FROM generate_series(1, 500) number",
            UUID(webhook["webhook_id"]),
        )
        await insert(served, api, "wake")

        async def pruned() -> bool:
            count: int = await connection.fetchval("SELECT count(*) FROM webhook_deliveries")
            return count == KEPT_DELIVERIES

        await until(pruned, DEADLINE_S)
    status, body = await api.get(f"/webhooks/{webhook['webhook_id']}/deliveries")
    assert status == 200
    assert len(body["deliveries"]) == KEPT_DELIVERIES
    assert body["deliveries"][0]["action"] == "wake"


async def test_the_number_of_webhooks_is_exact_under_concurrency(api: Api, receiver: Receiver) -> None:
    body = {"url": f"{receiver.url}/hook"}
    answers = await asyncio.gather(*(accepted(lambda: api.post("/webhooks", body)) for _ in range(MAX_WEBHOOKS + 10)))
    assert sorted(status for status, _ in answers) == [200] * MAX_WEBHOOKS + [429] * 10
    refused = next(answer for answer in answers if answer[0] == 429)
    assert code_of(refused) == (429, "QUOTA_EXCEEDED")
    webhooks_now = (await api.get("/webhooks"))[1]["webhooks"]
    assert len(webhooks_now) == MAX_WEBHOOKS
    assert (await api.call("DELETE", f"/webhooks/{webhooks_now[3]['webhook_id']}"))[0] == 200
    assert (await api.post("/webhooks", body))[0] == 200


async def test_a_deleted_webhook_is_gone_and_others_are_not_seen(served: Served, api: Api, receiver: Receiver) -> None:
    webhook = await hook(api, receiver)
    other = await served.deployment.product(served.url, "other")
    path = f"/webhooks/{webhook['webhook_id']}"
    assert (await other.get("/webhooks"))[1] == {"webhooks": []}
    for stranger, target in ((other, path), (api, f"/webhooks/{NOBODY}"), (api, "/webhooks/x")):
        assert code_of(await stranger.call("DELETE", target)) == (404, "WEBHOOK_NOT_FOUND")
        assert code_of(await stranger.get(f"{target}/deliveries")) == (404, "WEBHOOK_NOT_FOUND")
    assert await api.call("DELETE", path) == (200, {"webhook_id": webhook["webhook_id"], "status": "deleted"})
    assert code_of(await api.get(f"{path}/deliveries")) == (404, "WEBHOOK_NOT_FOUND")
    await insert(served, api, "stop")
    await placed(served)
    await served.plane.webhooks.round()
    assert set(receiver.seqs) <= {1}  # the registration, if it came before the end


# --- targets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1/hook",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]:8000/",
        "http://[::ffff:10.0.0.1]/",
        "http://0.0.0.0:8000/",
        "ftp://192.0.32.8/",
        "http://user:password@192.0.32.8/",
        "not a url",
        "",
    ],
)
async def test_targets_that_are_refused(api: Api, url: str) -> None:
    answer = await api.post("/webhooks", {"url": url})
    assert code_of(answer) == (400, "INVALID_REQUEST")
    assert answer[1]["error"]["details"]["field"] == "url"
    assert (await api.get("/webhooks"))[1] == {"webhooks": []}


def resolving(monkeypatch: pytest.MonkeyPatch, addresses: dict[str, str]) -> None:
    """Names of the test's own, as a DNS server would answer for them now."""
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo

    async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        return await real(addresses.get(host, host), port, **options)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)


async def test_a_name_is_checked_when_it_is_made_and_at_each_delivery(
    served: Served, api: Api, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = {"inside.test": "10.0.0.1", "changes.test": "192.0.32.8"}
    resolving(monkeypatch, addresses)
    port = receiver.url.rpartition(":")[2]
    answer = await api.post("/webhooks", {"url": "http://inside.test/hook"})
    assert code_of(answer) == (400, "INVALID_REQUEST")
    assert "ORCH_WEBHOOK_ALLOWED_NETWORKS" in answer[1]["error"]["message"]
    await placed(served)
    status, webhook = await api.post("/webhooks", {"url": f"http://changes.test:{port}/hook"})
    assert status == 200
    addresses["changes.test"] = "10.0.0.1"
    await insert(served, api, "stop")

    async def tried() -> bool:
        return bool(await deliveries(api, webhook))

    await until(tried, DEADLINE_S)
    assert (await deliveries(api, webhook))[0]["error"] == "the target is a private, loopback or link-local address"
    addresses["changes.test"] = "127.0.0.1"  # which is allowed here
    await receiver.has(2)


async def test_an_address_that_is_allowed_no_more_is_not_called(served: Served, api: Api, receiver: Receiver) -> None:
    await placed(served)
    webhook = await hook(api, receiver)
    served.plane.webhooks._guard._allowed.clear()
    await insert(served, api, "stop")

    async def tried() -> bool:
        return bool(await deliveries(api, webhook))

    await until(tried, DEADLINE_S)
    assert (await deliveries(api, webhook))[0]["error"] == "the target is a private, loopback or link-local address"
    assert receiver.received == []


# --- the master key -------------------------------------------------------------------------------------------


async def test_secrets_move_to_the_current_master_key(served: Served, api: Api, admin: Api, receiver: Receiver) -> None:
    plane = served.plane
    old = KeyRing([Fernet.generate_key().decode()])
    plane.keyring._by_id |= old._by_id
    webhook = await hook(api, receiver)
    ciphertext, old_id = old.encrypt(webhook["secret"])
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute("UPDATE webhooks SET secret_enc = $1, master_key_id = $2", ciphertext, old_id)
    assert await plane.registry.engines.master_key_ids() == {old_id}
    assert (await admin.post("/admin/rewrap-keys"))[1]["total"] == 1

    async def is_done() -> bool:
        return bool((await admin.get("/admin/rewrap-keys"))[1]["status"] == "done")

    await until(is_done, DEADLINE_S)
    assert await plane.registry.engines.master_key_ids() == {plane.keyring.current_id}
    await placed(served)
    await insert(served, api, "stop")
    await receiver.has(2)
    headers, body, _ = receiver.received[0]
    timestamp = int(headers["X-Orchestrator-Signature"].partition(",")[0].removeprefix("t="))
    assert headers["X-Orchestrator-Signature"] == signature(webhook["secret"], timestamp, body)
