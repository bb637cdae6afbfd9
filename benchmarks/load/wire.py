"""The two protocols as the load generator speaks them: written anew, apart from the proxy's code.

A generator that used the proxy's own names and signer would not see a mistake in them. What a
request needs is laid down once as templates, so that a request costs one hash of its body, one of
its canonical form and one HMAC.
"""

from __future__ import annotations

import binascii
import hmac
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orjson import dumps

ENCRYPT, DECRYPT = "encrypt", "decrypt"

Fields = Mapping[str, Any]
"""A JSON object."""


@dataclass(frozen=True, slots=True)
class Head:
    """Templates of one call: %(date)b, %(day)b, %(hash)b, %(nonce)b, ... are filled in."""

    canonical: bytes
    to_sign: bytes
    request: bytes


class Dialect(ABC):
    """What differs between the protocols."""

    base_path: str
    plaintext_field: str
    code_field: str

    @abstractmethod
    def signing_key(self, secret: str, day: str) -> bytes:
        """The key of a day (yyyymmdd)."""

    @abstractmethod
    def head(self, call: str, path: str, host: str, access_key_id: str) -> Head:
        """The templates of a call."""

    @abstractmethod
    def metadata(self, call: str) -> tuple[str, dict[str, str]]:
        """The name of the metadata and what is in them beside the request ID."""

    request_id_field: str

    @abstractmethod
    def encrypt_fields(self, plaintext: bytes) -> dict[str, str]:
        """The parameters of encrypt."""

    @abstractmethod
    def decrypt_fields(self, answer: Fields) -> dict[str, str]:
        """The parameters of the decrypt of what encrypt answered; raises KeyError."""

    @abstractmethod
    def sizes(self, answer: Fields) -> tuple[int, ...]:
        """How many bytes each part of a ciphertext has; raises KeyError, TypeError, ValueError."""

    def body(self, call: str, fields: Fields) -> tuple[bytes, bytes]:
        """What stands before and after the ID of a request in its body."""
        name, metadata = self.metadata(call)
        mark = "<id>"
        whole = dumps({name: {self.request_id_field: mark, **metadata}, **fields})
        before, _, after = whole.partition(mark.encode())
        return before, after


class Xki(Dialect):
    """XKI v1, signed by ACS4-HMAC-SHA256."""

    base_path = "/kms/xki/v1"
    plaintext_field = "Plaintext"
    code_field = "Code"
    request_id_field = "KmsRequestId"
    region = "cn-hangzhou"

    def signing_key(self, secret: str, day: str) -> bytes:
        return _derive("aliyun_v4" + secret, day, self.region, "kms", "aliyun_v4_request")

    def head(self, call: str, path: str, host: str, access_key_id: str) -> Head:
        headers = {
            "content-type": "application/json",
            "host": host,
            "x-acs-accesskey-id": access_key_id,
            "x-acs-action": call.title(),
            "x-acs-content-sha256": "%(hash)b",
            "x-acs-date": "%(date)b",
            "x-acs-signature-nonce": "%(nonce)b",
            "x-acs-version": "2016-01-20",
        }
        scope = f"%(day)b/{self.region}/kms/aliyun_v4_request"
        authorization = (
            f"ACS4-HMAC-SHA256 Credential={access_key_id}/{scope},"
            f"SignedHeaders={';'.join(headers)},Signature=%(signature)b"
        )
        to_sign = b"ACS4-HMAC-SHA256\n%(digest)b"
        return Head(_canonical(path, headers), to_sign, _request(path, headers, authorization))

    def metadata(self, call: str) -> tuple[str, dict[str, str]]:
        return "RequestMetadata", {
            "KmsOperation": f"kms:{call.title()}",
            "KmsInstanceId": "kst-1234567890",
            "KmsKeyArn": "acs:kms:cn-hangzhou:123456789012:key/1111-2222",
            "PrincipalArn": "acs:kms:cn-hangzhou:123456789012:user/123456",
        }

    def encrypt_fields(self, plaintext: bytes) -> dict[str, str]:
        return {"Plaintext": b64encode(plaintext).decode(), "Algorithm": "AES_GCM"}

    def decrypt_fields(self, answer: Fields) -> dict[str, str]:
        return {name: answer[name] for name in ("CiphertextBlob", "Iv", "Algorithm")}

    def sizes(self, answer: Fields) -> tuple[int, ...]:
        return _size(answer["CiphertextBlob"]), _size(answer["Iv"])


class Xks(Dialect):
    """XKS v1, signed by AWS4-HMAC-SHA256."""

    base_path = "/kms/xks/v1"
    plaintext_field = "plaintext"
    code_field = "errorName"
    request_id_field = "kmsRequestId"
    region = "us-east-1"

    def signing_key(self, secret: str, day: str) -> bytes:
        return _derive("AWS4" + secret, day, self.region, "kms-xks-proxy", "aws4_request")

    def head(self, call: str, path: str, host: str, access_key_id: str) -> Head:
        del call  # it is in the path alone
        headers = {"content-type": "application/json", "host": host, "x-amz-date": "%(date)b"}
        scope = f"%(day)b/{self.region}/kms-xks-proxy/aws4_request"
        authorization = (
            f"AWS4-HMAC-SHA256 Credential={access_key_id}/{scope}, "
            f"SignedHeaders={';'.join(headers)}, Signature=%(signature)b"
        )
        to_sign = f"AWS4-HMAC-SHA256\n%(date)b\n{scope}\n%(digest)b".encode()
        return Head(_canonical(path, headers), to_sign, _request(path, headers, authorization))

    def metadata(self, call: str) -> tuple[str, dict[str, str]]:
        return "requestMetadata", {
            "kmsOperation": call.title(),
            "awsPrincipalArn": "arn:aws:iam::123456789012:user/Alice",
            "kmsKeyArn": "arn:aws:kms:us-east-1:123456789012:key/1111-2222",
        }

    def encrypt_fields(self, plaintext: bytes) -> dict[str, str]:
        return {"plaintext": b64encode(plaintext).decode(), "encryptionAlgorithm": "AES_GCM"}

    def decrypt_fields(self, answer: Fields) -> dict[str, str]:
        names = ("ciphertext", "initializationVector", "authenticationTag")
        fields = {name: answer[name] for name in names} | {"encryptionAlgorithm": "AES_GCM"}
        if "ciphertextMetadata" in answer:
            fields["ciphertextMetadata"] = answer["ciphertextMetadata"]
        return fields

    def sizes(self, answer: Fields) -> tuple[int, ...]:
        return (
            _size(answer["ciphertext"]),
            _size(answer["initializationVector"]),
            _size(answer["authenticationTag"]),
        )


DIALECTS: Mapping[str, Dialect] = {"xki": Xki(), "xks": Xks()}


def _derive(first: str, *parts: str) -> bytes:
    key = first.encode()
    for part in parts:
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _canonical(path: str, headers: Mapping[str, str]) -> bytes:
    """`headers` are sorted by name, and all of them are signed."""
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    return f"POST\n{path}\n\n{lines}\n{';'.join(headers)}\n%(hash)b".encode()


def _request(path: str, headers: Mapping[str, str], authorization: str) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return (
        f"POST {path} HTTP/1.1\r\n{lines}authorization: {authorization}\r\n"
        "content-length: %(length)d\r\n\r\n%(body)b"
    ).encode()


def _size(text: str) -> int:
    return len(binascii.a2b_base64(text, strict_mode=True))
