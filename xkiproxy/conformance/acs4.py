"""Alibaba Cloud's signature ACS4, as a client makes it (docs/protocols/xki.md, "Signature")."""

from __future__ import annotations

from dataclasses import replace

from cryptography.hazmat.primitives import hashes, hmac

from xkiproxy.conformance.wire import Request, Signing

SHA256 = "ACS4-HMAC-SHA256"
SM3 = "ACS4-HMAC-SM3"

_HASHES: dict[str, tuple[hashes.HashAlgorithm, str]] = {
    SHA256: (hashes.SHA256(), "x-acs-content-sha256"),
    SM3: (hashes.SM3(), "x-acs-content-sm3"),
}


def sign(request: Request, signing: Signing) -> Request:
    """Add the headers that a signature needs, and the signature."""
    algorithm = signing.algorithm or SHA256
    content_header = _HASHES[algorithm][1]
    date = signing.when.strftime("%Y%m%dT%H%M%SZ")
    headers = {
        "content-type": "application/json",
        "x-acs-accesskey-id": signing.credential.access_key_id,
        "x-acs-action": "Conformance",
        "x-acs-version": "2016-01-20",
        "x-acs-date": date if signing.date is None else signing.date,
        "x-acs-signature-nonce": signing.nonce,
        content_header: _hash(algorithm, request.body).hex(),
        **request.headers,
    }
    signed = sorted(
        name
        for name in headers
        if (name.startswith("x-acs-") or name in {"host", "content-type"})
        and name not in signing.unsigned
    )
    path, _, query = request.path.partition("?")
    canonical = "\n".join(
        (
            request.method,
            path,
            "&".join(sorted(query.split("&"))),
            "".join(f"{name}:{headers[name].strip()}\n" for name in signed),
            ";".join(signed),
            headers[content_header],
        )
    )
    to_sign = f"{algorithm}\n{_hash(algorithm, canonical.encode()).hex()}"
    scope = (
        signing.scope_date or date[:8],
        signing.region,
        signing.service or "kms",
        signing.terminator or "aliyun_v4_request",
    )
    key = f"aliyun_v4{signing.credential.secret}".encode()
    for part in scope:
        key = _hmac(algorithm, key, part.encode())
    headers["authorization"] = (
        f"{algorithm} Credential={'/'.join((signing.credential.access_key_id, *scope))},"
        f"SignedHeaders={';'.join(signed)},"
        f"Signature={_hmac(algorithm, key, to_sign.encode()).hex()}"
    )
    return replace(request, headers=headers)


def _hash(algorithm: str, data: bytes) -> bytes:
    digest = hashes.Hash(_HASHES[algorithm][0])
    digest.update(data)
    return digest.finalize()


def _hmac(algorithm: str, key: bytes, data: bytes) -> bytes:
    code = hmac.HMAC(key, _HASHES[algorithm][0])
    code.update(data)
    return code.finalize()
