"""The messages of XKI: every wire name stands here, in the order of docs/protocols/xki.md.

Decoding refuses what is wrong and ignores what is unknown, so that the cloud can add fields.
A JSON null is an absent field. Encoding is the reverse, with no field that the page does not have.
"""

from __future__ import annotations

from datetime import UTC, datetime

from xkiproxy.crypto import envelope
from xkiproxy.crypto.algorithms import Algorithm, KeySpec, Padding
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Encrypt,
    Encrypted,
    KeyDescription,
    OutputForm,
    Random,
    RandomBytes,
    invalid_ciphertext,
)
from xkiproxy.crypto.wrapping import (
    Wrapping,
    WrappingAlgorithm,
    WrappingKeySpec,
    WrappingLengthError,
    check_wrapping,
    load_public_key,
)
from xkiproxy.protocols.base import Caller, Fields, Refusal
from xkiproxy.protocols.json_fields import base64, binary, choice, parse_object
from xkiproxy.protocols.xki.errors import invalid, required

MAX_RANDOM_SIZE = 1024
DEFAULT_RANDOM_SIZE = 32

_CALLER_FIELDS = {
    "KmsRequestId": "request_id",
    "KmsOperation": "operation",
    "KmsInstanceId": "instance",
    "KmsKeyArn": "key_arn",
    "PrincipalArn": "principal",
    "SourceVpc": "source_vpc",
    "SourceIp": "source_ip",
    "KmsViaService": "via_service",
}
_CALLER_REQUIRED = ("KmsRequestId", "KmsOperation")

_KEY_SPECS = {
    KeySpec.AES_256: "Aliyun_AES_256",
    KeySpec.AES_192: "Aliyun_AES_192",
    KeySpec.AES_128: "Aliyun_AES_128",
    KeySpec.SM4: "Aliyun_SM4",
}


def parse_body(body: bytes) -> Fields:
    """A JSON object; raises Refusal `InvalidRequest`."""
    fields = parse_object(body)
    if fields is None:
        raise Refusal(400, "InvalidRequest", "The body is not a JSON object in UTF-8.")
    return fields


def decode_caller(fields: Fields) -> Caller:
    """`RequestMetadata`: an object of strings; raises Refusal."""
    metadata = fields.get("RequestMetadata")
    if metadata is None:
        raise required("RequestMetadata")
    if not isinstance(metadata, dict):
        raise _invalid_metadata("must be an object")
    values = {}
    for wire_name, name in _CALLER_FIELDS.items():
        value = metadata.get(wire_name)
        if value is None:
            if wire_name in _CALLER_REQUIRED:
                raise _invalid_metadata(f"{wire_name} is required")
            continue
        if not isinstance(value, str):
            raise _invalid_metadata(f"{wire_name} must be a string")
        values[name] = value
    return Caller(**values)


def decode_encrypt(key_id: str, fields: Fields, form: CiphertextFormat) -> Encrypt:
    """An encrypt request; raises Refusal."""
    _check_external_key_id(key_id, fields)
    plaintext = binary(fields, "Plaintext", invalid)
    if plaintext is None:
        raise required("Plaintext")
    return Encrypt(
        key_id=key_id,
        plaintext=plaintext,
        algorithm=choice(fields, "Algorithm", Algorithm, invalid),
        padding=choice(fields, "PaddingMode", Padding, invalid),
        iv=binary(fields, "Iv", invalid),
        aad=_aad(fields),
        format=form,
    )


def decode_decrypt(key_id: str, fields: Fields, form: CiphertextFormat) -> Decrypt:
    """A decrypt request; raises Refusal, or OperationError for a blob that is no envelope."""
    _check_external_key_id(key_id, fields)
    blob = binary(fields, "CiphertextBlob", invalid)
    if blob is None:
        raise required("CiphertextBlob")
    algorithm = choice(fields, "Algorithm", Algorithm, invalid)
    iv = binary(fields, "Iv", invalid)
    if iv is None and algorithm is not Algorithm.AES_ECB:
        raise required("Iv")
    version = None
    if form is CiphertextFormat.ENVELOPE:
        if len(blob) < envelope.METADATA_SIZE:
            raise invalid_ciphertext()
        version = envelope.key_version(blob[: envelope.METADATA_SIZE])
        blob = blob[envelope.METADATA_SIZE :]
    return Decrypt(
        key_id=key_id,
        ciphertext=blob,
        iv=iv or b"",
        version=version,
        algorithm=algorithm,
        padding=choice(fields, "PaddingMode", Padding, invalid),
        aad=_aad(fields),
        format=form,
    )


def decode_random(fields: Fields) -> Random:
    """A random request; raises Refusal."""
    length = fields.get("Length")
    if length is None:
        length = DEFAULT_RANDOM_SIZE
    if type(length) is not int or not 1 <= length <= MAX_RANDOM_SIZE:
        raise invalid("Length", f"must be a whole number from 1 to {MAX_RANDOM_SIZE}")
    output = choice(fields, "OutputForm", OutputForm, invalid) or OutputForm.PLAIN
    if output is OutputForm.PUBLIC_KEY_WRAPPED:
        return Random(length, output, _decode_wrapping(fields, length))
    return Random(length, output)


def _decode_wrapping(fields: Fields, length: int) -> Wrapping:
    der = binary(fields, "PublicKeyBlob", invalid)
    if der is None:
        raise required("PublicKeyBlob")
    spec = choice(fields, "WrappingKeySpec", WrappingKeySpec, invalid)
    if spec is None:
        raise required("WrappingKeySpec")
    algorithm = choice(fields, "WrappingAlgorithm", WrappingAlgorithm, invalid)
    if algorithm is None:
        raise required("WrappingAlgorithm")
    try:
        check_wrapping(spec, algorithm, length)
    except WrappingLengthError as error:
        raise invalid("Length", str(error)) from None
    except ValueError as error:
        raise invalid("WrappingAlgorithm", str(error)) from None
    try:
        load_public_key(der, spec)
    except ValueError as error:
        raise invalid("PublicKeyBlob", str(error)) from None
    return Wrapping(algorithm, der)


def encode_encrypted(result: Encrypted, key_id: str, form: CiphertextFormat) -> Fields:
    """The answer to encrypt: `metadata || ciphertext || tag` in one blob."""
    blob = result.ciphertext
    if form is CiphertextFormat.ENVELOPE:
        blob = envelope.metadata(result.version) + blob
    fields = {"KeyId": key_id, "CiphertextBlob": base64(blob), "Algorithm": result.algorithm}
    if result.iv:
        fields["Iv"] = base64(result.iv)
    if result.padding is not None:
        fields["PaddingMode"] = result.padding
    return fields


def encode_decrypted(result: Decrypted, key_id: str) -> Fields:
    """The answer to decrypt."""
    fields = {
        "KeyId": key_id,
        "Plaintext": base64(result.plaintext),
        "Algorithm": result.algorithm,
    }
    if result.padding is not None:
        fields["PaddingMode"] = result.padding
    return fields


def encode_random(result: RandomBytes, output: OutputForm) -> Fields:
    """The answer to random: nothing but the form, where no bytes were asked for."""
    if output is OutputForm.NONE:
        return {"OutputForm": output}
    return {"OutputForm": output, "Output": base64(result.data)}


def encode_description(result: KeyDescription) -> Fields:
    """The answer to meta."""
    return {
        "KeyId": result.key_id,
        "KeySpec": _KEY_SPECS[result.spec],
        "KeyUsage": "ENCRYPT/DECRYPT",
        "KeyState": result.state,
        "Origin": "EXTERNAL_KEY_STORE",
        "CreateTime": datetime.fromtimestamp(result.created or 0, UTC).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        ),
    }


def _check_external_key_id(key_id: str, fields: Fields) -> None:
    other = fields.get("externalKeyId")
    if other is not None and other != key_id:
        raise invalid("ExternalKeyId", "externalKeyId is not the key of the path")


def _aad(fields: Fields) -> bytes:
    aad = binary(fields, "Aad", invalid) or b""
    if len(aad) > envelope.MAX_AAD_SIZE:
        raise invalid("Aad", f"must be at most {envelope.MAX_AAD_SIZE} bytes")
    return aad


def _invalid_metadata(why: str) -> Refusal:
    return Refusal(400, "InvalidRequestMetadata", f"RequestMetadata: {why}.")
