"""Engines as local processes, for development and CI. They outlive the orchestrator and are adopted by the next one.

The fence is the lock in an engine's data directory (`engine_files`): the engine itself holds it for as long as it
lives, so at most one process ever works on one brain, however many orchestrators there are. Nothing is remembered
between calls; each one looks at the files and at the process.

There is no isolation and there are no ceilings: an engine is a process of this user.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, ClassVar
from uuid import UUID, uuid4

import structlog

from orchestrator.backends import processes
from orchestrator.backends.base import (
    BackendObject,
    Capabilities,
    EngineBackend,
    EngineEndpoint,
    LogLine,
    ObjectState,
)
from orchestrator.backends.engine_files import EngineFiles, Spec
from orchestrator.backends.launcher import launch
from orchestrator.backends.log_file import read_log
from orchestrator.errors import BackendError, BackendUnavailable, ConfigurationError, ObjectMissing, PortTaken

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from orchestrator.backends.processes import Identity
    from orchestrator.settings import Settings

__all__ = ["SubprocessBackend"]

_log = structlog.get_logger(__name__)

# Inside the class `list` is a method.
_Objects = list[BackendObject]
_Words = list[str]

_HOST = "127.0.0.1"
_REPLACE_GRACE_S = 5.0
_DESTROY_GRACE_S = 2.0
_KILL_PATIENCE_S = 10.0
_FREEZE_PATIENCE_S = 5.0
_LOCK_PATIENCE_S = 3.0

# What a program needs of its surroundings; everything else is named in ORCH_ENGINE_ENV_PASSTHROUGH.
_INHERITED = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH")

_TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EINTR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class SubprocessBackend(EngineBackend):
    """Runs `ORCH_SUBPROCESS_COMMAND` once per engine, with its data below `ORCH_DATA_ROOT`."""

    name: ClassVar[str] = "subprocess"
    capabilities: ClassVar[Capabilities] = Capabilities(freeze=True, listing=True, logs=True, replace=True)

    def __init__(self, settings: Settings, deployment_id: UUID) -> None:
        self._deployment_id = deployment_id
        self._root = settings.data_root.expanduser().resolve()
        self._folder = self._root / "engines"
        self._words = shlex.split(settings.subprocess_command)
        self._catalog = settings.catalog_mount_path
        self._location: UUID | None = None
        self._keeps_data = False

    @classmethod
    def from_settings(cls, settings: Settings, deployment_id: UUID) -> SubprocessBackend:
        return cls(settings, deployment_id)

    async def open(self) -> None:
        if "{image}" not in self._words[0] and shutil.which(self._words[0]) is None:
            raise ConfigurationError(f"ORCH_SUBPROCESS_COMMAND: '{self._words[0]}' is not an executable program.")
        try:
            await asyncio.to_thread(self._make_folders)
        except OSError as error:
            raise ConfigurationError(f"ORCH_DATA_ROOT: {self._root} cannot be used ({error.strerror}).") from error
        await self.location_id()

    async def check(self) -> None:
        if not await asyncio.to_thread(self._folder.is_dir):
            raise BackendUnavailable(f"ORCH_DATA_ROOT: {self._folder} is not there.")

    # --- the documented interface ---------------------------------------------------------------------

    async def create(self, engine_id: UUID, port: int, env: dict[str, str], image: str) -> EngineEndpoint:
        """See the interface. A frozen process of the same incarnation is adopted as it is.

        Refuses to replace a running process of a newer incarnation: then the caller is out of date.
        """
        files = self._files(engine_id)
        with _mapped("create", engine_id):
            spec = Spec(
                deployment_id=self._deployment_id,
                incarnation=int(env.get("ENGINE_INCARNATION", "0")),
                port=port,
                image=image,
                env={name: value for name, value in env.items() if not name.startswith("ORCH_")},
            )
            return _endpoint(await self._bring_up(files, spec))

    async def start(self, engine_id: UUID) -> None:
        """See the interface. A frozen process is left frozen."""
        files = self._files(engine_id)
        with _mapped("start", engine_id):
            await self._bring_up(files, None)

    async def stop(self, engine_id: UUID, timeout: int = 30) -> None:
        files = self._files(engine_id)
        with _mapped("stop", engine_id):
            if self._owned(files) is None:
                return
            identity = files.read_record()
            if identity is not None:
                await self._end(files, identity, timeout)
            patience = _Patience(_LOCK_PATIENCE_S)
            while self._live(files) is None and files.is_locked():
                await self._wait_for_lock(files, patience)

    async def destroy(self, engine_id: UUID) -> None:
        files = self._files(engine_id)
        with _mapped("destroy", engine_id):
            patience = _Patience(_LOCK_PATIENCE_S)
            while True:
                self._owned(files)
                identity = files.read_record()
                if identity is not None:
                    await self._end(files, identity, _DESTROY_GRACE_S)
                if await asyncio.to_thread(self._remove, files):
                    return
                await self._wait_for_lock(files, patience)

    async def is_running(self, engine_id: UUID) -> bool:
        found = await self.find(engine_id)
        return found is not None and found.state is not ObjectState.EXITED

    # --- optional abilities ---------------------------------------------------------------------------

    def keeping_data(self) -> SubprocessBackend:
        view = copy.copy(self)
        view._keeps_data = True
        return view

    async def location_id(self) -> UUID:
        if self._location is None:
            with _mapped("location", None):
                self._location = await asyncio.to_thread(self._read_or_make_location)
        return self._location

    async def is_port_free(self, port: int) -> bool:
        with _mapped("port test", None):
            return _port_is_free(port)

    async def has_data(self, engine_id: UUID) -> bool:
        with _mapped("look-up", engine_id):
            return self._files(engine_id).has_data()

    async def find(self, engine_id: UUID) -> BackendObject | None:
        with _mapped("look-up", engine_id):
            return self._object(self._files(engine_id))

    async def list(self) -> list[BackendObject]:
        with _mapped("list", None):
            return await asyncio.to_thread(self._objects)

    async def freeze(self, engine_id: UUID) -> None:
        """SIGSTOP for the whole group; returns when all of it really stands still."""
        files = self._files(engine_id)
        with _mapped("freeze", engine_id):
            identity = self._live_or_missing(files)
            if not processes.signal_group(identity, signal.SIGSTOP):
                raise ObjectMissing(str(engine_id))
            patience = _Patience(_FREEZE_PATIENCE_S, first_pause=0)
            while not processes.stands_still(identity):
                if not processes.alive(identity):
                    raise ObjectMissing(str(engine_id))
                if not await patience.pause():
                    raise BackendUnavailable(f"Engine {engine_id} does not stand still after {_FREEZE_PATIENCE_S:g} s.")

    async def thaw(self, engine_id: UUID) -> None:
        files = self._files(engine_id)
        with _mapped("thaw", engine_id):
            if not processes.signal_group(self._live_or_missing(files), signal.SIGCONT):
                raise ObjectMissing(str(engine_id))

    async def logs(self, engine_id: UUID, *, tail: int, follow: bool = False) -> AsyncGenerator[LogLine, None]:
        """See the interface; standard output and error are one stream. Following ends when the engine is destroyed."""
        files = self._files(engine_id)
        with _mapped("logs", engine_id):
            if self._owned(files) is None:
                raise ObjectMissing(str(engine_id))
            async with contextlib.aclosing(read_log(files.log, tail=tail, follow=follow)) as lines:
                async for line in lines:
                    yield line

    # --- what there is ----------------------------------------------------------------------------------

    def _files(self, engine_id: UUID) -> EngineFiles:
        return EngineFiles(self._folder, engine_id)

    def _owned(self, files: EngineFiles) -> Spec | None:
        """The spec of our engine, or None when there is none; never that of another deployment."""
        spec = files.read_spec()
        if spec is not None and spec.deployment_id != self._deployment_id:
            raise BackendError(f"Engine {files.engine_id} belongs to another deployment; it is left alone.")
        return spec

    def _live(self, files: EngineFiles) -> Identity | None:
        identity = files.read_record()
        return identity if identity is not None and processes.alive(identity) else None

    def _live_or_missing(self, files: EngineFiles) -> Identity:
        identity = self._live(files) if self._owned(files) is not None else None
        if identity is None:
            raise ObjectMissing(str(files.engine_id))
        return identity

    def _object(self, files: EngineFiles) -> BackendObject | None:
        spec = files.read_spec()
        if spec is None or spec.deployment_id != self._deployment_id:
            return None
        identity = files.read_record()
        state = ObjectState.EXITED if identity is None else processes.state(identity)
        return BackendObject(
            engine_id=files.engine_id,
            state=state,
            incarnation=spec.incarnation,
            endpoint=_endpoint(spec),
            exit_code=None if identity is None else processes.exit_code(identity),
        )

    def _objects(self) -> _Objects:
        processes.reap()
        found = []
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        for name in names:
            stem, _, extension = name.partition(".")
            if extension != "json":
                continue
            try:
                engine_id = UUID(stem)
            except ValueError:
                continue  # not ours: no engine's id
            try:
                one = self._object(self._files(engine_id))
            except BackendError as error:  # one damaged file must not hide all the others
                _log.warning("engine_unreadable", engine_id=stem, error=error.message)
                continue
            if one is not None:
                found.append(one)
        return found

    # --- starting -----------------------------------------------------------------------------------------

    async def _bring_up(self, files: EngineFiles, wanted: Spec | None) -> Spec:
        """Make the engine run: as `wanted` says, or by its stored spec. Gives the spec of what runs."""
        command = None if wanted is None else self._command(wanted.image)
        patience = _Patience(_LOCK_PATIENCE_S)
        while True:
            stored = self._owned(files)
            identity = files.read_record()
            if stored is not None and identity is not None:
                if processes.alive(identity):
                    if wanted is None or stored.incarnation == wanted.incarnation:
                        return stored
                    if stored.incarnation > wanted.incarnation:
                        raise BackendError(
                            f"Engine {files.engine_id} runs as incarnation {stored.incarnation}, "
                            f"newer than {wanted.incarnation}; it is left alone."
                        )
                    await self._end(files, identity, _REPLACE_GRACE_S)
                else:
                    await self._end_kin(files, identity)
            spec = wanted or stored
            if spec is None or (wanted is None and not files.has_data()):
                raise ObjectMissing(str(files.engine_id))
            words = command or self._command(spec.image)
            if await asyncio.to_thread(self._spawn, files, spec, words, wanted is not None):
                return spec
            await self._wait_for_lock(files, patience)

    def _spawn(self, files: EngineFiles, spec: Spec, command: _Words, new: bool) -> bool:
        """Take the lock and launch; False when somebody else holds the lock, or runs without it.

        One call in one thread: a caller who is cancelled meanwhile leaves nothing half done.
        """
        if new:
            self._make_folders()
        try:
            with files.locked(make=new and not self._keeps_data) as lock:
                if lock is None or self._live(files) is not None:
                    return False
                self._owned(files)
                if not _port_is_free(spec.port):
                    raise PortTaken(spec.port)
                if new:
                    files.write_spec(spec)
                launch(files, lock, command, self._environment(files, spec))
        except FileNotFoundError:
            if new and (not self._keeps_data or files.has_data()):
                raise
            raise ObjectMissing(str(files.engine_id)) from None
        return True

    def _command(self, image: str) -> _Words:
        words = [word.replace("{image}", image) for word in self._words]
        program = shutil.which(words[0])
        if program is None:
            raise BackendError(f"ORCH_SUBPROCESS_COMMAND: '{words[0]}' is not an executable program.")
        return [os.path.abspath(program), *words[1:]]

    def _environment(self, files: EngineFiles, spec: Spec) -> dict[str, str]:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment.setdefault("PATH", os.defpath)
        environment["HOME"] = str(files.data)
        environment |= spec.env
        environment |= {
            "SQLITE_DB_PATH": str(files.brain),
            "HOST": _HOST,
            "PORT": str(spec.port),
            "ENGINE_IMAGE": spec.image,
        }
        if self._catalog is not None:
            environment["CATALOG_DIR"] = str(self._catalog)
        return environment

    def _make_folders(self) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)

    # --- ending -------------------------------------------------------------------------------------------

    async def _end(self, files: EngineFiles, identity: Identity, grace: float) -> None:
        """End exactly this process and its group; never one that was started after it."""
        was_alive = processes.signal_group(identity, signal.SIGTERM)
        if was_alive:
            processes.signal_group(identity, signal.SIGCONT)  # a frozen process cannot obey
            if not await processes.wait_gone(identity, grace):
                processes.signal_group(identity, signal.SIGKILL)
                await self._await_death(identity)
        await self._end_kin(files, identity, just_ended=was_alive)

    async def _end_kin(self, files: EngineFiles, leader: Identity, *, just_ended: bool = False) -> None:
        """Kill what an exited engine left in its group; what cannot be proven to be its own is left alone."""
        if not processes.group_exists(leader.pid):
            return
        left = await asyncio.to_thread(processes.kin, leader, self._mark(files), just_ended=just_ended)
        for identity in left:
            processes.kill(identity)
        for identity in left:
            await self._await_death(identity)

    async def _wait_for_lock(self, files: EngineFiles, patience: _Patience) -> None:
        """Give whoever holds the lock without a running engine a moment; then end it if it is an engine's rest."""
        if await patience.pause():
            return
        left, others = await asyncio.to_thread(processes.holders, files.lock, self._mark(files))
        if self._live(files) is not None or not files.is_locked():
            return
        if not left:
            message = f"{files.lock} is held by {', '.join(others) or 'an unknown process'}."
            raise BackendError(message) if others else BackendUnavailable(message)
        for identity in left:
            processes.kill(identity)
        for identity in left:
            await self._await_death(identity)

    async def _await_death(self, identity: Identity) -> None:
        if not await processes.wait_gone(identity, _KILL_PATIENCE_S):
            raise BackendUnavailable(f"Process {identity.pid} is still there {_KILL_PATIENCE_S:g} s after SIGKILL.")

    def _mark(self, files: EngineFiles) -> str:
        return f"SQLITE_DB_PATH={files.brain}"

    def _remove(self, files: EngineFiles) -> bool:
        """Remove everything under the lock; False when somebody holds it."""
        try:
            with files.locked() as lock:
                if lock is None or self._live(files) is not None:
                    return False
                self._owned(files)
                files.remove()
        except FileNotFoundError:
            files.remove()
        return True

    # --- the location -----------------------------------------------------------------------------------

    def _read_or_make_location(self) -> UUID:
        self._make_folders()
        path = self._root / "location_id"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read().strip()
            # Shorter: its writer was cut off under this lock, so nobody has ever read it.
            if len(text) < 36:
                text = str(uuid4())
                file.seek(0)
                file.write(f"{text}\n")
                file.flush()
                os.fsync(file.fileno())
        try:
            return UUID(text)
        except ValueError:
            raise BackendError(f"{path} is damaged: restore the id that it had.") from None


class _Patience:
    """Pauses that grow, and an end of them."""

    def __init__(self, seconds: float, first_pause: float = 0.002) -> None:
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._pause = first_pause

    async def pause(self) -> bool:
        """Wait a little longer than last time; False when it has been long enough."""
        if asyncio.get_running_loop().time() >= self._deadline:
            return False
        await asyncio.sleep(self._pause)
        self._pause = min(max(self._pause * 1.5, 0.0002), 0.05)
        return True


def _endpoint(spec: Spec) -> EngineEndpoint:
    return EngineEndpoint(host=_HOST, port=spec.port, container_id=None)


def _port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that were closed do not count
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


@contextlib.contextmanager
def _mapped(action: str, engine_id: UUID | None) -> Iterator[None]:
    """The one place where errors of the system become ours. Values of variables never get into a message."""
    what = f"{action} of engine {engine_id}" if engine_id is not None else action
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        message = f"The {what} failed: {error.strerror or type(error).__name__}{where}."
        if error.errno in _TRANSIENT:
            raise BackendUnavailable(message) from error
        raise BackendError(message) from error
    except (ValueError, OverflowError, subprocess.SubprocessError) as error:
        raise BackendError(f"The {what} failed: {type(error).__name__}.") from None
