"""Every error that the client raises.

    ClientError
      ApiError                     the orchestrator refused; one subclass for each of its codes
        InvalidPlatformKey  InvalidAdminKey  PolicyDenied
        InvalidRequest  PayloadTooLarge  IdempotencyConflict  NotFound  MethodNotAllowed
        ProductNotFound  ProductSlugExists  ProductNotEmpty  KeyNotFound
        EngineNotFound  EngineAlreadyExists  EngineAlreadyRunning  EngineNotRunning  EngineBusy
        QuotaExceeded  RateLimited  PortExhaustion  BootTimeout  WaitTimeout
        BackendFailed  BackendUnavailable  ImageNotFound  NotSupported  DatabaseUnavailable
        SnapshotNotFound  RolloutNotFound  WebhookNotFound
        InternalError  UnexpectedAnswer
      ConnectionFailed             nothing was answered
        ConnectionLost               … and the call may have been carried out
      NotAdmitted                  asked for the engine of an admission that was refused
      EngineFailure                the engine itself refused or broke off a turn

Messages are one line and contain no key.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final


class ClientError(Exception):
    """Root of the tree. `retry_after_s` is set where the same call may succeed later."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class ApiError(ClientError):
    """An answer that is not 2xx. `code` is stable; `request_id` leads to the orchestrator's log."""

    code: str = "UNKNOWN"
    retryable: ClassVar[bool] = False  # the orchestrator did nothing, and the same call may soon succeed

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str | None = None,
        details: dict[str, Any] | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status
        self.code = code or type(self).code
        self.details = details or {}
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class InvalidPlatformKey(ApiError):
    code = "INVALID_PLATFORM_KEY"


class InvalidAdminKey(ApiError):
    code = "INVALID_ADMIN_KEY"


class PolicyDenied(ApiError):
    """The product's policy forbids it, or the key lacks a scope (`details["required_scope"]`)."""

    code = "POLICY_DENIED"


class InvalidRequest(ApiError):
    """`details["field"]` names what to change."""

    code = "INVALID_REQUEST"


class PayloadTooLarge(ApiError):
    code = "PAYLOAD_TOO_LARGE"


class IdempotencyConflict(ApiError):
    """This Idempotency-Key was used with another body."""

    code = "IDEMPOTENCY_CONFLICT"


class NotFound(ApiError):
    code = "NOT_FOUND"


class MethodNotAllowed(ApiError):
    code = "METHOD_NOT_ALLOWED"


class ProductNotFound(ApiError):
    code = "PRODUCT_NOT_FOUND"


class ProductSlugExists(ApiError):
    code = "PRODUCT_SLUG_EXISTS"


class ProductNotEmpty(ApiError):
    """The product still has engines."""

    code = "PRODUCT_NOT_EMPTY"


class KeyNotFound(ApiError):
    code = "KEY_NOT_FOUND"


class EngineNotFound(ApiError):
    code = "ENGINE_NOT_FOUND"


class EngineAlreadyExists(ApiError):
    code = "ENGINE_ALREADY_EXISTS"


class EngineAlreadyRunning(ApiError):
    code = "ENGINE_ALREADY_RUNNING"


class EngineNotRunning(ApiError):
    code = "ENGINE_NOT_RUNNING"


class EngineBusy(ApiError):
    """Another operation, or a turn in flight, holds the engine."""

    code = "ENGINE_BUSY"


class QuotaExceeded(ApiError):
    """`max_engines` is reached. Not retried: it ends when engines are destroyed or the policy changes."""

    code = "QUOTA_EXCEEDED"


class RateLimited(ApiError):
    code = "RATE_LIMITED"
    retryable = True


class PortExhaustion(ApiError):
    """No port is free. Not retried: it ends when engines are destroyed or the range is widened."""

    code = "PORT_EXHAUSTION"


class BootTimeout(ApiError):
    """The engine was not healthy in time."""

    code = "BOOT_TIMEOUT"


class WaitTimeout(ApiError):
    """The engine is in another state (`details["status"]`)."""

    code = "WAIT_TIMEOUT"


class BackendFailed(ApiError):
    """The backend refused, or the engine could not be brought up (`details["reason"]`)."""

    code = "BACKEND_ERROR"


class BackendUnavailable(ApiError):
    code = "BACKEND_UNAVAILABLE"
    retryable = True


class ImageNotFound(ApiError):
    code = "IMAGE_NOT_FOUND"


class NotSupported(ApiError):
    """The backend lacks the ability (`details["ability"]`)."""

    code = "NOT_SUPPORTED"


class DatabaseUnavailable(ApiError):
    code = "DATABASE_UNAVAILABLE"
    retryable = True


class SnapshotNotFound(ApiError):
    code = "SNAPSHOT_NOT_FOUND"


class RolloutNotFound(ApiError):
    code = "ROLLOUT_NOT_FOUND"


class WebhookNotFound(ApiError):
    code = "WEBHOOK_NOT_FOUND"


class InternalError(ApiError):
    """A defect of the orchestrator; its log has the trace under `request_id`."""

    code = "INTERNAL_ERROR"


class UnexpectedAnswer(ApiError):
    """Not the orchestrator's own answer: a proxy's, or that of something else at this URL."""

    code = "UNEXPECTED_ANSWER"


BY_CODE: Final[dict[str, type[ApiError]]] = {kind.code: kind for kind in ApiError.__subclasses__()}


class ConnectionFailed(ClientError):
    """No connection, or no answer in time, and the call was not carried out."""


class ConnectionLost(ConnectionFailed):
    """The connection broke, or the answer took too long, after the call was sent: it may have been carried out."""


class NotAdmitted(ClientError):
    """The engine of a refused admission; `reason` says why, for example `engine_stopped`."""

    def __init__(self, user_id: str, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"The engine of user '{user_id}' was not admitted: {reason}.", retry_after_s=retry_after_s)
        self.user_id = user_id
        self.reason = reason


class EngineFailure(ClientError):
    """The engine refused a call or broke off a turn. `code` is the engine's own; `status` is 0 inside a stream."""

    def __init__(self, message: str, *, code: str, status: int = 0, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
