"""What is tried again, how often, and what it means when it is not. No network: answers come from a transport."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from orchestrator.client import (
    AsyncOrchestratorClient,
    ConnectionFailed,
    ConnectionLost,
    OrchestratorClient,
    Retries,
    errors,
)
from orchestrator.client.calls import Call, retry_after

if TYPE_CHECKING:
    from collections.abc import Callable

ENGINE = {
    "engine_id": "5c2f3a4e-98b8-4a35-9d3c-0e8f5f5a4c11",
    "user_id": "ann",
    "status": "running",
    "url": "http://127.0.0.1:9001",
    "api_key": "sk-sept-secret",
}
STATUS = {"status": "running", "engine_id": ENGINE["engine_id"]}


def refusal(status: int, code: str, retry_after_s: str | None = "0") -> httpx.Response:
    headers = {} if retry_after_s is None else {"Retry-After": retry_after_s}
    return httpx.Response(status, json={"error": {"code": code, "message": "no"}}, headers=headers)


class Server:
    """Gives the answers one after the other, and keeps what was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **options: Any) -> OrchestratorClient:
        http = httpx.Client(transport=httpx.MockTransport(self))
        return OrchestratorClient("http://orchestrator", platform_key="pk-sept-x", http=http, **options)


def test_provision_repeats_with_the_same_idempotency_key() -> None:
    server = Server(
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        refusal(503, "BACKEND_UNAVAILABLE"),
        httpx.Response(502, text="<html>Bad gateway</html>", headers={"Retry-After": "0"}),
        httpx.Response(200, json=ENGINE),
    )
    assert server.client().provision("ann").status == "running"
    keys = {request.headers["idempotency-key"] for request in server.requests}
    assert len(server.requests) == 5
    assert len(keys) == 1
    again = Server(httpx.Response(200, json=ENGINE))
    again.client().provision("ann")
    assert again.requests[0].headers["idempotency-key"] not in keys
    given = Server(httpx.Response(200, json=ENGINE))
    given.client().provision("ann", idempotency_key="mine")
    assert given.requests[0].headers["idempotency-key"] == "mine"


async def test_the_asyncio_twin_retries_as_well() -> None:
    server = Server(httpx.ReadError("reset"), refusal(429, "RATE_LIMITED"), httpx.Response(200, json=ENGINE))
    http = httpx.AsyncClient(transport=httpx.MockTransport(server))
    client = AsyncOrchestratorClient("http://orchestrator", platform_key="pk-sept-x", http=http)
    assert (await client.provision("ann")).status == "running"
    assert len(server.requests) == 3


def test_attempts_have_an_end() -> None:
    server = Server(*(refusal(503, "DATABASE_UNAVAILABLE") for _ in range(9)))
    with pytest.raises(errors.DatabaseUnavailable):
        server.client(retries=Retries(attempts=3)).status()
    assert len(server.requests) == 3


def test_a_longer_wait_than_allowed_is_not_begun() -> None:
    server = Server(refusal(429, "RATE_LIMITED", "31"))
    with pytest.raises(errors.RateLimited) as caught:
        server.client(retries=Retries(wait_s=30)).status()
    assert caught.value.retry_after_s == 31
    assert caught.value.status == 429


@pytest.mark.parametrize(
    "code",
    ["QUOTA_EXCEEDED", "PORT_EXHAUSTION", "ENGINE_BUSY", "BOOT_TIMEOUT", "INTERNAL_ERROR", "IDEMPOTENCY_CONFLICT"],
)
def test_what_only_a_person_or_time_can_mend_is_not_repeated(code: str) -> None:
    server = Server(refusal(429, code))
    with pytest.raises(errors.BY_CODE[code]):
        server.client().provision("ann")
    assert len(server.requests) == 1


def test_a_lost_answer_to_what_must_not_happen_twice() -> None:
    calls: list[Callable[[OrchestratorClient], object]] = [
        lambda client: client.start("ann"),
        lambda client: client.stop("ann"),
        lambda client: client.destroy("ann"),
        lambda client: client.rotate_key("ann"),
        lambda client: client.register_product("a", "A"),
        lambda client: client.issue_key("a", scopes=["read"]),
    ]
    for call in calls:
        server = Server(httpx.ReadTimeout("slow"))
        with pytest.raises(ConnectionLost, match="may have been carried out"):
            call(server.client())
        assert len(server.requests) == 1


def test_what_was_never_sent_is_repeated_whatever_it_is() -> None:
    server = Server(httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), httpx.Response(200, json=STATUS))
    assert server.client().stop("ann").status == "running"
    refused = Server(*(httpx.ConnectError("Connection refused") for _ in range(2)))
    with pytest.raises(ConnectionFailed, match="No orchestrator answers at http://orchestrator") as caught:
        refused.client(retries=Retries(attempts=2)).stop("ann")
    assert not isinstance(caught.value, ConnectionLost)


def test_waits_spread_and_never_undercut_retry_after() -> None:
    class State:
        attempt_number = 3

        def __init__(self, error: Exception) -> None:
            self.outcome = asyncio.Future[None](loop=asyncio.new_event_loop())
            self.outcome.set_exception(error)

    def waits(error: Exception) -> list[float]:
        state: Any = State(error)
        found = [Retries().wait(state) for _ in range(50)]
        state.outcome.exception()
        state.outcome.get_loop().close()
        return found

    told = waits(errors.RateLimited("no", retry_after_s=7))
    assert min(told) >= 7
    assert max(told) <= 7.7
    untold = waits(httpx.ReadError("reset"))
    assert 0.4 <= min(untold) < max(untold) <= 0.8


def test_retry_after_as_number_and_as_date() -> None:
    assert retry_after({"retry-after": "12"}) == 12
    soon = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
    assert 500 < (retry_after({"retry-after": soon}) or 0) <= 600
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


# --- answers ----------------------------------------------------------------------------------------------------


def test_what_is_no_orchestrator_is_told() -> None:
    for answer in (
        httpx.Response(404, text="<html>nginx</html>"),
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, json={"total": "many"}),
        httpx.Response(302, headers={"Location": "https://elsewhere"}),
        httpx.Response(500, json=["odd"]),
    ):
        with pytest.raises(errors.UnexpectedAnswer) as caught:
            Server(answer).client().status()
        assert "\n" not in str(caught.value)


def test_an_unknown_code_is_an_api_error_with_that_code() -> None:
    server = Server(httpx.Response(418, json={"error": {"code": "TEAPOT", "message": "short", "details": {"a": 1}}}))
    with pytest.raises(errors.ApiError) as caught:
        server.client().status()
    assert (caught.value.code, caught.value.status, caught.value.details) == ("TEAPOT", 418, {"a": 1})
    assert str(caught.value) == "TEAPOT: short"


def test_keys_are_in_no_repr_and_reach_only_whom_they_are_for() -> None:
    admitted = {"admitted": True, "engine": ENGINE | {"engine_version": "a:1", **DATES}}
    turn = httpx.Response(
        200, text='event: text_delta\ndata: {"text": "Hi"}\n\n', headers={"content-type": "text/event-stream"}
    )
    server = Server(httpx.Response(200, json=admitted), turn, httpx.Response(200, json=ENGINE))
    client = server.client(admin_key="the-admin-key-of-all")
    admission = client.admit("ann", auto_provision=True)
    assert (admission.url, admission.api_key) == (ENGINE["url"], ENGINE["api_key"])
    assert [event.text for event in admission.engine.execute("Hello")] == ["Hi"]
    provisioned = client.provision("ann")
    assert provisioned.api_key == ENGINE["api_key"]
    for thing in (client, admission, admission.engine, admission.info, provisioned):
        for secret in (ENGINE["api_key"], "pk-sept-x", "the-admin-key"):
            assert secret not in repr(thing) + str(thing)
    to_engine = server.requests[1]
    assert to_engine.headers["x-engine-key"] == ENGINE["api_key"]
    assert "x-platform-key" not in to_engine.headers
    assert "x-admin-key" not in to_engine.headers
    for request in (server.requests[0], server.requests[2]):
        assert request.headers["x-platform-key"] == "pk-sept-x"
        assert "x-admin-key" not in request.headers


DATES = {"created_at": "2026-04-27T12:34:56.000Z", "last_health_at": None}


def test_an_engine_that_refuses_or_breaks_off() -> None:
    admitted = httpx.Response(200, json={"admitted": True, "engine": ENGINE | {"engine_version": "a:1", **DATES}})

    def turn(answer: httpx.Response | Exception) -> list[str]:
        server = Server(admitted, answer)
        return [event.text for event in server.client().admit("ann").execute("Hello")]

    with pytest.raises(errors.EngineFailure) as caught:
        turn(httpx.Response(409, json={"error": "TASK_BUSY", "message": "busy"}))
    assert (caught.value.code, caught.value.status, caught.value.message) == ("TASK_BUSY", 409, "busy")
    stream = {"content-type": "text/event-stream"}
    failed = 'event: error\ndata: {"error": "LLM_PROVIDER_ERROR", "message": "down", "details": {"a": 1}}\n\n'
    with pytest.raises(errors.EngineFailure) as caught:
        turn(httpx.Response(200, text=failed, headers=stream))
    assert (caught.value.code, caught.value.details) == ("LLM_PROVIDER_ERROR", {"a": 1})
    with pytest.raises(errors.EngineFailure):
        turn(httpx.Response(200, text="event: x\ndata: {\n\n", headers=stream))
    with pytest.raises(errors.EngineFailure):
        turn(httpx.Response(200, json={}))
    with pytest.raises(errors.EngineFailure):
        turn(httpx.Response(503, text="starting"))
    with pytest.raises(ConnectionLost):
        turn(httpx.ReadTimeout("slow"))
    with pytest.raises(ConnectionFailed):
        turn(httpx.ConnectError("refused"))


def test_a_refused_admission_names_its_reason() -> None:
    answer = httpx.Response(
        200, json={"admitted": False, "engine": None, "reason": "engine_unhealthy"}, headers={"Retry-After": "5"}
    )
    admission = Server(answer).client().admit("ann")
    assert (admission.admitted, admission.reason, admission.retry_after_s) == (False, "engine_unhealthy", 5)
    with pytest.raises(errors.NotAdmitted, match="engine_unhealthy"):
        admission.url  # noqa: B018 - raises
    with pytest.raises(errors.NotAdmitted):
        admission.execute("Hello")


def test_user_ids_in_paths() -> None:
    assert Call("GET", "/x").params == {}
    for user_id in ("", ".", "..", "a/b"):
        with pytest.raises(ValueError, match="user_id"):
            Server().client().stop(user_id)
    server = Server(httpx.Response(200, json=STATUS))
    server.client().stop("ann ü?#%@example.com")
    assert server.requests[0].url.raw_path == b"/engines/ann%20%C3%BC%3F%23%25%40example.com/stop"


def test_a_prefix_in_the_url_is_kept() -> None:
    server = Server(httpx.Response(200, json=STATUS))
    http = httpx.Client(transport=httpx.MockTransport(server))
    OrchestratorClient("https://host/orchestrator/", platform_key="x", http=http).stop("ann")
    assert server.requests[0].url == "https://host/orchestrator/engines/ann/stop"


# --- events -----------------------------------------------------------------------------------------------------


def stream_of(*seqs: int) -> httpx.Response:
    data = (
        f'id: {seq}\nevent: wake\ndata: {{"seq": {seq}, "timestamp": "2026-04-27T12:34:56Z", "action": "wake", '
        '"user_id": "ann", "engine_id": null, "status": null, "metadata": {}}\n\n'
        for seq in seqs
    )
    return httpx.Response(200, text=": hello\n\n" + "".join(data), headers={"content-type": "text/event-stream"})


def test_events_go_on_where_they_broke() -> None:
    server = Server(
        stream_of(1, 2), httpx.ReadError("reset"), refusal(503, "DATABASE_UNAVAILABLE"), stream_of(3), stream_of(4)
    )
    stream = server.client().events(last_event_id=0)
    assert [next(stream).seq for _ in range(4)] == [1, 2, 3, 4]
    assert [request.headers["last-event-id"] for request in server.requests] == ["0", "2", "2", "2", "3"]


def test_events_that_cannot_be_had_are_an_error() -> None:
    with pytest.raises(ConnectionFailed):
        next(Server(httpx.ConnectError("refused")).client().events())
    with pytest.raises(errors.InvalidPlatformKey):
        next(Server(refusal(401, "INVALID_PLATFORM_KEY")).client().events())
    with pytest.raises(errors.UnexpectedAnswer):
        next(Server(httpx.Response(200, text="<html>")).client().events())
    stream = Server(stream_of(1)).client().events(reconnect=False)
    assert next(stream).seq == 1
    with pytest.raises(ConnectionLost):
        next(stream)


def test_a_followed_log_is_read_line_by_line() -> None:
    lines = (
        '{"timestamp": null, "stream": "stdout", "line": "a"}\n\n{"timestamp": null, "stream": "stderr", "line": "b"}\n'
    )
    server = Server(httpx.Response(200, text=lines))
    assert [line.line for line in server.client().follow_logs("ann", tail=5)] == ["a", "b"]
    assert dict(server.requests[0].url.params) == {"tail": "5", "follow": "true"}
    with pytest.raises(errors.UnexpectedAnswer):
        list(Server(httpx.Response(200, text='{"stream": "std')).client().follow_logs("ann"))
    with pytest.raises(errors.EngineNotFound):
        list(Server(refusal(404, "ENGINE_NOT_FOUND")).client().follow_logs("ann"))


def test_a_long_wait_is_several_calls() -> None:
    body = ENGINE | {"engine_version": "a:1", **DATES}
    server = Server(refusal(408, "WAIT_TIMEOUT", None), httpx.Response(200, json=body))
    assert server.client().wait("ann", "running", timeout_s=400).status == "running"
    assert [request.url.params["timeout_s"] for request in server.requests] == ["300.0", "100.0"]
    with pytest.raises(errors.WaitTimeout):
        Server(refusal(408, "WAIT_TIMEOUT", None)).client().wait("ann", "running", timeout_s=300)
