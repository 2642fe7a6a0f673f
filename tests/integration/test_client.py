"""Both clients against a real orchestrator with real engines; the README's backend as it stands there."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from orchestrator.client import AsyncOrchestratorClient, NotAdmitted, OrchestratorClient, errors
from tests.integration.conftest import ADMIN_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.conftest import Api, Deployment, Served

README = Path(__file__).resolve().parents[2] / "README.md"


class Blocking:
    """The blocking client, called as the asyncio one is: each call in a thread."""

    def __init__(self, client: OrchestratorClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.client, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.to_thread(member, *args, **kwargs)

        return call


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    """The reference engine, which streams turns."""
    return variables | {"ORCH_SUBPROCESS_COMMAND": f"{shlex.quote(sys.executable)} -P -m engine"}


@pytest.fixture(params=["asyncio", "blocking"])
async def client(request: pytest.FixtureRequest, api: Api) -> AsyncIterator[Any]:
    key = api.client.headers["x-platform-key"]
    if request.param == "asyncio":
        async with AsyncOrchestratorClient(api.url, platform_key=key) as made:
            yield made
    else:
        with OrchestratorClient(api.url, platform_key=key) as blocking:
            yield Blocking(blocking)


async def said(engine: Any, message: str) -> str:
    """One turn with either twin's engine."""
    turn = engine.execute(message)
    if hasattr(turn, "__aiter__"):
        return "".join([event.text async for event in turn])
    return await asyncio.to_thread(lambda: "".join(event.text for event in turn))


async def test_life_of_an_engine(client: Any) -> None:
    with pytest.raises(errors.EngineNotFound) as caught:
        await client.engine("ann")
    assert caught.value.status == 404
    assert caught.value.request_id
    refused = await client.admit("ann")
    assert (refused.admitted, refused.reason) == (False, "engine_not_found")
    with pytest.raises(NotAdmitted, match="engine_not_found"):
        refused.engine.execute("Hello")

    made = await client.provision("ann", idempotency_key="once")
    assert made == await client.provision("ann", idempotency_key="once")
    with pytest.raises(errors.EngineAlreadyExists):
        await client.provision("ann")
    with pytest.raises(errors.IdempotencyConflict):
        await client.provision("bob", idempotency_key="once")

    admission = await client.admit("ann", auto_wake=True)
    assert (admission.url, admission.api_key) == (made.url, made.api_key)
    assert "You said: Hello" in await said(admission.engine, "Hello")
    assert "turn 2 of this task" in await said(admission, "Again")

    assert (await client.sleep("ann")).status == "sleeping"
    woken = await client.admit("ann", auto_wake=True)
    assert "turn 3 of this task" in await said(woken.engine, "Awake?")
    rotated = await client.rotate_key("ann", overlap_seconds=0)
    with pytest.raises(errors.EngineFailure) as failure:
        await said(woken.engine, "With the old key")
    assert failure.value.status == 401
    assert rotated.api_key == (await client.engine("ann")).api_key

    assert (await client.keep_alive("ann", 60)).keep_alive_until is not None
    assert (await client.stop("ann")).status == "stopped"
    assert (await client.wait("ann", "stopped", timeout_s=30)).status == "stopped"
    with pytest.raises(errors.WaitTimeout) as waited:
        await client.wait("ann", "running", timeout_s=0)
    assert waited.value.details["status"] == "stopped"
    assert (await client.start("ann")).status == "running"
    listed = await client.engines(status="running", limit=10)
    assert [engine.user_id for engine in listed.engines] == ["ann"]
    assert (await client.status()).by_status["running"] == 1
    assert (await client.metrics()).total_provisions == 1
    assert (await client.health()).status == "ok"
    destroyed = await client.destroy("ann")
    assert (destroyed.status, destroyed.engine_id) == ("destroyed", made.engine_id)


async def test_a_user_id_of_every_kind(client: Any) -> None:
    for user_id in ("ann@example.com", "a b", "ü?#%&=+", "provision"):
        assert (await client.provision(user_id)).user_id == user_id
        assert (await client.engine(user_id)).user_id == user_id
        await client.destroy(user_id)


async def test_admin_calls(served: Served, api: Api) -> None:
    async with AsyncOrchestratorClient(served.url, admin_key=ADMIN_KEY) as admin:
        made = await admin.register_product("new", "New", policy={"max_engines": 1})
        assert made.platform_api_key not in repr(made)
        with pytest.raises(errors.ProductSlugExists):
            await admin.register_product("new", "New")
        assert await admin.replace_policy(made.product_id, {"max_engines": 2}) == {"max_engines": 2}
        with pytest.raises(errors.InvalidRequest) as caught:
            await admin.replace_policy(made.product_id, {"nonsense": 2})
        assert "nonsense" in caught.value.details["field"]
        assert (await admin.status()).products == []
    async with AsyncOrchestratorClient(served.url, admin_key=ADMIN_KEY, product_id=made.product_id) as acting:
        await acting.provision("ann")
        admission = await acting.admit("ann")
        assert admission.admitted
        with pytest.raises(NotAdmitted, match="platform key"):
            admission.api_key  # noqa: B018 - raises
    async with AsyncOrchestratorClient(served.url, platform_key="pk-sept-wrong") as wrong:
        with pytest.raises(errors.InvalidPlatformKey):
            await wrong.engines()
        with pytest.raises(errors.InvalidAdminKey):
            await wrong.register_product("other", "Other")


async def test_all_engines_comes_page_by_page(api: Api) -> None:
    async with AsyncOrchestratorClient(api.url, platform_key=api.client.headers["x-platform-key"]) as client:
        await asyncio.gather(*(client.provision(f"user-{number}") for number in range(3)))
        assert {engine.user_id async for engine in client.all_engines()} == {"user-0", "user-1", "user-2"}


async def test_provision_outlives_the_replica_that_was_asked(deployment: Deployment) -> None:
    """The answer is lost with the replica; the same key asks the next one, and there is one engine."""
    first, second = await deployment.serve(), await deployment.serve()
    api = await deployment.product(second.url)
    sent = asyncio.Event()

    class Balancer(httpx.AsyncHTTPTransport):
        """The first replica while it lives, then the second."""

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            url = first.url if first.process.poll() is None else second.url
            request.url = request.url.copy_with(port=httpx.URL(url).port)
            sent.set()
            return await super().handle_async_request(request)

    async with httpx.AsyncClient(transport=Balancer()) as http:
        client = AsyncOrchestratorClient(first.url, platform_key=api.client.headers["x-platform-key"], http=http)
        provisioning = asyncio.create_task(client.provision("ann"))
        await sent.wait()
        await asyncio.to_thread(first.kill)
        made = await asyncio.wait_for(provisioning, 90)
        assert made.status == "running"
        assert (await client.engines()).total == 1


async def test_the_backend_in_the_readme(served: Served, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text(encoding="utf-8").partition("## In your backend")[2]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    monkeypatch.setenv("ORCHESTRATOR_URL", served.url)
    monkeypatch.setenv("ORCHESTRATOR_PLATFORM_KEY", api.client.headers["x-platform-key"])
    backend: dict[str, Any] = {"__name__": "backend"}
    exec(compile(block[1], str(README), "exec"), backend)
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(backend["app"]), base_url="http://backend") as user:
            answer = await user.post("/chat/ann", params={"message": "Hello, engine"}, timeout=60)
        assert answer.status_code == 200
        assert "You said: Hello, engine" in answer.text
    finally:
        await backend["orchestrator"].aclose()
