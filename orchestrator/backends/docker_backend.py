"""Engines as containers on a Docker Engine, local or remote. The production backend.

A container is found by its name and trusted by its labels: nothing without this deployment's id is ever changed. The
fence is the container's id: each create makes a new one, and `pinned()` acts on one id alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import socket
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self
from uuid import UUID, uuid4

from orchestrator.backends.base import (
    BackendObject,
    Capabilities,
    EngineBackend,
    EngineEndpoint,
    LogLine,
    ObjectState,
    report,
)
from orchestrator.backends.docker_client import DockerClient
from orchestrator.backends.docker_containers import Containers, is_live
from orchestrator.backends.docker_errors import Conflict, NetworkFull, NoSuchObject, PortBusy, RunLeftBehind
from orchestrator.backends.docker_events import watch
from orchestrator.backends.docker_host import find_docker_host, is_loopback
from orchestrator.backends.docker_logs import after, read_lines
from orchestrator.backends.docker_names import (
    DEPLOYMENT,
    ENGINE,
    INCARNATION,
    LOCATION,
    LOCATION_VOLUME,
    PORT,
    container_name,
    engine_of,
    number,
    volume_name,
)
from orchestrator.backends.docker_networks import Networks
from orchestrator.backends.docker_pull import Images, is_lasting
from orchestrator.backends.docker_reach import check_reach
from orchestrator.backends.docker_spec import ContainerSpec
from orchestrator.errors import BackendError, BackendUnavailable, ConfigurationError, ObjectMissing, PortTaken

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from orchestrator.backends.base import BackendEvent
    from orchestrator.settings import Settings

__all__ = ["DockerBackend"]

# Inside the class `list` is a method.
_Objects = list[BackendObject]

# How long a name may be held by what is on its way in or out.
_CREATE_PATIENCE_S = 20.0
_NAME_PAUSE_S = 0.1
_FOLLOW_PAUSE_S = 0.3
_REPLACE_GRACE_S = 5
_STATES = {"running": ObjectState.RUNNING, "paused": ObjectState.FROZEN}


class DockerBackend(EngineBackend):
    name: ClassVar[str] = "docker"
    capabilities: ClassVar[Capabilities] = Capabilities(
        freeze=True, listing=True, logs=True, ceilings=True, events=True, restarts=True, holds_port=True
    )

    def __init__(self, settings: Settings, deployment_id: UUID, client: DockerClient, networks: Networks) -> None:
        self._settings = settings
        self._deployment_id = deployment_id
        self._client = client
        self._networks = networks
        self._containers = Containers(client)
        self._images = Images(client, settings.pull_timeout_s)
        self._spec = ContainerSpec.from_settings(settings, deployment_id)
        self._pin: str | None = None
        self._keeps_data = False
        self._location: UUID | None = None

    @classmethod
    def from_settings(cls, settings: Settings, deployment_id: UUID) -> Self:
        """Raises `ConfigurationError`; `BackendUnavailable` when no daemon is named and none is found here."""
        host = find_docker_host()
        host_mode = settings.engine_url_mode == "host"
        if host_mode and host.is_remote and is_loopback(settings.engine_publish_address):
            raise ConfigurationError(
                f"ORCH_ENGINE_PUBLISH_ADDRESS: {settings.engine_publish_address} is the loopback of the remote Docker "
                "host, which cannot be reached from here; set an address of that host, and ORCH_ENGINE_HOST."
            )
        client = DockerClient(host)
        return cls(settings, deployment_id, client, Networks(client, settings.engine_network, isolated=host_mode))

    async def open(self) -> None:
        try:
            await self._client.ping()
            own = await check_reach(self._client, self._networks, self._settings)
            if own is not None:
                await self._networks.join_all(own)
        except BaseException:
            await self._client.close()
            raise

    async def close(self) -> None:
        await self._images.close()
        await self._client.close()

    # --- the documented interface ---------------------------------------------------------------------

    async def create(self, engine_id: UUID, port: int, env: dict[str, str], image: str) -> EngineEndpoint:
        # A lasting name is used as it is: the daemon says itself when it has no such image (any more).
        resolved = image if is_lasting(image) else await self.resolve_image(image)
        if self._keeps_data:
            await self._require_data(engine_id)
        else:
            await self._ensure_volume(engine_id)
        name = container_name(engine_id)
        incarnation = int(env.get("ENGINE_INCARNATION", "0"))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _CREATE_PATIENCE_S
        while True:
            network = await self._networks.pick()
            config = self._spec.container(engine_id, port, env, resolved, network, has_data=self._keeps_data)
            if self._location is not None:
                config["Labels"][LOCATION] = str(self._location)
            report("create")
            try:
                container = await self._containers.create(name, config)
            except NoSuchObject:
                self._networks.forget(network)
                resolved = await self.resolve_image(image)
            except Conflict:
                adopted = await self._adopt_or_clear(engine_id, incarnation, port)
                if adopted is not None:
                    return adopted
            else:
                if self._keeps_data:
                    await self._require_data(engine_id, container)
                if await self._start_new(container, port, network):
                    return self._endpoint(engine_id, container, config["Labels"])
            if loop.time() > deadline:
                raise BackendUnavailable(f"The name '{name}' is not free yet: Docker is still making or removing it.")

    async def start(self, engine_id: UUID) -> None:
        found = await self._find(engine_id)
        if found is None:
            raise ObjectMissing(str(engine_id))
        if found["State"].get("Paused"):
            await self._containers.set_paused(found["Id"], paused=False)
            return
        try:
            await self._containers.start(found["Id"])
        except (NoSuchObject, NetworkFull, RunLeftBehind):
            # The container is gone or spoilt, or the network that it was made for has gone or is full: it must be made
            # anew. Its data is the volume's.
            raise ObjectMissing(str(engine_id)) from None
        except PortBusy:
            raise PortTaken(number(found["Config"]["Labels"], PORT, 0)) from None

    async def stop(self, engine_id: UUID, timeout: int = 30) -> None:
        found = await self._find(engine_id)
        if found is not None:
            await self._containers.stop(found, timeout)

    async def destroy(self, engine_id: UUID) -> None:
        # A destroy is never undone: whatever container the claim recorded, none of this engine may stay.
        for last in (False, False, True):
            for container in await self._containers.labelled(self._spec.labels(engine_id)):
                await self._containers.remove(container["Id"])
            if await self._own_volume(engine_id) is None:
                return
            try:
                await self._remove_volume(volume_name(engine_id))
            except Conflict:
                # In use: by a container that a create under way has made since.
                if last:
                    raise

    async def is_running(self, engine_id: UUID) -> bool:
        found = await self._find(engine_id)
        return found is not None and is_live(found)

    # --- optional abilities ---------------------------------------------------------------------------

    def pinned(self, container_id: str | None) -> DockerBackend:
        if container_id is None:
            return self
        view = copy.copy(self)
        view._pin = container_id
        return view

    async def resolve_image(self, image: str) -> str:
        return await self._images.resolve(image, lambda line: report("pull", line))

    def limited(self, *, memory: str | None, cpus: float | None) -> DockerBackend:
        view = copy.copy(self)
        try:
            view._spec = self._spec.limited(memory, cpus)
        except ConfigurationError as error:
            raise BackendError(f"The product's policy: {error.message}") from None
        return view

    def keeping_data(self) -> DockerBackend:
        view = copy.copy(self)
        view._keeps_data = True
        return view

    async def location_id(self) -> UUID:
        # The daemon makes a volume once: who comes later gets the first one with its label.
        found = await self._volume(LOCATION_VOLUME)
        if found is None:
            found = await self._make_volume(LOCATION_VOLUME, {LOCATION: await self._remembered_location()})
        try:
            self._location = UUID((found.get("Labels") or {}).get(LOCATION, ""))
        except ValueError:
            raise BackendError(
                f"The volume '{LOCATION_VOLUME}' lacks its label; it was not made by the orchestrator. Remove it."
            ) from None
        return self._location

    async def _remembered_location(self) -> str:
        """The id that the engines here remember, should somebody have pruned the volume; else a new one."""
        known = {container["Labels"][LOCATION] for container in await self._containers.labelled({LOCATION: None})}
        return known.pop() if len(known) == 1 else str(uuid4())

    async def is_port_free(self, port: int) -> bool:
        if self._client.host.is_remote or self._spec.publish_address is None:
            return True
        return await asyncio.to_thread(_can_bind, self._spec.publish_address, port)

    async def has_data(self, engine_id: UUID) -> bool:
        found = await self._volume(volume_name(engine_id))
        return found is not None and engine_of(found.get("Labels"), self._deployment_id) == engine_id

    async def find(self, engine_id: UUID) -> BackendObject | None:
        found = await self._find(engine_id)
        if found is None:
            return None
        state = found["State"]
        kind = ObjectState.EXITED
        if is_live(found):
            kind = ObjectState.FROZEN if state.get("Paused") else ObjectState.RUNNING
        labels = found["Config"]["Labels"]
        return BackendObject(
            engine_id=engine_id,
            state=kind,
            incarnation=number(labels, INCARNATION, 0),
            endpoint=self._endpoint(engine_id, found["Id"], labels),
            restart_count=int(found.get("RestartCount") or 0),
            started_at=_time(state.get("StartedAt")),
            exit_code=int(state.get("ExitCode") or 0) if kind is ObjectState.EXITED else None,
            mending=bool(state.get("Restarting")),
        )

    async def list(self) -> _Objects:
        """One call whatever the number of engines. `restart_count` is told by `find` only."""
        objects: _Objects = []
        networks: list[str] = []
        for container in await self._containers.labelled({DEPLOYMENT: str(self._deployment_id)}):
            labels: dict[str, str] = container["Labels"] or {}
            engine_id = engine_of(labels, self._deployment_id)
            if engine_id is None:
                continue
            networks += (container["NetworkSettings"] or {}).get("Networks") or {}
            state = _STATES.get(container["State"], ObjectState.EXITED)
            objects.append(
                BackendObject(
                    engine_id=engine_id,
                    state=state,
                    incarnation=number(labels, INCARNATION, 0),
                    endpoint=self._endpoint(engine_id, container["Id"], labels),
                    exit_code=_exit_code(container["Status"]) if state is ObjectState.EXITED else None,
                    mending=container["State"] == "restarting",
                )
            )
        self._networks.count(networks)
        return objects

    async def freeze(self, engine_id: UUID) -> None:
        await self._set_paused(engine_id, paused=True)

    async def thaw(self, engine_id: UUID) -> None:
        await self._set_paused(engine_id, paused=False)

    async def _set_paused(self, engine_id: UUID, *, paused: bool) -> None:
        container = self._pin
        if container is None:
            # A name may be anybody's; a pinned id was ours when the claim recorded it.
            found = await self._find(engine_id)
            container = None if found is None else str(found["Id"])
        if container is None or not await self._containers.set_paused(container, paused=paused):
            raise ObjectMissing(str(engine_id))

    async def logs(self, engine_id: UUID, *, tail: int, follow: bool = False) -> AsyncGenerator[LogLine, None]:
        found = await self._find(engine_id)
        if found is None:
            raise ObjectMissing(str(engine_id))
        options = {"stdout": "1", "stderr": "1", "timestamps": "1", "tail": str(max(tail, 0))}
        if follow:
            options["follow"] = "1"
        container = None
        while found is not None:
            # Docker's own following ends with the process; ours goes on with the next one.
            if found["Id"] != container or is_live(found):
                container = found["Id"]
                async with (
                    self._client.stream(f"containers/{container}/logs", options) as body,
                    contextlib.aclosing(read_lines(body)) as lines,
                ):
                    async for stamp, line in lines:
                        yield line
                        options |= {"tail": "all", "since": after(stamp)}
            if not follow:
                return
            await asyncio.sleep(_FOLLOW_PAUSE_S)
            found = await self._find(engine_id)

    async def set_ceilings(self, engine_id: UUID, *, memory: str | None = None, cpus: float | None = None) -> None:
        found = await self._find(engine_id)
        if found is None:
            raise ObjectMissing(str(engine_id))
        await self._containers.update(found["Id"], self.limited(memory=memory, cpus=cpus)._spec.ceilings())

    def events(self) -> AsyncGenerator[BackendEvent, None]:
        """What happens to this deployment's containers, for ever; see `docker_events`."""
        return watch(self._client, self._deployment_id)

    # --- parts ----------------------------------------------------------------------------------------

    def _endpoint(self, engine_id: UUID, container: str, labels: dict[str, str]) -> EngineEndpoint:
        if self._spec.publish_address is None:
            return EngineEndpoint(container_name(engine_id), self._spec.container_port, container)
        return EngineEndpoint(self._settings.engine_host, number(labels, PORT, 0), container)

    async def _find(self, engine_id: UUID) -> dict[str, Any] | None:
        """The engine's container, or the pinned one; None when there is none that is ours."""
        found = await self._containers.show(self._pin or container_name(engine_id))
        return found if found and engine_of(found["Config"]["Labels"], self._deployment_id) == engine_id else None

    async def _start_new(self, container: str, port: int, network: str) -> bool:
        """Start what was just made, or remove it again. False when another try on another network makes sense."""
        report("start")
        try:
            await self._containers.start(container)
        except BackendUnavailable:
            raise  # nobody knows what became of it: the next create finds it by its name
        except BackendError as error:
            await self._containers.remove(container)
            if isinstance(error, PortBusy):
                raise PortTaken(port) from None
            if isinstance(error, NetworkFull):
                self._networks.is_full(network)
                return False
            if isinstance(error, NoSuchObject):
                # Its network is gone, or another replica cleared the container away before it was started.
                self._networks.forget(network)
                return False
            if isinstance(error, RunLeftBehind):
                return False
            raise
        return True

    async def _adopt_or_clear(self, engine_id: UUID, incarnation: int, port: int) -> EngineEndpoint | None:
        """Who has the name: the object that we want (its endpoint), nobody any more (None), or a stranger (raises)."""
        name = container_name(engine_id)
        found = await self._containers.show(name)
        if found is None:
            await asyncio.sleep(_NAME_PAUSE_S)  # Docker holds a name for a moment before and after its container
            return None
        labels = found["Config"]["Labels"] or {}
        if engine_of(labels, self._deployment_id) != engine_id:
            raise BackendError(
                f"A container '{name}' exists and does not belong to this deployment; rename or remove it."
            )
        theirs = number(labels, INCARNATION, 0)
        if theirs > incarnation:
            raise BackendError(f"The container '{name}' is of a newer incarnation ({theirs}); this create came late.")
        if is_live(found):
            if theirs == incarnation:
                if found["State"].get("Paused"):
                    await self._containers.set_paused(found["Id"], paused=False)
                return self._endpoint(engine_id, found["Id"], labels)
            # It may be writing: it gets the chance to end in order.
            await self._containers.stop(found, _REPLACE_GRACE_S)
        elif theirs == incarnation and found["State"].get("Status") == "created" and number(labels, PORT, 0) == port:
            # Another replica is between making and starting it: both may start it.
            if self._keeps_data:
                await self._require_data(engine_id, found["Id"])
            if await self._start_new(found["Id"], port, ""):
                return self._endpoint(engine_id, found["Id"], labels)
            return None
        await self._containers.remove(found["Id"])
        return None

    async def _volume(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(await self._client.json("GET", f"volumes/{name}"))
        except NoSuchObject:
            return None

    async def _own_volume(self, engine_id: UUID) -> dict[str, Any] | None:
        """The engine's volume, or the empty one of no engine's that Docker made in its place; never a stranger's."""
        found = await self._volume(volume_name(engine_id))
        labels = (found or {}).get("Labels") or {}
        ours = {DEPLOYMENT: str(self._deployment_id), ENGINE: str(engine_id)}
        return found if {ENGINE: str(engine_id), **labels} == ours else None

    async def _require_data(self, engine_id: UUID, container: str | None = None) -> None:
        """Raises `ObjectMissing`. The `container` of an empty volume that Docker made instead is removed with it."""
        if await self.has_data(engine_id):
            return
        if container is not None:
            await self._containers.remove(container)
            made = await self._own_volume(engine_id)
            if made is not None and ENGINE not in made["Labels"]:
                with contextlib.suppress(Conflict):  # another replica's container has it: that one removes it
                    await self._remove_volume(volume_name(engine_id))
        raise ObjectMissing(str(engine_id))

    async def _ensure_volume(self, engine_id: UUID) -> None:
        name = volume_name(engine_id)
        # Made once: a volume that exists is answered with the labels that it has.
        made = await self._make_volume(name, self._spec.labels(engine_id))
        if engine_of(made.get("Labels"), self._deployment_id) != engine_id:
            raise BackendError(
                f"The volume '{name}' exists and does not belong to this deployment; rename or remove it."
            )

    async def _make_volume(self, name: str, labels: dict[str, str]) -> dict[str, Any]:
        """The volume of this name, with the labels that it has; made when there is none."""
        made: dict[str, Any] = await self._client.json("POST", "volumes/create", {"Name": name, "Labels": labels})
        if not made.get("Labels"):
            # A daemon that was restarted since leaves the labels of a volume that exists out of this answer.
            made = await self._volume(name) or made
        return made

    async def _remove_volume(self, name: str) -> None:
        with contextlib.suppress(NoSuchObject):
            await self._client.json("DELETE", f"volumes/{name}")


def _exit_code(status: str) -> int | None:
    """The code in `Exited (137) 5 minutes ago`."""
    code = status.partition("(")[2].partition(")")[0]
    return int(code) if code.isdecimal() else None


def _time(stamp: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(stamp or "")
    except ValueError:
        return None


def _can_bind(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            # Another reason (an address of another host) says nothing about the port.
            return error.errno != errno.EADDRINUSE
    return True
