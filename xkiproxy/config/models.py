"""The shape of xkiproxy.toml. Unknown keys are errors; every default is safe to run with.

The text below a field is its meaning in docs/configuration.md: `make references` puts it there.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from xkiproxy.config.paths import ConfigPath
from xkiproxy.config.secrets import SecretSource
from xkiproxy.crypto.operations import CiphertextFormat


class Section(BaseModel):
    """A table of the file: closed and unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _host_and_port(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535 or not host:
        raise ValueError('write it as "host:port", such as "127.0.0.1:8443" or "[::1]:8443"')
    return value


Address = Annotated[
    str,
    AfterValidator(_host_and_port),
    WithJsonSchema({"type": "string", "format": "host:port"}),
]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Facility = Literal[
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv",
    "ftp", "ntp", "audit", "alert", "clock", "local0", "local1", "local2", "local3", "local4",
    "local5", "local6", "local7",
]  # fmt: skip
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Seconds = Annotated[float, Field(gt=0, le=3600)]


def _as_addresses(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; the brackets of an IPv6 address are taken off."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class TlsSettings(Section):
    """The certificate that the cloud pins by its fingerprint, and who may connect (mTLS)."""

    certificate: ConfigPath
    """PEM, with its chain; `xkiproxy fingerprint` prints what the console asks for."""

    private_key: SecretSource
    """PEM without a passphrase; from a file or a credential."""

    client_ca: ConfigPath | None = None
    """PEM: clients must have a certificate of this CA."""

    client_names: tuple[str, ...] = ()
    """And one of these DNS names (the common name counts where there is none)."""

    @model_validator(mode="after")
    def _names_need_ca(self) -> TlsSettings:
        if self.client_names and self.client_ca is None:
            raise ValueError("client_names needs client_ca: names prove nothing without a CA")
        if self.private_key.env is not None:
            raise ValueError("private_key must come from a file or a credential")
        return self


class ProxyProtocolSettings(Section):
    """Load balancers that pass the client's address on in a PROXY header."""

    trusted: Annotated[tuple[Network, ...], Field(min_length=1)]
    """The balancers. A connection from elsewhere is closed, since who sends the header is believed.
    """

    timeout_seconds: Seconds = 5
    """For the header."""


class ServerSettings(Section):
    """Listeners and the limits of a connection."""

    listen: Address = "0.0.0.0:8443"
    """What the cloud calls."""

    admin_listen: Address = "127.0.0.1:9464"
    """`/` (a page for people), `/metrics`, `/livez`, `/readyz`, `/status`; plain HTTP, keep it
    inside.
    """

    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share the port. Each has an audit log of its own (`audit-1.jsonl`, ...), lanes
    are divided among them, and the replay window is shared.
    """

    tls: TlsSettings | None = None
    """Needed, but with `plaintext`."""

    plaintext: bool = False
    """HTTP without TLS, on loopback addresses only."""

    proxy_protocol: ProxyProtocolSettings | None = None
    """For a proxy behind a TCP load balancer."""

    # Of each worker. A thousand clients that all wait for an answer wait some 60 ms; and libuv,
    # which takes 1,024 events at a time, gives nothing else its turn while there are so many.
    max_connections: Annotated[int, Field(ge=1, le=1000)] = 1000
    """Of each worker. A connection over it is closed at once. A thousand requests at the same time
    wait some 60 ms for each other; for more, add workers.
    """

    max_body_bytes: Annotated[int, Field(ge=1024, le=16 << 20)] = 64 << 10
    """A larger body is refused with 413, before it is read where its length is announced."""

    replay_capacity: Annotated[int, Field(ge=64, le=200_000_000)] = 4_000_000
    """How many XKI requests of the last 15 minutes are remembered, so that none is accepted twice:
    the default is 4,400 a second. More are refused with 429. For each key store, 90 bytes each as
    they come; with several workers for all key stores together, 24 bytes each from the start.
    """

    handshake_timeout_seconds: Seconds = 10
    """For the TLS handshake."""

    header_timeout_seconds: Seconds = 10
    """From a header's first byte to its last."""

    body_timeout_seconds: Seconds = 10
    """For the body."""

    idle_timeout_seconds: Seconds = 75
    """A connection without a request is closed."""

    shutdown_delay_seconds: Annotated[float, Field(ge=0, le=300)] = 0
    """How long requests are still served after SIGTERM, with `/readyz` red, so that load balancers
    notice; a second signal ends it.
    """

    shutdown_timeout_seconds: Seconds = 15
    """For what has begun when SIGTERM comes."""

    @model_validator(mode="after")
    def _tls_or_loopback(self) -> ServerSettings:
        if self.tls is None and not self.plaintext:
            raise ValueError("[server.tls] is missing (certificate, private_key)")
        if self.tls is not None and self.plaintext:
            raise ValueError("plaintext = true and [server.tls] contradict each other")
        if self.plaintext and not is_loopback(split_address(self.listen)[0]):
            raise ValueError("plaintext = true is for loopback addresses only")
        return self

    @model_validator(mode="after")
    def _two_listeners(self) -> ServerSettings:
        if _collide(split_address(self.listen), split_address(self.admin_listen)):
            raise ValueError("listen and admin_listen need the same port: give one another")
        return self


def _collide(one: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether two addresses cannot both be bound; port 0 is any that is free."""
    hosts = {one[0], other[0]}
    everywhere = "::" in hosts or ("0.0.0.0" in hosts and not any(":" in h for h in hosts))  # noqa: S104
    return one[1] == other[1] != 0 and (len(hosts) == 1 or everywhere)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ClientTlsSettings(Section):
    """How a server that we connect to proves who it is, and the proxy to it."""

    ca: ConfigPath | None = None
    """PEM: the CA that the server's certificate must be of; without it the system's."""

    certificate: ConfigPath | None = None
    """PEM, with its chain: the proxy's own, where the server asks for one."""

    private_key: SecretSource | None = None
    """PEM without a passphrase; from a file or a credential."""

    server_name: str = ""
    """The name in the server's certificate; without it the host of `address`."""

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key belong together")
        if self.private_key is not None and self.private_key.env is not None:
            raise ValueError("private_key must come from a file or a credential")
        return self


_Endpoint = TypeVar("_Endpoint")


def _divide(lanes: int, index: int, workers: int) -> tuple[int, int]:
    """The number of the first lane of a worker among those of all, and how many it has."""
    each, more = divmod(lanes, workers)
    return index * each + min(index, more), each + (index < more)


def _from(endpoints: tuple[_Endpoint, ...], first: int) -> tuple[_Endpoint, ...]:
    """Endpoints in the order in which the lanes of a worker go to them, as if it had all lanes.

    Otherwise workers with a lane each would all use the same one.
    """
    start = first % len(endpoints)
    return endpoints[start:] + endpoints[:start]


class KmiSettings(Section):
    """What every kind of KMI has."""

    name: Name
    """Lower-case letters, digits, `-`, `_`; it stands in metrics, logs and commands."""

    type: str
    """`software`, `pkcs11`, `kmip` or `transit`: what else the table has, see below."""

    queue_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Operations that may wait in each worker process; more are refused with 429. What waits longer
    than `deadline_ms` is late anyway: a longer queue makes no KMI faster.
    """

    def share(self, index: int, workers: int) -> Self:
        """What of it one of several worker processes has; `index` from 0."""
        del index, workers
        return self

    def reach_all(self) -> Self:
        """With lanes enough that one goes to each token or address."""
        return self


class SoftwareSettings(KmiSettings):
    """The embedded KMI: an SQLite keyring, wrapped under a master key."""

    type: Literal["software"]
    keyring: ConfigPath
    """The SQLite file with the wrapped keys."""

    master_key: SecretSource = Field(default="master.key", validate_default=True)
    """32 bytes in Base64 or hex. Keep a copy elsewhere: without it no key can be used."""


class TokenSettings(Section):
    """A token, by its label or its serial number; a plain string is a label."""

    label: str | None = None
    """The token's label. A plain string instead of a table is a label, too."""

    serial: str | None = None
    """Its serial number, for tokens of one label."""

    @model_validator(mode="before")
    @classmethod
    def _string_is_label(cls, value: Any) -> Any:
        return {"label": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenSettings:
        if (self.label is None) == (self.serial is None):
            raise ValueError("give exactly one of label or serial")
        return self


class Sm4Settings(Section):
    """A vendor's numbers for SM4, which PKCS#11 v2.40 does not define."""

    key_type: int
    """The number of the key type, `CKK_…`."""

    key_gen: int
    """The number of the mechanism that makes keys, `CKM_…_KEY_GEN`."""

    gcm: int
    """The number of the mechanism for GCM, `CKM_…_GCM`."""


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class Pkcs11Settings(KmiSettings):
    """Keys in an HSM behind a PKCS#11 module."""

    type: Literal["pkcs11"]
    module: ConfigPath
    """The vendor's PKCS#11 library."""

    token: Annotated[
        tuple[TokenSettings, ...], BeforeValidator(_as_list), Field(min_length=1, max_length=16)
    ]
    """The token, or a list of tokens: several HSMs with the same keys, over which the lanes are
    spread. A lane that cannot be started at one is started at the next.
    """

    pin: SecretSource
    """The user PIN. A PIN that is refused is not tried again until the next start: tokens lock
    after a few.
    """

    lanes: Annotated[int, Field(ge=1, le=256)] = 2
    """Processes, each with a session of its own; keep the token's session limit in mind (commands
    take one more).
    """

    max_batch: Annotated[int, Field(ge=1, le=1024)] = 64
    """Operations that a lane takes in one go."""

    start_timeout_seconds: Seconds = 15
    """For loading the module and logging in."""

    operation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = 1000
    """A lane that says nothing for so long while it has work is replaced. Set it well above the
    slowest operation: a batch is answered in parts, each part begins the time anew. Below half of
    `deadline_ms` a hung lane's batch can still run again in time.
    """

    iv: Literal["generator", "hsm"] = "generator"
    """IVs from the token's random generator (drawn for many operations at once), or `hsm`: the
    module writes an IV of its own into the parameters of the mechanism. A module that does not is
    found out at the first encryption and refused.
    """

    sm4: Sm4Settings | None = None
    """The vendor's numbers for SM4, which PKCS#11 v2.40 does not define."""

    def share(self, index: int, workers: int) -> Self:
        """The lanes are divided: a token has so many sessions, however many processes there are."""
        first, lanes = _divide(self.lanes, index, workers)
        token = _from(self.token, first)
        return self.model_copy(update={"lanes": lanes, "token": token})

    def reach_all(self) -> Self:
        """See `KmiSettings.reach_all`."""
        return self.model_copy(update={"lanes": max(self.lanes, len(self.token))})


class KmipTlsSettings(ClientTlsSettings):
    """A KMIP server knows its clients by their certificates."""

    certificate: ConfigPath
    """PEM, with its chain: by it the server knows its client."""

    private_key: SecretSource
    """PEM without a passphrase; from a file or a credential."""


class KmipSettings(KmiSettings):
    """Keys in a key manager that speaks KMIP."""

    type: Literal["kmip"]
    address: Annotated[
        tuple[Address, ...], BeforeValidator(_as_addresses), Field(min_length=1, max_length=16)
    ]
    """The server, or a list: several servers with the same keys, over which the lanes are spread.
    A lane that cannot be started at one is started at the next.
    """

    tls: KmipTlsSettings
    """By these the server and the proxy know each other."""

    lanes: Annotated[int, Field(ge=1, le=256)] = 4
    """Connections, each with one message at a time."""

    max_batch: Annotated[int, Field(ge=1, le=1024)] = 64
    """Operations in a message."""

    connect_timeout_seconds: Seconds = 5
    """For connection and TLS handshake."""

    operation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = 1000
    """A connection without an answer for so long is replaced."""

    iv: Literal["generator", "server"] = "generator"
    """The proxy draws IVs; or `server`: the server does, as some must under FIPS 140."""

    random: Literal["server", "generator"] = "server"
    """Random bytes come from RNG Retrieve; or `generator`: from the proxy, for servers that lack
    it.
    """

    version: Literal["1.4", "2.0", "2.1"] | None = None
    """By default the best that both sides name in Discover Versions."""

    probe_key: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = None
    """A key that the check of health encrypts and decrypts with; without it the check asks whether
    the server answers.
    """

    def share(self, index: int, workers: int) -> Self:
        """The lanes are divided: a server takes so many connections."""
        first, lanes = _divide(self.lanes, index, workers)
        address = _from(self.address, first)
        return self.model_copy(update={"lanes": lanes, "address": address})

    def reach_all(self) -> Self:
        """See `KmiSettings.reach_all`."""
        return self.model_copy(update={"lanes": max(self.lanes, len(self.address))})


_MOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def _mount(value: str) -> str:
    value = value.strip("/")
    if not _MOUNT.fullmatch(value) or len(value) > 256:
        raise ValueError('write it as "transit" or "teams/a/transit"')
    return value


Mount = Annotated[
    str, AfterValidator(_mount), WithJsonSchema({"type": "string", "format": "mount path"})
]


def _namespace(value: str) -> str:
    return _mount(value) if value.strip("/") else ""


class AppRoleSettings(Section):
    """A login by role ID and secret ID."""

    role_id: Annotated[str, Field(min_length=1, max_length=4096)]
    """The role ID."""

    secret_id: SecretSource
    """The secret ID."""

    mount: Mount = "approle"
    """Where this kind of login is mounted."""


class CertificateLoginSettings(Section):
    """A login by the client certificate of the KMI's `tls`."""

    role: str = ""
    """The role; without it the server takes the one that fits."""

    mount: Mount = "cert"
    """Where this kind of login is mounted."""


class KubernetesSettings(Section):
    """A login by the token of a service account, which is read at every login."""

    role: Annotated[str, Field(min_length=1)]
    """The role."""

    jwt: ConfigPath = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    """The token of the service account; it is read at every login."""

    mount: Mount = "kubernetes"
    """Where this kind of login is mounted."""


class TransitAuthSettings(Section):
    """How the proxy gets its token: exactly one of these."""

    token: SecretSource | None = None
    """A token."""

    approle: AppRoleSettings | None = None
    """A login by role ID and secret ID."""

    cert: CertificateLoginSettings | None = None
    """A login by the certificate of `tls`."""

    kubernetes: KubernetesSettings | None = None
    """A login by the token of a service account."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if [self.token, self.approle, self.cert, self.kubernetes].count(None) != 3:
            raise ValueError("give exactly one of token, approle, cert or kubernetes")
        return self


_ORIGIN = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([0-9]{1,5}))?")


def _origin(value: str) -> str:
    match = _ORIGIN.fullmatch(value.rstrip("/"))
    if match is None or int(match[3] or 1) not in range(1, 65536):
        raise ValueError('write it as "https://bao.example.com:8200"')
    return value.rstrip("/")


Origin = Annotated[
    str, AfterValidator(_origin), WithJsonSchema({"type": "string", "format": "URL"})
]


class TransitSettings(KmiSettings):
    """Keys in the Transit secrets engine of OpenBao or HashiCorp Vault."""

    type: Literal["transit"]
    address: Annotated[
        tuple[Origin, ...],
        BeforeValidator(_as_addresses),
        Field(min_length=1, max_length=16),
    ]
    """`https://bao.internal:8200`, or a list: nodes of one cluster, over which the lanes are
    spread. A lane that cannot be started at one is started at the next.
    """

    mount: Mount = "transit"
    """Where the engine is mounted."""

    namespace: Annotated[
        str,
        AfterValidator(_namespace),
        WithJsonSchema({"type": "string", "format": "namespace path"}),
    ] = ""
    """Of Vault Enterprise or OpenBao."""

    auth: TransitAuthSettings
    """How the proxy gets its token: exactly one of these."""

    tls: ClientTlsSettings = ClientTlsSettings()
    """How the server and the proxy know each other."""

    plaintext: bool = False
    """HTTP, to loopback addresses only, as for an agent beside the proxy."""

    lanes: Annotated[int, Field(ge=1, le=256)] = 4
    """Batches on their way at a time."""

    # OpenBao takes 1,000 strings in a request; an operation has five.
    max_batch: Annotated[int, Field(ge=1, le=128)] = 64
    """Operations in a batch; one request for each key and kind of operation in it."""

    connections: Annotated[int, Field(ge=1, le=256)] = 16
    """Kept alive, for all lanes together."""

    start_timeout_seconds: Seconds = 15
    """For login and check."""

    operation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = 1000
    """A lane without an answer for so long is replaced; the answer for each key of a batch begins
    the time anew.
    """

    probe_key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None
    """A key that the check of health encrypts and decrypts with, also to see that associated data
    are authenticated; without it the check draws random bytes and looks at the server's version.
    """

    @model_validator(mode="after")
    def _tls_or_loopback(self) -> Self:
        for address in self.address:
            match = _ORIGIN.fullmatch(address)
            if match is None or (match[1] == "http") != self.plaintext:
                raise ValueError("plaintext = true goes with an address of http://, and only so")
            if self.plaintext and not is_loopback(match[2].strip("[]")):
                raise ValueError("plaintext = true is for loopback addresses only")
        if self.plaintext and self.tls != ClientTlsSettings():
            raise ValueError("plaintext = true and tls contradict each other")
        if self.auth.cert is not None and self.tls.certificate is None:
            raise ValueError("auth.cert needs tls.certificate and tls.private_key to log in with")
        return self

    def share(self, index: int, workers: int) -> Self:
        """The lanes are divided, so that the server sees as many whatever `workers` is."""
        first, lanes = _divide(self.lanes, index, workers)
        address = _from(self.address, first)
        return self.model_copy(update={"lanes": lanes, "address": address})

    def reach_all(self) -> Self:
        """See `KmiSettings.reach_all`."""
        return self.model_copy(update={"lanes": max(self.lanes, len(self.address))})


KMI_SETTINGS: dict[str, type[KmiSettings]] = {
    "software": SoftwareSettings,
    "pkcs11": Pkcs11Settings,
    "kmip": KmipSettings,
    "transit": TransitSettings,
}
"""The section model of each KMI type."""

_PATH_PREFIX = re.compile(r"(/[A-Za-z0-9_-]+)*")
_PROTOCOL_PATH = re.compile(r"/kms/(xk[is]/v1|ekm/v0)$")


def _path_prefix(value: str) -> str:
    if not _PATH_PREFIX.fullmatch(value) or len(value) > 100:
        raise ValueError('write it as "/name" (letters, digits, - and _), or "" for none')
    if found := _PROTOCOL_PATH.search(value):
        raise ValueError(f'{found[0]} is added by the protocol: write "{value[: found.start()]}"')
    return value


_KEY_PATTERN = re.compile(r"[A-Za-z0-9._*-]{1,128}")


def _key_pattern(value: str) -> str:
    if not _KEY_PATTERN.fullmatch(value):
        raise ValueError('write a key ID such as "cards", or with * for any characters: "cards-*"')
    return value


KeyPattern = Annotated[
    str,
    AfterValidator(_key_pattern),
    WithJsonSchema({"type": "string", "pattern": _KEY_PATTERN.pattern}),
]


def _not_without_keys(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if value == ():
        raise ValueError("admits no key; leave it out to admit all")
    return value


def _not_without_reasons(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if value == ():
        raise ValueError("admits no reason; leave it out to admit all")
    return value


def _network(value: Any) -> Network:
    try:
        return ipaddress.ip_network(str(value))
    except ValueError as error:
        raise ValueError(f'{error}; write it as "203.0.113.0/24" or "2001:db8::/32"') from None


def _not_empty(value: tuple[Network, ...] | None) -> tuple[Network, ...] | None:
    if value == ():
        raise ValueError("admits nobody; leave it out to admit all")
    return value


class Rate(Section):
    """So many requests a second, and so many at once (default: what comes in a second)."""

    rate: Annotated[float, Field(gt=0, le=1_000_000)]
    """Requests a second."""

    burst: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Requests at once; without it those of a second."""


class QuotaSettings(Section):
    """Limits of requests: of all, of each key, of each principal."""

    all: Rate | None = None
    """Of all requests together."""

    key: Rate | None = None
    """Of the requests for each key."""

    principal: Rate | None = None
    """Of the requests of each principal."""


_SERVICE_ACCOUNT = re.compile(r"[A-Za-z0-9._-]+@[A-Za-z0-9.-]+")
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = rf"{_LABEL}(\.{_LABEL})*"
_AUDIENCE = re.compile(rf"https://{_HOST_NAME}")
_GOOGLE_KEYS = "https://www.googleapis.com/oauth2/v3/certs"
_KEYS_URL = re.compile(rf"https://(\[[0-9A-Fa-f:.]+\]|{_HOST_NAME})(:[1-9][0-9]{{0,4}})?/[!-~]*")


def _service_account(value: str) -> str:
    if not _SERVICE_ACCOUNT.fullmatch(value):
        raise ValueError('write it as "service-123456789012@gcp-sa-ekms.iam.gserviceaccount.com"')
    return value


def _audience(value: str) -> str:
    if not _AUDIENCE.fullmatch(value) or value != value.lower():
        raise ValueError('write it as "https://proxy.example.com": the host of the key URIs')
    return value


def _keys_url(value: str) -> str:
    if not _KEYS_URL.fullmatch(value):
        raise ValueError(f'write it as "{_GOOGLE_KEYS}"')
    return value


class GoogleSettings(Section):
    """How Google's tokens are verified: `ekm` has these in place of credentials."""

    service_accounts: Annotated[
        tuple[
            Annotated[
                str,
                AfterValidator(_service_account),
                WithJsonSchema({"type": "string", "format": "e-mail address"}),
            ],
            ...,
        ],
        Field(min_length=1),
    ]
    """Who may ask: `service-<project number>@gcp-sa-ekms.iam.gserviceaccount.com`, the Cloud EKM
    service agent of each project.
    """

    audience: Annotated[
        str,
        AfterValidator(_audience),
        WithJsonSchema({"type": "string", "format": "https:// and a host"}),
    ]
    """For whom tokens are made out: `https://` and the host of the key URIs."""

    keys: ConfigPath | None = None
    """A JWK Set with Google's public keys, for a proxy that cannot fetch them. It is read at the
    start and at a reload; Google changes its keys within days. Without it they are fetched.
    """

    keys_url: Annotated[
        str,
        AfterValidator(_keys_url),
        WithJsonSchema({"type": "string", "format": "URL"}),
    ] = _GOOGLE_KEYS
    """Where Google's public keys are fetched."""

    tls: ClientTlsSettings = ClientTlsSettings()
    """How the server of `keys_url` proves who it is."""

    allowed_reasons: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")], ...] | None,
        AfterValidator(_not_without_reasons),
    ] = None
    """Only these Key Access Justifications may ask ([protocols/ekm.md](protocols/ekm.md)):
    `["CUSTOMER_INITIATED_ACCESS", "GOOGLE_INITIATED_SYSTEM_OPERATION"]`; others get a 403. Without
    it all may. Google says none for a project without Key Access Justifications: then it refuses
    all.
    """

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> Self:
        if self.keys is not None and self.model_fields_set & {"keys_url", "tls"}:
            raise ValueError("keys goes without keys_url and tls: keys are read or fetched")
        if self.tls.server_name:
            raise ValueError("tls.server_name is not possible here: use the certificate's name")
        return self


class KeystoreSettings(Section):
    """One tenant: a path prefix, a protocol, credentials and the KMIs that hold its keys."""

    name: Name
    """Lower-case letters, digits, `-`, `_`; it stands in metrics, logs and commands."""

    protocol: Literal["xki", "xks", "ekm"]
    """`xki` (Alibaba Cloud), `xks` (AWS), `ekm` (Google Cloud)."""

    path_prefix: Annotated[
        str,
        AfterValidator(_path_prefix),
        WithJsonSchema({"type": "string", "pattern": _PATH_PREFIX.pattern, "maxLength": 100}),
    ]
    """`/name`, or `""`; what the cloud is told is this and `/kms/xki/v1`, `/kms/xks/v1` or
    `/kms/ekm/v0`.
    """

    kmi: Annotated[tuple[Name, ...], Field(min_length=1)]
    """The KMIs that hold its keys, in order of preference: the next takes over when one is away
    (below).
    """

    keys: Annotated[tuple[KeyPattern, ...] | None, AfterValidator(_not_without_keys)] = None
    """Only these keys of the KMIs may be used: `["payroll-*", "cards"]`. A `*` stands for any
    characters or none, everything else for itself, and the whole ID must match, in the same case.
    Any other key is answered as one that does not exist. Without it all keys may be used.
    """

    disabled_keys: tuple[KeyPattern, ...] = ()
    """These keys are DISABLED here, written as in `keys`, whatever the catalog says: for several
    hosts that get one configuration. It holds from the next reload on.
    """

    credentials: SecretSource | None = Field(default=None, validate_default=True)
    """`xki` and `xks`, which need it: a TOML list of `[[credential]]` with `access_key_id`,
    `access_key_secret`, `created`; all work at once.
    """

    google: GoogleSettings | None = Field(default=None, validate_default=True)
    """`ekm`, which needs it: how Google's tokens are verified (below)."""

    ciphertext_format: CiphertextFormat = CiphertextFormat.ENVELOPE
    """`raw` to read what another proxy wrote with the same key; its keys cannot be rotated."""

    deadline_ms: Annotated[int, Field(ge=1, le=60_000)] = 250
    """From a request's arrival; then it is answered with 504."""

    hedge_after_ms: Annotated[int, Field(ge=1, le=60_000)] | None = None
    """With several KMIs: a request without an answer for so long is sent to the second too, and the
    first answer counts. At most half of `deadline_ms`.
    """

    disable_output_form_plain: bool = False
    """`xki`: give out no random bytes in plain."""

    policies: ConfigPath | None = None
    """A folder of Cedar policies ([authorization.md](authorization.md)); without it all that is
    signed may.
    """

    quota: QuotaSettings = QuotaSettings()
    """How much is admitted; more is refused with 429 (below)."""

    source_networks: Annotated[
        tuple[Annotated[Network, BeforeValidator(_network)], ...] | None, AfterValidator(_not_empty)
    ] = None
    """Only clients from there are served: `["203.0.113.0/24", "2001:db8::/32"]`."""

    @field_validator("credentials")
    @classmethod
    def _secret_in_common(
        cls, value: SecretSource | None, info: ValidationInfo
    ) -> SecretSource | None:
        protocol = info.data.get("protocol")  # a wrong one is said where it stands
        if protocol in {"xki", "xks"} and value is None:
            raise ValueError("is missing: the cloud signs its requests with a credential of it")
        if protocol == "ekm" and value is not None:
            raise ValueError("is not for ekm: Google signs with keys of its own; remove it")
        return value

    @field_validator("google")
    @classmethod
    def _tokens_of_google(
        cls, value: GoogleSettings | None, info: ValidationInfo
    ) -> GoogleSettings | None:
        protocol = info.data.get("protocol")
        if protocol == "ekm" and value is None:
            raise ValueError("is missing: say whose tokens are good, in [keystore.google]")
        if protocol in {"xki", "xks"} and value is not None:
            raise ValueError(f"is not for {protocol}, which has credentials; remove it")
        return value

    @model_validator(mode="after")
    def _hedge_to_another(self) -> Self:
        if self.hedge_after_ms is not None and len(self.kmi) < 2:
            raise ValueError("hedge_after_ms needs a second KMI to ask")
        if self.hedge_after_ms is not None and 2 * self.hedge_after_ms > self.deadline_ms:
            raise ValueError("hedge_after_ms is over half of deadline_ms: the second has no time")
        return self


class CatalogSettings(Section):
    """Where the states of keys are kept."""

    path: ConfigPath = Field(default="catalog.db", validate_default=True)
    """The SQLite file with the states of keys."""


class SinkSettings(Section):
    """What every place has that takes audit records beside the file."""

    buffer_bytes: Annotated[int, Field(ge=64 << 10, le=64 << 20)] = 1 << 20
    """What may wait while the other side takes nothing, and what is sent again over a new
    connection.
    """

    stall_timeout_seconds: Seconds = 10
    """After so long without progress the sink counts as broken."""


class SyslogSettings(SinkSettings):
    """A syslog server: RFC 5424 over TLS or TCP."""

    type: Literal["syslog"]
    """RFC 5424 over TLS (RFC 5425) or TCP with octet counting (RFC 6587)."""

    name: Name = "syslog"
    """In `/status`, metrics and `audit verify --sink`."""

    address: Address
    """The server."""

    tls: ClientTlsSettings | None = None
    """How the server and the proxy know each other. The files are read again for each connection.
    """

    plaintext: bool = False
    """Must be `true` for a server elsewhere without `tls`: the records name keys and principals."""

    facility: Facility = "local0"
    """As RFC 5424 names them; the severity is informational."""

    app_name: Annotated[str, Field(pattern=r"^[!-~]{1,48}$")] = "xkiproxy"
    """APP-NAME. PROCID is the name of the chain (`audit`, or `audit-1` of the first worker), MSGID
    is `audit`.
    """

    connect_timeout_seconds: Seconds = 5
    """For connection and TLS handshake."""

    @model_validator(mode="after")
    def _tls_or_said(self) -> Self:
        if self.tls is not None and self.plaintext:
            raise ValueError("plaintext = true and tls contradict each other")
        is_near = is_loopback(split_address(self.address)[0])
        if self.tls is None and not self.plaintext and not is_near:
            raise ValueError("tls is missing; for records in the clear say plaintext = true")
        return self


class StdoutSettings(SinkSettings):
    """Standard output, a line a record."""

    type: Literal["stdout"]
    """A line a record, with `workers = 1` only."""

    name: Name = "stdout"
    """In `/status`, metrics and `audit verify --sink`."""


_MIN_AUDIT_BYTES = 64 << 10


class AuditSettings(Section):
    """Where the audit log is written, when a file is closed, and where its records go besides."""

    path: ConfigPath = Field(default="audit.jsonl", validate_default=True)
    """One JSON object a line, chained by hashes ([audit.md](audit.md)); its folder must be writable
    too.
    """

    max_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    """A file that would grow over it is closed; at least 65536, 0 for no limit."""

    max_age_hours: Annotated[float, Field(ge=0, le=24 * 366)] = 24
    """A file that is older is closed; 0 for no limit."""

    fsync: bool = False
    """Records reach the disk, not only the operating system, before the answer leaves: one
    `fdatasync` a group of requests.
    """

    hmac_key: SecretSource | None = None
    """32 bytes in Base64 or hex, used for nothing else. Closed files get an HMAC; without it they
    get none.
    """

    refusals_per_second: Annotated[int, Field(ge=1, le=100_000)] = 50
    """Records of requests that nobody has signed, for each worker; ten seconds' worth at once. What
    is more is counted in one record a second ([audit.md](audit.md#format)).
    """

    required: Literal["all", "any"] = "all"
    """Whether `all` places must take a record before the answer leaves, or `any` of them is enough.
    """

    sink: tuple[Annotated[SyslogSettings | StdoutSettings, Field(discriminator="type")], ...] = ()
    """Further places."""

    @field_validator("sink")
    @classmethod
    def _names_differ(
        cls, value: tuple[SyslogSettings | StdoutSettings, ...]
    ) -> tuple[SyslogSettings | StdoutSettings, ...]:
        names = ["file", *(sink.name for sink in value)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sinks have the name {name!r}: give one another name")
        return value

    @field_validator("max_bytes")
    @classmethod
    def _none_or_enough(cls, value: int) -> int:
        if 0 < value < _MIN_AUDIT_BYTES:
            raise ValueError(f"must be 0 (no limit) or at least {_MIN_AUDIT_BYTES}")
        return value


class LogSettings(Section):
    """The operator's log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is written."""

    format: Literal["text", "json"] = "text"
    """For people or for programs; to standard error."""


_TRACES_URL = re.compile(_ORIGIN.pattern + r"(/[!-~]*)")


def _traces_url(value: str) -> str:
    if _TRACES_URL.fullmatch(value) is None:
        raise ValueError('write it as "https://collector.example.com:4318/v1/traces"')
    return value


class TracingSettings(Section):
    """OpenTelemetry traces of a sample of requests."""

    endpoint: Annotated[str, AfterValidator(_traces_url)]
    """Where spans are sent to by OTLP over HTTP (protobuf, gzip): the whole URL of a collector."""

    sample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.001
    """Of how many requests: 1 for all, 0.001 for one in a thousand."""

    headers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")], SecretSource] = {}
    """What the collector wants beside, such as `{ Authorization = { file = "otlp.token" } }`; the
    values are secrets.
    """

    tls: ClientTlsSettings = ClientTlsSettings()
    """How the collector proves who it is, and the proxy to it."""

    plaintext: bool = False
    """For an address of `http://`, on this machine only."""

    service_name: str = "xkiproxy"
    """The `service.name` of the resource."""

    timeout_seconds: Seconds = 10
    """For each message to the collector, with its repetitions."""

    @model_validator(mode="after")
    def _tls_or_loopback(self) -> Self:
        match = _TRACES_URL.fullmatch(self.endpoint)
        if match is None or (match[1] == "http") != self.plaintext:
            raise ValueError("plaintext = true goes with an endpoint of http://, and only so")
        if self.plaintext and not is_loopback(match[2].strip("[]")):
            raise ValueError("plaintext = true is for loopback addresses only")
        if self.tls.server_name:
            raise ValueError("tls.server_name is not possible here: use the certificate's name")
        return self


class Config(Section):
    """The whole file, and where it is."""

    path: Path
    server: ServerSettings
    kmi: tuple[SerializeAsAny[KmiSettings], ...]
    keystore: tuple[KeystoreSettings, ...]
    catalog: CatalogSettings
    audit: AuditSettings
    log: LogSettings
    tracing: TracingSettings | None = None

    def share(self, index: int) -> Config:
        """The configuration of one of several worker processes; `index` from 0.

        Each writes an audit log of its own: `audit.jsonl` becomes `audit-1.jsonl` and so on.
        """
        path = self.audit.path
        own = path.with_name(f"{path.stem}-{index + 1}{path.suffix}")
        audit = self.audit.model_copy(update={"path": own})
        kmis = tuple(kmi.share(index, self.server.workers) for kmi in self.kmi)
        return self.model_copy(update={"audit": audit, "kmi": kmis})

    def reach_all(self) -> Config:
        """The configuration with lanes enough that each token and address of a KMI has one."""
        return self.model_copy(update={"kmi": tuple(kmi.reach_all() for kmi in self.kmi)})

    def find_kmi(self, name: str) -> KmiSettings:
        """The section of a KMI; raises KeyError."""
        return {kmi.name: kmi for kmi in self.kmi}[name]
