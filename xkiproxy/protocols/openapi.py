"""OpenAPI 3.1 documents of the protocols, made of the definitions that their decoders read with.

`python -m xkiproxy.protocols.openapi docs/openapi` writes one for each protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import orjson

from xkiproxy import __version__
from xkiproxy.protocols.ekm import EkmProtocol
from xkiproxy.protocols.ekm import errors as ekm_errors
from xkiproxy.protocols.ekm import messages as ekm_messages
from xkiproxy.protocols.fields import Field, object_schema
from xkiproxy.protocols.xki import XkiProtocol
from xkiproxy.protocols.xki import errors as xki_errors
from xkiproxy.protocols.xki import messages as xki_messages
from xkiproxy.protocols.xks import XksProtocol
from xkiproxy.protocols.xks import errors as xks_errors
from xkiproxy.protocols.xks import messages as xks_messages

_KEY_ID = {
    "name": "externalKeyId",
    "in": "path",
    "required": True,
    "description": "The external key: the name of a key at the key manager.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
}


@dataclass(frozen=True, slots=True)
class Description:
    """What a document is made of."""

    title: str
    summary: str
    authorization: str
    base_path: str
    calls: frozenset[str]
    key_calls: frozenset[str]
    key_methods: frozenset[str]
    request_fields: Callable[[str], tuple[Field, ...]]
    answer_fields: Callable[[str], tuple[Field, ...]]
    error_fields: tuple[Field, ...]
    error_codes: dict[int, list[str]]


DESCRIPTIONS = {
    XkiProtocol.name: Description(
        "XKI v1",
        "External key instances of Alibaba Cloud KMS. Marks of what is known: protocols/xki.md.",
        "ACS4-HMAC-SHA256 or ACS4-HMAC-SM3, with x-acs-date, x-acs-signature-nonce and the hash"
        " of the body among the signed headers.",
        XkiProtocol.base_path,
        XkiProtocol.calls,
        XkiProtocol.key_calls,
        XkiProtocol.key_methods,
        xki_messages.request_fields,
        xki_messages.answer_fields,
        xki_messages.ERROR,
        xki_errors.codes(),
    ),
    XksProtocol.name: Description(
        "XKS v1",
        "The AWS KMS external key store proxy API, as xkiproxy serves it: protocols/xks.md.",
        "AWS Signature Version 4 for the service kms-xks-proxy.",
        XksProtocol.base_path,
        XksProtocol.calls,
        XksProtocol.key_calls,
        XksProtocol.key_methods,
        xks_messages.request_fields,
        xks_messages.answer_fields,
        xks_messages.ERROR,
        xks_errors.codes(),
    ),
    EkmProtocol.name: Description(
        "EKM v0",
        "Google's Cloud External Key Manager, as xkiproxy serves it: protocols/ekm.md.",
        "Bearer, and an ID token (RS256) of the Cloud EKM service agent.",
        EkmProtocol.base_path,
        EkmProtocol.calls,
        EkmProtocol.key_calls,
        EkmProtocol.key_methods - ekm_messages.OTHER_METHODS,
        ekm_messages.request_fields,
        ekm_messages.answer_fields,
        ekm_messages.ERROR,
        ekm_errors.codes(),
    ),
}


def document(description: Description) -> dict[str, Any]:
    """The OpenAPI document of a protocol."""
    base = description.base_path
    paths = {f"{base}/{call}": _path(description, call, []) for call in description.calls}
    for call in description.key_calls:
        paths[f"{base}/keys/{{externalKeyId}}/{call}"] = _path(description, call, [_KEY_ID])
    for call in description.key_methods:
        paths[f"{base}/keys/{{externalKeyId}}:{call}"] = _path(description, call, [_KEY_ID])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": description.title,
            "summary": description.summary,
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [
            {
                "url": "https://localhost:8443/{prefix}",
                "description": "The prefix picks the key store.",
                "variables": {"prefix": {"default": "demo"}},
            }
        ],
        "security": [{"signature": []}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": {"Error": object_schema(description.error_fields)},
            "securitySchemes": {
                "signature": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": description.authorization,
                }
            },
        },
    }


def _path(description: Description, call: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    request = object_schema(description.request_fields(call))
    answer = object_schema(description.answer_fields(call))
    operation = {
        "operationId": call,
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {
            "200": {"description": "Done.", "content": _json(answer)},
            **_errors(description.error_codes),
        },
    }
    return {"parameters": parameters, "post": operation} if parameters else {"post": operation}


def _errors(codes: dict[int, list[str]]) -> dict[str, Any]:
    error = _json({"$ref": "#/components/schemas/Error"})
    return {
        str(status): {
            "description": f"{HTTPStatus(status).phrase}: {', '.join(names)}, …",
            "content": error,
        }
        for status, names in codes.items()
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def text(description: Description) -> str:
    """The document as the file has it."""
    return orjson.dumps(document(description), option=orjson.OPT_INDENT_2).decode() + "\n"


def main() -> None:
    """Write the documents into the folder of the first argument."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, description in DESCRIPTIONS.items():
        (folder / f"{name}.json").write_text(text(description), encoding="utf-8")


if __name__ == "__main__":
    main()
