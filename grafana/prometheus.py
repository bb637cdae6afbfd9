"""A Prometheus to ask, and one of our own with the rules of this repository (Debian's package)."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

RULES = sorted((Path(__file__).parent / "rules").glob("*.yml"))

_ANSWER_SECONDS = 30.0
_STOP_SECONDS = 20.0


class PrometheusError(Exception):
    """It is not there, or does not understand what it was asked."""


def ask(url: str, path: str, **fields: str) -> Any:
    """The data of an answer of the HTTP API (v1); `url` is such as http://127.0.0.1:9090.

    Raises:
        PrometheusError: with what it said.
    """
    body = urllib.parse.urlencode(fields).encode() if fields else None
    try:
        address = f"{url}/api/v1/{path}"
        with urllib.request.urlopen(address, body, timeout=_ANSWER_SECONDS) as response:
            return json.loads(response.read())["data"]
    except urllib.error.HTTPError as error:
        asked = fields.get("query", path)
        raise PrometheusError(f"{asked}: {error.read().decode(errors='replace')}") from None
    except OSError as error:
        raise PrometheusError(f"{url} does not answer: {error}") from None


class Prometheus:
    """Reads `targets` (addresses by the name that stands for them) every `interval` seconds.

    Configuration, data and log are in `directory`, which it makes. `with` stops it.
    """

    def __init__(self, directory: Path, targets: Mapping[str, str], interval: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{address}"
        directory.mkdir()
        configs = [
            {"targets": [target], "labels": {"instance": name}} for name, target in targets.items()
        ]
        config = {
            "global": {"scrape_interval": f"{interval}s", "evaluation_interval": f"{interval}s"},
            "rule_files": [str(path) for path in RULES],
            "scrape_configs": [{"job_name": "xkiproxy", "static_configs": configs}],
        }
        (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        with (directory / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["prometheus", f"--config.file={directory}/prometheus.yml",
                 f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def ask(self, path: str, **fields: str) -> Any:
        """See `ask`."""
        return ask(self.url, path, **fields)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not help."""
        self._process.terminate()
        try:
            self._process.wait(timeout=_STOP_SECONDS)
        finally:
            self._process.kill()
