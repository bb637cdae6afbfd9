"""What the files of a configuration hold, read in one go before anything is made of it.

Reading is a step of its own because a server may be several processes: one of them reads, and all
go by what it has read. So they cannot differ, though files are edited meanwhile, and a worker that
is replaced gets what was accepted last, whatever is in the files by then.

Not among it is what lies between the proxy and those it connects to (certificates, tokens of
Transit): that is read when it is used, by whichever process uses it, since others renew it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from xkiproxy.config import Config, load_config, parse_config, read_document
from xkiproxy.config.models import KeystoreSettings, Pkcs11Settings, SoftwareSettings
from xkiproxy.config.secrets import SecretError, SecretSource
from xkiproxy.config.tls import TlsError, TlsFiles, read_tls
from xkiproxy.keystores.policies import PolicyError, read_policies

_TLS = "server.tls"


class ContentsError(Exception):
    """A file could not be read; the text names it and says why."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)


class StoreFiles(_Read):
    """The files of a key store."""

    credentials: str | None = Field(repr=False)
    """None where the protocol has none."""
    token_keys: str | None = None
    """The public keys of who signs tokens; None where they are fetched, or there are no tokens."""
    policies: dict[str, str] | None
    """The text of each policy file by its name; None where there are no policies."""


class Contents(_Read):
    """What a reload may exchange, as it was in the files."""

    tls: TlsFiles | None
    stores: dict[str, StoreFiles]
    """By the key store's name."""
    errors: dict[str, str]
    """Why a part could not be read: each is said where the part is opened."""

    def of_tls(self) -> TlsFiles:
        """The files of the listener's TLS; raises ContentsError."""
        if self.tls is None:
            raise ContentsError(self.errors[_TLS])
        return self.tls

    def of_store(self, name: str) -> StoreFiles:
        """The files of a key store; raises ContentsError."""
        if name not in self.stores:
            raise ContentsError(self.errors[name])
        return self.stores[name]


class Handout(_Read):
    """All that a worker process goes by, instead of files."""

    path: Path
    document: str
    """The text of xkiproxy.toml; no secret stands in it."""
    contents: Contents
    secrets: dict[str, str] = Field(default={}, repr=False)
    """What `read_secrets` has found."""

    def config(self) -> Config:
        """The configuration; raises ConfigError."""
        return parse_config(self.path, self.document)

    def line(self) -> bytes:
        """As it is written into a worker's channel."""
        return self.model_dump_json().encode()


def read_handout(path: Path) -> Handout:
    """Read the configuration with all that it names; raises ConfigError if itself is wrong."""
    document = read_document(path)
    return Handout(
        path=path, document=document, contents=read_contents(parse_config(path, document))
    )


def read_anew(path: Path) -> tuple[Config, Contents]:
    """The same for a server that is one process."""
    config = load_config(path)
    return config, read_contents(config)


def read_contents(config: Config) -> Contents:
    """Read what a configuration names; what cannot be read is among the `errors`."""
    errors: dict[str, str] = {}
    tls = None
    stores = {}
    if config.server.tls is not None:
        try:
            tls = read_tls(config.server.tls)
        except (SecretError, TlsError) as error:
            errors[_TLS] = str(error)
    for settings in config.keystore:
        try:
            stores[settings.name] = _read_store(settings)
        except (ContentsError, PolicyError, SecretError) as error:
            errors[settings.name] = str(error)
    return Contents(tls=tls, stores=stores, errors=errors)


def _read_store(settings: KeystoreSettings) -> StoreFiles:
    source = settings.credentials
    file = None if source is None else source.file
    if file is not None and _is_missing(file):
        raise SecretError(
            f"{file}: there is no such file; make it, with a credential, by:"
            f" xkiproxy credentials add --keystore {settings.name}"
        )
    return StoreFiles(
        credentials=None if source is None else source.read(),
        token_keys=_read_token_keys(settings),
        policies=None if settings.policies is None else read_policies(settings.policies),
    )


def _read_token_keys(settings: KeystoreSettings) -> str | None:
    if settings.google is None or settings.google.keys is None:
        return None
    file = settings.google.keys
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ContentsError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ContentsError(f"{file}: is not UTF-8 text") from None


def _is_missing(file: Path) -> bool:
    try:
        file.stat()
    except FileNotFoundError:
        return True
    except OSError:
        pass  # it may be there: whoever reads it says what is wrong
    return False


def read_secrets(config: Config) -> dict[str, str]:
    """The secrets that a server goes by from its start to its end, by the text of their source."""
    found = {}
    for source in _lasting_secrets(config):
        with suppress(SecretError):  # whoever needs it meets the same error, and says its place
            found[str(source)] = source.read()
    return found


def _lasting_secrets(config: Config) -> Iterator[SecretSource]:
    for kmi in config.kmi:
        if isinstance(kmi, SoftwareSettings):
            yield kmi.master_key
        elif isinstance(kmi, Pkcs11Settings):
            yield kmi.pin
    if config.audit.hmac_key is not None:
        yield config.audit.hmac_key
    if config.tracing is not None:
        yield from config.tracing.headers.values()
