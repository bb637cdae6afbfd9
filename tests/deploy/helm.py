"""Helm's engine (PyPI's helm-python-sdk), in a process of its own.

It brings the Go runtime along, with threads and signal handlers, which the other tests of a process
are not to meet.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Values = dict[str, Any]


class HelmRefused(Exception):
    """Helm's own message."""


def render(chart: Path, values: Values) -> dict[str, str]:
    """The manifests of the release `kms` in the namespace `keys`, by template; or HelmRefused."""
    made: dict[str, str] = _ask("render", chart=str(chart), values=values)
    return made


def lint(chart: Path, values: Values, kubernetes: str) -> list[str]:
    """What `helm lint --strict` has against it."""
    found: list[str] = _ask("lint", chart=str(chart), values=values, kubernetes=kubernetes)
    return found


def package(chart: Path, folder: Path) -> Path:
    """Make the archive."""
    return Path(_ask("package", chart=str(chart), folder=str(folder)))


def files(chart: Path) -> set[str]:
    """The names of what is in it beside templates."""
    return set(_ask("files", chart=str(chart)))


def _ask(what: str, **fields: Any) -> Any:
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps({"what": what, **fields}),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise HelmRefused(answer["error"])
    return answer["result"]


def _answer(asked: dict[str, Any]) -> Any:
    from helm_python import chart as helm

    if asked["what"] == "lint":
        version = f"v{asked['kubernetes']}.0"
        given = asked["values"]
        return helm.lint(asked["chart"], given, strict=True, kube_version=version)["errors"]
    with helm.Chart.load(asked["chart"]) as chart:
        match asked["what"]:
            case "render":
                return chart.render(asked["values"], name="kms", namespace="keys")
            case "package":
                return chart.save(asked["folder"])
            case _:
                return [file["name"] for file in chart.files]


def main() -> None:
    """Answer what standard input asks."""
    from helm_python.errors import HelmError

    try:
        print(json.dumps({"result": _answer(json.load(sys.stdin))}))
    except HelmError as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main()
