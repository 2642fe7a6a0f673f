"""Docker's failures as our errors, in one place.

Everything that aiodocker and aiohttp raise becomes a `BackendError`. The subclasses here never leave the backend: its
verbs turn them into what their callers know (`ObjectMissing`, `PortTaken`, …) or let them pass as plain `BackendError`.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import aiohttp
from aiodocker import DockerContextError, DockerError, DockerStreamError

from orchestrator.errors import BackendError, BackendUnavailable, ImageNotFound, OrchestratorError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Conflict",
    "NetworkFull",
    "NoSuchObject",
    "PortBusy",
    "RunLeftBehind",
    "image_error",
    "map_error",
    "mapped",
    "reason",
]

# aiodocker's status for "no connection".
_NOT_CONNECTED = 900
_MAX_REASON = 300

_PORT_BUSY = re.compile(r"port is already allocated|address already in use|ports are not available", re.I)
_NETWORK_FULL = re.compile(r"exchange full|no available (ipv4 )?addresses", re.I)
_BEING_REMOVED = re.compile(r"marked for removal")
_GOING_DOWN = re.compile(
    r"shutting down|context canceled|grpc: the client connection is closing|transport is closing|database not open"
    r"|ttrpc: closed|error while dialing|failed to update store for object type \S+: open : no such file"
)
# What containerd says when a daemon that ended in the middle of a start or an exit left its record or folder of the
# container's last run (moby/moby #38346, #39630, #50040). No later start of that container gets past it.
_RUN_LEFT_BEHIND = re.compile(
    r"mkdir \S*/containerd/\S+: file exists|container with (given )?id (already )?exists|id already in use"
    r"|task \S+ already exists",
    re.I,
)

_NO_ACCESS = re.compile(r"unauthorized|authentication required|no basic auth|access denied|forbidden|login", re.I)
_NO_REGISTRY = re.compile(
    r"dial tcp|no such host|connection refused|timeout|timed? out|canceled while waiting|network is unreachable"
    r"|server gave HTTP response|x509|tls:|\bEOF\b",
    re.I,
)
_NO_IMAGE = re.compile(r"manifest unknown|manifest for .* not found|not found|no such image|no matching manifest", re.I)


class NoSuchObject(BackendError):
    """404: no such container, volume, network or image."""


class Conflict(BackendError):
    """409: the name is taken, or the object's state does not allow it."""


class PortBusy(BackendError):
    """The published port is held by something else."""


class RunLeftBehind(BackendError):
    """Traces of its last run keep the container from starting, for good: only a new one can run."""


class NetworkFull(BackendError):
    """The bridge takes no further container."""


def reason(message: str) -> str:
    """Docker's message as one line of bounded length."""
    line = " ".join(message.split()).removeprefix("Error response from daemon: ")
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 1] + "…"


def map_error(error: Exception) -> BackendError:
    """Our error for anything that a call to Docker may raise."""
    if isinstance(error, BackendError):
        return error
    if isinstance(error, DockerContextError):
        return BackendError(f"Docker's own configuration: {reason(error.message)}")
    if isinstance(error, DockerError):
        return _answer(error.status, str(error.message))
    if isinstance(error, TimeoutError):
        return BackendUnavailable("Docker does not answer in time.")
    if isinstance(error, (aiohttp.ClientError, OSError, EOFError)):
        return BackendUnavailable(f"Docker cannot be reached: {reason(str(error)) or type(error).__name__}")
    return BackendError(f"Docker gave an answer that cannot be read ({type(error).__name__}).")


def _answer(status: int, message: str) -> BackendError:
    said = reason(message)
    if status == _NOT_CONNECTED:
        return BackendUnavailable(f"Docker cannot be reached: {said}")
    if status in (502, 503, 504) or _GOING_DOWN.search(message):
        return BackendUnavailable(f"Docker is not ready: {said}")
    if _PORT_BUSY.search(message):
        return PortBusy(f"Docker: {said}")
    if _NETWORK_FULL.search(message):
        return NetworkFull(f"Docker: {said}")
    if _RUN_LEFT_BEHIND.search(message):
        return RunLeftBehind(f"Docker: {said}")
    if status == 404 or _BEING_REMOVED.search(message):
        return NoSuchObject(f"Docker: {said}")
    if status == 409:
        return Conflict(f"Docker: {said}")
    return BackendError(f"Docker: {said or f'status {status}'}")


def image_error(image: str, error: Exception) -> BackendError:
    """Our error for a failed pull: it says whether name, access or registry is what to mend."""
    if not isinstance(error, DockerError) or error.status in (_NOT_CONNECTED, 503):
        return map_error(error)
    message = str(error.message)
    if isinstance(error, DockerStreamError) or error.status in (401, 403, 404, 500):
        # Registries answer "denied" for a repository that does not exist as well: the words decide.
        if "does not exist" in message:
            return ImageNotFound(image, "not on this host, and its registry does not have it or asks for a login")
        if _NO_ACCESS.search(message):
            return ImageNotFound(image, "its registry refuses access; check the credentials in the Docker config")
        if _NO_IMAGE.search(message):
            return ImageNotFound(image, "not on this host and not in its registry")
        if _NO_REGISTRY.search(message):
            return ImageNotFound(image, "not on this host, and its registry cannot be reached")
    if error.status == 400:
        return ImageNotFound(image, reason(message).rstrip("."))
    return map_error(error)


@contextmanager
def mapped() -> Iterator[None]:
    """Whatever a call to Docker raises inside leaves as a `BackendError`."""
    try:
        yield
    except OrchestratorError:
        raise
    except Exception as error:
        raise map_error(error) from error
