"""Which Docker Engine to talk to, and how: `DOCKER_HOST` and its companions, read as the docker command does."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from orchestrator.errors import BackendUnavailable, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DockerHost", "SshTarget", "find_docker_host", "is_loopback"]

_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock")
_DEFAULT_SOCKET = "/var/run/docker.sock"


@dataclass(frozen=True, slots=True)
class SshTarget:
    host: str
    user: str | None
    port: int | None
    socket: str  # path on the other host


@dataclass(frozen=True, slots=True)
class DockerHost:
    """One of: a local socket, a TCP address (with TLS when `certificates` is set), a socket behind ssh."""

    socket: str | None = None
    address: tuple[str, int] | None = None
    certificates: Path | None = None
    ssh: SshTarget | None = None

    @property
    def is_remote(self) -> bool:
        """True when published ports are those of another host."""
        return self.ssh is not None or (self.address is not None and not is_loopback(self.address[0]))

    def __str__(self) -> str:
        if self.ssh is not None:
            return f"ssh://{self.ssh.host}"
        if self.address is not None:
            host = f"[{self.address[0]}]" if ":" in self.address[0] else self.address[0]
            return f"tcp://{host}:{self.address[1]}"
        return f"unix://{self.socket}"

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context of `certificates`. Raises `ConfigurationError`."""
        if self.certificates is None:
            return None
        try:
            context = ssl.create_default_context(cafile=str(self.certificates / "ca.pem"))
            context.load_cert_chain(self.certificates / "cert.pem", self.certificates / "key.pem")
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"DOCKER_CERT_PATH: ca.pem, cert.pem and key.pem in {self.certificates} cannot be used ({error})."
            ) from error
        return context


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_docker_host(environment: Mapping[str, str] = os.environ) -> DockerHost:
    """Raises `ConfigurationError` for a value that cannot be used, `BackendUnavailable` when there is no socket."""
    value = environment.get("DOCKER_HOST", "").strip()
    if not value:
        return DockerHost(socket=_local_socket(environment))
    parts = urlsplit(value)
    try:
        port = parts.port
    except ValueError:
        raise ConfigurationError("DOCKER_HOST: the port is not a number.") from None
    if parts.scheme == "unix" and parts.path:
        return DockerHost(socket=parts.path)
    if parts.scheme in ("tcp", "http", "https") and parts.hostname:
        # Any value but the empty one turns it on, as in the docker command.
        verify = bool(environment.get("DOCKER_TLS_VERIFY")) or parts.scheme == "https"
        certificates = None
        if verify:
            configured = environment.get("DOCKER_CERT_PATH") or environment.get("DOCKER_CONFIG")
            certificates = Path(configured) if configured else Path.home() / ".docker"
        return DockerHost(
            address=(parts.hostname, port or (2376 if verify else 2375)),
            certificates=certificates,
        )
    if parts.scheme == "ssh" and parts.hostname:
        if parts.password:
            raise ConfigurationError("DOCKER_HOST: a password in an ssh:// address is not used; use a key.")
        if parts.hostname.startswith("-") or (parts.username or "").startswith("-"):
            raise ConfigurationError("DOCKER_HOST: not a host name.")
        return DockerHost(
            ssh=SshTarget(
                host=parts.hostname,
                user=unquote(parts.username) if parts.username else None,
                port=port,
                socket=parts.path if len(parts.path) > 1 else _DEFAULT_SOCKET,
            )
        )
    raise ConfigurationError("DOCKER_HOST: must look like unix:///path, tcp://host:port or ssh://user@host.")


def _local_socket(environment: Mapping[str, str]) -> str:
    candidates = list(_SOCKETS)
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        candidates.append(f"{runtime}/docker.sock")
    candidates.append(str(Path.home() / ".docker/run/docker.sock"))
    for path in candidates:
        if Path(path).is_socket():
            return path
    raise BackendUnavailable("No Docker socket on this host: start Docker, or set DOCKER_HOST.")
