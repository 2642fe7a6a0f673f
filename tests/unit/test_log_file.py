"""The last lines of a log, and new ones as they come."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from orchestrator.backends import log_file
from orchestrator.backends.log_file import LONGEST_LINE, parse_line, read_log

if TYPE_CHECKING:
    from pathlib import Path


async def lines_of(path: Path, tail: int) -> list[str]:
    return [one.line async for one in read_log(path, tail=tail, follow=False)]


@pytest.mark.parametrize("tail", [0, 1, 2, 5, 6, 100])
@pytest.mark.parametrize("end", ["", "\n"])
async def test_the_last_lines(tmp_path: Path, tail: int, end: str) -> None:
    path = tmp_path / "log"
    written = ["one", "", "three", "four – ünïcode", "five"]
    path.write_text("\n".join(written) + end)
    assert await lines_of(path, tail) == (written[-tail:] if tail else [])


@pytest.mark.parametrize("block", [1, 2, 3, 7])
async def test_blocks_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(log_file, "_BLOCK", block)
    path = tmp_path / "log"
    path.write_text("a\nbb\n\nccc\n")
    assert await lines_of(path, 3) == ["bb", "", "ccc"]


async def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert await lines_of(tmp_path / "none", 5) == []
    (tmp_path / "empty").touch()
    assert await lines_of(tmp_path / "empty", 5) == []


async def test_long_lines_are_cut_and_memory_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        for _ in range(32):
            file.write(b"x" * 1024 * 1024)
        file.write(b"\nshort\n" + b"y" * (LONGEST_LINE + 1) + b"\n")
    tracemalloc.start()
    try:
        assert [len(line) for line in await lines_of(path, 3)] == [LONGEST_LINE, 5, LONGEST_LINE]
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()


async def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\xff\xfe\r\n")
    assert await lines_of(path, 1) == ["\ufffd\ufffd"]


async def test_following_through_rotation_and_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "_POLL_S", 0.001)
    path = tmp_path / "log"
    path.write_text("old\nlast of old\n")
    async with aclosing(read_log(path, tail=1, follow=True)) as lines:

        async def following() -> str:
            return (await anext(lines)).line

        assert await following() == "last of old"
        with path.open("a") as file:
            file.write("half")
        waiting = asyncio.create_task(following())
        await asyncio.sleep(0.01)  # time enough to take half a line for a whole one
        with path.open("a") as file:
            file.write(" and whole\nbefore rotation\n")
        os.replace(path, tmp_path / "log.1")
        path.write_text("after rotation\n")
        assert await waiting == "half and whole"
        assert await following() == "before rotation"
        assert await following() == "after rotation"
        path.write_text("new\n")  # shorter than before
        assert await following() == "new"
        path.unlink()
        with pytest.raises(StopAsyncIteration):
            await following()


@pytest.mark.parametrize(
    ("line", "time"),
    [
        ("2030-01-02T03:04:05.678Z ready", "2030-01-02T03:04:05.678000+00:00"),
        ("2030-01-02 03:04:05,678+02:00 ready", "2030-01-02T03:04:05.678000+02:00"),
        ('{"event": "ready", "timestamp": "2030-01-02T03:04:05Z"}', "2030-01-02T03:04:05+00:00"),
        ("2030-01-02 03:04:05 of which zone?", None),
        ("2030-13-45T03:04:05Z no such day", None),
        ("ready", None),
        ("", None),
    ],
)
def test_the_time_of_a_line(line: str, time: str | None) -> None:
    parsed = parse_line(line.encode())
    assert parsed.line == line
    assert (parsed.timestamp.isoformat() if parsed.timestamp else None) == time
