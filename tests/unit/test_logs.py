"""The last line of defence: a key that reaches a log call is masked."""

from __future__ import annotations

import orjson
import structlog

from orchestrator.keys import new_engine_key, new_platform_key
from orchestrator.logs import configure_logging


def test_keys_are_masked() -> None:
    import contextlib
    import io

    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        configure_logging("info", "json")
        engine_key, platform_key = new_engine_key(), new_platform_key()
        structlog.get_logger("test").info("said", text=f"the keys {engine_key} and {platform_key}")
    structlog.reset_defaults()
    line = orjson.loads(stream.getvalue())
    assert line["event"] == "said"
    assert line["level"] == "info"
    assert "timestamp" in line
    assert engine_key not in line["text"]
    assert platform_key not in line["text"]
    assert "sk-sept-********" in line["text"]
