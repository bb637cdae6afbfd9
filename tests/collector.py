"""A collector of traces for tests: OTLP over HTTPS, decoded by OpenTelemetry's own messages."""

from __future__ import annotations

import gzip
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Span(NamedTuple):
    name: str
    trace: str
    id: str
    parent: str
    kind: int
    status: int
    start: int
    end: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """Keeps what it is sent; wants a client certificate of its CA and a token."""

    def __init__(self, tls: Path, token: str) -> None:
        self.token = token
        self.spans: list[Span] = []
        self.answer = 200
        """What it answers to who may send."""

        class Handler(_Handler):
            collector = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "server.crt", tls / "server.key")
        context.load_verify_locations(tls / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"https://localhost:{self._server.server_address[1]}/v1/traces"

    def take(self, body: bytes) -> None:
        message = ExportTraceServiceRequest.FromString(body)
        for group in message.resource_spans:
            resource = _values(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans.extend(_span(span, resource) for span in scope.spans)

    def traces(self) -> dict[str, list[Span]]:
        """The spans of each trace that is whole, in the order of their starts."""
        found: dict[str, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: (span.start, -span.end)):
            found.setdefault(span.trace, []).append(span)
        return {
            trace: spans for trace, spans in found.items() if any(not span.parent for span in spans)
        }

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    collector: ClassVar[Collector]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.collector.answer
        if self.headers["Authorization"] != f"Bearer {self.collector.token}":
            status = 401
        elif self.path != "/v1/traces":
            status = 404
        elif status == 200:
            packed = self.headers.get("Content-Encoding") == "gzip"
            self.collector.take(gzip.decompress(body) if packed else body)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def _span(span: Any, resource: dict[str, Any]) -> Span:
    return Span(
        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.kind,
        span.status.code, span.start_time_unix_nano, span.end_time_unix_nano,
        _values(span.attributes), resource,
    )  # fmt: skip


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
