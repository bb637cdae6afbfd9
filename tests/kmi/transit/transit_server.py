"""A Transit secrets engine, for tests: it stands for OpenBao or Vault, which cannot be had here.

This server was written from their public documentation (HTTP API: secret/transit, auth/*,
sys/health, "Status codes", listener "tcp") and from how they answer, and it is meant to be as
strict as they are: real TLS, tokens with their time and their policies, namespaces, seal status,
request limits, and refusals in their words and with their statuses. AES-GCM is by `cryptography`.
It runs in a thread with an event loop of its own.

What it does not have: storage, replication, key derivation, other engines than `transit`, and the
response headers that nobody here reads.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import re
import ssl
import threading
import time
import uuid
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SIZES = {"aes128-gcm96": 16, "aes256-gcm96": 32, "chacha20-poly1305": 32}
OTHER_TYPES = {"ed25519", "rsa-2048", "ecdsa-p256"}
MAX_RANDOM = 128 << 10
NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)

DEFAULT_POLICY = {
    "auth/token/lookup-self": {"read"},
    "auth/token/renew-self": {"update"},
    "auth/token/revoke-self": {"update"},
}
PROXY_POLICY = {
    "transit/encrypt/*": {"update"},
    "transit/decrypt/*": {"update"},
    "transit/keys/*": {"read"},
    "transit/random": {"update"},
}
ADMIN_POLICY = {
    **PROXY_POLICY,
    "transit/keys": {"list"},
    "transit/keys/*": {"create", "read", "update", "delete"},
}
ROOT_POLICY = {"*": {"create", "read", "update", "delete", "list"}}


class Refusal(Exception):
    """An answer with an error."""

    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(status, *errors)
        self.status = status
        self.errors = list(errors)


@dataclass
class ServerToken:
    """A token; `ttl` in seconds, 0: without end; `max_ttl` from when it was made."""

    policy: dict[str, set[str]]
    ttl: float = 0
    renewable: bool = False
    max_ttl: float = 0
    with_default: bool = True
    made: float = field(default_factory=time.monotonic)
    renewed: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        left = self.renewed + self.ttl - time.monotonic()
        if self.max_ttl:
            left = min(left, self.made + self.max_ttl - time.monotonic())
        return left

    def allows(self, path: str, capability: str) -> bool:
        policy = {**self.policy, **(DEFAULT_POLICY if self.with_default else {})}
        granted = [caps for pattern, caps in policy.items() if fnmatchcase(path, pattern)]
        return any(capability in caps for caps in granted)


@dataclass
class ServerKey:
    """A named key: its versions by number."""

    type: str
    versions: dict[int, bytes]
    created: dict[int, int]
    derived: bool = False
    deletion_allowed: bool = False
    min_decryption: int = 1
    min_encryption: int = 0
    exportable: bool = False

    @property
    def latest(self) -> int:
        return max(self.versions)

    @property
    def encrypts(self) -> bool:
        return self.type in SIZES

    def rotate(self) -> None:
        number = self.latest + 1 if self.versions else 1
        self.versions[number] = os.urandom(SIZES.get(self.type, 32))
        self.created[number] = int(time.time())

    def describe(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "type": self.type,
            "derived": self.derived,
            "deletion_allowed": self.deletion_allowed,
            "min_available_version": 0,
            "min_decryption_version": self.min_decryption,
            "min_encryption_version": self.min_encryption,
            "latest_version": self.latest,
            "exportable": self.exportable,
            "allow_plaintext_backup": False,
            "supports_encryption": self.encrypts,
            "supports_decryption": self.encrypts,
            "supports_signing": not self.encrypts,
            "supports_derivation": self.encrypts,
            "auto_rotate_period": 0,
            "imported_key": False,
            # Older versions than the minimum are in the archive, and are not listed.
            "keys": {str(n): t for n, t in self.created.items() if n >= self.min_decryption},
        }


class TransitServer:
    """The server. Tests change its fields while it runs; what it was asked is in `requests`."""

    def __init__(self, certificate: Path | None = None, client_ca: Path | None = None) -> None:
        """`certificate` has its key beside it; without one it speaks plain HTTP."""
        self.mount = "transit"
        self.namespace = ""
        self.sealed = self.standby = False
        self.version: str | None = "1.17.2"
        self.drops_associated_data = False
        """As Vault before 1.13: the field is not known, and not missed."""
        self.tokens: dict[str, ServerToken] = {"root": ServerToken(ROOT_POLICY)}
        self.keys: dict[str, ServerKey] = {}
        self.roles: dict[str, str] = {}
        self.certificates: dict[str, str] = {}
        self.serials: list[int] = []
        """Of the certificates that logins showed."""
        self.service_accounts: dict[str, str] = {}
        self.login_ttl, self.login_max_ttl, self.login_renewable = 3600.0, 0.0, True
        self.login_policy, self.login_with_default = PROXY_POLICY, True
        self.swallowed = 0
        """So many of the next renewals get no answer."""
        self.lookups_limited = False
        self.failed_logins = 0
        self.max_request_size = 32 << 20
        self.max_strings = 1000
        self.rate_limited = False
        self.delay = 0.0
        self.failures: list[tuple[int, str]] = []
        """Answered to the next requests of the engine, one after the other."""
        self.cuts = 0
        """So many of the next requests lose their connection before they are answered."""
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.revoked: list[str] = []
        self.connections: set[object] = set()
        self.port = 0
        self._certificate, self._client_ca = certificate, client_ca
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None

    # ---- for tests -------------------------------------------------------------------------

    def start(self, port: int = 0) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(port), self._loop).result(10)

    def stop(self) -> None:
        """Close the listener and every connection; it can be started again."""
        if self._runner is not None:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
            self._runner = None

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def address(self) -> str:
        scheme = "http" if self._certificate is None else "https"
        host = "127.0.0.1" if self._certificate is None else "localhost"
        return f"{scheme}://{host}:{self.port}"

    def add_key(self, name: str, kind: str = "aes256-gcm96", **more: Any) -> ServerKey:
        key = self.keys[name] = ServerKey(kind, {}, {}, **more)
        key.rotate()
        return key

    def asked(self, *prefixes: str) -> list[dict[str, Any]]:
        """The bodies of the requests to paths that begin so."""
        return [body for _, path, body in self.requests if path.startswith(prefixes)]

    # ---- HTTP ------------------------------------------------------------------------------

    async def _listen(self, port: int) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        context = None
        if self._certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate, self._certificate.with_suffix(".key"))
            if self._client_ca is not None:
                context.verify_mode = ssl.CERT_OPTIONAL
                context.load_verify_locations(self._client_ca)
        site = web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.connections.add(request.transport)
        try:
            status, document = await self._answer(request)
        except Refusal as refusal:
            status, document = refusal.status, {"errors": refusal.errors}
        if self.delay:
            await asyncio.sleep(self.delay)
        if document is None:
            return web.Response(status=status)
        return web.json_response(document, status=status)

    async def _answer(self, request: web.Request) -> tuple[int, Any]:
        path = request.path.removeprefix("/v1/")
        if not request.path.startswith("/v1/"):
            raise Refusal(404)
        if request.headers.get("X-Vault-Request") != "true":
            raise Refusal(412, "missing required 'X-Vault-Request' header")
        body = await self._body(request)
        method = "LIST" if request.query.get("list") == "true" else request.method
        self.requests.append((method, path, body))
        namespace = request.headers.get("X-Vault-Namespace", "")
        if path == "sys/health":
            return self._health(namespace)
        if self.sealed:
            raise Refusal(503, "Vault is sealed")
        login = re.fullmatch(r"auth/(approle|cert|kubernetes)/login", path)
        if login is not None and namespace == self.namespace:
            if method not in {"POST", "PUT"}:
                raise Refusal(405, "1 error occurred:\n\t* unsupported operation\n\n")
            return self._login(login[1], body, request)
        token = self._authorized(request, namespace, method, path)
        if path.startswith("auth/token/"):
            if self.swallowed and path.endswith("renew-self"):
                self.swallowed -= 1
                await asyncio.sleep(10)
            return self._token_path(path.removeprefix("auth/token/"), method, token, request)
        if not path.startswith(f"{self.mount}/"):
            raise Refusal(404, f'no handler for route "{path}". route entry not found.')
        return self._engine_path(request, path.removeprefix(f"{self.mount}/"), method, body)

    async def _body(self, request: web.Request) -> dict[str, Any]:
        raw = await request.read()
        if len(raw) > self.max_request_size:
            raise Refusal(413, "failed to parse JSON input: http: request body too large")
        if not raw:
            return {}
        try:
            body = json.loads(raw)
        except ValueError:
            raise Refusal(400, "failed to parse JSON input: invalid character") from None
        if not isinstance(body, dict):
            raise Refusal(400, "failed to parse JSON input: json: cannot unmarshal")
        if _strings(body) > self.max_strings:
            raise Refusal(400, "failed to parse JSON input: too many strings")
        return body

    def _health(self, namespace: str) -> tuple[int, Any]:
        if namespace:
            raise Refusal(404, "unsupported path")
        status = 503 if self.sealed else 429 if self.standby else 200
        found = {"initialized": True, "sealed": self.sealed, "standby": self.standby}
        return status, found if self.version is None else {**found, "version": self.version}

    # ---- tokens ----------------------------------------------------------------------------

    def _authorized(
        self, request: web.Request, namespace: str, method: str, path: str
    ) -> ServerToken:
        text = request.headers.get("X-Vault-Token", "")
        if not text:
            raise Refusal(403, "missing client token")
        token = self.tokens.get(text)
        if token is not None and token.ttl and token.left <= 0:
            del self.tokens[text]
            token = None
        if token is None:
            raise Refusal(403, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n")
        if namespace != self.namespace:
            raise Refusal(403, "1 error occurred:\n\t* permission denied\n\n")
        if not token.allows(path, self._capability(method, path)):
            raise Refusal(403, "1 error occurred:\n\t* permission denied\n\n")
        return token

    def _capability(self, method: str, path: str) -> str:
        """An encryption under a key that is not there would create it: another capability."""
        if method in {"POST", "PUT"}:
            name = path.removeprefix(f"{self.mount}/encrypt/")
            return "create" if name != path and name not in self.keys else "update"
        return {"GET": "read", "DELETE": "delete", "LIST": "list"}[method]

    def _token_path(
        self, path: str, method: str, token: ServerToken, request: web.Request
    ) -> tuple[int, Any]:
        text = request.headers["X-Vault-Token"]
        if path == "lookup-self" and method == "GET":
            if self.lookups_limited:
                raise Refusal(429, "request path: rate limit quota exceeded")
            end = "2099-01-01T00:00:00Z" if token.ttl else None
            left = int(token.left) if token.ttl else 0
            data = {"id": text, "ttl": left, "renewable": token.renewable, "expire_time": end}
            return 200, _document(data)
        if path == "renew-self" and method in {"POST", "PUT"}:
            if not token.renewable:
                raise Refusal(400, "lease is not renewable")
            token.renewed = time.monotonic()
            return 200, _document(None, self._auth(text, token))
        if path == "revoke-self" and method in {"POST", "PUT"}:
            del self.tokens[text]
            self.revoked.append(text)
            return 204, None
        raise Refusal(404, "1 error occurred:\n\t* unsupported path\n\n")

    def _login(self, kind: str, body: dict[str, Any], request: web.Request) -> tuple[int, Any]:
        if self.failed_logins >= 5:  # user lockout
            raise Refusal(403, "1 error occurred:\n\t* permission denied\n\n")
        try:
            getattr(self, f"_login_{kind}")(body, request)
        except Refusal:
            self.failed_logins += 1
            raise
        self.failed_logins = 0
        text = f"hvs.{uuid.uuid4().hex}{uuid.uuid4().hex}"
        token = self.tokens[text] = ServerToken(
            self.login_policy, self.login_ttl, self.login_renewable, self.login_max_ttl,
            self.login_with_default,
        )  # fmt: skip
        return 200, _document(None, self._auth(text, token))

    def _login_approle(self, body: dict[str, Any], request: web.Request) -> None:
        if not body.get("role_id"):
            raise Refusal(400, "missing role_id")
        if self.roles.get(body["role_id"]) != body.get("secret_id"):
            raise Refusal(400, "invalid role or secret ID")

    def _login_kubernetes(self, body: dict[str, Any], request: web.Request) -> None:
        if not body.get("role") or not body.get("jwt"):
            raise Refusal(400, "missing role" if body.get("jwt") else "missing jwt")
        if self.service_accounts.get(body["role"]) != body["jwt"]:
            raise Refusal(403, "1 error occurred:\n\t* permission denied\n\n")

    def _login_cert(self, body: dict[str, Any], request: web.Request) -> None:
        assert request.transport is not None
        peer = request.transport.get_extra_info("peercert") or {}
        self.serials.append(int(peer.get("serialNumber", "0"), 16))
        names = {value for rdn in peer.get("subject", ()) for _, value in rdn}
        wanted = self.certificates.get(body.get("name", ""))
        known = {wanted} if body.get("name") else set(self.certificates.values())
        if not names & known:
            raise Refusal(400, "invalid certificate or no client certificate supplied")

    @staticmethod
    def _auth(text: str, token: ServerToken) -> dict[str, Any]:
        left = round(token.left) if token.ttl else 0
        return {"client_token": text, "lease_duration": left, "renewable": token.renewable}

    # ---- the engine ------------------------------------------------------------------------

    def _engine_path(
        self, request: web.Request, path: str, method: str, body: dict[str, Any]
    ) -> tuple[int, Any]:
        if self.rate_limited:
            raise Refusal(429, f'request path "{self.mount}/{path}": rate limit quota exceeded')
        if self.cuts:
            self.cuts -= 1
            assert request.transport is not None
            request.transport.abort()
            raise Refusal(500)
        if self.failures:
            status, text = self.failures.pop(0)
            raise Refusal(status, *([text] if text else []))
        first, _, name = path.partition("/")
        last = ""
        if first == "keys" and "/" in name:
            name, last = name.split("/", 1)
        if path == "random" and method in {"POST", "PUT"}:
            return self._random(body)
        if path in {"keys", "keys/"} and method == "LIST":
            if not self.keys:
                raise Refusal(404)
            return 200, _document({"keys": sorted(self.keys)})
        if not NAME.fullmatch(name):
            raise Refusal(404, "1 error occurred:\n\t* unsupported path\n\n")
        if first in {"encrypt", "decrypt"} and method in {"POST", "PUT"}:
            return self._crypt(first, name, body)
        if first == "keys" and last in {"", "rotate", "config"}:
            return self._key(name, last, method, body)
        raise Refusal(404, "1 error occurred:\n\t* unsupported path\n\n")

    @staticmethod
    def _random(body: dict[str, Any]) -> tuple[int, Any]:
        size = body.get("bytes", 32)
        if not isinstance(size, int) or size < 1:
            raise Refusal(400, '"bytes" cannot be less than 1')
        if size > MAX_RANDOM:
            raise Refusal(400, f'"bytes" should be less than {MAX_RANDOM}')
        if body.get("format", "base64") != "base64":
            raise Refusal(400, f'unsupported encoding format "{body["format"]}"')
        return 200, _document({"random_bytes": base64.b64encode(os.urandom(size)).decode()})

    def _key(self, name: str, last: str, method: str, body: dict[str, Any]) -> tuple[int, Any]:
        key = self.keys.get(name)
        if last == "" and method == "GET":
            if key is None:
                raise Refusal(404)
            return 200, _document(key.describe(name))
        if last == "" and method == "DELETE":
            if key is None or not key.deletion_allowed:
                why = "deletion is not allowed for this key" if key else "could not delete key"
                raise Refusal(400, f"error deleting policy {name}: {why}; not found"[:200])
            del self.keys[name]
            return 204, None
        if method not in {"POST", "PUT"}:
            raise Refusal(405, "1 error occurred:\n\t* unsupported operation\n\n")
        if last == "":
            kind = body.get("type", "aes256-gcm96")
            if kind not in SIZES and kind not in OTHER_TYPES:
                raise Refusal(400, f"unknown key type {kind}")
            warnings = [f"key {name} already existed"] if key else None
            if key is None:
                key = self.add_key(name, kind, exportable=bool(body.get("exportable")))
            return 200, {**_document(key.describe(name)), "warnings": warnings}
        if key is None:
            text = (
                "key not found"
                if last == "rotate"
                else f"no existing key named {name} could be found"
            )
            raise Refusal(400, text)
        if last == "rotate":
            key.rotate()
            return 200, _document(key.describe(name))
        for setting in ("min_decryption_version", "min_encryption_version"):
            if body.get(setting, 0) > key.latest:
                raise Refusal(
                    400,
                    f"cannot set {setting.replace('_', ' ')} of {body[setting]},"
                    f" latest key version is {key.latest}",
                )
        key.min_decryption = body.get("min_decryption_version", key.min_decryption)
        key.min_encryption = body.get("min_encryption_version", key.min_encryption)
        key.deletion_allowed = body.get("deletion_allowed", key.deletion_allowed)
        return 200, _document(key.describe(name))

    def _crypt(self, kind: str, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        wanted = "plaintext" if kind == "encrypt" else "ciphertext"
        batch = body.get("batch_input")
        if batch is None:
            if wanted not in body:
                raise Refusal(400, f"missing {wanted} to {kind}")
            items = [body]
        else:
            items = self._batch(batch, kind, wanted)
        key = self.keys.get(name)
        if key is None:
            if kind == "decrypt":
                raise Refusal(400, "encryption key not found")
            key = self.add_key(name, body.get("type", "aes256-gcm96"))  # upsert
        results = [self._item(key, kind, item) for item in items]
        failed = [result for result in results if "error" in result]
        if batch is None:
            if failed:
                raise Refusal(400, failed[0]["error"])
            return 200, _document(results[0])
        status = 400 if failed else 200
        if failed and len(failed) < len(results):
            status = body.get("partial_failure_response_code", status)
        return status, _document({"batch_results": results})

    @staticmethod
    def _batch(batch: object, kind: str, wanted: str) -> list[dict[str, Any]]:
        if not isinstance(batch, list):
            raise Refusal(500, "failed to parse batch input: source data must be an array or slice")
        if not batch:
            raise Refusal(400, "missing batch input to process")
        kinds = {"plaintext": str, "ciphertext": str, "associated_data": str, "key_version": int}
        for i, item in enumerate(batch):
            if not isinstance(item, dict):
                raise Refusal(500, f"failed to parse batch input: [{i}] expected a map")
            if wanted not in item:
                raise Refusal(
                    500, f"failed to parse batch input: '[{i}].{wanted}' missing {wanted} to {kind}"
                )
            for field_, type_ in kinds.items():
                if field_ in item and type(item[field_]) is not type_:
                    raise Refusal(
                        500, f"failed to parse batch input: '[{i}].{field_}' expected type"
                    )
        return batch

    def _item(self, key: ServerKey, kind: str, item: dict[str, Any]) -> dict[str, Any]:
        try:
            if not key.encrypts:
                raise Refusal(400, f"message {kind}ion not supported for key type {key.type}")
            if key.derived:
                raise Refusal(
                    400,
                    "missing 'context' for key derivation; the key was created using a derived key,"
                    " which means additional, per-request information must be included in order to"
                    " perform operations with the key",
                )
            data = _decoded(item.get("associated_data", ""))
            if self.drops_associated_data:
                data = b""
            made = self._encrypt if kind == "encrypt" else self._decrypt
            return made(key, item, data)
        except Refusal as refusal:
            return {"error": refusal.errors[0], "reference": item.get("reference", "")}

    @staticmethod
    def _encrypt(key: ServerKey, item: dict[str, Any], data: bytes) -> dict[str, Any]:
        plaintext = _decoded(item["plaintext"])
        version = item.get("key_version", 0) or key.latest
        if version < 0:
            raise Refusal(400, "requested version for encryption is negative")
        if version > key.latest:
            raise Refusal(
                400, "requested version for encryption is higher than the latest key version"
            )
        if version < key.min_encryption:
            raise Refusal(
                400,
                "requested version for encryption is less than the minimum encryption key version",
            )
        nonce = os.urandom(12)
        made = nonce + AESGCM(key.versions[version]).encrypt(nonce, plaintext, data)
        text = f"vault:v{version}:{base64.b64encode(made).decode()}"
        return {
            "ciphertext": text,
            "key_version": version,
            "reference": item.get("reference", ""),
        }

    @staticmethod
    def _decrypt(key: ServerKey, item: dict[str, Any], data: bytes) -> dict[str, Any]:
        if not item["ciphertext"]:
            raise Refusal(400, "missing ciphertext to decrypt")
        if not item["ciphertext"].startswith("vault:v"):
            raise Refusal(400, "invalid ciphertext: no prefix")
        number, colon, text = item["ciphertext"].removeprefix("vault:v").partition(":")
        if not colon:
            raise Refusal(400, "invalid ciphertext: wrong number of fields")
        if not re.fullmatch(r"[+-]?[0-9]+", number):
            raise Refusal(400, "invalid ciphertext: version number could not be decoded")
        version = int(number) or 1
        if version > key.latest:
            raise Refusal(400, "invalid ciphertext: version is too new")
        if version < key.min_decryption:
            raise Refusal(400, "ciphertext or signature version is disallowed by policy (too old)")
        try:
            made = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise Refusal(400, "invalid ciphertext: could not decode base64") from None
        if len(made) < 12:
            raise Refusal(400, "invalid ciphertext length")
        try:
            plaintext = AESGCM(key.versions[version]).decrypt(made[:12], made[12:], data)
        except (InvalidTag, ValueError):
            raise Refusal(400, "cipher: message authentication failed") from None
        return {
            "plaintext": base64.b64encode(plaintext).decode(),
            "reference": item.get("reference", ""),
        }


def _document(data: Any, auth: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "request_id": str(uuid.uuid4()),
        "lease_id": "",
        "renewable": False,
        "lease_duration": 0,
        "data": data,
        "wrap_info": None,
        "warnings": None,
        "auth": auth,
    }


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise Refusal(400, "illegal base64 data at input byte 0") from None


def _strings(value: Any) -> int:
    """How many strings are in a JSON document, names of fields and values."""
    if isinstance(value, dict):
        return sum(1 + _strings(v) for v in value.values())
    if isinstance(value, list):
        return sum(map(_strings, value))
    return int(isinstance(value, str))
