"""The cloud's side, for tests: requests signed by Alibaba Cloud's own signer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from alibabacloud_darabonba_encode_util.encoder import Encoder
from alibabacloud_gateway_pop.client import Client as AlibabaSigner

SHA256 = "ACS4-HMAC-SHA256"
SM3 = "ACS4-HMAC-SM3"
METADATA = {
    "KmsRequestId": "req-c9f33906-45bf-4ceb-9b90-4f30a8c616a6",
    "KmsOperation": "kms:Encrypt",
    "KmsInstanceId": "kst-1234567890",
    "KmsKeyArn": "acs:kms:cn-hangzhou:123456789012:key/1111-2222",
    "PrincipalArn": "acs:kms:cn-hangzhou:123456789012:user/123456",
    "SourceVpc": "vpc-12345678",
    "SourceIp": "127.0.0.1",
    "KmsViaService": "kms",
}


@dataclass
class Cloud:
    """A KMS instance with one access key."""

    access_key_id: str
    secret: str
    host: str = "localhost"
    region: str = "cn-hangzhou"

    def body(self, **fields: Any) -> bytes:
        """A request body with its metadata."""
        return json.dumps({"RequestMetadata": METADATA, **fields}).encode()

    def headers(
        self,
        path: str,
        body: bytes,
        *,
        algorithm: str = SHA256,
        at: datetime | None = None,
        query: Mapping[str, str] | None = None,
        method: str = "POST",
        **changed: str | None,
    ) -> dict[str, str]:
        """Signed headers; `changed` replaces a header before signing (None takes it away)."""
        when = at or datetime.now(UTC)
        date = when.strftime("%Y%m%dT%H%M%SZ")
        payload = Encoder.hex_encode(Encoder.hash(body, algorithm))
        headers: dict[str, str | None] = {
            "host": self.host,
            "content-type": "application/json; charset=utf-8",
            "x-acs-accesskey-id": self.access_key_id,
            "x-acs-action": "Xki",
            "x-acs-version": "2016-01-20",
            "x-acs-date": date,
            "x-acs-signature-nonce": str(uuid.uuid4()),
            f"x-acs-content-{'sm3' if algorithm == SM3 else 'sha256'}": payload,
            **{name.replace("_", "-"): value for name, value in changed.items()},
        }
        kept = {name: value for name, value in headers.items() if value is not None}
        signer = AlibabaSigner()
        key = signer.get_signingkey(algorithm, self.secret, "kms", self.region, date[:8])
        kept["Authorization"] = signer.get_authorization(
            path, method, dict(query or {}), kept, algorithm, payload,
            self.access_key_id, key, "kms", self.region, date[:8],
        )  # fmt: skip
        return kept
