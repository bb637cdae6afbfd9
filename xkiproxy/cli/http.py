"""One HTTPS request with the time of each of its phases, for troubleshooting.

Blocking, on the standard library: here the phases are the point, and clients that pool and
pipeline hide them.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from urllib.parse import urlsplit

from xkiproxy.config import Config
from xkiproxy.config.models import split_address
from xkiproxy.config.tls import tls_reason

_MAX_ANSWER_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens. Without TLS only on this machine."""

    host: str
    port: int
    tls: bool = True

    @property
    def authority(self) -> str:
        """What the Host header says."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"


@dataclass(frozen=True, slots=True)
class Trust:
    """How the two ends prove themselves.

    The server: by its certificate's SHA-256 (hex), by a CA file, or by the system's certificate
    authorities if neither is given. We: by a PEM file of certificate and private key, if at all.
    """

    certificate_sha256: str = ""
    ca_file: Path | None = None
    client_certificate: Path | None = None


@dataclass(slots=True)
class Timings:
    """Milliseconds; `request` is from sending to the first byte of the answer."""

    resolve: float = 0.0
    connect: float = 0.0
    tls: float = 0.0
    request: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Response:
    """An answer, and the connection that it came over."""

    status: int
    headers: Message
    body: bytes = field(repr=False)
    timings: Timings
    tls_version: str
    cipher: str
    certificate_sha256: str


class RequestError(Exception):
    """No answer came; the subclass says in which phase it failed."""


class ResolveError(RequestError):
    """The host's name was not resolved."""


class ConnectError(RequestError):
    """The connection was refused, or nobody answered."""


class HandshakeError(RequestError):
    """TLS failed before the certificate could be judged."""


class CertificateError(RequestError):
    """The certificate is not trusted; `certificate_sha256` is what came, or empty."""

    def __init__(self, message: str, certificate_sha256: str) -> None:
        super().__init__(message)
        self.certificate_sha256 = certificate_sha256


class AnswerError(RequestError):
    """The connection broke, timed out, or carried something other than HTTP."""


def parse_endpoint(text: str) -> Endpoint:
    """Read `https://host[:port]`; http only for loopback hosts.

    Raises:
        ValueError: with a text for people.
    """
    parts = urlsplit(text)
    if parts.scheme not in {"https", "http"} or not parts.hostname:
        raise ValueError("write it as https://host:port")
    if parts.path not in {"", "/"} or parts.query or parts.fragment or parts.username:
        raise ValueError("write it as https://host:port; the path goes to --path")
    if parts.scheme == "http":
        if not _is_loopback(parts.hostname):
            raise ValueError("http is for loopback addresses only: plaintexts would travel openly")
        return Endpoint(parts.hostname, parts.port or 80, tls=False)
    return Endpoint(parts.hostname, parts.port or 443)


def listening_endpoint(config: Config) -> Endpoint:
    """Where a configuration's server is reached from its own machine."""
    host, port = split_address(config.server.listen)
    everywhere = host in {"0.0.0.0", "::"}  # noqa: S104 - read, not bound
    return Endpoint("localhost" if everywhere else host, port, config.server.tls is not None)


def post(
    endpoint: Endpoint,
    trust: Trust,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    timeout: float,
) -> Response:
    """Send one POST over a connection of its own; `timeout` in seconds, for each phase.

    Nothing of the request is sent before the certificate is trusted.

    Raises:
        RequestError: no answer came.
    """
    timings = Timings()
    start = time.perf_counter()
    addresses = _resolve(endpoint, timings)
    plain = _connect(addresses, timeout, timings)
    with plain:
        connection = _secure(plain, endpoint, trust, timings) if endpoint.tls else plain
        with connection:
            # Before the exchange: an answer may close the connection.
            version, cipher, fingerprint = _describe(connection)
            status, fields, answer = _exchange(connection, endpoint, path, headers, body, timings)
            timings.total = _milliseconds(start)
    return Response(status, fields, answer, timings, version, cipher, fingerprint)


_Address = tuple[socket.AddressFamily, tuple[object, ...]]


def _resolve(endpoint: Endpoint, timings: Timings) -> list[_Address]:
    start = time.perf_counter()
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ResolveError(f"{endpoint.host}: {reason}") from None
    finally:
        timings.resolve = _milliseconds(start)
    return [(family, tuple(address)) for family, _, _, _, address in found]


def _connect(addresses: list[_Address], timeout: float, timings: Timings) -> socket.socket:
    start = time.perf_counter()
    reasons = []
    for family, address in addresses:
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            reasons.append(f"{address[0]} port {address[1]}: {error.strerror or error}")
            continue
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        timings.connect = _milliseconds(start)
        return connection
    raise ConnectError("; ".join(reasons))


def _secure(
    plain: socket.socket, endpoint: Endpoint, trust: Trust, timings: Timings
) -> ssl.SSLSocket:
    context = _context(trust)
    start = time.perf_counter()
    try:
        connection = context.wrap_socket(plain, server_hostname=endpoint.host)
    except ssl.SSLCertVerificationError as error:
        came = _fingerprint_of(endpoint, plain.gettimeout())
        raise CertificateError(error.verify_message, came) from None
    except OSError as error:
        raise HandshakeError(tls_reason(error) or str(error)) from None
    timings.tls = _milliseconds(start)
    came = _fingerprint(connection)
    if trust.certificate_sha256 and not hmac.compare_digest(trust.certificate_sha256, came):
        connection.close()
        raise CertificateError("it is not the certificate that was expected", came)
    return connection


def _context(trust: Trust) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if trust.certificate_sha256:
        # The certificate itself is compared after the handshake, which proves that the server has
        # its key: no authority and no name can add to that.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif trust.ca_file is not None:
        try:
            context.load_verify_locations(trust.ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise RequestError(f"{trust.ca_file}: not a file of CA certificates: {error}") from None
    else:
        context.load_default_certs()
    if trust.client_certificate is not None:
        try:
            context.load_cert_chain(trust.client_certificate)
        except OSError as error:
            text = f"{trust.client_certificate}: not a PEM file of certificate and key: {error}"
            raise RequestError(text) from None
    return context


def _exchange(
    connection: socket.socket,
    endpoint: Endpoint,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    timings: Timings,
) -> tuple[int, Message, bytes]:
    client = http.client.HTTPConnection(endpoint.host, endpoint.port)
    client.sock = connection
    start = time.perf_counter()
    try:
        client.request("POST", path, body, dict(headers))
        answer = client.getresponse()
        timings.request = _milliseconds(start)
        data = answer.read(_MAX_ANSWER_SIZE + 1)
    except http.client.RemoteDisconnected:
        raise AnswerError("the server closed the connection without an answer") from None
    except http.client.HTTPException as error:
        raise AnswerError(f"the answer is not HTTP: {type(error).__name__}") from None
    except TimeoutError:
        raise AnswerError("no answer within the timeout") from None
    except OSError as error:
        raise AnswerError(tls_reason(error) or str(error)) from None
    if len(data) > _MAX_ANSWER_SIZE:
        raise AnswerError("the answer is over 1 MiB")
    return answer.status, answer.headers, data


def _describe(connection: socket.socket) -> tuple[str, str, str]:
    if not isinstance(connection, ssl.SSLSocket):
        return "", "", ""
    cipher = connection.cipher()
    return connection.version() or "", cipher[0] if cipher else "", _fingerprint(connection)


def _fingerprint(connection: ssl.SSLSocket) -> str:
    certificate = connection.getpeercert(binary_form=True)
    return hashlib.sha256(certificate).hexdigest() if certificate else ""


def _fingerprint_of(endpoint: Endpoint, timeout: float | None) -> str:
    """Ask again without judging: ssl does not show the certificate that it refused."""
    context = _context(Trust(certificate_sha256="any"))
    try:
        address = (endpoint.host, endpoint.port)
        with (
            socket.create_connection(address, timeout) as plain,
            context.wrap_socket(plain, server_hostname=endpoint.host) as connection,
        ):
            return _fingerprint(connection)
    except OSError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _milliseconds(start: float) -> float:
    return (time.perf_counter() - start) * 1000
