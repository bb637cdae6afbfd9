"""OpenTelemetry traces of some requests: a span for the request, its stages and its batches.

Off unless `[tracing]` is in the configuration; needs the extra `tracing`. Spans go to a collector
by OTLP over HTTP, from a thread of the SDK, which keeps a bounded number and drops what is over it:
no request waits for a collector. There is nothing in a span that is not in the audit log, and
less: no principal, no access key, no address.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xkiproxy import __version__
from xkiproxy.observability.timing import Timing, Visit

if TYPE_CHECKING:  # the extra need not be there
    import requests
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
    from opentelemetry.util.types import Attributes

_log = logging.getLogger(__name__)

_MAX_SPANS = 4096
_BATCH_SPANS = 128
"""The SDK's thread holds up the event loop while it encodes: little at a time."""
_FLUSH_SECONDS = 5
_QUIET_SECONDS = 60
_SERVER_ERROR = 500
_TAKEN = range(200, 300)


class TracingError(Exception):
    """Traces cannot be sent; the text says what to do."""


@dataclass(frozen=True, slots=True)
class TracingOptions:
    """Where spans go, and of how many requests."""

    endpoint: str
    """The URL of the collector, such as `https://collector:4318/v1/traces`."""
    sample_ratio: float
    """Of how many of the requests; more than 0, at most 1."""
    service_name: str = "xkiproxy"
    timeout_seconds: float = 10
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca: Path | None = None
    """What the collector's certificate is checked with; None: the CAs that `requests` brings."""
    certificate: Path | None = None
    private_key: Path | None = None


@dataclass(frozen=True, slots=True)
class Period:
    """From when to when, in seconds on the clock of `time.monotonic`."""

    began: float
    ended: float


class Tracer:
    """Makes spans of what was measured, and hands them to the SDK."""

    def __init__(self, provider: TracerProvider, every: int) -> None:
        """One request in `every` is traced."""
        from opentelemetry import context, trace  # noqa: PLC0415

        self.every = every
        self._api = trace
        self._nothing = context.Context()
        self._provider = provider
        self._tracer = provider.get_tracer("xkiproxy", __version__)

    def trace(
        self, name: str, attributes: Attributes, status: int, timing: Timing, times: Period
    ) -> None:
        """Send the spans of a request; `status` is that of its HTTP answer."""
        clock = time.time_ns() - time.monotonic_ns()
        root = self._tracer.start_span(
            name,
            self._nothing,  # nobody's child: what a client says of its own spans is not signed
            self._api.SpanKind.SERVER,
            attributes,
            start_time=_nanoseconds(clock, times.began),
        )
        if status >= _SERVER_ERROR:
            root.set_status(self._api.StatusCode.ERROR)
        for stage, began, ended in timing.stages(times.began, times.ended):
            span = self._child(root, stage, clock, Period(began, ended))
            if stage == "perform":
                for visit in timing.visits:
                    self._visit(span, clock, visit)
        root.end(_nanoseconds(clock, times.ended))

    def _visit(self, perform: Span, clock: int, visit: Visit) -> None:
        kmi: dict[str, str | int] = {"xkiproxy.kmi": visit.kmi, "xkiproxy.attempts": visit.attempts}
        batch = visit.batch
        taken = visit.settled if batch is None else batch.taken
        self._child(perform, "queue", clock, Period(visit.queued, taken), kmi)
        if batch is not None:
            batched = {**kmi, "xkiproxy.lane": batch.lane, "xkiproxy.batch.size": batch.size}
            self._child(perform, "batch", clock, Period(taken, visit.settled), batched)

    def _child(
        self, parent: Span, name: str, clock: int, times: Period, attributes: Attributes = None
    ) -> Span:
        span = self._tracer.start_span(
            name,
            self._api.set_span_in_context(parent),
            attributes=attributes,
            start_time=_nanoseconds(clock, times.began),
        )
        span.end(_nanoseconds(clock, times.ended))
        return span

    def close(self) -> None:
        """Send what is left, for some seconds at most; blocks."""
        # With a deadline of ours: the SDK's is half a minute.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_FLUSH_SECONDS)


def open_tracer(options: TracingOptions) -> Tracer:
    """Begin to trace; raises TracingError where the SDK is missing."""
    try:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415
    except ImportError:
        raise _missing() from None
    _speak_for_the_sdk()
    resource = Resource.create(
        {"service.name": options.service_name, "service.version": __version__}
    )
    # What is traced has been decided before; the environment has no say in it.
    provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(
            _exporter(options), max_queue_size=_MAX_SPANS, max_export_batch_size=_BATCH_SPANS
        )
    )
    return Tracer(provider, max(1, round(1 / options.sample_ratio)))


def reach(options: TracingOptions) -> None:
    """Send the collector an empty message; raises TracingError if it does not take it. Blocks."""
    try:
        import requests  # noqa: PLC0415
    except ImportError:
        raise _missing() from None
    headers = {"Content-Type": "application/x-protobuf", **options.headers}
    with _session(options) as session:
        try:
            answer = session.post(
                options.endpoint,
                b"",
                headers=headers,
                timeout=options.timeout_seconds,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise TracingError(f"{options.endpoint}: {_reason(error)}") from None
    if answer.status_code not in _TAKEN:
        raise TracingError(f"{options.endpoint}: the collector answers {answer.status_code}")


def _exporter(options: TracingOptions) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http import Compression  # noqa: PLC0415
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )

    session = _session(options)
    verify, certificate = session.verify, session.cert
    exporter = OTLPSpanExporter(
        options.endpoint,
        headers=options.headers,
        timeout=options.timeout_seconds,
        compression=Compression.Gzip,
        session=session,
    )
    # The exporter has asked the environment meanwhile: what the configuration says counts.
    session.verify, session.cert = verify, certificate
    return exporter


def _session(options: TracingOptions) -> requests.Session:
    import requests  # noqa: PLC0415

    session = requests.Session()
    session.trust_env = False  # no proxy and no password that the configuration does not name
    system = ssl.get_default_verify_paths()
    session.verify = str(options.ca or system.cafile or system.capath or "") or True
    if options.certificate is not None:
        session.cert = (str(options.certificate), str(options.private_key))
    return session


def _reason(error: BaseException) -> str:
    """The innermost reason, without the layers of libraries around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error) or type(error).__name__


def _missing() -> TracingError:
    return TracingError("OpenTelemetry is not installed: pip install 'xkiproxy[tracing]'")


def _nanoseconds(clock: int, moment: float) -> int:
    """A moment of `time.monotonic` since the epoch; `clock` is between the two, in ns."""
    return clock + int(moment * 1e9)


class _Spokesman(logging.Handler):
    """Passes on what the SDK says, once in a while: it speaks for every span it drops."""

    _next = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _QUIET_SECONDS
            _log.warning("traces: %s", record.getMessage())


def _speak_for_the_sdk() -> None:
    logger = logging.getLogger("opentelemetry")
    logger.handlers[:] = [_Spokesman(logging.WARNING)]
    logger.propagate = False
