"""The files of one subprocess engine, and the lock that says whether it runs.

    {data root}/engines/{engine_id}/         its data; `.lock` in it is held for as long as the engine lives
                        {engine_id}.json     its spec: written under the lock, before each `create`
                        {engine_id}.process  which process it is, written by the launcher under the lock
                        {engine_id}.log      what it prints

A spec changes only while its writer holds the lock, so a running engine is always the one that its spec describes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from orchestrator.backends.processes import Identity
from orchestrator.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["EngineFiles", "Spec"]

_LOG_ROTATED_AT = 10 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Spec:
    """What an engine was created with: all that another start needs."""

    deployment_id: UUID
    incarnation: int
    port: int
    image: str
    env: dict[str, str] = field(repr=False)  # pass-through values are secrets


class EngineFiles:
    """Paths of one engine below `{data root}/engines`."""

    def __init__(self, folder: Path, engine_id: UUID) -> None:
        self.engine_id = engine_id
        self._folder = folder
        self._name = str(engine_id)

    @property
    def data(self) -> Path:
        return self._folder / self._name

    @property
    def lock(self) -> Path:
        return self._folder / self._name / ".lock"

    @property
    def brain(self) -> Path:
        return self._folder / self._name / "brain.sqlite"

    @property
    def spec(self) -> Path:
        return self._folder / f"{self._name}.json"

    @property
    def record(self) -> Path:
        return self._folder / f"{self._name}.process"

    @property
    def log(self) -> Path:
        return self._folder / f"{self._name}.log"

    @property
    def old_log(self) -> Path:
        return self._folder / f"{self._name}.log.1"

    @property
    def _spec_draft(self) -> Path:
        return self._folder / f"{self._name}.json.new"

    # --- spec and record ------------------------------------------------------------------------------

    def read_spec(self) -> Spec | None:
        """None when there is none; a damaged one is an error, since it no longer says whose the engine is."""
        try:
            found = json.loads(self.spec.read_bytes())
            return Spec(
                deployment_id=UUID(found["deployment_id"]),
                incarnation=int(found["incarnation"]),
                port=int(found["port"]),
                image=str(found["image"]),
                env={str(name): str(value) for name, value in found["env"].items()},
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BackendError(f"{self.spec} is damaged: restore it, or remove it by hand.") from None

    def write_spec(self, spec: Spec) -> None:
        """Replace the spec in one step. The caller holds the lock."""
        content = {
            "deployment_id": str(spec.deployment_id),
            "incarnation": spec.incarnation,
            "port": spec.port,
            "image": spec.image,
            "env": spec.env,
        }
        draft = self._spec_draft
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.spec)

    def read_record(self) -> Identity | None:
        """The process that was launched last; None while the launcher writes, or when it never finished."""
        try:
            lines = self.record.read_text().splitlines()
        except FileNotFoundError:
            return None
        if len(lines) != 4 or lines[3] != "end":
            return None
        pid, start, boot = (" ".join(line.split()[1:]) for line in lines[:3])
        return Identity(int(pid), start, boot) if pid.isdecimal() and start else None

    # --- data -----------------------------------------------------------------------------------------

    def has_data(self) -> bool:
        return self.lock.exists()

    @contextlib.contextmanager
    def locked(self, *, make: bool = False) -> Iterator[int | None]:
        """Try to take the lock: gives the descriptor that holds it, or None when somebody else does.

        A child that inherits the descriptor keeps the lock beyond this block. `make` creates data directory and
        lock; otherwise `FileNotFoundError` when there are none.
        """
        descriptor = self._take(make=make)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def is_locked(self) -> bool:
        """True when an engine, or somebody about to start or remove it, holds the lock."""
        try:
            with self.locked() as descriptor:
                return descriptor is None
        except FileNotFoundError:
            return False

    def _take(self, *, make: bool) -> int | None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            if make:
                self.data.mkdir(mode=0o700, exist_ok=True)
            try:
                descriptor = os.open(self.lock, flags | (os.O_CREAT if make else 0), 0o600)
            except FileNotFoundError:
                if make:
                    continue  # removed this very moment
                raise
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(descriptor, self.lock):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the lock of data that has been removed meanwhile

    def remove(self) -> None:
        """Remove everything. The caller holds the lock, or there is no data.

        The data goes last and in one step: whoever waits for the lock finds either all of it or none, and a removal
        that was cut short leaves nothing that could be taken for an engine's data.
        """
        for path in (self.record, self.log, self.old_log, self._spec_draft, self.spec):
            path.unlink(missing_ok=True)
        remains = self._folder / f"{self._name}.removing"
        _remove_tree(remains)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.data, remains)
        _remove_tree(remains)

    # --- log ------------------------------------------------------------------------------------------

    def open_log(self) -> int:
        """The log, for appending; a long one is put aside first."""
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > _LOG_ROTATED_AT:
                os.replace(self.log, self.old_log)
        return os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_tree(path: Path) -> None:
    while os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):  # somebody else removes it at the same time
            shutil.rmtree(path)
