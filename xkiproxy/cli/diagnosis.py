"""Why a call failed, in words that say what to do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from xkiproxy.cli import http
from xkiproxy.protocols.client import Answer


def explain_failure(error: http.RequestError, endpoint: http.Endpoint, trust: http.Trust) -> str:
    """What to do about a request that got no answer."""
    where = f"{endpoint}: "
    match error:
        case http.ResolveError():
            return f"{where}the name was not resolved ({error}): look at its spelling and at DNS"
        case http.ConnectError():
            return (
                f"{where}no connection ({error}): is the server running, on this port, and does a"
                " firewall let you through?"
            )
        case http.CertificateError():
            return where + _explain_certificate(error, trust)
        case http.HandshakeError():
            return (
                f"{where}the TLS handshake failed ({error}): the server must speak TLS 1.2 or 1.3"
                " on this port"
            )
        case http.AnswerError():
            hint = "look at the server's log"
            # The alert that would say so is lost where the server hangs up first.
            if trust.client_certificate is None:
                hint += "; if it asks for a client certificate, give one with --client-certificate"
            return f"{where}no answer ({error}): {hint}"
        case _:
            return f"{where}{error}"


def _explain_certificate(error: http.CertificateError, trust: http.Trust) -> str:
    came = f"sha256-{error.certificate_sha256}" if error.certificate_sha256 else "unknown"
    text = f"the certificate is not trusted ({error}); fingerprint of the one that came: {came}"
    if trust.certificate_sha256:
        return (
            f"{text}; expected: sha256-{trust.certificate_sha256}. If the certificate was"
            " renewed, run xkiproxy reload, and enter its fingerprint in KMS if KMS pins it"
        )
    return f"{text}. If that is your server's, give --fingerprint {came}; or give --ca FILE"


def explain_answer(answer: Answer, date: str | None, date_errors: Mapping[str, float]) -> str:
    """What to do about an error.

    `date` is the answer's Date header; `date_errors` are the protocol's (see ClientDialect).
    """
    lines = [f"HTTP {answer.status} {answer.code}: {answer.message}"]
    if answer.status in _HINTS:
        lines.append(_HINTS[answer.status])
    if answer.code in date_errors:
        lines.append(_skew(date, date_errors[answer.code]))
    return "\n".join(lines)


_HINTS = {
    401: (
        "Look at the access key ID and its secret (xkiproxy credentials list), and at whether the"
        " server was reloaded (xkiproxy reload) since the credential was added."
    ),
    403: "Look at the key's state (xkiproxy keys show) and at the key store's policy.",
    404: "Look at the external proxy path (xkiproxy kms-config) and the key (xkiproxy keys list).",
    413: "The request is over the server's max_body_bytes.",
    429: "The proxy is over a quota or its queue is full: wait and repeat.",
    500: "A fault of the proxy: look in its log for the request ID.",
    503: "The key manager is away: look at the proxy's /readyz and log.",
    504: "The key manager is slow: look at deadline_ms and at the proxy's metrics.",
}


def _skew(date: str | None, at_least: float) -> str:
    try:
        theirs = parsedate_to_datetime(date or "").timestamp()
    except (TypeError, ValueError):
        return "Compare the clocks: the server did not say its time."
    off = time.time() - theirs
    if abs(off) < at_least:
        return f"The clock is not to blame: it is {abs(off):.0f} s off the server's."
    direction = "ahead of" if off > 0 else "behind"
    return f"The clock here is {abs(off):.0f} s {direction} the server's: look at NTP on both."
