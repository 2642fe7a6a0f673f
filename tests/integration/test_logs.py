"""Structured logs: a line a request with its id, and never a secret."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from tests.integration.conftest import ADMIN_KEY, MASTER_KEY

if TYPE_CHECKING:
    from tests.integration.conftest import Deployment

PASSED = "value-of-a-pass-through-variable"


async def test_no_secret_reaches_the_log(deployment: Deployment) -> None:
    deployment.variables |= {"ORCH_ENGINE_ENV_PASSTHROUGH": "LLM_API_KEY", "LLM_API_KEY": PASSED}
    replica = await deployment.serve(ORCH_LOG_LEVEL="debug")
    api = await deployment.product(replica.url)
    engine = await api.provision("ann")
    rotated = (await api.post("/engines/ann/rotate-key"))[1]["api_key"]
    await api.admit("ann")
    await api.post("/engines/ann/stop")
    await api.post("/engines/ann/stop")
    await api.post("/engines/provision", {"user_id": "ann"}, headers={"X-Request-Id": "one-of-mine"})
    await api.get("/engines", headers={"X-Platform-Key": "pk-sept-" + "x" * 43})
    assert replica.stop() == 0

    text = replica.log.read_text()
    for secret in (
        engine["api_key"],
        rotated,
        api.client.headers["X-Platform-Key"],
        "x" * 43,
        MASTER_KEY,
        ADMIN_KEY,
        PASSED,
    ):
        assert secret not in text
    lines = [orjson.loads(line) for line in text.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert {"POST", "GET"} <= {line["method"] for line in requests}
    assert all(line["request_id"] for line in requests)
    assert "one-of-mine" in {line["request_id"] for line in requests if line["status"] == 409}
