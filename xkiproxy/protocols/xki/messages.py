"""The messages of XKI: every wire name stands here, in the order of docs/protocols/xki.md.

Decoding refuses what is wrong and ignores what is unknown, so that the cloud can add fields.
A JSON null is an absent field. Encoding is the reverse, with no field that the page does not have.
"""

from __future__ import annotations

from datetime import UTC, datetime

from xkiproxy.crypto import envelope
from xkiproxy.crypto.algorithms import Algorithm, KeySpec, Padding
from xkiproxy.crypto.caller import Caller
from xkiproxy.crypto.operations import (
    Availability,
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Encrypt,
    Encrypted,
    KeyDescription,
    KeyState,
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
from xkiproxy.protocols.base import Fields, Refusal
from xkiproxy.protocols.fields import (
    Binary,
    Choice,
    Field,
    Group,
    Text,
    Whole,
    base64,
    caller_reader,
    parse_object,
)
from xkiproxy.protocols.xki import errors
from xkiproxy.protocols.xki.errors import invalid, required

_KEY_SPECS = {
    KeySpec.AES_256: "Aliyun_AES_256",
    KeySpec.AES_192: "Aliyun_AES_192",
    KeySpec.AES_128: "Aliyun_AES_128",
    KeySpec.SM4: "Aliyun_SM4",
}
_KEY_USAGE = "ENCRYPT/DECRYPT"
_ORIGIN = "EXTERNAL_KEY_STORE"

# ---- requests -----------------------------------------------------------------------------------

_CALLER = {
    Text("KmsRequestId", "The cloud's own ID of the request: opaque.", True): "request_id",
    Text("KmsOperation", "What was asked of the cloud, such as kms:Encrypt.", True): "operation",
    Text("KmsInstanceId", "The KMS instance."): "instance",
    Text("KmsKeyArn", "The KMS key."): "key_arn",
    Text("PrincipalArn", "Who asked the cloud."): "principal",
    Text("SourceVpc", "From which VPC."): "source_vpc",
    Text("SourceIp", "From which address."): "source_ip",
    Text("KmsViaService", "Through which service of the cloud."): "via_service",
}
_CALLER_REQUIRED = frozenset(field.name for field in _CALLER if field.required)
_read_caller = caller_reader({field.name: name for field, name in _CALLER.items()})
REQUEST_METADATA = Group(
    "RequestMetadata", "What the cloud says of the request.", (*_CALLER,), True
)

_PLAINTEXT = Binary("Plaintext", "What to encrypt.", required=True)
_BLOB = Binary("CiphertextBlob", "What encrypt gave out.", required=True)
_ALGORITHM = Choice("Algorithm", "Default: GCM, with the cipher of the key.", Algorithm)
_AAD = Binary("Aad", "Additional authenticated data, for GCM.", max_size=envelope.MAX_AAD_SIZE)
_IV = Binary("Iv", "12 bytes for GCM, 16 for CBC, absent for ECB.")
_PADDING = Choice("PaddingMode", "For CBC and ECB; default: PKCS7_PADDING.", Padding)
_EXTERNAL_KEY_ID = Text("externalKeyId", "If it is there, the key of the path.")
_LENGTH = Whole("Length", "How many bytes.", 1, 1024, 32)
_OUTPUT_FORM = Choice("OutputForm", "Default: PLAIN.", OutputForm)
_PUBLIC_KEY = Binary("PublicKeyBlob", "A SubjectPublicKeyInfo in DER, for PUBLIC_KEY_WRAPPED.")
_WRAPPING_SPEC = Choice("WrappingKeySpec", "For PUBLIC_KEY_WRAPPED.", WrappingKeySpec)
_WRAPPING = Choice("WrappingAlgorithm", "For PUBLIC_KEY_WRAPPED.", WrappingAlgorithm)

REQUESTS: dict[str, tuple[Field, ...]] = {
    "health": (),
    "random": (_LENGTH, _OUTPUT_FORM, _PUBLIC_KEY, _WRAPPING_SPEC, _WRAPPING),
    "meta": (),
    "encrypt": (_PLAINTEXT, _ALGORITHM, _AAD, _IV, _PADDING, _EXTERNAL_KEY_ID),
    "decrypt": (_BLOB, _ALGORITHM, _AAD, _IV, _PADDING, _EXTERNAL_KEY_ID),
}
"""The parameters of each call; every body has REQUEST_METADATA beside them."""

# ---- answers ------------------------------------------------------------------------------------

_KEY_ID = Text("KeyId", "The external key.", True)
_USED_ALGORITHM = Choice("Algorithm", "What was used.", Algorithm, required=True)
_USED_PADDING = Choice("PaddingMode", "What was used; for CBC and ECB.", Padding)

ANSWERS: dict[str, tuple[Field, ...]] = {
    "health": (
        Text("Specification", "The version of the protocol.", True),
        Text("ServerName", "The name of the proxy.", True),
        Text("ServerVersion", "Its version.", True),
        Text("Vendor", "Who made it.", True),
        Choice("Status", "How the key store is.", Availability, required=True),
        Text("Message", "In words.", True),
    ),
    "random": (
        Choice("OutputForm", "In what form.", OutputForm, required=True),
        Binary("Output", "The bytes, or what wraps them; absent for NONE."),
    ),
    "meta": (
        _KEY_ID,
        Text("KeySpec", "Type and size.", True, tuple(_KEY_SPECS.values())),
        Text("KeyUsage", "What it is for.", True, (_KEY_USAGE,)),
        Choice("KeyState", "Its state at the proxy.", KeyState, required=True),
        Text("Origin", "Where it is.", True, (_ORIGIN,)),
        Text("CreateTime", "When it was made or registered, RFC 3339.", True),
    ),
    "encrypt": (
        _KEY_ID,
        Binary("CiphertextBlob", "Metadata, ciphertext and tag.", required=True),
        Binary("Iv", "What was used; absent for ECB."),
        _USED_ALGORITHM,
        _USED_PADDING,
    ),
    "decrypt": (
        _KEY_ID,
        Binary("Plaintext", "What was encrypted.", required=True),
        _USED_ALGORITHM,
        _USED_PADDING,
    ),
}
"""The fields of each answer; every body has REQUEST_ID beside them."""

REQUEST_ID = Text("RequestId", "The proxy's ID of the request, a UUID.", True)
ERROR: tuple[Field, ...] = (
    REQUEST_ID,
    Text("Code", "What is wrong.", True),
    Text("Message", "In words.", True),
)


def request_fields(call: str) -> tuple[Field, ...]:
    """All fields of a request."""
    return (REQUEST_METADATA, *REQUESTS[call])


def answer_fields(call: str) -> tuple[Field, ...]:
    """All fields of a good answer."""
    return (REQUEST_ID, *ANSWERS[call])


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
    if metadata.keys() >= _CALLER_REQUIRED:
        caller = _read_caller(metadata)
        if caller is not None:
            return caller
    values = {}
    for field, name in _CALLER.items():
        value = metadata.get(field.name)
        if value is None:
            if field.required:
                raise _invalid_metadata(f"{field.name} is required")
            continue
        if not isinstance(value, str):
            raise _invalid_metadata(f"{field.name} must be a string")
        values[name] = value
    return Caller(**values)


def decode_encrypt(key_id: str, fields: Fields, form: CiphertextFormat) -> Encrypt:
    """An encrypt request; raises Refusal."""
    _check_external_key_id(key_id, fields)
    return Encrypt(
        key_id=key_id,
        plaintext=_PLAINTEXT.require(fields, errors),
        algorithm=_ALGORITHM.read(fields, errors),
        padding=_PADDING.read(fields, errors),
        iv=_IV.read(fields, errors),
        aad=_AAD.read(fields, errors) or b"",
        format=form,
    )


def decode_decrypt(key_id: str, fields: Fields, form: CiphertextFormat) -> Decrypt:
    """A decrypt request; raises Refusal, or OperationError for a blob that is no envelope."""
    _check_external_key_id(key_id, fields)
    blob = _BLOB.require(fields, errors)
    algorithm = _ALGORITHM.read(fields, errors)
    iv = _IV.read(fields, errors)
    if iv is None and algorithm is not Algorithm.AES_ECB:
        raise required(_IV.name)
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
        padding=_PADDING.read(fields, errors),
        aad=_AAD.read(fields, errors) or b"",
        format=form,
    )


def decode_random(fields: Fields) -> Random:
    """A random request; raises Refusal."""
    length = _LENGTH.read(fields, errors)
    output = _OUTPUT_FORM.read(fields, errors) or OutputForm.PLAIN
    if output is OutputForm.PUBLIC_KEY_WRAPPED:
        return Random(length, output, _decode_wrapping(fields, length))
    return Random(length, output)


def _decode_wrapping(fields: Fields, length: int) -> Wrapping:
    der = _PUBLIC_KEY.require(fields, errors)
    spec = _WRAPPING_SPEC.require(fields, errors)
    algorithm = _WRAPPING.require(fields, errors)
    try:
        check_wrapping(spec, algorithm, length)
    except WrappingLengthError as error:
        raise invalid(_LENGTH.name, str(error)) from None
    except ValueError as error:
        raise invalid(_WRAPPING.name, str(error)) from None
    try:
        load_public_key(der, spec)
    except ValueError as error:
        raise invalid(_PUBLIC_KEY.name, str(error)) from None
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
        "KeyUsage": _KEY_USAGE,
        "KeyState": result.state,
        "Origin": _ORIGIN,
        "CreateTime": datetime.fromtimestamp(result.created or 0, UTC).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        ),
    }


def _check_external_key_id(key_id: str, fields: Fields) -> None:
    other = fields.get("externalKeyId")
    if other is not None and other != key_id:
        raise invalid("ExternalKeyId", "externalKeyId is not the key of the path")


def _invalid_metadata(why: str) -> Refusal:
    return Refusal(400, "InvalidRequestMetadata", f"RequestMetadata: {why}.")
