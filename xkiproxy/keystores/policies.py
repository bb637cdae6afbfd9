"""Policies of a key store, in Cedar: read, checked against the schema, and evaluated.

A policy that is wrong stops a start or a reload. One that fails when it is evaluated denies: Cedar
itself would pass over it, and a `forbid` that was passed over permits. docs/authorization.md tells
how policies are written; the language is described at https://docs.cedarpolicy.com.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import cedarpy

from xkiproxy.observability.logging import utf8

__all__ = [
    "AccessRequest",
    "Policies",
    "PolicyError",
    "Verdict",
    "load_policies",
    "parse_policies",
    "read_policies",
    "schema_text",
]

_EXTENSION = ".cedar"
_MAX_FILE_SIZE = 1 << 20
_WRITABLE_BY_ALL = 0o002

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|;|[^\s"/;]+|\s+|.', re.DOTALL)
_NAMED = re.compile(r"(?<=`)[^`]+(?=`)|(?<=: )\w+$")
"""The words of a message that stand in the policy."""
_ACTION = re.compile(r' in context for Action::"\w+"')
_UNSAFE = re.compile(r"unable to guarantee safety .* attribute `(\w+)` in the context")
_POLICY_ID = re.compile(r"^(?:for policy `policy\d+`, |Policy parse error: )+")


class PolicyError(Exception):
    """Policies that cannot be used; the text names each mistake with its file and line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(dict.fromkeys(map(utf8, problems)))
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """What is asked: who wants to do what with which key.

    `key_id`, `kmi` and `labels` are empty for an action on the key store itself. `context` has the
    attributes of the schema, as text, truth values, and under `source` and `time` an IP address
    and seconds since the epoch.
    """

    principal: str
    action: str
    keystore: str
    key_id: str = ""
    kmi: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    context: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What policies say: `policies` names those that decided, none if none permits."""

    allowed: bool
    policies: tuple[str, ...]
    errors: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why, in a few words."""
        if self.errors:
            return f"failed: {', '.join(self.errors)}"
        return ", ".join(self.policies) or "no policy permits it"


@dataclass(frozen=True, slots=True)
class Statement:
    """One policy as it stands in a file; `line` counts from 1."""

    file: str
    line: int
    text: str
    name: str


class Policies:
    """The policies of a key store."""

    def __init__(self, statements: Iterable[Statement]) -> None:
        """Raises PolicyError with every mistake that was found."""
        self.statements = list(statements)
        problems = [*_mistakes(self.statements)]
        if problems:
            raise PolicyError(problems)
        text = "\n".join(statement.text for statement in self.statements)
        self._set = cedarpy.PolicySet.from_str(text)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.needs = _context_attributes(json.loads(cedarpy.policies_to_json_str(text)))
        """The attributes of the context on which decisions depend."""

    def evaluate(self, request: AccessRequest) -> Verdict:
        """What these policies say; some 100 microseconds."""
        resource, entities = _resource(request)
        result = cedarpy.is_authorized(
            {
                "principal": {"type": "Principal", "id": request.principal},
                "action": {"type": "Action", "id": request.action},
                "resource": resource,
                "context": {name: _value(name, v) for name, v in request.context.items()},
            },
            self._set,
            json.dumps(entities),
            _schema(),
        )
        names = tuple(self._name(policy) for policy in sorted(result.diagnostics.reasons))
        errors = tuple(str(error) for error in result.diagnostics.errors)
        return Verdict(result.allowed and not errors, names, errors)

    def _name(self, policy: str) -> str:
        return self.statements[int(policy.removeprefix("policy"))].name


def load_policies(folder: Path) -> Policies:
    """The policies of the `.cedar` files in a folder; raises PolicyError."""
    return parse_policies(read_policies(folder))


def read_policies(folder: Path) -> dict[str, str]:
    """The text of each `.cedar` file in a folder, by its name; raises PolicyError."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix == _EXTENSION)
    except OSError as error:
        raise PolicyError([f"{folder}: {error.strerror}"]) from None
    if not files:
        # As it stands everything would be denied: that is hardly what was meant.
        raise PolicyError([f"{folder}: has no {_EXTENSION} file"])
    texts: dict[str, str] = {}
    problems: list[str] = []
    for file in files:
        name = utf8(file.name)
        try:
            if name in texts:  # one of them would be left out
                raise PolicyError([f"{name}: another file is called so, with bytes of no UTF-8"])
            texts[name] = _read(file)
        except PolicyError as error:
            problems += error.problems
    if problems:
        raise PolicyError(problems)
    return texts


def parse_policies(texts: Mapping[str, str]) -> Policies:
    """The policies in the text of files, which have names; raises PolicyError."""
    return Policies(
        statement for file, text in sorted(texts.items()) for statement in split(file, text)
    )


def schema_text() -> str:
    """The schema that policies are checked against, in Cedar's own notation."""
    return resources.files(__package__).joinpath("authorization.cedarschema").read_text()


def split(file: str, text: str) -> Iterator[Statement]:
    """The policies of a file, one by one: Cedar does not tell where in a text a mistake is."""
    line = start = 1
    parts: list[str] = []
    number = 0
    for match in _TOKEN.finditer(text):
        piece = match[0]
        if not parts and not piece.isspace() and not piece.startswith("//"):
            start = line
            parts = [piece]
        elif parts:
            parts.append(piece)
        if parts and piece == ";":
            number += 1
            yield _statement(file, start, "".join(parts), number)
            parts = []
        line += piece.count("\n")
    if parts:
        yield _statement(file, start, "".join(parts), number + 1)


def _statement(file: str, line: int, text: str, number: int) -> Statement:
    named = re.match(r'(?:@\w+(?:\("(?:\\.|[^"\\])*"\))?\s*)*@id\("([\w.:/-]+)"\)', text)
    return Statement(file, line, text, named[1] if named else f"{file}#{number}")


def _read(file: Path) -> str:
    try:
        status = file.stat()
        if status.st_mode & _WRITABLE_BY_ALL:
            raise PolicyError([f"{file.name}: everyone may write it; run: chmod o-w {file}"])
        if status.st_size > _MAX_FILE_SIZE:
            raise PolicyError([f"{file.name}: is over {_MAX_FILE_SIZE >> 20} MB"])
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise PolicyError([f"{file.name}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise PolicyError([f"{file.name}: is not UTF-8"]) from None


def _mistakes(statements: list[Statement]) -> Iterator[str]:
    names: dict[str, Statement] = {}
    if not statements:
        yield "there is no policy, only comments: everything would be denied"
    for statement in statements:
        yield from _mistakes_of(statement)
        if (other := names.setdefault(statement.name, statement)) is not statement:
            where = f"{other.file}:{other.line}"
            yield f"{statement.file}:{statement.line}: the name {statement.name} is taken, {where}"


def _mistakes_of(statement: Statement) -> Iterator[str]:
    try:
        policies = json.loads(cedarpy.policies_to_json_str(statement.text))
    except ValueError as error:
        yield _located(statement, str(error))
        return
    if policies["templates"]:
        where = f"{statement.file}:{statement.line}"
        yield f"{where}: is a template (?principal, ?resource): write it out"
        return
    for found in cedarpy.validate_policies(statement.text, _schema()).errors:
        yield _located(statement, found.error)


def _located(statement: Statement, error: str) -> str:
    """A mistake with its file and line: where the word that it names stands, if that is clear."""
    reason = _ACTION.sub(" in the context", _POLICY_ID.sub("", error))
    if match := _UNSAFE.fullmatch(reason):
        reason = f"`{match[1]}` may be absent: ask `context has {match[1]}` first"
    offset = 0
    for word in _NAMED.findall(reason):
        places = [
            m.start() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", statement.text)
        ]
        if len(places) == 1:
            offset = places[0]
            break
    line = statement.line + statement.text[:offset].count("\n")
    return f"{statement.file}:{line}: {reason}"


def _context_attributes(policies: dict[str, Any]) -> frozenset[str]:
    """The attributes of the context that policies mention; `policies` in Cedar's JSON form.

    All of them where a policy uses the context as a whole.
    """
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                walk(item)
        elif isinstance(node, dict):
            if node.get("Var") == "context":
                found.update(_all_attributes())
            for operator, operand in node.items():
                # A record may have keys of these names.
                is_access = operator in {".", "has"} and isinstance(operand, dict)
                if is_access and operand.get("left") == {"Var": "context"}:
                    # `has` with a path (a.b) has a list: its first part is the context's.
                    attribute = operand["attr"]
                    found.add(attribute if isinstance(attribute, str) else attribute[0])
                else:
                    walk(operand)

    # Only conditions are expressions: what annotations are called is anybody's choice.
    walk([policy["conditions"] for policy in policies["staticPolicies"].values()])
    return frozenset(found)


@cache
def _all_attributes() -> frozenset[str]:
    types = re.findall(r"^type \w+ = \{(.*?)^\};", schema_text(), re.MULTILINE | re.DOTALL)
    return frozenset(re.findall(r"^  (\w+)\??: ", "".join(types), re.MULTILINE))


@cache
def _schema() -> cedarpy.Schema:
    return cedarpy.Schema.from_str(schema_text())


def _resource(request: AccessRequest) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The resource of a request, and what is known of it."""
    store = {"type": "KeyStore", "id": request.keystore}
    if not request.key_id:
        return store, []
    key = {"type": "Key", "id": request.key_id}
    parents = [store, {"type": "Kmi", "id": request.kmi}]
    attributes = {"id": request.key_id, "kmi": request.kmi}
    entity = {"uid": key, "attrs": attributes, "parents": parents, "tags": dict(request.labels)}
    return key, [entity]


def _value(name: str, value: Any) -> Any:
    """A value of the context in Cedar's JSON form."""
    if name == "source":
        return {"__extn": {"fn": "ip", "arg": _address(value)}}
    if name == "time":
        text = datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"__extn": {"fn": "datetime", "arg": text}}
    return value


def _address(text: str) -> str:
    """An address as Cedar reads it: without a zone, and IPv4 as such; raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
