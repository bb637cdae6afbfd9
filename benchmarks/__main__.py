"""The command line of the benchmarks: `xkiproxy-bench --help`, or `python -m benchmarks`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Literal, NoReturn
from urllib.parse import urlsplit

import typer
import uvloop

from benchmarks import suite
from benchmarks.load import LoadError, LoadResult, Plan, Target, Workload, run_load
from benchmarks.load.requests import Call
from benchmarks.report import cpu_table, remarks, table
from benchmarks.scenarios import FULL, QUICK, SCENARIOS
from benchmarks.servers import BareServer, ChildServer, ProtocolName, ProxyServer
from xkiproxy.config.secrets import SecretError, SecretSource
from xkiproxy.keystores.credentials import Credential, CredentialError, load_credentials

app = typer.Typer(
    name="xkiproxy-bench",
    no_args_is_help=True,
    add_completion=False,
    help="Loads for XKI and XKS proxies.",
)

_BARE_RATE = 35_000
"""More requests a second than a process of the bare server can answer: none is signed late."""

Seconds = Annotated[float, typer.Option(help="How long each load is measured.", min=0.1)]
Connections = Annotated[int, typer.Option(help="How many, of all generators together.", min=1)]
Processes = Annotated[int, typer.Option(help="Generator processes.", min=1)]
Protocol = Annotated[ProtocolName, typer.Option(help="xki or xks.")]
CallOption = Annotated[Call, typer.Option(help="encrypt, decrypt or mixed (half of each).")]
Size = Annotated[int, typer.Option(help="Bytes of a plaintext.", min=1, max=40_000)]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the results here too.", metavar="FILE")
]


@app.command()
def load(
    url: Annotated[str, typer.Option(help="Where, such as https://127.0.0.1:8443.")],
    credentials: Annotated[
        Path, typer.Option(help="The credentials file of the key store.", metavar="FILE")
    ],
    protocol: Protocol = "xki",
    path: Annotated[str, typer.Option(help="The prefix of the key store.")] = "/demo",
    key: Annotated[str, typer.Option(help="The ID of the key.")] = "demo-key",
    call: CallOption = "encrypt",
    size: Size = 32,
    connections: Connections = 64,
    seconds: Seconds = 5.0,
    warm_up: Annotated[float, typer.Option(help="Seconds before, not counted.", min=0)] = 1.0,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second, whatever happens (open loop).", min=0.1),
    ] = None,
    processes: Processes = 1,
    ca: Annotated[
        Path | None, typer.Option(help="https: the certificate to trust.", metavar="FILE")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Put a load on a running proxy and print what came of it.

    Without --rate each connection sends its next request once it has its answer. With --rate
    requests are due at fixed times, and latencies count from these.

    Exits with 1 if any answer was wrong or missing.

    Example: xkiproxy-bench load --url https://127.0.0.1:8443 --credentials
    run/demo/credentials/demo.toml --ca run/demo/tls/server.crt --connections 64 --seconds 5
    """
    target = _target(url, ca)
    credential = _credential(credentials)
    workload = Workload(
        protocol, path, key, credential.access_key_id, credential.access_key_secret,
        urlsplit(url).netloc, call, size,
    )  # fmt: skip
    plan = Plan(target, workload, connections, seconds, rate, warm_up)
    result = _run(plan, processes)
    _show({f"{protocol} {call}": result}, json_file)
    if result.wrong or result.errors:
        raise typer.Exit(1)


@app.command()
def demo(
    kmi: Annotated[
        Literal["software", "pkcs11"], typer.Option(help="software, or pkcs11 (SoftHSM).")
    ] = "software",
    protocol: Protocol = "xki",
    call: CallOption = "encrypt",
    size: Size = 32,
    tls: Annotated[bool, typer.Option(help="HTTPS, or plain HTTP.")] = True,
    lanes: Annotated[int, typer.Option(help="pkcs11: processes at the HSM.", min=1)] = 2,
    connections: Connections = 64,
    seconds: Seconds = 3.0,
    processes: Processes = 1,
    json_file: JsonFile = None,
) -> None:
    """Start the bare server and a proxy, put a closed loop on each, and compare.

    Example: xkiproxy-bench demo --kmi pkcs11 --no-tls
    """
    results: dict[str, LoadResult] = {}
    servers: tuple[ChildServer, ...] = (
        BareServer(tls=tls, size=size),
        ProxyServer(kmi=kmi, tls=tls, lanes=lanes),
    )
    for server in servers:
        try:
            with server:
                results[server.name] = _measure(
                    server, protocol, call, size, connections, seconds, processes
                )
        except LoadError as error:
            _fail(str(error))
    _show(results, json_file)


@app.command()
def run(
    names: Annotated[
        list[str] | None, typer.Argument(help="Scenarios; default: all.", metavar="[NAME]...")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute, less exact.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write everything as JSON.", metavar="FILE")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Draw the curves there.", metavar="FOLDER")
    ] = None,
) -> None:
    """Run the scenarios and print their figures beside their targets.

    Exits with 1 if an answer was wrong or missing; a target that is missed is a measurement.

    Example: xkiproxy-bench run --output run/bench/results.json --plots run/bench
    """
    chosen = names or [name for name in SCENARIOS if not (quick and name == "curves")]
    for name in chosen:
        if name not in SCENARIOS:
            raise typer.BadParameter(f"there are: {', '.join(SCENARIOS)}", param_hint="NAME")
    try:
        results = asyncio.run(suite.run_suite(chosen, QUICK if quick else FULL))
    except LoadError as error:
        _fail(str(error))
    if output is not None:
        suite.write(results, output)
    if plots is not None:
        suite.plot(results, plots)
    typer.echo(suite.table(results))
    if failed := suite.failures(results):
        typer.echo(f"failures: {failed}", err=True)
        raise typer.Exit(1)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="What `run --output` wrote.")],
    other: Annotated[Path, typer.Argument(help="And a later one.")],
) -> None:
    """Set two results side by side.

    Example: xkiproxy-bench compare before.json after.json
    """
    typer.echo(suite.compare(json.loads(one.read_text()), json.loads(other.read_text())))


def _measure(
    server: ChildServer,
    protocol: ProtocolName,
    call: Call,
    size: int,
    connections: int,
    seconds: float,
    processes: int,
) -> LoadResult:
    typer.echo(f"{server.name}: {server.url}", err=True)
    workload, ahead = server.workload(protocol, call, size), None
    if isinstance(server, BareServer):
        ahead = int(_BARE_RATE * (seconds + 1))
    plan = Plan(server.target, workload, connections, seconds, ahead=ahead)
    return _run(plan, processes, server)


def _run(plan: Plan, processes: int, server: ChildServer | None = None) -> LoadResult:
    probe = server.cpu_seconds if server is not None else None
    try:
        return uvloop.run(run_load(plan, processes, probe=probe))
    except LoadError as error:
        _fail(str(error))


def _show(results: dict[str, LoadResult], json_file: Path | None) -> None:
    for text in (table(results), cpu_table(results), remarks(results)):
        typer.echo(text + "\n")
    if json_file is not None:
        data = {name: result.to_json() for name, result in results.items()}
        json_file.write_text(json.dumps(data, indent=2))


def _target(url: str, ca: Path | None) -> Target:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port:
        raise typer.BadParameter("write it as https://host:port", param_hint="--url")
    if (parts.scheme == "https") != (ca is not None):
        raise typer.BadParameter("https needs it, http has none", param_hint="--ca")
    return Target(parts.hostname, parts.port, None if ca is None else str(ca))


def _credential(file: Path) -> Credential:
    try:
        found = load_credentials(SecretSource(file=file.absolute()))
    except (SecretError, CredentialError) as error:
        _fail(str(error))
    if not found:
        raise typer.BadParameter("there is no credential in it", param_hint="--credentials")
    return found[0]


def _fail(text: str) -> NoReturn:
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
