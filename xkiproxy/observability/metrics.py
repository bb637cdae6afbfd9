"""Prometheus metrics: their names, labels and buckets, as dashboards and alerts depend on them.

No label takes a value from a request that was not first matched to the configuration or to a
table of the program, so the number of series is bounded whatever clients send.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from xkiproxy import __version__
from xkiproxy.observability.series import Collection, Family, counter, gauge, histogram

REQUEST_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
_STAGE_BUCKETS = (0.000005, 0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.001, 0.01, 0.1, 1.0)
_KMI_BUCKETS = (
    0.000002, 0.000005, 0.00001, 0.000025, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01,
    0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
)  # fmt: skip
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.requests = counter(
            "xkiproxy_requests", "Requests answered, by the code of the answer.",
            "keystore", "protocol", "operation", "code",
        )  # fmt: skip
        self.request_duration = histogram(
            "xkiproxy_request_duration_seconds", "From the request's headers to its answer.",
            "keystore", "protocol", "operation", bounds=REQUEST_BUCKETS,
        )  # fmt: skip
        self.requests_in_flight = gauge("xkiproxy_requests_in_flight", "Requests being worked on.")
        self.stage_duration = histogram(
            "xkiproxy_stage_duration_seconds", "Parts of a request's time, of some requests.",
            "stage", bounds=_STAGE_BUCKETS,
        )  # fmt: skip
        self.auth_failures = counter(
            "xkiproxy_auth_failures", "Requests not authenticated, or denied.", "keystore", "reason"
        )
        self.shed = counter(
            "xkiproxy_shed", "Requests refused to protect the rest.", "keystore", "reason"
        )
        self.proxy_protocol_refused = counter(
            "xkiproxy_proxy_protocol_refused", "Connections closed for want of a PROXY header.",
            "reason",
        )  # fmt: skip
        self.kmi_state = gauge(
            "xkiproxy_kmi_state", "1 for the state that a KMI is in, 0 for the others.",
            "kmi", "state", merge=max,
        )  # fmt: skip
        self.kmi_lanes = gauge(
            "xkiproxy_kmi_lanes", "Lanes of a KMI, by what they do.", "kmi", "state"
        )
        self.kmi_lane_restarts = counter(
            "xkiproxy_kmi_lane_restarts",
            "Lanes that broke or could not be started.",
            "kmi",
            "reason",
        )
        self.kmi_queue_depth = gauge(
            "xkiproxy_kmi_queue_depth", "Operations waiting for a lane.", "kmi"
        )
        self.kmi_queue_capacity = gauge(
            "xkiproxy_kmi_queue_capacity", "Operations that may wait; more are refused.", "kmi"
        )
        self.kmi_batch_size = histogram(
            "xkiproxy_kmi_batch_size", "Operations that a lane took in one go.",
            "kmi", bounds=_BATCH_BUCKETS,
        )  # fmt: skip
        self.kmi_operation_duration = histogram(
            "xkiproxy_kmi_operation_duration_seconds", "From submission to outcome, with waiting.",
            "kmi", "operation", bounds=_KMI_BUCKETS,
        )  # fmt: skip
        self.kmi_operations = counter(
            "xkiproxy_kmi_operations", "Operations of a KMI, by their outcome.",
            "kmi", "operation", "outcome",
        )  # fmt: skip
        self.kmi_left_alone = gauge(
            "xkiproxy_kmi_left_alone",
            "1 from a KMI's failure until a request has succeeded there: others are asked first.",
            "kmi", merge=max,
        )  # fmt: skip
        self.kmi_failovers = counter(
            "xkiproxy_kmi_failovers", "Requests served by a KMI further down the list.",
            "keystore", "from", "to",
        )  # fmt: skip
        self.kmi_hedges = counter(
            "xkiproxy_kmi_hedges", "Requests that a second KMI was asked too; whether it won.",
            "keystore", "outcome",
        )  # fmt: skip
        self.key_encryptions = gauge(
            "xkiproxy_key_encryptions_max",
            "Encryptions made by this host under the most used of the keys' current versions.",
            "kmi", merge=max,
        )  # fmt: skip
        self.keys_pending_deletion = gauge(
            "xkiproxy_keys_pending_deletion",
            "Keys of a key store that await deletion in this host's catalog.",
            "keystore", merge=max,
        )  # fmt: skip
        self.key_destruction = gauge(
            "xkiproxy_key_destruction_timestamp_seconds",
            "When the first of a key store's keys that await deletion is destroyed; absent if none"
            " does.",
            "keystore", merge=min,
        )  # fmt: skip
        self.certificate_expiry = gauge(
            "xkiproxy_tls_certificate_expiry_timestamp_seconds", "When the certificate expires.",
            "listener", merge=min,
        )  # fmt: skip
        self.credential_created = gauge(
            "xkiproxy_credential_created_timestamp_seconds",
            "When the oldest credential of a key store was made.",
            "keystore", merge=min,
        )  # fmt: skip
        self.reloads = counter("xkiproxy_reloads", "Reloads of the configuration.", "outcome")
        for outcome in ("ok", "failed"):
            # From 0 on: the first failure must be seen as a change.
            self.reloads.labels(outcome)
        self.last_reload = gauge(
            "xkiproxy_config_last_reload_successful",
            "Whether the last reload took over the configuration; 1 before the first.", merge=min,
        )  # fmt: skip
        self.last_reload.labels().set(1)
        self.refusing = gauge(
            "xkiproxy_refusing", "1 while all requests are refused since this part has failed.",
            "part", merge=max,
        )  # fmt: skip
        self.event_loop_lag = histogram(
            "xkiproxy_event_loop_lag_seconds",
            "How much later than asked for the event loop came back, four times a second.",
            bounds=_LAG_BUCKETS,
        )  # fmt: skip
        self.worker_restarts = counter("xkiproxy_worker_restarts", "Worker processes replaced.")
        audit_records = counter("xkiproxy_audit_records", "Audit records written.")
        self.audit_records = audit_records.labels()
        self.audit_sink_up = gauge(
            "xkiproxy_audit_sink_up", "Whether a sink takes audit records, at every worker.",
            "sink", merge=min,
        )  # fmt: skip
        build = gauge("xkiproxy_build_info", "Always 1.", "version", merge=max)
        build.labels(__version__).set(1)
        named = [family for family in vars(self).values() if isinstance(family, Family)]
        self.collection = Collection([*named, audit_records, build])
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(self.collection)

    def count_reload(self, *, succeeded: bool) -> None:
        """Count a reload, and show what came of the last one."""
        self.reloads.labels("ok" if succeeded else "failed").inc()
        self.last_reload.labels().set(succeeded)


class FailoverMetrics:
    """The metrics of a key store's failover."""

    def __init__(self, metrics: Metrics, keystore: str) -> None:
        self._metrics = metrics
        self._keystore = keystore

    def failed_over(self, preferred: str, served: str) -> None:
        """Count a request that another KMI than the preferred one has served."""
        self._metrics.kmi_failovers.labels(self._keystore, preferred, served).inc()

    def hedged(self, outcome: str) -> None:
        """Count a request that a second KMI was asked too: it `won` or `lost`."""
        self._metrics.kmi_hedges.labels(self._keystore, outcome).inc()
