"""The command `orchestrator`: one file a group of commands, thin over the client; `app.py` puts them together.

One clear line and an exit code that means something (`exit_codes.ExitCode`) for whatever can go wrong.
"""

from __future__ import annotations

import os
import signal
import sys

from orchestrator.cli.exit_codes import BY_STATUS, ExitCode
from orchestrator.errors import OrchestratorError

__all__ = ["main"]


def main() -> None:
    """Entry point: what is known to go wrong is one line on stderr and an exit code, never a traceback."""
    try:
        if sys.argv[1:] == ["serve"]:
            from orchestrator.cli.serve import serve

            serve()  # without sixty other commands, which take as long as all that it does before it serves
        else:
            from orchestrator.cli.app import app

            app()
    except (Exception, KeyboardInterrupt) as error:
        if (code := _told(error)) is None:
            raise
        sys.exit(code)


def _told(error: BaseException) -> int | None:
    """Say what went wrong; the exit code. None: it is a defect."""
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, lambda *_: os._exit(ExitCode.INTERRUPTED))  # again: at once, and as quietly
        return ExitCode.INTERRUPTED
    from orchestrator.cli.output import fail

    if isinstance(error, OrchestratorError):
        return fail(error.message, ExitCode.ERROR, name=error.code, details=error.details)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # nobody reads on: `orchestrator engines list | head`
        return ExitCode.ERROR
    return _client_error(error)


def _client_error(error: BaseException) -> int | None:
    """Tell what the client raised; None for anything else. Imported only now: many commands need no client."""
    from orchestrator.cli.output import fail
    from orchestrator.client import ApiError, ClientError, ConnectionFailed, EngineFailure, NotAdmitted

    if not isinstance(error, ClientError):
        return None
    if isinstance(error, ApiError):
        seconds = f" (again in {error.retry_after_s:.0f} s)" if error.retry_after_s else ""
        code = BY_STATUS.get(error.status, ExitCode.ERROR)
        return fail(error.message.rstrip(".") + seconds + ".", code, name=error.code, details=error.details)
    if isinstance(error, ConnectionFailed):
        return fail(error.message, ExitCode.UNAVAILABLE, name="NO_CONNECTION")
    if isinstance(error, NotAdmitted):
        return fail(error.message, ExitCode.CONFLICT, name="NOT_ADMITTED")
    name = error.code if isinstance(error, EngineFailure) else "ERROR"
    return fail(error.message, ExitCode.ERROR, name=name)
