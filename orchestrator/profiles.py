"""Where the command line finds an orchestrator and its keys.

A profile is a name, a URL and keys in one file of the user's, which nobody else may read. What stands in the
environment wins over the profile, value by value; then come this host's own server variables, and a running
`orchestrator dev`.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from platformdirs import user_config_path, user_state_path

from orchestrator.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Profile", "Profiles", "find_profile", "profiles_path"]

VARIABLES: Final = {
    "url": "ORCHESTRATOR_URL",
    "platform_key": "ORCHESTRATOR_PLATFORM_KEY",
    "admin_key": "ORCHESTRATOR_ADMIN_KEY",
    "product": "ORCHESTRATOR_PRODUCT",
}


@dataclass(frozen=True, slots=True)
class Profile:
    """`product` is the slug or id that the admin key acts as. `source` says where it comes from, for people."""

    url: str
    platform_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    product: str | None = None
    source: str = ""


@dataclass(slots=True)
class Profiles:
    """The file. `save` writes it whole or not at all, readable by its owner only."""

    path: Path
    current: str | None = None
    profiles: dict[str, Profile] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Profiles:
        """No file is no profiles. Raises `ConfigurationError` for one that others may read, or that is not ours."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return cls(path)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read ({error.strerror}).") from None
        with os.fdopen(descriptor, encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            if mode & 0o077:
                raise ConfigurationError(
                    f"{path} holds keys and may be read by others (mode {mode:04o}); run: chmod 600 '{path}'"
                )
            try:
                content = json.load(file)
                profiles = {
                    str(name): Profile(**{key: str(value) for key, value in entry.items()}, source=f"profile {name}")
                    for name, entry in content["profiles"].items()
                }
                current = content.get("current")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigurationError(
                    f"{path} is not a file of profiles; mend it, or remove it and run 'orchestrator profiles add'."
                ) from None
        return cls(path, current if current in profiles else None, profiles)

    def save(self) -> None:
        entries = {
            name: {key: value for key, value in asdict(profile).items() if value is not None and key != "source"}
            for name, profile in self.profiles.items()
        }
        text = json.dumps({"current": self.current, "profiles": entries}, indent=2) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            with suppress(FileNotFoundError):
                temporary.unlink()
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be written ({error.strerror}).") from None

    def named(self, name: str) -> Profile:
        """Raises `ConfigurationError` that names those that exist."""
        if name not in self.profiles:
            known = ", ".join(sorted(self.profiles)) or "none"
            raise ConfigurationError(f"No profile '{name}' in {self.path}; there: {known}.")
        return self.profiles[name]


def profiles_path(environment: Mapping[str, str] = os.environ) -> Path:
    given = environment.get("ORCHESTRATOR_PROFILES")
    return (
        Path(given).expanduser()
        if given
        else user_config_path("engine-orchestrator", appauthor=False) / "profiles.json"
    )


def checked_url(url: str) -> str:
    """Raises `ConfigurationError`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"'{url}' is not a URL like http://127.0.0.1:8000.")
    if parts.username or parts.password:
        raise ConfigurationError("The URL must not contain a user or password; keys have places of their own.")
    return url.rstrip("/")


def find_profile(name: str | None = None, environment: Mapping[str, str] = os.environ) -> Profile:
    """The orchestrator to talk to. `name` is a profile's, as by `--profile`. Raises `ConfigurationError`."""
    given: dict[str, Any] = {
        key: environment[variable] for key, variable in VARIABLES.items() if environment.get(variable)
    }
    chosen = name or environment.get("ORCHESTRATOR_PROFILE")
    if chosen:
        found: Profile | None = Profiles.load(profiles_path(environment)).named(chosen)
        if name:
            given = {}  # who names a profile means all of it
    elif "url" in given and ("platform_key" in given or "admin_key" in given):
        found = None  # all there is to know
    else:
        profiles = Profiles.load(profiles_path(environment))
        found = profiles.profiles[profiles.current] if profiles.current else None
        found = found or _of_this_host(environment) or _of_dev()
    if found is None:
        if "url" not in given:
            raise ConfigurationError(
                "Which orchestrator? Run 'orchestrator profiles add NAME --url URL', set ORCHESTRATOR_URL and "
                "ORCHESTRATOR_PLATFORM_KEY, or start 'orchestrator dev'."
            )
        found = Profile(**given, source="environment")
    elif given:
        if "url" in given and given["url"].rstrip("/") != found.url:
            found = Profile(given["url"])  # keys of one orchestrator are not sent to another
        found = replace(found, **given, source=f"{found.source} and environment" if found.source else "environment")
    return replace(found, url=checked_url(found.url))


def _of_this_host(environment: Mapping[str, str]) -> Profile | None:
    """On the host of `orchestrator serve`, with its variables."""
    keys = [key.strip() for key in environment.get("ORCH_ADMIN_KEY", "").split(",") if key.strip()]
    if not keys:
        return None
    host = environment.get("ORCH_HOST") or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - compared
    return Profile(f"http://{host}:{environment.get('ORCH_PORT') or 8000}", admin_key=keys[0], source="ORCH_ADMIN_KEY")


def state_dir() -> Path:
    """As `settings.default_state_dir`, whose import would cost each command a tenth of a second."""
    return user_state_path("engine-orchestrator", appauthor=False)


def _of_dev() -> Profile | None:
    """What `orchestrator dev` wrote for its owner, while it runs."""
    try:
        content = json.loads((state_dir() / "dev" / "dev.json").read_text(encoding="utf-8"))
        return Profile(content["url"], content["platform_key"], content["admin_key"], source="orchestrator dev")
    except (OSError, ValueError, KeyError, TypeError):
        return None
