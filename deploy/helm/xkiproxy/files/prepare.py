"""What a replica does before it serves: a folder for the audit log, keys registered in its catalog.

    prepare.py keys.json STATE

A key that is wanted "disabled" is disabled at each start. One that is wanted "enabled" is
registered where the catalog does not have it; if it was disabled there by hand, it stays so. A KMI
that is away stops the start, unless this replica has had these very keys of it before: then what
its catalog says holds, and another KMI may serve meanwhile.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def xkiproxy(*arguments: str) -> str:
    """What the command prints; raises CalledProcessError. Its errors go to standard error."""
    command = ["xkiproxy", *arguments]  # the image's own, by its PATH
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return done.stdout


def settle(kmi: str, wanted: dict[str, str]) -> None:
    """Give the keys of a KMI the state that is wanted; raises CalledProcessError."""
    states = {
        key["id"]: key["state"]
        for key in json.loads(xkiproxy("keys", "list", "--kmi", kmi, "--json"))
    }
    for key, state in wanted.items():
        have = states.get(key)
        if state == "disabled" and have not in {"DISABLED", "PENDING_DELETION"}:
            xkiproxy("keys", "disable", key, "--kmi", kmi)
        elif state == "enabled" and have in {None, "UNREGISTERED"}:
            xkiproxy("keys", "enable", key, "--kmi", kmi)
        elif state == "enabled" and have != "ENABLED":
            print(f"key {key} of {kmi} stays {have}", file=sys.stderr)


def main(keys: Path, directory: Path) -> int:
    (directory / "audit").mkdir(mode=0o700, exist_ok=True)
    wanted: dict[str, dict[str, str]] = {}
    for key in json.loads(keys.read_text()):
        wanted.setdefault(key["kmi"], {})[key["id"]] = key.get("state", "enabled")
    memory = directory / "keys.settled.json"
    before: dict[str, Any] = json.loads(memory.read_text()) if memory.exists() else {}
    for kmi, states in wanted.items():
        try:
            settle(kmi, states)
        except subprocess.CalledProcessError as error:
            if before.get(kmi) != states:
                return error.returncode
            print(f"{kmi}: its keys stay as they were at the last start", file=sys.stderr)
    new = memory.with_suffix(".new")
    new.write_text(json.dumps(wanted))
    new.replace(memory)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
