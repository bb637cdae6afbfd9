"""`xkiproxy keyring`: the file of the software KMI, and the master key that opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xkiproxy.cli.common import (
    DEFAULT_CONFIG,
    CommandError,
    ConfigOption,
    JsonOption,
    out,
    print_json,
)
from xkiproxy.config import Config, load_config
from xkiproxy.config.models import SoftwareSettings
from xkiproxy.config.secrets import SecretError
from xkiproxy.kmi.software import Rewrapped, make_keyring, rewrap_keyring

app = typer.Typer(
    no_args_is_help=True, help="Make the keyring of the software KMI, or change its master key."
)

KmiOption = Annotated[
    str | None,
    typer.Option("--kmi", metavar="NAME", help="The KMI, where several of type software are."),
]


@app.command(epilog="Example: xkiproxy keyring create --kmi local")
def create(
    kmi: KmiOption = None, config: ConfigOption = DEFAULT_CONFIG, json: JsonOption = False
) -> None:
    """Make an empty keyring where the configuration names one that is not there.

    Its master key is made too, if it is a file that is not there. Nothing is overwritten. What was
    encrypted under keys of a lost keyring is lost with it: restore a backup first, if there is one.
    """
    settings = _find(load_config(config), kmi)
    try:
        is_new = make_keyring(settings)
    except SecretError as error:
        raise CommandError(
            f"{error}; put a master key there first, of 32 bytes: openssl rand -base64 32"
        ) from None
    if json:
        print_json(
            {
                "kmi": settings.name,
                "keyring": str(settings.keyring),
                "master_key": str(settings.master_key),
                "master_key_is_new": is_new,
            }
        )
        return
    kind = "a new one: keep a copy elsewhere" if is_new else "which was there"
    out.print(f"Made the keyring {settings.keyring}.", markup=False)
    out.print(f"Its master key is in {settings.master_key}, {kind}.", markup=False)
    out.print("Restart the servers that are to use it.", markup=False)


@app.command(
    epilog="Examples: xkiproxy keyring rewrap --kmi local; where the master key is no file: "
    "xkiproxy keyring rewrap --new-master-key master-key.new"
)
def rewrap(
    kmi: KmiOption = None,
    new_master_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to write the new master key, if it cannot take the place of the old one.",
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    json: JsonOption = False,
) -> None:
    """Make a new master key, and wrap all versions of all keys under it; the keys stay the same.

    The old master key opens the keyring no more. Interrupted, it is finished by running it again.
    """
    settings = _find(load_config(config), kmi)
    done = rewrap_keyring(settings, new_master_key)
    if json:
        print_json(
            {
                "kmi": settings.name,
                "keyring": str(settings.keyring),
                "master_key": str(done.place),
                "in_force": done.in_force,
                "versions": done.versions,
            }
        )
        return
    _report(settings, done)


def _report(settings: SoftwareSettings, done: Rewrapped) -> None:
    said = (
        "An earlier rewrap had wrapped all versions of keys anew; this one has finished it."
        if done.versions is None
        else f"Wrapped {done.versions} versions of keys anew."
    )
    lines = [f"Keyring {settings.keyring}: {said}", f"The new master key is in {done.place}."]
    if not done.in_force:
        lines.append(
            f"Put it into {settings.master_key} now, and then remove that file: until it is there,"
            " no server and no command can open the keyring."
        )
    lines += [
        "Then restart the servers that use this keyring: running ones go on with the keys that they"
        " have, and take over no new keys and versions.",
        "Copies of the old keyring still open with the old master key: make a new backup and"
        " destroy the old ones. If somebody may have both, rotate the keys and encrypt anew.",
    ]
    for line in lines:
        out.print(line, markup=False)


def _find(config: Config, name: str | None) -> SoftwareSettings:
    found = {kmi.name: kmi for kmi in config.kmi if isinstance(kmi, SoftwareSettings)}
    names = ", ".join(found)
    if not found:
        raise CommandError("no KMI of type software is configured: only that has a keyring")
    if name is None:
        if len(found) != 1:
            raise CommandError(f"several KMIs have a keyring: say which with --kmi, of: {names}")
        (name,) = found
    if name not in found:
        raise CommandError(f"there is no KMI {name!r} of type software; there are: {names}")
    return found[name]
