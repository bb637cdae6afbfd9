"""The errors of XKS, as a table: what happened, and the status and errorName that say so."""

from __future__ import annotations

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.protocols.base import Reason, Refusal, Trouble, codes_by_status

_FAULTS = {
    Fault.INVALID_PARAMETER: (400, "ValidationException"),
    Fault.INVALID_CIPHERTEXT: (400, "InvalidCiphertextException"),
    Fault.UNSUPPORTED: (400, "InvalidKeyUsageException"),
    Fault.KEY_NOT_FOUND: (404, "KeyNotFoundException"),
    Fault.KEY_DISABLED: (400, "InvalidStateException"),
    Fault.KEY_PENDING_DELETION: (400, "InvalidStateException"),
    Fault.KEY_UNUSABLE: (400, "InvalidStateException"),
    Fault.KEY_FORBIDDEN: (503, "DependencyTimeoutException"),  # the operator's to mend
    Fault.USAGE_FORBIDDEN: (400, "InvalidKeyUsageException"),
    Fault.ACCESS_DENIED: (403, "AccessDeniedException"),
    Fault.THROTTLED: (429, "ThrottlingException"),
    Fault.UNAVAILABLE: (503, "DependencyTimeoutException"),
    Fault.DEADLINE_EXCEEDED: (503, "DependencyTimeoutException"),
    Fault.INTERNAL: (500, "InternalException"),
}

_UNAUTHENTICATED = (401, "AuthenticationFailedException", "The request is not authenticated.")

_SOURCE_FORBIDDEN = "The key store is not open to this address."

_TROUBLES: dict[Trouble, tuple[int, str, str] | tuple[int, str, str, Reason]] = {
    Trouble.NOT_HTTP: (400, "ValidationException", "This is not a valid HTTP request."),
    Trouble.NOT_FOUND: (404, "InvalidUriPathException", "There is no such path."),
    Trouble.METHOD_NOT_ALLOWED: (405, "InvalidUriPathException", "Use POST."),
    Trouble.TOO_LARGE: (
        501,
        "UnsupportedOperationException",
        "The request body is over the limit.",
    ),
    Trouble.BODY_TIMEOUT: (400, "ValidationException", "The body did not arrive."),
    Trouble.REPLAYED: (*_UNAUTHENTICATED, "replay"),
    Trouble.OVERLOADED: (429, "ThrottlingException", "Too many requests are waiting."),
    Trouble.SOURCE_FORBIDDEN: (403, "AccessDeniedException", _SOURCE_FORBIDDEN, "source_network"),
}
"""What a Refusal is made of. An exception that is raised again and again keeps all that it met."""

_MAX_MESSAGE = 500


def codes() -> dict[int, list[str]]:
    """Every status of an error, with the codes that come with it."""
    return codes_by_status((*_FAULTS.values(), *(trouble[:2] for trouble in _TROUBLES.values())))


def refusal(why: OperationError | Trouble) -> Refusal:
    """The refusal that says what happened."""
    if isinstance(why, Trouble):
        return Refusal(*_TROUBLES[why])
    status, name = _FAULTS[why.fault]
    return Refusal(status, name, why.message)


def invalid(name: str, why: str) -> Refusal:
    """400 `ValidationException`: a parameter is missing or wrong."""
    return Refusal(400, "ValidationException", f"{name}: {why}.")


def required(name: str) -> Refusal:
    """400 `ValidationException`: a parameter is missing."""
    return invalid(name, "is required")


def unauthenticated(reason: Reason) -> Refusal:
    """401, always in the same words."""
    return Refusal(*_UNAUTHENTICATED, reason)


def printable(message: str) -> str:
    """A message as the specification wants it: under 512 characters of printable ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in message[:_MAX_MESSAGE])
