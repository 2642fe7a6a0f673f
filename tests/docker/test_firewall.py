"""`deploy/firewall.sh` on the bridges of this machine: what engines reach without it, and no longer with it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docker.daemon import docker, inspect, missing
from tests.docker.test_container import ip, make, reach

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orchestrator.backends.docker_backend import DockerBackend
    from tests.docker.harness import DockerHarness

SCRIPT = Path(__file__).resolve().parents[2] / "deploy/firewall.sh"
METADATA = "169.254.77.254"  # like a cloud's, but only ever ours


def firewall(*arguments: str, check: bool = True) -> int:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, timeout=60)
    if check:
        assert done.returncode == 0, done.stderr.decode()
    return done.returncode


def rules() -> str:
    return subprocess.run(["iptables", "-S"], capture_output=True, check=True, timeout=60).stdout.decode()


@contextlib.contextmanager
def neighbour(address: str, port: int) -> Iterator[None]:
    """Another machine with this address that answers on a port."""
    name = f"of{secrets.token_hex(3)}"
    inside = ("netns", "exec", name)
    try:
        assert ip("netns", "add", name)
        assert ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        for arguments in (("address", "add", "10.99.77.1/30", "dev", name), ("link", "set", name, "up")):
            assert ip(*arguments)
        for arguments in (
            ("address", "add", "10.99.77.2/30", "dev", "eth0"),
            ("address", "add", f"{address}/32", "dev", "lo"),
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", "10.99.77.1"),
        ):
            assert ip("-n", name, *arguments)
        assert ip("route", "add", f"{address}/32", "via", "10.99.77.2")
        server = subprocess.Popen(
            ["ip", *inside, "python3", "-m", "http.server", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while server.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
                    break
            yield
        finally:
            server.terminate()
            server.wait()
    finally:
        ip("netns", "del", name)
        ip("link", "del", name)


@pytest.fixture
def machine() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("iptables") is None or shutil.which("ip") is None:
        missing("the firewall needs root, iptables and ip")
    if firewall("--check", check=False) == 0:
        pytest.skip("deploy/firewall.sh is in force on this machine and is left alone")
    yield
    firewall("--undo")


@pytest.mark.usefixtures("machine")
async def test_engines_are_cut_off_and_still_served(harness: DockerHarness, backend: DockerBackend) -> None:
    engine = await make(harness, backend)
    before = rules()
    with socket.create_server(("0.0.0.0", 0)) as host, neighbour(METADATA, 8080):
        port = host.getsockname()[1]
        (network,) = inspect(engine.container)["NetworkSettings"]["Networks"].values()

        def seen() -> tuple[str, str, str]:
            return (
                engine.inside(reach(network["Gateway"], port)),
                engine.inside(reach(METADATA, 8080)),
                engine.inside(reach("10.99.77.2", 8080)),
            )

        assert seen() == ("reached", "reached", "reached")
        firewall()
        assert firewall("--check") == 0
        assert seen() == ("TimeoutError", "TimeoutError", "reached")
        assert await engine.run()
        once = rules()
        firewall()
        assert rules() == once
        firewall("--deny", "10.99.77.0/30")
        assert seen() == ("TimeoutError", "TimeoutError", "TimeoutError")
        # Also an engine on a network that was made since.
        backend._networks.is_full(harness.network)
        later = await make(harness, backend)
        ((name, network),) = inspect(later.container)["NetworkSettings"]["Networks"].items()
        assert name == f"{harness.network}-2"
        assert later.inside(reach(network["Gateway"], port)) == "TimeoutError"
        await backend.destroy(later.id)
        docker("network", "rm", name)
        (network,) = inspect(engine.container)["NetworkSettings"]["Networks"].values()
        firewall("--undo")
        assert rules() == before
        assert firewall("--check", check=False) == 1
        assert seen() == ("reached", "reached", "reached")
        firewall("--undo")
