"""One JSON object on stdout for every event: timestamp, level, logger, message, extra.

Keys and messages of users are never handed to a logger; ids, counts and durations are.
"""

from __future__ import annotations

import json
import logging
import sys
import time

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """What a call passes in `extra={…}` becomes the object `extra`; an exception becomes `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "timestamp": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "extra": {key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Sends every logger of the process to stdout. A log that nobody can write to never stops the engine."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # The HTTP server repeats at "info" what the engine says itself.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, root.level))
    logging.raiseExceptions = False
