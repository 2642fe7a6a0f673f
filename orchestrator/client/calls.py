"""What both twins share, and what does no I/O: calls as data, answers as values or errors, and when to try again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from orchestrator.client.errors import (
    BY_CODE,
    ApiError,
    ConnectionFailed,
    ConnectionLost,
    EngineFailure,
    UnexpectedAnswer,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tenacity import RetryCallState

    from orchestrator.client.errors import ClientError

__all__ = [
    "Call",
    "Retries",
    "api_error",
    "engine_failure",
    "engine_path",
    "given",
    "is_passing",
    "not_sent",
    "parsed",
    "parsed_text",
    "retry_after",
    "text_of",
    "unanswered",
]

M = TypeVar("M", bound=BaseModel)

BACKOFF_BASE_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
_BEHIND_A_PROXY: Final = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True)
class Call:
    """`repeatable`: carrying it out twice does what carrying it out once does, and gives the same answer."""

    method: str
    path: str
    params: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    repeatable: bool = False
    admin: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Retries:
    """At most `attempts` of one call, waiting at most `wait_s` in all between them.

    A call is tried again when the orchestrator says that it did nothing and when to come back (`Retry-After` is
    honoured), when no connection was made, and, where repeating is harmless, when the answer was lost.
    """

    attempts: int = 5
    wait_s: float = 30.0

    def worthwhile(self, call: Call, error: BaseException) -> bool:
        if isinstance(error, UnexpectedAnswer):
            return call.repeatable and error.status in _BEHIND_A_PROXY
        if isinstance(error, ApiError):
            return error.retryable
        if isinstance(error, httpx.TransportError):
            return call.repeatable or not_sent(error)
        return False

    def wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: never less than `Retry-After`, and never the same for many callers."""
        error = state.outcome.exception() if state.outcome is not None else None
        backoff = random.uniform(0.5, 1) * min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2**state.attempt_number)  # noqa: S311 - spreads callers, guards nothing
        asked = error.retry_after_s if isinstance(error, ApiError) else None
        return backoff if asked is None else asked + random.uniform(0, 0.1) * asked  # noqa: S311 - as above

    def stop(self, state: RetryCallState) -> bool:
        return state.attempt_number >= self.attempts or state.idle_for + state.upcoming_sleep > self.wait_s


def not_sent(error: Exception) -> bool:
    """Whether the server cannot have seen the call."""
    return isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError))


def engine_path(user_id: str, *parts: str) -> str:
    """Raises `ValueError` for a user id that no path can carry."""
    if user_id in ("", ".", "..") or "/" in user_id:
        raise ValueError("user_id must not be empty, '.' or '..', nor contain '/'")
    return "/".join(("/engines", quote(user_id, safe=""), *parts))


def parsed(model: type[M], response: httpx.Response) -> M:
    """A 2xx answer. Raises `UnexpectedAnswer` when it is not what the model says."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UnexpectedAnswer(
            f"{response.request.method} {response.request.url.path}: not an answer of the orchestrator's "
            f"({where or 'body'}: {problem['msg']}).",
            status=response.status_code,
        ) from None


def parsed_text(model: type[M], text: str) -> M:
    """One line or event of a stream. Raises `UnexpectedAnswer`."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        raise UnexpectedAnswer(f"The stream has something that is no {model.__name__}: {problem['msg']}.") from None


def api_error(response: httpx.Response) -> ApiError:
    """The error that an answer stands for; its body must have been read."""
    about: dict[str, Any] = {
        "status": response.status_code,
        "retry_after_s": retry_after(response.headers),
        "request_id": response.headers.get("x-request-id"),
    }
    try:
        error = response.json()["error"]
        code, message, details = str(error["code"]), str(error["message"]), error.get("details")
    except (ValueError, KeyError, TypeError, AttributeError):
        url = response.request.url.copy_with(query=None)
        return UnexpectedAnswer(
            f"{url} answered HTTP {response.status_code} and not as the orchestrator does; is the URL right?", **about
        )
    return BY_CODE.get(code, ApiError)(message, code=code, details=details, **about)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """`Retry-After` in seconds: a number, or a date as proxies write it."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def engine_failure(response: httpx.Response) -> EngineFailure:
    """An engine's error answer; its body must have been read."""
    code, message, details = f"HTTP_{response.status_code}", f"The engine answered HTTP {response.status_code}.", None
    try:
        body = response.json()
        code, message, details = str(body["error"]), str(body.get("message") or message), body.get("details")
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return EngineFailure(message, code=code, status=response.status_code, details=details)


def unanswered(url: str, call: Call, error: httpx.TransportError) -> ConnectionFailed:
    """What a broken connection means to the caller."""
    if isinstance(error, httpx.UnsupportedProtocol):
        return ConnectionFailed(f"{url} is not a URL like http://127.0.0.1:8000.")
    if not_sent(error):
        return ConnectionFailed(f"No orchestrator answers at {url} ({_reason(error)}).")
    what = "no answer in time" if isinstance(error, httpx.TimeoutException) else _reason(error)
    unsure = "" if call.method == "GET" else "; it may have been carried out"
    return ConnectionLost(f"{call.method} {url}{call.path}: {what}{unsure}.")


def is_passing(error: ClientError) -> bool:
    """Whether what broke a stream may be over soon."""
    if isinstance(error, UnexpectedAnswer):
        return error.status in _BEHIND_A_PROXY
    return error.retryable if isinstance(error, ApiError) else isinstance(error, ConnectionFailed)


def given(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def text_of(value: datetime | str | None) -> str | None:
    """A point in time as a parameter."""
    return value.isoformat() if isinstance(value, datetime) else value


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".")
