"""`xkiproxy init`: a directory that `serve` can start with.

Everything is made in a staging directory and moved into place at the end, the configuration last:
a failure midway leaves nothing, and nothing that is there is ever overwritten.
"""

from __future__ import annotations

import errno
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
    """What is to be made; the configuration may have its place outside of the directory."""

    config: Path
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
            help="The configuration file to make; outside of DIRECTORY it names all of it by full"
            f" paths. [default: DIRECTORY/{_DEFAULT_NAME}]",
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

    Example: xkiproxy init proxy --host kms-proxy.example.com

    With an HSM: xkiproxy init proxy --kmi pkcs11 --module /usr/lib/softhsm/libsofthsm2.so --token
    production --pin-file pin

    For a service: xkiproxy init /var/lib/xkiproxy --config /etc/xkiproxy/xkiproxy.toml
    """
    from_environment = context.get_parameter_source("config").name == "ENVIRONMENT"  # type: ignore[union-attr]
    target, file = _places(directory, config, from_environment)
    if file.suffix != ".toml":
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
    make(target, Plan(file, hosts, certificate_key, keystore, protocol, key, kmi, hsm))
    _report(target, file, as_json)


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
        if not _is_inside(plan.config, target):
            _refuse_unfit(plan.config.parent)
            _refuse_taken([plan.config])
        if target.exists():
            _fill(target, plan)
        else:
            _create(target, plan)
    except OSError as error:
        raise CommandError(f"{error.filename or target}: {error.strerror}") from None


def _places(
    directory: Path | None, config: Path | None, from_environment: bool
) -> tuple[Path, Path]:
    """The directory and the configuration, from two ways to say it."""
    if config is None or (directory is not None and from_environment):
        target = directory or Path()
        return target, target / _DEFAULT_NAME
    return directory or config.parent, config


def _create(target: Path, plan: Plan) -> None:
    """Build beside a directory that is not there, and rename."""
    absolute = target.absolute()
    missing = [parent for parent in absolute.parents if not parent.exists()]
    absolute.parent.mkdir(parents=True, exist_ok=True)
    try:
        staging = _staging(absolute.parent)
        try:
            _build(staging, target, plan)
            staging.rename(absolute)
            staging = absolute  # which is what a failure takes back from here on
            if not _is_inside(plan.config, target):
                _move(absolute / plan.config.name, plan.config)
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
    _refuse_taken([target / plan.config.name])
    if not any(target.iterdir()):
        target.chmod(0o700)
    _refuse_unfit(target)
    staging = _staging(target)
    try:
        _build(staging, target, plan)
        _publish(staging, target, plan.config)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=".xkiproxy-init-", dir=parent))  # mode 0700


def _publish(staging: Path, target: Path, config: Path) -> None:
    """Move all up, the configuration last, which may have its place elsewhere."""
    names = sorted((p.name for p in staging.iterdir()), key=lambda name: name == config.name)
    places = [config if name == config.name else target / name for name in names]
    _refuse_taken(places)
    moved: list[Path] = []
    try:
        for name, place in zip(names, places, strict=True):
            _move(staging / name, place)
            moved.append(place)
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _move(source: Path, place: Path) -> None:
    """Move, but never over something: rename would replace a file that has come meanwhile."""
    if source.is_dir():
        place.mkdir(mode=0o700)
        source.rename(place)  # which replaces an empty directory: the one that was just made
        return
    try:
        os.link(source, place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(source, place)
    source.unlink()


def _copy(source: Path, place: Path) -> None:
    """To another file system: only the configuration goes there, which holds no secret."""
    with place.open("x", encoding="utf-8") as file:
        try:
            file.write(source.read_text(encoding="utf-8"))
            file.flush()
            os.fsync(file.fileno())
            shutil.copymode(source, place)
        except BaseException:
            place.unlink()
            raise


def _is_inside(config: Path, target: Path) -> bool:
    return config.parent.resolve() == target.resolve()


def _refuse_unfit(directory: Path) -> None:
    if not directory.is_dir():
        raise CommandError(f"{directory}: is no directory")
    if directory.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CommandError(
            f"{directory}: others can write to it and replace its files;"
            f" run: chmod go-w {directory}"
        )


def _refuse_taken(places: list[Path]) -> None:
    for place in places:
        if os.path.lexists(place):
            raise CommandError(f"{place}: is there already; nothing was changed")


def _build(staging: Path, target: Path, plan: Plan) -> None:
    (staging / "tls").mkdir(mode=0o700)
    (staging / "credentials").mkdir(mode=0o700)
    certificate, private_key = self_signed(plan.hosts, plan.certificate_key, datetime.now(UTC))
    (staging / "tls" / "server.crt").write_text(certificate, encoding="ascii")
    write_secret_file(staging / "tls" / "server.key", private_key)
    credentials = format_credentials([new_credential(plan.protocol)])
    write_secret_file(staging / "credentials" / f"{plan.keystore}.toml", credentials)
    make_files, _ = _KMIS[plan.kmi]
    make_files(staging, plan)
    file = staging / plan.config.name
    file.write_text(_config_text(plan, Path()), encoding="utf-8")
    try:
        config = load_config(file)
    except ConfigError as error:
        reasons = "; ".join(str(problem) for problem in error.problems)
        raise CommandError(f"cannot make this configuration: {reasons}") from None
    _create_key(config, plan.key_id)
    if not _is_inside(plan.config, target):
        file.write_text(_config_text(plan, target.absolute()), encoding="utf-8")
        file.chmod(0o644)  # root makes it, the service reads it; there is no secret in it


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


def _make_software(staging: Path, plan: Plan) -> None:
    """The embedded key manager: a keyring under a master key."""
    del plan
    master_key = new_master_key()
    write_secret_file(staging / "master.key", master_key + "\n")
    create_keyring(staging / "keyring.db", master_key)


def _software_section(plan: Plan, base: Path) -> str:
    del plan
    return f"""\
[[kmi]]
name = "local"
type = "software"
keyring = {_toml(base / "keyring.db")}
master_key = {_toml(base / "master.key")}            # keep a copy: without it no key can be used
"""


def _make_pkcs11(staging: Path, plan: Plan) -> None:
    """An HSM: its keys stay where they are, the PIN is written to a file of its own."""
    assert plan.hsm is not None  # noqa: S101 - init() saw to it
    write_secret_file(staging / "pin", plan.hsm.pin + "\n")


def _pkcs11_section(plan: Plan, base: Path) -> str:
    hsm = plan.hsm
    assert hsm is not None  # noqa: S101 - init() saw to it
    return f"""\
[[kmi]]
name = "local"
type = "pkcs11"
module = {_toml(hsm.module)}
token = {_toml(hsm.token)}
pin = {_toml(base / "pin")}
lanes = 2                            # processes, each with a session of its own
max_batch = 64                       # operations that a lane takes in one go
"""


_KMIS: Mapping[str, tuple[Callable[[Path, Plan], None], Callable[[Plan, Path], str]]] = {
    "software": (_make_software, _software_section),
    "pkcs11": (_make_pkcs11, _pkcs11_section),
}
"""For each kind of KMI what makes its files in a directory, and its section, `local`."""


_CERTIFICATE = {
    True: "the cloud pins it: xkiproxy fingerprint",
    False: "for tests; the cloud wants one of a public authority",
}
"""What to know of the certificate, by whether the cloud pins it."""


def _toml(value: str | Path) -> str:
    """A value that a user chose, quoted rightly whatever is in it."""
    return tomli_w.dumps({"x": str(value)}).removeprefix("x = ").strip()


def _config_text(plan: Plan, base: Path) -> str:
    """The configuration; its files are below `base`, empty where they stand beside it."""
    _, kmi_section = _KMIS[plan.kmi]
    certificate = _CERTIFICATE[CONSOLES[plan.protocol].pins_certificate]
    written = (
        ""
        if base == Path()
        else f"""
[catalog]
path = {_toml(base / "catalog.db")}

[audit]
path = {_toml(base / "audit.jsonl")}
"""
    )
    return f"""\
# xkiproxy: what stands between a cloud's key management service and keys that stay at home.
# Paths are relative to this file. Secrets never stand in it. Check it with: xkiproxy check

[server]
listen = "0.0.0.0:8443"              # what the cloud calls
admin_listen = "127.0.0.1:9464"      # /metrics /livez /readyz /status
workers = 1                          # processes that share the port

[server.tls]
certificate = {_toml(base / "tls" / "server.crt")}       # {certificate}
private_key = {_toml(base / "tls" / "server.key")}
{written}
{kmi_section(plan, base)}
[[keystore]]
name = {_toml(plan.keystore)}
protocol = {_toml(plan.protocol)}
path_prefix = {_toml(f"/{plan.keystore}")}
kmi = ["local"]                      # in order of preference
credentials = {_toml(base / "credentials" / f"{plan.keystore}.toml")}
"""


def _report(target: Path, config: Path, as_json: bool) -> None:
    if as_json:
        print_json({"config": str(config), "directory": str(target)})
        return
    name = config.name if _is_inside(config, target) else str(config)
    out.print(f"Made {target}:", markup=False)
    print_fields(
        {
            f"  {name}": "the configuration",
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
