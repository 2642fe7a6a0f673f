"""The log of a container: Docker's multiplexed stream as lines with their time and stream."""

from __future__ import annotations

import asyncio
import re
import struct
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING

from orchestrator.backends.base import LogLine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import aiohttp

__all__ = ["after", "read_lines"]

_HEADER = struct.Struct(">BxxxL")
_STREAMS = {0: "stdout", 1: "stdout", 2: "stderr"}
_MAX_LINE = 64 * 1024
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)$")


async def read_lines(body: aiohttp.StreamReader) -> AsyncGenerator[tuple[str, LogLine], None]:
    """Lines as they come, each with its time in Docker's own words; one of more than 64 KB arrives in parts."""
    rest: dict[str, bytes] = {}
    async with aclosing(_frames(body)) as frames:
        async for stream, data in frames:
            buffer = rest.get(stream, b"") + data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                yield _parse(stream, line)
            if len(buffer) > _MAX_LINE:
                yield _parse(stream, buffer)
                buffer = b""
            rest[stream] = buffer
    for stream, buffer in rest.items():
        if buffer:
            yield _parse(stream, buffer)


async def _frames(body: aiohttp.StreamReader) -> AsyncGenerator[tuple[str, bytes], None]:
    try:
        while True:
            kind, length = _HEADER.unpack(await body.readexactly(_HEADER.size))
            stream = _STREAMS.get(kind, "stdout")
            while length:
                data = await body.readexactly(min(length, _MAX_LINE))
                length -= len(data)
                yield stream, data
    except asyncio.IncompleteReadError:
        return  # the end: the container has exited, or that was all


def _parse(stream: str, line: bytes) -> tuple[str, LogLine]:
    text = line.decode(errors="replace").rstrip("\r")
    stamp, space, rest = text.partition(" ")
    match = _TIME.match(stamp)
    if match is None:
        return "", LogLine(None, stream, text)
    micros = (match[2] or "0")[:6].ljust(6, "0")
    zone = "+00:00" if match[3] == "Z" else match[3]
    return stamp, LogLine(datetime.fromisoformat(f"{match[1]}.{micros}{zone}"), stream, rest if space else "")


def after(stamp: str) -> str:
    """What `since` must say to get only what follows a line: it includes its own moment, to the nanosecond."""
    match = _TIME.match(stamp)
    if match is None:
        return "0"
    seconds = int(datetime.fromisoformat(match[1] + ("+00:00" if match[3] == "Z" else match[3])).timestamp())
    nanos = int((match[2] or "0").ljust(9, "0")[:9]) + 1
    return f"{seconds + nanos // 1_000_000_000}.{nanos % 1_000_000_000:09d}"
