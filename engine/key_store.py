"""The key record on disk: `.engine-key.json` beside the brain.

It is written durably before a rotation is confirmed (a new file, flushed, renamed over the old one, the directory
flushed), so that a crash leaves either the old record or the new one. Mode 0600. It belongs to this engine, never to a
copy of its data: leave it out of snapshots, restores and forks.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from typing import TYPE_CHECKING, Any

from engine.errors import KeyRecordError
from engine.keys import KeyRecord, RetiredKey
from engine.settings import MAX_GENERATION, normalised_key_hash

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = ".engine-key.json"
_FORMAT = 1


def path_beside(brain_path: Path) -> Path:
    return brain_path.with_name(FILE_NAME)


def read(path: Path) -> KeyRecord | None:
    """The stored record, or None where there is none.

    Raises KeyRecordError when there is one that cannot be understood: to ignore it could bring a revoked key back.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise KeyRecordError(f"{path}: the key record cannot be read ({type(exc).__name__})") from None
    try:
        return _decode(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise KeyRecordError(
            f"{path}: the key record is damaged; put it right, or remove it to go back to ENGINE_KEY_HASH"
        ) from None


def write(path: Path, record: KeyRecord) -> None:
    """Returns when the record would survive a power cut. Raises OSError and leaves the old record otherwise."""
    temporary = path.with_name(path.name + ".tmp")
    with contextlib.suppress(FileNotFoundError):  # left by a crash, perhaps with another mode
        temporary.unlink()
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(_encode(record), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _encode(record: KeyRecord) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "generation": record.generation,
        "key_hash": record.key_hash,
        "retired": [
            {
                "generation": key.generation,
                "key_hash": key.key_hash,
                "expires_at": key.expires_at,
                "overlap_seconds": key.overlap_seconds,
            }
            for key in record.retired
        ],
    }


def _decode(data: Any) -> KeyRecord:
    if data["format"] != _FORMAT:
        raise ValueError("unknown format")
    return KeyRecord(
        key_hash=_hash(data["key_hash"]),
        generation=_generation(data["generation"]),
        retired=tuple(
            RetiredKey(
                key_hash=_hash(key["key_hash"]),
                generation=_generation(key["generation"]),
                expires_at=_seconds(key["expires_at"]),
                overlap_seconds=_seconds(key["overlap_seconds"]),
            )
            for key in data["retired"]
        ),
    )


def _hash(value: Any) -> str:
    normalised = normalised_key_hash(value)
    if normalised is None:
        raise ValueError("not a hash")
    return normalised


def _generation(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_GENERATION:
        raise ValueError("not a generation")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError("not a time")
    return float(value)
