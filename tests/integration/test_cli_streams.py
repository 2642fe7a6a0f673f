"""Commands that show what happens: events, logs, timelines, and the webhooks that carry events elsewhere."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.commands import Commands, line_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.conftest import Api

pytestmark = pytest.mark.timeout(600)  # many processes, each of which may wait for its turn


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    """The reference engine."""
    return variables | {"ORCH_SUBPROCESS_COMMAND": f"{shlex.quote(sys.executable)} -P -m engine"}


@pytest.fixture
def run(api: Api, tmp_path: Path) -> Commands:
    key = str(api.client.headers["x-platform-key"])
    return Commands({"ORCHESTRATOR_URL": api.url, "ORCHESTRATOR_PLATFORM_KEY": key}, tmp_path)


async def test_events(run: Commands, api: Api) -> None:
    await api.provision("ann")
    async with run.following("events", "--last-event-id", "0", "--user", "ann", "--json") as process:
        assert json.loads(await line_of(process))["action"] == "provision"
        await api.post("/engines/ann/sleep")
        slept = json.loads(await line_of(process))
        assert (slept["action"], slept["user_id"]) == ("sleep", "ann")
    async with run.following("events", "--last-event-id", str(slept["seq"])) as process:
        await api.admit("ann")
        line = await line_of(process)
        assert "wake ann" in line
    assert (await run("events", "--last-event-id", "nonsense")).code == 2


async def test_logs(run: Commands, api: Api) -> None:
    await api.provision("ann")
    shown = await run("engines", "logs", "ann", "--json")
    assert any("ready" in line["line"] for line in shown.json["lines"])
    assert "ready" in (await run("engines", "logs", "ann", "--tail", "50")).out
    assert (await run("engines", "logs", "bob")).code == 3
    async with run.following("engines", "logs", "ann", "--follow", "--tail", "1", "--json") as process:
        await line_of(process)  # it follows
        await api.post("/engines/ann/stop")
        assert json.loads(await line_of(process))["stream"] in ("stdout", "stderr")


async def test_timeline(run: Commands, api: Api) -> None:
    await api.provision("ann")
    found = (await run("engines", "timeline", "ann", "--json")).json
    assert found["operation"] == "provision"
    assert "probe" in [phase["name"] for phase in found["phases"]]
    shown = await run("engines", "timeline", "ann")
    assert shown.out.startswith("provision → running in ")
    assert "━" in shown.out


async def test_webhooks(run: Commands) -> None:
    made = (await run("webhooks", "add", "https://hooks.example.com/x", "--event", "wake", "--json")).json
    assert made["secret"]
    listed = await run("webhooks", "list", "--json")
    assert [hook["webhook_id"] for hook in listed.json["webhooks"]] == [made["webhook_id"]]
    assert made["secret"] not in listed.out
    assert "hooks.example.com" in (await run("webhooks", "list")).out
    assert (await run("webhooks", "deliveries", made["webhook_id"], "--json")).json == {"deliveries": []}
    assert (await run("webhooks", "remove", made["webhook_id"], "--yes")).code == 0
    assert (await run("webhooks", "remove", made["webhook_id"], "--yes")).code == 3
