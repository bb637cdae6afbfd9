"""Policies: tables of requests and decisions, mistakes with their lines, what is remembered."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xkiproxy.crypto.algorithms import Algorithm, Usage
from xkiproxy.crypto.caller import Caller
from xkiproxy.crypto.operations import (
    Decrypt,
    Describe,
    Encrypt,
    Fault,
    KeyState,
    Operation,
    OperationError,
    Random,
)
from xkiproxy.keystores import authorization
from xkiproxy.keystores.authorization import Authorizer
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.policies import (
    AccessRequest,
    Policies,
    PolicyError,
    Verdict,
    load_policies,
    schema_text,
)
from xkiproxy.keystores.trail import Trail

NOW = 1_790_000_000
CONTEXT: dict[str, Any] = {
    "access_key_id": "XKITESTACCESSKEY00000001",
    "source": "10.1.2.3",
    "time": NOW,
    "mode": "GCM",
    "client_iv": False,
}
ALLOW = AccessRequest("arn:payroll", "decrypt", "demo", "payroll", "hsm", (), CONTEXT)


def policies(folder: Path, **files: str) -> Policies:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.cedar").write_text(text)
    return load_policies(folder)


PERMIT = "permit(principal, action, resource)"


@pytest.mark.parametrize(
    ("text", "change", "allowed"),
    [
        (f"{PERMIT};", {}, True),
        ("forbid(principal, action, resource);", {}, False),
        (f"{PERMIT}; forbid(principal, action, resource);", {}, False),
        ('permit(principal == Principal::"arn:payroll", action, resource);', {}, True),
        ('permit(principal == Principal::"arn:payroll", action, resource);', {"principal": ""}, 0),
        ('permit(principal, action == Action::"decrypt", resource);', {}, True),
        ('permit(principal, action == Action::"decrypt", resource);', {"action": "encrypt"}, 0),
        ('permit(principal, action, resource == Key::"payroll");', {}, True),
        ('permit(principal, action, resource == Key::"payroll");', {"key_id": "other"}, False),
        ('permit(principal, action, resource in Kmi::"hsm");', {}, True),
        ('permit(principal, action, resource in Kmi::"hsm");', {"kmi": "local"}, False),
        ('permit(principal, action, resource in KeyStore::"demo");', {}, True),
        ('permit(principal, action, resource in KeyStore::"demo");', {"keystore": "b"}, False),
        (
            'permit(principal, action, resource is Key) when { resource.id like "pay*" };',
            {"key_id": "payments"},
            True,
        ),
        (
            "permit(principal, action, resource is Key) when"
            ' { resource.hasTag("env") && resource.getTag("env") == "prod" };',
            {"labels": (("env", "prod"),)},
            True,
        ),
        (
            "permit(principal, action, resource is Key) when"
            ' { resource.hasTag("env") && resource.getTag("env") == "prod" };',
            {},
            False,
        ),
    ],
)
def test_scopes_and_resources(
    tmp_path: Path, text: str, change: dict[str, Any], allowed: bool
) -> None:
    assert policies(tmp_path, p=text).evaluate(replace(ALLOW, **change)).allowed is bool(allowed)


@pytest.mark.parametrize(
    ("condition", "good", "bad"),
    [
        ('context has source_vpc && context.source_vpc == "vpc-1"', {"source_vpc": "vpc-1"}, {}),
        (
            'context has source_vpc && context.source_vpc == "vpc-1"',
            {"source_vpc": "vpc-1"},
            {"source_vpc": "vpc-2"},
        ),
        (
            'context has source_vpc_endpoint && context.source_vpc_endpoint == "e"',
            {"source_vpc_endpoint": "e"},
            {},
        ),
        ('context.source.isInRange(ip("10.0.0.0/8"))', {}, {"source": "11.0.0.1"}),
        (
            'context.source.isInRange(ip("10.0.0.0/8"))',
            {"source": "::ffff:10.0.0.1"},
            {"source": "fe80::1%eth0"},
        ),
        (
            'context.time < datetime("2030-01-01")',
            {},
            {"time": 1_900_000_000},
        ),
        ('context.mode == "GCM"', {}, {"mode": "ECB"}),
        ("!context.client_iv", {}, {"client_iv": True}),
        ('context.access_key_id like "XKI*"', {}, {"access_key_id": "b"}),
    ],
)
def test_conditions_on_the_context(
    tmp_path: Path, condition: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    text = (
        'permit(principal, action in [Action::"encrypt", Action::"decrypt"], resource)'
        f" when {{ {condition} }};"
    )
    made = policies(tmp_path, p=text)
    assert made.evaluate(replace(ALLOW, context={**CONTEXT, **good})).allowed
    assert not made.evaluate(replace(ALLOW, context={**CONTEXT, **bad})).allowed


def test_an_action_on_the_key_store_itself(tmp_path: Path) -> None:
    made = policies(
        tmp_path, p='permit(principal, action == Action::"random", resource == KeyStore::"demo");'
    )
    context = {name: CONTEXT[name] for name in ("access_key_id", "source", "time")}
    assert made.evaluate(AccessRequest("", "random", "demo", context=context)).allowed
    assert not made.evaluate(AccessRequest("", "random", "other", context=context)).allowed


def test_the_deciding_policy_is_named(tmp_path: Path) -> None:
    made = policies(
        tmp_path,
        a=f'// first\n@note("x") @id("all-may") {PERMIT};\nforbid(principal, action, resource)\n'
        ' when { principal == Principal::"b" }; forbid(principal == Principal::"b", action,'
        " resource);",
    )
    assert made.evaluate(ALLOW) == Verdict(True, ("all-may",))
    assert made.evaluate(replace(ALLOW, principal="b")).reason == "a.cedar#2, a.cedar#3"
    nobody = policies(tmp_path / "b", a='permit(principal == Principal::"b", action, resource);')
    assert nobody.evaluate(ALLOW).reason == "no policy permits it"


def test_a_policy_that_fails_denies(tmp_path: Path) -> None:
    """Cedar passes over a policy that fails: a `forbid` would then forbid nothing."""
    made = policies(
        tmp_path,
        p=f"{PERMIT}; forbid(principal, action, resource) when"
        " { 9223372036854775807 + (if context.source.isIpv4() then 1 else 0) == 1 };",
    )
    verdict = made.evaluate(ALLOW)
    assert not verdict.allowed
    assert verdict.reason.startswith("failed: ")


def test_a_request_that_is_not_of_the_schema_is_denied(tmp_path: Path) -> None:
    made = policies(tmp_path, p=f"{PERMIT};")
    for change in ({"action": "destroy"}, {"context": {**CONTEXT, "odd": "1"}}, {"context": {}}):
        assert not made.evaluate(replace(ALLOW, **change)).allowed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("permit(principal, action\nresource);", "p.cedar:2: unexpected token `resource`"),
        (f"{PERMIT}", "p.cedar:1: unexpected end of input"),
        (f"// a\n\n{PERMIT};\n{PERMIT} whn;", "p.cedar:4: "),
        (f'{PERMIT} when {{ "abc }};', "p.cedar:1: "),
        (f'{PERMIT}\nwhen {{\n context.sorce_vpc == "x" }};', "p.cedar:3: attribute `sorce_vpc`"),
        (
            f'{PERMIT} when\n{{ context.source_vpc == "x" }};',
            "p.cedar:2: `source_vpc` may be absent: ask `context has source_vpc` first",
        ),
        ('permit(principal == User::"x", action, resource);', "unrecognized entity type `User`"),
        ('permit(principal, action == Action::"encypt", resource);', "unrecognized action"),
        ("permit(principal == ?principal, action, resource);", "is a template"),
        (f'@id("a") {PERMIT};\n@id("a") {PERMIT};', "p.cedar:2: the name a is taken, p.cedar:1"),
        ("// nothing\n", "there is no policy, only comments"),
        ("", "there is no policy, only comments"),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(said)):
        policies(tmp_path, p=text)


def test_all_mistakes_are_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        policies(tmp_path, a="permit(;", b=f"{PERMIT} when {{ context.b }};\n{PERMIT} when;")
    files = [problem.partition(": ")[0] for problem in caught.value.problems]
    assert files == ["a.cedar:1", "b.cedar:1", "b.cedar:2"]


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        load_policies(tmp_path / "gone")
    with pytest.raises(PolicyError, match=r"has no \.cedar file"):
        load_policies(tmp_path)
    file = tmp_path / "p.cedar"
    file.write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="is not UTF-8"):
        load_policies(tmp_path)
    file.write_text(f"{PERMIT};")
    file.chmod(0o666)
    with pytest.raises(PolicyError, match="everyone may write it"):
        load_policies(tmp_path)
    file.chmod(0o644)
    file.write_text("//" + "x" * (1 << 20))
    with pytest.raises(PolicyError, match="is over 1 MB"):
        load_policies(tmp_path)


def test_the_schema_has_what_is_known_and_nothing_else() -> None:
    attributes = set(
        re.findall(r"^  (\w+)\??: (?:String|ipaddr|datetime|Bool)", schema_text(), re.M)
    )
    known = authorization.SAID_ATTRIBUTES | authorization.KNOWN_ATTRIBUTES
    assert attributes - {"id", "kmi"} == known
    assert set(authorization.ACTIONS.values()) == {"encrypt", "decrypt", "random", "meta"}


# ---- what is remembered


class Counting(Policies):
    """Counts how often it is really asked."""

    asked = 0

    def evaluate(self, request: AccessRequest) -> Verdict:
        self.asked += 1
        return super().evaluate(request)


def authorizer(folder: Path, text: str) -> tuple[Authorizer, Counting]:
    counting = Counting(policies(folder, p=text).statements)
    return Authorizer("demo", counting), counting


ENTRY = CatalogEntry("hsm", "payroll", KeyState.ENABLED, Usage.BOTH, 0.0, None, (("env", "prod"),))


def trail(**caller: str) -> Trail:
    made = Trail("10.1.2.3")
    made.key_id, made.kmi = "payroll", "hsm"
    made.access_key_id = "XKITESTACCESSKEY00000001"
    made.caller = Caller(principal="arn:payroll", **caller)
    return made


def test_a_question_is_asked_once_and_each_dependency_asks_anew(tmp_path: Path) -> None:
    made, counting = authorizer(
        tmp_path, f'{PERMIT} when {{ context has source_vpc && context.source_vpc == "v" }};'
    )
    operation = Decrypt("payroll", b"", b"", 1)
    for _ in range(3):
        made.check(operation, ENTRY, 1, trail(source_vpc="v", request_id="other each time"))
    assert counting.asked == 1
    made.check(operation, ENTRY, 1, trail(source_vpc="v", via_service="is not mentioned"))
    assert counting.asked == 1
    for _ in range(2):
        denied = trail(source_vpc="w")
        with pytest.raises(OperationError) as caught:
            made.check(operation, ENTRY, 1, denied)
        assert caught.value.fault is Fault.ACCESS_DENIED
        assert caught.value.details == {"policy": "no policy permits it"}
        assert "vpc" not in caught.value.message
    assert counting.asked == 2
    made.check(Encrypt("payroll", b""), ENTRY, 1, trail(source_vpc="v"))
    made.check(Describe("payroll"), ENTRY, 1, trail(source_vpc="v"))
    assert counting.asked == 4
    made.check(operation, ENTRY, 2, trail(source_vpc="v"))  # the catalog has changed
    assert counting.asked == 5


def test_labels_that_change_are_seen(tmp_path: Path) -> None:
    made, _ = authorizer(
        tmp_path,
        "permit(principal, action, resource is Key) when"
        ' { resource.hasTag("env") && resource.getTag("env") == "prod" };',
    )
    operation = Describe("payroll")
    made.check(operation, ENTRY, 1, trail())
    with pytest.raises(OperationError):
        made.check(operation, replace(ENTRY, labels=()), 2, trail())


def test_time_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = authorizer(tmp_path, f'{PERMIT} when {{ context.time < datetime("2030-01-01") }};')
    monkeypatch.setattr(authorization, "time", lambda: 1_893_455_999.5)
    made.check(Describe("payroll"), ENTRY, 1, trail())
    monkeypatch.setattr(authorization, "time", lambda: 1_893_456_000.5)
    with pytest.raises(OperationError):
        made.check(Describe("payroll"), ENTRY, 1, trail())


@pytest.mark.parametrize(
    ("operation", "permitted"),
    [
        (Encrypt("payroll", b""), True),
        (Encrypt("payroll", b"", Algorithm.AES_GCM), True),
        (Encrypt("payroll", b"", Algorithm.SM4_GCM), True),
        (Encrypt("payroll", b"", Algorithm.AES_ECB), False),
        (Encrypt("payroll", b"", Algorithm.AES_CBC), False),
        (Encrypt("payroll", b"", iv=bytes(12)), False),
        (Decrypt("payroll", b"", bytes(12), 1), True),
        (Decrypt("payroll", b"", bytes(16), 1, Algorithm.AES_CBC), False),
        (Describe("payroll"), True),
        (Random(16), True),
    ],
    ids=str,
)
def test_what_an_operation_is_comes_to_the_policies(
    tmp_path: Path, operation: Operation, permitted: bool
) -> None:
    """Only GCM, and no IV of the caller's: who may encrypt cannot make key streams of it."""
    made, _ = authorizer(
        tmp_path,
        f"{PERMIT}; forbid(principal, action in"
        ' [Action::"encrypt", Action::"decrypt"], resource) unless'
        ' { context.mode == "GCM" && !context.client_iv };',
    )
    entry = None if isinstance(operation, Random) else ENTRY
    asked = trail()
    if entry is None:
        asked.key_id = ""
    for _ in range(2):
        if permitted:
            made.check(operation, entry, 1, asked)
        else:
            with pytest.raises(OperationError):
                made.check(operation, entry, 1, asked)


def test_what_is_remembered_does_not_grow(tmp_path: Path) -> None:
    made, _ = authorizer(tmp_path, f"{PERMIT};")
    made.policies.evaluate = lambda _: Verdict(True, ())  # type: ignore[method-assign]
    for number in range(20_000):
        asked = trail()
        asked.caller = Caller(principal=str(number))
        made.check(Describe("payroll"), ENTRY, 1, asked)
    assert len(made._verdicts) <= 8193


def test_a_question_of_any_length_is_answered_and_a_long_one_not_kept(tmp_path: Path) -> None:
    made, counting = authorizer(tmp_path, f"{PERMIT};")
    asked = trail()
    asked.caller = Caller(principal="p" * 60_000)
    for _ in range(2):
        made.check(Describe("payroll"), ENTRY, 1, asked)
    assert counting.asked == 2
    assert not made._verdicts


def test_what_annotations_and_keys_of_records_are_called_is_free(tmp_path: Path) -> None:
    text = (
        f'@has("x") @Var("context") {PERMIT}'
        ' when { {"has": context.access_key_id, Var: "context"}["has"] like "XKI*" };'
    )
    made, _ = authorizer(tmp_path, text)
    assert made.policies.needs == {"access_key_id"}
    made.check(Describe("payroll"), ENTRY, 1, trail())
