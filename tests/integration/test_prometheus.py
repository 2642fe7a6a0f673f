"""`/prometheus`: everything from the first scrape, counted where it happens, and right with several workers."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import metrics
from tests.integration.checks import code_of
from tests.integration.conftest import ADMIN_KEY
from tests.integration.steps import until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Deployment, Served

DEADLINE_S = 60

# What dashboards and alerts are made of: name → the labels besides product and backend.
SERIES: dict[str, dict[str, tuple[str, ...]]] = {
    "orchestrator_admit_seconds_count": {"result": metrics.ADMIT_RESULTS},
    "orchestrator_admit_seconds_bucket": {"result": metrics.ADMIT_RESULTS},
    "orchestrator_provision_seconds_count": {"source": ("cold", "pool")},
    "orchestrator_wake_seconds_count": {"source": ("frozen", "stopped")},
    "orchestrator_start_seconds_count": {},
    "orchestrator_stop_seconds_count": {},
    "orchestrator_operations_total": {"operation": metrics.OPERATIONS},
    "orchestrator_health_probes_total": {"result": ("ok", "failed")},
    "orchestrator_restarts_total": {"outcome": ("started", "succeeded", "failed", "gave_up")},
    "orchestrator_rate_limited_total": {},
    "orchestrator_quota_exceeded_total": {},
    "orchestrator_lease_takeovers_total": {},
    "orchestrator_backend_calls_total": {"call": metrics.BACKEND_CALLS},
    "orchestrator_webhook_deliveries_total": {"outcome": ("delivered", "failed", "parked")},
    "orchestrator_engines": {"status": ("provisioning", "running", "sleeping", "stopped", "failed", "destroying")},
    "orchestrator_pool_engines": {},
}


class Scrape:
    """One answer, parsed."""

    def __init__(self, text: str) -> None:
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of all series of this name with these labels; fails when there is none."""
        found = [
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, f"no {name} with {labels}"
        return sum(found)


async def scrape(url: str) -> Scrape:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:  # a connection of its own: any worker's
        answer = await client.get(f"{url}/prometheus", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Scrape(answer.text)


async def test_who_may_scrape(served: Served, api: Api, admin: Api) -> None:
    answer = await admin.client.get("/prometheus")
    assert answer.status_code == 200
    await scrape(served.url)
    anybody = served.deployment.api(served.url, {})
    assert code_of(await anybody.get("/prometheus")) == (401, "INVALID_ADMIN_KEY")
    assert code_of(await api.get("/prometheus")) == (401, "INVALID_ADMIN_KEY")
    for value in ("Bearer wrong", "Bearer", f"Basic {ADMIN_KEY}", ADMIN_KEY):
        assert code_of(await anybody.get("/prometheus", headers={"Authorization": value})) == (401, "INVALID_ADMIN_KEY")
    wrong = {"Authorization": f"Bearer {ADMIN_KEY}", "X-Admin-Key": "wrong"}
    assert code_of(await anybody.get("/prometheus", headers=wrong)) == (401, "INVALID_ADMIN_KEY")


async def test_everything_is_there_from_the_first_scrape(served: Served) -> None:
    await served.deployment.product(served.url, "never-used")
    first = await scrape(served.url)
    for name, labels in SERIES.items():
        for label, values in (labels or {"product": ("never-used",)}).items():
            for value in values:
                by = {"product": "never-used", "backend": "subprocess", label: value}
                assert first.value(name, **by) == 0, (name, by)
    assert first.value("orchestrator_info", backend="subprocess") == 1
    assert first.value("orchestrator_audit_unsequenced_rows") >= 0
    assert first.value("orchestrator_audit_unsequenced_age_seconds") >= 0
    for loop in served.plane.loops.loops:

        async def measured(name: str = loop.name) -> bool:
            return any(
                sample.name == "orchestrator_loop_lag_seconds" and sample.labels["loop"] == name
                for sample in (await scrape(served.url)).samples
            )

        await until(measured, DEADLINE_S)


async def test_what_happens_is_counted(served: Served) -> None:
    api = await served.deployment.product(served.url, "counted", {"max_engines": 1, "rate_limit_rpm": 3})
    await api.provision("ann")
    await api.post("/engines/ann/stop")
    await api.post("/engines/ann/start")
    await api.post("/engines/ann/sleep")
    assert (await api.post("/engines/bob/admit", {"auto_provision": True}))[0] == 429
    assert (await api.admit("ann"))["admitted"]  # wakes
    assert (await api.admit("ann"))["admitted"]
    assert code_of(await api.post("/engines/ann/admit", {})) == (429, "RATE_LIMITED")
    assert code_of(await api.post("/engines/provision", {"user_id": "bob"})) == (429, "QUOTA_EXCEEDED")
    now = await scrape(served.url)

    def value(name: str, **labels: str) -> float:
        return now.value(f"orchestrator_{name}", product="counted", backend="subprocess", **labels)

    assert value("provision_seconds_count", source="cold") == 1
    assert value("provision_seconds_sum", source="cold") > 0
    assert value("stop_seconds_count") == value("start_seconds_count") == 1
    assert value("wake_seconds_count", source="frozen") == 1
    assert value("wake_seconds_count", source="stopped") == 0
    assert value("operations_total", operation="sleep", outcome="succeeded") == 1
    assert value("admit_seconds_count", result="running") == 1
    assert value("admit_seconds_count", result="brought_up") == 1
    assert value("admit_seconds_count", result="failed") == 1
    assert value("rate_limited_total") == 1
    assert value("quota_exceeded_total") == 2
    assert value("backend_calls_total", call="create", outcome="ok") == 1
    assert value("backend_calls_total", call="thaw", outcome="ok") >= 1
    assert value("engines", status="running") == 1
    assert now.value("orchestrator_backend_call_seconds_count", call="create") >= 1
    assert now.value("orchestrator_loop_rounds_total", loop="audit", outcome="ok") >= 1
    assert now.value("orchestrator_http_request_seconds_count", method="POST", status="4xx") >= 1

    product_id = api.headers["product_id"]
    for action in ("auto_restart_start", "auto_restart_failed", "auto_restart_gave_up"):
        await served.plane.database.execute(
            "INSERT INTO audit_log (product_id, action) VALUES ($1, $2)", product_id, action
        )

    async def restarts_counted() -> bool:
        later = await scrape(served.url)
        return all(
            later.value("orchestrator_restarts_total", product="counted", outcome=outcome) == 1
            for outcome in ("started", "failed", "gave_up")
        )

    await until(restarts_counted, DEADLINE_S)


async def test_probes_of_running_engines_are_counted(served: Served) -> None:
    api = await served.deployment.product(served.url, "probed")
    await api.provision("ann")

    async def probed() -> bool:
        now = await scrape(served.url)
        return now.value("orchestrator_health_probes_total", product="probed", result="ok") >= 1

    await served.plane.database.execute("UPDATE engines SET next_probe_at = now()")
    await until(probed, DEADLINE_S)


@pytest.mark.timeout(500)
async def test_a_scrape_covers_all_workers(deployment: Deployment) -> None:
    replica = await deployment.serve(ORCH_WORKERS="2")
    api = await deployment.product(replica.url)
    await api.provision("ann")

    async def admit(count: int) -> None:
        for _ in range(count):
            async with httpx.AsyncClient(trust_env=False, timeout=60) as client:  # whichever worker takes it
                answer = await client.post(
                    f"{replica.url}/engines/ann/admit",
                    json={},
                    headers={"X-Platform-Key": api.client.headers["x-platform-key"]},
                )
            assert answer.status_code == 200

    async def admits() -> list[float]:
        scrapes = [await scrape(replica.url) for _ in range(6)]
        return [found.value("orchestrator_admit_seconds_count", product="acme", result="running") for found in scrapes]

    await admit(30)
    assert await admits() == [30] * 6
    victim = next(
        child
        for child in psutil.Process(replica.process.pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    )
    victim.send_signal(signal.SIGKILL)  # its supervisor starts another one

    async def another_one_serves() -> bool:
        try:
            await admit(1)
        except httpx.TransportError:
            return False
        return not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE

    await until(another_one_serves, 3 * DEADLINE_S)
    counted = (await admits())[0]
    assert counted >= 30  # what the dead one had counted is not lost
    await asyncio.gather(*(admit(5) for _ in range(4)))
    assert await admits() == [counted + 20] * 6
    assert replica.stop() == 0
