"""Fixtures of the command line's tests: running it, and a directory to run it on."""

from __future__ import annotations

import http.server
import json
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from cli_site import ACCESS_KEY_ID, ACCESS_KEY_SECRET, Answer, Outcome, Recorded, Run, Server, Site

from xkiproxy.cli import main
from xkiproxy.cli.certificate import CertificateKey, host_names, self_signed
from xkiproxy.config.secrets import write_secret_file


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `xkiproxy` with these arguments, in this process."""
    monkeypatch.delenv("XKIPROXY_CONFIG", raising=False)
    monkeypatch.delenv("XKIPROXY_ACCESS_KEY_SECRET", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["xkiproxy", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return run


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "site")
    (site.directory / "tls").mkdir(parents=True)
    (site.directory / "credentials").mkdir()
    certificate, key = self_signed(host_names([]), CertificateKey.EC, datetime.now(UTC))
    site.certificate.write_text(certificate)
    write_secret_file(site.private_key, key)
    write_secret_file(
        site.credentials,
        f'[[credential]]\naccess_key_id = "{ACCESS_KEY_ID}"\n'
        f'access_key_secret = "{ACCESS_KEY_SECRET}"\ncreated = "2026-01-02T03:04:05Z"\n',
    )
    site.listen_on(8443)
    return site


@pytest.fixture
def xks_site(site: Site) -> Site:
    """The site, but its key store speaks XKS."""
    changed = replace(site, protocol="xks")
    changed.listen_on(8443)
    return changed


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    running: list[http.server.ThreadingHTTPServer] = []

    def start(certificate: Path, key: Path, client_ca: Path | None = None) -> Server:
        server = Server()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.requests.append(Recorded(self.path, dict(self.headers.items()), body))
                time.sleep(server.delay)
                self.send_response_only(server.status)
                self.send_header("Date", server.date or formatdate(usegmt=True))
                self.send_header("Content-Length", str(len(server.answer)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(server.answer)

            def log_message(self, *arguments: object) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *arguments: object) -> None:
                pass

            def finish_request(self, request: Any, client_address: Any) -> None:
                # The handshake belongs to the connection's thread, where its failure hurts nobody.
                with context.wrap_socket(request, server_side=True) as secured:
                    super().finish_request(secured, client_address)

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        if client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(client_ca)
        listener = Quiet(("127.0.0.1", 0), Handler)
        running.append(listener)
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        server.port = listener.server_address[1]
        return server

    yield start
    for listener in running:
        listener.shutdown()
        listener.server_close()


@pytest.fixture
def server(site: Site, start: Callable[..., Server]) -> Server:
    """A server with the site's own certificate, where the site's configuration says it is."""
    server = start(site.certificate, site.private_key)
    site.listen_on(server.port)
    return server


@pytest.fixture
def xks_server(xks_site: Site, server: Server) -> Server:
    """The server, as that of the key store that speaks XKS."""
    xks_site.listen_on(server.port)
    server.answer = b"{}"
    return server


@pytest.fixture
def answer(site: Site) -> Iterator[Answer]:
    """Sets what the process at admin_listen says of itself."""
    said = b""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *arguments: object) -> None:
            pass

    def set_answer(value: Any) -> None:
        nonlocal said
        said = json.dumps(value).encode()

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    address = f'[server]\nadmin_listen = "127.0.0.1:{server.server_port}"'
    site.config.write_text(site.config.read_text().replace("[server]", address, 1))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield set_answer
    server.shutdown()
    thread.join()
    server.server_close()
