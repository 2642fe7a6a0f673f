"""Bringing an engine up: look at what really is there, do the least that is needed, wait until it is healthy."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.backends.base import BackendObject, EngineEndpoint, ObjectState
from orchestrator.engine_http import KeyPush
from orchestrator.errors import BackendError, BootTimeout, EngineFailed, ObjectMissing, PortTaken
from orchestrator.lifecycle.transitions import STOP_GRACE_S

if TYPE_CHECKING:
    from orchestrator.lifecycle.leases import Lease
    from orchestrator.lifecycle.means import Means
    from orchestrator.registry.rows import Engine, EngineKey

__all__ = ["Booted", "boot", "push_pending_keys"]

PORT_TRIES = 5
STRANGER_STOP_GRACE_S = 2  # an engine that lost its port has done nothing yet
FIRST_PROBE_DELAY_S = 0.005
LONGEST_PROBE_DELAY_S = 0.1
LOOK_EVERY_S = 0.25  # whether the object still lives, while it is not healthy yet
KEY_PUSH_TRIES = 3
KEY_PUSH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Booted:
    """`cold`: a process was started. `boot_ms`: from the backend call to healthy."""

    cold: bool
    boot_ms: int
    applied_generation: int


async def boot(
    means: Means,
    lease: Lease,
    *,
    slot_taken: asyncio.Event,
    fresh: bool = False,
    patience_s: float | None = None,
) -> Booted:
    """Bring the engine up and wait until it is healthy with its newest key.

    `fresh`: what runs is not trusted and is stopped first. `patience_s` replaces the boot timeout (a take-over of
    an operation that has used up most of its time). Raises `BootTimeout`, `EngineFailed`, `BackendError`.
    """
    settings = means.settings
    keys = await means.registry.engines.keys(lease.engine.id)
    newest = keys[-1]
    found = await _look(means, lease)
    if fresh and found is not None and found.state is not ObjectState.EXITED:
        await means.act(lease, lambda backend: backend.stop(lease.engine.id, STOP_GRACE_S))
        found = await _look(means, lease)

    current = found is not None and found.incarnation == lease.engine.incarnation
    cold = not (current and found is not None and found.state is not ObjectState.EXITED)
    if cold and lease.engine.ever_healthy and not await means.act(lease, lambda b: b.has_data(lease.engine.id)):
        raise EngineFailed(lease.engine.user_id, "data_missing", "its data is missing; restore a snapshot.")

    patience = min(settings.boot_timeout_s, patience_s or settings.boot_timeout_s)
    started = time.monotonic()
    if cold:
        started = await _boot_cold(means, lease, newest, patience, slot_taken=slot_taken, exited=current)
        applied = newest.generation
    else:
        slot_taken.set()
        if found is not None and found.state is ObjectState.FROZEN:
            await means.act(lease, lambda backend: backend.thaw(lease.engine.id))
        applied = await _adopt(means, lease, found, keys)
        await _until_healthy(means, lease, patience)
    boot_ms = round((time.monotonic() - started) * 1000)
    if applied < newest.generation and await push_pending_keys(means, lease.engine, applied) != KeyPush.TAKEN:
        # It cannot take the key while it runs: the environment of a new object carries it.
        await means.act(lease, lambda backend: backend.stop(lease.engine.id, STOP_GRACE_S))
        await _boot_cold(means, lease, newest, patience, slot_taken=slot_taken, exited=False)
        cold = True
    return Booted(cold, boot_ms, newest.generation)


async def _boot_cold(
    means: Means, lease: Lease, key: EngineKey, patience_s: float, *, slot_taken: asyncio.Event, exited: bool
) -> float:
    """Start a process and wait until it is healthy; when (monotonic) the last start began.

    A stranger may take the port between our look at it and the engine's own bind: then on another port again.
    """
    taken: set[int] = set()
    while True:
        async with means.start_slots:
            slot_taken.set()
            started = time.monotonic()
            await _start_cold(means, lease, exited=exited)
        try:
            await _until_healthy(means, lease, patience_s, started_with=key)
        except PortTaken as stranger:
            taken.add(stranger.port)
            if len(taken) >= PORT_TRIES:
                raise
            await means.act(lease, lambda backend: backend.stop(lease.engine.id, STRANGER_STOP_GRACE_S))
            await _move_port(means, lease, taken)
            exited = False
        else:
            return started


async def _adopt(means: Means, lease: Lease, found: BackendObject | None, keys: list[EngineKey]) -> int:
    """The row says where the object is that a dead owner may have made; the key generation that it has."""
    assert found is not None
    engine, at = lease.engine, found.endpoint
    if (engine.host, engine.endpoint_port, engine.container_id) != (at.host, at.port, at.container_id):
        await _record(means, lease, at.host, at.port, at.container_id)
    # It has the key of its environment, though no row may say so yet.
    if engine.spec_fingerprint in means.spec_fingerprints(engine, keys[-1]):
        return keys[-1].generation
    return max(engine.applied_generation, keys[0].generation)


async def _look(means: Means, lease: Lease) -> BackendObject | None:
    if means.backend.capabilities.listing:
        return await means.act(lease, lambda backend: backend.find(lease.engine.id))
    engine = lease.engine
    if engine.incarnation == 0 or not await means.act(lease, lambda backend: backend.is_running(engine.id)):
        return None
    endpoint = EngineEndpoint(engine.host or "", engine.endpoint_port or 0, engine.container_id)
    return BackendObject(engine.id, ObjectState.RUNNING, engine.incarnation, endpoint)


async def _start_cold(means: Means, lease: Lease, *, exited: bool) -> None:
    """Start the exited object of this incarnation again when nothing it was made from has changed, else create."""
    keys = await means.registry.engines.keys(lease.engine.id)
    key = keys[-1]
    if exited and lease.engine.spec_fingerprint in means.spec_fingerprints(lease.engine, key):
        try:
            await means.act(lease, lambda backend: backend.start(lease.engine.id))
        except ObjectMissing:
            pass
        except PortTaken as taken:
            await _move_port(means, lease, {taken.port})
        else:
            engine = lease.engine
            assert engine.host is not None
            assert engine.endpoint_port is not None
            await _record(means, lease, engine.host, engine.endpoint_port, engine.container_id)
            return

    taken_ports: set[int] = set()
    for _ in range(PORT_TRIES):
        try:
            await _create(means, lease, key)
            return
        except PortTaken as taken:
            taken_ports.add(taken.port)
            await _move_port(means, lease, taken_ports)
    raise BackendError(
        f"{PORT_TRIES} ports in a row were taken by something else; check ORCH_PORT_MIN and ORCH_PORT_MAX.",
        details={"ports": sorted(taken_ports)},
    )


async def _create(means: Means, lease: Lease, key: EngineKey) -> None:
    # Intent first: the object of this call can be told from every older one, whenever it appears.
    digest = means.spec_fingerprints(lease.engine, key)[0]
    lease.check()
    lease.update(await means.persist(lambda: means.registry.engines.begin_create(lease.engine, digest)))
    engine = lease.engine
    port = engine.port if engine.port is not None else means.settings.engine_container_port
    environment = means.environment(engine, key)
    endpoint = await means.act(
        lease, lambda backend: backend.create(engine.id, port, environment, engine.engine_version)
    )
    await _record(means, lease, endpoint.host, endpoint.port, endpoint.container_id)


async def _move_port(means: Means, lease: Lease, taken: set[int]) -> None:
    ports = means.ports
    if ports is None:
        raise BackendError("The backend reports a taken port, though none is published.")
    moved = await means.persist(
        lambda: means.registry.engines.change_port(lease.engine, ports, taken, means.backend.is_port_free)
    )
    lease.update(moved)


async def _record(means: Means, lease: Lease, host: str, port: int, container_id: str | None) -> None:
    lease.update(
        await means.persist(
            lambda: means.registry.engines.record_endpoint(
                lease.engine,
                host=host,
                port=port,
                container_id=container_id,
                deadline_s=means.settings.boot_timeout_s,
            )
        )
    )


async def _until_healthy(
    means: Means, lease: Lease, patience_s: float, *, started_with: EngineKey | None = None
) -> None:
    """Probe tightly: a coarse wait would be most of a cold start. At most a twentieth of the boot is lost to it.

    `started_with`: a process was started just now, with this key; then whoever answers must be that process. Raises
    `PortTaken` when it is a stranger.
    """
    engine = lease.engine
    url = engine.url
    assert url is not None
    deadline = time.monotonic() + patience_s
    began = time.monotonic()
    next_look = time.monotonic() + LOOK_EVERY_S
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise BootTimeout(engine.user_id, means.settings.boot_timeout_s)
        health = await means.http.health(url, min(left_s, means.settings.health_check_timeout_s))
        if (health.ok and started_with is not None) or time.monotonic() >= next_look:
            await _require_alive(means, lease)
            next_look = time.monotonic() + LOOK_EVERY_S
        if health.ok and started_with is not None and engine.port is not None:
            secret = means.keyring.decrypt(started_with.key_enc, started_with.master_key_id)
            if not await means.http.accepts_key(url, secret, means.settings.health_check_timeout_s):
                raise PortTaken(engine.port)
        if health.ok:
            return
        now = time.monotonic()
        delay_s = min(max(FIRST_PROBE_DELAY_S, (now - began) / 20), LONGEST_PROBE_DELAY_S)
        await asyncio.sleep(min(delay_s, max(0.0, deadline - now)))


async def _require_alive(means: Means, lease: Lease) -> None:
    engine = lease.engine
    found = await _look(means, lease)
    restarts = found.restart_count if found is not None else 0
    if restarts >= means.settings.health_max_failures:
        raise EngineFailed(engine.user_id, "exited", f"it exited {restarts} times while booting; see its log.")
    if found is not None and found.state is ObjectState.EXITED and not means.backend.capabilities.restarts:
        if engine.port is not None and not await means.backend.is_port_free(engine.port):
            raise PortTaken(engine.port)
        code = "" if found.exit_code is None else f" with code {found.exit_code}"
        raise EngineFailed(engine.user_id, "exited", f"it exited{code} before it was healthy; see its log.")
    if found is None:
        raise EngineFailed(engine.user_id, "exited", "its object is gone.")
    if found.state is ObjectState.FROZEN:
        # A late freeze of somebody who has lost the engine.
        await means.act(lease, lambda backend: backend.thaw(engine.id))


async def push_pending_keys(means: Means, engine: Engine, applied: int) -> str:
    """Give a running engine every key that it does not have, oldest first; one of `KeyPush`.

    Each key is pushed under the one before it, with what is left of that one's overlap.
    """
    url = engine.url
    assert url is not None
    keys = await means.registry.engines.keys(engine.id)
    outcome = KeyPush.TAKEN
    for previous, key in itertools.pairwise(keys):
        if key.generation <= applied:
            continue
        secret = means.keyring.decrypt(previous.key_enc, previous.master_key_id)
        for attempt in range(KEY_PUSH_TRIES):
            outcome = await means.http.push_key(
                url,
                secret,
                key_hash=key.key_hash,
                generation=key.generation,
                overlap_s=math.ceil(previous.overlap_s or 0),  # a key is never refused before its time
                timeout_s=KEY_PUSH_TIMEOUT_S,
            )
            if outcome != KeyPush.UNREACHABLE:
                break
            await asyncio.sleep(0.05 * 2**attempt)
        if outcome != KeyPush.TAKEN:
            return outcome
    return outcome
