"""Every error that the engine raises on purpose.

    StartupError                 ends the process: one line on stderr and an exit code
      SettingsError  KeyRecordError  CatalogError     2
      PortError                                       3
      BrainError                                      4
        BrainInUse  BrainCorrupt  MigrationRequired
    EngineError                  becomes an answer: {"error", "message", "details"} and a status
      InvalidKey  PermissionDenied  InvalidRequest  PayloadTooLarge  NotFound  MethodNotAllowed
      TaskNotFound  MessageNotFound  SkillNotFound
      TaskBusy  HitlRequired  TurnInFlight  SkillExists  StaleGeneration  BundleTooNew
      Starting  Draining
      LlmProviderError  LlmRateLimited  ContextOverflow
      TurnInterrupted  BrainFailed  InternalError

Messages are one line, say what to change, and never contain a key.
"""

from __future__ import annotations

from typing import Any, ClassVar


class StartupError(Exception):
    """The engine cannot start. Its text is the line that the operator reads."""

    exit_code: ClassVar[int] = 2


class SettingsError(StartupError):
    """An environment variable is missing or has a value that cannot be used."""


class KeyRecordError(StartupError):
    """The key record beside the brain cannot be read, so nobody can say which keys were revoked."""


class CatalogError(StartupError):
    """The catalog is missing or one of its files is wrong; the text names the file."""


class PortError(StartupError):
    """The address cannot be listened on."""

    exit_code = 3


class BrainError(StartupError):
    """The brain cannot be opened. Its file is left as it was found."""

    exit_code = 4


class BrainInUse(BrainError):
    """Another live engine has this brain open."""


class BrainCorrupt(BrainError):
    """The brain's file is not a database, or its pages do not hang together."""


class MigrationRequired(BrainError):
    """The brain was written by a newer engine."""


class EngineError(Exception):
    """Root of what a caller may be told. `details` is JSON and free of secrets."""

    code: ClassVar[str] = "INTERNAL_ERROR"
    status: ClassVar[int] = 500
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class InvalidKey(EngineError):
    code = "INVALID_KEY"
    status = 401

    def __init__(self) -> None:
        super().__init__("X-Engine-Key is missing or not valid.")


class PermissionDenied(EngineError):
    """The key is valid, but this is not to be changed over HTTP."""

    code = "PERMISSION_DENIED"
    status = 403


class InvalidRequest(EngineError):
    """The request itself is wrong; `field` in the details names what to change, where there is one."""

    code = "INVALID_REQUEST"
    status = 400


class PayloadTooLarge(EngineError):
    code = "PAYLOAD_TOO_LARGE"
    status = 413

    def __init__(self, limit: int, what: str = "The body") -> None:
        super().__init__(f"{what} is larger than {limit} bytes.", limit=limit)


class NotFound(EngineError):
    code = "NOT_FOUND"
    status = 404

    def __init__(self, path: str) -> None:
        super().__init__("There is nothing at this path.", path=path)


class MethodNotAllowed(EngineError):
    code = "METHOD_NOT_ALLOWED"
    status = 405

    def __init__(self, method: str, allowed: list[str]) -> None:
        super().__init__(f"{method} is not allowed here.", allowed=allowed)
        self.allowed = allowed


class TaskNotFound(EngineError):
    code = "TASK_NOT_FOUND"
    status = 404

    def __init__(self, task_id: str, message: str = "This task has no turns.") -> None:
        super().__init__(message, task_id=task_id)


class MessageNotFound(EngineError):
    code = "MESSAGE_NOT_FOUND"
    status = 404

    def __init__(self, message_id: str) -> None:
        super().__init__("This task's history has no such message.", message_id=message_id)


class SkillNotFound(EngineError):
    code = "SKILL_NOT_FOUND"
    status = 404

    def __init__(self, name: str) -> None:
        super().__init__("There is no such skill, neither in the catalog nor of the user's own.", name=name)


class TaskBusy(EngineError):
    code = "TASK_BUSY"
    status = 409

    def __init__(self, task_id: str) -> None:
        super().__init__("A turn of this task is still running.", task_id=task_id)


class HitlRequired(EngineError):
    """The task's turn waits for a person: `POST /hitl/respond` first."""

    code = "HITL_REQUIRED"
    status = 409

    def __init__(self, task_id: str, request_id: str) -> None:
        super().__init__(
            "A turn of this task waits for an answer to /hitl/respond.", task_id=task_id, request_id=request_id
        )


class TurnInFlight(EngineError):
    code = "TURN_IN_FLIGHT"
    status = 409
    retry_after_s = 1

    def __init__(self, in_flight: int) -> None:
        super().__init__("The engine cannot be quiesced while a turn is in flight.", in_flight=in_flight)


class SkillExists(EngineError):
    code = "SKILL_EXISTS"
    status = 409

    def __init__(self, name: str) -> None:
        super().__init__("There is a skill of this name already.", name=name)


class BundleTooNew(EngineError):
    """What a newer engine exported."""

    code = "MIGRATION_REQUIRED"
    status = 409

    def __init__(self, version: int, known: int) -> None:
        super().__init__(
            f"The bundle has format {version}, this engine knows up to {known}: import it with a newer engine.",
            version=version,
            known=known,
        )


class StaleGeneration(EngineError):
    """The key offered is not newer than the one in force; `details.generation` is the one in force."""

    code = "STALE_GENERATION"
    status = 409

    def __init__(self, message: str, generation: int) -> None:
        super().__init__(message, generation=generation)


class Starting(EngineError):
    code = "STARTING"
    status = 503
    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("The engine is still starting.")


class Draining(EngineError):
    code = "DRAINING"
    status = 503
    retry_after_s = 5

    def __init__(self) -> None:
        super().__init__("The engine is shutting down and takes no new turns.")


class LlmProviderError(EngineError):
    """The model's provider did not answer, or not as agreed."""

    code = "LLM_PROVIDER_ERROR"
    status = 502


class LlmRateLimited(EngineError):
    code = "LLM_RATE_LIMITED"
    status = 429


class ContextOverflow(EngineError):
    """The conversation is longer than the model takes."""

    code = "CONTEXT_OVERFLOW"
    status = 400


class TurnInterrupted(EngineError):
    code = "TURN_INTERRUPTED"
    status = 503

    def __init__(self) -> None:
        super().__init__("The engine stopped before this turn was finished.")


class BrainFailed(EngineError):
    """SQLite refused an operation on an open brain (a full disk, an I/O error)."""

    code = "BRAIN_FAILED"
    status = 500


class InternalError(EngineError):
    """What nobody foresaw. The log has the cause; the caller does not."""

    def __init__(self) -> None:
        super().__init__("The engine failed; its log says why.")
