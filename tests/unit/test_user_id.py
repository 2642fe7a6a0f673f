"""Which user ids are valid."""

from __future__ import annotations

import pytest

from orchestrator.api.models import user_id_problem


@pytest.mark.parametrize("user_id", ["a", "ann@example.com", "用户-1", "a b", "...", "a" * 256, "é" * 256, "a\ufffd"])
def test_valid(user_id: str) -> None:
    assert user_id_problem(user_id) is None


@pytest.mark.parametrize("user_id", ["", ".", "..", "a/b", "a" * 257, "a\x00", "a\nb", "\x7f", "\x85", "\ud800"])
def test_invalid(user_id: str) -> None:
    assert user_id_problem(user_id) is not None
