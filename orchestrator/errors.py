"""Every error that the orchestrator raises on purpose.

    OrchestratorError
      InvalidPlatformKey  InvalidAdminKey  PolicyDenied
      InvalidRequest  PayloadTooLarge  IdempotencyConflict
      NotFound  ProductNotFound  EngineNotFound  KeyNotFound  WebhookNotFound  MethodNotAllowed  …
      ProductSlugExists  ProductNotEmpty  EngineAlreadyExists  EngineAlreadyRunning  EngineNotRunning  EngineBusy
      QuotaExceeded  TooMany  RateLimited  PortExhaustion  QueueTimeout
      BootTimeout  WaitTimeout
      DatabaseUnavailable
      BackendError
        BackendUnavailable  ImageNotFound  NotSupported  PortTaken  ObjectMissing
      ConfigurationError

A class carries the stable code of its answer and typed data; `api/errors.py` alone turns it into HTTP.
Messages are one line, name what to change, and never contain a secret.
"""

from __future__ import annotations

from typing import Any


class OrchestratorError(Exception):
    """Root of the tree.

    `details` must be JSON-serialisable and free of secrets. `retry_after_s` is set where the same call may
    succeed later.
    """

    code: str = "INTERNAL_ERROR"

    def __init__(
        self,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.retry_after_s = retry_after_s


# --- who asks -------------------------------------------------------------------------------------------


class InvalidPlatformKey(OrchestratorError):
    code = "INVALID_PLATFORM_KEY"

    def __init__(self) -> None:
        super().__init__("X-Platform-Key is missing, unknown, expired or revoked.")


class InvalidAdminKey(OrchestratorError):
    code = "INVALID_ADMIN_KEY"

    def __init__(self) -> None:
        super().__init__("X-Admin-Key is missing or wrong.")


class PolicyDenied(OrchestratorError):
    """The product's policy, or the scope of its key, forbids the call."""

    code = "POLICY_DENIED"

    @classmethod
    def scope(cls, required: str) -> PolicyDenied:
        return cls(
            f"This platform key lacks the scope '{required}'.",
            details={"required_scope": required},
        )


# --- what is asked --------------------------------------------------------------------------------------


class InvalidRequest(OrchestratorError):
    """Invalid input; `field` names what to change."""

    code = "INVALID_REQUEST"

    def __init__(self, field: str, reason: str, *, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(f"{field}: {reason}", details={"field": field, "errors": errors or []})
        self.field = field


class PayloadTooLarge(OrchestratorError):
    code = "PAYLOAD_TOO_LARGE"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than {limit_bytes} bytes.", details={"limit_bytes": limit_bytes})


class IdempotencyConflict(OrchestratorError):
    code = "IDEMPOTENCY_CONFLICT"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used with another request body; use a new key.")


class NotFound(OrchestratorError):
    code = "NOT_FOUND"


class MethodNotAllowed(OrchestratorError):
    code = "METHOD_NOT_ALLOWED"


class ProductNotFound(OrchestratorError):
    code = "PRODUCT_NOT_FOUND"

    def __init__(self, product: str) -> None:
        super().__init__(f"No product '{product}'.")


class ProductSlugExists(OrchestratorError):
    code = "PRODUCT_SLUG_EXISTS"

    def __init__(self, slug: str) -> None:
        super().__init__(f"The slug '{slug}' is taken; choose another.", details={"slug": slug})


class ProductNotEmpty(OrchestratorError):
    code = "PRODUCT_NOT_EMPTY"

    def __init__(self, engines: int) -> None:
        super().__init__(
            f"The product has {engines} engines; destroy them, or delete it with force=true.",
            details={"engines": engines},
        )


class KeyNotFound(OrchestratorError):
    code = "KEY_NOT_FOUND"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"No platform key '{key_id}' of this product.")


class WebhookNotFound(OrchestratorError):
    code = "WEBHOOK_NOT_FOUND"

    def __init__(self, webhook_id: str) -> None:
        super().__init__(f"No webhook '{webhook_id}'.")


# --- the engine -----------------------------------------------------------------------------------------


class EngineNotFound(OrchestratorError):
    code = "ENGINE_NOT_FOUND"

    def __init__(self, user_id: str) -> None:
        super().__init__(f"No engine for user '{user_id}'.")


class EngineAlreadyExists(OrchestratorError):
    code = "ENGINE_ALREADY_EXISTS"

    def __init__(self, user_id: str, status: str) -> None:
        super().__init__(
            f"User '{user_id}' already has an engine ({status}); use admit or GET.",
            details={"status": status},
        )


class EngineAlreadyRunning(OrchestratorError):
    code = "ENGINE_ALREADY_RUNNING"

    def __init__(self, user_id: str) -> None:
        super().__init__(f"The engine of user '{user_id}' is already running.", details={"status": "running"})


class EngineNotRunning(OrchestratorError):
    code = "ENGINE_NOT_RUNNING"

    def __init__(self, user_id: str, status: str) -> None:
        super().__init__(f"The engine of user '{user_id}' is {status}.", details={"status": status})


class EngineBusy(OrchestratorError):
    """Another operation, or a turn in flight, holds the engine."""

    code = "ENGINE_BUSY"

    def __init__(self, user_id: str, *, status: str, operation: str | None) -> None:
        super().__init__(
            f"The engine of user '{user_id}' is busy ({operation or status}); try again when it is done.",
            details={"status": status, "operation": operation},
        )


class EngineFailed(OrchestratorError):
    """The engine could not be brought up: it exited, or its data is missing.

    `details.reason` is one of `exited`, `data_missing`, `unhealthy`.
    """

    code = "BACKEND_ERROR"

    def __init__(self, user_id: str, reason: str, message: str) -> None:
        super().__init__(f"The engine of user '{user_id}' failed: {message}", details={"reason": reason})
        self.reason = reason


# --- limits and deadlines -------------------------------------------------------------------------------


class QuotaExceeded(OrchestratorError):
    code = "QUOTA_EXCEEDED"

    def __init__(self, max_engines: int) -> None:
        super().__init__(
            f"Product at max_engines limit ({max_engines}).",
            details={"max_engines": max_engines},
            retry_after_s=60,
        )


class TooMany(OrchestratorError):
    """A product has as many of these as it may have; one must be removed first."""

    code = "QUOTA_EXCEEDED"

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"A product has at most {limit} {what}; remove one first.", details={f"max_{what}": limit})


class RateLimited(OrchestratorError):
    code = "RATE_LIMITED"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"Rate limit exceeded. Retry in {retry_after_s} seconds.", retry_after_s=retry_after_s)


class PortExhaustion(OrchestratorError):
    code = "PORT_EXHAUSTION"

    def __init__(self, port_min: int, port_max: int) -> None:
        super().__init__(
            f"No free port in {port_min}-{port_max}; destroy engines or widen ORCH_PORT_MIN/ORCH_PORT_MAX.",
            retry_after_s=30,
        )


class QueueTimeout(OrchestratorError):
    """No start slot came free in time; the operation stays queued and will be carried out."""

    code = "BACKEND_UNAVAILABLE"

    def __init__(self, queue_timeout_s: float) -> None:
        super().__init__(
            f"No start slot came free within {queue_timeout_s:g} s; the start stays queued.",
            retry_after_s=5,
        )


class BootTimeout(OrchestratorError):
    code = "BOOT_TIMEOUT"

    def __init__(self, user_id: str, timeout_s: float) -> None:
        super().__init__(
            f"The engine of user '{user_id}' was not healthy within {timeout_s:g} s.",
            details={"timeout_s": timeout_s},
        )


class WaitTimeout(OrchestratorError):
    code = "WAIT_TIMEOUT"

    def __init__(self, wanted: str, status: str, timeout_s: float) -> None:
        super().__init__(
            f"The engine did not become '{wanted}' within {timeout_s:g} s; it is '{status}'.",
            details={"status": status},
        )


# --- what we stand on -----------------------------------------------------------------------------------


class DatabaseUnavailable(OrchestratorError):
    code = "DATABASE_UNAVAILABLE"

    def __init__(self, reason: str = "PostgreSQL does not answer") -> None:
        super().__init__(f"The database is unavailable: {reason}.", retry_after_s=2)


class BackendError(OrchestratorError):
    """The backend refused or broke; the same call will fail again."""

    code = "BACKEND_ERROR"


class BackendUnavailable(BackendError):
    """The backend does not answer; the same call may succeed later. Never a reason to mark an engine failed."""

    code = "BACKEND_UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_s: float = 5) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class ImageNotFound(BackendError):
    code = "IMAGE_NOT_FOUND"

    def __init__(self, image: str, reason: str = "not found") -> None:
        super().__init__(f"Image '{image}': {reason}.", details={"image": image})
        self.image = image


class NotSupported(BackendError):
    """The backend lacks the ability (`Capabilities`)."""

    code = "NOT_SUPPORTED"

    def __init__(self, ability: str, backend: str) -> None:
        super().__init__(f"The {backend} backend does not support '{ability}'.", details={"ability": ability})


class PortTaken(BackendError):
    """The host port is held by something else; nothing was left behind and another port may be tried."""

    def __init__(self, port: int) -> None:
        super().__init__(f"Port {port} is held by something else on this host.", details={"port": port})
        self.port = port


class ObjectMissing(BackendError):
    """The backend has no object for this engine: it must be created (again)."""

    def __init__(self, engine_id: str) -> None:
        super().__init__(f"The backend has no object of engine {engine_id}.")


class ConfigurationError(OrchestratorError):
    """The process cannot start as configured; the message names the variable or the command to run."""

    code = "CONFIGURATION_ERROR"


class InternalError(OrchestratorError):
    """A defect of the orchestrator's own; the log has the trace under the request's id."""

    code = "INTERNAL_ERROR"


class RecordedError(OrchestratorError):
    """How an operation ended that another process carried out, as the registry recorded it."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(
            str(record.get("message", "The operation failed.")),
            details=record.get("details"),
            retry_after_s=record.get("retry_after_s"),
        )
        self.code = str(record.get("code", "INTERNAL_ERROR"))


def error_record(error: OrchestratorError) -> dict[str, Any]:
    """An error as the registry keeps it."""
    return {
        "code": error.code,
        "message": error.message,
        "details": error.details,
        "retry_after_s": error.retry_after_s,
    }
