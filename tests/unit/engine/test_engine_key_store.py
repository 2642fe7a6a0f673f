from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING

import pytest

from engine import key_store
from engine.errors import KeyRecordError
from engine.keys import KeyRecord, RetiredKey
from tests.unit.engine.engine_fakes import sha256

if TYPE_CHECKING:
    from pathlib import Path

RECORD = KeyRecord(sha256("b"), 2, (RetiredKey(sha256("a"), 1, 1_700_000_000.5, 300.0),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return key_store.path_beside(tmp_path / "brain.sqlite")


def test_lies_beside_the_brain(path: Path, tmp_path: Path) -> None:
    assert path == tmp_path / ".engine-key.json"


def test_round_trip(path: Path) -> None:
    assert key_store.read(path) is None
    key_store.write(path, RECORD)
    assert key_store.read(path) == RECORD


def test_nobody_else_can_read_it_even_over_a_leftover_with_another_mode(path: Path) -> None:
    leftover = path.with_name(path.name + ".tmp")
    leftover.write_text("half a rec")
    leftover.chmod(0o666)
    key_store.write(path, RECORD)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_failed_write_leaves_the_old_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_store.write(path, RECORD)

    def full_disk(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        key_store.write(path, KeyRecord(sha256("c"), 3))
    monkeypatch.undo()
    assert key_store.read(path) == RECORD
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_flushed_before_it_is_renamed_and_the_directory_after(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    key_store.write(path, RECORD)
    assert flushed == [(f"{path}.tmp", False), (str(path.parent), True)]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format": 2}',
        json.dumps({"format": 1, "generation": "2", "key_hash": sha256("b"), "retired": []}),
        json.dumps({"format": 1, "generation": True, "key_hash": sha256("b"), "retired": []}),
        json.dumps({"format": 1, "generation": 2, "key_hash": "short", "retired": []}),
        json.dumps({"format": 1, "generation": 2, "key_hash": None, "retired": []}),
        json.dumps({"format": 1, "generation": 2, "key_hash": sha256("b"), "retired": [{}]}),
        json.dumps({"format": 1, "generation": 2, "key_hash": sha256("b"), "retired": None}),
        json.dumps(
            {
                "format": 1,
                "generation": 2,
                "key_hash": sha256("b"),
                "retired": [
                    {"key_hash": sha256("a"), "generation": 1, "expires_at": float("inf"), "overlap_seconds": 1}
                ],
            }
        ),
        "[" * 100_000,
    ],
)
def test_damaged_record_is_refused_not_ignored(path: Path, damage: str) -> None:
    path.write_text(damage)
    with pytest.raises(KeyRecordError, match="damaged") as caught:
        key_store.read(path)
    assert str(path) in str(caught.value)
    assert sha256("b") not in str(caught.value)


def test_unreadable_record_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(KeyRecordError, match="cannot be read"):
        key_store.read(path)
    path.rmdir()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(KeyRecordError, match="cannot be read"):
        key_store.read(path)
