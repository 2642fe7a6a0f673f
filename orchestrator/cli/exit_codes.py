"""What the end of a command means to a script."""

from __future__ import annotations

from typing import Final

__all__ = ["BY_STATUS", "EXIT_CODES_HELP", "ExitCode"]


class ExitCode:
    """What the end of a command means to a script."""

    ERROR: Final = 1
    USAGE: Final = 2
    NOT_FOUND: Final = 3
    CONFLICT: Final = 4
    KEY: Final = 5
    LIMIT: Final = 6
    UNAVAILABLE: Final = 7
    DEADLINE: Final = 8
    INTERRUPTED: Final = 130


EXIT_CODES_HELP = (
    "Exit codes: 1 failed, 2 wrong usage or input, 3 not found, 4 the state does not allow it (or not admitted), "
    "5 key missing, wrong or not allowed, 6 rate limit or quota, 7 no connection or unavailable, 8 deadline passed, "
    "130 interrupted."
)

BY_STATUS: Final = {
    400: ExitCode.USAGE,
    401: ExitCode.KEY,
    403: ExitCode.KEY,
    404: ExitCode.NOT_FOUND,
    408: ExitCode.DEADLINE,
    409: ExitCode.CONFLICT,
    413: ExitCode.USAGE,
    429: ExitCode.LIMIT,
    503: ExitCode.UNAVAILABLE,
    504: ExitCode.DEADLINE,
}
