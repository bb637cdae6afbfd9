"""Print debian/copyright: our licence, and that of each package in a folder of site-packages.

    python copyright.py SITE_PACKAGES

A package that says nothing of its licence, neither in its metadata nor in a file, ends the build.
"""

import sys
from importlib.metadata import PathDistribution
from pathlib import Path

HEAD = """\
xkiproxy is licensed under the Apache License, Version 2.0, which is in
/usr/share/common-licenses/Apache-2.0.

Copyright (C) 2026 the xkiproxy authors

The package holds these Python packages as their projects publish them, in
{site}. Copyrights and full texts
are in the files named. Compiled parts hold libraries of others, which these
texts, or lists in the folders `sboms` beside them, name as well: cryptography
and python-pkcs11 have OpenSSL, uvloop has libuv; cedarpy, cryptography, orjson
and pydantic-core have crates of Rust.
"""


def licence(distribution: PathDistribution) -> str:
    """What the metadata says of the licence; empty where it says nothing."""
    metadata = distribution.metadata
    named = [
        value.rpartition(" :: ")[2]
        for value in metadata.get_all("Classifier", [])
        if value.startswith("License :: OSI Approved :: ")
    ]
    stated = metadata.get("License", "").strip().splitlines()[:1]  # some have the whole text there
    return metadata.get("License-Expression") or ", ".join(named or stated)


def licence_files(info: Path) -> list[str]:
    """The files with the texts, as paths below site-packages."""
    names = ("LICEN", "COPYING", "NOTICE")
    found = [path for path in info.rglob("*") if path.name.upper().startswith(names)]
    return sorted(str(path.relative_to(info.parent)) for path in found if path.is_file())


def main(site: Path) -> None:
    """Print the file; raises SystemExit."""
    print(HEAD.format(site=f"/usr/lib/xkiproxy/lib/{site.parent.name}/site-packages"))
    for info in sorted(site.glob("*.dist-info"), key=lambda path: path.name.lower()):
        distribution = PathDistribution(info)
        name = distribution.metadata["Name"]
        files = licence_files(info)
        said = licence(distribution) or ("see its file" if files else "")
        if not said:
            sys.exit(f"copyright.py: {name} does not say what its licence is")
        if name == "xkiproxy":
            continue
        by = distribution.metadata.get("Author") or distribution.metadata.get("Author-email")
        print(f"{name} {distribution.version}\n  licence: {said}")
        if by:
            print(f"  by: {by}")
        for file in files:
            print(f"  text: {file}")
        print()


main(Path(sys.argv[1]))
