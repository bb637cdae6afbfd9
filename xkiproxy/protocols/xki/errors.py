"""The errors of XKI, as a table: what happened, and the status and code that say so."""

from __future__ import annotations

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.protocols.base import Reason, Refusal, Trouble, codes_by_status

_FAULTS = {
    Fault.UNSUPPORTED: (400, "InvalidOperation"),
    Fault.INVALID_CIPHERTEXT: (400, "InvalidCiphertextBlob"),
    Fault.KEY_NOT_FOUND: (404, "KeyNotFound"),
    Fault.KEY_DISABLED: (403, "KeyDisabledForbidden"),
    Fault.KEY_PENDING_DELETION: (400, "KeyPendingDeletionForbidden"),
    Fault.KEY_UNUSABLE: (400, "InvalidKeyState"),
    Fault.KEY_FORBIDDEN: (503, "ServiceUnavailable"),  # the operator's to mend, not the caller's
    Fault.USAGE_FORBIDDEN: (403, "KeyUsageForbidden"),
    Fault.ACCESS_DENIED: (403, "AccessForbidden"),
    Fault.THROTTLED: (429, "TooManyRequests"),
    Fault.UNAVAILABLE: (503, "ServiceUnavailable"),
    Fault.DEADLINE_EXCEEDED: (504, "Timeout"),
    Fault.INTERNAL: (500, "InternalServerError"),
}

_PARAMETERS = {
    "algorithm": "Algorithm",
    "plaintext": "Plaintext",
    "ciphertext": "CiphertextBlob",
    "iv": "Iv",
    "aad": "Aad",
    "padding": "PaddingMode",
    "length": "Length",
}
"""The wire names of an operation's fields."""

_SOURCE_FORBIDDEN = "The key store is not open to this address."

_TROUBLES: dict[Trouble, tuple[int, str, str] | tuple[int, str, str, Reason]] = {
    Trouble.NOT_HTTP: (400, "InvalidRequest", "This is not a valid HTTP request."),
    Trouble.NOT_FOUND: (404, "XkiNotFound", "There is no such path or key store."),
    Trouble.METHOD_NOT_ALLOWED: (405, "MethodNotAllowed", "Use POST."),
    Trouble.TOO_LARGE: (413, "RequestTooLarge", "The request body is over the limit."),
    Trouble.BODY_TIMEOUT: (400, "InvalidRequest", "The request body did not arrive."),
    Trouble.REPLAYED: (401, "Unauthorized", "The request is not authenticated.", "replay"),
    Trouble.OVERLOADED: (429, "TooManyRequests", "Too many requests are waiting."),
    Trouble.SOURCE_FORBIDDEN: (403, "AccessForbidden", _SOURCE_FORBIDDEN, "source_network"),
}
"""What a Refusal is made of. An exception that is raised again and again keeps all that it met."""


def codes() -> dict[int, list[str]]:
    """Every status of an error, with the codes that come with it."""
    return codes_by_status((*_FAULTS.values(), *(trouble[:2] for trouble in _TROUBLES.values())))


def refusal(why: OperationError | Trouble) -> Refusal:
    """The refusal that says what happened."""
    if isinstance(why, Trouble):
        return Refusal(*_TROUBLES[why])
    if why.fault is Fault.INVALID_PARAMETER:
        return invalid(_PARAMETERS[why.parameter], why.message)
    status, code = _FAULTS[why.fault]
    return Refusal(status, code, why.message)


def invalid(name: str, why: str) -> Refusal:
    """400 `Invalid<Name>`: a parameter is wrong."""
    return Refusal(400, f"Invalid{name}", f"{name}: {why}.")


def required(name: str) -> Refusal:
    """400 `<Name>Required`: a parameter is missing."""
    return Refusal(400, f"{name}Required", f"{name} is required.")
