from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine.errors import SettingsError
from engine.settings import Settings
from tests.unit.engine.engine_fakes import sha256

if TYPE_CHECKING:
    from pathlib import Path

KEY = "sk-sept-of-the-test"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"ENGINE_KEY_HASH": sha256(KEY), "SQLITE_DB_PATH": str(tmp_path / "brain.sqlite")}


def test_defaults(env: dict[str, str], tmp_path: Path) -> None:
    settings = Settings.from_env(env)
    assert settings.key_hash == sha256(KEY)
    assert settings.key_generation == 1
    assert settings.brain_path == tmp_path / "brain.sqlite"
    assert settings.catalog_dir is None
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.image, settings.log_level) == (None, "info")


def test_plain_development_key_is_hashed(env: dict[str, str]) -> None:
    del env["ENGINE_KEY_HASH"]
    assert Settings.from_env({**env, "ENGINE_API_KEY": KEY}).key_hash == sha256(KEY)


def test_upper_case_hash_is_the_same_hash(env: dict[str, str]) -> None:
    assert Settings.from_env({**env, "ENGINE_KEY_HASH": sha256(KEY).upper()}).key_hash == sha256(KEY)


def test_empty_variables_count_as_unset(env: dict[str, str]) -> None:
    empty = dict.fromkeys(
        ("ENGINE_API_KEY", "ENGINE_KEY_GENERATION", "CATALOG_DIR", "HOST", "PORT", "ENGINE_IMAGE", "ENGINE_LOG_LEVEL"),
        "",
    )
    assert Settings.from_env({**env, **empty}) == Settings.from_env(env)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"ENGINE_KEY_HASH": ""}, "ENGINE_KEY_HASH"),
        ({"ENGINE_KEY_HASH": "abc"}, "ENGINE_KEY_HASH"),
        ({"ENGINE_KEY_HASH": "g" * 64}, "ENGINE_KEY_HASH"),
        ({"ENGINE_API_KEY": KEY}, "only one"),
        ({"ENGINE_KEY_HASH": "", "ENGINE_API_KEY": "\udcff"}, "ENGINE_API_KEY"),
        ({"ENGINE_KEY_GENERATION": "-1"}, "ENGINE_KEY_GENERATION"),
        ({"ENGINE_KEY_GENERATION": "two"}, "ENGINE_KEY_GENERATION"),
        ({"ENGINE_KEY_GENERATION": "٣"}, "ENGINE_KEY_GENERATION"),
        ({"ENGINE_KEY_GENERATION": "9" * 5000}, "ENGINE_KEY_GENERATION"),
        ({"PORT": "65536"}, "PORT"),
        ({"PORT": "80a"}, "PORT"),
        ({"SQLITE_DB_PATH": ""}, "SQLITE_DB_PATH"),
        ({"SQLITE_DB_PATH": "/nowhere/at/all/brain.sqlite"}, "SQLITE_DB_PATH"),
        ({"SQLITE_DB_PATH": "/tmp"}, "SQLITE_DB_PATH"),
        ({"CATALOG_DIR": "/nowhere/at/all"}, "CATALOG_DIR"),
        ({"ENGINE_LOG_LEVEL": "chatty"}, "ENGINE_LOG_LEVEL"),
    ],
)
def test_bad_value_is_one_line_that_names_the_variable(env: dict[str, str], change: dict[str, str], names: str) -> None:
    with pytest.raises(SettingsError, match=names) as caught:
        Settings.from_env({**env, **change})
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert sha256(KEY) not in str(caught.value)


def test_repr_holds_no_hash(env: dict[str, str]) -> None:
    assert sha256(KEY) not in repr(Settings.from_env(env))
