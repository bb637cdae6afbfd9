"""The shape of xkiproxy.toml. Unknown keys are errors; every default is safe to run with."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
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


Address = Annotated[str, AfterValidator(_host_and_port)]
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
    private_key: SecretSource
    client_ca: ConfigPath | None = None
    client_names: tuple[str, ...] = ()

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
    timeout_seconds: Seconds = 5


class ServerSettings(Section):
    """Listeners and the limits of a connection."""

    listen: Address = "0.0.0.0:8443"
    admin_listen: Address = "127.0.0.1:9464"
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    tls: TlsSettings | None = None
    plaintext: bool = False
    proxy_protocol: ProxyProtocolSettings | None = None
    # Of each worker. A thousand clients that all wait for an answer wait some 60 ms; and libuv,
    # which takes 1,024 events at a time, gives nothing else its turn while there are so many.
    max_connections: Annotated[int, Field(ge=1, le=1000)] = 1000
    max_body_bytes: Annotated[int, Field(ge=1024, le=16 << 20)] = 64 << 10
    handshake_timeout_seconds: Seconds = 10
    header_timeout_seconds: Seconds = 10
    body_timeout_seconds: Seconds = 10
    idle_timeout_seconds: Seconds = 75
    shutdown_timeout_seconds: Seconds = 15

    @model_validator(mode="after")
    def _tls_or_loopback(self) -> ServerSettings:
        if self.tls is None and not self.plaintext:
            raise ValueError("[server.tls] is missing (certificate, private_key)")
        if self.tls is not None and self.plaintext:
            raise ValueError("plaintext = true and [server.tls] contradict each other")
        if self.plaintext and not _is_loopback(split_address(self.listen)[0]):
            raise ValueError("plaintext = true is for loopback addresses only")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ClientTlsSettings(Section):
    """How a server that we connect to proves who it is, and the proxy to it."""

    ca: ConfigPath | None = None
    certificate: ConfigPath | None = None
    private_key: SecretSource | None = None
    server_name: str = ""

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key belong together")
        if self.private_key is not None and self.private_key.env is not None:
            raise ValueError("private_key must come from a file or a credential")
        return self


class KmiSettings(Section):
    """What every kind of KMI has."""

    name: Name
    type: str
    queue_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1024

    def share(self, index: int, workers: int) -> Self:
        """What of it one of several worker processes has; `index` from 0."""
        del index, workers
        return self


class SoftwareSettings(KmiSettings):
    """The embedded KMI: an SQLite keyring, wrapped under a master key."""

    type: Literal["software"]
    keyring: ConfigPath
    master_key: SecretSource = Field(default="master.key", validate_default=True)


class TokenSettings(Section):
    """A token, by its label or its serial number; a plain string is a label."""

    label: str | None = None
    serial: str | None = None

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
    key_gen: int
    gcm: int


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class Pkcs11Settings(KmiSettings):
    """Keys in an HSM behind a PKCS#11 module."""

    type: Literal["pkcs11"]
    module: ConfigPath
    token: Annotated[
        tuple[TokenSettings, ...], BeforeValidator(_as_list), Field(min_length=1, max_length=16)
    ]
    pin: SecretSource
    lanes: Annotated[int, Field(ge=1, le=256)] = 2
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 64
    start_timeout_seconds: Seconds = 15
    operation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = 1000
    iv: Literal["generator", "hsm"] = "generator"
    sm4: Sm4Settings | None = None

    def share(self, index: int, workers: int) -> Self:
        """The lanes are divided: a token has so many sessions, however many processes there are."""
        lanes = self.lanes // workers + (index < self.lanes % workers)
        return self.model_copy(update={"lanes": lanes})


class KmipTlsSettings(ClientTlsSettings):
    """A KMIP server knows its clients by their certificates."""

    certificate: ConfigPath
    private_key: SecretSource


class KmipSettings(KmiSettings):
    """Keys in a key manager that speaks KMIP."""

    type: Literal["kmip"]
    address: Annotated[
        tuple[Address, ...], BeforeValidator(_as_addresses), Field(min_length=1, max_length=16)
    ]
    tls: KmipTlsSettings
    lanes: Annotated[int, Field(ge=1, le=256)] = 4
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 64
    connect_timeout_seconds: Seconds = 5
    operation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = 1000
    iv: Literal["generator", "server"] = "generator"
    random: Literal["server", "generator"] = "server"
    version: Literal["1.4", "2.0", "2.1"] | None = None

    def share(self, index: int, workers: int) -> Self:
        """The lanes are divided: a server takes so many connections."""
        lanes = self.lanes // workers + (index < self.lanes % workers)
        return self.model_copy(update={"lanes": lanes})


_MOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def _mount(value: str) -> str:
    value = value.strip("/")
    if not _MOUNT.fullmatch(value) or len(value) > 256:
        raise ValueError('write it as "transit" or "teams/a/transit"')
    return value


Mount = Annotated[str, AfterValidator(_mount)]


def _namespace(value: str) -> str:
    return _mount(value) if value.strip("/") else ""


class AppRoleSettings(Section):
    """A login by role ID and secret ID."""

    role_id: Annotated[str, Field(min_length=1, max_length=4096)]
    secret_id: SecretSource
    mount: Mount = "approle"


class CertificateLoginSettings(Section):
    """A login by the client certificate of the KMI's `tls`."""

    role: str = ""
    mount: Mount = "cert"


class KubernetesSettings(Section):
    """A login by the token of a service account, which is read at every login."""

    role: Annotated[str, Field(min_length=1)]
    jwt: ConfigPath = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    mount: Mount = "kubernetes"


class TransitAuthSettings(Section):
    """How the proxy gets its token: exactly one of these."""

    token: SecretSource | None = None
    approle: AppRoleSettings | None = None
    cert: CertificateLoginSettings | None = None
    kubernetes: KubernetesSettings | None = None

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


class TransitSettings(KmiSettings):
    """Keys in the Transit secrets engine of OpenBao or HashiCorp Vault."""

    type: Literal["transit"]
    address: Annotated[
        tuple[Annotated[str, AfterValidator(_origin)], ...],
        BeforeValidator(_as_addresses),
        Field(min_length=1, max_length=16),
    ]
    mount: Mount = "transit"
    namespace: Annotated[str, AfterValidator(_namespace)] = ""
    auth: TransitAuthSettings
    tls: ClientTlsSettings = ClientTlsSettings()
    plaintext: bool = False
    lanes: Annotated[int, Field(ge=1, le=256)] = 4
    # OpenBao takes 1,000 strings in a request; an operation has five.
    max_batch: Annotated[int, Field(ge=1, le=128)] = 64
    connections: Annotated[int, Field(ge=1, le=256)] = 16
    start_timeout_seconds: Seconds = 15
    operation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = 1000
    probe_key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None

    @model_validator(mode="after")
    def _tls_or_loopback(self) -> Self:
        for address in self.address:
            match = _ORIGIN.fullmatch(address)
            if match is None or (match[1] == "http") != self.plaintext:
                raise ValueError("plaintext = true goes with an address of http://, and only so")
            if self.plaintext and not _is_loopback(match[2].strip("[]")):
                raise ValueError("plaintext = true is for loopback addresses only")
        if self.plaintext and self.tls != ClientTlsSettings():
            raise ValueError("plaintext = true and tls contradict each other")
        if self.auth.cert is not None and self.tls.certificate is None:
            raise ValueError("auth.cert needs tls.certificate and tls.private_key to log in with")
        return self

    def share(self, index: int, workers: int) -> Self:
        """The lanes are divided, so that the server sees as many whatever `workers` is."""
        lanes = self.lanes // workers + (index < self.lanes % workers)
        return self.model_copy(update={"lanes": lanes})


KMI_SETTINGS: dict[str, type[KmiSettings]] = {
    "software": SoftwareSettings,
    "pkcs11": Pkcs11Settings,
    "kmip": KmipSettings,
    "transit": TransitSettings,
}
"""The section model of each KMI type."""

_PATH_PREFIX = re.compile(r"(/[A-Za-z0-9_-]+)*")


def _path_prefix(value: str) -> str:
    if not _PATH_PREFIX.fullmatch(value) or len(value) > 100:
        raise ValueError('write it as "/name" (letters, digits, - and _), or "" for none')
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
    burst: Annotated[int, Field(ge=1, le=10_000_000)] | None = None


class QuotaSettings(Section):
    """Limits of requests: of all, of each key, of each principal."""

    all: Rate | None = None
    key: Rate | None = None
    principal: Rate | None = None


class KeystoreSettings(Section):
    """One tenant: a path prefix, a protocol, credentials and the KMIs that hold its keys."""

    name: Name
    protocol: Literal["xki", "xks"]
    path_prefix: Annotated[str, AfterValidator(_path_prefix)]
    kmi: Annotated[tuple[Name, ...], Field(min_length=1)]
    credentials: SecretSource
    ciphertext_format: CiphertextFormat = CiphertextFormat.ENVELOPE
    deadline_ms: Annotated[int, Field(ge=1, le=60_000)] = 250
    hedge_after_ms: Annotated[int, Field(ge=1, le=60_000)] | None = None
    disable_output_form_plain: bool = False
    policies: ConfigPath | None = None
    quota: QuotaSettings = QuotaSettings()
    source_networks: Annotated[
        tuple[Annotated[Network, BeforeValidator(_network)], ...] | None, AfterValidator(_not_empty)
    ] = None

    @model_validator(mode="after")
    def _hedge_to_another(self) -> Self:
        if self.hedge_after_ms is not None and len(self.kmi) < 2:
            raise ValueError("hedge_after_ms needs a second KMI to ask")
        return self


class CatalogSettings(Section):
    """Where the states of keys are kept."""

    path: ConfigPath = Field(default="catalog.db", validate_default=True)


class SinkSettings(Section):
    """What every place has that takes audit records beside the file."""

    buffer_bytes: Annotated[int, Field(ge=64 << 10, le=64 << 20)] = 1 << 20
    stall_timeout_seconds: Seconds = 10


class SyslogSettings(SinkSettings):
    """A syslog server: RFC 5424 over TLS or TCP."""

    type: Literal["syslog"]
    name: Name = "syslog"
    address: Address
    tls: ClientTlsSettings | None = None
    plaintext: bool = False
    facility: Facility = "local0"
    app_name: Annotated[str, Field(pattern=r"^[!-~]{1,48}$")] = "xkiproxy"
    connect_timeout_seconds: Seconds = 5

    @model_validator(mode="after")
    def _tls_or_said(self) -> Self:
        if self.tls is not None and self.plaintext:
            raise ValueError("plaintext = true and tls contradict each other")
        is_near = _is_loopback(split_address(self.address)[0])
        if self.tls is None and not self.plaintext and not is_near:
            raise ValueError("tls is missing; for records in the clear say plaintext = true")
        return self


class StdoutSettings(SinkSettings):
    """Standard output, a line a record."""

    type: Literal["stdout"]
    name: Name = "stdout"


_MIN_AUDIT_BYTES = 64 << 10


class AuditSettings(Section):
    """Where the audit log is written, when a file is closed, and where its records go besides."""

    path: ConfigPath = Field(default="audit.jsonl", validate_default=True)
    max_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    max_age_hours: Annotated[float, Field(ge=0, le=24 * 366)] = 24
    fsync: bool = False
    hmac_key: SecretSource | None = None
    refusals_per_second: Annotated[int, Field(ge=1, le=100_000)] = 50
    required: Literal["all", "any"] = "all"
    sink: tuple[Annotated[SyslogSettings | StdoutSettings, Field(discriminator="type")], ...] = ()

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
    format: Literal["text", "json"] = "text"


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
    values are secrets."""
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
        if self.plaintext and not _is_loopback(match[2].strip("[]")):
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

    def find_kmi(self, name: str) -> KmiSettings:
        """The section of a KMI; raises KeyError."""
        return {kmi.name: kmi for kmi in self.kmi}[name]
