"""`orchestrator doctor` on a real Docker Engine: daemon, image, network and firewall."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from typing import TYPE_CHECKING

from orchestrator.doctor import Finding, Level
from orchestrator.doctor.docker import docker as examine_docker
from tests.docker.daemon import IMAGE, docker
from tests.docker.test_firewall import SCRIPT

if TYPE_CHECKING:
    from orchestrator.backends.docker_backend import DockerBackend
    from tests.docker.harness import DockerHarness


async def found(harness: DockerHarness, check: str, **changes: object) -> list[Finding]:
    findings = await examine_docker(harness.settings.model_copy(update={"engine_image": IMAGE, **changes}))
    for finding in findings:
        assert (finding.advice is not None) == (finding.level in (Level.WARN, Level.FAIL)), finding
    return [finding for finding in findings if finding.check == check]


async def test_a_daemon_with_image_and_network(harness: DockerHarness, backend: DockerBackend) -> None:
    daemon, *_ = await found(harness, "docker")
    assert daemon.level is Level.OK
    assert docker("version", "--format", "{{.Server.Version}}") in daemon.detail
    (image,) = await found(harness, "image")
    assert (image.level, IMAGE in image.detail) == (Level.OK, True)
    network, *_ = await found(harness, "network")
    assert (network.level, harness.network in network.detail) == (Level.OK, True)


async def test_it_changes_nothing(harness: DockerHarness) -> None:
    (network,) = await found(harness, "network")
    assert "is made at the first start" in network.detail
    assert docker("network", "ls", "--quiet", "--filter", f"name={harness.network}") == ""


async def test_an_image_that_nobody_has(harness: DockerHarness) -> None:
    image = f"localhost:1/no-such-{secrets.token_hex(4)}:1"
    (finding,) = await found(harness, "image", engine_image=image)
    assert finding.level is Level.FAIL
    assert f"docker pull {image}" in str(finding.advice)


async def test_networks_that_do_not_isolate_as_they_should(harness: DockerHarness) -> None:
    name = f"orch-test-{secrets.token_hex(4)}"
    docker("network", "create", name)
    try:
        (open_one, *_) = await found(harness, "network", engine_network=name)
        assert open_one.level is Level.FAIL
        assert f"docker network rm {name}" in str(open_one.advice)
        as_meant, warned = await found(harness, "network", engine_network=name, engine_url_mode="network")
        assert (as_meant.level, warned.level) == (Level.OK, Level.WARN)
    finally:
        docker("network", "rm", name)
    _, public = await found(harness, "network", engine_publish_address="0.0.0.0")
    assert public.level is Level.WARN


async def test_the_firewall_is_seen(harness: DockerHarness) -> None:
    (finding,) = await found(harness, "firewall")
    if os.geteuid() != 0 or shutil.which("iptables") is None:
        assert finding.level is Level.SKIPPED
        return
    # Other tests may raise and lower it meanwhile: both answers are right, each with its words.
    in_force = subprocess.run([SCRIPT, "--check"], capture_output=True, timeout=60).returncode == 0
    assert finding.level in (Level.OK, Level.WARN)
    if finding.level is Level.WARN:
        assert "deploy/firewall.sh" in str(finding.advice)
    else:
        assert in_force or "neither" in finding.detail
