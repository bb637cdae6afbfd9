"""Prometheus metrics: their names, labels and buckets, as dashboards and alerts depend on them.

No label takes a value from a request that was not first matched to the configuration or to a
table of the program, so the number of series is bounded whatever clients send.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from xkiproxy import __version__

_REQUEST_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
_STAGE_BUCKETS = (0.000005, 0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.001, 0.01, 0.1, 1.0)
_KMI_BUCKETS = (
    0.000002, 0.000005, 0.00001, 0.000025, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01,
    0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
)  # fmt: skip
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


# A third of all series would be the times at which the others began.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        self.requests = Counter(
            "xkiproxy_requests", "Requests answered, by the code of the answer.",
            ["keystore", "protocol", "operation", "code"], registry=registry,
        )  # fmt: skip
        self.request_duration = Histogram(
            "xkiproxy_request_duration_seconds", "From the request's headers to its answer.",
            ["keystore", "protocol", "operation"], buckets=_REQUEST_BUCKETS, registry=registry,
        )  # fmt: skip
        self.requests_in_flight = Gauge(
            "xkiproxy_requests_in_flight", "Requests being worked on.", registry=registry
        )
        self.stage_duration = Histogram(
            "xkiproxy_stage_duration_seconds", "Parts of a request's time, of one request in 64.",
            ["stage"], buckets=_STAGE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.auth_failures = Counter(
            "xkiproxy_auth_failures", "Requests not authenticated.",
            ["keystore", "reason"], registry=registry,
        )  # fmt: skip
        self.shed = Counter(
            "xkiproxy_shed", "Requests refused to protect the rest.",
            ["keystore", "reason"], registry=registry,
        )  # fmt: skip
        self.kmi_state = Gauge(
            "xkiproxy_kmi_state", "1 for the state that a KMI is in, 0 for the others.",
            ["kmi", "state"], registry=registry,
        )  # fmt: skip
        self.kmi_lanes = Gauge(
            "xkiproxy_kmi_lanes", "Lanes of a KMI, by what they do.",
            ["kmi", "state"], registry=registry,
        )  # fmt: skip
        self.kmi_lane_restarts = Counter(
            "xkiproxy_kmi_lane_restarts", "Lanes replaced.", ["kmi", "reason"], registry=registry
        )
        self.kmi_queue_depth = Gauge(
            "xkiproxy_kmi_queue_depth", "Operations waiting for a lane.", ["kmi"], registry=registry
        )
        self.kmi_batch_size = Histogram(
            "xkiproxy_kmi_batch_size", "Operations that a lane took in one go.",
            ["kmi"], buckets=_BATCH_BUCKETS, registry=registry,
        )  # fmt: skip
        self.kmi_operation_duration = Histogram(
            "xkiproxy_kmi_operation_duration_seconds", "From submission to outcome, with waiting.",
            ["kmi", "operation"], buckets=_KMI_BUCKETS, registry=registry,
        )  # fmt: skip
        self.kmi_operations = Counter(
            "xkiproxy_kmi_operations", "Operations of a KMI, by their outcome.",
            ["kmi", "operation", "outcome"], registry=registry,
        )  # fmt: skip
        self.kmi_failovers = Counter(
            "xkiproxy_kmi_failovers", "Requests served by a KMI further down the list.",
            ["keystore", "from", "to"], registry=registry,
        )  # fmt: skip
        self.certificate_expiry = Gauge(
            "xkiproxy_tls_certificate_expiry_timestamp_seconds", "When the certificate expires.",
            ["listener"], registry=registry,
        )  # fmt: skip
        self.audit_records = Counter(
            "xkiproxy_audit_records", "Audit records written.", registry=registry
        )
        build = Gauge("xkiproxy_build_info", "Always 1.", ["version"], registry=registry)
        build.labels(__version__).set(1)
