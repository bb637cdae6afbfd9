"""`xkiproxy kms-config`: the values with which a cloud finds and trusts a key store."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    CommandError,
    ConfigOption,
    JsonOption,
    err,
    out,
    print_fields,
    print_json,
)
from xkiproxy.cli.credentials import KeystoreOption, credentials_source, pick_keystore
from xkiproxy.cli.fingerprint import configured_certificate, fingerprints, load_certificates
from xkiproxy.cli.reload import read_status, resolved, status_url
from xkiproxy.config import Config, load_config
from xkiproxy.config.models import GoogleSettings, KeystoreSettings
from xkiproxy.config.secrets import write_secret_file
from xkiproxy.keystores.credentials import Credential, load_credentials
from xkiproxy.keystores.credentials_file import newest
from xkiproxy.protocols.console import Console, Registration, TokenRegistration
from xkiproxy.protocols.registry import CLIENTS, CONSOLES, TOKEN_CONSOLES

_STATUS_SECONDS = 2

AccessKeyOption = Annotated[
    str,
    typer.Option("--access-key-id", help="The credential; default: the newest.", metavar="ID"),
]


def kms_config(
    keystore: KeystoreOption = "",
    access_key_id: AccessKeyOption = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a new JSON file (mode 0600).", metavar="FILE"),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Print the values to enter in the KMS console, the secret among them.

    For Google Cloud, whose tokens need no secret of the proxy, it prints the commands instead.

    Example: xkiproxy kms-config --output kms.json
    """
    settings = load_config(config)
    store = pick_keystore(settings, keystore)
    if store.google is not None:
        if access_key_id or output is not None:
            what = "--access-key-id" if access_key_id else "--output"
            raise typer.BadParameter(f"{store.protocol} has no credentials", param_hint=what)
        _print_commands(store, store.google, as_json)
        return
    credential = pick_credential(store, access_key_id)
    console = CONSOLES[store.protocol]
    values = Registration(
        external_proxy_path(store),
        credential.access_key_id,
        credential.access_key_secret,
        _fingerprint(settings, console),
    )
    if _is_unknown(settings, store, credential):
        err.print(
            f"The running server does not know {credential.access_key_id} yet: run xkiproxy reload",
            markup=False,
        )
    upload = console.upload(values)
    if output is not None:
        _write(output, upload)
        if not as_json:
            out.print(f"Wrote {output}; it holds the secret.", markup=False)
    elif as_json:
        print_json(upload)
    else:
        print_fields(console.shown(values))
    if not as_json:
        if not console.pins_certificate:
            out.print(
                "\nThis cloud takes no fingerprint: the server's certificate must be one of a"
                " public certificate authority."
            )
        out.print("\nWhile the server runs, try it from another terminal:")
        out.print(f"  {call_line(settings, store, config)}", markup=False)


def _print_commands(store: KeystoreSettings, google: GoogleSettings, as_json: bool) -> None:
    console = TOKEN_CONSOLES[store.protocol]
    values = TokenRegistration(
        google.audience, store.path_prefix, "EXTERNAL_KEY", google.service_accounts
    )
    if as_json:
        print_json(console.shown(values))
        return
    print_fields(console.shown(values))
    out.print(
        "\nEXTERNAL_KEY is the key's ID here (xkiproxy keys list); what else is in capitals is"
        " Google's."
    )
    for what, lines in console.commands(values):
        out.print(f"\n{what}", markup=False)
        for line in lines:
            out.print(f"  {line}", markup=False)


def _is_unknown(config: Config, store: KeystoreSettings, credential: Credential) -> bool:
    """Whether a server runs that would refuse the credential; what does not answer is none."""
    try:
        status = read_status(status_url(config.server.admin_listen), _STATUS_SECONDS)
        if status.get("config") != resolved(config.path):
            return False
        processes = [found for found in status.get("workers", [status]) if found is not None]
        known = [
            accepted["access_key_id"]
            for process in processes
            for found in process["keystores"]
            if found["name"] == store.name
            for accepted in found["credentials"]
        ]
    except (AttributeError, CommandError, KeyError, TypeError):
        return False  # nobody is there, or somebody else
    return bool(processes) and credential.access_key_id not in known


def external_proxy_path(store: KeystoreSettings) -> str:
    """The path under which a key store's calls stand, such as `/demo/kms/xki/v1`."""
    return store.path_prefix + CLIENTS[store.protocol].base_path


def pick_credential(store: KeystoreSettings, access_key_id: str) -> Credential:
    """The credential of this ID, or the newest if that is empty; raises CommandError."""
    credentials = load_credentials(credentials_source(store))
    if access_key_id:
        credentials = [c for c in credentials if c.access_key_id == access_key_id]
    credential = newest(credentials)
    if credential is None:
        what = f"credential {access_key_id}" if access_key_id else "credentials"
        raise CommandError(
            f"key store {store.name} has no {what}; make one with: xkiproxy credentials add"
        )
    return credential


def call_line(config: Config, store: KeystoreSettings, file: Path) -> str:
    """A shell line that calls this key store, wherever it is run."""
    words = [*program(), "call", "health", "--config", str(file.resolve())]
    if len(config.keystore) > 1:
        words += ["--keystore", store.name]
    return shlex.join(words)


def program() -> list[str]:
    """The words that start this program from any directory."""
    started = Path(sys.argv[0])
    if started.name != "xkiproxy":
        return [sys.executable, "-m", "xkiproxy"]
    found = shutil.which("xkiproxy")
    same = found is not None and started.exists() and Path(found).samefile(started)
    return ["xkiproxy" if same or not started.exists() else os.path.abspath(started)]  # noqa: PTH100


def _fingerprint(settings: Config, console: Console) -> str:
    if not console.pins_certificate:
        return ""  # and there may be no certificate here: what stands in front can end TLS
    certificate = load_certificates(configured_certificate(settings))[0]
    return fingerprints(certificate)["certificate_sha256"]


def _write(file: Path, upload: Mapping[str, Any]) -> None:
    try:
        write_secret_file(file, orjson.dumps(upload, option=orjson.OPT_INDENT_2).decode() + "\n")
    except FileExistsError:
        raise CommandError(f"{file}: is there already; remove it first") from None
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from None
