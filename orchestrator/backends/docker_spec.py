"""The container of an engine, as Docker's API wants it: hardened and limited."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.backends.docker_names import DEPLOYMENT, ENGINE, INCARNATION, PORT, volume_name
from orchestrator.errors import ConfigurationError

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.settings import Settings

__all__ = ["ContainerSpec", "memory_bytes"]

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MIN_MEMORY = 6 << 20  # Docker's own floor
_NANO = 1_000_000_000


def memory_bytes(value: str, *, variable: str = "ORCH_ENGINE_MEMORY") -> int:
    """Docker's notation (`512m`, `1g`) as bytes. Raises `ConfigurationError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)b?", value.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < _MIN_MEMORY:
        raise ConfigurationError(f"{variable}: must look like 512m or 1g and be at least 6m.")
    return size


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """Everything that is the same for all engines of this process."""

    deployment_id: UUID
    container_port: int
    publish_address: str | None  # None: no published port
    catalog: str | None
    memory: int
    cpus: float
    pids: int
    runtime: str | None
    read_only: bool
    security: tuple[str, ...]

    @classmethod
    def from_settings(cls, settings: Settings, deployment_id: UUID) -> ContainerSpec:
        """Raises `ConfigurationError`."""
        security = ["no-new-privileges"]
        if settings.engine_seccomp != "default":
            security.append(f"seccomp={_seccomp(settings.engine_seccomp)}")
        return cls(
            deployment_id=deployment_id,
            container_port=settings.engine_container_port,
            publish_address=settings.engine_publish_address if settings.engine_url_mode == "host" else None,
            catalog=str(settings.catalog_mount_path) if settings.catalog_mount_path else None,
            memory=memory_bytes(settings.engine_memory),
            cpus=settings.engine_cpus,
            pids=settings.engine_pids,
            runtime=settings.engine_runtime,
            read_only=settings.engine_read_only,
            security=tuple(security),
        )

    def labels(self, engine_id: UUID) -> dict[str, str]:
        return {DEPLOYMENT: str(self.deployment_id), ENGINE: str(engine_id)}

    def limited(self, memory: str | None, cpus: float | None) -> ContainerSpec:
        """With other ceilings where they are given. Raises `ConfigurationError`."""
        return replace(
            self,
            memory=memory_bytes(memory, variable="engine_memory") if memory is not None else self.memory,
            cpus=cpus if cpus is not None else self.cpus,
        )

    def ceilings(self) -> dict[str, Any]:
        # The same number for memory and swap: no swap.
        return {"Memory": self.memory, "MemorySwap": self.memory, "NanoCpus": int(self.cpus * _NANO)}

    def container(
        self, engine_id: UUID, port: int, env: dict[str, str], image: str, network: str, *, has_data: bool = False
    ) -> dict[str, Any]:
        """The body of Docker's create.

        Docker makes a missing volume by itself. For an engine that `has_data` such a one is told by its labels: this
        deployment's, and no engine's.
        """
        environment = {
            **env,
            "SQLITE_DB_PATH": "/data/brain.sqlite",
            "HOST": "0.0.0.0",  # noqa: S104 - the container's own addresses; what is published is said below
            "PORT": str(self.container_port),
        }
        labels = self.labels(engine_id)
        data: dict[str, Any] = {"Type": "volume", "Source": volume_name(engine_id), "Target": "/data"}
        data["VolumeOptions"] = {"Labels": {DEPLOYMENT: labels[DEPLOYMENT]} if has_data else dict(labels)}
        mounts = [data]
        if self.catalog is not None:
            environment["CATALOG_DIR"] = "/catalog"
            # A mount, not a bind of the old kind: a missing directory is an error, never an empty one.
            mounts.append({"Type": "bind", "Source": self.catalog, "Target": "/catalog", "ReadOnly": True})
        inside = f"{self.container_port}/tcp"
        labels[INCARNATION] = env.get("ENGINE_INCARNATION", "0")
        labels[PORT] = str(port if self.publish_address is not None else self.container_port)
        host: dict[str, Any] = {
            "NetworkMode": network,
            "Mounts": mounts,
            # A Python as process 1 ignores SIGTERM.
            "Init": True,
            "RestartPolicy": {"Name": "unless-stopped"},
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}},
            "CapDrop": ["ALL"],
            "SecurityOpt": list(self.security),
            "PidsLimit": self.pids,
            "IpcMode": "private",
            **self.ceilings(),
        }
        if self.publish_address is not None:
            host["PortBindings"] = {inside: [{"HostIp": self.publish_address, "HostPort": str(port)}]}
        if self.read_only:
            host["ReadonlyRootfs"] = True
            host["Tmpfs"] = {"/tmp": "rw,nosuid,nodev,noexec,size=64m,mode=1777"}  # noqa: S108 - inside the container
        if self.runtime is not None:
            host["Runtime"] = self.runtime
        return {
            "Image": image,
            "Env": [f"{name}={value}" for name, value in environment.items()],
            "Labels": labels,
            "ExposedPorts": {inside: {}},
            "StopSignal": "SIGTERM",
            # Each check of Docker's would be an exec; the orchestrator probes by HTTP.
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": host,
        }


def _seccomp(path: str) -> str:
    """The profile in a file, as the API takes it: its text."""
    try:
        return json.dumps(json.loads(Path(path).read_text()), separators=(",", ":"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"ORCH_ENGINE_SECCOMP: {path} is no readable profile ({type(error).__name__})."
        ) from error
