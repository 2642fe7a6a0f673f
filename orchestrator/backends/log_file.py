"""Reads a growing log file: its last lines, then new ones; memory stays small whatever the file holds."""

from __future__ import annotations

import asyncio
import os
import re
from datetime import datetime
from typing import IO, TYPE_CHECKING

from orchestrator.backends.base import LogLine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

__all__ = ["parse_line", "read_log"]

LONGEST_LINE = 16 * 1024
_BLOCK = 64 * 1024
_FARTHEST_BACK = 64 * 1024 * 1024
_POLL_S = 0.2

_TIME = re.compile(
    r"""(?:\{.{0,200}?"(?:timestamp|time|ts)"\s*:\s*")?"""
    r"""(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,6})?(?:Z|[+-]\d\d:?\d\d))"""
)


def parse_line(raw: bytes) -> LogLine:
    """A line, with the time that it begins with (or has in its JSON) where it names its zone.

    >>> parse_line(b"2030-01-02T03:04:05Z ready").timestamp.isoformat()
    '2030-01-02T03:04:05+00:00'
    """
    text = raw.rstrip(b"\r").decode(errors="replace")
    match = _TIME.match(text)
    when = None
    if match is not None:
        try:
            when = datetime.fromisoformat(match[1].replace(",", "."))
        except ValueError:
            when = None
    return LogLine(timestamp=when, stream="stdout", line=text)


async def read_log(path: Path, *, tail: int, follow: bool) -> AsyncGenerator[LogLine, None]:
    """The last `tail` lines, then, while `follow`, new ones until the file is removed.

    Lines are cut at 16 KiB. A file that was rotated or truncated is read on from its new beginning.
    """
    start = await asyncio.to_thread(_tail_offset, path, tail)
    # From here on read on the loop: a thread might still read when the file has been closed under it.
    file = _open(path)
    if file is None:
        return
    newer: IO[bytes] | None = None
    try:
        file.seek(start)
        splitter = _Splitter()
        while True:
            block = file.read(_BLOCK)
            for raw in splitter.feed(block):
                yield parse_line(raw)
            if block:
                await asyncio.sleep(0)
            elif newer is not None:  # the old file was read to its end
                file.close()
                file, newer = newer, None
            elif not follow:
                break
            else:
                await asyncio.sleep(_POLL_S)
                change = _change(file, path)
                if change == "truncated":
                    file.seek(0)
                elif change == "replaced":
                    newer = _open(path)
                    follow = newer is not None
        for raw in splitter.rest():
            yield parse_line(raw)
    finally:
        file.close()
        if newer is not None:
            newer.close()


class _Splitter:
    """Cuts blocks into lines, holding at most one line."""

    def __init__(self) -> None:
        self._line = b""

    def feed(self, block: bytes) -> Iterator[bytes]:
        *whole, last = block.split(b"\n")
        for part in whole:
            yield (self._line + part[:LONGEST_LINE])[:LONGEST_LINE]
            self._line = b""
        self._line = (self._line + last[:LONGEST_LINE])[:LONGEST_LINE]

    def rest(self) -> Iterator[bytes]:
        if self._line:
            yield self._line


def _open(path: Path) -> IO[bytes] | None:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        return None


def _tail_offset(path: Path, tail: int) -> int:
    """Where the last `tail` lines begin, counting line ends backwards block by block."""
    file = _open(path)
    if file is None:
        return 0
    with file:
        end = position = file.seek(0, os.SEEK_END)
        if tail <= 0:
            return end
        limit = max(0, end - _FARTHEST_BACK)
        missing = tail
        while position > limit:
            size = min(_BLOCK, position - limit)
            position -= size
            file.seek(position)
            block = file.read(size)
            # The end of the last line begins nothing.
            at = len(block) - 1 if position + size == end and block.endswith(b"\n") else len(block)
            while missing and (at := block.rfind(b"\n", 0, at)) >= 0:
                missing -= 1
            if not missing:
                return position + at + 1
        return limit


def _change(file: IO[bytes], path: Path) -> str | None:
    """What happened to the file: `replaced` (or removed), `truncated`, or nothing."""
    mine = os.fstat(file.fileno())
    try:
        if not os.path.samestat(mine, path.stat()):
            return "replaced"
    except FileNotFoundError:
        return "replaced"
    return "truncated" if mine.st_size < file.tell() else None
