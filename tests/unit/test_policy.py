"""What a policy may contain, and which images it allows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.errors import PolicyDenied
from orchestrator.policy import Policy, allowed_image, image_of

DEFAULT = "september-engine:2.3.0"


@pytest.mark.parametrize(
    ("policy", "image", "allowed"),
    [
        ({}, "september-engine:2.4.0", True),
        ({}, "september-engine@sha256:abc", True),
        ({}, "september-engine-evil:1", False),
        ({}, "other/september-engine:2.4.0", False),
        ({"engine_image": "mine:1"}, "mine:2", True),
        ({"allowed_images": ["mine:*"]}, "mine:2", True),
        ({"allowed_images": ["mine:*"]}, "september-engine:2.3.0", False),
        ({"allowed_images": []}, "september-engine:2.3.0", False),
        ({"allowed_images": ["mine:1"]}, "mine:10", False),
    ],
)
def test_allowed_images(policy: dict[str, Any], image: str, allowed: bool) -> None:
    assert allowed_image(policy, image, DEFAULT) is allowed


def test_a_repository_with_a_port_is_not_cut_at_it() -> None:
    assert allowed_image({}, "registry:5000/engine:2", "registry:5000/engine:1")
    assert not allowed_image({}, "registry:5000/other:2", "registry:5000/engine:1")


def test_the_image_of_a_provision() -> None:
    assert image_of({}, None, DEFAULT) == DEFAULT
    assert image_of({"engine_image": "mine:1"}, None, DEFAULT) == "mine:1"
    assert image_of({}, "september-engine:3", DEFAULT) == "september-engine:3"
    with pytest.raises(PolicyDenied):
        image_of({}, "evil:1", DEFAULT)


@pytest.mark.parametrize(
    "policy",
    [
        {"unknown": 1},
        {"max_engines": -1},
        {"max_engines": "10"},
        {"max_engines": True},
        {"rate_limit_rpm": 0},
        {"rate_limit_rpm": 1.5},
        {"allowed_images": "mine:*"},
        {"idle_sleep_threshold_s": -1},
        {"engine_cpus": 0},
    ],
)
def test_invalid_policies(policy: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate_json(json.dumps(policy))


def test_the_empty_policy_sets_nothing() -> None:
    assert Policy().model_dump(exclude_unset=True) == {}
