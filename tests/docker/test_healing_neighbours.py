"""What is not ours is never touched; what is ours and unknown is treated with care."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import pytest

from tests.conftest import url_of
from tests.docker.daemon import IMAGE
from tests.docker.fleet import Engine, Fleet, fleet_variables, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
async def other(fleet: Fleet, postgres_url: str, template: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    """Another deployment, with a fresh database, on the same daemon."""
    name = f"test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    # Two migrated copies of one template share what the first migration made: a deployment of its own is a new one.
    url = url_of(postgres_url, name)
    own = await asyncpg.connect(url)
    await own.execute("UPDATE deployment SET id = gen_random_uuid()")
    await own.close()
    made = Fleet(fleet_variables(url, tmp_path))
    try:
        yield made
    finally:
        await made.close()
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await connection.close()


@pytest.fixture
async def neighbour(fleet: Fleet) -> AsyncIterator[list[str]]:
    """Somebody's containers, each with a volume: one by the way, and two that look as if they were ours."""
    mark = secrets.token_hex(4)
    names = [f"neighbour-{mark}", f"engine-{secrets.token_hex(6)}", f"engine-{secrets.token_hex(6)}"]
    labels = [[], [], ["--label", f"engine-orchestrator.engine={uuid4()}"]]
    environment = ("--env", "PORT=8000", "--env", "ENGINE_KEY_HASH=none")
    for name, own in zip(names, labels, strict=True):
        volume = name.replace("engine-", "engine-data-")
        await fleet.docker("run", "--detach", "--name", name, *own, *environment, "--volume", f"{volume}:/data", IMAGE)
    try:
        yield names
    finally:
        await fleet.docker("rm", "--force", *names)
        await fleet.docker("volume", "rm", "--force", *(name.replace("engine-", "engine-data-") for name in names))


async def lives_of(fleet: Fleet, names: list[str]) -> list[str]:
    """Each container's process, and its volume."""
    lives = await fleet.docker("inspect", "--format", "{{.Id}} {{.State.Status}} {{.State.StartedAt}}", *names)
    volumes = (name.replace("engine-", "engine-data-") for name in names)
    return [*lives.splitlines(), *(await fleet.docker("volume", "inspect", "-f", "{{.Name}}", *volumes)).splitlines()]


async def forget(fleet: Fleet, engine: Engine) -> None:
    """As after a restore of an older database: neither row nor tombstone."""
    async with fleet.database() as connection:
        await connection.execute("DELETE FROM engines WHERE id = $1", engine.id)


async def test_neighbours_survive_everything(fleet: Fleet, other: Fleet, neighbour: list[str]) -> None:
    ours = await fleet.open()
    theirs = await other.open()
    ann, bob, carl, dora = await fleet.provision(ours, "ann", "bob", "carl", "dora")
    eve, frank = await other.provision(theirs, "eve", "frank")
    for engine in (ann, bob, carl, dora):
        await fleet.remember(engine)
    for engine in (eve, frank):
        await other.remember(engine)
    await ours.post("/engines/bob/sleep")
    await theirs.post("/engines/frank/sleep")
    await fleet.becomes(bob, "sleeping", "paused")
    await other.becomes(frank, "sleeping", "paused")
    strangers = await lives_of(fleet, neighbour)
    of_theirs = await lives_of(fleet, [eve.container, frank.container])
    of_ours = await lives_of(fleet, [ann.container, bob.container])

    # A fresh database sees nothing that were not its own, whatever it is told to remove.
    assert await other.reconcile(purge=True) == []
    await forget(fleet, carl)
    await ours.call("DELETE", "/engines/dora")
    assert await fleet.reconcile() == ["stop orphan"]
    assert await fleet.reconcile(purge=True) == ["purge orphan"]
    assert await fleet.reconcile(purge=True) == []
    for engine in (carl, dora):
        assert (await fleet.state_of(engine), await fleet.has_volume(engine)) == ("gone", False)

    assert await lives_of(fleet, neighbour) == strangers
    assert await lives_of(fleet, [eve.container, frank.container]) == of_theirs
    assert await lives_of(fleet, [ann.container, bob.container]) == of_ours
    assert await other.reconcile(purge=True) == []
    await fleet.remembers(ours, ann)
    await fleet.remembers(ours, bob)
    # All that the other deployment has goes; ours and the neighbours stay.
    for engine in (eve, frank):
        assert (await theirs.call("DELETE", f"/engines/{engine.user_id}"))[0] == 200
    await fleet.remembers(ours, bob)
    assert await lives_of(fleet, neighbour) == strangers


async def test_an_orphan_with_a_tombstone_goes_with_its_data(fleet: Fleet) -> None:
    api = await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await fleet.remember(engine)
    assert (await api.call("DELETE", "/engines/ann"))[0] == 200
    # A create that a dead owner had sent takes effect after all.
    environment = {"ENGINE_KEY_HASH": "none", "ENGINE_KEY_GENERATION": "1", "ENGINE_INCARNATION": "2"}
    port = int(engine.url.rpartition(":")[2])
    await fleet.planes[0].backend.create(engine.id, port, environment, IMAGE)
    assert await fleet.has_volume(engine)
    assert await fleet.reconcile() == ["remove orphan"]
    assert (await fleet.state_of(engine), await fleet.has_volume(engine)) == ("gone", False)
    assert [row["status"] for row in await fleet.audit(engine, "reconcile_orphan")] == ["destroyed"]
    assert await fleet.reconcile() == []


async def test_an_orphan_without_a_tombstone_is_stopped_after_its_grace_and_keeps_its_data(fleet: Fleet) -> None:
    fleet.variables["ORCH_ORPHAN_GRACE_S"] = "3"
    api = await fleet.open()
    running, frozen, known = await fleet.provision(api, "run", "freeze", "known")
    for engine in (running, frozen, known):
        await fleet.remember(engine)
    await api.post("/engines/freeze/sleep")
    for engine in (running, frozen):
        await forget(fleet, engine)
    assert await fleet.reconcile() == ["stop orphan", "stop orphan"]
    for engine in (running, frozen):
        assert [row["metadata"] for row in await fleet.does(engine.id, "reconcile_orphan")]

    async def stopped() -> bool:
        return set(await fleet.reconcile()) == {"report orphan"}

    await until(stopped)
    for engine in (running, frozen):
        assert await fleet.state_of(engine) == "exited"
        rows: list[dict[str, Any]] = await fleet.audit(engine, "reconcile_orphan")
        assert [row["status"] for row in rows][1:] == ["stopped"]
        assert await brain_of(fleet, engine) == f"the brain of {engine.user_id}"
    # Started by hand it is stopped again; its data goes by a person's order only.
    await fleet.docker("start", running.container)
    await until(stopped)
    assert await fleet.state_of(running) == "exited"
    assert await brain_of(fleet, running) == "the brain of run"
    assert await fleet.reconcile(purge=True) == ["purge orphan", "purge orphan"]
    for engine in (running, frozen):
        assert (await fleet.state_of(engine), await fleet.has_volume(engine)) == ("gone", False)
        assert (await fleet.audit(engine, "reconcile_orphan"))[-1]["actor"] == "tester"
    await fleet.remembers(api, known)


async def brain_of(fleet: Fleet, engine: Engine) -> str:
    """What its volume says, read without the engine."""
    mount = ("--volume", f"{engine.volume}:/data:ro")
    return await fleet.docker(
        "run", "--rm", "--network", "none", *mount, "--entrypoint", "cat", IMAGE, "/data/note.txt"
    )
