"""The typer application and the one place where a failure becomes a message and a status.

A command's module is loaded when it is asked for: all of them take 0.3 seconds, for which each
command would wait.
"""

# ruff: noqa: PLC0415 - see above

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated

import typer

from xkiproxy import __version__
from xkiproxy.cli.common import print_failure
from xkiproxy.hardening import forbid_core_dumps

COMMANDS = (
    "init", "serve", "check", "reload", "keys", "keyring", "credentials", "policy", "fingerprint",
    "kms-config", "audit", "call", "conformance",
)  # fmt: skip
"""In the order of `--help`; each is in the module of its name."""


def make_app(*names: str) -> typer.Typer:
    """The application with these commands."""
    app = typer.Typer(
        name="xkiproxy",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # its tracebacks show local variables: secrets among them
        help="The proxy between a cloud's key management service and keys that stay at home.",
    )
    app.callback()(_options)
    for name in names:
        attribute = name.replace("-", "_")
        module = import_module(f"xkiproxy.cli.{attribute}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, attribute))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xkiproxy {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Run the command line: status 0 done, 1 failed, 2 misuse."""
    forbid_core_dumps()
    asked = sys.argv[1:2]
    try:
        make_app(*(asked if asked and asked[0] in COMMANDS else COMMANDS))()
    except Exception as error:
        if not isinstance(error, _expected()):
            raise
        print_failure(error)
        sys.exit(1)


def _expected() -> tuple[type[Exception], ...]:
    """The failures whose text says what is wrong, where, and what to do."""
    from xkiproxy.cli.common import CommandError
    from xkiproxy.config import ConfigError
    from xkiproxy.config.secrets import SecretError
    from xkiproxy.keystores.catalog import CatalogError
    from xkiproxy.keystores.credentials import CredentialError
    from xkiproxy.keystores.policies import PolicyError
    from xkiproxy.kmi.base import KeyManagerError

    return (
        CatalogError, CommandError, ConfigError, CredentialError, KeyManagerError, PolicyError,
        SecretError,
    )  # fmt: skip
