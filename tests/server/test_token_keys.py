"""Google's keys, fetched from a real server over TLS: rotation, outage, caching, reload."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from google_cloud import KeyServer, SigningKey, claims, key_set, keystore_table, request
from harness import make_certificate
from hsm import make_hsm
from test_end_to_end import Installation
from test_hsm_server import HsmInstallation
from test_workers import Workers

from xkiproxy.config import load_config
from xkiproxy.config.models import ClientTlsSettings
from xkiproxy.server import serve as serving
from xkiproxy.server import token_keys
from xkiproxy.server.runtime import Runtime
from xkiproxy.server.token_keys import FetchedKeys, _fresh_seconds

FIRST, SECOND = SigningKey("google-1"), SigningKey("google-2")
PATH = "/gcp/kms/ekm/v0/keys/demo-key"


@pytest.fixture
def google(tmp_path: Path) -> Iterator[KeyServer]:
    server = KeyServer(tmp_path / "google")
    server.document = key_set(FIRST)
    server.start()
    yield server
    server.stop()


def fetched(google: KeyServer, **tls: Any) -> FetchedKeys:
    return FetchedKeys(google.url, ClientTlsSettings(**({"ca": google.certificate} | tls)))


async def test_keys_are_fetched_when_they_are_due(google: KeyServer) -> None:
    google.headers = {"Cache-Control": "public, max-age=3600, must-revalidate"}
    keys = fetched(google)
    assert (len(keys), keys.get(FIRST.kid)) == (0, None)
    await keys.refresh()
    assert (len(keys), keys.error, google.asked) == (1, "", 1)
    assert keys.get(FIRST.kid) is not None
    await keys.refresh()
    assert google.asked == 1
    assert not keys.is_due(time.monotonic() + 3500)
    assert keys.is_due(time.monotonic() + 3601)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("public, max-age=19845, must-revalidate, no-transform", 19845),
        ("max-age=1", 300),
        ("no-store", 300),
        ("", 300),
        ("s-maxage=9999", 300),
        ("MAX-AGE=7200", 7200),
        ("max-age=999999999", 86400),
        ("max-age=x", 300),
    ],
)
def test_how_long_keys_are_fresh_is_within_bounds(header: str, seconds: float) -> None:
    assert _fresh_seconds(header) == seconds


async def test_an_unknown_key_is_looked_for_once_a_minute(
    google: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = fetched(google)
    await keys.refresh()
    google.document = key_set(FIRST, SECOND)
    for _ in range(100):
        assert keys.get(SECOND.kid) is None
        await keys.refresh()
    assert google.asked == 1
    assert keys.is_due(time.monotonic() + 61)
    monkeypatch.setattr(token_keys, "_UNKNOWN_SECONDS", 0.0)
    await keys.refresh()
    assert google.asked == 2
    assert keys.get(SECOND.kid) is not None


async def test_a_key_that_stays_is_the_same_object(google: KeyServer) -> None:
    """What a key has verified is remembered with it."""
    keys = fetched(google)
    await keys.refresh()
    before = keys.get(FIRST.kid)
    google.document, keys._due = key_set(FIRST, SECOND), 0.0
    await keys.refresh()
    assert keys.get(FIRST.kid) is before
    impostor = SigningKey(FIRST.kid)
    google.document, keys._due = key_set(impostor), 0.0
    await keys.refresh()
    assert keys.get(FIRST.kid) is not before
    assert len(keys) == 1


async def test_while_the_server_is_away_known_keys_go_on(
    google: KeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    keys = fetched(google)
    await keys.refresh()
    google.stop()
    for pause in (5, 10, 20, 40, 80, 160, 300, 300):
        keys._due = 0.0
        before = time.monotonic()
        await keys.refresh()
        assert before + pause <= keys._due <= time.monotonic() + pause
    assert keys.error
    assert keys.get(FIRST.kid) is not None
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1
    assert f"{google.url}: Connect call failed" in errors[0]
    assert "those that are known go on" in errors[0]
    google.start()
    keys._due = 0.0
    await keys.refresh()
    assert keys.error == ""


async def test_known_keys_go_on_for_a_week_at_most(
    google: KeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    keys = fetched(google)
    await keys.refresh()
    google.stop()
    week = 7 * 24 * 3600
    for days, left in ((6.9, 1), (7.1, 0)):
        keys._due, keys._fetched = 0.0, time.monotonic() - week / 7 * days
        await keys.refresh()
        assert len(keys) == left
    said = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert ["those that are known go on" in text for text in said] == [True, False]
    assert "all tokens are refused" in said[1]
    google.start()
    keys._due = 0.0
    await keys.refresh()
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("status", "document", "why"),
    [
        (500, "", "answers 500"),
        (302, "", "answers 302"),
        (200, "<html>", "is not JSON"),
        (200, '{"keys": []}', "has no RSA key"),
        (200, " " * (300 << 10), "answers with more than"),
    ],
)
async def test_answers_that_are_none(
    google: KeyServer, status: int, document: str, why: str
) -> None:
    google.status, google.document = status, document
    google.headers = {"Location": google.url} if status == 302 else {}
    keys = fetched(google)
    await keys.refresh()
    assert why in keys.error
    assert google.url in keys.error
    assert (len(keys), google.asked) == (0, 1)


async def test_a_server_that_is_not_the_one_is_not_believed(
    google: KeyServer, tmp_path: Path
) -> None:
    make_certificate(tmp_path, "other")
    keys = fetched(google, ca=tmp_path / "other.crt")
    await keys.refresh()
    assert "certificate" in keys.error.lower()
    assert (len(keys), google.asked) == (0, 0)


async def test_a_server_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificate(tmp_path)
    monkeypatch.setattr(token_keys, "_TIMEOUT_SECONDS", 0.3)
    server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"https://localhost:{port}/certs"
    keys = FetchedKeys(url, ClientTlsSettings(ca=tmp_path / "server.crt"))
    await asyncio.wait_for(keys.refresh(), 5)
    server.close()
    assert keys.error
    assert len(keys) == 0


# ---- with all of the proxy ----------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, google: KeyServer) -> Installation:
    made = Installation(tmp_path / "demo")
    with made.config.open("a") as file:
        file.write(keystore_table(keys_url=google.url, tls={}).replace("tls = {}", ""))
        file.write(f'tls.ca = "{google.certificate}"\n')
    return made


@asynccontextmanager
async def running(
    site: Installation, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Runtime, serving.PublicSide]]:
    monkeypatch.setattr(serving, "_calm_garbage_collection", lambda: None)
    async with (
        serving.running_parts(load_config(site.config)) as (runtime, audit),
        serving.public_side(runtime, audit) as public,
    ):
        yield runtime, public


async def ask(
    site: Installation, by: SigningKey, method: str = "wrap", **fields: Any
) -> tuple[int, dict[str, Any]]:
    fields = fields or {"plaintext": base64.b64encode(b"a key of Google").decode()}
    headers = {"Authorization": f"Bearer {by.sign(claims())}"}
    url = f"https://localhost:{site.port}{PATH}:{method}"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=request(**fields), headers=headers, ssl=site.trust) as response,
    ):
        return response.status, json.loads(await response.read())


async def test_google_changes_its_keys(
    site: Installation, google: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(site, monkeypatch) as (runtime, _):
        assert runtime.problems() == []
        assert (await ask(site, FIRST))[0] == 200
        assert (await ask(site, SECOND))[0] == 401
        google.document = key_set(SECOND)
        monkeypatch.setattr(token_keys, "_UNKNOWN_SECONDS", 0.0)
        for _ in range(100):
            status, answer = await ask(site, SECOND)
            if status == 200:
                break
            await asyncio.sleep(0.1)
        assert status == 200
        opened = await ask(site, SECOND, "unwrap", wrappedBlob=answer["wrappedBlob"])
        assert base64.b64decode(opened[1]["plaintext"]) == b"a key of Google"
        assert (await ask(site, FIRST))[0] == 401


async def test_googles_outage_is_none_of_ours(
    site: Installation, google: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(site, monkeypatch) as (runtime, _):
        google.stop()
        (source,) = runtime.token_sources().values()
        source._due = 0.0
        await source.refresh()
        assert (await ask(site, FIRST))[0] == 200
        assert (await ask(site, SECOND))[0] == 401
        (problem,) = runtime.problems()
        assert problem.startswith("key store gcp: keys for tokens cannot be fetched: ")
        assert runtime.obstacles() == []


async def test_a_start_without_keys_refuses_all_and_says_so(
    site: Installation,
    google: KeyServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    google.stop()
    async with running(site, monkeypatch) as (runtime, _):
        assert "all tokens are refused" in caplog.text
        status, answer = await ask(site, FIRST)
        assert (status, answer["code"]) == (503, 14)
        assert len(runtime.problems()) == 1
        assert runtime.obstacles() == []  # the other key store is served
        runtime.tenants = [tenant for tenant in runtime.tenants if tenant.token_keys is not None]
        assert len(runtime.obstacles()) == 1
        google.start()
        (source,) = runtime.token_sources().values()
        source._due = 0.0
        for _ in range(100):
            if (await ask(site, FIRST))[0] == 200:
                break
            await asyncio.sleep(0.1)
        assert (await ask(site, FIRST))[0] == 200
        assert runtime.obstacles() == runtime.problems() == []


async def test_a_reload_keeps_the_keys_and_takes_the_rest(
    site: Installation, google: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(site, monkeypatch) as (_, public):
        google.stop()
        text = site.config.read_text()
        reasons = 'allowed_reasons = ["GOOGLE_INITIATED_SYSTEM_OPERATION"]\n'
        site.config.write_text(text + reasons)
        await public.reload()
        status, answer = await ask(site, FIRST)
        assert (status, answer["code"]) == (403, 7)
        site.config.write_text(text)
        await public.reload()
        assert (await ask(site, FIRST))[0] == 200


async def test_a_key_store_that_a_reload_brings_has_its_keys_within_seconds(
    site: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = site.config.read_text()
    site.config.write_text(text[: text.index('[[keystore]]\nname = "gcp"')])
    async with running(site, monkeypatch) as (_, public):
        site.config.write_text(text)
        await public.reload()
        for _ in range(50):
            status, _ = await ask(site, FIRST)
            if status == 200:
                break
            await asyncio.sleep(0.1)
        assert status == 200


async def test_a_reload_without_the_keys_that_it_needs_is_refused(
    site: Installation, google: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys that are known are not given up for others that are not there."""
    other = KeyServer(site.directory / "other")
    other.start()
    other.stop()
    async with running(site, monkeypatch) as (runtime, public):
        text = site.config.read_text()
        site.config.write_text(text.replace(google.url, other.url))
        await public.reload()
        assert "reload_failed" in site.directory.joinpath("audit.jsonl").read_text()
        assert (await ask(site, FIRST))[0] == 200
        other.document = key_set(SECOND)
        other.start()
        trusted = text.replace(str(google.certificate), str(other.certificate))
        site.config.write_text(trusted.replace(google.url, other.url))
        await public.reload()
        assert (await ask(site, FIRST))[0] == 401
        assert (await ask(site, SECOND))[0] == 200
        other.stop()
        assert len(set(runtime.token_sources().values())) == 1


async def test_key_stores_share_what_is_fetched(
    site: Installation, google: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = site.config.read_text()
    table = text[text.index('[[keystore]]\nname = "gcp"') :]
    second = table.replace('"gcp"', '"gcp2"').replace('"/gcp"', '"/gcp2"')
    site.config.write_text(text + second)
    async with running(site, monkeypatch) as (runtime, public):
        assert google.asked == 1
        assert len(runtime.token_sources()) == 2
        await public.reload()
        assert google.asked == 1
        assert "other keys for tokens" not in json.dumps(runtime.status())


async def test_a_host_that_is_none_is_an_error_like_others(google: KeyServer) -> None:
    keys = FetchedKeys("https://a..b/keys", ClientTlsSettings(ca=google.certificate))
    await keys.refresh()
    assert "a..b" in keys.error
    assert not keys.is_due(time.monotonic())


def test_check_says_where_keys_cannot_be_fetched(site: Installation, google: KeyServer) -> None:
    site.run("check")
    google.status = 404
    said = site.run("check", status=1).stderr
    assert f"keystore[1].google: {google.url}: answers 404" in said


# ---- keys from a file, and several processes ----------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_keys_of_a_file_are_read_again_at_a_reload(tmp_path: Path, workers: int) -> None:
    server = Workers(tmp_path / "demo", workers)
    file = server.directory / "google.json"
    file.write_text(key_set(FIRST))
    with server.config.open("a") as config:
        config.write(keystore_table(keys="google.json"))
    body = json.dumps(request(plaintext="AAAA")).encode()

    def answers(by: SigningKey) -> set[int]:
        """Of requests on connections of their own: they reach all workers."""
        headers = {"Authorization": f"Bearer {by.sign(claims())}"}
        return {server.send(f"{PATH}:wrap", body, headers)[0] for _ in range(12)}

    server.start()
    try:
        assert answers(FIRST) == {200}
        assert answers(SECOND) == {401}
        file.write_text("{}")
        assert "keystore[1]: " in server.run("reload", status=1).stderr
        assert answers(FIRST) == {200}
        file.write_text(key_set(FIRST))
        said = server.run("reload").stdout
        assert "key store" not in said
        file.write_text(key_set(SECOND))
        assert "key store gcp has other keys for tokens" in server.run("reload").stdout
        assert answers(FIRST) == {401}
        assert answers(SECOND) == {200}
        server.run("keys", "disable", "demo-key")
        time.sleep(1)
        assert answers(SECOND) == {400}
        file.unlink()
        assert str(file) in server.run("reload", status=1).stderr
    finally:
        server.stop()


def test_an_hsm_wraps_for_google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hsm = make_hsm(tmp_path / "hsm", monkeypatch)
    server = HsmInstallation(tmp_path / "demo", hsm)
    (server.directory / "google.json").write_text(key_set(FIRST))
    with server.config.open("a") as config:
        config.write(keystore_table(keys="google.json"))
    headers = {"Authorization": f"Bearer {FIRST.sign(claims())}"}

    def ask_for(method: str, **fields: str) -> tuple[int, dict[str, Any]]:
        return server.send(f"{PATH}:{method}", json.dumps(request(**fields)).encode(), headers)

    server.start()
    try:
        for aad in ({}, {"additionalAuthenticatedData": "AAAA"}):
            status, made = ask_for("wrap", plaintext="a2V5", **aad)
            assert status == 200, made
            assert ask_for("unwrap", **made, **aad) == (200, {"plaintext": "a2V5"})
            wrong = ask_for("unwrap", **made, additionalAuthenticatedData="AQID")
            assert (wrong[0], wrong[1]["code"]) == (400, 3)
    finally:
        server.stop()
