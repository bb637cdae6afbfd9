"""A fresh token for each test, a KMI on it, and modules that misbehave."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from hsm import PIN, SOFTHSM, Hsm, make_hsm, run

from xkiproxy.config.models import Pkcs11Settings
from xkiproxy.config.secrets import write_secret_file
from xkiproxy.kmi.pkcs11.manager import Pkcs11KeyManager
from xkiproxy.kmi.queued import QueuedKmi
from xkiproxy.kmi.registry import open_kmi
from xkiproxy.observability.metrics import Metrics

StartKmi = Callable[[Pkcs11Settings], Awaitable[QueuedKmi]]
OpenManager = Callable[[Pkcs11Settings], Pkcs11KeyManager]

_SOFTOKEN = next(iter(sorted(Path("/usr/lib").glob("*/libsoftokn3.so"))), Path("libsoftokn3.so"))


@pytest.fixture(scope="session")
def shim_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module of shim.c."""
    compiled = tmp_path_factory.mktemp("shim") / "shim.so"
    run(
        "gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(compiled),
        str(Path(__file__).with_name("shim.c")), "-ldl",
    )  # fmt: skip
    return compiled


@pytest.fixture
def hsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hsm:
    """A SoftHSM token, `t1`, in a folder of its own."""
    return make_hsm(tmp_path / "hsm", monkeypatch)


@pytest.fixture
def shimmed(hsm: Hsm, shim_module: Path, monkeypatch: pytest.MonkeyPatch) -> Hsm:
    """The same token behind the shim."""
    monkeypatch.setenv("SHIM_MODULE", str(SOFTHSM))
    hsm.module = shim_module
    return hsm


@pytest.fixture
def nss(tmp_path: Path, shim_module: Path, monkeypatch: pytest.MonkeyPatch) -> Hsm:
    """NSS's softoken, an unrelated module: the shim gives it what it asks for."""
    directory = tmp_path / "nss"
    (directory / "db").mkdir(parents=True)
    made = Hsm(directory, shim_module, "NSS Certificate DB")
    write_secret_file(made.pin_file, PIN + "\n")
    database = f"sql:{directory / 'db'}"
    run("certutil", "-N", "-d", database, "-f", str(made.pin_file))
    monkeypatch.setenv("SHIM_MODULE", str(_SOFTOKEN))
    monkeypatch.setenv(
        "SHIM_INIT_PARAMS",
        f"configdir='{database}' certPrefix='' keyPrefix='' secmod='' flags=",
    )
    return made


@pytest.fixture
async def start_kmi() -> AsyncIterator[StartKmi]:
    """Start a KMI and wait until its lanes are there, or could not be started."""
    started: list[QueuedKmi] = []

    async def start(settings: Pkcs11Settings) -> QueuedKmi:
        kmi = open_kmi(settings, Metrics())
        assert isinstance(kmi, QueuedKmi)
        started.append(kmi)
        kmi.start()
        await kmi.check()
        return kmi

    yield start
    for kmi in started:
        await kmi.close()


@pytest.fixture
def open_manager() -> Iterator[OpenManager]:
    opened: list[Pkcs11KeyManager] = []

    def open_(settings: Pkcs11Settings) -> Pkcs11KeyManager:
        opened.append(Pkcs11KeyManager(settings))
        return opened[-1]

    yield open_
    for manager in opened:
        manager.close()


@pytest.fixture
async def kmi(hsm: Hsm, start_kmi: StartKmi) -> QueuedKmi:
    """A KMI of one lane on the token."""
    return await start_kmi(hsm.settings())


@pytest.fixture
def manager(hsm: Hsm, open_manager: OpenManager) -> Pkcs11KeyManager:
    return open_manager(hsm.settings())
