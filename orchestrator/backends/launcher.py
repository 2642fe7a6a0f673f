"""Starts an engine's process so that it outlives us and can be found again.

A tiny `/bin/sh`, in a session of its own, writes which process it is and then becomes the engine by `exec`; it has
inherited the engine's lock. Whenever we die, what is left is one of these:

- lock taken, nothing spawned: the lock ends with us;
- spawned, record not finished: the launcher ends without becoming the engine, and the lock ends with it;
- record finished: the engine runs, holds the lock, and the record says which process it is.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from typing import TYPE_CHECKING

from orchestrator.backends import processes
from orchestrator.errors import BackendError, BackendUnavailable

if TYPE_CHECKING:
    from orchestrator.backends.engine_files import EngineFiles

__all__ = ["launch"]

_PATIENCE_S = 10

# Arguments: record, boot id, directory of the process table, command. Standard output is a pipe to us: a line on it
# says that the record is complete; if we died meanwhile, writing the line ends the launcher (SIGPIPE).
_SCRIPT = """
set -eu
umask 077
record=$1 boot=$2 proc=$3
shift 3
field22() { shift 19; start=$1; }
if [ -r "$proc/$$/stat" ]; then
  read -r line <"$proc/$$/stat"
  field22 ${line##*) }
else
  start=$(LC_ALL=C TZ=UTC0 ps -o lstart= -p $$)
fi
printf 'pid %s\\nstart %s\\nboot %s\\nend\\n' "$$" "$start" "$boot" >"$record"
echo ready
exec "$@" >&2
"""


def launch(files: EngineFiles, lock: int, command: list[str], environment: dict[str, str]) -> None:
    """Spawn `command`; returns when its record is complete. The caller holds the lock, and closes its own copy."""
    processes.reap()
    log = files.open_log()
    try:
        child = processes.Child(
            ["/bin/sh", "-c", _SCRIPT, "sh", str(files.record), processes.boot_id(), str(processes.PROC), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=files.data,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,
        )
    finally:
        os.close(log)
    answer = _first_line(child)
    identity = files.read_record() if answer == b"ready\n" else None
    if identity is None or identity.pid != child.pid:
        _end(child)
        if answer is None:
            raise BackendUnavailable(f"The launcher of engine {files.engine_id} did not finish in {_PATIENCE_S} s.")
        raise BackendError(f"The launcher of engine {files.engine_id} failed; its last words are in {files.log}.")
    processes.keep_child(identity, child)


def _first_line(child: processes.Child) -> bytes | None:
    """What the launcher says: a line, nothing when it failed, None when it takes too long."""
    if child.stdout is None:
        return b""
    with child.stdout as pipe:
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN | select.POLLHUP)
        return pipe.readline() if waiting.poll(_PATIENCE_S * 1000) else None


def _end(child: processes.Child) -> None:
    # Not reaped yet, so the number is still its own.
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
