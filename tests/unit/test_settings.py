"""Settings: defaults, lists, and one line for what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.fernet import Fernet

from orchestrator.errors import ConfigurationError
from orchestrator.settings import Settings, load_settings, mask_url

KEY = Fernet.generate_key().decode()
GOOD: dict[str, Any] = {
    "database_url": "postgresql://user:hidden@host:5432/orchestrator",
    "master_key": KEY,
    "admin_key": "an-admin-key-long-enough",
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("ORCH_"):
            monkeypatch.delenv(name)


def settings(**changes: Any) -> Settings:
    return load_settings(_env_file=None, **{**GOOD, **changes})


def test_documented_defaults() -> None:
    made = settings()
    assert (made.port_min, made.port_max) == (9001, 29999)
    assert made.engine_backend == "docker"
    assert made.engine_image == "september-engine:latest"
    assert (made.boot_timeout_s, made.lease_s, made.idle_sleep_threshold_s) == (60, 15, 1800)
    assert (made.restart_backoff_base_s, made.restart_backoff_max_s, made.restart_max_attempts) == (5, 300, 8)
    assert (made.host, made.port, made.workers) == ("127.0.0.1", 8000, 1)


def test_lists_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Fernet.generate_key().decode()
    for name, value in GOOD.items():
        monkeypatch.setenv(f"ORCH_{name.upper()}", value)
    monkeypatch.setenv("ORCH_MASTER_KEY", f"{KEY}, {other}")
    monkeypatch.setenv("ORCH_ENGINE_ENV_PASSTHROUGH", "LLM_API_KEY,, OPENAI_API_KEY ")
    made = load_settings(_env_file=None)
    assert made.master_keys() == [KEY, other]
    assert made.engine_env_passthrough == ("LLM_API_KEY", "OPENAI_API_KEY")


def test_a_master_key_without_its_padding_is_the_same_key() -> None:
    assert settings(master_key=KEY.rstrip("=")).master_keys() == [KEY]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"master_key": "short"}, "ORCH_MASTER_KEY"),
        ({"admin_key": "short"}, "ORCH_ADMIN_KEY"),
        ({"database_url": "mysql://x"}, "ORCH_DATABASE_URL"),
        ({"port_min": 30000}, "ORCH_PORT_MIN"),
        ({"port": 70000}, "ORCH_PORT"),
        ({"lease_s": "soon"}, "ORCH_LEASE_S"),
        ({"engine_url_mode": "both"}, "ORCH_ENGINE_URL_MODE"),
        ({"engine_env_passthrough": "ORCH_MASTER_KEY"}, "ORCH_MASTER_KEY"),
        ({"engine_env_passthrough": "A B"}, "ORCH_ENGINE_ENV_PASSTHROUGH"),
        ({"subprocess_command": " "}, "ORCH_SUBPROCESS_COMMAND"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_variable(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        settings(**changes)
    assert named in caught.value.message
    assert "\n" not in caught.value.message
    for secret in ("hidden", KEY, "short"):
        assert secret not in caught.value.message.replace("shorter", "")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="ORCH_DATABASE_URL: required"):
        load_settings(_env_file=None)


def test_secrets_are_masked() -> None:
    shown = settings().masked()
    assert shown["ORCH_DATABASE_URL"] == "postgresql://user:********@host:5432/orchestrator"
    text = " ".join(shown.values()) + repr(settings())
    for secret in ("hidden", KEY, GOOD["admin_key"]):
        assert secret not in text


def test_a_password_in_the_query_is_masked_too() -> None:
    assert "hidden" not in mask_url("postgresql:///db?host=/run&user=u&password=hidden")
