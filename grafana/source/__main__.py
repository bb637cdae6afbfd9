"""Writes the dashboards as Grafana reads them.

Example: `python -m grafana.source`
"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana.source import kmi, overview, security

FOLDER = Path(__file__).resolve().parents[1] / "dashboards"


def dashboards() -> dict[str, str]:
    """The text of each file, by its name."""
    made = (overview.dashboard(), kmi.dashboard(), security.dashboard())
    return {f"{builder.build().uid}.json": encode(builder) for builder in made}


def encode(builder: Dashboard) -> str:
    """A dashboard in JSON, the same whenever it is made."""
    return JSONEncoder(indent=2, sort_keys=True).encode(builder.build()) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)
        print(f"written: grafana/dashboards/{name}")
