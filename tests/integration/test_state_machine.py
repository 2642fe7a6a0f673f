"""Any call from any state, with any fault at any step: the engine becomes stable in bounded time, and can be destroyed.

Two replicas in one process, with all their loops, a real database and real engine processes. `ORCH_TEST_EXAMPLES`
and `ORCH_TEST_STEPS` make it longer; with `ORCH_TEST_RANDOM=1` each run takes another way, and a failure is shrunk.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import signal
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from orchestrator.backends.base import ObjectState
from orchestrator.control_plane import ControlPlane
from orchestrator.errors import BackendError, BackendUnavailable, DatabaseUnavailable, EngineNotFound, OrchestratorError
from orchestrator.keys import sha256_hex
from orchestrator.lifecycle import boot, operations
from orchestrator.lifecycle.transitions import Transition
from orchestrator.loops import reconcile
from tests.integration.conftest import settings_of
from tests.integration.steps import ask, data_of, database, disagreements

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    import asyncpg

    from tests.integration.conftest import Deployment

EXAMPLES = int(os.environ.get("ORCH_TEST_EXAMPLES", "12"))
STEPS = int(os.environ.get("ORCH_TEST_STEPS", "8"))
RANDOM = os.environ.get("ORCH_TEST_RANDOM") == "1"
STABLE_WITHIN_S = 90.0
OPERATION_S = 8.0  # the longest that an operation may take here
STOP_GRACE_S = 0.5

CALLS = ["provision", "start", "stop", "sleep", "wake", "recover", "rotate_key", "keep_alive", "sleep_idle", "admit"]
METHODS = ["create", "start", "stop", "freeze", "thaw", "destroy", "find"]
TROUBLES = ["unavailable", "refused", "defect", "hangs", "unavailable_after"]
STATES = ["absent", "provisioning", "running", "sleeping", "stopped", "failed", "destroying"]


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {
        "ORCH_LEASE_S": "1.5",
        "ORCH_BOOT_TIMEOUT_S": "6",
        "ORCH_QUEUE_TIMEOUT_S": "6",
        "ORCH_HEALTH_CHECK_INTERVAL_S": "0.5",
        "ORCH_HEALTH_CHECK_TIMEOUT_S": "2",
        "ORCH_HEALTH_MAX_FAILURES": "2",
        "ORCH_RESTART_BACKOFF_BASE_S": "0.2",
        "ORCH_RESTART_BACKOFF_MAX_S": "0.5",
        "ORCH_RESTART_MAX_ATTEMPTS": "1000",
        "ORCH_IDLE_SLEEP_THRESHOLD_S": "0",
    }


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes minutes in life, in seconds: so that a hanging call is met and left within an example."""
    monkeypatch.setattr(Transition, "deadline_s", lambda *_: OPERATION_S)
    monkeypatch.setattr(operations, "WAY_OUT_S", 1.0)
    monkeypatch.setattr(operations, "SETTLE_S", 0.2, raising=False)
    for module in (operations, boot):
        monkeypatch.setattr(module, "STOP_GRACE_S", STOP_GRACE_S)
    monkeypatch.setattr(operations, "ACTIVITY_FLUSH_S", 0.05)
    monkeypatch.setattr("orchestrator.control_plane.DRAIN_S", 0.5)


class Replica:
    """A control plane whose database can be cut off, and whose backend can fail."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.cut = False
        self.dead = False
        self.armed: dict[str, str] = {}
        real_run, real_transaction = plane.database._run, plane.database.transaction
        database: Any = plane.database

        async def run(*args: Any) -> Any:
            if self.cut:
                raise DatabaseUnavailable("cut off")
            return await real_run(*args)

        @asynccontextmanager
        async def transaction(**options: Any) -> AsyncIterator[Any]:
            if self.cut:
                raise DatabaseUnavailable("cut off")
            async with real_transaction(**options) as connection:
                yield connection

        database._run, database.transaction = run, transaction
        for method in METHODS:
            setattr(plane.backend, method, self._unreliable(method, getattr(plane.backend, method)))

    def _unreliable(self, method: str, real: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **options: Any) -> Any:
            if self.dead:
                raise BackendUnavailable("this replica is dead")
            match self.armed.pop(method, None):
                case "unavailable":
                    raise BackendUnavailable("no answer")
                case "refused":
                    raise BackendError("refused")
                case "defect":
                    raise RuntimeError("a defect of the backend")
                case "hangs":
                    await asyncio.Event().wait()
                case "unavailable_after":
                    await real(*args, **options)
                    raise BackendUnavailable("no answer, though it was done")
            return await real(*args, **options)

        return call

    async def die(self) -> None:
        """Nothing that it still does has an effect; what it holds is left as it is."""
        self.cut = self.dead = True
        await self.plane.loops.stop()
        await self.plane.keeper.close()
        await self.plane.notifications.close()
        self.plane.database.pool.terminate()


class World:
    """Two replicas and the loop that they run in; it stands still between two steps."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.runner = asyncio.Runner()
        self.replicas: list[Replica] = []
        self.graves: list[Replica] = []
        self.platform_key = "pk-sept-" + secrets.token_urlsafe(16)
        self.users = itertools.count()
        self.product_id: Any = None
        self.slowest_s = 0.0

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    async def open(self) -> None:
        self.replicas = [await self.replica() for _ in range(2)]
        self.product_id = await self.replicas[0].plane.registry.products.register(
            "acme", "Acme", {}, sha256_hex(self.platform_key)
        )

    async def replica(self) -> Replica:
        plane = ControlPlane(settings_of(self.deployment.variables))
        await plane.open()
        return Replica(plane)

    async def close(self) -> None:
        for replica in self.replicas + self.graves:
            with suppress(OrchestratorError):
                await replica.plane.close()

    async def row(self, user_id: str) -> asyncpg.Record | None:
        async with database(self.deployment) as connection:
            return await connection.fetchrow("SELECT * FROM engines WHERE user_id = $1", user_id)


MOMENTS = st.sampled_from([0.0, 0.004, 0.02, 0.08, 0.3])
REPLICAS = st.integers(0, 1)
FLAGS = st.sampled_from([{"fail_health": True}, {"unready_for": 0.4}, {"ignore_sigterm": True}, {"busy": 1}])


def step(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(st.just(name), *arguments)


STEP = st.one_of(
    step("somebody_calls", st.sampled_from(CALLS), REPLICAS, MOMENTS),
    step("somebody_calls", st.just("destroy"), REPLICAS, MOMENTS),
    step("the_backend_fails", REPLICAS, st.sampled_from(METHODS), st.sampled_from(TROUBLES)),
    step("the_engine_gets", st.sampled_from([signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT]), MOMENTS),
    step("the_engine_is", FLAGS),
    step("the_lease_is_lost", MOMENTS),
    step("a_replica_dies", REPLICAS, MOMENTS),
    step("the_database_is_away", REPLICAS, st.sampled_from([0.05, 0.6, 2.5])),
    step("it_is_reconciled", REPLICAS),
    step("time_passes", st.sampled_from([0.05, 0.4, 1.2])),
)


class EngineLife:
    """One user's engine, from a state through the steps to its end."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.user_id = f"user-{next(world.users)}"
        self.calls: list[asyncio.Task[Any]] = []
        self.defects = False

    # --- steps --------------------------------------------------------------------------------------------

    async def is_in(self, state: str) -> None:
        if state == "absent":
            return
        if state == "provisioning":
            self._begin("provision", 0)
            await asyncio.sleep(0.01)
            return
        await self._call("provision", 0)
        if state == "sleeping":
            await self._call("sleep", 0)
        elif state == "stopped":
            await self._call("stop", 0)
        elif state == "failed":
            await self._the_engine_gets(signal.SIGKILL)
        elif state == "destroying":
            self.world.replicas[0].armed["destroy"] = "unavailable"
            self._begin("destroy", 0)
            await asyncio.sleep(0.01)

    async def step(self, name: str, *args: Any) -> None:
        await getattr(self, f"_{name}")(*args)

    # --- the end ------------------------------------------------------------------------------------------

    async def end(self) -> None:
        world, began = self.world, time.monotonic()
        for replica in world.replicas:
            replica.cut = False
            replica.armed.clear()
        await self._the_engine_is({})
        if self.calls:
            _, late = await asyncio.wait(self.calls, timeout=STABLE_WITHIN_S)
            assert not late, f"{len(late)} calls never ended"
        for call in self.calls:
            problem = None if call.cancelled() else call.exception()
            assert problem is None or isinstance(problem, OrchestratorError), repr(problem)
            assert self.defects or getattr(problem, "code", None) != "INTERNAL_ERROR", repr(problem)
        problems = await self._stable()
        world.slowest_s = max(world.slowest_s, time.monotonic() - began)
        row = await world.row(self.user_id)
        assert not problems, (problems, dict(row) if row else None)
        admission = await world.replicas[0].plane.discovery.admit(
            world.platform_key, self.user_id, auto_provision=True, auto_wake=True
        )
        if admission.engine is None:  # it waits for a person
            assert admission.reason == "engine_stopped", admission
            await self._call("start", 1)
            admission = await world.replicas[1].plane.discovery.admit(
                world.platform_key, self.user_id, auto_provision=False, auto_wake=True
            )
        assert admission.engine is not None, admission
        answer = await ask({"url": admission.engine.url, "api_key": admission.engine.api_key})
        assert answer.status_code == 200, answer.text
        with suppress(EngineNotFound):
            await self._call("destroy", 1)
        assert await world.row(self.user_id) is None
        assert await disagreements(world.deployment) == []

    async def _stable(self) -> list[str]:
        """What is still not as it should be when its time is over."""
        until = time.monotonic() + STABLE_WITHIN_S
        problems = ["never looked at"]
        while problems and time.monotonic() < until:
            await self._it_is_reconciled(0)
            await asyncio.sleep(0.1)
            row = await self.world.row(self.user_id)
            if row is not None and (row["operation"] is not None or row["wish"] is not None):
                problems = [f"{row['operation']} is under way, {row['wish']} is wished"]
            elif row is not None and row["status"] == "failed" and row["first_healthy_at"] is not None:
                problems = ["failed, though it was healthy and nothing is wrong with it any more"]
            else:
                problems = await disagreements(self.world.deployment)
                # One that was killed in its sleep wakes by a start.
                problems = [problem for problem in problems if not problem.endswith("(sleeping) is exited")]
        return problems

    # --- means --------------------------------------------------------------------------------------------

    async def _somebody_calls(self, call: str, number: int, moment: float) -> None:
        self._begin(call, number)
        await asyncio.sleep(moment)

    async def _the_backend_fails(self, number: int, method: str, trouble: str) -> None:
        self.defects = self.defects or trouble == "defect"
        self.world.replicas[number].armed[method] = trouble

    async def _time_passes(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def _begin(self, call: str, number: int) -> None:
        self.calls.append(asyncio.ensure_future(self._call(call, number)))

    async def _call(self, call: str, number: int) -> Any:
        world, replica = self.world, self.world.replicas[number]
        lifecycle, whose = replica.plane.lifecycle, (world.product_id, self.user_id)
        match call:
            case "provision":
                return await lifecycle.provision(*whose, engine_version="mimic:1", actor="test")
            case "rotate_key":
                return await lifecycle.rotate_key(*whose, actor="test", overlap_s=30)
            case "keep_alive":
                return await lifecycle.keep_alive(*whose, 1)
            case "sleep_idle":
                row = await world.row(self.user_id)
                if row is not None:
                    return await replica.plane.healing.sleep_idle(row["id"], row["lease_generation"], 0.001)
                return None
            case "admit":
                return await replica.plane.discovery.admit(
                    world.platform_key, self.user_id, auto_provision=True, auto_wake=True
                )
        return await getattr(lifecycle, call)(*whose, actor="test")

    async def _the_engine_gets(self, which: signal.Signals, moment: float = 0.0) -> None:
        await asyncio.sleep(moment)
        row = await self.world.row(self.user_id)
        backend: Any = self.world.replicas[0].plane.backend
        if row is None:
            return
        one = backend._object(backend._files(row["id"]))
        if one is None or one.state is ObjectState.EXITED:
            return
        pid = int(data_of(self.world.deployment, str(row["id"])).with_suffix(".process").read_text().split()[1])
        with suppress(ProcessLookupError):
            os.killpg(pid, which)

    async def _the_engine_is(self, flags: dict[str, Any]) -> None:
        row = await self.world.row(self.user_id)
        if row is None:
            return
        folder: Path = data_of(self.world.deployment, str(row["id"]))
        if not folder.is_dir():
            return
        with suppress(FileNotFoundError):  # destroyed just now
            self.world.deployment.mimic_flags(str(row["id"]), **flags)

    async def _the_lease_is_lost(self, moment: float) -> None:
        """As if another one had taken it over, and died."""
        await asyncio.sleep(moment)
        async with database(self.world.deployment) as connection:
            await connection.execute(
                "UPDATE engines SET lease_generation = lease_generation + 1, lease_owner = 'thief', "
                "lease_until = now() + interval '0.3 s' WHERE operation IS NOT NULL"
            )

    async def _a_replica_dies(self, number: int, moment: float) -> None:
        await asyncio.sleep(moment)
        replica = self.world.replicas[number]
        await replica.die()
        self.world.graves.append(replica)
        self.world.replicas[number] = await self.world.replica()

    async def _the_database_is_away(self, number: int, seconds: float) -> None:
        replica = self.world.replicas[number]
        replica.cut = True

        def back() -> None:
            replica.cut = replica.dead

        asyncio.get_running_loop().call_later(seconds, back)

    async def _it_is_reconciled(self, number: int) -> None:
        plane = self.world.replicas[number].plane
        with suppress(OrchestratorError):
            await reconcile.reconcile(plane.means, plane.healing)


@pytest.fixture
def world(deployment: Deployment, short_waits: None) -> Iterator[World]:
    made = World(deployment)
    with made.runner:
        made.run(made.open())
        yield made
        made.run(made.close())


@pytest.mark.timeout(600 + EXAMPLES * 60)
def test_it_becomes_stable_and_can_be_destroyed(world: World) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=not RANDOM,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if RANDOM else [Phase.generate],
    )
    @given(state=st.sampled_from(STATES), steps=st.lists(STEP, min_size=STEPS // 2, max_size=STEPS))
    def lives(state: str, steps: list[tuple[Any, ...]]) -> None:
        engine = EngineLife(world)

        async def live() -> None:
            await engine.is_in(state)
            for one in steps:
                await engine.step(*one)
            await engine.end()

        print(f"{engine.user_id} is {state}: {steps}", flush=True)
        world.run(live())

    lives()
    print(f"{next(world.users)} engines; the slowest was stable after {world.slowest_s:.1f} s")
