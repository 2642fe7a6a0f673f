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
from orchestrator.errors import (
    BackendError,
    BackendUnavailable,
    BootTimeout,
    EngineFailed,
    ObjectMissing,
    PortTaken,
)
from orchestrator.lifecycle.means import Ceilings
from orchestrator.lifecycle.transitions import STOP_GRACE_S, State

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from orchestrator.backends.base import EngineBackend
    from orchestrator.lifecycle.leases import Lease
    from orchestrator.lifecycle.means import Means
    from orchestrator.registry.rows import Engine, EngineKey

__all__ = ["Booted", "boot", "push_pending_keys"]

PORT_TRIES = 5
STRANGER_STOP_GRACE_S = 2  # an engine that lost its port has done nothing yet
LONG_LOOK_S = 1.0  # an image that is here is found in less
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
    settings, timeline = means.settings, means.timelines.of(lease.engine)
    patience = min(settings.boot_timeout_s, patience_s or settings.boot_timeout_s)
    if not fresh and patience_s is None and _was_frozen(means, lease.engine):
        woken = await _wake(means, lease, patience, slot_taken=slot_taken)
        if woken is not None:
            return woken

    timeline.enter("look")
    keys, ceilings, found = await asyncio.gather(
        means.registry.engines.keys(lease.engine.id), means.ceilings(lease.engine), _look(means, lease)
    )
    newest = keys[-1]
    if fresh and found is not None and found.state is not ObjectState.EXITED:
        timeline.enter("stop")
        await means.act(lease, lambda backend: backend.stop(lease.engine.id, STOP_GRACE_S))
        found = await _look(means, lease)

    current = found is not None and found.incarnation == lease.engine.incarnation
    cold = not (current and found is not None and found.state is not ObjectState.EXITED)
    if cold and lease.engine.ever_healthy and not await means.act(lease, lambda b: b.has_data(lease.engine.id)):
        raise _data_missing(lease.engine)

    made_from = _MadeFrom(newest, ceilings)
    started = time.monotonic()
    if cold:
        started = await _boot_cold(
            means, lease, made_from, patience, slot_taken=slot_taken, exited=found if current else None
        )
        applied = newest.generation
    else:
        slot_taken.set()
        if found is not None and found.state is ObjectState.FROZEN:
            timeline.enter("thaw")
            await means.act(lease, lambda backend: backend.thaw(lease.engine.id))
        applied = await _adopt(means, lease, found, keys, ceilings)
        await _until_healthy(means, lease, patience)
    boot_ms = round((time.monotonic() - started) * 1000)
    if await _give_keys(means, lease, keys, applied):
        return Booted(cold, boot_ms, newest.generation)
    await means.act(lease, lambda backend: backend.stop(lease.engine.id, STOP_GRACE_S))
    await _boot_cold(means, lease, made_from, patience, slot_taken=slot_taken, exited=None)
    return Booted(True, boot_ms, newest.generation)


@dataclass(frozen=True, slots=True)
class _MadeFrom:
    """What a new object gets besides what its row says."""

    key: EngineKey
    ceilings: Ceilings


async def _give_keys(means: Means, lease: Lease, keys: list[EngineKey], applied: int) -> bool:
    """False when it cannot take the newest key while it runs: the environment of a new object carries it."""
    if applied >= keys[-1].generation:
        return True
    means.timelines.of(lease.engine).enter("key")
    return await push_pending_keys(means, lease.engine, applied) == KeyPush.TAKEN


def _was_frozen(means: Means, engine: Engine) -> bool:
    """Frozen when it was last seen: the object that the row records need only be thawed."""
    return (
        means.backend.capabilities.freeze
        and engine.former_status == State.SLEEPING
        and engine.incarnation > 0
        and engine.url is not None
    )


async def _wake(means: Means, lease: Lease, patience_s: float, *, slot_taken: asyncio.Event) -> Booted | None:
    """Thaw what the row records, without a look at it; None: it is not there to be thawed.

    Its health is asked for meanwhile. The question waits at the frozen engine, which answers as soon as it runs: that
    is milliseconds before Docker says that it has thawed it, and nobody waits for these.
    """
    engine, timeline = lease.engine, means.timelines.of(lease.engine)
    assert engine.url is not None
    started = time.monotonic()
    timeline.enter("thaw")
    thawing = asyncio.ensure_future(means.act(lease, lambda backend: backend.thaw(engine.id)))
    asking = asyncio.ensure_future(
        means.http.health(engine.url, min(patience_s, means.settings.health_check_timeout_s))
    )
    reading = asyncio.ensure_future(means.registry.engines.keys(engine.id))
    try:
        await asyncio.wait({asking, thawing}, return_when=asyncio.FIRST_COMPLETED)
        slot_taken.set()  # it leaves no queue: nothing is started
        if not (asking.done() and asking.result().ok):
            try:
                await thawing
            except BackendUnavailable:
                raise
            except BackendError:
                return None
        timeline.enter("probe")
        keys = await reading
        healthy = (await asking).ok
        if healthy:
            means.let_finish(engine.id, thawing)
    finally:
        parts = [asking, reading] if thawing is means.unfinished.get(engine.id) else [asking, reading, thawing]
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
    if not healthy:
        await _until_healthy(means, lease, patience_s)
    boot_ms = round((time.monotonic() - started) * 1000)
    if not await _give_keys(means, lease, keys, max(engine.applied_generation, keys[0].generation)):
        return None  # the long way looks at it, and creates it again
    return Booted(False, boot_ms, keys[-1].generation)


async def _boot_cold(
    means: Means,
    lease: Lease,
    made_from: _MadeFrom,
    patience_s: float,
    *,
    slot_taken: asyncio.Event,
    exited: BackendObject | None,
) -> float:
    """Start a process and wait until it is healthy; when (monotonic) the last start began.

    `exited`: an object of the row's incarnation, which is started again when nothing it was made from has changed.

    A stranger may take the port between our look at it and the engine's own bind: then on another port again.
    """
    taken: set[int] = set()
    timeline = means.timelines.of(lease.engine)
    while True:
        digests = means.spec_fingerprints(lease.engine, made_from.key, made_from.ceilings)
        if lease.engine.spec_fingerprint not in digests:
            exited = None
        # A pull has a time limit of its own, and must not hold up the starts of others.
        image = None if exited is not None else await _image(means, lease, slot_taken)
        timeline.enter("queue")
        async with means.start_slots:
            slot_taken.set()
            started = time.monotonic()
            endpoint = await _start_cold(means, lease, made_from, exited=exited, image=image)
        await _record(means, lease, endpoint)
        try:
            await _until_healthy(means, lease, patience_s, started_with=made_from.key)
        except PortTaken as stranger:
            taken.add(stranger.port)
            if len(taken) >= PORT_TRIES:
                raise
            timeline.enter("stop")
            await means.act(lease, lambda backend: backend.stop(lease.engine.id, STRANGER_STOP_GRACE_S))
            await _move_port(means, lease, taken)
            exited = None
        else:
            return started


async def _image(means: Means, lease: Lease, slot_taken: asyncio.Event) -> str:
    """The lasting name of the engine's image: the one that it was first made from, until somebody changes it."""
    engine, timeline = lease.engine, means.timelines.of(lease.engine)
    if engine.image_id is not None:
        return engine.image_id
    timeline.enter("image")
    resolving = asyncio.ensure_future(means.act(lease, lambda backend: backend.resolve_image(engine.engine_version)))
    try:
        await asyncio.wait({resolving}, timeout=LONG_LOOK_S)
        if not resolving.done():
            slot_taken.set()  # it is being pulled: who waits does not wait in the queue for starts
        return await resolving
    finally:
        resolving.cancel()


async def _adopt(
    means: Means, lease: Lease, found: BackendObject | None, keys: list[EngineKey], ceilings: Ceilings
) -> int:
    """The row says where the object is that a dead owner may have made; the key generation that it has."""
    assert found is not None
    engine, at = lease.engine, found.endpoint
    if (engine.host, engine.endpoint_port, engine.container_id) != (at.host, at.port, at.container_id):
        await _record(means, lease, at)
    # It has the key of its environment, though no row may say so yet.
    if engine.spec_fingerprint in means.spec_fingerprints(engine, keys[-1], ceilings):
        return keys[-1].generation
    return max(engine.applied_generation, keys[0].generation)


async def _look(means: Means, lease: Lease) -> BackendObject | None:
    engine = lease.engine
    if engine.incarnation == 0:
        return None  # nothing was ever made for it
    if means.backend.capabilities.listing:
        return await means.act(lease, lambda backend: backend.find(engine.id))
    if not await means.act(lease, lambda backend: backend.is_running(engine.id)):
        return None
    endpoint = EngineEndpoint(engine.host or "", engine.endpoint_port or 0, engine.container_id)
    return BackendObject(engine.id, ObjectState.RUNNING, engine.incarnation, endpoint)


async def _start_cold(
    means: Means, lease: Lease, made_from: _MadeFrom, *, exited: BackendObject | None, image: str | None
) -> EngineEndpoint:
    """Start the exited object again where there is one, or create."""
    if exited is not None:
        engine = lease.engine
        means.timelines.of(engine).enter("start")
        try:
            await means.act(lease, lambda backend: backend.start(engine.id))
        except ObjectMissing:
            pass
        except PortTaken as taken:
            await _move_port(means, lease, {taken.port})
        else:
            # Its maker may not have come as far as to record where it is.
            return exited.endpoint

    if image is None:
        image = await _image(means, lease, asyncio.Event())
    taken_ports: set[int] = set()
    for _ in range(PORT_TRIES):
        try:
            return await _create(means, lease, made_from, image)
        except PortTaken as taken:
            taken_ports.add(taken.port)
            await _move_port(means, lease, taken_ports)
    raise BackendError(
        f"{PORT_TRIES} ports in a row were taken by something else; check ORCH_PORT_MIN and ORCH_PORT_MAX.",
        details={"ports": sorted(taken_ports)},
    )


def _data_missing(engine: Engine) -> EngineFailed:
    return EngineFailed(engine.user_id, "data_missing", "its data is missing; restore a snapshot.")


async def _create(means: Means, lease: Lease, made_from: _MadeFrom, image: str) -> EngineEndpoint:
    means.timelines.of(lease.engine).enter("create")
    # Intent first: the object of this call can be told from every older one, whenever it appears.
    key, ceilings = made_from.key, made_from.ceilings
    digest = means.spec_fingerprints(lease.engine, key, ceilings)[0]
    lease.check()
    lease.update(await means.persist(lambda: means.registry.engines.begin_create(lease.engine, digest, image)))
    engine = lease.engine
    port = engine.port if engine.port is not None else means.settings.engine_container_port
    environment = means.environment(engine, key)

    def create(backend: EngineBackend) -> Awaitable[EngineEndpoint]:
        if ceilings != Ceilings():
            backend = backend.limited(memory=ceilings.memory, cpus=ceilings.cpus)
        if engine.ever_healthy:
            backend = backend.keeping_data()
        return backend.create(engine.id, port, environment, image)

    try:
        return await means.act(lease, create)
    except ObjectMissing:  # removed since the look at it
        raise _data_missing(engine) from None


async def _move_port(means: Means, lease: Lease, taken: set[int]) -> None:
    ports = means.ports
    if ports is None:
        raise BackendError("The backend reports a taken port, though none is published.")
    moved = await means.persist(
        lambda: means.registry.engines.change_port(lease.engine, ports, taken, means.backend.is_port_free)
    )
    lease.update(moved)


async def _record(means: Means, lease: Lease, at: EngineEndpoint) -> None:
    lease.update(
        await means.persist(
            lambda: means.registry.engines.record_endpoint(
                lease.engine,
                host=at.host,
                port=at.port,
                container_id=at.container_id,
                deadline_s=means.settings.boot_timeout_s,
            )
        )
    )


async def _until_healthy(
    means: Means, lease: Lease, patience_s: float, *, started_with: EngineKey | None = None
) -> None:
    """Probe tightly: a coarse wait would be most of a cold start.

    `started_with`: a process was started just now, with this key; then whoever answers must be that process. Raises
    `PortTaken` when it is a stranger.
    """
    engine = lease.engine
    url = engine.url
    assert url is not None
    means.timelines.of(engine).enter("probe")
    began = time.monotonic()
    deadline = began + patience_s
    next_look = began + LOOK_EVERY_S
    if means.backend.capabilities.holds_port:
        started_with = None  # nobody else can answer there
    with means.probe_pace as pace:
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise BootTimeout(engine.user_id, means.settings.boot_timeout_s)
            health = await means.http.health(url, min(left_s, means.settings.health_check_timeout_s))
            if (health.ok and started_with is not None) or (not health.ok and time.monotonic() >= next_look):
                await _require_alive(means, lease)
                next_look = time.monotonic() + LOOK_EVERY_S
            if health.ok and started_with is not None and engine.port is not None:
                secret = means.keyring.decrypt(started_with.key_enc, started_with.master_key_id)
                if not await means.http.accepts_key(url, secret, means.settings.health_check_timeout_s):
                    raise PortTaken(engine.port)
            if health.ok:
                return
            now = time.monotonic()
            await asyncio.sleep(min(pace.delay_s(now - began), max(0.0, deadline - now)))


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
