from __future__ import annotations

from typing import Any

import pytest

from engine import bodies
from engine.errors import InvalidRequest
from tests.unit.engine.engine_fakes import sha256

TURN: dict[str, Any] = {"message": "hello", "task_id": "t"}
KEY: dict[str, Any] = {"key_hash": sha256("b"), "generation": 2, "overlap_seconds": 300}


def test_a_turn_with_everything() -> None:
    request = bodies.execute({**TURN, "media": [{"url": "u"}], "direct": True, "retry_message_id": "m"})
    assert (request.message, request.task_id, request.media) == ("hello", "t", [{"url": "u"}])
    assert request.replaces_message_id == "m"
    assert bodies.execute({**TURN, "edit_message_id": "e", "retry_message_id": None}).replaces_message_id == "e"
    assert bodies.execute(TURN).replaces_message_id is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"message": ""}, "message"),
        ({"message": " \n"}, "message"),
        ({"message": None}, "message"),
        ({"message": 5}, "message"),
        ({"task_id": None}, "task_id"),
        ({"task_id": ""}, "task_id"),
        ({"task_id": "x" * 257}, "task_id"),
        ({"task_id": "a\nb"}, "task_id"),
        ({"task_id": "a\x00"}, "task_id"),
        ({"task_id": "a\x85"}, "task_id"),
        ({"task_id": 7}, "task_id"),
        ({"media": None}, "media"),
        ({"media": {}}, "media"),
        ({"media": ["x"]}, "media"),
        ({"direct": "yes"}, "direct"),
        ({"direct": None}, "direct"),
        ({"edit_message_id": 1}, "edit_message_id"),
        ({"retry_message_id": ""}, "retry_message_id"),
        ({"edit_message_id": "a", "retry_message_id": "b"}, "retry_message_id"),
        ({"mesage": "x"}, "mesage"),
    ],
)
def test_a_wrong_turn_names_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bodies.execute({**TURN, **change})
    assert caught.value.details == {"field": field}


def test_a_key() -> None:
    assert bodies.new_key(KEY) == (sha256("b"), 2, 300.0)
    assert bodies.new_key({**KEY, "key_hash": sha256("b").upper(), "overlap_seconds": 0.5}).overlap_seconds == 0.5


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"key_hash": None}, "key_hash"),
        ({"key_hash": "abc"}, "key_hash"),
        ({"key_hash": 1}, "key_hash"),
        ({"generation": None}, "generation"),
        ({"generation": True}, "generation"),
        ({"generation": "2"}, "generation"),
        ({"generation": 2.0}, "generation"),
        ({"generation": -1}, "generation"),
        ({"generation": 2**53 + 1}, "generation"),
        ({"overlap_seconds": None}, "overlap_seconds"),
        ({"overlap_seconds": True}, "overlap_seconds"),
        ({"overlap_seconds": -1}, "overlap_seconds"),
        ({"overlap_seconds": 86_401}, "overlap_seconds"),
        ({"overlap_seconds": float("nan")}, "overlap_seconds"),
        ({"overlap_seconds": "1"}, "overlap_seconds"),
        ({"ttl": 1}, "ttl"),
    ],
)
def test_a_wrong_key_names_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bodies.new_key({**KEY, **change})
    assert caught.value.details == {"field": field}
    assert sha256("b") not in caught.value.message


@pytest.mark.parametrize("text", ["", "0", "-1", "1001", "x", "1.5", "٣", "9" * 5000])
def test_a_wrong_limit(text: str) -> None:
    with pytest.raises(InvalidRequest):
        bodies.limit(text, default=5, high=1000)


def test_a_limit() -> None:
    assert bodies.limit(None, default=5, high=1000) == 5
    assert bodies.limit("1000", default=5, high=1000) == 1000
