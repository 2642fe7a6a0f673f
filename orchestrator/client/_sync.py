"""The blocking client. Generated from `_async.py` by `make client`; edit only there."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import UUID, uuid4

import httpx
from httpx_sse import EventSource, SSEError
from tenacity import Retrying, retry_if_exception

from orchestrator.client import models
from orchestrator.client._sync_engine import Admission
from orchestrator.client.calls import (
    Call,
    Retries,
    api_error,
    engine_path,
    given,
    is_passing,
    parsed,
    parsed_text,
    retry_after,
    text_of,
    unanswered,
)
from orchestrator.client.errors import ClientError, ConnectionLost, UnexpectedAnswer, WaitTimeout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime
    from types import TracebackType

    from pydantic import BaseModel

__all__ = ["OrchestratorClient"]

M = TypeVar("M", bound="BaseModel")

CONNECT_S = 5.0
WAIT_MAX_S = 300.0  # one call of `wait`
RECONNECT_S = 0.5  # before an ended stream of events is opened again; doubles up to
RECONNECT_MAX_S = 15.0
EVENTS_SILENCE_S = 60.0  # the orchestrator sends a comment more often than that


class OrchestratorClient:
    """A backend's view of the orchestrator.

        with OrchestratorClient("http://127.0.0.1:8000", platform_key=KEY) as orchestrator:
            engine = orchestrator.admit("ann", auto_provision=True, auto_wake=True)
            for event in engine.execute("Hello"):
                print(event.text, end="")

    `platform_key` is the product; `admin_key` manages products, and acts as the product `product_id` where no
    platform key is given. Every call raises `ClientError` or a subclass, and is tried again as `retries` says.
    `timeout_s` bounds a plain call, `operation_timeout_s` one that may bring an engine up or down. One client may be
    shared by all threads.
    """

    def __init__(
        self,
        url: str,
        *,
        platform_key: str | None = None,
        admin_key: str | None = None,
        product_id: UUID | str | None = None,
        timeout_s: float = 30.0,
        operation_timeout_s: float = 180.0,
        retries: Retries | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._platform_key = platform_key
        self._admin_key = admin_key
        self._product_id = product_id
        self._timeout_s = timeout_s
        self._operation_timeout_s = operation_timeout_s
        self._retries = retries or Retries()
        self._owns_http = http is None
        # Keys go with each request: the same connections carry calls to engines, which must not see them.
        # A long stream holds a connection, so their number has no limit here.
        self._http = http or httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=100))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, unless they were given."""
        if self._owns_http:
            self._http.close()

    # --- discovery ----------------------------------------------------------------------------------------

    def admit(
        self,
        user_id: str,
        *,
        auto_provision: bool = False,
        auto_wake: bool = False,
        timeout_s: float | None = None,
    ) -> Admission:
        """Find, create or wake the user's engine: the call to make before every request to it.

        A refusal is an answer: `admitted` is False and `reason` says why.
        """
        body = {"auto_provision": auto_provision, "auto_wake": auto_wake}
        response = self._send(self._operation(engine_path(user_id, "admit"), body, True, timeout_s))
        answer = parsed(models.AdmitAnswer, response)
        return Admission(self._http, user_id, answer, retry_after(response.headers))

    def engine(self, user_id: str) -> models.EngineInfo:
        """Look an engine up. Never changes anything. Raises `EngineNotFound`."""
        return self._get(models.EngineInfo, engine_path(user_id))

    def engines(self, *, status: str | None = None, limit: int = 100, offset: int = 0) -> models.EngineList:
        """One page, in order of creation; `limit` is 1 to 1000."""
        return self._get(models.EngineList, "/engines", {"status": status, "limit": limit, "offset": offset})

    def all_engines(self, *, status: str | None = None) -> Iterator[models.ListedEngine]:
        """Every engine, page by page."""
        offset = 0
        while True:
            page = self.engines(status=status, limit=1000, offset=offset)
            for engine in page.engines:
                yield engine
            offset += len(page.engines)
            if not page.engines or offset >= page.total:
                return

    def wait(self, user_id: str, status: str, *, timeout_s: float = 30.0) -> models.EngineInfo:
        """Wait until the engine is in a state, or `destroyed`. Raises `WaitTimeout`, `EngineNotFound`."""
        left = timeout_s
        while True:
            part = min(left, WAIT_MAX_S)
            call = Call(
                "GET",
                engine_path(user_id, "wait"),
                {"status": status, "timeout_s": part},
                repeatable=True,
                timeout_s=part + self._timeout_s,
            )
            try:
                return parsed(models.EngineInfo, self._send(call))
            except WaitTimeout:
                left -= part
                if left <= 0:
                    raise

    # --- lifecycle ----------------------------------------------------------------------------------------

    def provision(
        self,
        user_id: str,
        *,
        engine_version: str | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> models.ProvisionedEngine:
        """Create the user's engine; returns when it is healthy.

        Every attempt carries the same `Idempotency-Key` (a new one for each call, unless given): a lost answer is
        asked for again, and nothing is made twice.
        """
        body = {"user_id": user_id} | ({} if engine_version is None else {"engine_version": engine_version})
        headers = {"Idempotency-Key": idempotency_key or str(uuid4())}
        call = self._operation("/engines/provision", body, True, timeout_s, headers)
        return parsed(models.ProvisionedEngine, self._send(call))

    def start(self, user_id: str, *, timeout_s: float | None = None) -> models.StartedEngine:
        """Start a stopped, sleeping or failed engine; returns when it is healthy."""
        return self._act(models.StartedEngine, user_id, "start", timeout_s=timeout_s)

    def stop(self, user_id: str, *, timeout_s: float | None = None) -> models.StatusChange:
        """Stop an engine, keeping its data. It stays stopped until somebody starts it."""
        return self._act(models.StatusChange, user_id, "stop", timeout_s=timeout_s)

    def sleep(self, user_id: str, *, timeout_s: float | None = None) -> models.StatusChange:
        """Put an engine to sleep now. Raises `EngineBusy` while a turn is in flight."""
        return self._act(models.StatusChange, user_id, "sleep", repeatable=True, timeout_s=timeout_s)

    def recover(self, user_id: str, *, timeout_s: float | None = None) -> models.StatusChange:
        """Bring a failed engine up again now."""
        return self._act(models.StatusChange, user_id, "recover", timeout_s=timeout_s)

    def keep_alive(self, user_id: str, seconds: int) -> models.KeepAlive:
        """Keep an engine awake for so many seconds from now (0 to 86400; 0 ends it)."""
        return self._act(models.KeepAlive, user_id, "keep-alive", {"seconds": seconds}, repeatable=True)

    def rotate_key(
        self, user_id: str, *, overlap_seconds: int = 300, timeout_s: float | None = None
    ) -> models.RotatedKey:
        """Give an engine a new key; the old one stays valid for `overlap_seconds` (0 to 86400)."""
        body = {"overlap_seconds": overlap_seconds}
        return self._act(models.RotatedKey, user_id, "rotate-key", body, timeout_s=timeout_s)

    def destroy(self, user_id: str, *, snapshot: bool = False, timeout_s: float | None = None) -> models.StatusChange:
        """Remove an engine with its data, for good; with `snapshot` a last one is kept."""
        call = Call(
            "DELETE",
            engine_path(user_id),
            {"snapshot": True if snapshot else None},
            timeout_s=timeout_s or self._operation_timeout_s,
        )
        return parsed(models.StatusChange, self._send(call))

    # --- what an engine did -------------------------------------------------------------------------------

    def logs(self, user_id: str, *, tail: int = 100) -> list[models.LogLine]:
        """The last lines of an engine's log, at most 10,000."""
        return (self._get(models.LogList, engine_path(user_id, "logs"), {"tail": tail})).lines

    def follow_logs(self, user_id: str, *, tail: int = 100) -> Iterator[models.LogLine]:
        """The last lines, then each new one; ends with the engine's destruction. Raises `ConnectionLost`."""
        call = Call("GET", engine_path(user_id, "logs"), {"tail": tail, "follow": True})
        with self._stream(call, silence_s=None) as response:
            for line in response.iter_lines():
                if line.strip():
                    yield parsed_text(models.LogLine, line)

    def timeline(self, user_id: str) -> models.Timeline:
        """The phases of the engine's last operation, and where it stalled."""
        return self._get(models.Timeline, engine_path(user_id, "timeline"))

    # --- the fleet ----------------------------------------------------------------------------------------

    def status(self) -> models.Fleet:
        return self._get(models.Fleet, "/status")

    def metrics(self) -> models.Metrics:
        return self._get(models.Metrics, "/metrics")

    def health(self) -> models.Health:
        """The orchestrator's own health; also when it answers 503. Needs no key, and is not tried again."""
        call = Call("GET", "/health", timeout_s=self._timeout_s)
        try:
            response = self._http.request(call.method, self.url + call.path, timeout=self._timeout(call))
        except httpx.TransportError as error:
            raise unanswered(self.url, call, error) from error
        if response.status_code not in (200, 503):
            raise api_error(response)
        return parsed(models.Health, response)

    def audit(
        self,
        *,
        user_id: str | None = None,
        action: str | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
        order: str | None = None,
    ) -> models.AuditPage:
        """One page of the audit log, the oldest first (`order="desc"`: the newest).

        `cursor` is the `next_cursor` of the page before; `since` is inclusive, `until` is not.
        """
        params = {
            "user_id": user_id,
            "action": action,
            "since": text_of(since),
            "until": text_of(until),
            "limit": limit,
            "cursor": cursor,
            "order": order,
        }
        return self._get(models.AuditPage, "/audit", params)

    def events(self, *, last_event_id: str | int | None = None, reconnect: bool = True) -> Iterator[models.Event]:
        """What happens, in order and without a gap, from now on or after `last_event_id`.

        Raises `ConnectionFailed` when there is no first connection. After that it never ends by itself: a stream
        that broke is opened again where it ended; with `reconnect` False it raises `ConnectionLost` instead.
        """
        seen = None if last_event_id is None else str(last_event_id)
        connected = False
        pause_s = RECONNECT_S
        while True:
            call = Call("GET", "/events", headers={} if seen is None else {"Last-Event-ID": seen}, repeatable=True)
            try:
                with self._stream(call, silence_s=EVENTS_SILENCE_S) as response:
                    connected = True
                    for event in EventSource(response).iter_sse():
                        pause_s = RECONNECT_S
                        if event.data:
                            seen = event.id or seen
                            yield parsed_text(models.Event, event.data).model_copy(update={"id": event.id})
                raise ConnectionLost("The stream of events ended.")
            except SSEError:
                raise UnexpectedAnswer(f"{self.url}/events is not a stream of events; is the URL right?") from None
            except ClientError as error:
                if not (connected and reconnect and is_passing(error)):
                    raise
                pause_s = max(pause_s, error.retry_after_s or 0.0)
            time.sleep(pause_s)
            pause_s = min(RECONNECT_MAX_S, pause_s * 2)

    # --- webhooks -----------------------------------------------------------------------------------------

    def create_webhook(self, url: str, *, events: Sequence[str] = ()) -> models.CreatedWebhook:
        """Events of these actions (none named: all) are sent to `url`; the answer alone has the signing `secret`."""
        body = {"url": url, "events": list(events)}
        return parsed(models.CreatedWebhook, self._send(Call("POST", "/webhooks", body=body)))

    def webhooks(self) -> list[models.Webhook]:
        return (self._get(models.WebhookList, "/webhooks")).webhooks

    def delete_webhook(self, webhook_id: UUID | str) -> None:
        self._send(Call("DELETE", f"/webhooks/{webhook_id}"))

    def webhook_deliveries(self, webhook_id: UUID | str) -> list[models.Delivery]:
        return (self._get(models.DeliveryList, f"/webhooks/{webhook_id}/deliveries")).deliveries

    # --- products and keys (admin key) --------------------------------------------------------------------

    def register_product(
        self, slug: str, display_name: str, *, policy: dict[str, Any] | None = None
    ) -> models.RegisteredProduct:
        """Onboard a product; the answer alone has its platform key."""
        body = {"slug": slug, "display_name": display_name, "policy": policy or {}}
        call = Call("POST", "/products/register", body=body, admin=True)
        return parsed(models.RegisteredProduct, self._send(call))

    def products(self) -> list[models.Product]:
        return (self._get(models.ProductList, "/products", admin=True)).products

    def delete_product(self, product_id: UUID | str, *, force: bool = False) -> models.DeletedProduct:
        """With `force` its engines are destroyed with it; without it they are `ProductNotEmpty`."""
        params = {"force": True if force else None}
        call = Call("DELETE", f"/products/{product_id}", params, admin=True, timeout_s=self._operation_timeout_s)
        return parsed(models.DeletedProduct, self._send(call))

    def replace_policy(self, product_id: UUID | str, policy: dict[str, Any]) -> dict[str, Any]:
        """The whole policy, in force for the next call."""
        path = f"/products/{product_id}/policy"
        call = Call("PUT", path, body={"policy": policy}, repeatable=True, admin=True)
        return parsed(models.PolicyAnswer, self._send(call)).policy

    def issue_key(
        self, product_id: UUID | str, *, scopes: Sequence[str], expires_at: datetime | str | None = None
    ) -> models.IssuedKey:
        """Another platform key, with the scopes `read`, `admit` or `manage`."""
        body: dict[str, Any] = {"scopes": list(scopes)}
        if expires_at is not None:
            body["expires_at"] = text_of(expires_at)
        call = Call("POST", f"/products/{product_id}/keys", body=body, admin=True)
        return parsed(models.IssuedKey, self._send(call))

    def platform_keys(self, product_id: UUID | str) -> list[models.PlatformKey]:
        return (self._get(models.KeyList, f"/products/{product_id}/keys", admin=True)).keys

    def revoke_key(self, product_id: UUID | str, key_id: UUID | str) -> None:
        """At once, on all replicas."""
        self._send(Call("DELETE", f"/products/{product_id}/keys/{key_id}", admin=True))

    def rotate_platform_key(self, product_id: UUID | str, *, overlap_seconds: int = 300) -> models.IssuedKey:
        """A new platform key; the ones before it end after `overlap_seconds`."""
        body = {"overlap_seconds": overlap_seconds}
        call = Call("POST", f"/products/{product_id}/rotate-platform-key", body=body, admin=True)
        return parsed(models.IssuedKey, self._send(call))

    def start_rewrap(self) -> models.Rewrap:
        """Encrypt all engine keys with the first master key; goes on in the background."""
        call = Call("POST", "/admin/rewrap-keys", repeatable=True, admin=True)
        return parsed(models.Rewrap, self._send(call))

    def rewrap(self) -> models.Rewrap:
        """How far the re-encryption is."""
        return self._get(models.Rewrap, "/admin/rewrap-keys", admin=True)

    # --- sending ------------------------------------------------------------------------------------------

    def _operation(
        self,
        path: str,
        body: dict[str, Any] | None,
        repeatable: bool,
        timeout_s: float | None,
        headers: dict[str, str] | None = None,
    ) -> Call:
        return Call(
            "POST",
            path,
            body=body,
            headers=headers or {},
            repeatable=repeatable,
            timeout_s=timeout_s or self._operation_timeout_s,
        )

    def _act(
        self,
        model: type[M],
        user_id: str,
        verb: str,
        body: dict[str, Any] | None = None,
        *,
        repeatable: bool = False,
        timeout_s: float | None = None,
    ) -> M:
        return parsed(model, self._send(self._operation(engine_path(user_id, verb), body, repeatable, timeout_s)))

    def _get(self, model: type[M], path: str, params: dict[str, Any] | None = None, *, admin: bool = False) -> M:
        return parsed(model, self._send(Call("GET", path, params or {}, repeatable=True, admin=admin)))

    def _send(self, call: Call) -> httpx.Response:
        """The 2xx answer to a call. Raises `ClientError`."""
        retries = self._retries
        try:
            for attempt in Retrying(
                retry=retry_if_exception(lambda error: retries.worthwhile(call, error)),
                wait=retries.wait,
                stop=retries.stop,
                reraise=True,
            ):
                with attempt:
                    response = self._http.request(
                        call.method,
                        self.url + call.path,
                        params=given(call.params),
                        json=call.body,
                        headers=self._headers(call),
                        timeout=self._timeout(call),
                    )
                    if not response.is_success:
                        raise api_error(response)
                    return response
        except httpx.TransportError as error:
            raise unanswered(self.url, call, error) from error
        raise AssertionError("a retry loop ends by returning or raising")

    @contextmanager
    def _stream(self, call: Call, *, silence_s: float | None) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(
                call.method,
                self.url + call.path,
                params=given(call.params),
                headers=self._headers(call),
                timeout=httpx.Timeout(silence_s, connect=CONNECT_S),
            ) as response:
                if not response.is_success:
                    response.read()
                    raise api_error(response)
                yield response
        except SSEError:  # it counts as one of the transport's, and is no broken connection
            raise
        except httpx.TransportError as error:
            raise unanswered(self.url, call, error) from error

    def _headers(self, call: Call) -> dict[str, str]:
        headers = dict(call.headers)
        if not call.admin and self._platform_key is not None:
            headers["X-Platform-Key"] = self._platform_key
        elif self._admin_key is not None:
            headers["X-Admin-Key"] = self._admin_key
            if not call.admin and self._product_id is not None:
                headers["X-Product-Id"] = str(self._product_id)
        return headers

    def _timeout(self, call: Call) -> httpx.Timeout:
        return httpx.Timeout(call.timeout_s or self._timeout_s, connect=CONNECT_S)
