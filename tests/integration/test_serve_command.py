"""`orchestrator serve`, `migrate` and `config`: what a person can mend is one clear line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from cryptography.fernet import Fernet

from tests.integration.conftest import ADMIN_KEY, MASTER_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.conftest import Deployment


def run(variables: dict[str, str], command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", command],
        env={"PATH": os.environ["PATH"], **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


async def test_a_bad_start_is_one_clear_line(variables: dict[str, str], postgres_url: str, tmp_path: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = {
            "ORCH_MASTER_KEY": variables | {"ORCH_MASTER_KEY": "short"},
            "ORCH_DATABASE_URL": {k: v for k, v in variables.items() if k != "ORCH_DATABASE_URL"},
            "connection refused": variables | {"ORCH_DATABASE_URL": "postgresql://u:hidden@127.0.0.1:1/x"},
            "orchestrator migrate": variables | {"ORCH_DATABASE_URL": postgres_url},
            "ORCH_PORT": variables | {"ORCH_PORT": str(taken.getsockname()[1])},
            "ORCH_ENGINE_BACKEND": variables | {"ORCH_ENGINE_BACKEND": "nothing"},
        }
        for named, changed in cases.items():
            ended = run(changed, "serve", tmp_path)
            assert ended.returncode == 1, (named, ended.stderr)
            (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
            assert named in line
            for unwanted in ("Traceback", "hidden", MASTER_KEY, ADMIN_KEY):
                assert unwanted not in ended.stdout + ended.stderr, named


async def test_a_lost_master_key_stops_the_start(deployment: Deployment, tmp_path: Path) -> None:
    replica = await deployment.serve()
    api = await deployment.product(replica.url)
    await api.provision("ann")
    assert replica.stop() == 0
    ended = run(deployment.variables | {"ORCH_MASTER_KEY": Fernet.generate_key().decode()}, "serve", tmp_path)
    assert ended.returncode == 1
    assert "ORCH_MASTER_KEY" in ended.stderr


async def test_migrate_and_config(variables: dict[str, str], tmp_path: Path) -> None:
    ended = run(variables, "migrate", tmp_path)
    assert (ended.returncode, "Nothing to do" in ended.stdout) == (0, True)
    ended = run(variables, "config", tmp_path)
    assert ended.returncode == 0
    assert "ORCH_LEASE_S=3" in ended.stdout
    assert MASTER_KEY not in ended.stdout
    assert ADMIN_KEY not in ended.stdout


async def test_workers_serve_together_and_end_at_sigterm(deployment: Deployment) -> None:
    replica = await deployment.serve(ORCH_WORKERS="2")
    api = await deployment.product(replica.url)
    engine = await api.provision("ann")
    for _ in range(10):
        assert (await api.admit("ann"))["engine"]["api_key"] == engine["api_key"]
    replica.process.send_signal(signal.SIGTERM)
    assert replica.process.wait(30) == 0
    again = await deployment.serve()
    later = deployment.api(again.url, dict(api.client.headers))
    assert (await later.admit("ann"))["engine"]["url"] == engine["url"]
