"""Docker as the orchestrator will find it: the daemon, the image, the network, the firewall, its clock."""

from __future__ import annotations

import asyncio
import os
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from orchestrator.backends.docker_client import DockerClient
from orchestrator.backends.docker_errors import NoSuchObject
from orchestrator.backends.docker_host import DockerHost, find_docker_host, is_loopback
from orchestrator.backends.docker_networks import BRIDGE_PREFIX
from orchestrator.doctor.checks import Finding, fail, ok, run_check, skipped, warn
from orchestrator.errors import BackendError

if TYPE_CHECKING:
    from orchestrator.settings import Settings

__all__ = ["docker"]

OLDEST_API = (1, 40)  # Docker 19.03
SKEW_WARN_S = 2.0
FIREWALL = "as root on the host of Docker: deploy/firewall.sh"


async def docker(settings: Settings) -> list[Finding]:
    advice = "start Docker, or set DOCKER_HOST; this user must be in the group docker (or root)"
    client: DockerClient | None = None

    async def reach() -> list[Finding]:
        nonlocal client
        host = find_docker_host()
        made = DockerClient(host)
        try:
            await made.ping()
        except BaseException:
            await made.close()
            raise
        client = made
        return await _daemon(made)

    found = await run_check("docker", reach, advice)
    if client is None:
        return [*found, *(skipped(name, "needs Docker") for name in ("image", "network", "firewall"))]
    connected: DockerClient = client
    try:
        found += await run_check(
            "image", lambda: _image(connected, settings), "set ORCH_ENGINE_IMAGE, or pull the image"
        )
        found += await run_check("network", lambda: _network(connected, settings), "look at: docker network ls")
        found += await run_check("firewall", lambda: _firewall(connected.host), f"run {FIREWALL}")
    finally:
        await connected.close()
    return found


async def _daemon(client: DockerClient) -> list[Finding]:
    version = await client.json("GET", "version")
    info = await client.json("GET", "info")
    api = tuple(int(part) for part in str(version["ApiVersion"]).split("."))
    name = f"Docker {version['Version']} at {client.host}"
    if api < OLDEST_API:
        return [fail("docker", f"{name} speaks API {version['ApiVersion']}", "upgrade Docker: 19.03 is the oldest")]
    found = [ok("docker", name)]
    for missing, what in (("MemoryLimit", "memory"), ("PidsLimit", "processes"), ("CpuCfsQuota", "CPU")):
        if info.get(missing) is False:
            line = f"the kernel does not limit {what}"
            found.append(warn("docker", line, "enable that cgroup controller: engines have no ceiling of it now"))
    if (skew := _skew(str(info.get("SystemTime", "")))) > SKEW_WARN_S:
        line = f"this host and Docker's differ by {skew:.1f} s"
        found.append(warn("clock", line, "let a time service (chrony, ntpd) set both clocks"))
    return found


def _skew(told: str) -> float:
    """Seconds between the daemon's clock and ours; 0 when it does not tell."""
    head, _, rest = told.partition(".")
    zone = rest.lstrip("0123456789") if rest else ""
    try:
        theirs = datetime.fromisoformat(f"{head}{zone}" if rest else told)
        return abs((datetime.now(UTC) - theirs).total_seconds())
    except (ValueError, TypeError):
        return 0.0


async def _image(client: DockerClient, settings: Settings) -> list[Finding]:
    image = settings.engine_image
    try:
        found = await client.json("GET", f"images/{quote(image, safe='/:@')}/json")
    except NoSuchObject:
        return await _in_registry(client, image)
    user = str((found.get("Config") or {}).get("User") or "")
    size = f"{found.get('Size', 0) / 1e6:.0f} MB"
    if user.partition(":")[0] in ("", "0", "root"):
        line = f"{image} ({size}) runs as root"
        return [warn("image", line, "give the image a USER whose own /data is")]
    return [ok("image", f"{image} is here ({size}, user {user})")]


async def _in_registry(client: DockerClient, image: str) -> list[Finding]:
    """Whether a pull would find it. The daemon asks, with no credentials: a private image stays unknown."""
    try:
        await client.json("GET", f"distribution/{quote(image, safe='/:@')}/json")
    except BackendError as error:
        advice = f"run: docker pull {image} — or, for the reference engine: make images"
        return [fail("image", f"{image} is not on this host, and was not found: {error.message}", advice)]
    return [warn("image", f"{image} is not on this host", f"run: docker pull {image} — else the first engine waits")]


async def _network(client: DockerClient, settings: Settings) -> list[Finding]:
    host_mode = settings.engine_url_mode == "host"
    remote = client.host.is_remote
    if host_mode and remote and is_loopback(settings.engine_publish_address):
        line = f"engines would be published on the loopback of the remote host ({settings.engine_publish_address})"
        return [fail("network", line, "set ORCH_ENGINE_PUBLISH_ADDRESS and ORCH_ENGINE_HOST to that host's address")]
    name = settings.engine_network
    try:
        network = await client.json("GET", f"networks/{quote(name, safe='')}")
    except NoSuchObject:
        found = [ok("network", f"{name} is made at the first start")]
    else:
        found = [_isolation(network, name, host_mode=host_mode)]
    if not host_mode:
        line = "ORCH_ENGINE_URL_MODE=network: engines reach each other's port, and only their keys protect them"
        found.append(warn("network", line, "use the mode host where engines must not see each other"))
    elif settings.engine_publish_address in ("0.0.0.0", "::"):  # noqa: S104 - compared
        line = f"engines are published on every address of the host ({settings.engine_publish_address})"
        found.append(warn("network", line, "set ORCH_ENGINE_PUBLISH_ADDRESS to one that only your backends reach"))
    return found


def _isolation(network: dict[str, Any], name: str, *, host_mode: bool) -> Finding:
    options = network.get("Options") or {}
    isolated = options.get("com.docker.network.bridge.enable_icc") == "false"
    if host_mode and not isolated:
        line = f"{name} lets engines reach each other"
        return fail("network", line, f"choose another ORCH_ENGINE_NETWORK, or remove it: docker network rm {name}")
    if not host_mode and isolated:
        line = f"{name} was made for the mode host: nothing on it reaches an engine"
        return fail("network", line, f"choose another ORCH_ENGINE_NETWORK, or remove it: docker network rm {name}")
    return ok("network", f"{name}, {len(network.get('Containers') or {})} containers")


async def _firewall(host: DockerHost) -> list[Finding]:
    """The rules of `deploy/firewall.sh`; only root on Docker's own host can see them."""
    advice = f"run {FIREWALL}"
    if host.is_remote:
        return [skipped("firewall", f"it is on another host; there, as root: deploy/firewall.sh --check ({host})")]
    if shutil.which("iptables") is None or os.geteuid() != 0:
        return [skipped("firewall", "only root sees the rules; as root: deploy/firewall.sh --check")]
    bridge = f"{BRIDGE_PREFIX}+"
    if await _rule("INPUT", bridge, "ENGINE-TO-HOST") and (
        await _rule("DOCKER-USER", bridge, "ENGINE-TO-OTHERS") or await _rule("FORWARD", bridge, "ENGINE-TO-OTHERS")
    ):
        return [ok("firewall", "engines reach neither this host's services nor link-local addresses")]
    line = "engines reach services of this host, and a cloud's metadata address"
    return [warn("firewall", line, advice)]


async def _rule(chain: str, bridge: str, target: str) -> bool:
    process = await asyncio.create_subprocess_exec(
        "iptables",
        *("-w", "-C", chain, "-i", bridge, "-j", target),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    return await process.wait() == 0
