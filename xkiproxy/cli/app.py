"""The typer application and the one place where a failure becomes a message and a status."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from xkiproxy import __version__
from xkiproxy.cli import (
    audit,
    call,
    check,
    conformance,
    credentials,
    fingerprint,
    init,
    keys,
    kms_config,
    policy,
    reload,
    serve,
)
from xkiproxy.cli.common import CommandError, print_failure
from xkiproxy.config import ConfigError
from xkiproxy.config.secrets import SecretError
from xkiproxy.hardening import forbid_core_dumps
from xkiproxy.keystores.catalog import CatalogError
from xkiproxy.keystores.credentials import CredentialError
from xkiproxy.keystores.policies import PolicyError
from xkiproxy.kmi.base import KeyManagerError

app = typer.Typer(
    name="xkiproxy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show local variables: secrets among them
    help="The proxy between a cloud's key management service and keys that stay at home.",
)
app.command("init")(init.init)
app.command("serve")(serve.serve)
app.command("check")(check.check)
app.command("reload")(reload.reload)
app.add_typer(keys.app, name="keys")
app.add_typer(credentials.app, name="credentials")
app.add_typer(policy.app, name="policy")
app.command("fingerprint")(fingerprint.fingerprint)
app.command("kms-config")(kms_config.kms_config)
app.add_typer(audit.app, name="audit")
app.add_typer(call.app, name="call")
app.command("conformance")(conformance.conformance)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xkiproxy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Run the command line: status 0 done, 1 failed, 2 misuse."""
    forbid_core_dumps()
    try:
        app()
    except (
        CatalogError,
        CommandError,
        ConfigError,
        CredentialError,
        KeyManagerError,
        PolicyError,
        SecretError,
    ) as error:
        print_failure(error)
        sys.exit(1)
