"""The images of this project, and the orchestrator's own place: in a container of either address mode."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from orchestrator.errors import ConfigurationError
from tests.conformance.conftest import KEY
from tests.docker.daemon import BASE, ENGINE, ORCHESTRATOR, docker, inspect

if TYPE_CHECKING:
    from tests.docker.harness import DockerHarness

pytestmark = pytest.mark.timeout(600)

# Makes engines and asks them, as the orchestrator in a container would.
PROGRAM = """
import asyncio, contextlib, json, os, sys, uuid
import httpx
from orchestrator.backends.docker_backend import DockerBackend
from orchestrator.backends.docker_networks import Networks
from orchestrator.errors import ConfigurationError
from orchestrator.settings import load_settings

async def main():
    todo = json.loads(os.environ["TODO"])
    backend = DockerBackend.from_settings(load_settings(), uuid.UUID(todo["deployment"]))
    backend._networks._endpoints = todo.get("endpoints", 1000)
    answers = []
    try:
        await backend.open()
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            for engine in todo["engines"]:
                endpoint = await backend.create(uuid.UUID(engine["id"]), engine["port"], engine["env"], todo["image"])
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if (await client.get(f"http://{endpoint.host}:{endpoint.port}/health")).status_code == 200:
                            break
                answers.append([endpoint.host, endpoint.port])
    except ConfigurationError as error:
        answers = error.message
    finally:
        await backend.close()
    print(json.dumps(answers))

asyncio.run(main())
"""


def size(image: str) -> int:
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))


def run_orchestrator(place: DockerHarness, *options: str, engines: int = 1, **settings: Any) -> Any:
    """What the program above prints, in a container with these options."""
    todo = {
        "deployment": str(place.deployment_id),
        "image": place.image,
        "endpoints": settings.pop("endpoints", 1000),
        "engines": [
            {"id": str(engine), "port": place.free_port(), "env": place.env(engine)}
            for engine in (uuid4() for _ in range(engines))
        ],
    }
    place.will_clean(place.deployment_id)
    environment = {
        "TODO": json.dumps(todo),
        "ORCH_DATABASE_URL": "postgresql://unused/unused",
        "ORCH_MASTER_KEY": place.settings.master_keys()[0],
        "ORCH_ADMIN_KEY": place.settings.admin_keys()[0],
        "ORCH_ENGINE_NETWORK": place.network,
        **settings,
    }
    group = os.stat("/var/run/docker.sock").st_gid
    said = docker(
        *("run", "--rm", "--volume", "/var/run/docker.sock:/var/run/docker.sock", "--group-add", str(group)),
        *(part for name, value in environment.items() for part in ("--env", f"{name}={value}")),
        *options,
        *(ORCHESTRATOR, "python", "-c", PROGRAM),
    )
    return json.loads(said.splitlines()[-1])


# --- the images -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("images")
def test_they_are_small_and_not_root() -> None:
    # The base may be another one (BASE_IMAGE): then this says less.
    assert size(ENGINE) - size(BASE) < 120_000_000
    for image in (ENGINE, ORCHESTRATOR):
        config = json.loads(docker("image", "inspect", image))[0]["Config"]
        assert config["User"] == "10001:10001"
        assert ("Healthcheck" in config) is (image == ORCHESTRATOR)
        assert docker("run", "--rm", image, "stat", "-c", "%u:%g", "/data") == "10001:10001"
        # Nothing of the build host's stays.
        docker("run", "--rm", image, "test", "!", "-e", "/src")
    assert docker("run", "--rm", "--network", "none", ORCHESTRATOR, "orchestrator", "--version")
    # What is imported late, with the libraries that compiled packages need.
    late = "import greenlet, httptools, uvloop, orchestrator.server, orchestrator.registry.migrations"
    docker("run", "--rm", "--network", "none", ORCHESTRATOR, "python", "-c", late)


async def test_the_engine_serves_from_a_read_only_root(place: DockerHarness) -> None:
    place.settings = place.settings.model_copy(update={"engine_read_only": True})
    backend = await place.backend()
    engine_id = uuid4()
    env = {name: value for name, value in place.env(engine_id).items() if name.startswith("ENGINE_")}
    endpoint = await backend.create(engine_id, place.free_port(), env, ENGINE)
    response = await place._call(endpoint, "GET", "/health")
    assert response.json()["status"] == "ok"
    async with httpx.AsyncClient(trust_env=False) as client:
        url = f"http://{endpoint.host}:{endpoint.port}/nothing"
        assert (await client.get(url)).status_code == 401
        assert (await client.get(url, headers={"X-Engine-Key": KEY})).status_code == 404
    await backend.stop(engine_id)
    found = await backend.find(engine_id)
    assert found is not None
    assert found.exit_code == 0
    assert inspect(endpoint.container_id or "")["RestartCount"] == 0


# --- where the orchestrator runs ----------------------------------------------------------------------------------


def own_network(place: DockerHarness) -> None:
    docker("network", "create", "--label", f"engine-orchestrator.network={place.network}", place.network)


async def test_network_mode_on_the_network_of_engines(place: DockerHarness) -> None:
    own_network(place)
    answers = run_orchestrator(place, "--network", place.network, ORCH_ENGINE_URL_MODE="network")
    ((host, port),) = answers
    assert host.startswith("engine-")
    assert port == 8000
    (container,) = docker("ps", "--quiet", "--filter", f"network={place.network}").split()
    assert not inspect(container)["HostConfig"]["PortBindings"]


async def test_network_mode_follows_to_further_networks(place: DockerHarness) -> None:
    own_network(place)
    answers = run_orchestrator(
        place, "--network", place.network, engines=3, endpoints=1, ORCH_ENGINE_URL_MODE="network"
    )
    assert len(answers) == 3
    for name in (place.network, f"{place.network}-2", f"{place.network}-3"):
        assert len(docker("ps", "--quiet", "--filter", f"network={name}").split()) == 1


async def test_network_mode_elsewhere_stops_the_start(place: DockerHarness) -> None:
    own_network(place)
    assert "ORCH_ENGINE_URL_MODE=network" in run_orchestrator(place, ORCH_ENGINE_URL_MODE="network")
    place.settings = place.settings.model_copy(update={"engine_url_mode": "network"})
    with pytest.raises(ConfigurationError, match="ORCH_ENGINE_URL_MODE=network"):
        await place.backend()


async def test_host_mode_with_host_networking(place: DockerHarness) -> None:
    ((host, port),) = run_orchestrator(place, "--network", "host")
    assert host == "127.0.0.1"
    assert port != 8000


async def test_host_mode_in_a_container_of_its_own_stops_the_start(place: DockerHarness) -> None:
    assert "ORCH_ENGINE_HOST" in run_orchestrator(place)
