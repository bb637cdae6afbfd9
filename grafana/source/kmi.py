"""KMI: lanes, queue, batches, times of operations, restarts, state, failover."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from grafana.source.overview import KMI_STATE, KMI_STATES
from grafana.source.panels import (
    GREEN,
    KMI,
    LATENCY,
    RED,
    STORE,
    YELLOW,
    bars,
    board,
    distribution,
    growth,
    level,
    mean,
    plot,
    quantile,
    rate,
    states,
)

_DURATION = "xkiproxy_kmi_operation_duration_seconds"
_BATCH = "xkiproxy_kmi_batch_size"
_LANES = "xkiproxy_kmi_lanes"
_QUEUE = "xkiproxy_kmi_queue"
_OPERATIONS = "xkiproxy_kmi_operations_total"
_LATE = 'outcome=~"deadline_exceeded|throttled"'


def dashboard() -> Dashboard:
    """See the module."""
    return board(
        "xkiproxy-kmi",
        "xkiproxy / KMI",
        "The key managers: their lanes, queues, batches, times, and what breaks.",
        {
            "State": [
                states(
                    "State of each KMI",
                    "As each proxy sees it. Good: connected. Degraded: some of its lanes are "
                    "missing. Disconnected: all are, and the requests go to the next KMI of the "
                    "key store or are refused.",
                    {"{{instance}} {{kmi}}": KMI_STATE},
                    KMI_STATES,
                ),
                plot(
                    "Lanes",
                    "What lanes do. Good: some idle, none failed. All busy for long: the KMI is "
                    "the bottleneck.",
                    {
                        "{{instance}} {{kmi}} {{state}}": level(
                            _LANES, "instance", "kmi", "state", where=KMI
                        )
                    },
                    stacked=True,
                ),
                plot(
                    "Lanes replaced, by reason",
                    "exit: its process or connection ended. timeout: it stopped answering. "
                    "device: the device said that it cannot go on. start: it could not be "
                    "started. login: its login was refused, and is not tried again. Good: none.",
                    {
                        "{{kmi}} {{reason}}": growth(
                            "xkiproxy_kmi_lane_restarts_total",
                            "kmi",
                            "reason",
                            where=KMI,
                            window="$__rate_interval",
                        )
                    },
                ),
            ],
            "Queue and batches": [
                plot(
                    "Operations too late",
                    "The share of operations that missed their deadline, or that the KMI refused "
                    "for want of time. Good: none. With another KMI in the key store's list that "
                    "one is asked next.",
                    {
                        "{{instance}} {{kmi}}": rate(
                            _OPERATIONS, "instance", "kmi", where=f"{KMI},{_LATE}"
                        )
                        + " / "
                        + rate(_OPERATIONS, "instance", "kmi", where=KMI)
                    },
                    "percentunit",
                    width=6,
                    top=1,
                    steps=((None, GREEN), (0.05, RED)),
                ),
                bars(
                    "Queue, against its capacity",
                    "The share of the queues of all workers that is taken. Good: near 0. When the "
                    "queue of a worker is full it refuses; what waits long misses its deadline "
                    "far earlier: how many wait matters less than how fast they go.",
                    {
                        "{{instance}} {{kmi}}": f"{_QUEUE}_depth{{{KMI}}}"
                        f" / {_QUEUE}_capacity{{{KMI}}}"
                    },
                    "percentunit",
                    ((None, GREEN), (0.25, YELLOW), (0.5, RED)),
                    width=4,
                ),
                plot(
                    "Operations that wait",
                    "For a lane, as seen when Prometheus asked: short peaks are missed. Good: "
                    "near 0.",
                    {
                        "{{instance}} {{kmi}}": level(
                            f"{_QUEUE}_depth", "instance", "kmi", where=KMI
                        )
                    },
                    width=7,
                ),
                plot(
                    "Batch size",
                    "Operations that a lane took in one go. Batches grow by themselves under "
                    "load. Good: small; at `max_batch` (64, if nothing else is set) the KMI has "
                    "reached its limit.",
                    {
                        "{{kmi}} mean": mean(_BATCH, "kmi", where=KMI),
                        "{{kmi}} p99": quantile(0.99, _BATCH, "kmi", where=KMI),
                    },
                    width=7,
                ),
            ],
            "Operations": [
                plot(
                    "Operations",
                    "Good: as many as requests, spread over the KMIs as the key stores' lists say.",
                    {"{{kmi}} {{operation}}": rate(_OPERATIONS, "kmi", "operation", where=KMI)},
                    "ops",
                    stacked=True,
                ),
                plot(
                    "Operations that failed, by outcome",
                    "unavailable, deadline_exceeded, throttled and internal are the KMI's or "
                    "ours; the others, such as invalid_ciphertext, are what the client sent. "
                    "Good: none of the former.",
                    {
                        "{{kmi}} {{operation}} {{outcome}}": rate(
                            _OPERATIONS,
                            "kmi",
                            "operation",
                            "outcome",
                            where=f'{KMI},outcome!~"ok|cancelled"',
                        )
                    },
                    "ops",
                ),
                plot(
                    "Time of an operation",
                    "From submission to outcome, with waiting. Dashed: 100 ms and the deadline of "
                    "250 ms. Good: an HSM a few milliseconds, the software KMI some microseconds.",
                    {
                        f"{{{{kmi}}}} p{share * 100:g}": quantile(
                            share, _DURATION, "kmi", where=KMI
                        )
                        for share in (0.5, 0.99)
                    },
                    "s",
                    steps=LATENCY,
                ),
                plot(
                    "p99 by operation",
                    "Good: alike for encrypt and decrypt. Only one slow: look at that key's "
                    "mechanism in the HSM.",
                    {
                        "{{kmi}} {{operation}}": quantile(
                            0.99, _DURATION, "kmi", "operation", where=KMI
                        )
                    },
                    "s",
                ),
                distribution(
                    "Distribution of times",
                    "How many operations took how long. Good: one band. A second one far above is "
                    "waiting, or a lane that hangs.",
                    rate(f"{_DURATION}_bucket", "le", where=KMI),
                    "s",
                ),
                plot(
                    "Load on a lane",
                    "The share of lanes that are busy. Good: below 70% at the peak of the day; "
                    "add lanes above, if the KMI has sessions left.",
                    {
                        "{{instance}} {{kmi}}": level(
                            _LANES, "instance", "kmi", where=f'{KMI},state="busy"'
                        )
                        + " / "
                        + level(_LANES, "instance", "kmi", where=KMI)
                    },
                    "percentunit",
                    top=1,
                    steps=((None, GREEN), (0.7, YELLOW), (0.9, RED)),
                ),
            ],
            "Failover": [
                states(
                    "Left alone",
                    "Whether key stores with another KMI ask that one first, as this one failed. "
                    "Now and then one request tries it; a success ends the pause. Good: no. It "
                    "stays yes while nothing comes, since nobody tries.",
                    {"{{instance}} {{kmi}}": f"xkiproxy_kmi_left_alone{{{KMI}}}"},
                    {0: ("no", GREEN), 1: ("yes", YELLOW)},
                ),
                plot(
                    "Failovers",
                    "Requests that a KMI further down the list served. Good: none while the first "
                    "is connected. Some, while it is: it is slow, or does not hold the key.",
                    {
                        "{{keystore}}: {{from}} to {{to}}": rate(
                            "xkiproxy_kmi_failovers_total", "keystore", "from", "to"
                        )
                    },
                    "reqps",
                ),
                plot(
                    "Hedged requests",
                    "Requests that a second KMI was asked too, since the first was slow "
                    "(`hedge_after_ms`), and which of them answered. Good: one in a hundred or "
                    "fewer. Nothing, where hedging is off.",
                    {
                        "{{keystore}} {{outcome}}": rate(
                            "xkiproxy_kmi_hedges_total", "keystore", "outcome", where=STORE
                        )
                    },
                    "reqps",
                ),
            ],
        },
    )
