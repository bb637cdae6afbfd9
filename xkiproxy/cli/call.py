"""`xkiproxy call`: a signing client that shows how long each phase took, and why one failed."""

from __future__ import annotations

import base64
import binascii
import inspect
import os
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from xkiproxy.cli import http
from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    CommandError,
    ConfigOption,
    JsonOption,
    out,
    print_fields,
    print_json,
)
from xkiproxy.cli.credentials import KeystoreOption, check_protocol, pick_keystore
from xkiproxy.cli.diagnosis import explain_answer, explain_failure
from xkiproxy.cli.fingerprint import fingerprints, load_certificates
from xkiproxy.cli.kms_config import AccessKeyOption, external_proxy_path, pick_credential
from xkiproxy.config import Config, load_config
from xkiproxy.config.secrets import SecretSource
from xkiproxy.protocols.base import Fields, Refusal
from xkiproxy.protocols.client import (
    Answer,
    ArgumentError,
    Arguments,
    ClientDialect,
    Request,
    Signer,
    call_path,
)
from xkiproxy.protocols.fields import parse_object
from xkiproxy.protocols.registry import CLIENTS, DEFAULT_PROTOCOL

SECRET_VARIABLE = "XKIPROXY_ACCESS_KEY_SECRET"  # noqa: S105 - a name, not a secret

_KEY_ID_HELP = "The external key ID."

app = typer.Typer(
    name="call",
    no_args_is_help=True,
    help="Call a proxy as the cloud does, and show what happens. Example: xkiproxy call health",
)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of every call: where to, trusting whom, signed by whom, printed how."""

    endpoint: Annotated[
        str,
        typer.Option(help="Default: where the configuration listens.", metavar="https://HOST:PORT"),
    ] = ""
    path: Annotated[
        str, typer.Option(help="The external proxy path; default: the key store's.", metavar="PATH")
    ] = ""
    ca: Annotated[
        Path | None, typer.Option(help="Trust the CA certificates of this file.", metavar="FILE")
    ] = None
    fingerprint: Annotated[
        str,
        typer.Option(
            help="Trust only this certificate; default: the configuration's.",
            metavar="sha256-HEX",
        ),
    ] = ""
    client_certificate: Annotated[
        Path | None, typer.Option(help="For mTLS: PEM, certificate and key.", metavar="FILE")
    ] = None
    keystore: KeystoreOption = ""
    access_key_id: AccessKeyOption = ""
    secret_file: Annotated[
        Path | None,
        typer.Option(help=f"Holds the secret; or set ${SECRET_VARIABLE}.", metavar="FILE"),
    ] = None
    protocol: Annotated[
        str,
        typer.Option(
            help=f"{' or '.join(CLIENTS)}; default: the key store's, or {DEFAULT_PROTOCOL}.",
            metavar="NAME",
        ),
    ] = ""
    signature: Annotated[
        str, typer.Option(help="sha256, or sm3 where the protocol has it.", metavar="HASH")
    ] = "sha256"
    region: Annotated[
        str, typer.Option(help="The region that is signed; default: a usual one of the cloud.")
    ] = ""
    timeout: Annotated[float, typer.Option(help="Seconds, for each phase.", min=0.001)] = 10.0
    config: ConfigOption = DEFAULT_CONFIG
    as_json: JsonOption = False


@dataclass(frozen=True, slots=True)
class Target:
    """What the options and the configuration amount to."""

    dialect: ClientDialect
    endpoint: http.Endpoint
    trust: http.Trust
    path: str
    signer: Signer


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `Options` as options, after its own, for its argument `options`.

    Typer reads signatures, so the signature is what has to be put together.
    """
    shared = inspect.signature(Options, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [p for name, p in own.items() if name != "options"] + list(shared.values())

    def run(**values: Any) -> None:
        options = Options(**{name: values.pop(name) for name in shared})
        command(**values, options=options)

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


KeyArgument = Annotated[str, typer.Argument(help=_KEY_ID_HELP, metavar="KEY")]
AlgorithmOption = Annotated[
    str | None,
    typer.Option(help="AES_GCM; XKI: or AES_CBC, AES_ECB, SM4_GCM; default: the key's."),
]
IvOption = Annotated[str | None, typer.Option(help="XKI: the IV.", metavar="BASE64")]
PaddingOption = Annotated[str | None, typer.Option(help="XKI: PKCS7_PADDING or NO_PADDING.")]
AadOption = Annotated[
    str | None, typer.Option(help="Additional authenticated data (GCM).", metavar="TEXT")
]


@app.command("health")
@_with_options
def health_command(options: Options) -> None:
    """Ask how the proxy is.

    Example: xkiproxy call health --json
    """
    _call("health", {}, options)


@app.command("meta")
@_with_options
def meta_command(key: KeyArgument, options: Options) -> None:
    """Ask what a key is.

    Example: xkiproxy call meta demo-key
    """
    _call("meta", {}, options, key)


@app.command("encrypt")
@_with_options
def encrypt_command(
    options: Options,
    key: KeyArgument,
    plaintext: Annotated[
        str | None, typer.Option(help="What to encrypt; no real secret: others see command lines.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Encrypt this file; - is standard input.", metavar="FILE")
    ] = None,
    aad: AadOption = None,
    algorithm: AlgorithmOption = None,
    iv: IvOption = None,
    padding: PaddingOption = None,
    integrity: Annotated[
        bool, typer.Option("--integrity", help="XKS: ask for an integrity value and verify it.")
    ] = False,
) -> None:
    """Encrypt a text or a file.

    Example: xkiproxy call encrypt demo-key --plaintext hello --json
    """
    if (plaintext is None) == (file is None):
        raise typer.BadParameter("give one of --plaintext and --file")
    arguments = {
        "plaintext": plaintext.encode() if plaintext is not None else _read(file or Path("-")),
        "algorithm": algorithm,
        "iv": iv,
        "aad": _utf8(aad),
        "padding": padding,
        "integrity": integrity or None,
    }
    _call("encrypt", arguments, options, key)


@app.command("decrypt")
@_with_options
def decrypt_command(
    options: Options,
    key: KeyArgument,
    ciphertext: Annotated[
        str | None, typer.Option(help="XKI: the CiphertextBlob.", metavar="BASE64")
    ] = None,
    file: Annotated[
        Path,
        typer.Option(help="What `call encrypt --json` printed; - is standard input."),
    ] = Path("-"),
    aad: AadOption = None,
    algorithm: AlgorithmOption = None,
    iv: IvOption = None,
    padding: PaddingOption = None,
) -> None:
    """Decrypt what encrypt gave out: its fields, or its --json output.

    Example: xkiproxy call encrypt demo-key --plaintext hi --json | xkiproxy call decrypt demo-key
    """
    arguments = {
        "ciphertext": ciphertext,
        "algorithm": algorithm,
        "iv": iv,
        "aad": _utf8(aad),
        "padding": padding,
    }
    _call("decrypt", arguments, options, key, file if ciphertext is None else None)


@app.command("random")
@_with_options
def random_command(
    options: Options,
    length: Annotated[int | None, typer.Option(help="Bytes, 1 to 1024.")] = None,
    output_form: Annotated[
        str | None, typer.Option(help="PLAIN, PUBLIC_KEY_WRAPPED or NONE.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="Wrap under this public key, PEM or DER.", metavar="FILE")
    ] = None,
    wrapping_key_spec: Annotated[str | None, typer.Option(help="RSA_2048 or EC_SM2.")] = None,
    wrapping_algorithm: Annotated[
        str | None, typer.Option(help="RSAES_OAEP_SHA1, RSAES_OAEP_SHA256 or SM2PKE.")
    ] = None,
) -> None:
    """Draw random bytes from the key manager.

    Example: xkiproxy call random --length 16
    """
    arguments = {
        "length": length,
        "output_form": output_form,
        "public_key": None if public_key is None else _public_key(public_key),
        "wrapping_key_spec": wrapping_key_spec,
        "wrapping_algorithm": wrapping_algorithm,
    }
    _call("random", arguments, options)


def _call(
    call: str, arguments: Arguments, options: Options, key: str = "", encrypted: Path | None = None
) -> None:
    """Make a call; `encrypted` is a file with the answer to encrypt that is to be decrypted."""
    target = _target(options)
    fields = _fields(target.dialect, call, arguments, encrypted)
    if not key.isascii() or not key.isprintable() or set(key) & set("/?# "):
        raise typer.BadParameter("a key ID is 1 to 128 of A-Z a-z 0-9 . _ -", param_hint="KEY")
    kms_request_id = f"req-{uuid.uuid4()}"
    request = _request(target, call, key, fields, kms_request_id)
    response = _send(target, request, options.timeout)
    try:
        answer = _read_answer(target.dialect, response)
    except ValueError as error:
        raise CommandError(
            f"{target.endpoint}{request.path}: HTTP {response.status}, but {error}: is this an"
            " xkiproxy? Look at the port, and at what stands between"
        ) from None
    _verify(target.dialect, fields, answer)
    readable = _as_text(answer, target.dialect.plaintext_field)
    _report(answer, response, options.as_json, kms_request_id, readable)
    if answer.status != 200:
        date_errors = target.dialect.date_errors
        said = explain_answer(answer, response.headers["Date"], date_errors)
        raise CommandError(said + _path_hint(target, answer))


def _read_answer(dialect: ClientDialect, response: http.Response) -> Answer:
    """Read an answer; a path that is no key store's is answered in the words of one protocol."""
    answer = dialect.read_answer(response.status, response.body)
    if answer.status == 200 or answer.code:
        return answer
    others = (other.read_answer(response.status, response.body) for other in CLIENTS.values())
    return next((other for other in others if other.code), answer)


def _path_hint(target: Target, answer: Answer) -> str:
    base = target.dialect.base_path
    if answer.status != 404 or target.path.rstrip("/").endswith(base):
        return ""
    return f"\nThe path of a key store that speaks {target.dialect.name} ends in {base} (--path)."


def _fields(
    dialect: ClientDialect, call: str, arguments: Arguments, encrypted: Path | None
) -> Fields:
    """The parameters of a call on the wire; what an option says goes before what a file says."""
    if call not in dialect.calls:
        raise CommandError(
            f"the protocol {dialect.name} has no {call}; it has: {', '.join(dialect.calls)}"
        )
    try:
        fields = dialect.fields(call, arguments)
    except ArgumentError as error:
        option = "--" + error.argument.replace("_", "-")
        raise typer.BadParameter(f"{dialect.name}: {error.why}", param_hint=option) from None
    return fields if encrypted is None else {**_stored(dialect, _read(encrypted)), **fields}


def _stored(dialect: ClientDialect, text: bytes) -> Fields:
    """The parameters of decrypt, in what `call encrypt --json` printed."""
    document = parse_object(text)
    if document is None:
        raise CommandError("the input is not what `call encrypt --json` prints")
    try:
        return dialect.stored_fields(document)
    except ValueError as error:
        raise CommandError(f"the input {error}") from None


def _request(target: Target, call: str, key: str, fields: Fields, kms_request_id: str) -> Request:
    try:
        return target.dialect.build_request(
            call,
            call_path(target.path, target.dialect.calls[call].part, key),
            fields,
            target.signer,
            host=target.endpoint.authority,
            now=time.time(),
            nonce=secrets.token_hex(16),
            kms_request_id=kms_request_id,
        )
    except Refusal:
        raise typer.BadParameter(
            f"{target.dialect.name}: no signature can name this access key ID or this region",
            param_hint="--access-key-id, --region",
        ) from None


def _send(target: Target, request: Request, timeout: float) -> http.Response:
    try:
        return http.post(
            target.endpoint, target.trust, request.path, request.headers, request.body, timeout
        )
    except http.RequestError as error:
        raise CommandError(explain_failure(error, target.endpoint, target.trust)) from None


def _verify(dialect: ClientDialect, sent: Fields, answer: Answer) -> None:
    if answer.status != 200:
        return
    try:
        dialect.verify_answer(sent, answer)
    except ValueError as error:
        # Nothing of such an answer is printed: nobody shall store it.
        raise CommandError(f"the answer was corrupted on its way or is wrong: {error}") from None


def _target(options: Options) -> Target:
    if options.ca is not None and options.fingerprint:
        raise typer.BadParameter("give one of --ca and --fingerprint")
    config = None if _stands_alone(options) else load_config(options.config)
    dialect = CLIENTS[_protocol(options, config)]
    return Target(
        dialect,
        _endpoint(options, config),
        _trust(options, config),
        _path(options, config, dialect),
        _signer(options, config, dialect),
    )


def _protocol(options: Options, config: Config | None) -> str:
    if options.protocol:
        check_protocol(options.protocol)
    if config is None:
        return options.protocol or DEFAULT_PROTOCOL
    store = pick_keystore(config, options.keystore)
    if store.credentials is None:
        raise CommandError(
            f"key store {store.name} speaks {store.protocol}: only the cloud can make its tokens,"
            " so that this command cannot call it. Try it with curl and a token"
            f" (docs/protocols/{store.protocol}.md), and see: xkiproxy kms-config"
        )
    if options.protocol not in {"", store.protocol}:
        raise typer.BadParameter(
            f"key store {store.name} speaks {store.protocol}", param_hint="--protocol"
        )
    return store.protocol


def _stands_alone(options: Options) -> bool:
    """Whether the options say all, so that no configuration is needed."""
    has_secret = options.secret_file is not None or SECRET_VARIABLE in os.environ
    return bool(options.endpoint and options.access_key_id and has_secret)


def _endpoint(options: Options, config: Config | None) -> http.Endpoint:
    if config is None or options.endpoint:
        try:
            return http.parse_endpoint(options.endpoint)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--endpoint") from None
    return http.listening_endpoint(config)


def _trust(options: Options, config: Config | None) -> http.Trust:
    mine = options.client_certificate
    if options.fingerprint:
        kind, _, digest = options.fingerprint.partition("-")
        digits = digest.lower()
        if kind != "sha256" or len(digits) != 64 or set(digits) - set("0123456789abcdef"):
            raise typer.BadParameter("write it as sha256-<64 hex digits>")
        return http.Trust(digits, client_certificate=mine)
    if options.ca is not None:
        return http.Trust(ca_file=options.ca, client_certificate=mine)
    if config is not None and config.server.tls is not None:
        # What the cloud does: it pins the certificate, whoever signed it and whatever its names.
        certificate = load_certificates(config.server.tls.certificate)[0]
        pin = fingerprints(certificate)["certificate_sha256"].removeprefix("sha256-")
        return http.Trust(pin, client_certificate=mine)
    return http.Trust(client_certificate=mine)


def _path(options: Options, config: Config | None, dialect: ClientDialect) -> str:
    if options.path:
        if not options.path.startswith("/"):
            raise typer.BadParameter("begins with /", param_hint="--path")
        return options.path
    if config is None:
        return dialect.base_path
    return external_proxy_path(pick_keystore(config, options.keystore))


def _signer(options: Options, config: Config | None, dialect: ClientDialect) -> Signer:
    if options.signature not in dialect.hashes:
        known = " or ".join(dialect.hashes)
        raise typer.BadParameter(f"{dialect.name} has {known}", param_hint="--signature")
    region = options.region or dialect.default_region
    given = _given_secret(options)
    if given is not None:
        if not options.access_key_id:
            raise typer.BadParameter("a secret needs its --access-key-id")
        return Signer(options.access_key_id, given, region, options.signature)
    assert config is not None  # noqa: S101 - without a secret `_stands_alone` is false
    credential = pick_credential(pick_keystore(config, options.keystore), options.access_key_id)
    return Signer(credential.access_key_id, credential.access_key_secret, region, options.signature)


def _given_secret(options: Options) -> str | None:
    if options.secret_file is not None:
        return SecretSource(file=options.secret_file).read()
    if options.access_key_id and SECRET_VARIABLE in os.environ:
        return SecretSource(env=SECRET_VARIABLE).read()
    return None


def _read(file: Path) -> bytes:
    if str(file) == "-":
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from None


def _public_key(file: Path) -> bytes:
    """The DER of a public key; a file that is not PEM is taken for DER as it is."""
    data = _read(file)
    if not data.startswith(b"-----BEGIN"):
        return data
    lines = [line for line in data.splitlines() if line and not line.startswith(b"-----")]
    try:
        # Not through `cryptography`, which cannot load SM2 keys; the proxy judges the DER anyway.
        return base64.b64decode(b"".join(lines), validate=True)
    except binascii.Error:
        raise CommandError(f"{file}: is not a public key in PEM form") from None


def _utf8(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def _report(
    answer: Answer,
    response: http.Response,
    as_json: bool,
    kms_request_id: str,
    readable: Mapping[str, object],
) -> None:
    timings = {name: round(value, 3) for name, value in asdict(response.timings).items()}
    request_id = {"RequestId": answer.request_id} if answer.request_id else {}
    if as_json:
        # The answer as it came; what we add is in snake case, which no name of a protocol is.
        print_json(
            {
                **request_id,
                **answer.fields,
                "kms_request_id": kms_request_id,
                "status": answer.status,
                "timings_ms": timings,
                "tls": _tls(response),
            }
        )
        return
    shown: dict[str, object] = {"HTTP status": answer.status, "KMS request ID": kms_request_id}
    print_fields({**shown, **request_id, **answer.fields, **readable})
    out.print()
    if response.tls_version:
        print_fields({"TLS": f"{response.tls_version} {response.cipher}"})
    print_fields({f"{name} ms": f"{value:9.3f}" for name, value in timings.items()})


def _tls(response: http.Response) -> dict[str, str] | None:
    if not response.tls_version:
        return None
    return {
        "version": response.tls_version,
        "cipher": response.cipher,
        "certificate_sha256": f"sha256-{response.certificate_sha256}",
    }


def _as_text(answer: Answer, name: str) -> dict[str, object]:
    """A decrypted text in readable form, if it is one: the terminal gets nothing else to obey."""
    try:
        text = base64.b64decode(answer.fields[name], validate=True).decode()
    except (KeyError, TypeError, ValueError):
        return {}
    return {"(as text)": text} if text.isprintable() else {}
