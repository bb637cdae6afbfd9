"""Security: signatures, denials, quotas, replays, certificates, credentials, audit, reloads."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from grafana.source.panels import (
    GREEN,
    HERE,
    NONE_IS_GOOD,
    RED,
    STORE,
    YELLOW,
    bars,
    board,
    growth,
    number,
    plot,
    rate,
    states,
)

_FAILURES = "xkiproxy_auth_failures_total"
_SIGNATURE = f'{STORE},reason!~"access_reason|policy|replay|source_network"'
_DAY = 86400


def dashboard() -> Dashboard:
    """See the module."""
    return board(
        "xkiproxy-security",
        "xkiproxy / Security",
        "Who was refused and why, what expires, and whether everything is written down.",
        {
            "At a glance": [
                number(
                    "Not authenticated",
                    "Requests a second whose signature did not verify, for any reason. Good: near "
                    "0.",
                    rate(_FAILURES, where=_SIGNATURE) + " or vector(0)",
                    "reqps",
                    steps=((None, GREEN), (0.1, YELLOW), (1, RED)),
                ),
                number(
                    "Replays",
                    "Requests a second with a nonce that was used before. Good: 0; a balancer "
                    "that sends a request twice makes some.",
                    rate(_FAILURES, where=f'{STORE},reason="replay"') + " or vector(0)",
                    "reqps",
                    steps=((None, GREEN), (0.01, YELLOW), (1, RED)),
                ),
                number(
                    "Denied",
                    "Requests a second denied by a policy, their network or their reason. Good: 0, "
                    "or what you know.",
                    rate(_FAILURES, where=f'{STORE},reason=~"access_reason|policy|source_network"')
                    + " or vector(0)",
                    "reqps",
                    steps=((None, GREEN), (0.1, YELLOW), (10, RED)),
                ),
                number(
                    "Certificate expires in",
                    "The first of all proxies. Good: more than 30 days. The cloud pins the "
                    "certificate's fingerprint or its CA: plan the change with it.",
                    f"min(xkiproxy_tls_certificate_expiry_timestamp_seconds{{{HERE}}}) - time()",
                    "s",
                    steps=((None, RED), (7 * _DAY, YELLOW), (30 * _DAY, GREEN)),
                ),
                number(
                    "Oldest credential",
                    "The age of the oldest credential in use. Good: as your policy says, here "
                    "under a year.",
                    f"time() - min(xkiproxy_credential_created_timestamp_seconds{{{STORE}}})",
                    "s",
                    steps=((None, GREEN), (300 * _DAY, YELLOW), (365 * _DAY, RED)),
                ),
                number(
                    "Audit sinks down",
                    "Places that take no audit records, at any proxy. Good: 0. If a required one "
                    "is down, requests are refused.",
                    f"count(xkiproxy_audit_sink_up{{{HERE}}} == 0) or vector(0)",
                    steps=NONE_IS_GOOD,
                ),
            ],
            "Signatures": [
                plot(
                    "Not authenticated, by reason",
                    "signature, body_hash: a wrong secret, or something on the way changes "
                    "requests. unknown_access_key: a revoked credential, or a stranger. stale: "
                    "clocks differ. unknown_token_key: Google's keys were not fetched of late. "
                    "missing, malformed, scope, unsigned_header: not the cloud's client. Good: "
                    "none, or a few of strangers.",
                    {"{{reason}}": rate(_FAILURES, "reason", where=_SIGNATURE)},
                    "reqps",
                    stacked=True,
                ),
                plot(
                    "Not authenticated, by key store",
                    "As a share of the key store's requests. Good: near 0. Near 100%: the cloud "
                    "has another credential than the proxy.",
                    {
                        "{{keystore}}": rate(_FAILURES, "keystore", where=_SIGNATURE)
                        + " / ("
                        + rate("xkiproxy_requests_total", "keystore", where=f'{STORE},keystore!=""')
                        + " > 0)"
                    },
                    "percentunit",
                    top=1,
                ),
                plot(
                    "Replays",
                    "Requests with a nonce that was used before, by key store. Good: none.",
                    {"{{keystore}}": rate(_FAILURES, "keystore", where=f'{STORE},reason="replay"')},
                    "reqps",
                ),
                plot(
                    "Strangers",
                    "Requests that name no key store (scanners), and connections closed for want "
                    "of a PROXY header from a trusted balancer. Good: few; many: is the port open "
                    "to more than the cloud?",
                    {
                        "{{code}}": rate(
                            "xkiproxy_requests_total", "code", where=f'{HERE},keystore=""'
                        ),
                        "PROXY header {{reason}}": rate(
                            "xkiproxy_proxy_protocol_refused_total", "reason", where=HERE
                        ),
                    },
                    "reqps",
                ),
            ],
            "Denials and quotas": [
                plot(
                    "Denied by policies and networks",
                    "The audit log names the principal and the policy: `xkiproxy audit search "
                    "--outcome 403`. Good: none that you do not know.",
                    {
                        "{{keystore}} {{reason}}": rate(
                            _FAILURES,
                            "keystore",
                            "reason",
                            where=f'{STORE},reason=~"access_reason|policy|source_network"',
                        )
                    },
                    "reqps",
                ),
                plot(
                    "Over quota",
                    "Requests over the quota of the key store (`quota_all`), a key or a "
                    "principal. Good: none; if it goes on, a client has gone wild or a quota is "
                    "too tight.",
                    {
                        "{{keystore}} {{reason}}": rate(
                            "xkiproxy_shed_total",
                            "keystore",
                            "reason",
                            where=f'{STORE},reason=~"quota_.*"',
                        )
                    },
                    "reqps",
                ),
            ],
            "Certificates and credentials": [
                bars(
                    "Certificates expire in",
                    "Of each proxy. Good: more than 30 days.",
                    {
                        "{{instance}} {{listener}}": (
                            f"xkiproxy_tls_certificate_expiry_timestamp_seconds{{{HERE}}} - time()"
                        )
                    },
                    "s",
                    ((None, RED), (7 * _DAY, YELLOW), (30 * _DAY, GREEN)),
                ),
                bars(
                    "Age of the oldest credential",
                    "Of each key store. Rotate: `xkiproxy credentials add`, change it in the "
                    "cloud, `credentials revoke`. Good: under a year.",
                    {
                        "{{keystore}}": (
                            "time() - min by (keystore) "
                            f"(xkiproxy_credential_created_timestamp_seconds{{{STORE}}})"
                        )
                    },
                    "s",
                    ((None, GREEN), (300 * _DAY, YELLOW), (365 * _DAY, RED)),
                ),
            ],
            "Keys": [
                bars(
                    "Encryptions under one key",
                    "Under the current version of the most used key of each KMI, as a share of "
                    "what random IVs allow (2^32, NIST SP 800-38D): `xkiproxy keys list` names it. "
                    "Good: under 50%; above, rotate it.",
                    {
                        "{{kmi}}": (
                            f"sum by (kmi) (xkiproxy_key_encryptions_max{{{HERE}}}) / 2 ^ 32"
                        )
                    },
                    "percentunit",
                    ((None, GREEN), (0.5, YELLOW), (0.9, RED)),
                    width=8,
                ),
                plot(
                    "Keys that await deletion",
                    "Of each key store, at the proxy that has the most: each has its own catalog. "
                    "Good: none, or what you know.",
                    {
                        "{{keystore}}": (
                            f"max by (keystore) (xkiproxy_keys_pending_deletion{{{STORE}}})"
                        )
                    },
                    width=8,
                ),
                bars(
                    "The next key is destroyed in",
                    "Of each key store, at the first proxy that does so; nothing where none awaits "
                    "deletion. `xkiproxy keys list` names it, `xkiproxy keys delete KEY --cancel` "
                    "keeps it. Good: only keys that nobody will miss.",
                    {
                        "{{keystore}}": (
                            "min by (keystore) "
                            f"(xkiproxy_key_destruction_timestamp_seconds{{{STORE}}}) - time()"
                        )
                    },
                    "s",
                    ((None, RED), (3 * _DAY, YELLOW), (14 * _DAY, GREEN)),
                    width=8,
                ),
            ],
            "Audit and configuration": [
                plot(
                    "Audit records and requests",
                    "Each request to a key store has a record. Good: both lines are one (a reload "
                    "adds a record).",
                    {
                        "{{instance}} records": rate(
                            "xkiproxy_audit_records_total", "instance", where=HERE
                        ),
                        "{{instance}} requests": rate(
                            "xkiproxy_requests_total", "instance", where=f'{HERE},keystore!=""'
                        ),
                    },
                    "ops",
                ),
                states(
                    "Audit sinks",
                    "Whether each place takes records. Good: up.",
                    {"{{instance}} {{sink}}": f"xkiproxy_audit_sink_up{{{HERE}}}"},
                    {1: ("up", GREEN), 0: ("down", RED)},
                    width=12,
                ),
                plot(
                    "Reloads",
                    "Reloads of the configuration, in each quarter of an hour. Good: none failed, "
                    "and no `ok` that you did not make.",
                    {
                        "{{instance}} {{outcome}}": growth(
                            "xkiproxy_reloads_total", "instance", "outcome", where=HERE
                        )
                    },
                ),
                states(
                    "Last reload",
                    "What came of it. After one that failed the proxy goes on with what it had. "
                    "Good: taken over.",
                    {"{{instance}}": f"xkiproxy_config_last_reload_successful{{{HERE}}}"},
                    {1: ("taken over", GREEN), 0: ("failed", RED)},
                    width=12,
                ),
            ],
        },
    )
