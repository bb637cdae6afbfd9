"""The suite's signers against those of the clouds."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cloud import SHA256, SM3, Cloud

from xkiproxy.conformance import acs4, sigv4
from xkiproxy.conformance.wire import Credential, Request, Signing

HOST = "kms.example.com:8443"
WHEN = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
PATHS = ["/demo/kms/xki/v1/health", "/kms/xki/v1/keys/a.key-1_x/encrypt"]
BODIES = [b"", b'{"a": 1}', bytes(range(256))]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("algorithm", [SHA256, SM3])
def test_acs4_is_what_alibaba_cloud_signs(path: str, body: bytes, algorithm: str) -> None:
    cloud = Cloud("AN-ACCESS-KEY", "a secret", HOST)
    theirs = cloud.headers(
        path, body, algorithm=algorithm, at=WHEN, content_type="application/json",
        x_acs_signature_nonce="n", x_acs_action="Conformance",
    )  # fmt: skip
    signing = Signing(
        Credential("AN-ACCESS-KEY", "a secret"), "cn-hangzhou", WHEN, "n", algorithm=algorithm
    )
    request = Request("POST", path, {"host": HOST}, body)
    ours = acs4.sign(request, signing).headers
    assert ours["authorization"] == theirs["Authorization"]


@pytest.mark.parametrize("path", [*PATHS, "/kms/xks/v1/keys/%20/metadata"])
@pytest.mark.parametrize("body", BODIES)
def test_sigv4_is_what_aws_signs(path: str, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: WHEN.replace(tzinfo=None))
    headers = {
        "host": HOST,
        "content-type": "application/json",
        "x-amz-z": "a  b",
    }
    theirs = AWSRequest("POST", f"https://{HOST}{path}", data=body, headers=headers)
    keys = Credentials("ANACCESSKEY", "a secret")
    SigV4Auth(keys, "kms-xks-proxy", "us-east-1").add_auth(theirs)
    request = Request("POST", path, {"host": HOST, "x-amz-z": "a  b"}, body)
    signing = Signing(Credential("ANACCESSKEY", "a secret"), "us-east-1", WHEN, "")
    ours = sigv4.sign(request, signing).headers
    assert ours["authorization"] == theirs.headers["Authorization"]
