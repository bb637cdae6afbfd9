"""TTLV and KMIP messages against PyKMIP's codec, byte for byte, and what is no TTLV."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kmip.core import enums, objects, utils
from kmip.core.factories.attributes import AttributeFactory
from kmip.core.messages import contents, payloads
from kmip.core.messages import messages as other

from xkiproxy.kmi.kmip import messages, ttlv
from xkiproxy.kmi.kmip.messages import Cipher, Mode, Op, Reason, Request, Tag, Version
from xkiproxy.kmi.kmip.ttlv import Structure, TtlvError

UID, DATA, IV = "b4faee10-aa2a-4446-8ad4-0881f3422959", b"\x01\x02\x03", bytes(range(12))
AAD, TAG = b"additional", bytes(range(16))

_PARAMETERS = objects.CryptographicParameters(
    block_cipher_mode=enums.BlockCipherMode.GCM,
    cryptographic_algorithm=enums.CryptographicAlgorithm.AES,
    iv_length=96,
    tag_length=16,
)
_MAKES_IV = objects.CryptographicParameters(
    block_cipher_mode=enums.BlockCipherMode.GCM,
    cryptographic_algorithm=enums.CryptographicAlgorithm.AES,
    random_iv=True,
    iv_length=96,
    tag_length=16,
)
_CBC = objects.CryptographicParameters(
    block_cipher_mode=enums.BlockCipherMode.CBC,
    padding_method=enums.PaddingMethod.PKCS5,
    cryptographic_algorithm=enums.CryptographicAlgorithm.AES,
)
_PYKMIP_VERSIONS = {(1, 4): enums.KMIPVersion.KMIP_1_4, (2, 0): enums.KMIPVersion.KMIP_2_0}


def template() -> objects.TemplateAttribute:
    made = AttributeFactory()
    attributes = [
        made.create_attribute(enums.AttributeType.CRYPTOGRAPHIC_ALGORITHM,
                              enums.CryptographicAlgorithm.AES),
        made.create_attribute(enums.AttributeType.CRYPTOGRAPHIC_LENGTH, 256),
        made.create_attribute(enums.AttributeType.CRYPTOGRAPHIC_USAGE_MASK,
                              [enums.CryptographicUsageMask.ENCRYPT,
                               enums.CryptographicUsageMask.DECRYPT]),
        made.create_attribute(enums.AttributeType.NAME, "payroll#2"),
        mark("payroll"),
        made.create_attribute(enums.AttributeType.SENSITIVE, True),
    ]  # fmt: skip
    return objects.TemplateAttribute(attributes=attributes)


def mark(key_id: str) -> Any:
    return AttributeFactory().create_attribute(
        enums.AttributeType.APPLICATION_SPECIFIC_INFORMATION,
        {"application_namespace": "xkiproxy", "application_data": key_id},
    )


def wanted(name: str) -> list[Any]:
    made = AttributeFactory()
    return [
        made.create_attribute(enums.AttributeType.OBJECT_TYPE, enums.ObjectType.SYMMETRIC_KEY),
        made.create_attribute(enums.AttributeType.NAME, name),
    ]


REQUESTS: dict[str, tuple[Any, Any]] = {
    "encrypt": (
        lambda _: messages.encrypt(UID, Cipher(Mode.GCM), DATA, IV, AAD),
        lambda: payloads.EncryptRequestPayload(UID, _PARAMETERS, DATA, IV, AAD),
    ),
    "encrypt-random-iv": (
        lambda _: messages.encrypt(UID, Cipher(Mode.GCM), DATA, b"", AAD),
        lambda: payloads.EncryptRequestPayload(UID, _MAKES_IV, DATA, None, AAD),
    ),
    "encrypt-cbc": (
        lambda _: messages.encrypt(UID, Cipher(Mode.CBC, messages.PKCS5_PADDING), DATA, b"", b""),
        lambda: payloads.EncryptRequestPayload(UID, _CBC, DATA),
    ),
    "decrypt": (
        lambda _: messages.decrypt(UID, Cipher(Mode.GCM), DATA, IV, AAD, TAG),
        lambda: payloads.DecryptRequestPayload(UID, _PARAMETERS, DATA, IV, AAD, TAG),
    ),
    "create": (
        # PyKMIP knows of no Extractable.
        lambda version: messages.create(version, "payroll#2", 256, "payroll", messages.EXTRAS[:2]),
        lambda: payloads.CreateRequestPayload(enums.ObjectType.SYMMETRIC_KEY, template()),
    ),
    "locate": (
        lambda version: messages.locate(version, "payroll"),
        lambda: payloads.LocateRequestPayload(attributes=wanted("payroll")),
    ),
    "locate-versions": (
        lambda version: messages.locate(version, key_id="payroll"),
        lambda: payloads.LocateRequestPayload(attributes=[wanted("")[0], mark("payroll")]),
    ),
    "get-attributes": (
        lambda _: messages.get_attributes(UID),
        lambda: payloads.GetAttributesRequestPayload(UID),
    ),
    "query": (
        lambda _: messages.query_operations(),
        lambda: payloads.QueryRequestPayload([enums.QueryFunction.QUERY_OPERATIONS]),
    ),
}


def as_pykmip(version: Version, operation: Op, payload: Any) -> bytes:
    """The same message as PyKMIP makes it."""
    header = other.RequestHeader(
        protocol_version=contents.ProtocolVersion(*version),
        batch_error_cont_option=contents.BatchErrorContinuationOption(
            enums.BatchErrorContinuationOption.CONTINUE
        ),
        batch_count=contents.BatchCount(1),
    )
    item = other.RequestBatchItem(
        operation=contents_operation(operation),
        unique_batch_item_id=contents.UniqueBatchItemID(bytes(8)),
        request_payload=payload,
    )
    stream = utils.BytearrayStream()
    message = other.RequestMessage(request_header=header, batch_items=[item])
    message.write(stream, kmip_version=_PYKMIP_VERSIONS[version])
    return bytes(stream.buffer)


def contents_operation(operation: Op) -> Any:
    from kmip.core.messages.contents import Operation

    return Operation(enums.Operation(operation))


@pytest.mark.parametrize("version", _PYKMIP_VERSIONS, ids=["1.4", "2.0"])
@pytest.mark.parametrize("name", REQUESTS)
def test_requests_are_those_of_pykmip(name: str, version: Version) -> None:
    ours, theirs = REQUESTS[name]
    operation, payload = request = ours(version)
    del payload
    assert messages.encode_message(version, [request]) == as_pykmip(version, operation, theirs())


ENCRYPTION: Request = messages.encrypt(UID, Cipher(Mode.GCM), DATA, IV, AAD)
DECRYPTION: Request = messages.decrypt(UID, Cipher(Mode.GCM), DATA, IV, AAD, TAG)
QUERY: Request = messages.query_operations()


def response(version: Version, *items: Any) -> bytes:
    header = other.ResponseHeader(
        protocol_version=contents.ProtocolVersion(*version),
        time_stamp=contents.TimeStamp(1_700_000_000),
        batch_count=contents.BatchCount(len(items)),
    )
    stream = utils.BytearrayStream()
    message = other.ResponseMessage(response_header=header, batch_items=list(items))
    message.write(stream, kmip_version=_PYKMIP_VERSIONS[version])
    return bytes(stream.buffer)


def item(index: int, operation: Op, payload: Any) -> Any:
    return other.ResponseBatchItem(
        operation=contents_operation(operation),
        unique_batch_item_id=contents.UniqueBatchItemID(index.to_bytes(8)),
        result_status=contents.ResultStatus(enums.ResultStatus.SUCCESS),
        response_payload=payload,
    )


def refused(index: int, operation: Op, reason: enums.ResultReason) -> Any:
    return other.ResponseBatchItem(
        operation=contents_operation(operation),
        unique_batch_item_id=contents.UniqueBatchItemID(index.to_bytes(8)),
        result_status=contents.ResultStatus(enums.ResultStatus.OPERATION_FAILED),
        result_reason=contents.ResultReason(reason),
        result_message=contents.ResultMessage("Said by the server."),
    )


@pytest.mark.parametrize("version", _PYKMIP_VERSIONS, ids=["1.4", "2.0"])
def test_answers_of_pykmip_are_understood_in_any_order(version: Version) -> None:
    data = response(
        version,
        refused(1, Op.DECRYPT, enums.ResultReason.CRYPTOGRAPHIC_FAILURE),
        item(0, Op.ENCRYPT, payloads.EncryptResponsePayload(UID, DATA, IV, TAG)),
    )
    first, second = messages.decode_message(data, [ENCRYPTION, DECRYPTION])
    assert messages.output(first) == DATA
    assert first.payload.octets(Tag.IV_COUNTER_NONCE) == IV
    assert first.payload.octets(Tag.AUTHENTICATION_TAG) == TAG
    assert (second.failed, second.reason) == (True, Reason.CRYPTOGRAPHIC_FAILURE)
    assert second.message == "Said by the server."


@pytest.mark.parametrize("version", _PYKMIP_VERSIONS, ids=["1.4", "2.0"])
def test_attributes_of_pykmip_are_understood(version: Version) -> None:
    payload = payloads.GetAttributesResponsePayload(UID, template().attributes)
    data = response(version, item(0, Op.GET_ATTRIBUTES, payload))
    (answer,) = messages.decode_message(data, [messages.get_attributes(UID)])
    found = messages.attributes(answer)
    assert found[Tag.CRYPTOGRAPHIC_ALGORITHM] == [messages.AES]
    assert found[Tag.CRYPTOGRAPHIC_LENGTH] == [256]
    assert found[Tag.CRYPTOGRAPHIC_USAGE_MASK] == [12]
    (name,) = found[Tag.NAME]
    assert isinstance(name, Structure)
    assert name.text(Tag.NAME_VALUE) == "payroll#2"


def test_what_is_no_answer() -> None:
    with pytest.raises(messages.KmipError, match="no response message"):
        messages.decode_message(messages.encode_message((1, 4), [QUERY]), [QUERY])
    one = response((1, 4), refused(0, Op.QUERY, enums.ResultReason.INVALID_MESSAGE))
    with pytest.raises(messages.KmipError, match=r"refuses the message: Said by the server\."):
        messages.decode_message(one, [QUERY] * 2)
    twice = item(0, Op.ENCRYPT, payloads.EncryptResponsePayload(UID, DATA))
    with pytest.raises(messages.KmipError, match="answers 2 of 2"):
        messages.decode_message(response((1, 4), twice, twice), [ENCRYPTION] * 2)


def test_an_answer_to_something_else_is_none() -> None:
    """A server that changes the order must say so: plaintexts of a size could change places."""
    made = payloads.EncryptResponsePayload(UID, DATA)
    late = response((1, 4), item(0, Op.ENCRYPT, made), item(1, Op.ENCRYPT, made))
    with pytest.raises(TtlvError, match="what was not asked"):
        messages.decode_message(late, [ENCRYPTION] * 2, 2)
    with pytest.raises(TtlvError, match="another operation"):
        messages.decode_message(late, [ENCRYPTION, DECRYPTION])
    nameless = [item(index, Op.ENCRYPT, made) for index in range(2)]
    for one in nameless:
        one.unique_batch_item_id = None
    with pytest.raises(messages.KmipError, match="does not say which"):
        messages.decode_message(response((1, 4), *nameless), [ENCRYPTION] * 2)
    (alone,) = messages.decode_message(response((1, 4), nameless[0]), [ENCRYPTION])
    assert messages.output(alone) == DATA


def test_the_servers_words_stay_on_their_line() -> None:
    one = refused(0, Op.QUERY, enums.ResultReason.GENERAL_FAILURE)
    one.result_message = contents.ResultMessage("not\n\x1b[31mall")
    (answer,) = messages.decode_message(response((1, 4), one), [QUERY])
    assert answer.message == "not\\n\\x1b[31mall"


# ---- TTLV ------------------------------------------------------------------------------------

GOOD = ttlv.structure(0x420078, ttlv.integer(0x42000D, -2), ttlv.text(0x42007D, "grün"),
                      ttlv.octets(0x4200C2, b"123456789"), ttlv.boolean(0x420010, True),
                      ttlv.enumeration(0x42005C, 0x80000001), ttlv.structure(0x42000F))  # fmt: skip


def test_every_type() -> None:
    found = ttlv.decode(GOOD)
    assert found.tag == 0x420078
    assert found.number(0x42000D) == -2
    assert found.text(0x42007D) == "grün"
    assert found.octets(0x4200C2) == b"123456789"
    assert found.find(0x420010) is True
    assert found.number(0x42005C) == 0x80000001
    assert found.structure(0x42000F).items == []
    assert ttlv.message_size(GOOD) == len(GOOD)
    for ask in (found.number, found.text, found.octets, found.structure):
        with pytest.raises(TtlvError, match="has no"):
            ask(0x4200FF)


# The example of the KMIP specification (1.4, section 9.1.2), an item each in a structure.
@pytest.mark.parametrize(
    ("octets", "value"),
    [
        ("42002002000000040000000800000000", 8),
        ("420020030000000801b69b4ba5749200", 123456789000000000),
        ("42002004000000100000000003fd35eb6bc2df4618080000", 1234567890000000000000000000),
        ("4200200500000004000000ff00000000", 255),
        ("42002006000000080000000000000001", True),
        ("420020070000000b48656c6c6f20576f726c640000000000", "Hello World"),
        ("42002008000000030102030000000000", b"\x01\x02\x03"),
        ("42002009000000080000000047da67f8", 1205495800),
        ("4200200a00000004000d2f0000000000", 864000),
    ],
)
def test_the_examples_of_the_specification(octets: str, value: object) -> None:
    item = bytes.fromhex(octets)
    found = ttlv.decode(ttlv.structure(0x420078, item)).find(0x420020)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not one structure"),
        (GOOD + GOOD, "not one structure"),
        (ttlv.integer(1, 1), "not one structure"),
        (GOOD[:-3], "longer than"),
        (GOOD[:5], "cut short"),
        (ttlv.structure(1, b"\x42\x00\x0d\x02\x00\x00\x00\x08" + bytes(8)), "type 2 and 8 bytes"),
        (ttlv.structure(1, b"\x42\x00\x0d\x07\x00\x00\x00\x01\xff" + bytes(7)), "no UTF-8"),
        (ttlv.structure(1, b"\x42\x00\x0d\x08\xff\xff\xff\xff" + bytes(8)), "longer than"),
    ],
)
def test_what_is_no_ttlv(data: bytes, complaint: str) -> None:
    with pytest.raises(TtlvError, match=complaint):
        ttlv.decode(data)


def test_a_type_that_came_later_is_no_error_and_no_byte_string() -> None:
    later = b"\x42\x00\x39\x0b\x00\x00\x00\x08" + bytes(8)  # Date-Time Extended (KMIP 2.0)
    found = ttlv.decode(ttlv.structure(0x420078, later, ttlv.integer(0x42000D, 1)))
    assert found.find(0x420039) == bytes(8)
    assert found.number(0x42000D) == 1
    for ask in (found.octets, found.number):
        with pytest.raises(TtlvError, match="has no"):
            ask(0x420039)


def test_structures_may_not_stand_too_deep_in_each_other() -> None:
    data = b""
    for _ in range(ttlv.MAX_DEPTH + 3):
        data = ttlv.structure(1, data)
    with pytest.raises(TtlvError, match="deeper"):
        ttlv.decode(data)


@given(st.binary(max_size=200), st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_nothing_but_its_own_error_comes_of_any_bytes(data: bytes, place: int, byte: int) -> None:
    changed = GOOD[:place] + bytes([byte]) + GOOD[place + 1 :]
    for attempt in (data, ttlv.structure(1, data), changed):
        try:
            ttlv.decode(attempt)
        except TtlvError as error:
            assert str(error)
