"""`xkiproxy init`: a directory that `serve` can start with.

Everything is made in a staging directory and moved into place at the end, the configuration last:
a failure midway leaves nothing, and nothing that is there is ever overwritten.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from xkiproxy.cli.certificate import CertificateKey, host_names, self_signed
from xkiproxy.cli.common import CommandError, JsonOption, out, print_fields, print_json
from xkiproxy.cli.credentials import check_protocol, new_credential
from xkiproxy.cli.kms_config import program
from xkiproxy.config import Config, ConfigError, load_config
from xkiproxy.config.secrets import SecretSource, write_secret_file
from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.keystores import lifecycle
from xkiproxy.keystores.credentials_file import format_credentials
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.kmi.registry import open_key_manager
from xkiproxy.kmi.software import create_keyring, new_master_key
from xkiproxy.protocols.registry import CONSOLES, DEFAULT_PROTOCOL

_DEFAULT_NAME = "xkiproxy.toml"
_KEYSTORE = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # it becomes a part of a path


@dataclass(frozen=True, slots=True)
class HsmPlan:
    """Where the HSM is and how to log in."""

    module: Path
    token: str
    pin: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made."""

    config_name: str
    hosts: list[str]
    certificate_key: CertificateKey
    keystore: str
    protocol: str
    key_id: str
    kmi: str
    hsm: HsmPlan | None = None


def init(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(help="Where; made if missing. Default: here.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            envvar="XKIPROXY_CONFIG",
            help=f"The configuration file to make. [default: DIRECTORY/{_DEFAULT_NAME}]",
            metavar="FILE",
        ),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or address of this proxy, for its certificate; repeatable."),
    ] = None,
    certificate_key: Annotated[
        CertificateKey, typer.Option(help="The kind of the server's private key.")
    ] = CertificateKey.EC,
    keystore: Annotated[str, typer.Option(help="The name of the key store.")] = "demo",
    protocol: Annotated[
        str, typer.Option(help=f"What the key store speaks: {' or '.join(CONSOLES)}.")
    ] = DEFAULT_PROTOCOL,
    key: Annotated[str, typer.Option(help="The ID of the first key.")] = "demo-key",
    kmi: Annotated[str, typer.Option(help="The kind: software or pkcs11.")] = "software",
    module: Annotated[
        Path | None, typer.Option(help="pkcs11: the module, a shared library.", metavar="FILE")
    ] = None,
    token: Annotated[str | None, typer.Option(help="pkcs11: the label of the token.")] = None,
    pin_file: Annotated[
        Path | None,
        typer.Option(help="pkcs11: a file with the user PIN; asked for without.", metavar="FILE"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a directory that `xkiproxy serve` can start with.

    A configuration, a self-signed certificate, a key store with a credential, and a key.

    Example: xkiproxy init /etc/xkiproxy --host kms-proxy.example.com

    With an HSM: xkiproxy init /etc/xkiproxy --kmi pkcs11 --module /usr/lib/softhsm/libsofthsm2.so
    --token production --pin-file pin
    """
    from_environment = context.get_parameter_source("config").name == "ENVIRONMENT"  # type: ignore[union-attr]
    target, name = _place(directory, config, from_environment)
    if not name.endswith(".toml"):
        raise typer.BadParameter("its name must end in .toml", param_hint="--config")
    if _KEYSTORE.fullmatch(keystore) is None:
        raise typer.BadParameter("1 to 63 of a-z 0-9 _ -", param_hint="--keystore")
    check_protocol(protocol)
    if kmi not in _KMIS:
        raise typer.BadParameter(f"known are: {', '.join(_KMIS)}", param_hint="--kmi")
    try:
        hosts = host_names(host or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--host") from None
    hsm = _hsm_plan(kmi, module, token, pin_file)
    make(target, Plan(name, hosts, certificate_key, keystore, protocol, key, kmi, hsm))
    _report(target, name, as_json)


def _hsm_plan(
    kmi: str, module: Path | None, token: str | None, pin_file: Path | None
) -> HsmPlan | None:
    if kmi != "pkcs11":
        if (module, token, pin_file) != (None, None, None):
            raise typer.BadParameter("--module, --token and --pin-file go with --kmi pkcs11")
        return None
    if module is None or token is None:
        raise typer.BadParameter("it needs --module and --token", param_hint="--kmi pkcs11")
    if pin_file is not None:
        pin = SecretSource(file=pin_file).read()
    else:
        pin = typer.prompt("User PIN of the token", hide_input=True, err=True)
    return HsmPlan(module.absolute(), token, pin)


def make(target: Path, plan: Plan) -> None:
    """Make the directory, or fill one that is there; raises CommandError, and then nothing is new.

    A new or empty directory gets mode 0700, every secret 0600.
    """
    try:
        if target.exists():
            _fill(target, plan)
        else:
            _create(target, plan)
    except OSError as error:
        raise CommandError(f"{error.filename or target}: {error.strerror}") from None


def _place(directory: Path | None, config: Path | None, from_environment: bool) -> tuple[Path, str]:
    """The directory and the name of the configuration in it, from two ways to say it."""
    if config is None or (directory is not None and from_environment):
        return directory or Path(), _DEFAULT_NAME
    if directory is not None and config.parent.resolve() != directory.resolve():
        raise typer.BadParameter("the configuration must stand in DIRECTORY", param_hint="--config")
    return directory or config.parent, config.name


def _create(target: Path, plan: Plan) -> None:
    """Build beside a directory that is not there, and rename."""
    absolute = target.absolute()
    missing = [parent for parent in absolute.parents if not parent.exists()]
    absolute.parent.mkdir(parents=True, exist_ok=True)
    try:
        staging = _staging(absolute.parent)
        try:
            _build(staging, plan)
            staging.rename(absolute)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except BaseException:
        for parent in missing:  # the innermost first; one that somebody else uses stays
            with suppress(OSError):
                parent.rmdir()
        raise


def _fill(target: Path, plan: Plan) -> None:
    """Build inside a directory that is there (it may be the current one), and move up."""
    if not target.is_dir():
        raise CommandError(f"{target}: is there and is no directory")
    _refuse_taken(target, [plan.config_name])
    if not any(target.iterdir()):
        target.chmod(0o700)
    elif target.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CommandError(
            f"{target}: others can write to it and replace its files; run: chmod go-w {target}"
        )
    staging = _staging(target)
    try:
        _build(staging, plan)
        _publish(staging, target, plan.config_name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=".xkiproxy-init-", dir=parent))  # mode 0700


def _publish(staging: Path, target: Path, last: str) -> None:
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: name == last)
    _refuse_taken(target, names)
    moved: list[Path] = []
    try:
        for name in names:
            _move(staging / name, target / name)
            moved.append(target / name)
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _move(source: Path, place: Path) -> None:
    """Move, but never over something: rename would replace a file that has come meanwhile."""
    if source.is_dir():
        place.mkdir(mode=0o700)
        source.rename(place)  # which replaces an empty directory: the one that was just made
    else:
        os.link(source, place)
        source.unlink()


def _refuse_taken(target: Path, names: list[str]) -> None:
    for name in names:
        if os.path.lexists(target / name):
            raise CommandError(f"{target / name}: is there already; nothing was changed")


def _build(staging: Path, plan: Plan) -> None:
    (staging / "tls").mkdir(mode=0o700)
    (staging / "credentials").mkdir(mode=0o700)
    certificate, private_key = self_signed(plan.hosts, plan.certificate_key, datetime.now(UTC))
    (staging / "tls" / "server.crt").write_text(certificate, encoding="ascii")
    write_secret_file(staging / "tls" / "server.key", private_key)
    credentials = format_credentials([new_credential(plan.protocol)])
    write_secret_file(staging / "credentials" / f"{plan.keystore}.toml", credentials)
    kmi_section = _KMIS[plan.kmi](staging, plan)
    file = staging / plan.config_name
    file.write_text(_config_text(plan, kmi_section), encoding="utf-8")
    try:
        config = load_config(file)
    except ConfigError as error:
        reasons = "; ".join(str(problem) for problem in error.problems)
        raise CommandError(f"cannot make this configuration: {reasons}") from None
    _create_key(config, plan.key_id)


def _create_key(config: Config, key_id: str) -> None:
    settings = config.kmi[0]
    manager = open_key_manager(settings)
    try:
        catalog = SqliteCatalog(config.catalog.path)
        try:
            # A token may have the key already: what can be used is taken, never made twice.
            if manager.get(key_id) is not None:
                lifecycle.enable_key(catalog, manager, settings.name, key_id)
            else:
                lifecycle.create_key(
                    catalog, manager, settings.name, key_id, KeySpec.AES_256, Usage.BOTH
                )
        finally:
            catalog.close()
    finally:
        manager.close()


def _software(staging: Path, plan: Plan) -> str:
    """The embedded key manager: a keyring under a master key."""
    del plan
    master_key = new_master_key()
    write_secret_file(staging / "master.key", master_key + "\n")
    create_keyring(staging / "keyring.db", master_key)
    return """\
[[kmi]]
name = "local"
type = "software"
keyring = "keyring.db"
master_key = "master.key"            # keep a copy elsewhere: without it no key can be used
"""


def _pkcs11(staging: Path, plan: Plan) -> str:
    """An HSM: its keys stay where they are, the PIN is written to a file of its own."""
    hsm = plan.hsm
    assert hsm is not None  # noqa: S101 - init() saw to it
    write_secret_file(staging / "pin", hsm.pin + "\n")
    return f"""\
[[kmi]]
name = "local"
type = "pkcs11"
module = {_toml(str(hsm.module))}
token = {_toml(hsm.token)}
pin = "pin"
lanes = 2                            # processes, each with a session of its own
max_batch = 64                       # operations that a lane takes in one go
"""


_KMIS: Mapping[str, Callable[[Path, Plan], str]] = {"software": _software, "pkcs11": _pkcs11}
"""For each kind of KMI what makes its files in a directory, and returns its section, `local`."""


_CERTIFICATE = {
    True: "the cloud pins it: xkiproxy fingerprint",
    False: "for tests; the cloud wants one of a public authority",
}
"""What to know of the certificate, by whether the cloud pins it."""


def _toml(value: str) -> str:
    """A value that a user chose, quoted rightly whatever is in it."""
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def _config_text(plan: Plan, kmi_section: str) -> str:
    values = (plan.keystore, f"/{plan.keystore}", f"credentials/{plan.keystore}.toml")
    name, prefix, file = map(_toml, values)
    certificate = _CERTIFICATE[CONSOLES[plan.protocol].pins_certificate]
    return f"""\
# xkiproxy: what stands between a cloud's key management service and keys that stay at home.
# Paths are relative to this file. Secrets never stand in it. Check it with: xkiproxy check

[server]
listen = "0.0.0.0:8443"              # what the cloud calls
admin_listen = "127.0.0.1:9464"      # /metrics /livez /readyz /status
workers = 1                          # processes that share the port

[server.tls]
certificate = "tls/server.crt"       # {certificate}
private_key = "tls/server.key"

{kmi_section}
[[keystore]]
name = {name}
protocol = {_toml(plan.protocol)}
path_prefix = {prefix}
kmi = ["local"]                      # in order of preference
credentials = {file}
"""


def _report(target: Path, config_name: str, as_json: bool) -> None:
    config = target / config_name
    if as_json:
        print_json({"config": str(config), "directory": str(target)})
        return
    out.print(f"Made {target}:", markup=False)
    print_fields(
        {
            f"  {config_name}": "the configuration",
            "  tls/": "a self-signed certificate and its key",
            "  credentials/": "the access key with which the cloud signs",
            "  the rest": "secrets of the key manager, and the states of keys",
        }
    )
    start = shlex.join(program())
    file = shlex.quote(str(config))
    out.print("\nNext:")
    for step in ("serve", "kms-config", "call health"):
        out.print(f"  {start} {step} --config {file}", markup=False)
