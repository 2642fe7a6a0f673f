"""Probes, failures, restarts with back-off, giving up, and outages that must not become restart storms."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.steps import DIES_BOOTING, data_of, database, disagreements, pid_of, reaches, settled, until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Deployment, Served


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {
        "ORCH_HEALTH_CHECK_INTERVAL_S": "0.4",
        "ORCH_HEALTH_CHECK_TIMEOUT_S": "5",
        "ORCH_HEALTH_MAX_FAILURES": "3",
        "ORCH_RESTART_BACKOFF_BASE_S": "0.3",
        "ORCH_RESTART_BACKOFF_MAX_S": "2",
        "ORCH_RESTART_MAX_ATTEMPTS": "3",
    }


async def audit(deployment: Deployment, *actions: str) -> list[dict[str, Any]]:
    async with database(deployment) as connection:
        rows = await connection.fetch(
            "SELECT action, metadata, status FROM audit_log WHERE action = ANY ($1) ORDER BY id", list(actions)
        )
    return [{"action": row["action"], "status": row["status"], "metadata": json.loads(row["metadata"])} for row in rows]


async def audited(deployment: Deployment, action: str, times: int = 1) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def there() -> bool:
        found[:] = await audit(deployment, action)
        return len(found) >= times

    await until(there, 40)
    return found


async def row_of(deployment: Deployment, engine_id: str) -> dict[str, Any]:
    async with database(deployment) as connection:
        return dict(await connection.fetchrow("SELECT * FROM engines WHERE id = $1::uuid", engine_id) or {})


async def test_a_good_engine_is_probed_and_says_when(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    first = (await api.get("/engines/ann"))[1]["last_health_at"]

    async def later() -> bool:
        return bool((await api.get("/engines/ann"))[1]["last_health_at"] > first)

    await until(later)
    await api.post("/engines/ann/sleep")
    before = (await row_of(served.deployment, engine["engine_id"]))["next_probe_at"]
    async with database(served.deployment) as connection:
        await connection.execute("UPDATE engines SET next_probe_at = now()")
    await served.plane.health.round()
    row = await row_of(served.deployment, engine["engine_id"])
    assert row["next_probe_at"] != before
    assert row["consecutive_failures"] == 0, "a sleeping engine is not probed"


async def test_an_exit_counts_as_all_failures_and_is_mended(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    pid = await pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    failed = (await audited(served.deployment, "health_failed"))[0]
    assert failed["metadata"]["reason"] == "exited"
    assert any("mimic listens" in line for line in failed["metadata"]["log"])
    await audited(served.deployment, "auto_restart_success")
    await reaches(api, "ann", "running")
    _, after = await api.get("/engines/ann")
    assert [after[name] for name in ("engine_id", "url", "api_key")] == [
        engine[name] for name in ("engine_id", "url", "api_key")
    ]
    assert await pid_of(engine) != pid
    assert [entry["action"] for entry in await audit(served.deployment, "auto_restart_start")] == ["auto_restart_start"]
    assert await disagreements(served.deployment) == []


async def test_probes_that_fail_three_times_stop_it_and_start_it_again(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], fail_health=True)
    failed = (await audited(served.deployment, "health_failed"))[0]
    assert failed["metadata"]["reason"] == "unhealthy"
    assert "HTTP 500" in failed["metadata"]["message"]
    (data_of(served.deployment, engine["engine_id"]) / "mimic.json").unlink()
    await audited(served.deployment, "auto_restart_success")
    await reaches(api, "ann", "running")
    assert await disagreements(served.deployment) == []


async def test_two_failures_and_a_good_probe_change_nothing(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    pid = await pid_of(engine)
    async with database(served.deployment) as connection:

        async def good_again() -> bool:
            """A probe under way may have begun before: then once more."""
            await connection.execute("UPDATE engines SET consecutive_failures = 2 WHERE consecutive_failures = 0")
            return bool(await audit(served.deployment, "health_check"))

        await until(good_again)
    assert (await audit(served.deployment, "health_check"))[0]["metadata"]["healthy"] is True
    assert await pid_of(engine) == pid
    assert await audit(served.deployment, "health_failed") == []


async def test_restarts_end_after_the_last_attempt_until_somebody_asks(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], **DIES_BOOTING)
    os.kill(await pid_of(engine), signal.SIGKILL)
    gave_up = await audited(served.deployment, "auto_restart_gave_up")
    assert gave_up[0]["metadata"]["attempts"] == 3
    assert len(await audit(served.deployment, "auto_restart_start")) == 3
    assert len(await audit(served.deployment, "auto_restart_failed")) == 3
    await settled(served.deployment)
    assert await api.status_of("ann") == "failed"
    assert (await api.get("/status"))[1]["restarts"] == {"pending": 0, "parked": 0, "gave_up": 1}
    assert await disagreements(served.deployment) == []
    (data_of(served.deployment, engine["engine_id"]) / "mimic.json").unlink()
    assert (await api.post("/engines/ann/recover"))[0] == 200
    row = await row_of(served.deployment, engine["engine_id"])
    assert (row["restart_attempt"], row["gave_up_at"]) == (0, None)


async def test_the_back_off_doubles_with_jitter_and_has_an_end(api: Api, served: Served) -> None:
    means = served.plane.means
    await api.provision("ann")
    engine = await served.plane.registry.engines.by_user(await product_of(served), "ann")
    assert engine is not None
    from dataclasses import replace

    for attempt, least in ((0, 0.3), (1, 0.6), (2, 1.2)):
        _, delay_s = means.after_failure(replace(engine, restart_attempt=attempt))
        assert delay_s is not None
        assert least <= delay_s <= least * 1.2
    assert means.after_failure(replace(engine, restart_attempt=3))[1] is None
    assert means.after_failure(replace(engine, restart_attempt=0, first_healthy_at=None))[1] is None


async def product_of(served: Served) -> Any:
    async with database(served.deployment) as connection:
        return await connection.fetchval("SELECT id FROM products")


async def test_ten_good_minutes_forget_the_attempts(api: Api, served: Served) -> None:
    await api.provision("ann")
    async with database(served.deployment) as connection:

        async def probed_with(healthy_for: str) -> None:
            now = await connection.fetchval(
                "UPDATE engines SET restart_attempt = 2, healthy_since = now() - $1::text::interval RETURNING now()",
                healthy_for,
            )

            async def probed() -> bool:
                return bool(await connection.fetchval("SELECT last_health_at > $1 FROM engines", now))

            await until(probed)

        await probed_with("9 minutes")
        assert await connection.fetchval("SELECT restart_attempt FROM engines") == 2
        await probed_with("11 minutes")
        assert await connection.fetchval("SELECT restart_attempt FROM engines") == 0


async def test_a_stop_ends_restarts(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], **DIES_BOOTING)
    os.kill(await pid_of(engine), signal.SIGKILL)
    await audited(served.deployment, "auto_restart_failed")
    assert (await api.post("/engines/ann/stop"))[0] == 200
    assert (await row_of(served.deployment, engine["engine_id"]))["next_restart_at"] is None
    assert await api.status_of("ann") == "stopped"


async def test_an_engine_that_never_was_healthy_is_not_restarted_by_itself(
    api: Api, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIMIC_CRASH_AFTER", "0.02")
    monkeypatch.setenv("MIMIC_UNREADY_FOR", "60")
    served.plane.settings.__dict__["engine_env_passthrough"] = ("MIMIC_CRASH_AFTER", "MIMIC_UNREADY_FOR")
    assert (await api.post("/engines/provision", {"user_id": "ann"}))[0] == 502
    async with database(served.deployment) as connection:
        row = await connection.fetchrow("SELECT status, next_restart_at, gave_up_at FROM engines")
    assert row is not None
    assert tuple(row) == ("failed", None, None)


async def test_an_outage_parks_restarts_instead_of_a_storm(api: Api, served: Served) -> None:
    deployment = served.deployment
    engines = [await api.provision(f"user-{n}") for n in range(6)]
    for engine in engines:
        deployment.mimic_flags(engine["engine_id"], fail_health=True)
    parked = await audited(deployment, "auto_restart_parked")
    assert parked[0]["metadata"]["engines"] >= 5
    await audited(deployment, "health_failed", 6)
    await settled(deployment)
    status = (await api.get("/status"))[1]
    assert status["by_status"]["failed"] == 6
    assert status["restarts"]["parked"] == 6
    assert await audit(deployment, "auto_restart_start") == []
    answer = await api.post("/engines/user-0/admit", {"auto_wake": True, "auto_provision": True})
    assert answer[1]["reason"] == "engine_unhealthy"
    assert api.last is not None
    assert int(api.last.headers["Retry-After"]) > 0
    for engine in engines:
        (data_of(deployment, engine["engine_id"]) / "mimic.json").unlink()
    async with database(deployment) as connection:  # a minute later
        await connection.execute("UPDATE engines SET restart_parked_until = now()")
    await asyncio.gather(*(reaches(api, engine["user_id"], "running") for engine in engines))
    assert await disagreements(deployment) == []


async def test_exits_are_no_outage(api: Api, served: Served) -> None:
    engines = [await api.provision(f"user-{n}") for n in range(6)]
    for engine in engines:
        os.kill(await pid_of(engine), signal.SIGKILL)
    await audited(served.deployment, "auto_restart_success", 6)
    assert await audit(served.deployment, "auto_restart_parked") == []


async def test_a_hung_engine_does_not_hold_up_the_others(api: Api, served: Served) -> None:
    hung = await api.provision("hung")
    served.deployment.mimic_flags(hung["engine_id"], health_delay=4)
    engine = await api.provision("ann")
    first = (await row_of(served.deployment, engine["engine_id"]))["last_health_at"]

    async def probed_thrice() -> bool:
        nonlocal first
        at = (await row_of(served.deployment, engine["engine_id"]))["last_health_at"]
        return bool((at - first).total_seconds() > 1)

    await until(probed_thrice)
    assert (await row_of(served.deployment, hung["engine_id"]))["consecutive_failures"] == 0


async def test_replicas_share_the_probes(deployment: Deployment) -> None:
    replicas = await asyncio.gather(deployment.serve(), deployment.serve())
    api = await deployment.product(replicas[0].url)
    engines = [await api.provision(f"user-{n}") for n in range(4)]
    for engine in engines:
        os.kill(await pid_of(engine), signal.SIGKILL)
    await audited(deployment, "auto_restart_success", 4)
    await asyncio.gather(*(reaches(api, engine["user_id"], "running") for engine in engines))
    assert len(await audit(deployment, "auto_restart_start")) == 4, "each restarted once, by one of them"
    assert len(await audit(deployment, "health_failed")) == 4
    assert await disagreements(deployment) == []


async def test_a_due_time_far_in_the_future_is_due_now(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    async with database(served.deployment) as connection:
        await connection.execute(
            "UPDATE engines SET next_probe_at = now() + interval '1 hour', last_health_at = now() - interval '1 hour'"
        )

    async def probed() -> bool:
        row = await row_of(served.deployment, engine["engine_id"])
        return bool((row["next_probe_at"] - row["last_health_at"]).total_seconds() < 60)

    await until(probed)
