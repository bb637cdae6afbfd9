"""`xkiproxy conformance`: does a proxy, ours or another's, keep to its protocol."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import orjson
import typer
import uvloop
from rich.console import Console

from xkiproxy.cli.call import SECRET_VARIABLE
from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    CommandError,
    ConfigOption,
    JsonOption,
    err,
    out,
    print_json,
    print_table,
)
from xkiproxy.cli.credentials import KeystoreOption, credentials_source, pick_keystore
from xkiproxy.cli.fingerprint import fingerprints, load_certificates
from xkiproxy.cli.http import Endpoint, listening_endpoint, parse_endpoint
from xkiproxy.config import load_config
from xkiproxy.config.secrets import SecretSource
from xkiproxy.conformance import report
from xkiproxy.conformance.case import Case, CaseResult, Outcome
from xkiproxy.conformance.probe import Subject
from xkiproxy.conformance.runner import greet, run, select, wires
from xkiproxy.conformance.wire import Credential, Unmet, Wire
from xkiproxy.keystores.credentials import load_credentials

_WIRES = {wire.name: wire for wire in wires()}
_STYLES = {Outcome.PASS: "green", Outcome.FAIL: "bold red", Outcome.SKIP: "yellow"}

UrlArgument = Annotated[
    str,
    typer.Argument(
        help="Of the proxy and its path, up to /kms/xki/v1 or /kms/xks/v1. Default: the key store"
        " of the configuration, with its credentials and its certificate.",
        metavar="[URL]",
        show_default=False,
    ),
]


def conformance(
    url: UrlArgument = "",
    key: Annotated[str, typer.Option(help="A key that may do everything.", metavar="KEY")] = "",
    encrypt_only_key: Annotated[
        str, typer.Option(help="That may not decrypt.", metavar="KEY")
    ] = "",
    decrypt_only_key: Annotated[
        str, typer.Option(help="That may not encrypt.", metavar="KEY")
    ] = "",
    disabled_key: Annotated[str, typer.Option(help="A disabled key.", metavar="KEY")] = "",
    missing_key: Annotated[
        str, typer.Option(help="A key that is not there; default: a random ID.", metavar="KEY")
    ] = "",
    credentials: Annotated[
        Path | None,
        typer.Option(help="A credentials file; of two, both are tried.", metavar="FILE"),
    ] = None,
    access_key_id: Annotated[str, typer.Option(help="Or a single credential.", metavar="ID")] = "",
    secret_file: Annotated[
        Path | None,
        typer.Option(help=f"Holds its secret; or set ${SECRET_VARIABLE}.", metavar="FILE"),
    ] = None,
    region: Annotated[str, typer.Option(help="The region that is signed.")] = "",
    ca: Annotated[
        Path | None, typer.Option(help="Trust the CA certificates of this file.", metavar="FILE")
    ] = None,
    fingerprint: Annotated[
        str, typer.Option(help="Trust only this certificate.", metavar="sha256-HEX")
    ] = "",
    client_certificate: Annotated[
        Path | None, typer.Option(help="For mTLS: PEM, certificate and key.", metavar="FILE")
    ] = None,
    deadline_ms: Annotated[float, typer.Option(help="How long the cloud waits.", min=0.001)] = 250,
    latency_requests: Annotated[int, typer.Option(help="To measure with.", min=16)] = 200,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Cases by a pattern, such as 'gcm.*'; repeatable.", metavar="PATTERN"),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the cases, run none.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.", metavar="FILE")] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON.", metavar="FILE")] = None,
    keystore: KeystoreOption = "",
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Test any XKI or XKS proxy against its protocol's requirements; status 1 if one is not met.

    It encrypts and decrypts test data and sends wrong requests; it changes no key.

    Example: xkiproxy conformance https://proxy.example.com/demo/kms/xks/v1 --key test
    --credentials demo.toml --ca ca.crt

    A running proxy of this machine: xkiproxy conformance --key demo-key
    """
    if ca is not None and fingerprint:
        raise typer.BadParameter("give one of --ca and --fingerprint")
    store = None if url else _configured(config, keystore)
    url = url if store is None else store.url
    endpoint, base, wire = _locate(url)
    cases = _select(wire, only or [])
    if show:
        rows = [(case.name, case.mark, case.requirement) for case in cases]
        print_table(("CASE", "MARK", "REQUIREMENT"), rows)
        return
    if not key:
        raise typer.BadParameter("is needed: a key to test with", param_hint="--key")
    if store is None:
        access_keys = _credentials(credentials, access_key_id, secret_file)
    else:
        access_keys = store.credentials
        fingerprint = fingerprint or ("" if ca else store.fingerprint)
    subject = Subject(
        str(endpoint),
        base,
        key,
        access_keys,
        region,
        encrypt_only_key,
        decrypt_only_key,
        disabled_key,
        missing_key,
        deadline_ms / 1000,
        latency_requests,
        _trust(endpoint, ca, fingerprint, client_certificate),
        client_certificate is not None,
    )
    results = _run(subject, wire, cases, err if as_json else out)
    _write(url, wire, results, junit, output)
    if as_json:
        print_json(report.as_json(url, wire.name, results))
    if any(result.outcome is Outcome.FAIL for result in results):
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Store:
    """A key store of the configuration, as its cloud sees it."""

    url: str
    credentials: tuple[Credential, ...]
    fingerprint: str


def _configured(file: Path, keystore: str) -> _Store:
    settings = load_config(file)
    store = pick_keystore(settings, keystore)
    access_keys = credentials_source(store)
    tls = settings.server.tls
    url = f"{listening_endpoint(settings)}{store.path_prefix}{_WIRES[store.protocol].base}"
    pin = ""
    if tls is not None:
        pin = fingerprints(load_certificates(tls.certificate)[0])["certificate_sha256"]
    return _Store(url, _loaded(access_keys), pin)


def _credentials(
    file: Path | None, access_key_id: str, secret_file: Path | None
) -> tuple[Credential, ...]:
    if file is not None:
        return _loaded(SecretSource(file=file))
    if not access_key_id:
        raise typer.BadParameter("give --credentials, or --access-key-id and its secret")
    if secret_file is not None:
        return (Credential(access_key_id, SecretSource(file=secret_file).read()),)
    if SECRET_VARIABLE not in os.environ:
        raise typer.BadParameter(f"give --secret-file, or set ${SECRET_VARIABLE}")
    return (Credential(access_key_id, SecretSource(env=SECRET_VARIABLE).read()),)


def _loaded(source: SecretSource) -> tuple[Credential, ...]:
    loaded = [Credential(c.access_key_id, c.access_key_secret) for c in load_credentials(source)]
    if not loaded:
        raise CommandError(f"{source}: there is no credential in it")
    return tuple(loaded)


def _locate(url: str) -> tuple[Endpoint, str, Wire]:
    """Host, path and protocol of a URL: the end of its path says which protocol it is."""
    parts = urlsplit(url)
    base = parts.path.rstrip("/")
    for wire in _WIRES.values():
        if base.endswith(wire.base):
            try:
                return parse_endpoint(f"{parts.scheme}://{parts.netloc}"), base, wire
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="URL") from None
    ends = " or ".join(wire.base for wire in _WIRES.values())
    raise typer.BadParameter(f"its path must end in {ends}", param_hint="URL")


def _select(wire: Wire, patterns: Sequence[str]) -> list[Case]:
    for pattern in patterns:
        if not select(wire, [pattern]):
            raise typer.BadParameter(
                f"no case is called {pattern!r}; see them with --list", param_hint="--only"
            )
    return select(wire, patterns)


def _trust(
    endpoint: Endpoint, ca: Path | None, pin: str, client_certificate: Path | None
) -> Callable[[bool], ssl.SSLContext] | None:
    """What makes the TLS contexts of the run; None for plain HTTP."""
    if not endpoint.tls:
        return None
    pinned = _pinned(endpoint, pin, client_certificate) if pin else ""

    def make(with_client_certificate: bool) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=ca, cadata=pinned or None)
        if pinned:
            # This certificate and no other, whoever signed it and whatever its names are.
            context.check_hostname = False
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if with_client_certificate and client_certificate is not None:
            context.load_cert_chain(client_certificate)
        return context

    try:
        make(True)
    except OSError as error:  # ssl.SSLError is one
        raise CommandError(f"{ca or client_certificate}: cannot be used: {error}") from None
    return make


def _pinned(endpoint: Endpoint, pin: str, client_certificate: Path | None) -> str:
    """The certificate (PEM) that the server presents, if it is the one with this fingerprint."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the certificate itself is compared
    try:
        if client_certificate is not None:
            context.load_cert_chain(client_certificate)
        der = asyncio.run(_certificate(endpoint, context))
    except (OSError, TimeoutError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CommandError(f"{endpoint}: no TLS connection: {reason}") from None
    came = f"sha256-{hashlib.sha256(der).hexdigest()}"
    if not hmac.compare_digest(came, pin.lower()):
        raise CommandError(f"{endpoint}: its certificate is {came}, not {pin}")
    return ssl.DER_cert_to_PEM_cert(der)


async def _certificate(endpoint: Endpoint, context: ssl.SSLContext) -> bytes:
    async with asyncio.timeout(10):
        _, writer = await asyncio.open_connection(
            endpoint.host, endpoint.port, ssl=context, server_hostname=endpoint.host
        )
    der: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return der


def _run(subject: Subject, wire: Wire, cases: Sequence[Case], console: Console) -> list[CaseResult]:
    """Run the cases, each with a line when it is done."""
    width = max(len(case.name) for case in cases)
    mark = max(len(case.mark) for case in cases)
    done = 0

    def progress(result: CaseResult) -> None:
        nonlocal done
        done += 1
        case = result.case
        place = f"{done:>{len(str(len(cases)))}}/{len(cases)}"
        console.print(f"{place} ", end="", markup=False)
        console.print(result.outcome, style=_STYLES[result.outcome], end="", markup=False)
        remark = f"  ({result.detail})" if result.detail and result.outcome is Outcome.PASS else ""
        text = f"  {case.name:<{width}}  {case.mark:<{mark}}  {case.requirement}{remark}"
        console.print(text, markup=False)
        if result.outcome is not Outcome.PASS:
            console.print(f"{'':>{len(place) + 7}}{result.detail}", markup=False)

    try:
        uvloop.run(greet(subject, wire))
    except Unmet as error:
        text = f"{subject.origin}{subject.base}: {error}"
        if "Certificate" in text:
            text += (
                "\nIf the certificate is the right one, give --ca FILE or --fingerprint sha256-HEX"
            )
        raise CommandError(text) from None
    results = uvloop.run(run(subject, wire, cases, progress))
    total = report.counts(results)
    console.print(
        f"\n{wire.name}: {total['pass']} passed, {total['fail']} failed, {total['skip']} skipped",
        markup=False,
    )
    return results


def _write(
    url: str,
    wire: Wire,
    results: Sequence[CaseResult],
    junit: Path | None,
    output: Path | None,
) -> None:
    document = report.as_json(url, wire.name, results)
    texts = {
        junit: report.as_junit(wire.name, results),
        output: orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n",
    }
    for file, text in texts.items():
        if file is not None:
            try:
                file.write_bytes(text)
            except OSError as error:
                raise CommandError(f"{file}: {error.strerror}") from None
