"""XKS v1 as the suite knows it: docs/protocols/xks.md."""

from __future__ import annotations

import hashlib
import uuid
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from xkiproxy.conformance import acs4, sigv4
from xkiproxy.conformance.case import Cases
from xkiproxy.conformance.common import AAD, TEXT, decoded, refuse_each
from xkiproxy.conformance.probe import Probe
from xkiproxy.conformance.wire import (
    Answer,
    Expected,
    Fields,
    Refused,
    Request,
    Signing,
    Skipped,
    Unmet,
    Wire,
    b64,
)

CASES = Cases()

_VALIDATION = Expected((400,), ("ValidationException",))
_UNAUTHENTICATED = Expected((401,), ("AuthenticationFailedException",))
_METADATA_SIZE = 20


class XksWire(Wire):
    """AWS KMS external key stores."""

    name = "xks"
    base = "/kms/xks/v1"
    default_region = "us-east-1"
    window = timedelta(minutes=5)
    metadata_name = "requestMetadata"
    required_metadata = MappingProxyType(
        {
            "health": ("kmsRequestId", "kmsOperation"),
            "metadata": ("kmsRequestId", "kmsOperation", "awsPrincipalArn"),
            "encrypt": ("kmsRequestId", "kmsOperation", "awsPrincipalArn", "kmsKeyArn"),
            "decrypt": ("kmsRequestId", "kmsOperation", "awsPrincipalArn", "kmsKeyArn"),
        }
    )
    meta_call = "metadata"
    plaintext_name = "plaintext"
    iv_name = "initializationVector"
    algorithms = (sigv4.SHA256,)
    date_header = "x-amz-date"
    needed_headers = ("host", "x-amz-date")
    largest_plaintext = 4300
    refusals = MappingProxyType(
        {
            Refused.UNSIGNED: _UNAUTHENTICATED,
            Refused.MALFORMED: _UNAUTHENTICATED,
            Refused.WRONG: _UNAUTHENTICATED,
            Refused.STALE: _UNAUTHENTICATED,
            Refused.NO_PATH: Expected((404,), ("InvalidUriPathException",)),
            Refused.METHOD: Expected((405,)),
            Refused.NOT_JSON: _VALIDATION,
            Refused.NO_METADATA: _VALIDATION,
            Refused.METADATA: _VALIDATION,
            Refused.KEY_ID: Expected(
                (400, 404),
                ("ValidationException", "InvalidUriPathException", "KeyNotFoundException"),
            ),
            Refused.NO_KEY: Expected((404,), ("KeyNotFoundException",)),
            Refused.DISABLED: Expected((400,), ("InvalidStateException",)),
            Refused.USAGE: Expected((400,), ("InvalidKeyUsageException",)),
            Refused.CIPHERTEXT: Expected((400,), ("InvalidCiphertextException",)),
            Refused.TOO_LARGE: Expected((501, 413, 400)),
        }
    )

    def metadata(self, call: str) -> dict[str, str]:
        """See `Wire`."""
        return {
            "awsPrincipalArn": "arn:aws:iam::123456789012:user/conformance",
            "kmsKeyArn": "arn:aws:kms:us-east-1:123456789012:key/conformance",
            "kmsOperation": {"health": "KmsHealthCheck", "metadata": "CreateKey"}.get(
                call, call.capitalize()
            ),
            "kmsRequestId": str(uuid.uuid4()),
            "awsSourceVpce": "vpce-12345678",
            "kmsViaService": "ebs",
        }

    def sign(self, request: Request, signing: Signing) -> Request:
        """See `Wire`."""
        return sigv4.sign(request, signing)

    def code(self, answer: Answer) -> tuple[str, str]:
        """See `Wire`."""
        message = answer.fields.get("errorMessage", "")
        return answer.text("errorName"), str(message)

    def encrypt_fields(self, plaintext: bytes, aad: bytes | None) -> dict[str, Any]:
        """See `Wire`."""
        fields = {"plaintext": b64(plaintext), "encryptionAlgorithm": "AES_GCM"}
        return fields | _aad(aad)

    def decrypt_fields(self, encrypted: Fields, aad: bytes | None) -> dict[str, Any]:
        """See `Wire`."""
        fields = {name: encrypted[name] for name in self.stored(encrypted)}
        return fields | {"encryptionAlgorithm": "AES_GCM"} | _aad(aad)

    def stored(self, encrypted: Fields) -> tuple[str, ...]:
        """See `Wire`."""
        names = ("ciphertext", "initializationVector", "authenticationTag", "ciphertextMetadata")
        missing = [name for name in names[:3] if name not in encrypted]
        if missing:
            raise Unmet(f"the answer to encrypt has no {', '.join(missing)}")
        return tuple(name for name in names if name in encrypted)


def _aad(aad: bytes | None) -> dict[str, Any]:
    return {} if aad is None else {"additionalAuthenticatedData": b64(aad)}


@CASES.add("signature.foreign", "The signature of another cloud is refused.", xks="MUST")
async def foreign_signature(probe: Probe) -> None:
    request = probe.request("encrypt", probe.subject.key, **probe.wire.encrypt_fields(TEXT, AAD))
    probe.refuse(await probe.send(acs4.sign(request, probe.signing())), Refused.WRONG)


@CASES.add(
    "health.fields",
    "GetHealthStatus answers fleet size, vendors, model and 1 to 10 key managers.",
    xks="SPEC",
)
async def health(probe: Probe) -> str:
    answer = probe.accept(await probe.call("health"))
    for name in ("xksProxyVendor", "xksProxyModel", "ekmVendor"):
        answer.text(name)
    size = answer.fields.get("xksProxyFleetSize")
    if type(size) is not int or size < 1:
        raise Unmet("xksProxyFleetSize is not a whole number over 0")
    fleet = answer.fields.get("ekmFleetDetails")
    if not isinstance(fleet, list) or not 1 <= len(fleet) <= 10:
        raise Unmet("ekmFleetDetails is not a list of 1 to 10")
    states = []
    for entry in fleet:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name), str) for name in ("id", "model", "healthStatus")
        ):
            raise Unmet("an entry of ekmFleetDetails lacks id, model or healthStatus")
        states.append(entry["healthStatus"])
    if set(states) - {"ACTIVE", "DEGRADED", "UNAVAILABLE"}:
        raise Unmet(f"healthStatus is {', '.join(states)}")
    return ", ".join(states)


@CASES.add(
    "metadata.fields",
    "GetKeyMetadata answers keySpec AES_256, keyUsage and keyStatus.",
    xks="SPEC",
)
async def metadata(probe: Probe) -> None:
    answer = probe.accept(await probe.call("metadata", probe.subject.key))
    if answer.text("keySpec") != "AES_256":
        raise Unmet(f"keySpec is {answer.text('keySpec')}")
    usage = answer.fields.get("keyUsage")
    if not isinstance(usage, list) or len(usage) > 10 or not {"ENCRYPT", "DECRYPT"} <= set(usage):
        raise Unmet("keyUsage is not a list of at most ten with ENCRYPT and DECRYPT")
    if answer.text("keyStatus") != "ENABLED":
        raise Unmet(f"keyStatus is {answer.text('keyStatus')}")


@CASES.add("metadata.usage", "keyUsage is what the key is for.", xks="SPEC")
async def key_usage(probe: Probe) -> None:
    key = probe.optional_key("encrypt-only-key")
    answer = probe.accept(await probe.call("metadata", key))
    if "DECRYPT" in answer.fields.get("keyUsage", ()):
        raise Unmet("the encrypt-only key's keyUsage has DECRYPT")


@CASES.add(
    "encrypt.fields",
    "Ciphertext is as long as its plaintext, IV 12 or 16, tag 16, metadata at most 20 bytes.",
    xks="MUST",
)
async def encrypted_sizes(probe: Probe) -> None:
    for size in (1, 32, 4300):
        request = probe.wire.encrypt_fields(bytes(size), AAD)
        answer = probe.accept(await probe.call("encrypt", probe.subject.key, **request))
        if len(answer.data("ciphertext")) != size:
            raise Unmet(f"{size} bytes became {len(answer.data('ciphertext'))}")
        if len(answer.data("initializationVector")) not in {12, 16}:
            raise Unmet(f"the IV has {len(answer.data('initializationVector'))} bytes")
        if len(answer.data("authenticationTag")) != 16:
            raise Unmet(f"the tag has {len(answer.data('authenticationTag'))} bytes")
        stored = answer.fields
        if (
            "ciphertextMetadata" in stored
            and len(answer.data("ciphertextMetadata")) > _METADATA_SIZE
        ):
            raise Unmet("ciphertextMetadata is over 20 bytes")


@CASES.add(
    "encrypt.integrity",
    "When asked for, the integrity value is SHA-256 over AAD, metadata, IV, ciphertext and tag.",
    xks="MUST",
)
async def integrity(probe: Probe) -> None:
    for aad in (AAD, None):
        fields = probe.wire.encrypt_fields(TEXT, aad)
        fields["ciphertextDataIntegrityValueAlgorithm"] = "SHA_256"
        answer = probe.accept(await probe.call("encrypt", probe.subject.key, **fields))
        covered = aad or b""
        if "ciphertextMetadata" in answer.fields:
            covered += answer.data("ciphertextMetadata")
        covered += answer.data("initializationVector") + answer.data("ciphertext")
        covered += answer.data("authenticationTag")
        if answer.data("ciphertextDataIntegrityValue") != hashlib.sha256(covered).digest():
            raise Unmet("ciphertextDataIntegrityValue is another")


@CASES.add("encrypt.no-integrity", "Not asked for, there is no integrity value.", xks="SPEC")
async def no_integrity(probe: Probe) -> None:
    if "ciphertextDataIntegrityValue" in await probe.encrypt(TEXT, AAD):
        raise Unmet("ciphertextDataIntegrityValue is there")


@CASES.add(
    "encrypt.parameters",
    "A parameter of encrypt that is missing or wrong is a ValidationException.",
    xks="SPEC",
)
async def encrypt_parameters(probe: Probe) -> None:
    wrong: dict[str, tuple[Any, ...]] = {
        "plaintext": (None, "%", 7),
        "encryptionAlgorithm": (None, "", "AES_CBC", 7),
        "additionalAuthenticatedData": ("%", 7),
        "ciphertextDataIntegrityValueAlgorithm": ("MD5", 7),
    }
    right = probe.wire.encrypt_fields(TEXT, AAD)
    await refuse_each(probe, "encrypt", right, wrong, _VALIDATION)


@CASES.add(
    "decrypt.parameters",
    "A parameter of decrypt that is missing or wrong is refused.",
    xks="SPEC",
)
async def decrypt_parameters(probe: Probe) -> None:
    wrong: dict[str, tuple[Any, ...]] = {
        "ciphertext": (None, "%", 7),
        "initializationVector": (None, "%", b64(bytes(11)), b64(bytes(17))),
        "authenticationTag": (None, "%", b64(bytes(15))),
        "encryptionAlgorithm": (None, "", "AES_CBC", 7),
        "additionalAuthenticatedData": ("%", 7),
        "ciphertextMetadata": ("%", 7, b64(bytes(21))),
    }
    right = probe.wire.decrypt_fields(await probe.encrypt(TEXT, AAD), AAD)
    either = Expected((400,), ("ValidationException", "InvalidCiphertextException"))
    await refuse_each(probe, "decrypt", right, wrong, either)


@CASES.add(
    "gcm.metadata",
    "A metadata can never pass for an AAD, nor an AAD for a metadata.",
    xks="MUST",
)
async def metadata_is_no_aad(probe: Probe) -> None:
    made = await probe.encrypt(TEXT, AAD)
    if "ciphertextMetadata" not in made:
        raise Skipped("the proxy's ciphertexts have no metadata")
    metadata = decoded(made, "ciphertextMetadata")
    bare = {name: value for name, value in made.items() if name != "ciphertextMetadata"}
    framed = len(AAD).to_bytes(2, "big") + AAD + bytes([len(metadata)]) + metadata
    longer = b64((AAD[-1:] + metadata)[:_METADATA_SIZE])
    swaps: list[tuple[bytes | None, Fields]] = [
        (AAD + metadata, bare),
        (metadata + AAD, bare),
        (framed, bare),
        (AAD, bare),
        (AAD[:-1], {**made, "ciphertextMetadata": longer}),
        (AAD + metadata, made),
    ]
    for aad, fields in swaps:
        answer = await probe.decrypt(fields, aad)
        probe.refuse(answer, Refused.CIPHERTEXT)


@CASES.add(
    "error.form",
    "An error has errorName, and at most 511 characters of printable ASCII as errorMessage.",
    xks="MUST",
)
async def error_form(probe: Probe) -> None:
    answers = [
        await probe.call("encrypt", probe.subject.key, plaintext="密" * 1000),
        await probe.call("metadata", "k" * 128),
        await probe.call("health", metadata={"kmsOperation": "x" * 1000}),
        await probe.send(probe.request("health")),
    ]
    for answer in answers:
        _, message = probe.wire.code(answer)
        if len(message) > 511 or not all(" " <= letter <= "~" for letter in message):
            raise Unmet(f"an errorMessage of {len(message)} characters, or not of printable ASCII")
