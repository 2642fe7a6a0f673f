"""Traces, where they are wanted: request → operation → backend call → engine probe.

On when the extra `otel` is installed and an exporter is configured by OpenTelemetry's own variables
(`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_EXPORTER`, `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` …). Off, a span is
one call of a function that does nothing. Names and attributes never contain a key.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import structlog

from orchestrator import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

__all__ = ["annotate", "configure_tracing", "enable", "inject", "is_on", "request_span", "shutdown", "span"]

log = structlog.get_logger("orchestrator.tracing")

_NOTHING: Final = nullcontext()
_tracer: Tracer | None = None
_provider: TracerProvider | None = None


def is_on() -> bool:
    return _tracer is not None


def span(name: str, **attributes: str | int | float | bool) -> AbstractContextManager[Any]:
    """A span below the current one, for the `with` block; an exception marks it as failed."""
    if _tracer is None:
        return _NOTHING
    return _tracer.start_as_current_span(name, attributes=attributes)


def request_span(name: str, headers: Mapping[str, str], **attributes: str | int) -> AbstractContextManager[Any]:
    """The span of a request, below the one that its `traceparent` names."""
    if _tracer is None:
        return _NOTHING
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(headers)
    return _tracer.start_as_current_span(name, context=parent, kind=SpanKind.SERVER, attributes=attributes)


def annotate(**attributes: str | int | float | bool) -> None:
    """Attributes of the current span."""
    if _tracer is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(attributes)


def inject(headers: dict[str, str]) -> dict[str, str]:
    """The same headers, with the `traceparent` of the current span."""
    if _tracer is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(headers)
    return headers


def enable(provider: TracerProvider) -> None:
    """Trace into this provider."""
    global _tracer, _provider  # one per process, as OpenTelemetry itself has it
    _provider = provider
    _tracer = provider.get_tracer("orchestrator", __version__)


def shutdown() -> None:
    """Export what is left, and trace no more."""
    global _tracer, _provider  # see `enable`
    if _provider is not None:
        _provider.shutdown()
    _tracer = _provider = None


def configure_tracing() -> None:
    """On, if an exporter is configured; once for each process that serves."""
    wanted = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not wanted or os.environ.get("OTEL_TRACES_EXPORTER") == "none" or os.environ.get("OTEL_SDK_DISABLED") == "true":
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("tracing_not_installed", install="pip install 'engine-orchestrator[otel]'")
        return
    name = os.environ.get("OTEL_SERVICE_NAME", "engine-orchestrator")
    provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    enable(provider)
