"""The errors of EKM, as a table: what happened, and the status and google.rpc.Code that say so.

Cloud EKM disables a key version once the key manager says PERMISSION_DENIED of it (its error
reference), so only what the key's owner forbids gets that code (a policy that fails denies too); a
mistake of a network or a state that may end does not. And it reads a bare INVALID_ARGUMENT as a
ciphertext that is wrong for ever, so what is wrong with a request has details or another code.
"""

from __future__ import annotations

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.protocols.base import Fields, Reason, Refusal, Trouble, codes_by_status

CODES = {
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "OUT_OF_RANGE": 11,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "UNAUTHENTICATED": 16,
}
"""The numbers of google.rpc.Code."""

_FAULTS = {
    Fault.INVALID_PARAMETER: (400, "INVALID_ARGUMENT"),
    Fault.INVALID_CIPHERTEXT: (400, "INVALID_ARGUMENT"),
    Fault.UNSUPPORTED: (400, "FAILED_PRECONDITION"),
    Fault.KEY_NOT_FOUND: (404, "NOT_FOUND"),
    Fault.KEY_DISABLED: (400, "FAILED_PRECONDITION"),
    Fault.KEY_PENDING_DELETION: (400, "FAILED_PRECONDITION"),
    Fault.KEY_UNUSABLE: (400, "FAILED_PRECONDITION"),
    Fault.KEY_FORBIDDEN: (503, "UNAVAILABLE"),  # the operator's to mend
    Fault.USAGE_FORBIDDEN: (400, "FAILED_PRECONDITION"),
    Fault.ACCESS_DENIED: (403, "PERMISSION_DENIED"),
    Fault.THROTTLED: (429, "RESOURCE_EXHAUSTED"),
    Fault.UNAVAILABLE: (503, "UNAVAILABLE"),
    Fault.DEADLINE_EXCEEDED: (504, "DEADLINE_EXCEEDED"),
    Fault.INTERNAL: (500, "INTERNAL"),
}

_UNAUTHENTICATED = (401, "UNAUTHENTICATED", "The request is not authenticated.")

_SOURCE_FORBIDDEN = "The key store is not open to this address."

_TROUBLES: dict[Trouble, tuple[int, str, str] | tuple[int, str, str, Reason]] = {
    Trouble.NOT_HTTP: (400, "FAILED_PRECONDITION", "This is not a valid HTTP request."),
    Trouble.NOT_FOUND: (404, "NOT_FOUND", "There is no such path."),
    Trouble.METHOD_NOT_ALLOWED: (405, "UNIMPLEMENTED", "Use POST."),
    Trouble.TOO_LARGE: (413, "OUT_OF_RANGE", "The request body is over the limit."),
    Trouble.BODY_TIMEOUT: (503, "UNAVAILABLE", "The body did not arrive."),
    Trouble.REPLAYED: (*_UNAUTHENTICATED, "replay"),
    Trouble.OVERLOADED: (429, "RESOURCE_EXHAUSTED", "Too many requests are waiting."),
    Trouble.SOURCE_FORBIDDEN: (401, "UNAUTHENTICATED", _SOURCE_FORBIDDEN, "source_network"),
}
"""What a Refusal is made of. An exception that is raised again and again keeps all that it met."""

_BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"


class FieldRefusal(Refusal):
    """A refusal for what stands in one field; `field` is its path in the request."""

    def __init__(
        self, status: int, code: str, field: str, why: str, reason: Reason | None = None
    ) -> None:
        super().__init__(status, code, f"{field}: {why}.", reason or "")
        self.field = field
        self.why = why


def codes() -> dict[int, list[str]]:
    """Every status of an error, with the codes that come with it."""
    refused = (*_FAULTS.values(), *(trouble[:2] for trouble in _TROUBLES.values()))
    return codes_by_status((*refused, (501, "UNIMPLEMENTED")))


def refusal(why: OperationError | Trouble) -> Refusal:
    """The refusal that says what happened."""
    if isinstance(why, Trouble):
        return Refusal(*_TROUBLES[why])
    status, code = _FAULTS[why.fault]
    return Refusal(status, code, why.message)


def encode(refusal: Refusal) -> Fields:
    """A google.rpc.Status; with a google.rpc.BadRequest where one field is at fault."""
    status: dict[str, object] = {"code": CODES[refusal.code], "message": refusal.message}
    if isinstance(refusal, FieldRefusal):
        violation = {"field": refusal.field, "description": refusal.why}
        status["details"] = [{"@type": _BAD_REQUEST, "fieldViolations": [violation]}]
    return status


def invalid(name: str, why: str) -> Refusal:
    """400 `INVALID_ARGUMENT`: a field is missing or wrong."""
    return FieldRefusal(400, "INVALID_ARGUMENT", name, why)


def required(name: str) -> Refusal:
    """400 `INVALID_ARGUMENT`: a field is missing."""
    return invalid(name, "is required")


def unimplemented(call: str) -> Refusal:
    """501 `UNIMPLEMENTED`: a call that EKM has and this proxy has not."""
    return Refusal(501, "UNIMPLEMENTED", f"{call} is not offered here.")


def unauthenticated(reason: Reason) -> Refusal:
    """401, always in the same words."""
    return Refusal(*_UNAUTHENTICATED, reason)
