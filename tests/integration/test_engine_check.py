"""`orchestrator engine check`: on the reference engine, on the documented one, and on engines that break it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.engine_check import check_command, check_url, holds
from orchestrator.errors import ConfigurationError
from tests.integration.test_engine_process import KEY, EngineProcess
from tests.integration.test_engine_process import env as env
from tests.integration.test_engine_process import launch as launch

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "write-an-engine.md"


def documented() -> str:
    found = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def program(tmp_path: Path, *changes: tuple[str, str]) -> str:
    """The documented engine, with changes, as a command."""
    text = documented()
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    path = tmp_path / "my_engine.py"
    path.write_text(text)
    return f"{sys.executable} {path}"


def results(command: str) -> dict[str, str]:
    return {finding.check: finding.result for finding in check_command(command)}


def command_line(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", "engine", "check", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "COLUMNS": "200", **env},
        timeout=110,
    )


def test_the_reference_engine_offers_and_keeps_everything() -> None:
    findings = check_command(f"{sys.executable} -m engine")
    assert {finding.result for finding in findings} == {"holds"}, findings
    assert len(findings) == 13


def test_the_documented_engine_has_forty_lines_and_keeps_the_contract(tmp_path: Path) -> None:
    assert len([line for line in documented().splitlines() if line.strip()]) <= 40
    findings = check_command(program(tmp_path))
    assert holds(findings), findings
    found = {finding.check: finding.result for finding in findings}
    assert {check for check, result in found.items() if result != "holds"} == {
        "live key rotation",
        "quiesce and resume",
        "a rotation holds",
    }
    assert found["live key rotation"] == "not offered"


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ([('"status": "ok"', '"status": "fine"')], "comes up"),
        ([('"uptime_seconds": now - STARTED', '"uptime_seconds": "long"')], "health says what it must"),
        ([("if not hmac.compare_digest", "if self.path == '/execute' and not hmac.compare_digest")],
         "401 without a key"),
        ([("hashlib.sha256(self.headers.get(\"X-Engine-Key\", \"\").encode()).hexdigest()",
           "self.headers.get('X-Engine-Key') or ''")], "401 for a wrong key"),
        ([("if not hmac.compare_digest(presented", "if True or (presented")], "the right key is accepted"),
        ([('"idle_seconds": 0 if turns', '"idle_seconds": -1 if True')], "reports its activity"),
        ([('!= ("POST", "/execute"):', '!= ("POST", "/execute") and self.path != "/admin/quiesce":')],
         "quiesce and resume"),
        ([("if select.select([self.connection], [], [], 0)[0]:", "if False:")],
         "no turn for a caller who has gone"),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_found(tmp_path: Path, changes: list[tuple[str, str]], broken: str) -> None:
    if broken == "comes up":  # would be waited for as long as a boot may take
        changes = [("HOST", "NO_SUCH_VARIABLE")]
    assert results(program(tmp_path, *changes))[broken] == "fails"


def test_an_engine_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    (finding,) = [
        f
        for f in check_command(program(tmp_path, ("import hashlib", "import nothing_of_this_name")))
        if f.check == "comes up"
    ]
    assert "nothing_of_this_name" in finding.detail


class TestRunning:
    @pytest.fixture
    def url(self, launch: Callable[..., EngineProcess]) -> str:
        return f"http://127.0.0.1:{launch().ready().port}"

    def test_is_left_as_it_was(self, url: str, launch: Callable[..., EngineProcess]) -> None:
        findings = check_url(url, KEY)
        assert holds(findings), findings
        assert [finding.check for finding in findings if finding.result == "not tested"] == [
            "a rotation holds",
            "no turn for a caller who has gone",
            "exits within 30 s of SIGTERM",
            "starts again on its data",
        ]
        assert check_url(url, KEY) != []

    def test_the_command_prints_a_table(self, url: str) -> None:
        done = command_line(url, "--key", KEY)
        assert done.returncode == 0, done.stderr
        assert "This engine keeps the contract." in done.stdout
        assert KEY not in done.stdout + done.stderr

    def test_json_and_the_wrong_key(self, url: str) -> None:
        done = command_line(url, "--json", ENGINE_API_KEY="wrong")
        assert done.returncode == 1
        said: dict[str, Any] = json.loads(done.stdout)
        assert said["holds"] is False
        assert [f["check"] for f in said["findings"] if f["result"] == "fails"] == ["the right key is accepted",
            "live key rotation", "quiesce and resume"]  # fmt: skip


def test_nobody_there() -> None:
    (finding,) = check_url("http://127.0.0.1:1", "key")
    assert (finding.result, holds([finding])) == ("fails", False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "URL of a running engine"),
        (["http://127.0.0.1:1"], "key is missing"),
        (["nonsense", "--key", "x"], "must look like"),
        (["http://127.0.0.1:1", "--command", "x"], "not both"),
        (["--command", " "], "empty"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str) -> None:
    done = command_line(*arguments)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_url_that_is_none() -> None:
    with pytest.raises(ConfigurationError):
        check_url("ftp://x", "key")
