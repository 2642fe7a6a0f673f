"""What the environment tells the engine (engine contract: variables).

    ENGINE_KEY_HASH         SHA-256 of the engine key, 64 hexadecimal digits; or, for development only,
    ENGINE_API_KEY          the key itself. Exactly one of the two.
    ENGINE_KEY_GENERATION   which key of this engine's life that is; default 1
    SQLITE_DB_PATH          the brain; its directory must exist
    CATALOG_DIR             agents, skills, tools and core_soul.json; unset: an empty catalog
    HOST, PORT              where to listen; default 127.0.0.1 and 8000 (0: any free port, named in the log)
    ENGINE_IMAGE            the name under which this engine was deployed; only reported
    ENGINE_LOG_LEVEL        debug, info (default), warning, error or critical

    LLM_BASE_URL, LLM_MODEL an OpenAI-compatible endpoint (`https://host/v1`) and the model to ask there; without both,
                            the built-in local responder answers
    LLM_API_KEY             sent to it as a bearer token; may be missing where the endpoint needs none
    MAX_TOKENS              of one answer of the model; default 4096
    LLM_CONTEXT_TOKENS      what a conversation may fill of the model's context, roughly; default 32000
    LLM_TIMEOUT_S           how long the model may say nothing; default 60
    LLM_MAX_RETRIES         of a call that failed before its first word; default 3

    BASH_TIMEOUT_S          of one command; default 60
    HITL_TIMEOUT_S          how long a turn waits for a person, then counts as refused; default 3600

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
MAX_TIMEOUT_S = 86_400

_KEY_HASH = re.compile(r"[0-9a-f]{64}")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def normalised_key_hash(value: str) -> str | None:
    """The hash in lower case, or None when it is not a SHA-256 in hexadecimal."""
    lowered = value.lower()
    return lowered if _KEY_HASH.fullmatch(lowered) else None


@dataclass(frozen=True, slots=True)
class LlmSettings:
    """A model that can be asked."""

    base_url: str = field(repr=False)
    """Without a slash at its end. It may hold a password, so it is never shown."""
    model: str
    api_key: str | None = field(default=None, repr=False)
    max_tokens: int = 4096
    context_tokens: int = 32_000
    timeout_s: float = 60.0
    max_retries: int = 3


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
    llm: LlmSettings | None = None
    llm_missing: str | None = None
    """The variable for want of which there is no model although others are set."""
    bash_timeout_s: float = 60.0
    hitl_timeout_s: float = 3600.0

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Reads `env`. Raises SettingsError, whose text names the variable and never holds a key."""
        llm, llm_missing = _llm(env)
        return cls(
            key_hash=_key_hash(env),
            key_generation=_integer(env, "ENGINE_KEY_GENERATION", default=1, low=0, high=MAX_GENERATION),
            brain_path=_brain_path(env),
            catalog_dir=_catalog_dir(env),
            host=env.get("HOST") or "127.0.0.1",
            port=_integer(env, "PORT", default=8000, low=0, high=65535),
            image=env.get("ENGINE_IMAGE") or None,
            log_level=_log_level(env),
            llm=llm,
            llm_missing=llm_missing,
            bash_timeout_s=_integer(env, "BASH_TIMEOUT_S", default=60, low=1, high=MAX_TIMEOUT_S),
            hitl_timeout_s=_integer(env, "HITL_TIMEOUT_S", default=3600, low=1, high=MAX_TIMEOUT_S * 30),
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


def _llm(env: Mapping[str, str]) -> tuple[LlmSettings | None, str | None]:
    base_url, model, api_key = (env.get(name) or None for name in ("LLM_BASE_URL", "LLM_MODEL", "LLM_API_KEY"))
    if base_url is None or model is None:
        given = base_url or model or api_key
        return None, ("LLM_BASE_URL" if base_url is None else "LLM_MODEL") if given else None
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", base_url):
        raise SettingsError("LLM_BASE_URL must look like https://host/v1, without a query")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise SettingsError("LLM_API_KEY must be printable ASCII without spaces")
    return (
        LlmSettings(
            base_url=base_url.rstrip("/"),
            model=model,
            api_key=api_key,
            max_tokens=_integer(env, "MAX_TOKENS", default=4096, low=1, high=10_000_000),
            context_tokens=_integer(env, "LLM_CONTEXT_TOKENS", default=32_000, low=500, high=100_000_000),
            timeout_s=_integer(env, "LLM_TIMEOUT_S", default=60, low=1, high=MAX_TIMEOUT_S),
            max_retries=_integer(env, "LLM_MAX_RETRIES", default=3, low=0, high=20),
        ),
        None,
    )
