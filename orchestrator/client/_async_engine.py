"""An admitted engine, and a turn with it. `_sync_engine.py` is generated from this file by `make client`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
from httpx_sse import EventSource, SSEError

from orchestrator.client.calls import engine_failure, not_sent
from orchestrator.client.errors import ConnectionFailed, ConnectionLost, EngineFailure, NotAdmitted
from orchestrator.client.turns import TurnEvent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from orchestrator.client.models import AdmitAnswer, EngineInfo

__all__ = ["AsyncAdmission", "AsyncEngine"]

CONNECT_S = 5.0


class AsyncEngine:
    """One user's engine, reached directly. Its key is in no `repr`."""

    def __init__(self, http: httpx.AsyncClient, url: str, api_key: str, info: EngineInfo) -> None:
        self._http = http
        self.url = url
        self.api_key = api_key
        self.info = info

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.info.user_id!r}, {self.url!r})"

    @property
    def headers(self) -> dict[str, str]:
        """What every request to the engine must carry."""
        return {"X-Engine-Key": self.api_key}

    async def execute(
        self,
        message: str,
        *,
        task_id: str = "default",
        media: Sequence[dict[str, Any]] = (),
        direct: bool = False,
        silence_s: float = 60.0,
    ) -> AsyncIterator[TurnEvent]:
        """One turn, event by event; `task_id` names the conversation.

        The turn goes on in the engine when the caller stops listening. Raises `EngineFailure` when the engine
        refuses or breaks off, `ConnectionFailed` when it does not answer within `silence_s` or falls silent so long.
        """
        body: dict[str, Any] = {"task_id": task_id, "message": message}
        if media:
            body["media"] = list(media)
        if direct:
            body["direct"] = True
        try:
            async with self._http.stream(
                "POST",
                f"{self.url}/execute",
                headers=self.headers,
                json=body,
                timeout=httpx.Timeout(silence_s, connect=CONNECT_S),
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise engine_failure(response)
                async for event in EventSource(response).aiter_sse():
                    try:
                        data = json.loads(event.data) if event.data else {}
                    except ValueError:
                        raise EngineFailure("An event is not JSON.", code="INVALID_STREAM") from None
                    turn_event = TurnEvent(event.event, data if isinstance(data, dict) else {"value": data})
                    if turn_event.type == "error":
                        raise turn_event.failure()
                    yield turn_event
        except SSEError:
            raise EngineFailure("The engine did not answer with a stream of events.", code="INVALID_STREAM") from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            if not_sent(error):
                raise ConnectionFailed(f"The engine does not answer at {self.url} ({reason}).") from error
            raise ConnectionLost(f"The turn's stream from {self.url} broke ({reason}); the turn may go on.") from error


class AsyncAdmission:
    """The answer to `admit`.

    With `admitted` False, `reason` says why, `retry_after_s` when a restart is due (None: nobody knows), and `engine`,
    `url` and `api_key` raise `NotAdmitted`.
    """

    def __init__(
        self, http: httpx.AsyncClient, user_id: str, answer: AdmitAnswer, retry_after_s: float | None = None
    ) -> None:
        self._http = http
        self.user_id = user_id
        self.admitted = answer.admitted
        self.reason = answer.reason
        self.retry_after_s = retry_after_s
        self.info = answer.engine

    def __repr__(self) -> str:
        if self.info is None:
            return f"{type(self).__name__}({self.user_id!r}, refused: {self.reason})"
        return f"{type(self).__name__}({self.user_id!r}, {self.info.url!r})"

    @property
    def engine(self) -> AsyncEngine:
        """Raises `NotAdmitted`; also for the admin key, which is never given an engine's key."""
        info = self.info
        if info is None:
            raise NotAdmitted(self.user_id, self.reason or "no reason given", self.retry_after_s)
        if info.url is None or info.api_key is None:
            raise NotAdmitted(self.user_id, "the answer has no api_key; call with a platform key of scope 'admit'")
        return AsyncEngine(self._http, info.url, info.api_key, info)

    @property
    def url(self) -> str:
        return self.engine.url

    @property
    def api_key(self) -> str:
        return self.engine.api_key

    def execute(self, message: str, *, task_id: str = "default", silence_s: float = 60.0) -> AsyncIterator[TurnEvent]:
        """`engine.execute`, for short."""
        return self.engine.execute(message, task_id=task_id, silence_s=silence_s)
