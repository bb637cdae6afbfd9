"""AWS Signature Version 4, as a client makes it (docs/protocols/xks.md, "Authentication")."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace
from urllib.parse import quote

from xkiproxy.conformance.wire import Request, Signing

SHA256 = "AWS4-HMAC-SHA256"


def sign(request: Request, signing: Signing) -> Request:
    """Add the headers that a signature needs, and the signature."""
    date = signing.when.strftime("%Y%m%dT%H%M%SZ")
    headers = {
        "content-type": "application/json",
        "x-amz-date": date if signing.date is None else signing.date,
        **request.headers,
    }
    signed = sorted(set(headers) - signing.unsigned)
    path, _, query = request.path.partition("?")
    canonical = "\n".join(
        (
            request.method,
            quote(path, safe="/~"),
            query,
            "".join(f"{name}:{' '.join(headers[name].split())}\n" for name in signed),
            ";".join(signed),
            hashlib.sha256(request.body).hexdigest(),
        )
    )
    scope = (
        signing.scope_date or date[:8],
        signing.region,
        signing.service or "kms-xks-proxy",
        signing.terminator or "aws4_request",
    )
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    to_sign = "\n".join((SHA256, headers["x-amz-date"], "/".join(scope), hashed))
    key = f"AWS4{signing.credential.secret}".encode()
    for part in scope:
        key = hmac.digest(key, part.encode(), "sha256")
    headers["authorization"] = (
        f"{SHA256} Credential={'/'.join((signing.credential.access_key_id, *scope))}, "
        f"SignedHeaders={';'.join(signed)}, "
        f"Signature={hmac.digest(key, to_sign.encode(), 'sha256').hex()}"
    )
    return replace(request, headers=headers)
