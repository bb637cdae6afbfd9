"""XKI v1 as the suite knows it: docs/protocols/xki.md."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from xkiproxy.conformance import acs4, sigv4
from xkiproxy.conformance.case import Cases
from xkiproxy.conformance.common import AAD, TEXT, decoded, refuse_each, refuse_one
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

_CALLS = ("health", "random", "meta", "encrypt", "decrypt")
_SPECS = {"Aliyun_AES_256", "Aliyun_AES_192", "Aliyun_AES_128", "Aliyun_SM4"}
_UNAUTHORIZED = Expected((401,), ("Unauthorized",))
_METADATA = Expected((400,), ("InvalidRequestMetadata",))


class XkiWire(Wire):
    """Alibaba Cloud KMS external key instances."""

    name = "xki"
    base = "/kms/xki/v1"
    default_region = "cn-hangzhou"
    window = timedelta(minutes=15)
    metadata_name = "RequestMetadata"
    required_metadata = MappingProxyType(dict.fromkeys(_CALLS, ("KmsRequestId", "KmsOperation")))
    meta_call = "meta"
    plaintext_name = "Plaintext"
    iv_name = "Iv"
    algorithms = (acs4.SHA256, acs4.SM3)
    date_header = "x-acs-date"
    needed_headers = ("host", "x-acs-date", "x-acs-signature-nonce", "x-acs-content-sha256")
    largest_plaintext = 6144
    refusals = MappingProxyType(
        {
            Refused.UNSIGNED: _UNAUTHORIZED,
            Refused.MALFORMED: Expected((400, 401), ("InvalidSignature", "Unauthorized")),
            Refused.WRONG: _UNAUTHORIZED,
            Refused.STALE: Expected((400,), ("InvalidAcsDate",)),
            Refused.NO_PATH: Expected((404,), ("XkiNotFound",)),
            Refused.METHOD: Expected((405,), ("MethodNotAllowed",)),
            Refused.NOT_JSON: Expected((400,), ("InvalidRequest",)),
            Refused.NO_METADATA: Expected((400,), ("RequestMetadataRequired",)),
            Refused.METADATA: _METADATA,
            Refused.KEY_ID: Expected(
                (400, 404), ("InvalidExternalKeyId", "XkiNotFound", "KeyNotFound")
            ),
            Refused.NO_KEY: Expected((404,), ("KeyNotFound",)),
            Refused.DISABLED: Expected((403,), ("KeyDisabledForbidden",)),
            Refused.USAGE: Expected((403,), ("KeyUsageForbidden",)),
            Refused.CIPHERTEXT: Expected((400,), ("InvalidCiphertextBlob",)),
            Refused.TOO_LARGE: Expected((413,)),
        }
    )

    def metadata(self, call: str) -> dict[str, str]:
        """See `Wire`."""
        return {
            "KmsRequestId": f"req-{uuid.uuid4()}",
            "KmsOperation": f"kms:{call.capitalize()}",
            "KmsInstanceId": "kst-conformance",
            "KmsKeyArn": "acs:kms:cn-hangzhou:123456789012:key/conformance",
            "PrincipalArn": "acs:kms:cn-hangzhou:123456789012:user/conformance",
            "SourceVpc": "vpc-12345678",
            "SourceIp": "127.0.0.1",
            "KmsViaService": "kms",
        }

    def sign(self, request: Request, signing: Signing) -> Request:
        """See `Wire`."""
        return acs4.sign(request, signing)

    def code(self, answer: Answer) -> tuple[str, str]:
        """See `Wire`."""
        return answer.text("Code"), answer.text("Message")

    def encrypt_fields(self, plaintext: bytes, aad: bytes | None) -> dict[str, Any]:
        """See `Wire`; without an algorithm, which is GCM with the cipher of the key."""
        return {"Plaintext": b64(plaintext)} | _aad(aad)

    def decrypt_fields(self, encrypted: Fields, aad: bytes | None) -> dict[str, Any]:
        """See `Wire`."""
        names = (*self.stored(encrypted), "Algorithm", "PaddingMode")
        return {name: encrypted[name] for name in names if name in encrypted} | _aad(aad)

    def stored(self, encrypted: Fields) -> tuple[str, ...]:
        """See `Wire`."""
        if "CiphertextBlob" not in encrypted:
            raise Unmet("the answer to encrypt has no CiphertextBlob")
        return ("CiphertextBlob", "Iv") if "Iv" in encrypted else ("CiphertextBlob",)


def _aad(aad: bytes | None) -> dict[str, Any]:
    return {} if aad is None else {"Aad": b64(aad)}


# ---- signatures ---------------------------------------------------------------------------------


@CASES.add("signature.replay", "A request is accepted once.", xki="P")
async def replay(probe: Probe) -> None:
    request = probe.wire.sign(probe.request("health"), probe.signing())
    probe.accept(await probe.send(request))
    probe.refuse(await probe.send(request), Refused.WRONG)


@CASES.add("signature.nonce", "A nonce is used once, whatever else the request says.", xki="P")
async def used_nonce(probe: Probe) -> None:
    nonce = probe.signing().nonce
    probe.accept(await probe.sign_and_send(probe.request("health"), nonce=nonce))
    fields = probe.wire.encrypt_fields(TEXT, AAD)
    request = probe.request("encrypt", probe.subject.key, **fields)
    probe.refuse(await probe.sign_and_send(request, nonce=nonce), Refused.WRONG)


@CASES.add("signature.content-hash", "The signed hash of the body is that of the body.", xki="O")
async def content_hash(probe: Probe) -> None:
    for algorithm, header in zip(
        probe.wire.algorithms, ("x-acs-content-sha256", "x-acs-content-sm3"), strict=True
    ):
        request = probe.request(
            "encrypt", probe.subject.key, **probe.wire.encrypt_fields(TEXT, AAD)
        )
        headers = {**request.headers, header: "0" * 64}
        answer = await probe.sign_and_send(replace(request, headers=headers), algorithm=algorithm)
        refuse_one(header, probe, answer, Refused.WRONG)


@CASES.add("signature.foreign", "The signature of another cloud is refused.", xki="P")
async def foreign_signature(probe: Probe) -> None:
    request = probe.request("encrypt", probe.subject.key, **probe.wire.encrypt_fields(TEXT, AAD))
    probe.refuse(await probe.send(sigv4.sign(request, probe.signing())), Expected((400, 401)))


@CASES.add("signature.query", "A query is part of what is signed.", xki="O")
async def query(probe: Probe) -> None:
    request = probe.request("health")
    longer = replace(request, path=f"{request.path}?a=1&b=2")
    probe.accept(await probe.sign_and_send(longer))
    signed = probe.wire.sign(request, probe.signing())
    probe.refuse(await probe.send(replace(signed, path=f"{request.path}?a=1")), Refused.WRONG)


# ---- answers ------------------------------------------------------------------------------------


@CASES.add(
    "answer.headers",
    "Every answer has x-xki-kms-request-id, x-xki-specification and x-xki-server.",
    xki="O",
)
async def answer_headers(probe: Probe) -> str:
    good = await probe.call(
        "health", metadata=probe.wire.metadata("health") | {"KmsRequestId": "req-1"}
    )
    bad = await probe.call("encrypt", await probe.missing_key(), Plaintext="")
    for answer in (good, bad):
        for name in ("x-xki-kms-request-id", "x-xki-specification", "x-xki-server"):
            if name not in answer.headers:
                raise Unmet(f"an answer with status {answer.status} has no {name}")
    if good.headers["x-xki-kms-request-id"] != "req-1":
        raise Unmet("x-xki-kms-request-id is not the KmsRequestId of the request")
    if good.headers["x-xki-specification"] != "1.0.0":
        raise Unmet(f"x-xki-specification is {good.headers['x-xki-specification']}")
    return good.headers["x-xki-server"]


@CASES.add("answer.request-id", "Every body has RequestId, a new UUID.", xki="O")
async def request_ids(probe: Probe) -> None:
    answers = [await probe.call("health") for _ in range(3)]
    answers.append(await probe.send(probe.request("health")))
    found = [answer.text("RequestId") for answer in answers]
    try:
        if len({uuid.UUID(text) for text in found}) < len(found):
            raise Unmet("a RequestId came twice")
    except ValueError:
        raise Unmet("a RequestId is no UUID") from None


@CASES.add("health.fields", "health answers what the proxy is and how it is.", xki="O")
async def health(probe: Probe) -> str:
    answer = probe.accept(await probe.call("health"))
    for name in ("Specification", "ServerName", "ServerVersion", "Vendor", "Message"):
        answer.text(name)
    status = answer.text("Status")
    if status not in {"ACTIVE", "DEGRADED", "UNAVAILABLE"}:
        raise Unmet(f"Status is {status}")
    return status


@CASES.add("meta.fields", "meta answers what the key is.", xki="S")
async def meta(probe: Probe) -> str:
    answer = probe.accept(await probe.call("meta", probe.subject.key))
    wanted = {
        "KeyId": {probe.subject.key},
        "KeySpec": _SPECS,
        "KeyUsage": {"ENCRYPT/DECRYPT"},
        "KeyState": {"ENABLED"},
        "Origin": {"EXTERNAL_KEY_STORE"},
    }
    for name, values in wanted.items():
        if answer.text(name) not in values:
            raise Unmet(f"{name} is {answer.text(name)}")
    try:
        datetime.fromisoformat(answer.text("CreateTime"))
    except ValueError:
        raise Unmet(f"CreateTime is {answer.text('CreateTime')}") from None
    return answer.text("KeySpec")


@CASES.add(
    "encrypt.fields", "encrypt answers the key, the blob, what was used, and the IV.", xki="S"
)
async def encrypt_answer(probe: Probe) -> None:
    made = await probe.encrypt(TEXT)
    if made.get("KeyId") != probe.subject.key:
        raise Unmet(f"KeyId is {made.get('KeyId')}")
    if made.get("Algorithm") not in {"AES_GCM", "SM4_GCM"}:
        raise Unmet(f"Algorithm is {made.get('Algorithm')}; GCM is the default")
    if len(decoded(made, "CiphertextBlob")) < len(TEXT) + 16:
        raise Unmet("the blob is shorter than ciphertext and tag")
    if len(decoded(made, "Iv")) != 12:
        raise Unmet(f"the IV has {len(decoded(made, 'Iv'))} bytes")
    answer = probe.accept(await probe.decrypt(made))
    for name in ("KeyId", "Algorithm"):
        if answer.text(name) != made[name]:
            raise Unmet(f"{name} of decrypt is {answer.text(name)}")


# ---- parameters ---------------------------------------------------------------------------------


@CASES.add("encrypt.iv", "An IV that is given is used.", xki="S")
async def given_iv(probe: Probe) -> None:
    iv = bytes.fromhex(uuid.uuid4().hex)[:12]
    made = await _encrypt_if_it_can(probe, TEXT, AAD, Iv=b64(iv))
    if decoded(made, "Iv") != iv:
        raise Unmet("the answer has another IV")
    if await probe.opened(made, AAD) != TEXT:
        raise Unmet("it came back changed")


@CASES.add(
    "encrypt.parameters", "A parameter of encrypt that is missing or wrong is named.", xki="O"
)
async def encrypt_parameters(probe: Probe) -> None:
    wrong: dict[str, tuple[Any, ...]] = {
        "Plaintext": (None,),
        "Algorithm": ("AES_GCM_SIV", 7, "RSAES_OAEP_SHA_256"),
        "Iv": ("%", 7, b64(bytes(11)), b64(bytes(16))),
        "Aad": ("%", 7),
        "PaddingMode": ("ZERO_PADDING", 7, "PKCS7_PADDING"),
        "externalKeyId": ("another-key",),
    }
    codes = {name: Expected((400,), (f"Invalid{name}",)) for name in wrong}
    codes["Plaintext"] = Expected((400,), ("PlaintextRequired",))
    codes["externalKeyId"] = Expected((400,))
    await refuse_each(probe, "encrypt", probe.wire.encrypt_fields(TEXT, AAD), wrong, codes=codes)


@CASES.add(
    "decrypt.parameters", "A parameter of decrypt that is missing or wrong is named.", xki="O"
)
async def decrypt_parameters(probe: Probe) -> None:
    wrong: dict[str, tuple[Any, ...]] = {
        "CiphertextBlob": (None, "%", 7),
        "Iv": (None, "%", b64(bytes(11))),
        "Algorithm": ("AES_GCM_SIV", 7),
        "Aad": ("%", 7),
        "externalKeyId": ("another-key",),
    }
    codes = {
        name: Expected((400,), (f"Invalid{name}", f"{name}Required"))
        for name in ("CiphertextBlob", "Iv", "Algorithm", "Aad")
    }
    right = probe.wire.decrypt_fields(await probe.encrypt(TEXT, AAD), AAD)
    await refuse_each(probe, "decrypt", right, wrong, Expected((400,)), codes=codes)


@CASES.add("encrypt.key-id", "An externalKeyId that is the path's is accepted.", xki="O")
async def same_key_id(probe: Probe) -> None:
    await probe.encrypt(TEXT, AAD, externalKeyId=probe.subject.key)


@CASES.add("cbc.round-trip", "AES_CBC works, with PKCS7_PADDING by default and without.", xki="S")
async def cbc(probe: Probe) -> None:
    await _require_aes(probe)
    for size, mode in ((1, None), (15, "PKCS7_PADDING"), (16, None), (32, "NO_PADDING")):
        text = bytes(n % 251 for n in range(size))
        more: dict[str, Any] = {"Algorithm": "AES_CBC"} | ({"PaddingMode": mode} if mode else {})
        made = await _encrypt_if_it_can(probe, text, **more)
        if len(decoded(made, "Iv")) != 16:
            raise Unmet(f"the IV has {len(decoded(made, 'Iv'))} bytes")
        if made.get("PaddingMode") != (mode or "PKCS7_PADDING"):
            raise Unmet(f"PaddingMode is {made.get('PaddingMode')}")
        if await probe.opened(made) != text:
            raise Unmet(f"{size} bytes came back changed")


@CASES.add("ecb.round-trip", "AES_ECB works, has no IV, with PKCS7_PADDING by default.", xki="S")
async def ecb(probe: Probe) -> None:
    await _require_aes(probe)
    for size, mode in ((1, None), (16, "PKCS7_PADDING"), (32, "NO_PADDING")):
        text = bytes(n % 251 for n in range(size))
        more: dict[str, Any] = {"Algorithm": "AES_ECB"} | ({"PaddingMode": mode} if mode else {})
        made = await _encrypt_if_it_can(probe, text, **more)
        if "Iv" in made:
            raise Unmet("the answer has an IV")
        if await probe.opened(made) != text:
            raise Unmet(f"{size} bytes came back changed")


@CASES.add("cbc.parameters", "CBC and ECB take no Aad; NO_PADDING wants whole blocks.", xki="S")
async def block_parameters(probe: Probe) -> None:
    await _require_aes(probe)
    for algorithm in ("AES_CBC", "AES_ECB"):
        right = {"Plaintext": b64(bytes(16)), "Algorithm": algorithm}
        await refuse_each(probe, "encrypt", right, {"Aad": (b64(AAD),)})
        unpadded = right | {"PaddingMode": "NO_PADDING"}
        await refuse_each(probe, "encrypt", unpadded, {"Plaintext": (b64(bytes(15)),)})
    ecb_with_iv = {"Plaintext": b64(bytes(16)), "Algorithm": "AES_ECB"}
    await refuse_each(probe, "encrypt", ecb_with_iv, {"Iv": (b64(bytes(16)),)})


@CASES.add(
    "algorithm.other-cipher", "An algorithm of another cipher than the key's is refused.", xki="S"
)
async def other_cipher(probe: Probe) -> None:
    other = "AES_GCM" if await _spec(probe) == "Aliyun_SM4" else "SM4_GCM"
    fields = probe.wire.encrypt_fields(TEXT, None) | {"Algorithm": other}
    answer = await probe.call("encrypt", probe.subject.key, **fields)
    probe.refuse(answer, Expected((400,), ("InvalidAlgorithm", "InvalidOperation")))


# ---- random -------------------------------------------------------------------------------------


@CASES.add("random.length", "random gives the bytes that were asked for, 32 by default.", xki="O")
async def random_length(probe: Probe) -> None:
    for length in (None, 1, 16, 1024):
        fields = {} if length is None else {"Length": length}
        answer = probe.accept(await probe.call("random", **fields))
        if answer.text("OutputForm") != "PLAIN":
            raise Unmet(f"OutputForm is {answer.text('OutputForm')}")
        if len(answer.data("Output")) != (length or 32):
            raise Unmet(f"Length {length or 'absent'} gave {len(answer.data('Output'))} bytes")


@CASES.add("random.new", "No two draws are the same.", xki="O")
async def random_is_new(probe: Probe) -> None:
    drawn = {probe.accept(await probe.call("random")).data("Output") for _ in range(32)}
    if len(drawn) < 32:
        raise Unmet(f"32 draws gave {len(drawn)} values")


@CASES.add("random.none", "OutputForm NONE returns no bytes.", xki="O")
async def random_none(probe: Probe) -> None:
    answer = probe.accept(await probe.call("random", OutputForm="NONE"))
    if answer.fields.get("Output"):
        raise Unmet("Output is there")


@CASES.add(
    "random.wrapped", "Random bytes can be wrapped under RSA-OAEP with SHA-1 and SHA-256.", xki="O"
)
async def random_wrapped(probe: Probe) -> None:
    key = rsa.generate_private_key(65537, 2048)
    digests: dict[str, tuple[hashes.HashAlgorithm, int]] = {
        "RSAES_OAEP_SHA1": (hashes.SHA1(), 214),  # noqa: S303 - what KMS asks for
        "RSAES_OAEP_SHA256": (hashes.SHA256(), 190),
    }
    for algorithm, (digest, most) in digests.items():
        fields = _wrapping(key, algorithm)
        for length in (32, most):
            answer = probe.accept(await probe.call("random", Length=length, **fields))
            scheme = padding.OAEP(padding.MGF1(digest), digest, None)
            try:
                drawn = key.decrypt(answer.data("Output"), scheme)
            except ValueError:
                raise Unmet(f"{algorithm}: Output does not unwrap") from None
            if len(drawn) != length:
                raise Unmet(f"{algorithm}: {len(drawn)} bytes instead of {length}")
        answer = await probe.call("random", Length=most + 1, **fields)
        refuse_one(f"{algorithm} of {most + 1} bytes", probe, answer, Expected((400,)))


@CASES.add("random.parameters", "A parameter of random that is missing or wrong is named.", xki="O")
async def random_parameters(probe: Probe) -> None:
    wrong: dict[str, tuple[Any, ...]] = {
        "Length": (0, -1, 1025, "32", 1.5, True),
        "OutputForm": ("HEX", 7),
    }
    codes = {name: Expected((400,), (f"Invalid{name}",)) for name in wrong}
    await refuse_each(probe, "random", {}, wrong, codes=codes)
    right = _wrapping(rsa.generate_private_key(65537, 2048), "RSAES_OAEP_SHA256")
    small = rsa.generate_private_key(65537, 1024)  # noqa: S505 - it must be refused
    wrong = {
        "PublicKeyBlob": (None, "%", b64(b"nonsense"), _public(small)),
        "WrappingKeySpec": (None, "RSA_1024"),
        "WrappingAlgorithm": (None, "RSAES_PKCS1_V1_5", "SM2PKE"),
    }
    codes = {n: Expected((400,), (f"Invalid{n}", f"{n}Required")) for n in wrong}
    await refuse_each(probe, "random", right, wrong, codes=codes)


def _wrapping(key: rsa.RSAPrivateKey, algorithm: str) -> dict[str, Any]:
    return {
        "OutputForm": "PUBLIC_KEY_WRAPPED",
        "PublicKeyBlob": _public(key),
        "WrappingKeySpec": "RSA_2048",
        "WrappingAlgorithm": algorithm,
    }


def _public(key: rsa.RSAPrivateKey) -> str:
    form = PublicFormat.SubjectPublicKeyInfo
    return b64(key.public_key().public_bytes(Encoding.DER, form))


async def _spec(probe: Probe) -> str:
    if "spec" not in probe.remembered:
        answer = probe.accept(await probe.call("meta", probe.subject.key))
        probe.remembered["spec"] = answer.text("KeySpec")
    return str(probe.remembered["spec"])


async def _encrypt_if_it_can(
    probe: Probe, text: bytes, aad: bytes | None = None, **more: str
) -> Fields:
    """What a successful encrypt answers; some key managers cannot do all that XKI has."""
    fields = probe.wire.encrypt_fields(text, aad) | more
    answer = await probe.call("encrypt", probe.subject.key, **fields)
    if answer.status == 400:
        code, message = probe.wire.code(answer)
        if code == "InvalidOperation":
            raise Skipped(f"the key manager cannot do it: {message}")
    return probe.accept(answer).fields


async def _require_aes(probe: Probe) -> None:
    if await _spec(probe) == "Aliyun_SM4":
        raise Skipped("the key is an SM4 key")
