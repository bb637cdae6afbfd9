"""What both protocols demand: connections, signatures, metadata, authenticated encryption."""

from __future__ import annotations

import asyncio
import binascii
import ssl
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from yarl import URL

from xkiproxy.conformance.case import Cases
from xkiproxy.conformance.probe import Probe
from xkiproxy.conformance.wire import (
    Answer,
    Credential,
    Expected,
    Fields,
    Refused,
    Request,
    Skipped,
    Unmet,
    b64,
)

CASES = Cases()
case = CASES.add

TEXT = b"a text of the conformance suite"
AAD = b"project=nile,department=marketing"

_TLS_1_2_SUITES = "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES256-GCM-SHA384"

# ---- connections --------------------------------------------------------------------------------


@case(
    "transport.tls-1.2",
    "TLS 1.2 with ECDHE-RSA-AES256-GCM-SHA384 or ECDHE-ECDSA-AES256-GCM-SHA384 is spoken.",
    xki="O",
)
async def tls_1_2(probe: Probe) -> str:
    context = _tls(probe)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_TLS_1_2_SUITES)
    return await _handshake(probe, context)


@case(
    "transport.tls-1.3",
    "TLS 1.3 is spoken, with TLS_AES_256_GCM_SHA384.",
    xki="O",
)
async def tls_1_3(probe: Probe) -> str:
    context = _tls(probe)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    agreed = await _handshake(probe, context)
    if "TLS_AES_256_GCM_SHA384" not in agreed:
        raise Unmet(f"agreed on {agreed}")
    return agreed


@case(
    "transport.tls",
    "TLS 1.2 or later with one of the demanded suites is spoken.",
    xks="MUST",
)
async def tls_suites(probe: Probe) -> str:
    context = _tls(probe)
    context.set_ciphers(_TLS_1_2_SUITES)
    agreed = await _handshake(probe, context)
    demanded = {
        "TLS_AES_256_GCM_SHA384",
        "TLS_CHACHA20_POLY1305_SHA256",
        *_TLS_1_2_SUITES.split(":"),
    }
    if agreed.split()[1] not in demanded:
        raise Unmet(f"agreed on {agreed}")
    return agreed


@case("transport.old-tls", "TLS 1.1 and older is refused.", xki="O", xks="MUST")
async def old_tls(probe: Probe) -> None:
    context = _tls(probe)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):  # that they are old is the point
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    try:
        agreed = await _handshake(probe, context)
    except Unmet:
        return
    raise Unmet(f"agreed on {agreed}")


@case(
    "transport.client-certificate",
    "Where mutual TLS is configured, a client without a certificate gets no answer.",
    xki="P",
    xks="SHOULD",
)
async def no_client_certificate(probe: Probe) -> None:
    if not probe.subject.client_certificate or probe.subject.tls is None:
        raise Skipped("give --client-certificate, for a proxy with mutual TLS")
    try:
        answer = await _raw(probe, b"POST / HTTP/1.1\r\nhost: x\r\n\r\n", probe.subject.tls(False))
    except (OSError, asyncio.IncompleteReadError):
        return
    if answer:
        raise Unmet("the request was answered")


@case(
    "transport.keep-alive", "A connection serves one request after the other.", xki="O", xks="SPEC"
)
async def keep_alive(probe: Probe) -> None:
    context = None if probe.subject.tls is None else _tls(probe)
    one, two = (_bytes(_signed(probe, "health")) for _ in range(2))
    answer = await _raw(probe, one + two, context, answers=2)
    if answer.count(b"HTTP/1.1 200") != 2:
        raise Unmet("two requests on one connection did not get two answers with status 200")


@case("transport.get", "A GET is refused with 405.", xki="O", xks="SPEC")
async def get(probe: Probe) -> None:
    request = replace(probe.request("health"), method="GET", body=b"")
    probe.refuse(await probe.sign_and_send(request), Refused.METHOD)


@case("transport.path", "A path that there is not is refused with 404.", xki="O", xks="SPEC")
async def unknown_path(probe: Probe) -> None:
    for call, key in (("no-such-call", ""), ("no-such-call", probe.subject.key)):
        path = probe.path(call, key)
        request = replace(probe.request("health"), path=path)
        probe.refuse(await probe.sign_and_send(request), Refused.NO_PATH)


@case("transport.charset", "A charset parameter may follow the content type.", xki="O", xks="SPEC")
async def charset(probe: Probe) -> None:
    request = probe.request("health")
    headers = {**request.headers, "content-type": "application/json; charset=utf-8"}
    probe.accept(await probe.sign_and_send(replace(request, headers=headers)))


@case(
    "transport.large-body",
    "A body over the limit is refused, and the proxy goes on.",
    xki="P",
    xks="SPEC",
)
async def large_body(probe: Probe) -> None:
    request = probe.request("encrypt", probe.subject.key, body=b" " * (4 << 20))
    try:
        answer = await probe.sign_and_send(request)
    except Unmet:
        answer = None  # the connection ended while the body was still being sent
    if answer is not None:
        probe.refuse(answer, Refused.TOO_LARGE)
    probe.accept(await probe.call("health"))


# ---- signatures ---------------------------------------------------------------------------------


@case("signature.right", "A right signature is accepted.", xki="O", xks="MUST")
async def right_signature(probe: Probe) -> None:
    for algorithm in probe.wire.algorithms:
        request = probe.request("encrypt", probe.subject.key, **_encrypt_fields(probe))
        probe.accept(await probe.sign_and_send(request, algorithm=algorithm))


@case(
    "signature.rotation",
    "Two credentials are accepted at the same time.",
    xki="P",
    xks="SHOULD",
)
async def two_credentials(probe: Probe) -> None:
    if len(probe.subject.credentials) < 2:
        raise Skipped("give a credentials file with two credentials")
    for credential in probe.subject.credentials:
        probe.accept(await probe.sign_and_send(probe.request("health"), credential=credential))


@case("signature.other-headers", "Any other header may be signed as well.", xki="O", xks="MUST")
async def other_headers(probe: Probe) -> None:
    prefix = "x-acs" if probe.wire.date_header.startswith("x-acs") else "x-amz"
    request = probe.request("health")
    more = {f"{prefix}-conformance": "a  value  with spaces", f"{prefix}-z": "1"}
    probe.accept(await probe.sign_and_send(replace(request, headers={**request.headers, **more})))


@case("signature.none", "A request without a signature is refused with 401.", xki="O", xks="MUST")
async def no_signature(probe: Probe) -> None:
    signed = _signed(probe, "encrypt")
    headers = {name: text for name, text in signed.headers.items() if name != "authorization"}
    probe.refuse(await probe.send(replace(signed, headers=headers)), Refused.UNSIGNED)


@case("signature.malformed", "A signature that cannot be parsed is refused.", xki="O", xks="MUST")
async def malformed_signature(probe: Probe) -> None:
    right = _signed(probe, "encrypt").headers["authorization"]
    for value in ("nonsense", right.split()[0], right.replace("Signature=", ""), right[:40]):
        request = _signed(probe, "encrypt")
        headers = {**request.headers, "authorization": value}
        probe.refuse(await probe.send(replace(request, headers=headers)), Refused.MALFORMED)


@case("signature.wrong", "A signature with any digit changed is refused.", xki="O", xks="MUST")
async def wrong_signature(probe: Probe) -> None:
    for position in range(1, 65):
        request = _signed(probe, "encrypt")
        value = request.headers["authorization"]
        at = len(value) - position
        changed = value[:at] + ("0" if value[at] != "0" else "1") + value[at + 1 :]
        headers = {**request.headers, "authorization": changed}
        probe.refuse(await probe.send(replace(request, headers=headers)), Refused.WRONG)


@case("signature.secret", "A signature under another secret is refused.", xki="O", xks="MUST")
async def wrong_secret(probe: Probe) -> None:
    probe.refuse(await _with_credential(probe, secret="A" * 43), Refused.WRONG)


@case(
    "signature.stranger",
    "An unknown access key is refused in the words of a wrong signature.",
    xki="P",
    xks="MUST",
)
async def unknown_access_key(probe: Probe) -> None:
    stranger = await _with_credential(probe, access_key_id="A" * 24, secret="A" * 43)
    probe.refuse(stranger, Refused.WRONG)
    known = await _with_credential(probe, secret="A" * 43)
    if probe.wire.code(stranger) != probe.wire.code(known):
        raise Unmet("the answers to an unknown access key and to a wrong signature differ")


@case("signature.body", "A body that is not the signed one is refused.", xki="O", xks="MUST")
async def changed_body(probe: Probe) -> None:
    signed = _signed(probe, "encrypt")
    probe.refuse(await probe.send(replace(signed, body=signed.body + b" ")), Refused.WRONG)


@case("signature.path", "A signature for another path is refused.", xki="O", xks="MUST")
async def changed_path(probe: Probe) -> None:
    signed = probe.wire.sign(
        probe.request(probe.wire.meta_call, probe.subject.key), probe.signing()
    )
    path = probe.path("encrypt", probe.subject.key)
    probe.refuse(await probe.send(replace(signed, path=path)), Refused.WRONG)


@case("signature.header", "A signed header that was changed is refused.", xki="O", xks="MUST")
async def changed_header(probe: Probe) -> None:
    signed = _signed(probe, "encrypt")
    headers = {**signed.headers, "content-type": "text/plain"}
    probe.refuse(await probe.send(replace(signed, headers=headers)), Refused.WRONG)


@case(
    "signature.coverage",
    "A signature that leaves out a header that must be signed is refused.",
    xki="P",
    xks="MUST",
)
async def uncovered_headers(probe: Probe) -> None:
    for name in probe.wire.needed_headers:
        request = probe.request("encrypt", probe.subject.key, **_encrypt_fields(probe))
        answer = await probe.sign_and_send(request, unsigned=frozenset({name}))
        refuse_one(f"without {name}", probe, answer, Refused.WRONG)


@case(
    "signature.scope",
    "A signature for another service, terminator or day than its date's is refused.",
    xki="O",
    xks="MUST",
)
async def wrong_scope(probe: Probe) -> None:
    yesterday = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y%m%d")
    for change in ({"service": "ecs"}, {"terminator": "request"}, {"scope_date": yesterday}):
        request = probe.request("encrypt", probe.subject.key, **_encrypt_fields(probe))
        answer = await probe.sign_and_send(request, **change)
        expected = Expected((400, 401))
        refuse_one(f"another {', '.join(change)}", probe, answer, expected)


@case("signature.stale", "A request from outside of the window is refused.", xki="O", xks="SHOULD")
async def stale(probe: Probe) -> None:
    for sign, word in ((-1, "late"), (1, "early")):
        off = probe.wire.window + timedelta(minutes=1)
        request = probe.request("encrypt", probe.subject.key, **_encrypt_fields(probe))
        answer = await probe.sign_and_send(request, when=datetime.now(UTC) + sign * off)
        refuse_one(f"{off.seconds // 60} minutes {word}", probe, answer, Refused.STALE)


@case("signature.window", "A request from within the window is accepted.", xki="O", xks="SHOULD")
async def within_window(probe: Probe) -> None:
    for sign in (-1, 1):
        off = probe.wire.window - timedelta(minutes=1)
        when = datetime.now(UTC) + sign * off
        probe.accept(await probe.sign_and_send(probe.request("health"), when=when))


@case("signature.date", "A date that is no date, or missing, is refused.", xki="O", xks="MUST")
async def no_date(probe: Probe) -> None:
    for date in ("yesterday", "20260231T000000Z", ""):
        answer = await probe.sign_and_send(probe.request("health"), date=date)
        refuse_one(f"date {date!r}", probe, answer, Refused.STALE)
    signed = _signed(probe, "health")
    headers = {n: text for n, text in signed.headers.items() if n != probe.wire.date_header}
    refuse_one("no date", probe, await probe.send(replace(signed, headers=headers)), Refused.STALE)


# ---- request metadata ---------------------------------------------------------------------------


@case("metadata.missing", "A request without its metadata is refused.", xki="O", xks="SPEC")
async def no_metadata(probe: Probe) -> None:
    answer = await probe.call("health", body=b"{}")
    probe.refuse(answer, Refused.NO_METADATA)


@case(
    "metadata.required", "A required field of the metadata may not be missing.", xki="O", xks="SPEC"
)
async def required_metadata(probe: Probe) -> None:
    for call, names in probe.wire.required_metadata.items():
        key = "" if call in {"health", "random"} else probe.subject.key
        encrypted = await _encrypted(probe) if call == "decrypt" else {}
        fields = _call_fields(probe, call, encrypted)
        for name in names:
            metadata = probe.wire.metadata(call)
            del metadata[name]
            answer = await probe.call(call, key, metadata=metadata, **fields)
            refuse_one(f"{call} without {name}", probe, answer, Refused.METADATA)


@case("metadata.type", "Metadata is an object of strings.", xki="O", xks="SPEC")
async def metadata_types(probe: Probe) -> None:
    name = probe.wire.required_metadata["health"][0]
    for value in (7, ["x"], {"x": "y"}, True):
        metadata = probe.wire.metadata("health") | {name: value}
        answer = await probe.call("health", metadata=metadata)
        refuse_one(f"{name} of another type", probe, answer, Refused.METADATA)
    answer = await probe.call("health", metadata=["x"])
    refuse_one("a list", probe, answer, Refused.METADATA)


@case(
    "metadata.unknown-operation",
    "An operation of KMS that is not known is accepted.",
    xki="O",
    xks="MUST",
)
async def unknown_operation(probe: Probe) -> None:
    (name,) = (n for n in probe.wire.required_metadata["health"] if n.lower() == "kmsoperation")
    metadata = probe.wire.metadata("encrypt") | {name: "kms:AnOperationOfTheFuture"}
    fields = _encrypt_fields(probe)
    probe.accept(await probe.call("encrypt", probe.subject.key, metadata=metadata, **fields))


@case("metadata.opaque-id", "The request ID of KMS is opaque.", xki="O", xks="MUST")
async def opaque_request_id(probe: Probe) -> None:
    (name,) = (n for n in probe.wire.required_metadata["health"] if n.lower() == "kmsrequestid")
    for value in ("x", "not a UUID", "密钥管理", "<>\"'\\&%", "x" * 1000):
        metadata = probe.wire.metadata("health") | {name: value}
        probe.accept(await probe.call("health", metadata=metadata))


@case("metadata.new-fields", "Fields that are not known are ignored.", xki="O", xks="MUST")
async def new_fields(probe: Probe) -> None:
    metadata = probe.wire.metadata("encrypt") | {"aFieldOfTheFuture": "x"}
    fields = _encrypt_fields(probe) | {"anotherOne": {"deep": [1, 2, 3]}}
    probe.accept(await probe.call("encrypt", probe.subject.key, metadata=metadata, **fields))


@case("metadata.long-arn", "ARNs of 2048 characters pass.", xki="P", xks="MUST")
async def long_arns(probe: Probe) -> None:
    metadata = {
        name: (text + "x" * 2048)[:2048] if "Arn" in name else text
        for name, text in probe.wire.metadata("encrypt").items()
    }
    fields = _encrypt_fields(probe)
    probe.accept(await probe.call("encrypt", probe.subject.key, metadata=metadata, **fields))


@case("body.json", "A body that is not a JSON object in UTF-8 is refused.", xki="O", xks="SPEC")
async def not_json(probe: Probe) -> None:
    for body in (b"", b"nonsense", b"[]", b'"text"', b"{", b'{"a": "\xff"}', b"\x00" * 10):
        answer = await probe.call("health", body=body)
        refuse_one(f"body {body!r}", probe, answer, Refused.NOT_JSON)


# ---- keys ---------------------------------------------------------------------------------------


@case("key.missing", "A key that is not there is told so, in every call.", xki="O", xks="SPEC")
async def missing_key(probe: Probe) -> None:
    key, encrypted = await probe.missing_key(), await _encrypted(probe)
    for call in (probe.wire.meta_call, "encrypt", "decrypt"):
        fields = _call_fields(probe, call, encrypted)
        refuse_one(call, probe, await probe.call(call, key, **fields), Refused.NO_KEY)


@case("key.id", "A key ID is 1 to 128 of A-Z a-z 0-9 . _ -", xki="P", xks="SPEC")
async def key_ids(probe: Probe) -> None:
    for key in ("k" * 129, "%20", "a%2Fb", "%E5%AF%86", "a~b"):
        answer = await probe.call(probe.wire.meta_call, key)
        refuse_one(f"key ID {key[:20]!r}", probe, answer, Refused.KEY_ID)
    longest = await probe.call(probe.wire.meta_call, "k" * 128)
    refuse_one("a key ID of 128 characters", probe, longest, Refused.NO_KEY)


@case("key.disabled", "A disabled key neither encrypts nor decrypts.", xki="D", xks="SPEC")
async def disabled_key(probe: Probe) -> None:
    key, encrypted = probe.optional_key("disabled-key"), await _encrypted(probe)
    for call in ("encrypt", "decrypt"):
        fields = _call_fields(probe, call, encrypted)
        refuse_one(call, probe, await probe.call(call, key, **fields), Refused.DISABLED)


@case("key.disabled-metadata", "The metadata of a disabled key say so.", xki="S", xks="SPEC")
async def disabled_metadata(probe: Probe) -> None:
    key = probe.optional_key("disabled-key")
    answer = probe.accept(await probe.call(probe.wire.meta_call, key))
    if "DISABLED" not in answer.fields.values():
        raise Unmet("no field of the metadata is DISABLED")


@case("key.encrypt-only", "A key for encryption alone does not decrypt.", xki="O", xks="SPEC")
async def encrypt_only_key(probe: Probe) -> None:
    key = probe.optional_key("encrypt-only-key")
    encrypted = await probe.encrypt(TEXT, key=key)
    probe.refuse(await probe.decrypt(encrypted, key=key), Refused.USAGE)


@case("key.decrypt-only", "A key for decryption alone does not encrypt.", xki="O", xks="SPEC")
async def decrypt_only_key(probe: Probe) -> None:
    key = probe.optional_key("decrypt-only-key")
    answer = await probe.call("encrypt", key, **_encrypt_fields(probe))
    probe.refuse(answer, Refused.USAGE)


@case("key.foreign", "A ciphertext of one key does not open under another.", xki="D", xks="MUST")
async def foreign_ciphertext(probe: Probe) -> None:
    other = probe.subject.encrypt_only_key or probe.optional_key("decrypt-only-key")
    encrypting = other == probe.subject.encrypt_only_key
    made = await probe.encrypt(TEXT, key=other if encrypting else probe.subject.key)
    answer = await probe.decrypt(made, key=probe.subject.key if encrypting else other)
    probe.refuse(answer, Refused.CIPHERTEXT)


# ---- authenticated encryption -------------------------------------------------------------------


@case("gcm.round-trip", "What is encrypted decrypts, with AAD and without.", xki="S", xks="MUST")
async def round_trip(probe: Probe) -> None:
    for size in (1, 15, 16, 17, 32, 1000):
        for aad in (None, b"x", AAD):
            text = bytes(n % 251 for n in range(size))
            if await probe.opened(await probe.encrypt(text, aad), aad) != text:
                raise Unmet(f"{size} bytes came back changed")


@case(
    "gcm.large",
    "The largest plaintext and AAD that every proxy must take work.",
    xki="S",
    xks="MUST",
)
async def largest(probe: Probe) -> str:
    text = bytes(n % 251 for n in range(probe.wire.largest_plaintext))
    aad = bytes(n % 241 for n in range(8192))
    if await probe.opened(await probe.encrypt(text, aad), aad) != text:
        raise Unmet("it came back changed")
    return f"{len(text)} bytes under {len(aad)} bytes of AAD"


@case("gcm.fresh-iv", "Every encryption has an IV of its own.", xki="S", xks="MUST")
async def fresh_ivs(probe: Probe) -> None:
    made = [await probe.encrypt(TEXT, AAD) for _ in range(32)]
    ivs = {decoded(fields, probe.wire.iv_name) for fields in made}
    if len(ivs) < len(made):
        raise Unmet(f"{len(made)} encryptions had only {len(ivs)} IVs")


@case("gcm.aad", "A ciphertext opens under its own AAD alone.", xki="S", xks="MUST")
async def other_aad(probe: Probe) -> None:
    for right, wrong in ((AAD, AAD + b"x"), (AAD, AAD[:-1]), (AAD, None), (None, AAD)):
        encrypted = await probe.encrypt(TEXT, right)
        answer = await probe.decrypt(encrypted, wrong)
        refuse_one(_aad_words(right, wrong), probe, answer, Refused.CIPHERTEXT)


@case("gcm.no-aad", "An empty AAD is none.", xki="P", xks="SPEC")
async def empty_aad(probe: Probe) -> None:
    if await probe.opened(await probe.encrypt(TEXT, b""), None) != TEXT:
        raise Unmet("it came back changed")


@case("gcm.tampered", "A flipped bit anywhere in what is stored is refused.", xki="S", xks="MUST")
async def tampered(probe: Probe) -> str:
    encrypted = await probe.encrypt(TEXT, AAD)
    tried = 0
    for name in probe.wire.stored(encrypted):
        data = decoded(encrypted, name)
        for at in range(len(data)):
            changed = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
            answer = await probe.decrypt({**encrypted, name: b64(changed)}, AAD)
            refuse_one(f"byte {at} of {name}", probe, answer, Refused.CIPHERTEXT)
            tried += 1
    return f"{tried} bytes"


@case("gcm.truncated", "What is cut short or made longer is refused.", xki="S", xks="MUST")
async def truncated(probe: Probe) -> None:
    encrypted = await probe.encrypt(TEXT, AAD)
    refused = probe.wire.refusals[Refused.CIPHERTEXT]
    expected = Expected(refused.statuses)  # a size may also be called an invalid parameter
    for name in probe.wire.stored(encrypted):
        data = decoded(encrypted, name)
        for changed, word in ((data[:-1], "cut short"), (data + b"x", "longer"), (b"", "empty")):
            answer = await probe.decrypt({**encrypted, name: b64(changed)}, AAD)
            refuse_one(f"{name} {word}", probe, answer, expected)


@case("body.base64", "What is not Base64 is refused.", xki="O", xks="SPEC")
async def not_base64(probe: Probe) -> None:
    name = probe.wire.plaintext_name
    for value in ("%%%%", "YQ", "YQ==\n", "Y Q==", 7, ["YQ=="]):
        fields = _encrypt_fields(probe) | {name: value}
        answer = await probe.call("encrypt", probe.subject.key, **fields)
        refuse_one(f"{name} {value!r}", probe, answer, Expected((400,)))


# ---- time ---------------------------------------------------------------------------------------


@case(
    "latency.sequential", "Answers come within the deadline, one by one (p99).", xki="P", xks="SPEC"
)
async def sequential_latency(probe: Probe) -> str:
    encrypted = await _encrypted(probe)
    seconds = []
    for number in range(probe.subject.latency_requests):
        call = "decrypt" if number % 2 else "encrypt"
        answer = await probe.call(call, probe.subject.key, **_call_fields(probe, call, encrypted))
        seconds.append(probe.accept(answer).seconds)
    return _judge_latency(probe, seconds)


@case(
    "latency.concurrent",
    "Answers come within the deadline, 16 at a time (p99).",
    xki="P",
    xks="SPEC",
)
async def concurrent_latency(probe: Probe) -> str:
    encrypted = await _encrypted(probe)
    fields = _call_fields(probe, "decrypt", encrypted)
    seconds: list[float] = []

    async def client() -> None:
        for _ in range(probe.subject.latency_requests // 16 + 1):
            answer = await probe.call("decrypt", probe.subject.key, **fields)
            seconds.append(probe.accept(answer).seconds)

    await asyncio.gather(*(client() for _ in range(16)))
    return _judge_latency(probe, seconds)


def _judge_latency(probe: Probe, seconds: list[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    milliseconds = [round(1000 * value, 1) for value in (cuts[49], cuts[98], max(seconds))]
    text = "p50 {} ms, p99 {} ms, longest {} ms".format(*milliseconds)
    if cuts[98] > probe.subject.deadline:
        raise Unmet(f"{text}; the deadline is {1000 * probe.subject.deadline:g} ms")
    return text


# ---- shared -------------------------------------------------------------------------------------


def refuse_one(what: str, probe: Probe, answer: Answer, why: Refused | Expected) -> None:
    """Demand a refusal; on failure say which of several attempts it was."""
    try:
        probe.refuse(answer, why)
    except Unmet as error:
        raise Unmet(f"{what}: {error}") from None


async def refuse_each(
    probe: Probe,
    call: str,
    right: Fields,
    wrong: Mapping[str, Sequence[Any]],
    expected: Expected | None = None,
    *,
    codes: Mapping[str, Expected] | None = None,
) -> None:
    """Demand that every wrong value of every field is refused; None is a field that is missing.

    `codes` has what is expected of a field where it is not `expected`.
    """
    key = "" if call in {"health", "random"} else probe.subject.key
    for name, values in wrong.items():
        for value in values:
            fields = {**right, name: value}
            if value is None:
                del fields[name]
            what = f"{name} missing" if value is None else f"{name} {value!r:.60}"
            why = (codes or {}).get(name) or expected or Expected((400,))
            refuse_one(what, probe, await probe.call(call, key, **fields), why)


def _encrypt_fields(probe: Probe) -> dict[str, Any]:
    return probe.wire.encrypt_fields(TEXT, AAD)


async def _encrypted(probe: Probe) -> Fields:
    """One ciphertext of the key, made once."""
    if "encrypted" not in probe.remembered:
        probe.remembered["encrypted"] = await probe.encrypt(TEXT, AAD)
    made: Fields = probe.remembered["encrypted"]
    return made


def _call_fields(probe: Probe, call: str, encrypted: Fields) -> Mapping[str, Any]:
    if call == "encrypt":
        return _encrypt_fields(probe)
    if call == "decrypt":
        return probe.wire.decrypt_fields(encrypted, AAD)
    return {}


def _signed(probe: Probe, call: str) -> Request:
    key = "" if call == "health" else probe.subject.key
    fields = _encrypt_fields(probe) if call == "encrypt" else {}
    return probe.wire.sign(probe.request(call, key, **fields), probe.signing())


async def _with_credential(probe: Probe, secret: str, access_key_id: str = "") -> Answer:
    known = probe.subject.credentials[0].access_key_id
    request = probe.request("encrypt", probe.subject.key, **_encrypt_fields(probe))
    return await probe.sign_and_send(request, credential=Credential(access_key_id or known, secret))


def decoded(encrypted: Fields, name: str) -> bytes:
    try:
        return binascii.a2b_base64(encrypted[name], strict_mode=True)
    except (ValueError, TypeError):
        raise Unmet(f"{name} of an encrypt is not Base64") from None


def _aad_words(right: bytes | None, wrong: bytes | None) -> str:
    words = {None: "no AAD", AAD: "an AAD"}
    return f"encrypted under {words.get(right)}, decrypted under {words.get(wrong, 'another')}"


def _tls(probe: Probe) -> ssl.SSLContext:
    if probe.subject.tls is None:
        raise Skipped("the endpoint is plain HTTP")
    return probe.subject.tls(True)


async def _handshake(probe: Probe, context: ssl.SSLContext) -> str:
    """The version and suite that a handshake agrees on; raises Unmet where it fails."""
    url = URL(probe.subject.origin)
    try:
        async with asyncio.timeout(10):
            _, writer = await asyncio.open_connection(
                url.host, url.port, ssl=context, server_hostname=url.host
            )
    except (OSError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise Unmet(f"the handshake failed: {reason}") from None
    connection = writer.get_extra_info("ssl_object")
    agreed = f"{connection.version()} {connection.cipher()[0]}"
    writer.close()
    return agreed


async def _raw(
    probe: Probe, request: bytes, context: ssl.SSLContext | None, answers: int = 1
) -> bytes:
    """What comes back for these bytes, until this many answers, the end, or 10 seconds."""
    url = URL(probe.subject.origin)
    name = url.host if context is not None else None
    reader, writer = await asyncio.open_connection(
        url.host, url.port, ssl=context, server_hostname=name
    )
    came = b""
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            while came.count(b"HTTP/1.1 ") < answers:
                data = await reader.read(65536)
                if not data:
                    break
                came += data
    except TimeoutError:
        pass
    finally:
        writer.close()
    return came


def _bytes(request: Request) -> bytes:
    headers = {**request.headers, "content-length": str(len(request.body))}
    lines = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
    return f"{request.method} {request.path} HTTP/1.1\r\n{lines}\r\n".encode() + request.body
