"""Every `ORCH_*` variable, its default, and what it means; also read from `.env`.

`load_settings` turns a bad value into one line that names the variable. `Settings.masked` is what
`orchestrator config` prints.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from cryptography.fernet import Fernet
from platformdirs import user_state_path
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from orchestrator.errors import ConfigurationError

Names = Annotated[tuple[str, ...], NoDecode]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode]
Seconds = Annotated[float, Field(gt=0)]


def default_state_dir() -> Path:
    """The platform's user state directory of this product."""
    return user_state_path("engine-orchestrator", appauthor=False)


class Settings(BaseSettings):
    """What is in force. Times are seconds (`_s`), sizes are bytes or Docker's own notation (`1g`)."""

    model_config = SettingsConfigDict(
        env_prefix="ORCH_", env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True
    )

    database_url: SecretStr = Field(description="postgresql://user:password@host:port/database")
    master_key: Secrets = Field(description="Fernet keys, comma-separated; the first one encrypts")
    admin_key: Secrets = Field(description="admin keys, comma-separated; each one is valid")

    database_pool: int = Field(10, ge=2, le=1000, description="connections of one process")
    database_listen_url: SecretStr | None = Field(None, description="direct URL for LISTEN; default: the URL")
    database_pooler: bool = Field(False, description="behind a transaction pooler: no prepared statements")
    auto_migrate: bool = Field(False, description="apply pending migrations at start")

    engine_backend: str = Field("docker", description="docker, subprocess, memory or an installed one")
    engine_image: str = Field("september-engine:latest", min_length=1, description="default image")
    engine_env_passthrough: Names = Field((), description="names of variables handed to engines")
    engine_network: str = Field("engine_net", min_length=1, description="Docker network of the engines")
    engine_container_port: int = Field(8000, ge=1, le=65535, description="port inside a container")
    engine_url_mode: Literal["host", "network"] = Field("host", description="how engines are reached")
    engine_host: str = Field("127.0.0.1", min_length=1, description="host name in the URLs of engines")
    engine_publish_address: str = Field("127.0.0.1", description="address that ports are published on")
    port_min: int = Field(9001, ge=1, le=65535, description="first port for engines")
    port_max: int = Field(29999, ge=1, le=65535, description="last port for engines")
    catalog_mount_path: Path | None = Field(None, description="the catalog, mounted read-only")
    data_root: Path = Field(default_factory=default_state_dir, description="subprocess data, snapshots")
    subprocess_command: str = Field(
        f"{shlex.quote(sys.executable)} -P -m engine",
        description="command of a subprocess engine; {image} may stand in it",
    )
    helper_image: str | None = Field(None, description="image of helpers; default: the orchestrator's")

    boot_timeout_s: Seconds = Field(60, description="from create or start to healthy")
    pull_timeout_s: Seconds = Field(600, description="pull of an image")
    queue_timeout_s: Seconds = Field(60, description="wait for a start slot")
    lease_s: float = Field(15, ge=1, description="a lease on an engine, renewed while working")
    orphan_grace_s: Seconds = Field(600, description="before an unknown object is stopped")
    start_concurrency: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="starts at the same time"
    )

    health_check_interval_s: Seconds = Field(30, description="between two probes of an engine")
    health_check_timeout_s: Seconds = Field(10, description="one probe")
    health_max_failures: int = Field(3, ge=1, description="consecutive failures before 'failed'")
    restart_backoff_base_s: Seconds = Field(5, description="first delay, doubling")
    restart_backoff_max_s: Seconds = Field(300, description="longest delay")
    restart_max_attempts: int = Field(8, ge=0, description="attempts before giving up")

    idle_sleep_threshold_s: float = Field(1800, ge=0, description="idle before sleep; 0 = never")
    idle_stop_threshold_s: float = Field(0, ge=0, description="asleep before the object stops; 0 = never")

    engine_memory: str = Field("1g", description="memory ceiling")
    engine_cpus: float = Field(1, gt=0, description="CPU ceiling")
    engine_pids: int = Field(256, ge=1, description="process limit")
    engine_runtime: str | None = Field(None, description="container runtime")
    engine_read_only: bool = Field(False, description="read-only root with tmpfs")
    engine_seccomp: str = Field("default", description="seccomp profile: default or a file")

    webhook_allowed_networks: Names = Field(
        (), description="networks (CIDR, comma-separated) that webhooks may reach besides public addresses"
    )

    audit_retention_days: int = Field(0, ge=0, description="0 = keep")
    deployment_id: str | None = Field(None, description="display name of this deployment")

    host: str = Field("127.0.0.1", min_length=1, description="address to serve on")
    port: int = Field(8000, ge=0, le=65535, description="port to serve on")
    workers: int = Field(1, ge=1, le=256, description="processes")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="log floor")
    log_format: Literal["json", "console"] = Field(
        default_factory=lambda: "console" if sys.stderr.isatty() else "json",
        description="json, or console on a terminal",
    )

    @field_validator("engine_env_passthrough", "webhook_allowed_networks", "master_key", "admin_key", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("engine_env_passthrough")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError("names of environment variables, comma-separated")
            if name.startswith("ORCH_"):
                raise ValueError(f"{name} belongs to the orchestrator and is never handed to engines")
        return value

    @field_validator("webhook_allowed_networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ip_network(network)
            except ValueError:
                raise ValueError("networks as 10.1.0.0/16 or fd00::/8, comma-separated") from None
        return value

    @field_validator("master_key")
    @classmethod
    def _fernet(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not value:
            raise ValueError("at least one Fernet key is required")
        for key in value:
            try:
                Fernet(_padded(key.get_secret_value()))
            except ValueError:
                raise ValueError(
                    "not a Fernet key (32 random bytes, URL-safe base64); make one with: python -c "
                    '"from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'
                ) from None
        return value

    @field_validator("admin_key")
    @classmethod
    def _admin(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not value or any(len(key.get_secret_value()) < 16 for key in value):
            raise ValueError("at least one key of 16 or more characters is required")
        return value

    @field_validator("database_url", "database_listen_url")
    @classmethod
    def _url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.match(r"postgres(ql)?://", value.get_secret_value()):
            raise ValueError("must look like postgresql://user:password@host:port/database")
        return value

    @field_validator("subprocess_command")
    @classmethod
    def _command(cls, value: str) -> str:
        if not shlex.split(value):
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _ports(self) -> Settings:
        if self.port_min > self.port_max:
            raise ValueError("ORCH_PORT_MIN must not be above ORCH_PORT_MAX")
        return self

    @property
    def listen_url(self) -> str:
        return (self.database_listen_url or self.database_url).get_secret_value()

    def master_keys(self) -> list[str]:
        """The Fernet keys in clear, padded; the first one encrypts."""
        return [_padded(key.get_secret_value()) for key in self.master_key]

    def admin_keys(self) -> list[str]:
        return [key.get_secret_value() for key in self.admin_key]

    def masked(self) -> dict[str, str]:
        """Variable name → what is in force, without any secret."""
        shown: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in ("database_url", "database_listen_url"):
                text = "" if value is None else mask_url(value.get_secret_value())
            elif name in ("master_key", "admin_key"):
                text = ",".join("********" for _ in value)
            elif isinstance(value, tuple):
                text = ",".join(value)
            elif isinstance(value, bool):
                text = str(value).lower()
            elif isinstance(value, float):
                text = f"{value:g}"
            else:
                text = "" if value is None else str(value)
            shown[f"ORCH_{name.upper()}"] = text
        return shown


def _padded(key: str) -> str:
    # Some documents speak of 43 characters: the padding may have been lost on the way.
    return key + "=" * (-len(key) % 4)


def mask_url(url: str) -> str:
    """A database URL without its password, for logs and `orchestrator config`."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    user = parts.username or ""
    netloc = (f"{user}:********@" if parts.password else f"{user}@" if user else "") + host
    query = re.sub(r"((?:password|sslpassword)=)[^&]*", r"\1********", parts.query)
    return urlunsplit((parts.scheme, netloc, parts.path, query, ""))


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment and `.env`; `overrides` win.

    Raises `ConfigurationError` with one line that names the variable and what is wrong, never its value.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_input=False, include_url=False):
            name = f"ORCH_{str(problem['loc'][0]).upper()}: " if problem["loc"] else ""
            what = "required" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
            lines.append(f"{name}{what}")
        raise ConfigurationError("; ".join(lines)) from None
    except SettingsError as error:
        raise ConfigurationError(str(error)) from None
