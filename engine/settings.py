"""What the environment tells the engine (engine contract: variables).

    ENGINE_KEY_HASH         SHA-256 of the engine key, 64 hexadecimal digits; or, for development only,
    ENGINE_API_KEY          the key itself. Exactly one of the two.
    ENGINE_KEY_GENERATION   which key of this engine's life that is; default 1
    SQLITE_DB_PATH          the brain; its directory must exist
    CATALOG_DIR             agents, skills, tools and core_soul.json; unset: an empty catalog
    HOST, PORT              where to listen; default 127.0.0.1 and 8000 (0: any free port, named in the log)
    ENGINE_IMAGE            the name under which this engine was deployed; only reported
    ENGINE_LOG_LEVEL        debug, info (default), warning, error or critical

A variable that is set to the empty string counts as unset.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_GENERATION = 2**53

_KEY_HASH = re.compile(r"[0-9a-f]{64}")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def normalised_key_hash(value: str) -> str | None:
    """The hash in lower case, or None when it is not a SHA-256 in hexadecimal."""
    lowered = value.lower()
    return lowered if _KEY_HASH.fullmatch(lowered) else None


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked once, before anything is opened or bound; what is here can be used."""

    key_hash: str = field(repr=False)
    key_generation: int
    brain_path: Path
    catalog_dir: Path | None
    host: str
    port: int
    image: str | None
    log_level: str

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Reads `env`. Raises SettingsError, whose text names the variable and never holds a key."""
        return cls(
            key_hash=_key_hash(env),
            key_generation=_integer(env, "ENGINE_KEY_GENERATION", default=1, low=0, high=MAX_GENERATION),
            brain_path=_brain_path(env),
            catalog_dir=_catalog_dir(env),
            host=env.get("HOST") or "127.0.0.1",
            port=_integer(env, "PORT", default=8000, low=0, high=65535),
            image=env.get("ENGINE_IMAGE") or None,
            log_level=_log_level(env),
        )


def _key_hash(env: Mapping[str, str]) -> str:
    given_hash, plain = env.get("ENGINE_KEY_HASH"), env.get("ENGINE_API_KEY")
    if given_hash and plain:
        raise SettingsError("ENGINE_KEY_HASH and ENGINE_API_KEY are both set: set only one of them")
    if plain:
        # Non-UTF-8 bytes of the environment arrive as surrogates; such a key could never be presented.
        try:
            return hashlib.sha256(plain.encode()).hexdigest()
        except UnicodeEncodeError:
            raise SettingsError("ENGINE_API_KEY is not valid UTF-8") from None
    if not given_hash:
        raise SettingsError("ENGINE_KEY_HASH is not set: it is the SHA-256 of the engine key, in hexadecimal")
    normalised = normalised_key_hash(given_hash)
    if normalised is None:
        raise SettingsError("ENGINE_KEY_HASH is not a SHA-256 in hexadecimal (64 digits)")
    return normalised


def _integer(env: Mapping[str, str], name: str, *, default: int, low: int, high: int) -> int:
    text = env.get(name)
    if not text:
        return default
    if re.fullmatch(r"[0-9]{1,20}", text, re.ASCII) and low <= int(text) <= high:
        return int(text)
    raise SettingsError(f"{name} is {text!r}: it must be a whole number from {low} to {high}")


def _brain_path(env: Mapping[str, str]) -> Path:
    text = env.get("SQLITE_DB_PATH")
    if not text:
        raise SettingsError("SQLITE_DB_PATH is not set: it is the file that holds the user's data")
    path = Path(text)
    # Not created here: a missing directory is a missing volume, and an empty brain in its place would hide that.
    if not path.parent.is_dir():
        raise SettingsError(f"SQLITE_DB_PATH is {text!r}: its directory does not exist")
    if path.is_dir():
        raise SettingsError(f"SQLITE_DB_PATH is {text!r}: that is a directory, not a file")
    return path.absolute()


def _catalog_dir(env: Mapping[str, str]) -> Path | None:
    text = env.get("CATALOG_DIR")
    if not text:
        return None
    path = Path(text)
    if not path.is_dir():
        raise SettingsError(f"CATALOG_DIR is {text!r}: there is no such directory")
    return path.absolute()


def _log_level(env: Mapping[str, str]) -> str:
    text = env.get("ENGINE_LOG_LEVEL") or "info"
    if text.lower() not in _LOG_LEVELS:
        raise SettingsError(f"ENGINE_LOG_LEVEL is {text!r}: it must be one of {', '.join(_LOG_LEVELS)}")
    return text.lower()
