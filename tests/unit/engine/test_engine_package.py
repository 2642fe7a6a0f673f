"""What holds for the package as a whole."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import engine
from engine.logs import JsonFormatter

SOURCES = sorted(Path(engine.__file__).parent.rglob("*.py"))


def test_imports_nothing_from_the_orchestrator() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "orchestrator"], path


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_server_is_imported_without_its_command_line_and_is_whole_when_asked() -> None:
    assert (
        run_python(
            "import sys; from engine import lean_uvicorn; lean_uvicorn.prepare(); import engine.server;"
            "import uvicorn.protocols.http.httptools_impl, uvicorn.lifespan.off;"
            "print('click' in sys.modules, 'watchfiles' in sys.modules);"
            "import uvicorn; from uvicorn import run; print(run.__module__, uvicorn.Config is uvicorn.config.Config,"
            "bool(uvicorn.__version__))"
        )
        == "False False\nuvicorn.main True True"
    )


def test_an_imported_uvicorn_is_left_alone() -> None:
    assert (
        run_python(
            "import uvicorn; from engine import lean_uvicorn; before = uvicorn.Config; lean_uvicorn.prepare();"
            "import sys; print(sys.modules['uvicorn'] is uvicorn, uvicorn.Config is before)"
        )
        == "True True"
    )


def test_a_log_line_is_one_json_object() -> None:
    record = logging.getLogger("engine").makeRecord(
        "engine", logging.INFO, __file__, 1, "two\nlines %s", ("x",), None, extra={"turn_id": "t", "path": Path("p")}
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    data = json.loads(line)
    assert set(data) == {"timestamp", "level", "logger", "message", "extra"}
    assert (data["level"], data["logger"], data["message"]) == ("info", "engine", "two\nlines x")
    assert data["extra"] == {"turn_id": "t", "path": "p"}


def test_an_exception_is_in_the_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.getLogger("engine").makeRecord(
            "engine", logging.ERROR, __file__, 1, "failed", (), sys.exc_info()
        )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "ValueError: why" in json.loads(line)["exception"]
