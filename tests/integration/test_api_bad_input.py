"""Bad input: each kind gets its documented error, in the documented order of checks, and changes nothing."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.integration.checks import code_of, exchange, fingerprint, put_engine, put_key, request_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.conftest import Api, Served

INVALID = (400, "INVALID_REQUEST")
LIMIT = 1024 * 1024

# Every call that reads a body, and a body that is right for it.
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/engines/provision"): {"user_id": "new"},
    ("POST", "/engines/ann/admit"): {"auto_provision": False},
    ("POST", "/engines/ann/rotate-key"): {"overlap_seconds": 1},
    ("POST", "/engines/ann/keep-alive"): {"seconds": 1},
    ("POST", "/engines/ann/start"): {},
    ("POST", "/engines/ann/stop"): {},
    ("POST", "/engines/ann/sleep"): {},
    ("POST", "/engines/ann/recover"): {},
    ("POST", "/products/register"): {"slug": "new", "display_name": "New"},
    ("PUT", "/products/{product_id}/policy"): {"policy": {}},
}
NEEDED = {path for (_, path), body in BODIES.items() if body and path.rsplit("/")[-1] not in ("admit", "rotate-key")}
ON_ENGINE = (
    ("GET", ""),
    ("DELETE", ""),
    ("POST", "/admit"),
    ("POST", "/start"),
    ("POST", "/stop"),
    ("POST", "/sleep"),
    ("POST", "/recover"),
    ("POST", "/rotate-key"),
    ("POST", "/keep-alive"),
    ("GET", "/wait?status=running"),
    ("GET", "/logs"),
)


class Caller:
    """A product with a stopped engine `ann`, and the admin: one client for both."""

    def __init__(self, served: Served, api: Api) -> None:
        self.served = served
        self.api = api
        self.anybody = served.deployment.api(served.url, {})
        self.product_id = str(api.headers["product_id"])
        self.admin_key = served.plane.settings.admin_keys()[0]
        self.platform_key = str(api.client.headers["x-platform-key"])

    def headers(self, path: str) -> dict[str, str]:
        if path.startswith("/products"):
            return {"X-Admin-Key": self.admin_key}
        return {"X-Platform-Key": self.platform_key}

    async def send(
        self, method: str, path: str, content: Any = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        headers = self.headers(path) if headers is None else headers
        return await self.anybody.call(
            method, path.format(product_id=self.product_id), content=content, headers=headers
        )

    async def send_raw(self, method: str, target: str, body: bytes = b"") -> tuple[int, dict[str, str], Any]:
        return await exchange(self.served.url, request_bytes(method, target, self.headers(target), body))


@pytest.fixture
async def caller(served: Served, api: Api) -> Caller:
    await put_engine(served, api.headers["product_id"], "ann", "stopped")
    return Caller(served, api)


@asynccontextmanager
async def nothing_changes(served: Served) -> AsyncIterator[None]:
    url = served.deployment.variables["ORCH_DATABASE_URL"]
    before = await fingerprint(url)
    yield
    assert await fingerprint(url) == before


# --- bodies -------------------------------------------------------------------------------------------------


async def test_bodies_that_are_no_json_object(served: Served, caller: Caller) -> None:
    bodies = {
        "half": b'{"user_id": "a"',
        "list": b"[]",
        "null": b"null",
        "string": b'"x"',
        "number": b"1",
        "not UTF-8": b'{"user_id": "\xff\xfe"}',
        "byte order mark": b"\xef\xbb\xbf{}",
        "half a pair": b'{"user_id": "\\ud800"}',
        "lists in lists": b"[" * 100_000,
        "objects in objects": b'{"policy":' * 50_000,
        "two values": b"{} {}",
        "comment": b"{} // x",
        "form": b"user_id=ann",
    }
    async with nothing_changes(served):
        for (method, path), _ in BODIES.items():
            for kind, body in bodies.items():
                answer = await caller.send(method, path, body)
                assert code_of(answer) == INVALID, (path, kind, answer)
            if path in NEEDED:
                for body in (b"", b" \n", b"{}"):
                    assert code_of(await caller.send(method, path, body)) == INVALID, (path, body)


async def test_unknown_fields(served: Served, caller: Caller) -> None:
    async with nothing_changes(served):
        for (method, path), body in BODIES.items():
            answer = await caller.send(method, path, json.dumps(body | {"extra": 1}))
            assert code_of(answer) == INVALID, path
            assert answer[1]["error"]["details"]["field"] == "extra"
            assert answer[1]["error"]["message"] == "extra: unknown field"


@pytest.mark.parametrize(
    ("path", "field", "values"),
    [
        (
            "/engines/provision",
            "user_id",
            [
                None,
                1,
                True,
                [],
                {},
                "",
                "x" * 257,
                "𝕏" * 257,
                ".",
                "..",
                "a/b",
                "/",
                "a\nb",
                "\0",
                "\x7f",
                "\x85",
                "\x1b[0m",
            ],
        ),
        ("/engines/provision", "engine_version", [1, "", "x" * 513, "a\0b", "a\nb", [], True]),
        ("/engines/ann/admit", "auto_provision", [1, 0, "true", None, [], {}]),
        ("/engines/ann/admit", "auto_wake", [1, "yes", None]),
        ("/engines/ann/rotate-key", "overlap_seconds", [-1, 86401, 1.5, "300", True, None, 10**40]),
        ("/engines/ann/keep-alive", "seconds", [-1, 86401, 0.5, "1", True, None, 10**40, []]),
        (
            "/products/register",
            "slug",
            [None, 1, "", "A", "-a", "a_b", "a b", "é", "x" * 64, "a\n", "\0", ".", "a/b", []],
        ),
        ("/products/register", "display_name", [None, 1, "", "x" * 257, "a\0b", "a\nb", {}]),
        ("/products/register", "policy", [None, [], "{}", 1]),
    ],
)
async def test_wrong_values(served: Served, caller: Caller, path: str, field: str, values: list[Any]) -> None:
    right = BODIES["POST", path]
    async with nothing_changes(served):
        for value in values:
            if field == "engine_version" and value is None:
                continue
            answer = await caller.api.call("POST", path, {**right, field: value}, headers=caller.headers(path))
            assert code_of(answer) == INVALID, (value, answer)
            assert answer[1]["error"]["details"]["field"] == field
            assert field in answer[1]["error"]["message"]


async def test_wrong_policies(served: Served, caller: Caller) -> None:
    wrong: dict[str, list[Any]] = {
        "max_engines": [-1, 1.5, "5", True, 2**31],
        "rate_limit_rpm": [-1, 0.5, "600", False, 10**12],
        "idle_sleep_threshold_s": [-1, "5", True, [], 10**10],
        "idle_stop_threshold_s": [-0.1, "5", False],
        "engine_image": ["", 1, "a\0b", "a\nb", []],
        "engine_memory": ["", "much", 512, "-1m", "1 \0"],
        "engine_cpus": [0, -1, "1", True, 1e9],
        "allowed_images": ["x", {}, [1], ["a\0b"], [""]],
        "warm_pool": [-1, 0.5, "1", True],
        "warm_pool_frozen": [1, "yes"],
        "snapshot_interval_s": [-1, "1"],
        "snapshot_keep": [-1, 1.5],
        "snapshot_max_age_s": [-1, "1"],
        "no_such_key": [1],
    }
    headers = {"X-Admin-Key": caller.admin_key}
    path = f"/products/{caller.product_id}/policy"
    async with nothing_changes(served):
        for key, values in wrong.items():
            for value in values:
                answer = await caller.api.call("PUT", path, {"policy": {key: value}}, headers=headers)
                assert code_of(answer) == INVALID, (key, value, answer)
                assert answer[1]["error"]["details"]["field"].startswith(f"policy.{key}"), answer
                body = {"slug": "new", "display_name": "New", "policy": {key: value}}
                assert code_of(await caller.api.post("/products/register", body, headers=headers)) == INVALID
        for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
            for key in ("engine_cpus", "idle_sleep_threshold_s"):
                body_bytes = b'{"policy": {"%s": %s}}' % (key.encode(), number)
                assert code_of(await caller.send("PUT", path, body_bytes, headers)) == INVALID, (key, number)


async def test_queries(served: Served, caller: Caller) -> None:
    async with nothing_changes(served):
        for query, field in (
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("limit=-1", "limit"),
            ("limit=1.5", "limit"),
            ("limit=x", "limit"),
            ("limit=", "limit"),
            ("limit=%D9%A1", "limit"),
            ("limit=" + "9" * 5000, "limit"),
            ("offset=-1", "offset"),
            ("offset=99999999999", "offset"),
            ("offset=%00", "offset"),
            ("status=asleep", "status"),
            ("status=", "status"),
            ("status=RUNNING", "status"),
            ("status=%FF", "status"),
        ):
            answer = await caller.api.get(f"/engines?{query}")
            assert code_of(answer) == INVALID, query
            assert answer[1]["error"]["details"]["field"] == field


# --- sizes --------------------------------------------------------------------------------------------------


async def chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(0, size, 65536):
        yield b" " * 65536


async def test_huge_bodies(served: Served, caller: Caller) -> None:
    """By length and in chunks, with a key and without, also where no body is expected."""
    too_large = 413, "PAYLOAD_TOO_LARGE"
    calls = [*BODIES, ("DELETE", "/engines/ann"), ("GET", "/engines/ann"), ("POST", "/no/such/path")]
    async with nothing_changes(served):
        for method, path in calls:
            for headers in (None, {}, {"X-Platform-Key": "wrong"}):
                for content in (b" " * (LIMIT + 1), chunks(LIMIT + 65536)):
                    answer = await caller.send(method, path, content, headers)
                    assert code_of(answer) == too_large, (method, path, headers)
                    assert answer[1]["error"]["details"] == {"limit_bytes": LIMIT}
        for length in ("1048577", "99999999999999999999", "1" * 5000):
            target = "/engines/provision"
            request = request_bytes("POST", target, caller.headers(target) | {"Content-Length": length})
            status, _, body = await exchange(served.url, request)
            assert status in (400, 413)
            code_of((status, body))


async def test_a_body_of_just_the_limit_is_read(caller: Caller) -> None:
    body = b'{"user_id": "."' + b" " * (LIMIT - 16) + b"}"
    assert len(body) == LIMIT
    for content in (body, _halves(body)):
        answer = await caller.send("POST", "/engines/provision", content)
        assert code_of(answer) == INVALID
        assert answer[1]["error"]["details"]["field"] == "user_id"


async def _halves(body: bytes) -> AsyncIterator[bytes]:
    yield body[: len(body) // 2]
    yield body[len(body) // 2 :]


# --- paths --------------------------------------------------------------------------------------------------


async def test_user_ids_in_paths(served: Served, caller: Caller) -> None:
    wrong = (
        *("%00", "%0A", "a%0Db", "%1b", "%7F", "%C2%85"),
        *(".", "..", "%2e", "%2E%2e"),
        *("%FF", "%C3", "%ED%A0%80", "a%80b"),
        *("a%2Fb", "%2f", "..%2Fann", "ann%2F"),
        *("x" * 257, "%F0%9D%95%8F" * 257),
    )
    async with nothing_changes(served):
        for user_id in wrong:
            for method, path in ON_ENGINE:
                status, _, body = await caller.send_raw(method, f"/engines/{user_id}{path}")
                assert code_of((status, body)) == INVALID, (method, user_id, path, body)
                assert body["error"]["details"]["field"] == "user_id"


async def test_an_escaped_slash_leads_to_no_other_route(served: Served, caller: Caller) -> None:
    async with nothing_changes(served):
        for method, target in (
            ("POST", "/engines/ann%2Fstart"),
            ("POST", "/engines%2Fann/start"),
            ("POST", "/engines/ann%2fadmit"),
            ("POST", "/engines/x%2F..%2Fann/start"),
            ("DELETE", "/engines%2Fann"),
            ("GET", "/engines/ann%2Fwait?status=stopped"),
        ):
            status, _, body = await caller.send_raw(method, target)
            assert code_of((status, body))[0] in (400, 404, 405), target


async def test_paths_that_do_not_exist(served: Served, caller: Caller) -> None:
    async with nothing_changes(served):
        for target in (
            "/",
            "//",
            "/engines/",
            "//engines",
            "/engines/ann/",
            "/engines/ann/nothing",
            "/engines/ann/admit/",
            "/engines/ann/admit/again",
            f"/products/{caller.product_id}",
            "/ENGINES",
            "/status/",
            "/%",
            "/%zz",
            "/" + "a" * 5000,
        ):
            status, _, body = await caller.send_raw("GET", target)
            assert code_of((status, body))[0] in (404, 405), (target, body)
            assert status == 405 or code_of((status, body)) == (404, "NOT_FOUND")


async def test_methods(served: Served, caller: Caller) -> None:
    allowed = {
        "/engines/provision": {"POST", "GET", "DELETE"},  # a user may be called `provision`
        "/engines/ann": {"GET", "DELETE"},
        "/engines/ann/admit": {"POST"},
        "/engines/ann/start": {"POST"},
        "/engines/ann/stop": {"POST"},
        "/engines/ann/rotate-key": {"POST"},
        "/engines/ann/sleep": {"POST"},
        "/engines/ann/recover": {"POST"},
        "/engines/ann/keep-alive": {"POST"},
        "/engines/ann/wait": {"GET"},
        "/engines/ann/logs": {"GET"},
        "/engines": {"GET"},
        "/status": {"GET"},
        "/metrics": {"GET"},
        "/audit": {"GET"},
        "/events": {"GET"},
        "/webhooks": {"GET", "POST"},
        "/webhooks/x": {"DELETE"},
        "/webhooks/x/deliveries": {"GET"},
        "/products": {"GET"},
        "/products/register": {"POST", "DELETE"},  # the shape of a product's own path
        f"/products/{caller.product_id}": {"DELETE"},
        f"/products/{caller.product_id}/policy": {"PUT"},
        f"/products/{caller.product_id}/keys": {"GET", "POST"},
        f"/products/{caller.product_id}/keys/x": {"DELETE"},
        f"/products/{caller.product_id}/rotate-platform-key": {"POST"},
        "/admin/rewrap-keys": {"GET", "POST"},
        "/health": {"GET"},
    }
    async with nothing_changes(served):
        for path, methods in allowed.items():
            for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - methods:
                status, headers, body = await caller.send_raw(method, path)
                assert code_of((status, body)) == (405, "METHOD_NOT_ALLOWED"), (method, path)
                assert methods <= set(headers["allow"].split(", ")), (method, path, headers["allow"])
                assert method not in headers["allow"].split(", ")


async def test_requests_that_are_no_http(served: Served) -> None:
    async with nothing_changes(served):
        for request in (
            b"GET /engines/a b HTTP/1.1\r\nHost: x\r\n\r\n",
            "GET /engines/josé HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
            b"NOTHING\r\n\r\n",
            b"FOO / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
            b"POST /engines/provision HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"POST /engines/provision HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ):
            status, _, body = await exchange(served.url, request)
            assert code_of((status, body)) == INVALID, request


async def test_a_client_that_goes_away_in_its_body(
    served: Served, caller: Caller, capfd: pytest.CaptureFixture[str]
) -> None:
    async with nothing_changes(served):
        half = request_bytes("POST", "/engines/provision", caller.headers("/engines") | {"Content-Length": "100"})
        parts = urlsplit(served.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(half + b'{"user_id"')
        writer.write_eof()
        assert await reader.read() == b"", "nobody is left to be answered"
        writer.close()
    assert (await caller.api.get("/health"))[0] == 200
    assert "internal_error" not in "".join(capfd.readouterr())


# --- other tenants, and the order of checks ---------------------------------------------------------------------


async def test_an_engine_of_another_product_does_not_exist(served: Served, caller: Caller) -> None:
    stranger = await served.deployment.product(served.url, "stranger")
    async with nothing_changes(served):
        for method, path in ON_ENGINE:
            body = {"seconds": 1} if path == "/keep-alive" else None
            answer = await stranger.call(method, f"/engines/ann{path}", body)
            if path == "/admit":
                assert answer == (200, {"admitted": False, "engine": None, "reason": "engine_not_found"})
            else:
                assert code_of(answer) == (404, "ENGINE_NOT_FOUND"), path
                unknown = await stranger.call(method, f"/engines/eve{path}", body)
                assert unknown[1]["error"]["message"].replace("eve", "ann") == answer[1]["error"]["message"]
        assert await stranger.get("/engines") == (200, {"engines": [], "total": 0})
        assert (await stranger.get("/status"))[1]["total"] == 0


async def test_order_of_checks(served: Served, caller: Caller) -> None:
    """Size, authentication, scope, validation, existence: the first that fails is the answer."""
    reader = {"X-Platform-Key": await put_key(served, caller.product_id, "read")}
    nobody = {"X-Platform-Key": "pk-sept-nobody"}
    admin = {"X-Admin-Key": caller.admin_key}
    unauthorized = {(401, "INVALID_PLATFORM_KEY")}
    async with nothing_changes(served):
        for method, path in (("POST", "/engines/provision"), *((m, "/engines/%00" + p) for m, p in ON_ENGINE)):
            assert {code_of(await caller.send(method, path, b"{", nobody))} == unauthorized, path
            assert {code_of(await caller.send(method, path, b"{", {}))} == unauthorized, path
            expected = INVALID if method == "GET" and "wait" not in path else (403, "POLICY_DENIED")
            assert code_of(await caller.send(method, path, b"{", reader)) == expected, path
            assert code_of(await caller.send(method, path, b"{", admin)) == INVALID, "X-Product-Id is missing"
            unknown = admin | {"X-Product-Id": "0a8f1f4e-98b8-4a35-9d3c-0e8f5f5a4c11"}
            assert code_of(await caller.send(method, path, b"{", unknown)) == (404, "PRODUCT_NOT_FOUND")
        for method, path in ON_ENGINE:
            if method == "POST":
                answer = await caller.send(method, f"/engines/nobody{path}", b'{"extra": 1}')
                assert code_of(answer) == INVALID, "validation before existence"
        for path in ("/engines?limit=x", "/engines/nobody/wait?status=x"):
            assert {code_of(await caller.send("GET", path, b"", nobody))} == unauthorized
        wrong = {"X-Admin-Key": "wrong"}
        for method, path in (("POST", "/products/register"), ("PUT", "/products/x/policy")):
            assert code_of(await caller.send(method, path, b"{", wrong)) == (401, "INVALID_ADMIN_KEY")
            assert code_of(await caller.send(method, path, b"{", admin)) == INVALID, "validation before existence"
