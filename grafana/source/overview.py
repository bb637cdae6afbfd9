"""Overview: is it well? Traffic, errors, latency against the deadline, saturation, KMIs."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from grafana.source.panels import (
    FAILED,
    GREEN,
    HERE,
    INSTALLATION,
    KMI,
    LATENCY,
    NONE_IS_GOOD,
    RED,
    SLOW_SECONDS,
    STORE,
    YELLOW,
    board,
    distribution,
    growth,
    level,
    mean,
    number,
    plot,
    quantile,
    rate,
    states,
)

_REQUESTS = "xkiproxy_requests_total"
_DURATION = "xkiproxy_request_duration_seconds"
_OURS = f'{HERE},job=~".*xkiproxy.*"'
_RECORDED = f'{INSTALLATION},keystore=~"$keystore"'
_RATIO = "keystore:xkiproxy_failures:ratio_rate"
_BUDGET = (
    f"1 - (sum(sum_over_time(keystore:xkiproxy_failures:rate5m{{{_RECORDED}}}[30d]))"
    f" / sum(sum_over_time(keystore:xkiproxy_eligible:rate5m{{{_RECORDED}}}[30d])))"
    " / (1 - scalar(xkiproxy:availability_objective:ratio))"
)

KMI_STATES = {2: ("connected", GREEN), 1: ("degraded", YELLOW), 0: ("disconnected", RED)}
KMI_STATE = (
    f'max by (instance, kmi) (2 * xkiproxy_kmi_state{{{KMI},state="connected"}}'
    f' or xkiproxy_kmi_state{{{KMI},state="degraded"}}'
    f' or 0 * xkiproxy_kmi_state{{{KMI},state="disconnected"}})'
)


def dashboard() -> Dashboard:
    """See the module."""
    return board(
        "xkiproxy-overview",
        "xkiproxy / Overview",
        "Whether the proxy is well: traffic, errors, latency, saturation, key managers.",
        {
            "At a glance": [
                number(
                    "Proxies",
                    "How many proxies Prometheus reads. Good: all that you run.",
                    f"count(xkiproxy_build_info{{{HERE}}})",
                    steps=((None, RED), (1, GREEN)),
                ),
                number(
                    "Requests",
                    "Requests a second, of every kind and outcome. Good: as at this time on other "
                    "days.",
                    rate(_REQUESTS),
                    "reqps",
                ),
                number(
                    "Availability",
                    "The share of the requests that the proxy could have answered well and did. "
                    "What a client got wrong does not count. Good: above the objective, 99.95%.",
                    f'sum(rate({_REQUESTS}{{{STORE},code="OK"}}[$__range]))'
                    f' / sum(rate({_REQUESTS}{{{STORE},code="OK"}}[$__range])'
                    f" or rate({_REQUESTS}{{{STORE},{FAILED}}}[$__range])"
                    f' or rate(xkiproxy_shed_total{{{STORE},keystore!="",reason!~"quota_.*"}}'
                    "[$__range]))",
                    "percentunit",
                    steps=((None, RED), (0.999, YELLOW), (0.9995, GREEN)),
                    decimals=3,
                ),
                number(
                    "Error budget, 30 days",
                    "What is left of the failures that the objective allows in 30 days. Good: "
                    "more than the share of the 30 days that is left. Below 0 the objective is "
                    "missed. Needs recording.yml, and a Prometheus that keeps 30 days: those that "
                    "it does not have count as the mean of the others.",
                    _BUDGET,
                    "percentunit",
                    steps=((None, RED), (0, YELLOW), (0.25, GREEN)),
                    decimals=1,
                ),
                number(
                    "p99 latency",
                    "99 of 100 requests are answered faster. Good: under 100 ms; the cloud gives "
                    "up after 250 ms, the way there and back included.",
                    quantile(0.99, _DURATION),
                    "s",
                    steps=LATENCY,
                ),
                number(
                    "KMIs not connected",
                    "Key managers with lanes missing, at any proxy. Good: 0.",
                    f'count(xkiproxy_kmi_state{{{KMI},state!="connected"}} == 1) or vector(0)',
                    steps=NONE_IS_GOOD,
                ),
            ],
            "Traffic": [
                plot(
                    "Requests by operation",
                    "Good: the pattern of the day. A fall to zero means that the cloud does not "
                    "reach the proxy.",
                    {"{{keystore}} {{operation}}": rate(_REQUESTS, "keystore", "operation")},
                    "reqps",
                    stacked=True,
                ),
                plot(
                    "Requests by code",
                    "The code of each answer. Good: nearly all OK. No key store stands beside "
                    "codes of requests that named none.",
                    {"{{code}}": rate(_REQUESTS, "code")},
                    "reqps",
                    stacked=True,
                ),
            ],
            "Errors": [
                plot(
                    "Failures of ours",
                    "Answers by which the proxy or its KMI failed: 5xx. Good: none.",
                    {
                        # All are there from 0 on: only those that happen are named.
                        "{{keystore}} {{operation}} {{code}}": rate(
                            _REQUESTS, "keystore", "operation", "code", where=f"{STORE},{FAILED}"
                        )
                        + " > 0"
                    },
                    "reqps",
                    width=8,
                ),
                plot(
                    "Failure ratio against the objective",
                    "The share of failures over an hour and five minutes. Dashed: what the "
                    "objective of 99.95% allows, and 14.4 times as much, at which somebody is "
                    "woken. Needs recording.yml.",
                    {
                        f"{{{{namespace}}}} {{{{job}}}} {{{{keystore}}}} {window}": (
                            f"{_RATIO}{window}{{{_RECORDED}}}"
                        )
                        for window in ("1h", "5m")
                    },
                    "percentunit",
                    width=8,
                    steps=((None, GREEN), (0.0005, YELLOW), (0.0072, RED)),
                ),
                plot(
                    "Errors of clients",
                    "Refused for what the client sent: signature, unknown or disabled key, "
                    "parameters, quota. Good: few, and steady.",
                    {
                        "{{keystore}} {{code}}": rate(
                            _REQUESTS,
                            "keystore",
                            "code",
                            where=f'{STORE},code!="OK",{FAILED.replace("=~", "!~")}',
                        )
                    },
                    "reqps",
                    width=8,
                ),
            ],
            "Latency": [
                plot(
                    "Latency",
                    "From a request's headers to its answer, without the network. Dashed: 100 ms, "
                    "from which a request counts as slow, and 250 ms, after which the cloud gives "
                    "up. Good: p99.9 below 100 ms.",
                    {
                        f"p{share * 100:g}": quantile(share, _DURATION)
                        for share in (0.5, 0.95, 0.99, 0.999)
                    },
                    "s",
                    steps=LATENCY,
                ),
                distribution(
                    "Distribution of latency",
                    "How many requests took how long. Good: one dark band, far below 250 ms. Two "
                    "bands are two kinds of requests, or two KMIs.",
                    rate(f"{_DURATION}_bucket", "le"),
                    "s",
                ),
                plot(
                    "p99 by operation",
                    "Good: alike from day to day. One operation alone: look at its KMI.",
                    {
                        "{{keystore}} {{operation}}": quantile(
                            0.99, _DURATION, "keystore", "operation"
                        )
                    },
                    "s",
                    steps=LATENCY,
                ),
                plot(
                    "Where the time goes",
                    "The mean of each stage, of one request in 64. `perform` is the key store "
                    "with its KMI, `audit` the record on disk. Good: `perform` is most of it, and "
                    "`audit` under a millisecond.",
                    {"{{stage}}": mean("xkiproxy_stage_duration_seconds", "stage", where=HERE)},
                    "s",
                ),
            ],
            "Saturation": [
                plot(
                    "In flight and waiting",
                    "Requests being worked on, and operations that wait for a lane. Good: near 0; "
                    "a number that grows means that a KMI is slower than what comes.",
                    {
                        "{{instance}} in flight": level(
                            "xkiproxy_requests_in_flight", "instance", where=HERE
                        ),
                        "{{instance}} waits for {{kmi}}": (
                            level("xkiproxy_kmi_queue_depth", "instance", "kmi", where=KMI)
                        ),
                    },
                    width=6,
                ),
                plot(
                    "Shed",
                    "Requests and connections refused so that the rest is served in time, and "
                    "requests over a quota. Good: none but `quota_...`.",
                    {"{{keystore}} {{reason}}": rate("xkiproxy_shed_total", "keystore", "reason")},
                    "reqps",
                    width=6,
                ),
                plot(
                    "Processor and memory",
                    "Of the process that is read: with several workers that is their supervisor, "
                    "so look at the machine too. Good: below 80% of a core.",
                    {
                        "{{instance}} cores": rate(
                            "process_cpu_seconds_total", "instance", where=_OURS
                        ),
                        "{{instance}} memory, GB": (
                            level("process_resident_memory_bytes", "instance", where=_OURS)
                            + " / 1e9"
                        ),
                    },
                    width=6,
                ),
                plot(
                    "Event loop",
                    "How much later than asked for it comes back: every request waits so long. "
                    "Good: below 10 ms; above 100 ms something holds it up.",
                    {
                        "{{instance}} p99": quantile(
                            0.99, "xkiproxy_event_loop_lag_seconds", "instance", where=HERE
                        ),
                        "{{instance}} p50": quantile(
                            0.5, "xkiproxy_event_loop_lag_seconds", "instance", where=HERE
                        ),
                    },
                    "s",
                    width=6,
                    steps=((None, GREEN), (SLOW_SECONDS, YELLOW)),
                ),
            ],
            "Key managers and processes": [
                states(
                    "State of each KMI",
                    "As each proxy sees it. Good: connected. Degraded: some of its lanes are "
                    "missing.",
                    {"{{instance}} {{kmi}}": KMI_STATE},
                    KMI_STATES,
                ),
                states(
                    "Refusing everything",
                    "Whether a proxy refuses all requests, since its audit log or its catalog has "
                    "failed. Good: serves.",
                    {"{{instance}} {{part}}": f"xkiproxy_refusing{{{HERE}}}"},
                    {0: ("serves", GREEN), 1: ("refuses", RED)},
                ),
                plot(
                    "Failovers",
                    "Requests that a KMI further down the list served. Good: none while the first "
                    "is connected.",
                    {
                        "{{keystore}}: {{from}} to {{to}}": rate(
                            "xkiproxy_kmi_failovers_total", "keystore", "from", "to"
                        )
                    },
                    "reqps",
                    width=8,
                ),
                plot(
                    "Workers replaced",
                    "Worker processes that ended or hung, in each quarter of an hour. Good: 0.",
                    {
                        "{{instance}}": growth(
                            "xkiproxy_worker_restarts_total", "instance", where=HERE
                        )
                    },
                    width=8,
                ),
                plot(
                    "Versions",
                    "How many proxies run which version. Good: one version, but for the time of "
                    "an upgrade.",
                    {"{{version}}": f"count by (version) (xkiproxy_build_info{{{HERE}}})"},
                    width=8,
                    stacked=True,
                ),
            ],
        },
    )
