"""Schemathesis makes requests of the published descriptions; a real server answers them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import schemathesis
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from google_cloud import SigningKey, claims, key_set, keystore_table
from harness import AWS_ID, AWS_SECRET
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_end_to_end import Installation

FOLDER = Path(__file__).parents[1] / "docs" / "openapi"


def no_fault_of_ours(context: Any, response: Any, case: Any) -> None:
    """501 is how XKS says that a body is too large; the other 5xx are faults."""
    assert response.status_code < 500 or response.status_code == 501, response.text


CHECKS = (
    no_fault_of_ours,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)
xki = schemathesis.openapi.from_dict(json.loads((FOLDER / "xki.json").read_text()))
xks = schemathesis.openapi.from_dict(json.loads((FOLDER / "xks.json").read_text()))
ekm = schemathesis.openapi.from_dict(json.loads((FOLDER / "ekm.json").read_text()))
GOOGLE = SigningKey("google-1")
bounded = settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    made = Installation(tmp_path_factory.mktemp("schemathesis") / "demo")
    credentials = made.directory / "credentials" / "aws.toml"
    credentials.touch(mode=0o600)
    credentials.write_text(
        f'[[credential]]\naccess_key_id = "{AWS_ID}"\naccess_key_secret = "{AWS_SECRET}"\n'
        'created = "2026-01-01T00:00:00Z"\n'
    )
    with made.config.open("a") as file:
        file.write(
            '\n[[keystore]]\nname = "aws"\nprotocol = "xks"\npath_prefix = "/aws"\n'
            'kmi = ["local"]\ncredentials = "credentials/aws.toml"\n'
        )
        file.write(keystore_table(keys="google.json"))
    (made.directory / "google.json").write_text(key_set(GOOGLE))
    made.start()
    yield made
    made.stop()


class Acs4(requests.auth.AuthBase):
    """Alibaba Cloud's own signer, over whatever schemathesis made."""

    def __init__(self, running: Installation) -> None:
        self._cloud = running.cloud

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        path = urlsplit(str(request.url)).path
        body = request.body if isinstance(request.body, bytes) else str(request.body or "").encode()
        request.headers.update(self._cloud.headers(path, body))
        return request


class SigV4(requests.auth.AuthBase):
    """botocore's signer."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        body = request.body or b""
        headers = {
            "host": urlsplit(str(request.url)).netloc,
            "content-type": "application/json",
        }
        signed = AWSRequest("POST", str(request.url), data=body, headers=headers)
        credentials = Credentials(AWS_ID, AWS_SECRET)
        SigV4Auth(credentials, "kms-xks-proxy", "us-east-1").add_auth(signed)
        request.headers.update({name: str(value) for name, value in signed.headers.items()})
        return request


class Token(requests.auth.AuthBase):
    """A token as Google's."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {GOOGLE.sign(claims())}"
        return request


def call(case: Any, running: Installation, prefix: str, auth: requests.auth.AuthBase) -> None:
    if "externalKeyId" in case.path_parameters and len(case.path_parameters["externalKeyId"]) < 3:
        # Of the keys that it thinks of none is there: some of the requests get one that is.
        case.path_parameters["externalKeyId"] = "demo-key"
    case.call_and_validate(
        base_url=f"https://localhost:{running.port}/{prefix}",
        auth=auth,
        verify=str(running.directory / "tls" / "server.crt"),
        checks=CHECKS,
    )


@xki.parametrize()
@bounded
def test_xki(case: Any, running: Installation) -> None:
    call(case, running, "demo", Acs4(running))


@xks.parametrize()
@bounded
def test_xks(case: Any, running: Installation) -> None:
    call(case, running, "aws", SigV4())


@ekm.parametrize()
@bounded
def test_ekm(case: Any, running: Installation) -> None:
    call(case, running, "gcp", Token())
