"""A real rsyslogd for tests: in a folder of its own, on a free port, a file for each PROCID."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from ports import free_port

_PROGRAM = shutil.which("rsyslogd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")

_CONFIG = """
global(workDirectory="{folder}" maxMessageSize="64k"
       parser.escapeControlCharactersOnReceive="off" {tls_files})
module(load="imtcp" {tls_mode})
template(name="file" type="string" string="{folder}/%procid%.jsonl")
template(name="line" type="string" string="%msg%\\n")
ruleset(name="audit") {{ action(type="omfile" dynaFile="file" template="line") }}
input(type="imtcp" address="127.0.0.1" port="{port}" ruleset="audit")
"""


class Rsyslog:
    """`certificates`: a folder with ca.crt, server.crt and server.key, for TLS with clients'."""

    def __init__(self, folder: Path, certificates: Path | None = None) -> None:
        assert _PROGRAM, "rsyslogd is missing: run tests/system-packages.sh"
        self.folder = folder
        folder.mkdir()
        self.port = free_port()
        files = mode = ""
        if certificates is not None:
            files = (
                f'defaultNetstreamDriverCAFile="{certificates}/ca.crt"'
                f' defaultNetstreamDriverCertFile="{certificates}/server.crt"'
                f' defaultNetstreamDriverKeyFile="{certificates}/server.key"'
            )
            mode = 'streamDriver.name="ossl" streamDriver.mode="1"'
            mode += ' streamDriver.authMode="x509/certvalid"'
        self._config = folder / "rsyslog.conf"
        self._config.write_text(
            _CONFIG.format(folder=folder, port=self.port, tls_files=files, tls_mode=mode)
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        assert _PROGRAM
        with (self.folder / "rsyslogd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [_PROGRAM, "-n", "-f", str(self._config), "-i", str(self.folder / "pid")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        for _ in range(400):
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        pytest.fail((self.folder / "rsyslogd.log").read_text())

    def stop(self, number: int = signal.SIGTERM) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(timeout=30)

    def stored(self, name: str = "audit") -> Path:
        return self.folder / f"{name}.jsonl"
