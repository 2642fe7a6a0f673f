"""The client cannot drift from `/openapi.json`: each documented call is made, and its documented answers are read.

A transport stands in for the server: it answers with what the document's own schemas describe, once with every
field and once with only those that are always there.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pydantic import BaseModel

from orchestrator.api import create_app
from orchestrator.api.errors import STATUS
from orchestrator.client import AsyncAdmission, AsyncOrchestratorClient, errors
from orchestrator.control_plane import ControlPlane
from orchestrator.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

ID = "5c2f3a4e-98b8-4a35-9d3c-0e8f5f5a4c11"
WHEN = "2026-04-27T12:34:56.000Z"
NOT_OURS = {
    ("get", "/prometheus"),  # for Prometheus
    ("get", "/dashboard"),  # for a browser
}
LATER = re.compile(r"snapshot|restore|/fork|upgrade|rollout")
BEFORE_THE_SERVER = {"snapshot"}  # parameters that the client has already

Document = dict[str, Any]


async def first(stream: AsyncIterator[Any]) -> Any:
    return [item async for item in stream]


CALLS: dict[tuple[str, str], Callable[[AsyncOrchestratorClient], Any]] = {
    ("post", "/engines/provision"): lambda c: c.provision("ann", engine_version="a:1", idempotency_key="k"),
    ("get", "/engines/{user_id}"): lambda c: c.engine("ann"),
    ("delete", "/engines/{user_id}"): lambda c: c.destroy("ann", snapshot=True),
    ("post", "/engines/{user_id}/admit"): lambda c: c.admit("ann", auto_provision=True, auto_wake=True),
    ("get", "/engines/{user_id}/wait"): lambda c: c.wait("ann", "running", timeout_s=1),
    ("post", "/engines/{user_id}/start"): lambda c: c.start("ann"),
    ("post", "/engines/{user_id}/stop"): lambda c: c.stop("ann"),
    ("post", "/engines/{user_id}/sleep"): lambda c: c.sleep("ann"),
    ("post", "/engines/{user_id}/recover"): lambda c: c.recover("ann"),
    ("post", "/engines/{user_id}/keep-alive"): lambda c: c.keep_alive("ann", 60),
    ("post", "/engines/{user_id}/rotate-key"): lambda c: c.rotate_key("ann", overlap_seconds=1),
    ("get", "/engines/{user_id}/logs"): lambda c: c.logs("ann", tail=5),
    ("get", "/engines/{user_id}/timeline"): lambda c: c.timeline("ann"),
    ("get", "/engines"): lambda c: c.engines(status="running", limit=5, offset=1),
    ("get", "/status"): lambda c: c.status(),
    ("get", "/metrics"): lambda c: c.metrics(),
    ("get", "/health"): lambda c: c.health(),
    ("get", "/audit"): lambda c: c.audit(
        user_id="ann", action="wake", since=WHEN, until=WHEN, limit=5, cursor="c", order="desc"
    ),
    ("get", "/events"): lambda c: first(c.events(last_event_id=1, reconnect=False)),
    ("post", "/webhooks"): lambda c: c.create_webhook("https://example.com/hook", events=["wake"]),
    ("get", "/webhooks"): lambda c: c.webhooks(),
    ("delete", "/webhooks/{webhook_id}"): lambda c: c.delete_webhook(ID),
    ("get", "/webhooks/{webhook_id}/deliveries"): lambda c: c.webhook_deliveries(ID),
    ("post", "/products/register"): lambda c: c.register_product("a", "A", policy={}),
    ("get", "/products"): lambda c: c.products(),
    ("delete", "/products/{product_id}"): lambda c: c.delete_product(ID, force=True),
    ("put", "/products/{product_id}/policy"): lambda c: c.replace_policy(ID, {"max_engines": 1}),
    ("post", "/products/{product_id}/keys"): lambda c: c.issue_key(ID, scopes=["read"], expires_at=WHEN),
    ("get", "/products/{product_id}/keys"): lambda c: c.platform_keys(ID),
    ("delete", "/products/{product_id}/keys/{key_id}"): lambda c: c.revoke_key(ID, ID),
    ("post", "/products/{product_id}/rotate-platform-key"): lambda c: c.rotate_platform_key(ID, overlap_seconds=1),
    ("post", "/admin/rewrap-keys"): lambda c: c.start_rewrap(),
    ("get", "/admin/rewrap-keys"): lambda c: c.rewrap(),
}


@pytest.fixture(scope="module")
def document() -> Document:
    from cryptography.fernet import Fernet

    settings = load_settings(
        _env_file=None,
        database_url="postgresql://nobody@127.0.0.1/none",
        master_key=Fernet.generate_key().decode(),
        admin_key="an-admin-key-of-a-test",
    )
    return dict(create_app(ControlPlane(settings)).openapi())


def example(schema: dict[str, Any], document: Document, name: str, *, full: bool) -> Any:
    """A value as the schema describes it: with every field and no null, or with as little as it allows."""
    if "$ref" in schema:
        return example(document["components"]["schemas"][schema["$ref"].split("/")[-1]], document, name, full=full)
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        nulls = [option for option in options if option.get("type") == "null"]
        others = [option for option in options if option.get("type") != "null"]
        return None if nulls and not full else example(others[0], document, name, full=full)
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "array":
        return [example(schema["items"], document, name, full=full)]
    if kind == "object":
        fields = {
            field: example(inner, document, field, full=full)
            for field, inner in schema.get("properties", {}).items()
            if full or field in schema.get("required", ())
        }
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            fields["running"] = example(extra, document, name, full=full)
        elif extra is True:
            fields["anything"] = 1
        return fields
    if kind == "string":
        return text(schema, name)
    return {"integer": 7, "number": 7.5, "boolean": True, "null": None}.get(str(kind), "anything")


def text(schema: dict[str, Any], name: str) -> str:
    if schema.get("format") == "uuid":
        return ID
    if schema.get("format") == "date-time" or name.endswith(("_at", "_until", "timestamp")):
        return WHEN
    return "some text"


def answer_schema(operation: dict[str, Any]) -> dict[str, Any]:
    content = operation["responses"]["200"]["content"]
    chosen: dict[str, Any] = content.get("application/json") or next(iter(content.values()))
    return dict(chosen.get("schema") or chosen.get("itemSchema") or {})


def operations(document: Document) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if (method, path) not in NOT_OURS
    }


class Transport:
    """Answers every request with `body`, and keeps the request."""

    def __init__(self, body: Any, *, events: bool) -> None:
        self.requests: list[httpx.Request] = []
        self.body = body
        self.events = events

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.events:
            text = f"id: 7\nevent: wake\ndata: {json.dumps(self.body)}\n\n"
            return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})
        return httpx.Response(200, json=self.body)


async def called(key: tuple[str, str], body: Any) -> tuple[Any, httpx.Request]:
    events = key == ("get", "/events")
    transport = Transport(body, events=events)
    async with httpx.AsyncClient(transport=httpx.MockTransport(transport)) as http:
        client = AsyncOrchestratorClient("http://test", platform_key="p", admin_key="a", http=http)
        if events:
            stream = client.events(last_event_id=1)
            result: Any = await anext(stream)
        else:
            result = await CALLS[key](client)
    return result, transport.requests[0]


def plain(result: Any) -> Any:
    """What a call returned, as JSON."""
    if isinstance(result, AsyncAdmission):
        return {
            "admitted": result.admitted,
            "engine": None if result.info is None else plain(result.info),
            "reason": result.reason,
        }
    if isinstance(result, list):
        return [plain(item) for item in result]
    return result.model_dump(mode="json") if isinstance(result, BaseModel) else result


def fields(value: Any) -> Any:
    """The names of all fields, at every depth."""
    if isinstance(value, dict):
        return {name: fields(inner) for name, inner in value.items()}
    return [fields(item) for item in value] if isinstance(value, list) else None


def test_every_documented_call_has_a_method(document: Document) -> None:
    missing = {key for key in operations(document) if key not in CALLS and not LATER.search(key[1])}
    assert not missing, "give orchestrator.client a method, or name the call in NOT_OURS"


def test_every_code_has_its_class() -> None:
    assert set(STATUS) - {"CONFIGURATION_ERROR"} <= set(errors.BY_CODE)
    assert len(set(errors.BY_CODE.values())) == len(errors.BY_CODE)


@pytest.mark.parametrize("key", CALLS, ids=" ".join)
async def test_call(key: tuple[str, str], document: Document) -> None:
    operation = operations(document).get(key)
    if operation is None:
        pytest.skip("this server does not have the call")
    schema = answer_schema(operation)
    body = example(schema, document, "", full=True)
    result, request = await called(key, body)

    template = re.sub(r"\{\w+\}", "[^/]+", key[1])
    assert request.method.lower() == key[0]
    assert re.fullmatch(template, request.url.path)
    parameters = operation.get("parameters", [])
    query = {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
    if key == ("get", "/engines/{user_id}/logs"):
        query -= {"follow"}  # a method of its own
    assert set(request.url.params) <= query | BEFORE_THE_SERVER
    assert query <= set(request.url.params), "a documented parameter that the client never sends"
    for parameter in parameters:
        if parameter["in"] == "header" and parameter["name"] not in ("X-Product-Id", "traceparent", "Authorization"):
            assert parameter["name"] in request.headers
    documented = operation.get("requestBody")
    sent = json.loads(request.content) if request.content else {}
    if documented is None:
        assert not sent
    else:
        reference = documented["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        assert set(sent) == set(document["components"]["schemas"][reference]["properties"])

    if result is not None:
        got = plain(result)
        if key == ("get", "/events"):
            body["id"] = "7"
        elif not isinstance(body, dict) or not isinstance(got, dict) or key[1].endswith("/policy"):
            (body,) = body.values()  # a method that gives the list itself
        assert fields(got) == fields(body), "the model and the document have different fields"
        assert plain((await called(key, example(schema, document, "", full=False)))[0]) is not None
