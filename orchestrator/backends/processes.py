"""Which process is which: identity, state, signals and waiting, for processes that outlive their parent.

A pid alone is reused; pid, start time and boot id together never are. Every signal goes through an `Identity`, so
that a process which merely inherited the number is never hit. Uses `/proc`; where there is none (macOS), `ps`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from orchestrator.backends.base import ObjectState

__all__ = ["Child", "Identity", "boot_id", "exit_code", "group_exists", "holders", "keep_child", "kin", "reap"]

PROC = Path("/proc")

_EXIT_CODES_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, told apart from every other that ever has its number."""

    pid: int
    start: str  # clock ticks since boot (`/proc`), or a date (`ps`)
    boot: str


@dataclass(frozen=True, slots=True)
class _Status:
    state: str
    parent: int
    group: int
    session: int
    threads: int
    start: str


class Child(subprocess.Popen[bytes]):
    """A child that lives on when its parent ends, so that forgetting it is no mistake to warn of."""

    def __del__(self) -> None:
        """Nothing: `reap` takes care of it, or init does once we are gone."""


_children: dict[Identity, Child] = {}
_exit_codes: dict[Identity, int] = {}
_table = threading.Lock()


@cache
def boot_id() -> str:
    """The id of this boot of the machine."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        pass
    for name in ("kern.bootsessionuuid", "kern.boottime"):
        found = _output("sysctl", "-n", name)
        if found:
            return found
    return "unknown"


def state(identity: Identity) -> ObjectState:
    """What the process is now. A zombie has exited; one of our own children is reaped by the way."""
    status = _status(identity.pid) if identity.boot == boot_id() else None
    if status is None or status.start != identity.start:
        return ObjectState.EXITED
    # The main thread of a process may end before the others do; it then shows as a zombie with several threads.
    if status.state in "ZX" and status.threads <= 1:
        if status.parent == os.getpid():
            _reap_one(identity)
        return ObjectState.EXITED
    return ObjectState.FROZEN if status.state == "T" else ObjectState.RUNNING


def alive(identity: Identity) -> bool:
    return state(identity) is not ObjectState.EXITED


def stands_still(identity: Identity) -> bool:
    """True when every thread of the process, and of its descendants in its group, is stopped.

    A stop reaches one thread after the other; until then another one may still write.
    """
    return state(identity) is ObjectState.FROZEN and _tree_stands_still(identity.pid, identity.pid)


def _tree_stands_still(pid: int, group: int) -> bool:
    tasks = f"{PROC}/{pid}/task"
    try:
        for thread in os.listdir(tasks):
            status = _parsed(f"{tasks}/{thread}/stat")
            if status is None or status.state in "ZX":
                continue
            if status.group == group and status.state != "T":
                return False
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"{tasks}/{thread}/children") as file:
                if not all(_tree_stands_still(int(child), group) for child in file.read().split()):
                    return False
    except FileNotFoundError:
        return True  # gone, or there is no process table
    return True


def signal_group(identity: Identity, number: signal.Signals) -> bool:
    """Signal the whole group that the process leads; False when the process is gone."""
    if not alive(identity):
        return False
    try:
        os.killpg(identity.pid, number)
    except ProcessLookupError:
        return False
    return True


def kill(identity: Identity) -> None:
    """SIGKILL for this one process; a gone one is no error."""
    if alive(identity):
        with contextlib.suppress(ProcessLookupError):
            os.kill(identity.pid, signal.SIGKILL)


def group_exists(pid: int) -> bool:
    """True when a process group of that number has a member that we may signal."""
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


async def wait_gone(identity: Identity, timeout: float) -> bool:
    """Wait until the process has exited; False when it has not after `timeout` seconds."""
    descriptor = _pidfd(identity.pid)
    if descriptor is None:
        return await _poll_gone(identity, timeout)
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    try:
        loop.add_reader(descriptor, gone.set)
        try:
            if not alive(identity):
                return True
            async with asyncio.timeout(timeout):
                await gone.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)
    return not alive(identity)


async def _poll_gone(identity: Identity, timeout: float) -> bool:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    pause = 0.001
    while alive(identity):
        left = deadline - loop.time()
        if left <= 0:
            return False
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.5, 0.05)
    return True


def _pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None  # gone, forbidden by a sandbox, or out of descriptors: asking again and again works as well


# --- our own children -----------------------------------------------------------------------------------


def keep_child(identity: Identity, child: Child) -> None:
    """Remember a child, so that it is reaped when it exits."""
    with _table:
        _children[identity] = child


def reap() -> None:
    """Reap those of our children that have exited. Never waits, and never takes somebody else's child."""
    for identity in list(_children):
        _reap_one(identity)


def _reap_one(identity: Identity) -> None:
    child = _children.get(identity)
    if child is None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(identity.pid, os.WNOHANG)  # handed to us by the kernel when its parent died
        return
    code = child.poll()
    if code is None:
        return
    with _table:
        _children.pop(identity, None)
        _exit_codes[identity] = code if code >= 0 else 128 - code
        while len(_exit_codes) > _EXIT_CODES_KEPT:
            del _exit_codes[next(iter(_exit_codes))]


def exit_code(identity: Identity) -> int | None:
    """The exit code as a shell shows it (128 + signal), known only to the process that spawned the engine."""
    return _exit_codes.get(identity)


# --- what an engine may leave behind ----------------------------------------------------------------------


def kin(leader: Identity, mark: str, *, just_ended: bool) -> list[Identity]:
    """What is left of the group and session of a process that has exited.

    Only processes whose environment holds `mark` (`NAME=value`), and none older than the leader: a number is never
    enough to kill for. Without `/proc` nothing of that can be seen; then the group's number is taken for a proof
    when its leader has `just_ended`, and never later.
    """
    if leader.boot != boot_id():
        return []
    if not _has_proc():
        return _group_from_ps(leader) if just_ended else []
    found = []
    for pid in _pids():
        status = _status(pid)
        if (
            status is not None
            and leader.pid in (status.group, status.session)
            and pid != leader.pid
            and status.state not in "ZX"
            and int(status.start) >= int(leader.start)
            and _has_mark(pid, mark)
        ):
            found.append(Identity(pid, status.start, leader.boot))
    return found


def holders(path: Path, mark: str) -> tuple[list[Identity], list[str]]:
    """Who has a file open: those whose environment holds `mark`, and a description of all others."""
    ours: list[Identity] = []
    others: list[str] = []
    for pid in _pids():
        status = _status(pid)
        if status is None or not _has_open(pid, str(path)):
            continue
        if pid != os.getpid() and _has_mark(pid, mark):
            ours.append(Identity(pid, status.start, boot_id()))
        else:
            others.append(f"process {pid} ({_name(pid)})")
    return ours, others


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir(PROC) if name.isdecimal()]
    except FileNotFoundError:
        return []


def _has_mark(pid: int, mark: str) -> bool:
    try:
        return os.fsencode(mark) in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _has_open(pid: int, path: str) -> bool:
    folder = PROC / str(pid) / "fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    for name in names:
        with contextlib.suppress(OSError):
            if os.readlink(folder / name) == path:
                return True
    return False


def _name(pid: int) -> str:
    try:
        return (PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "?"


# --- reading one process ------------------------------------------------------------------------------------


def _status(pid: int) -> _Status | None:
    found = _parsed(f"{PROC}/{pid}/stat")
    return _status_from_ps(pid) if found is None and not _has_proc() else found


def _parsed(path: str) -> _Status | None:
    try:
        with open(path, "rb") as file:
            text = file.read().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return _Status(
        state=fields[0],
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        threads=int(fields[17]),
        start=fields[19],
    )


def _has_proc() -> bool:
    return (PROC / "self").exists()


def _group_from_ps(leader: Identity) -> list[Identity]:
    rows = (line.split() for line in _output("ps", "-A", "-o", "pid=,pgid=,lstart=").splitlines())
    return [
        Identity(int(pid), " ".join(start), leader.boot)
        for pid, group, *start in rows
        if group == str(leader.pid) != pid
    ]


def _status_from_ps(pid: int) -> _Status | None:
    fields = _output("ps", "-o", "state=,ppid=,pgid=,lstart=", "-p", str(pid)).split()
    if len(fields) < 4:
        return None
    return _Status(
        state=fields[0][0],
        parent=int(fields[1]),
        group=int(fields[2]),
        session=0,
        threads=1,
        start=" ".join(fields[3:]),
    )


def _output(*command: str) -> str:
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC0"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
