"""Traces: request → operation → backend call → engine probe, below the caller's own span."""

from __future__ import annotations

import asyncio
import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, ClassVar

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from orchestrator import tracing
from orchestrator.engine_http import EngineHttp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from tests.integration.conftest import Api

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.enable(provider)
    yield exporter
    tracing.shutdown()


def ids(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


async def test_one_trace_from_the_caller_to_the_engine(exporter: InMemorySpanExporter, api: Api) -> None:
    status, _ = await api.post("/engines/ann/admit", {"auto_provision": True}, headers={"traceparent": CALLER})
    assert status == 200
    spans = [span for span in exporter.get_finished_spans() if ids(span)[0] == int(TRACE, 16)]
    by_name = {span.name: span for span in spans}
    assert {"HTTP POST", "operation.provision", "backend.create", "engine.health"} <= set(by_name)
    parents = {ids(span)[1]: span for span in spans}

    def above(span: ReadableSpan) -> list[str]:
        names = []
        while span.parent is not None and span.parent.span_id in parents:
            span = parents[span.parent.span_id]
            names.append(span.name)
        return names

    request = by_name["HTTP POST"]
    assert request.parent is not None
    assert request.parent.span_id == int("b7ad6b7169203331", 16)
    assert request.attributes is not None
    assert request.attributes["http.route"] == "/engines/{user_id}/admit"
    assert request.attributes["http.response.status_code"] == 200
    assert above(by_name["operation.provision"]) == ["HTTP POST"]
    assert above(by_name["backend.create"]) == ["operation.provision", "HTTP POST"]
    assert above(by_name["engine.health"]) == ["operation.provision", "HTTP POST"]
    assert "sk-sept-" not in str([(span.name, dict(span.attributes or {})) for span in spans])


async def test_the_engine_is_given_the_traceparent(exporter: InMemorySpanExporter) -> None:
    heads: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{"status":"ok"}')
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    http = EngineHttp()
    await http.open()
    try:
        assert (await http.health(url, 30)).ok
        (span,) = exporter.get_finished_spans()
        trace_id, span_id = ids(span)
        assert f"traceparent: 00-{trace_id:032x}-{span_id:016x}-" in heads[0]
        tracing.shutdown()
        assert (await http.health(url, 30)).ok
        assert "traceparent" not in heads[1]
    finally:
        await http.close()
        server.close()


class Receiver(BaseHTTPRequestHandler):
    """Takes what an OTLP collector takes."""

    taken: ClassVar[list[tuple[str, ExportTraceServiceRequest]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.taken.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_traces_reach_a_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    """By OpenTelemetry's own variables, over its own protocol; the end of the process sends what is left."""
    Receiver.taken = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "orchestrator-1")
        tracing.configure_tracing()
        try:
            assert tracing.is_on()
            with tracing.request_span("HTTP POST", {"traceparent": CALLER}), tracing.span("operation.wake"):
                pass
        finally:
            tracing.shutdown()
            server.shutdown()
    (path, request), *_ = Receiver.taken
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    named = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert named["service.name"] == "orchestrator-1"
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert set(spans) == {"HTTP POST", "operation.wake"}
    assert all(span.trace_id.hex() == TRACE for span in spans.values())
    assert spans["operation.wake"].parent_span_id == spans["HTTP POST"].span_id


def test_off_costs_nothing() -> None:
    assert not tracing.is_on()
    assert tracing.span("a") is tracing.span("b", x=1)
    assert tracing.inject({}) == {}
    tracing.annotate(x=1)
