"""The files of a task, in a directory of their own beside the brain.

A command in the sandbox can put symbolic links there that lead anywhere. So no path is ever followed: each part is
opened by itself, below the one before, and a link is refused. Whatever is read or written is a regular file inside.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DIRECTORY = "workspaces"
MAX_FILE_BYTES = 256 * 1024
_MAX_PARTS = 32


class WorkspaceError(Exception):
    """A path or a file that cannot be used; the text says why, in the task's own terms."""


class Workspace:
    def __init__(self, data_dir: Path, task_id: str) -> None:
        # Task ids are any text; this is one name for each, which no file system misunderstands.
        self.path = data_dir / DIRECTORY / hashlib.sha256(task_id.encode()).hexdigest()[:32]

    def make(self) -> Path:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.path

    def read(self, path: str) -> str:
        """The text of a file; of a long one its beginning, which then says so."""
        with self._parent(path, create=False) as (directory, name):
            # Not blocking: opening a pipe would wait for a writer.
            descriptor = _open(name, os.O_RDONLY | os.O_NONBLOCK, directory, path)
        with _regular(descriptor, "rb", path) as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        text = raw[:MAX_FILE_BYTES].decode("utf-8", "replace")
        return text + f"\n[cut after {MAX_FILE_BYTES} bytes]" if len(raw) > MAX_FILE_BYTES else text

    def write(self, path: str, content: str) -> int:
        """Writes a whole file, its directories too, and returns how many bytes it has."""
        raw = content.encode("utf-8", "replace")
        if len(raw) > MAX_FILE_BYTES:
            raise WorkspaceError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        with self._parent(path, create=True) as (directory, name):
            descriptor = _open(name, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, directory, path)
        with _regular(descriptor, "wb", path) as file:
            file.truncate()
            file.write(raw)
        return len(raw)

    @contextlib.contextmanager
    def _parent(self, path: str, *, create: bool) -> Iterator[tuple[int, str]]:
        """The directory that a path is in, opened, and the name in it."""
        relative = path.removeprefix("/workspace/") if path.startswith("/") else path
        parts = [part for part in relative.split("/") if part not in ("", ".")]
        if not parts or relative.startswith("/") or ".." in parts or "\0" in path or len(parts) > _MAX_PARTS:
            raise WorkspaceError(f"{path[:200]!r}: must be a path inside the workspace")
        directory = os.open(self.make(), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for part in parts[:-1]:
                if create:
                    with contextlib.suppress(FileExistsError):
                        _making(part, directory, path)
                below = _open(part, os.O_RDONLY | os.O_DIRECTORY, directory, path)
                os.close(directory)
                directory = below
            yield directory, parts[-1]
        finally:
            os.close(directory)


def _regular(descriptor: int, mode: str, path: str) -> IO[bytes]:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WorkspaceError(f"{path}: not a regular file")
    return os.fdopen(descriptor, mode)


def _making(name: str, directory: int, path: str) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=directory)
    except FileExistsError:
        raise
    except OSError as error:
        raise WorkspaceError(f"{path}: {error.strerror}") from None


def _open(name: str, flags: int, directory: int, path: str) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except (OSError, UnicodeEncodeError) as error:
        raise WorkspaceError(f"{path}: {getattr(error, 'strerror', 'not a file name')}") from None
