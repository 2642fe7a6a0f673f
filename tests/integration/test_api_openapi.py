"""The OpenAPI document is valid, says everything, and every answer is as it says."""

from __future__ import annotations

import re
from datetime import datetime
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from fastapi.openapi.models import OpenAPI

from orchestrator.api.errors import STATUS
from tests.integration.checks import database, put_engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.conftest import Api, Served

PYTHON_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
FORMATS: dict[str, Callable[[str], object]] = {"uuid": UUID, "date-time": datetime.fromisoformat}


NOBODYS_ID = UUID("0a8f1f4e-98b8-4a35-9d3c-0e8f5f5a4c11")

OTHER_CONTENT = {"/events": "text/event-stream"}


class Document:
    """Finds the operation of a call and compares its answer with what is documented."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.visited: set[tuple[str, str, int]] = set()

    def operations(self) -> list[tuple[str, str, dict[str, Any]]]:
        paths = self.document["paths"].items()
        return [(method, path, operation) for path, methods in paths for method, operation in methods.items()]

    def problem(self, value: Any, schema: dict[str, Any], where: str = "answer") -> str | None:
        """What is wrong with a value; fields that the schema does not name are wrong too."""
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/components/schemas/")
            return self.problem(value, self.document["components"]["schemas"][name], where)
        if "anyOf" in schema:
            problems = [self.problem(value, option, where) for option in schema["anyOf"]]
            return None if None in problems else " and ".join(str(problem) for problem in problems)
        if "enum" in schema and value not in schema["enum"]:
            return f"{where}: {value!r} is none of {schema['enum']}"
        kind = schema.get("type")
        if kind is None:
            return None
        if not isinstance(value, PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
            return f"{where}: {value!r} is no {kind}"
        if schema.get("format") in FORMATS:
            FORMATS[schema["format"]](value)
        if kind == "array":
            return next(filter(None, (self.problem(item, schema["items"], f"{where}[]") for item in value)), None)
        if kind == "object":
            return self._object_problem(value, schema, where)
        return None

    def _object_problem(self, value: dict[str, Any], schema: dict[str, Any], where: str) -> str | None:
        properties = schema.get("properties", {})
        if missing := set(schema.get("required", ())) - set(value):
            return f"{where}: lacks {missing}"
        for name, inner in value.items():
            inner_schema = properties.get(name, schema.get("additionalProperties", False))
            if inner_schema is False:
                return f"{where}: {name} is not documented"
            if inner_schema is not True and (problem := self.problem(inner, inner_schema, f"{where}.{name}")):
                return problem
        return None

    def check(self, method: str, path: str, status: int, body: Any) -> None:
        plain = path.partition("?")[0]
        for operation_method, template, operation in self.operations():
            # `/engines/provision` is also a user's path, for other methods.
            if operation_method == method.lower() and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), plain):
                answer = operation["responses"].get(str(status))
                assert answer is not None, f"{method} {template}: {status} is not documented: {body}"
                content = answer["content"]["application/json"]
                assert (problem := self.problem(body, content["schema"])) is None, f"{method} {template}: {problem}"
                if status >= 400 and template != "/health":
                    assert body["error"]["code"] in content["examples"], f"{method} {template}: {body}"
                self.visited.add((operation_method, template, status))
                return
        raise AssertionError(f"{method} {plain} is not documented")


class Checked:
    """A caller whose every answer is compared with the document."""

    def __init__(self, api: Api, document: Document) -> None:
        self.api = api
        self.document = document

    async def __call__(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        answer = await self.api.call(method, path, body, **options)
        self.document.check(method, path, *answer)
        assert self.api.last is not None
        if answer[0] in (429, 503):
            assert int(self.api.last.headers["retry-after"]) >= 1
        return answer


@pytest.fixture
async def document(served: Served) -> Document:
    anybody = served.deployment.api(served.url, {})
    status, body = await anybody.get("/openapi.json")
    assert status == 200
    return Document(body)


async def test_document_is_valid_and_complete(document: Document) -> None:
    body = document.document
    assert body["openapi"].startswith("3.1.")
    OpenAPI.model_validate(body)
    text = str(body)
    assert "422" not in text
    assert "HTTPValidationError" not in text
    schemas = body["components"]["schemas"]
    for reference in re.findall(r"#/components/schemas/(\w+)", text):
        assert reference in schemas
    for name in schemas:
        assert f"'#/components/schemas/{name}'" in text, f"{name} is used nowhere"
    assert set(schemas["ErrorBody"]["properties"]) == {"code", "message", "details"}
    documented = {
        "post /engines/provision",
        "delete /engines/{user_id}",
        "post /engines/{user_id}/start",
        "post /engines/{user_id}/stop",
        "post /engines/{user_id}/rotate-key",
        "get /engines/{user_id}",
        "get /engines/{user_id}/timeline",
        "post /engines/{user_id}/admit",
        "get /engines",
        "get /status",
        "get /metrics",
        "post /products/register",
        "put /products/{product_id}/policy",
        "get /health",
    }
    assert documented <= {f"{method} {path}" for method, path, _ in document.operations()}


async def test_every_operation_says_everything(document: Document) -> None:
    names = set()
    for method, path, operation in document.operations():
        assert operation["summary"]
        names.add(operation["operationId"])
        assert operation["responses"]["200"]["content"][OTHER_CONTENT.get(path, "application/json")]["schema"]
        in_path = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "path"}
        assert in_path == set(re.findall(r"\{(\w+)\}", path))
        for parameter in operation.get("parameters", []):
            assert parameter["schema"]
        for status, answer in operation["responses"].items():
            if status == "200" or path == "/health":
                continue
            content = answer["content"]["application/json"]
            assert content["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
            for code, example in content["examples"].items():
                assert STATUS[code] == int(status)
                assert document.problem(example["value"], content["schema"]) is None
            assert ("Retry-After" in answer.get("headers", {})) == (status in ("429", "503")), (method, path)
        if path != "/health":
            assert operation["security"]
            assert {"401", "413", "500", "503"} <= set(operation["responses"])
    assert len(names) == len(document.operations())


async def test_every_answer_is_as_documented(served: Served, api: Api, admin: Api, document: Document) -> None:
    call, as_admin = Checked(api, document), Checked(admin, document)
    anybody = Checked(served.deployment.api(served.url, {}), document)
    product = {"X-Product-Id": str(api.headers["product_id"])}
    policy = f"/products/{api.headers['product_id']}/policy"

    await anybody("GET", "/health")
    await as_admin("POST", "/products/register", {"slug": "new", "display_name": "New"})
    await as_admin("POST", "/products/register", {"slug": "new", "display_name": "New"})
    await as_admin("PUT", policy, {"policy": {"max_engines": 4, "idle_sleep_threshold_s": 0.5}})
    await as_admin("PUT", "/products/nobody/policy", {"policy": {}})

    await call("POST", "/engines/ann/admit", {"auto_provision": False})
    await call("POST", "/engines/provision", {"user_id": "ann"}, headers={"Idempotency-Key": "k"})
    await call("POST", "/engines/provision", {"user_id": "bob"}, headers={"Idempotency-Key": "k"})
    await call("POST", "/engines/provision", {"user_id": "ann"})
    await call("POST", "/engines/provision", {"user_id": "bob", "engine_version": "other:1"})
    for state in ("failed", "destroying"):
        await put_engine(served, str(api.headers["product_id"]), state, state)
    await call("POST", "/engines/bob/admit", {"auto_provision": True})
    await call("POST", "/engines/cid/admit", {"auto_provision": True})
    await call("POST", "/engines/provision", {"user_id": "cid"})
    await call("GET", "/engines/ann")
    await call("GET", "/engines/ann/timeline")
    await call("GET", "/engines/nobody/timeline")
    await call("GET", "/engines")
    await call("GET", "/status")
    await call("GET", "/metrics")
    for path in ("/engines", "/status", "/metrics", "/engines/ann"):
        await as_admin("GET", path)
        await as_admin("GET", path, headers=product)
    await as_admin("POST", "/engines/ann/admit", {}, headers=product)
    await as_admin("POST", "/engines/ann/rotate-key", headers=product)
    for path, body in (
        ("start", None),
        ("recover", None),
        ("keep-alive", {"seconds": 1}),
        ("keep-alive", {"seconds": 0}),
        ("rotate-key", None),
        ("sleep", None),
        ("admit", {}),
        ("keep-alive", {"seconds": 1}),
        ("start", None),
        ("stop", None),
        ("stop", None),
        ("sleep", None),
        ("admit", {}),
    ):
        await call("POST", f"/engines/ann/{path}", body)
    await call("POST", "/engines/destroying/recover")
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute("UPDATE engines SET status = 'failed' WHERE user_id = 'ann'")
    await call("POST", "/engines/ann/recover")
    await call("POST", "/engines/ann/stop")
    await as_admin("PUT", policy, {"policy": {"rate_limit_rpm": 1}})
    for _ in range(2):
        await call("POST", "/engines/ann/admit", {})
    await call("GET", "/engines/ann/logs?tail=2")
    await call("GET", "/engines/ann/logs?tail=-1")
    await call("GET", "/engines/ann/wait?status=stopped")
    await call("GET", "/engines/ann/wait?status=running&timeout_s=0")
    await call("DELETE", "/engines/ann")

    await call("GET", "/audit?limit=1")
    await call("GET", "/audit?limit=0")
    await as_admin("GET", "/audit?order=desc")
    async with api.client.stream("GET", "/events", headers={"Last-Event-ID": "0"}) as stream:
        assert stream.headers["content-type"].partition(";")[0] == "text/event-stream"
        document.visited.add(("get", "/events", stream.status_code))
    await call("GET", "/events", headers={"Last-Event-ID": "x"})
    hook = await call("POST", "/webhooks", {"url": "https://192.0.32.8/hook", "events": ["wake"]})
    await call("POST", "/webhooks", {"url": "http://127.0.0.1/hook"})
    await call("GET", "/webhooks")
    await call("GET", f"/webhooks/{hook[1]['webhook_id']}/deliveries")
    await call("DELETE", f"/webhooks/{hook[1]['webhook_id']}")
    await call("DELETE", f"/webhooks/{hook[1]['webhook_id']}")
    await as_admin("GET", "/products")
    keys = f"/products/{api.headers['product_id']}/keys"
    issued = await as_admin("POST", keys, {"scopes": ["read"], "expires_at": "2099-01-01T00:00:00Z"})
    await as_admin("GET", keys)
    await as_admin("DELETE", f"{keys}/{issued[1]['key_id']}")
    await as_admin("DELETE", f"{keys}/{issued[1]['key_id']}")
    await as_admin("POST", f"/products/{api.headers['product_id']}/rotate-platform-key")
    await as_admin("POST", "/admin/rewrap-keys")
    await as_admin("GET", "/admin/rewrap-keys")
    await as_admin("DELETE", f"/products/{api.headers['product_id']}")
    await as_admin("DELETE", f"/products/{api.headers['product_id']}?force=perhaps")
    other = await as_admin("POST", "/products/register", {"slug": "short-lived", "display_name": "Short-lived"})
    await as_admin("DELETE", f"/products/{other[1]['product_id']}?force=true")

    for method, template, operation in document.operations():
        path = re.sub(r"\{(\w+)_id\}", lambda found: "nobody" if found[1] == "user" else str(NOBODYS_ID), template)
        if template == "/health":
            continue
        await call(method.upper(), path, headers={"X-Platform-Key": "wrong"})
        await as_admin(method.upper(), path, headers={"X-Admin-Key": "wrong"})
        await call(method.upper(), path, content=b" " * (1024 * 1024 + 1))
        if "requestBody" in operation:
            caller = as_admin if template.startswith(("/products", "/admin/")) else call
            await caller(method.upper(), path, {"extra": 1})
        if "platform" in operation["security"][0]:
            await as_admin(method.upper(), path, headers={"X-Product-Id": "nobody"})
            if "{user_id}" in template:
                body = {"seconds": 1} if path.endswith("keep-alive") else None
                await call(method.upper(), f"{path}?status=running", body)

    succeeded = {(method, path) for method, path, status in document.visited if status == 200}
    everything = {(method, path) for method, path, _ in document.operations()}
    assert everything == succeeded


class Assets(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {value for name, value in attrs if name in ("src", "href") and value is not None}


async def test_docs_page_needs_nothing_from_elsewhere(served: Served) -> None:
    anybody = served.deployment.api(served.url, {})
    page = await anybody.client.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+", page.text.replace(served.url, "")), "another host is named"
    assets = Assets()
    assets.feed(page.text)
    assert len(assets.found) >= 2
    for asset in assets.found:
        assert asset.startswith("/"), asset
        fetched = await anybody.client.get(asset)
        assert fetched.status_code == 200, asset
        assert fetched.content
