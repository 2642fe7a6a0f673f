"""What `/prometheus` tells: plain functions that any layer calls, and the series behind them.

A leaf: knows nothing of the layers above. With several worker processes (`PROMETHEUS_MULTIPROC_DIR`, which `serve`
sets before it starts them) each keeps its numbers in files of that directory, and a scrape of any one adds them up.

Series carry the product's slug. Layers that know a product by its id only may count before the slug is known: what
they count is kept (bounded) until `know_products` has told it.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from orchestrator import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from uuid import UUID

    from prometheus_client.metrics_core import Metric

__all__ = [
    "CONTENT_TYPE",
    "Fleet",
    "admitted",
    "backend_called",
    "claimed_from_pool",
    "configure",
    "delivered",
    "exposition",
    "forget",
    "know_products",
    "loop_lag",
    "loop_round",
    "operation_ended",
    "probed",
    "quota_exceeded",
    "rate_limited",
    "requested",
    "restarted",
    "taken_over",
    "waits_for_products",
    "waking",
]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
NO_PRODUCT: Final = "-"
MAX_PENDING: Final = 10_000

ADMIT_RESULTS: Final = ("running", "brought_up", "denied", "failed")
OPERATIONS: Final = (
    *("provision", "start", "wake", "sleep", "stop", "recover", "rotate_key", "destroy"),
    *("restart", "fail", "repair", "unload"),
)
OUTCOMES: Final = ("succeeded", "failed", "interrupted")
RESTARTS: Final = {
    "auto_restart_start": "started",
    "auto_restart_success": "succeeded",
    "auto_restart_failed": "failed",
    "auto_restart_gave_up": "gave_up",
}
BACKEND_CALLS: Final = ("create", "start", "stop", "destroy", "find", "list", "freeze", "thaw")

_QUICK: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SLOW: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

_registry = CollectorRegistry()
_BY = ("product", "backend")


def _histogram(name: str, text: str, labels: tuple[str, ...] = _BY, buckets: tuple[float, ...] = _SLOW) -> Histogram:
    return Histogram(f"orchestrator_{name}_seconds", text, labels, registry=_registry, buckets=buckets)


def _counter(name: str, text: str, labels: tuple[str, ...] = _BY) -> Counter:
    return Counter(f"orchestrator_{name}", text, labels, registry=_registry)


_admit = _histogram("admit", "Admits, until the answer.", (*_BY, "result"), _QUICK)
_provision = _histogram("provision", "Provisions, until the engine was healthy.", (*_BY, "source"))
_wake = _histogram("wake", "Wakes, until the engine was healthy.", (*_BY, "source"))
_start = _histogram("start", "Starts of a stopped engine, until it was healthy.")
_stop = _histogram("stop", "Stops, until the process was gone.")
_operations = _counter("operations", "Operations on engines that ended.", (*_BY, "operation", "outcome"))
_probes = _counter("health_probes", "Probes of running engines.", (*_BY, "result"))
_restarts = _counter("restarts", "Restarts of failed engines.", (*_BY, "outcome"))
_rate_limited = _counter("rate_limited", "Admits refused by the rate limit.")
_quota = _counter("quota_exceeded", "Provisions refused by max_engines.")
_takeovers = _counter("lease_takeovers", "Operations that were taken over from a process that is gone.")
_calls = _counter("backend_calls", "Calls of the backend.", (*_BY, "call", "outcome"))
_call_seconds = _histogram("backend_call", "Calls of the backend.", ("backend", "call"), _QUICK)
_deliveries = _counter("webhook_deliveries", "Attempts at deliveries.", (*_BY, "outcome"))
_rounds = _counter("loop_rounds", "Rounds of background loops.", ("loop", "outcome"))
_requests = _histogram("http_request", "HTTP requests, until the end of the answer.", ("method", "status"), _QUICK)
_lag = Gauge(
    "orchestrator_loop_lag_seconds",
    "How late a background loop is; the worst of the workers.",
    ("loop",),
    registry=_registry,
    multiprocess_mode="livemax",
)


@dataclass
class _State:
    backend: str = NO_PRODUCT
    products: dict[UUID, str] = field(default_factory=dict)
    pending: deque[tuple[UUID, Callable[[str], None]]] = field(default_factory=lambda: deque(maxlen=MAX_PENDING))


_state = _State()
_brought_up: ContextVar[list[str] | None] = ContextVar("brought_up", default=None)


@dataclass(frozen=True, slots=True)
class Fleet:
    """What only the database knows, read for one scrape."""

    engines: Mapping[tuple[str, str], int]  # (product, status) → how many
    pool: Mapping[str, int]  # product → engines kept ready
    unsequenced: int
    unsequenced_age_s: float


def configure(backend: str) -> None:
    """The backend of this process: a label of most series."""
    _state.backend = backend
    for call in BACKEND_CALLS:
        _call_seconds.labels(backend, call)
        for outcome in ("ok", "error"):
            _calls.labels(NO_PRODUCT, backend, call, outcome)


def know_products(products: Mapping[UUID, str]) -> None:
    """All products there are: each has every series from now on, at zero before anything happened."""
    for product_id, slug in products.items():
        if _state.products.get(product_id) != slug:
            _state.products[product_id] = slug
            _prepare(slug)
    pending, _state.pending = _state.pending, deque(maxlen=MAX_PENDING)
    for product_id, count in pending:
        if (name := _state.products.get(product_id)) is not None:
            count(name)


def waits_for_products() -> bool:
    """Something was counted for a product that is not known yet."""
    return bool(_state.pending)


def forget(product_id: UUID) -> None:
    """A product is gone; its series stay, as counters do."""
    _state.products.pop(product_id, None)


def _prepare(slug: str) -> None:
    by = (slug, _state.backend)
    for result in ADMIT_RESULTS:
        _admit.labels(*by, result)
    for source in ("cold", "pool"):
        _provision.labels(*by, source)
    for source in ("frozen", "stopped"):
        _wake.labels(*by, source)
    for histogram in (_start, _stop):
        histogram.labels(*by)
    for counter in (_rate_limited, _quota, _takeovers):
        counter.labels(*by)
    for operation in OPERATIONS:
        for outcome in OUTCOMES:
            _operations.labels(*by, operation, outcome)
    for result in ("ok", "failed"):
        _probes.labels(*by, result)
    for outcome in RESTARTS.values():
        _restarts.labels(*by, outcome)
    for outcome in ("delivered", "failed", "parked"):
        _deliveries.labels(*by, outcome)
    for call in BACKEND_CALLS:
        for outcome in ("ok", "error"):
            _calls.labels(*by, call, outcome)


def _named(product_id: UUID, count: Callable[[str], None]) -> None:
    """`count` with the product's slug, now or as soon as it is known."""
    slug = _state.products.get(product_id)
    if slug is None:
        _state.pending.append((product_id, count))
    else:
        count(slug)


# --- what happens -----------------------------------------------------------------------------------------


def admitted(product: str, result: str, seconds: float) -> None:
    """An admit was answered. `product`: its slug; `result`: one of `ADMIT_RESULTS`."""
    _admit.labels(product, _state.backend, result).observe(seconds)


def rate_limited(product_id: UUID) -> None:
    _named(product_id, lambda slug: _rate_limited.labels(slug, _state.backend).inc())


def quota_exceeded(product_id: UUID) -> None:
    _named(product_id, lambda slug: _quota.labels(slug, _state.backend).inc())


@contextmanager
def waking() -> Iterator[list[str]]:
    """Collects which backend calls an operation made, so that a thaw can be told from a start."""
    calls: list[str] = []
    token = _brought_up.set(calls)
    try:
        yield calls
    finally:
        _brought_up.reset(token)


def operation_ended(product_id: UUID, operation: str, outcome: str, seconds: float, calls: Iterable[str] = ()) -> None:
    """An operation ended as one of `OUTCOMES`. `calls`: those of the backend that it made (`waking`)."""

    def count(slug: str) -> None:
        by = (slug, _state.backend)
        _operations.labels(*by, operation, outcome).inc()
        if outcome != "succeeded":
            return
        if operation == "provision":
            _provision.labels(*by, "cold").observe(seconds)
        elif operation == "wake":
            source = "stopped" if {"start", "create"} & set(calls) else "frozen"
            _wake.labels(*by, source).observe(seconds)
        elif operation == "start":
            _start.labels(*by).observe(seconds)
        elif operation == "stop":
            _stop.labels(*by).observe(seconds)

    _named(product_id, count)


def claimed_from_pool(product_id: UUID, seconds: float) -> None:
    """A provision was answered with an engine of the warm pool."""
    _named(product_id, lambda slug: _provision.labels(slug, _state.backend, "pool").observe(seconds))


def probed(product_id: UUID, ok: bool) -> None:
    result = "ok" if ok else "failed"
    _named(product_id, lambda slug: _probes.labels(slug, _state.backend, result).inc())


def restarted(product_id: UUID, action: str) -> None:
    """An audit action of a restart; others are ignored."""
    if (outcome := RESTARTS.get(action)) is not None:
        _named(product_id, lambda slug: _restarts.labels(slug, _state.backend, outcome).inc())


def taken_over(product_id: UUID) -> None:
    _named(product_id, lambda slug: _takeovers.labels(slug, _state.backend).inc())


def backend_called(product_id: UUID | None, call: str, ok: bool, seconds: float) -> None:
    calls = _brought_up.get()
    if calls is not None and ok:
        calls.append(call)
    _call_seconds.labels(_state.backend, call).observe(seconds)
    outcome = "ok" if ok else "error"
    if product_id is None:
        _calls.labels(NO_PRODUCT, _state.backend, call, outcome).inc()
    else:
        _named(product_id, lambda slug: _calls.labels(slug, _state.backend, call, outcome).inc())


def delivered(product_id: UUID, outcome: str) -> None:
    """An attempt at a webhook: `delivered`, `failed` (tried again) or `parked`."""
    _named(product_id, lambda slug: _deliveries.labels(slug, _state.backend, outcome).inc())


def loop_round(loop: str, *, ok: bool) -> None:
    _rounds.labels(loop, "ok" if ok else "failed").inc()


def loop_lag(loop: str, seconds: float) -> None:
    _lag.labels(loop).set(seconds)


def requested(method: str, status: int, seconds: float) -> None:
    _requests.labels(method, f"{status // 100}xx").observe(seconds)


# --- the scrape -------------------------------------------------------------------------------------------


class _FleetCollector(Collector):
    def __init__(self, fleet: Fleet, statuses: Iterable[str]) -> None:
        self._fleet = fleet
        self._statuses = tuple(statuses)

    def collect(self) -> Iterable[Metric]:
        engines = GaugeMetricFamily("orchestrator_engines", "Engines by state.", labels=(*_BY, "status"))
        pool = GaugeMetricFamily("orchestrator_pool_engines", "Engines of the warm pool.", labels=_BY)
        for slug in sorted({*_state.products.values(), *(product for product, _ in self._fleet.engines)}):
            for status in self._statuses:
                engines.add_metric((slug, _state.backend, status), self._fleet.engines.get((slug, status), 0))
            pool.add_metric((slug, _state.backend), self._fleet.pool.get(slug, 0))
        yield engines
        yield pool
        waiting = GaugeMetricFamily("orchestrator_audit_unsequenced_rows", "Audit rows that wait for their place.")
        waiting.add_metric((), self._fleet.unsequenced)
        yield waiting
        age = GaugeMetricFamily("orchestrator_audit_unsequenced_age_seconds", "How long the oldest of them waits.")
        age.add_metric((), self._fleet.unsequenced_age_s)
        yield age
        info = GaugeMetricFamily("orchestrator_info", "What runs here.", labels=("version", "backend"))
        info.add_metric((__version__, _state.backend), 1)
        yield info


def exposition(fleet: Fleet, statuses: Iterable[str]) -> bytes:
    """Everything in Prometheus' text format: of all workers, with the fleet as the database has it."""
    fleet_registry = CollectorRegistry()
    fleet_registry.register(_FleetCollector(fleet, statuses))
    directory = os.environ.get(MULTIPROCESS)
    if directory is None:
        own = _registry
    else:
        _bury_dead(Path(directory))
        own = CollectorRegistry()
        MultiProcessCollector(own, directory)  # type: ignore[no-untyped-call]  # the library has no types here
    return generate_latest(own) + generate_latest(fleet_registry)


def _bury_dead(directory: Path) -> None:
    """Gauges of workers that are gone count no more; their counters do."""
    for path in directory.glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            mark_process_dead(int(pid), str(directory))  # type: ignore[no-untyped-call]  # as above


if MULTIPROCESS not in os.environ:
    ProcessCollector(registry=_registry)
