"""The program of the bare server: what Python's HTTP costs when nothing is done behind it.

aiohttp's low-level server on uvloop, set up as the proxy's listener does it. It reads a request's
body and answers with the proxy's headers and a body of the right size, always the same: the
ciphertext is made up, the plaintext is the first of the load generator's. It knows no signature.

It prints its port once it listens: `python -m benchmarks.bare --size 32`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Awaitable, Callable

import uvloop
from aiohttp.web import BaseRequest, Response, Server
from multidict import CIMultiDict

from benchmarks.load.requests import Workload
from xkiproxy.config.models import TlsSettings
from xkiproxy.config.tls import read_tls
from xkiproxy.crypto.algorithms import Algorithm
from xkiproxy.crypto.operations import Decrypt, Decrypted, Encrypt, Encrypted
from xkiproxy.protocols.base import Protocol
from xkiproxy.protocols.xki import XkiProtocol
from xkiproxy.protocols.xks import XksProtocol
from xkiproxy.server.tls import server_context

_KEY = "demo-key"
_REQUEST_ID = "00000000-0000-4000-8000-000000000000"
_BACKLOG = 2048


def _bodies(size: int) -> dict[str, bytes]:
    """The answer to each end of a path, as the proxy's own protocols write it."""
    nobody = Workload("xki", "", _KEY, "", "", "", plaintext_size=size)
    plaintext, iv = nobody.plaintext(0), bytes(12)
    encrypted = Encrypted(bytes(size + 16), iv, 1, Algorithm.AES_GCM, None)
    decrypted = Decrypted(plaintext, 1, Algorithm.AES_GCM, None)
    bodies = {}
    protocols: list[tuple[str, Protocol]] = [("xki", XkiProtocol()), ("xks", XksProtocol())]
    for name, protocol in protocols:
        encrypt = protocol.encode(Encrypt(_KEY, plaintext), encrypted, _REQUEST_ID)
        decrypt = protocol.encode(
            Decrypt(_KEY, encrypted.ciphertext, iv, 1), decrypted, _REQUEST_ID
        )
        bodies[f"{name}/encrypt"], bodies[f"{name}/decrypt"] = encrypt, decrypt
    return bodies


def _handler(size: int) -> Callable[[BaseRequest], Awaitable[Response]]:
    bodies = _bodies(size)
    fixed = {protocol.name: _headers(protocol) for protocol in (XkiProtocol(), XksProtocol())}

    async def handle(request: BaseRequest) -> Response:
        await request.read()
        path = request.raw_path
        protocol = "xks" if "/kms/xks/" in path else "xki"
        body = bodies[f"{protocol}/{path.rpartition('/')[2]}"]
        return Response(status=200, body=body, headers=CIMultiDict(fixed[protocol]))

    return handle


def _headers(protocol: Protocol) -> CIMultiDict[str]:
    headers = CIMultiDict({"Content-Type": "application/json", "Server": "bare"})
    for line in protocol.headers(_REQUEST_ID).decode("ascii").splitlines():
        name, _, value = line.partition(": ")
        headers[name] = value
    return headers


async def _serve(size: int, tls: TlsSettings | None) -> None:
    loop = asyncio.get_running_loop()
    http = Server(_handler(size), access_log=None, auto_decompress=False)
    context = server_context(tls, read_tls(tls)) if tls is not None else None
    server = await loop.create_server(http, "127.0.0.1", 0, ssl=context, backlog=_BACKLOG)
    print(server.sockets[0].getsockname()[1], flush=True)
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    server.close()
    await http.shutdown(timeout=1.0)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32, help="of a plaintext, in bytes")
    parser.add_argument("--certificate", help="for TLS: a file")
    parser.add_argument("--private-key", help="for TLS: a file")
    arguments = parser.parse_args()
    tls = None
    if arguments.certificate is not None:
        tls = TlsSettings.model_validate(
            {"certificate": arguments.certificate, "private_key": arguments.private_key}
        )
    uvloop.run(_serve(arguments.size, tls))


if __name__ == "__main__":
    main()
