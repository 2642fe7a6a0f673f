"""Where the command line finds an orchestrator: the file of profiles, the environment, and what wins."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest

from orchestrator import profiles
from orchestrator.errors import ConfigurationError
from orchestrator.profiles import Profile, Profiles, find_profile
from orchestrator.settings import default_state_dir

if TYPE_CHECKING:
    from pathlib import Path

REAL_STATE_DIR = profiles.state_dir
URL = "http://127.0.0.1:8000"


@pytest.fixture(autouse=True)
def no_dev(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No `orchestrator dev` of this machine's user."""
    monkeypatch.setattr(profiles, "state_dir", lambda: tmp_path / "state")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"ORCHESTRATOR_PROFILES": str(tmp_path / "config" / "profiles.json")}


@pytest.fixture
def saved(environment: dict[str, str], tmp_path: Path) -> Profiles:
    made = Profiles(tmp_path / "config" / "profiles.json")
    made.profiles["prod"] = Profile("https://prod.example.com", "pk-prod", "admin-prod", "acme")
    made.profiles["test"] = Profile("https://test.example.com", "pk-test")
    made.current = "prod"
    made.save()
    return made


def test_dev_is_looked_for_where_it_writes() -> None:
    assert REAL_STATE_DIR() == default_state_dir()


def test_the_file_is_the_owners_alone_and_comes_back_as_it_was(saved: Profiles) -> None:
    assert stat.S_IMODE(saved.path.stat().st_mode) == 0o600
    again = Profiles.load(saved.path)
    assert again.current == "prod"
    assert again.profiles["prod"].admin_key == "admin-prod"
    assert again.profiles["test"].admin_key is None
    again.save()
    assert stat.S_IMODE(saved.path.stat().st_mode) == 0o600
    assert [path.name for path in saved.path.parent.iterdir()] == ["profiles.json"]
    assert "pk-prod" not in repr(again)
    assert "admin-prod" not in repr(again)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o620])
def test_a_file_that_others_may_read_is_refused(saved: Profiles, environment: dict[str, str], mode: int) -> None:
    saved.path.chmod(mode)
    with pytest.raises(ConfigurationError) as caught:
        find_profile(None, environment)
    assert f"mode {mode:04o}" in caught.value.message
    assert f"chmod 600 '{saved.path}'" in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"profiles": {"a": {}}}', '{"profiles": {"a": {"odd": "x", "url": "y"}}}']
)
def test_a_broken_file_is_told(environment: dict[str, str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "config" / "profiles.json"
    path.parent.mkdir()
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="not a file of profiles"):
        find_profile(None, environment)


def test_what_wins(saved: Profiles, environment: dict[str, str]) -> None:
    assert find_profile(None, environment).platform_key == "pk-prod"
    assert find_profile("test", environment).platform_key == "pk-test"
    named = environment | {"ORCHESTRATOR_PROFILE": "test"}
    assert find_profile(None, named).url == "https://test.example.com"
    assert find_profile("prod", named).url == "https://prod.example.com"
    key = environment | {"ORCHESTRATOR_PLATFORM_KEY": "pk-other"}
    found = find_profile(None, key)
    assert (found.url, found.platform_key, found.admin_key) == ("https://prod.example.com", "pk-other", "admin-prod")
    assert find_profile("prod", key).platform_key == "pk-prod", "who names a profile means all of it"
    with pytest.raises(ConfigurationError, match=r"No profile 'none'.*prod, test"):
        find_profile("none", environment)


def test_keys_of_one_orchestrator_are_not_sent_to_another(saved: Profiles, environment: dict[str, str]) -> None:
    elsewhere = find_profile(None, environment | {"ORCHESTRATOR_URL": URL})
    assert (elsewhere.url, elsewhere.platform_key, elsewhere.admin_key) == (URL, None, None)
    same = find_profile(None, environment | {"ORCHESTRATOR_URL": "https://prod.example.com/"})
    assert same.platform_key == "pk-prod"


def test_the_environment_alone_needs_no_file(environment: dict[str, str]) -> None:
    whole = environment | {"ORCHESTRATOR_URL": URL, "ORCHESTRATOR_PLATFORM_KEY": "pk-x", "ORCHESTRATOR_PRODUCT": "acme"}
    assert find_profile(None, whole) == Profile(URL, "pk-x", None, "acme", "environment")


def test_the_hosts_own_variables(environment: dict[str, str]) -> None:
    found = find_profile(None, environment | {"ORCH_ADMIN_KEY": "one, two", "ORCH_HOST": "0.0.0.0", "ORCH_PORT": "81"})
    assert (found.url, found.admin_key, found.platform_key) == ("http://127.0.0.1:81", "one", None)
    six = find_profile(None, environment | {"ORCH_ADMIN_KEY": "one", "ORCH_HOST": "fd00::1"})
    assert six.url == "http://[fd00::1]:8000"


def test_a_running_dev_is_found(environment: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Which orchestrator"):
        find_profile(None, environment)
    directory = tmp_path / "state" / "dev"
    directory.mkdir(parents=True)
    (directory / "dev.json").write_text(json.dumps({"url": URL, "platform_key": "pk", "admin_key": "ad"}))
    found = find_profile(None, environment)
    assert (found.url, found.platform_key, found.admin_key) == (URL, "pk", "ad")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "https://me:secret@host"])
def test_bad_urls(environment: dict[str, str], url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_profile(None, environment | {"ORCHESTRATOR_URL": url, "ORCHESTRATOR_PLATFORM_KEY": "pk"})
    assert "secret" not in caught.value.message or "me:secret" not in caught.value.message
