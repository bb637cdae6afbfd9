"""How the proxy gets its token and keeps it, and what each mistake is called."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from conftest import StartKmi
from harness import make_certificate
from pydantic import ValidationError
from test_transit_lanes import encrypt, eventually
from transit import ADMIN_TOKEN, TOKEN, TransitSite
from transit_server import PROXY_POLICY, ServerToken, TransitServer

from xkiproxy.config.secrets import write_secret_file
from xkiproxy.config.tls import parse_certificate, read_pem
from xkiproxy.crypto.operations import Encrypt, Fault, OperationError
from xkiproxy.kmi.base import KmiState
from xkiproxy.kmi.transit.client import TransitClient

SECRET_ID = "a-secret-id-of-the-tests-0123456789"
JWT = "eyJhbGciOiJub25lIn0.a-service-account-of-the-tests.x"


def approle(site: TransitSite, secret_id: str = SECRET_ID) -> dict[str, Any]:
    file = site.directory / "secret-id"
    write_secret_file(file, secret_id)
    site.server.roles["the-role"] = SECRET_ID
    return {"auth": {"approle": {"role_id": "the-role", "secret_id": file}}}


def cert(site: TransitSite) -> dict[str, Any]:
    site.server.certificates["proxies"] = "a-proxy"
    tls = {
        "ca": site.ca, "certificate": site.directory / "client.crt",
        "private_key": site.directory / "client.key",
    }  # fmt: skip
    return {"auth": {"cert": {"role": "proxies"}}, "tls": tls}


def kubernetes(site: TransitSite) -> dict[str, Any]:
    file = site.directory / "jwt"
    file.write_text(JWT + "\n")
    site.server.service_accounts["proxy"] = JWT
    return {"auth": {"kubernetes": {"role": "proxy", "jwt": file}}}


@pytest.mark.parametrize("way", [approle, cert, kubernetes])
async def test_each_login(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi, way: Any
) -> None:
    kmi = await start_kmi(site.settings(**way(site), lanes=3))
    assert (kmi.state, kmi.error) == (KmiState.CONNECTED, "")
    await encrypt(kmi, Encrypt("key", b"x"))
    logins = [path for _, path, _ in server.requests if path.endswith("/login")]
    assert len(logins) == 1  # one for all lanes
    made = set(server.tokens) - {"root", TOKEN, ADMIN_TOKEN}
    await kmi.close()
    assert server.revoked == list(made)  # it was ours, and is given back


async def test_a_token_is_renewed_before_its_end(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    server.login_ttl = 1.0
    kmi = await start_kmi(site.settings(**approle(site)))
    began = len(server.requests)
    for _ in range(25):
        await encrypt(kmi, Encrypt("key", b"x"))
        await asyncio.sleep(0.1)
    paths = [path for _, path, _ in server.requests[began:]]
    assert paths.count("auth/token/renew-self") >= 2
    assert "auth/approle/login" not in paths


async def test_one_that_cannot_be_renewed_is_replaced(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    server.login_ttl, server.login_renewable = 1.0, False
    kmi = await start_kmi(site.settings(**approle(site)))
    for _ in range(20):
        await encrypt(kmi, Encrypt("key", b"x"))
        await asyncio.sleep(0.1)
    logins = [path for _, path, _ in server.requests if path == "auth/approle/login"]
    assert 2 <= len(logins) <= 6


async def test_a_token_that_is_revoked_is_replaced_by_a_login(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings(**approle(site)))
    for text in set(server.tokens) - {"root", TOKEN, ADMIN_TOKEN}:
        del server.tokens[text]
    await encrypt(kmi, Encrypt("key", b"x"))


async def test_a_renewal_without_an_answer_stops_nothing(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    server.login_ttl, server.swallowed = 1.5, 1
    kmi = await start_kmi(site.settings(**approle(site)))
    for _ in range(30):
        await encrypt(kmi, Encrypt("key", b"x"), 0.5)
        await asyncio.sleep(0.1)
    assert server.swallowed == 0
    assert 2 <= len(server.asked("auth/approle/login")) <= 4
    assert kmi.state is KmiState.CONNECTED


@pytest.mark.parametrize("may_look_itself_up", [True, False])
async def test_a_key_that_the_policy_forbids_costs_no_login_each_time(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi, may_look_itself_up: bool
) -> None:
    server.add_key("forbidden")
    server.login_policy = {
        "transit/encrypt/key": {"update"},
        "transit/keys/*": {"read"},
        "transit/random": {"update"},
        "auth/token/revoke-self": {"update"},
    }
    server.login_with_default = may_look_itself_up
    kmi = await start_kmi(site.settings(**approle(site)))
    for _ in range(10):
        with pytest.raises(OperationError) as caught:
            await encrypt(kmi, Encrypt("forbidden", b"x"))
        assert caught.value.fault is Fault.KEY_FORBIDDEN
        await encrypt(kmi, Encrypt("key", b"x"))
    assert len(server.asked("auth/approle/login")) == (1 if may_look_itself_up else 2)
    await eventually(lambda: len(set(server.tokens) - {"root", TOKEN, ADMIN_TOKEN}) == 1)
    assert kmi.state is KmiState.CONNECTED


async def test_a_lookup_that_is_not_answered_refuses_no_token(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    server.add_key("forbidden")
    server.login_policy = {"transit/keys/*": {"read"}, "transit/random": {"update"}}
    kmi = await start_kmi(site.settings(**approle(site)))
    server.lookups_limited = True
    for _ in range(3):
        with pytest.raises(OperationError) as caught:
            await encrypt(kmi, Encrypt("forbidden", b"x"))
        assert caught.value.fault is Fault.KEY_FORBIDDEN
    assert len(server.asked("auth/approle/login")) == 1


async def test_a_renewed_certificate_is_used_for_the_next_login(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    server.login_ttl, server.login_renewable = 1.0, False
    kmi = await start_kmi(site.settings(**cert(site)))
    assert set(server.serials) == {serial_of(site)}
    make_certificate(
        site.directory, "client", common_name="a-proxy", dns_names=(), issuer=site.issuer
    )
    for _ in range(15):
        await encrypt(kmi, Encrypt("key", b"x"))
        await asyncio.sleep(0.1)
    assert server.serials[-1] == serial_of(site)
    assert len(set(server.serials)) == 2
    (site.directory / "client.key").write_text("damaged")
    await asyncio.sleep(1.5)
    with pytest.raises(OperationError):
        await encrypt(kmi, Encrypt("key", b"x"), 1.0)
    assert "client.key" in kmi.error


def serial_of(site: TransitSite) -> int:
    return parse_certificate(read_pem(site.directory / "client.crt")).serial_number


async def test_a_client_that_is_given_up_half_way_is_released(site: TransitSite) -> None:
    client = TransitClient(site.settings(), site.server.address)
    for others in (0, 1):
        for _ in range(1 + others):
            await client.acquire()
        session = client._http._session
        assert session is not None
        async with client._coming_and_going:
            leaving = asyncio.create_task(client.release(revoke=False))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        if others:
            assert not session.closed
            await client.release(revoke=False)
        assert session.closed


async def test_a_token_that_an_agent_replaces_is_read_again(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings())
    del server.tokens[TOKEN]
    site.token_file.unlink()
    write_secret_file(site.token_file, "hvs.another-token-of-the-tests-456")
    server.tokens["hvs.another-token-of-the-tests-456"] = ServerToken(PROXY_POLICY)
    await encrypt(kmi, Encrypt("key", b"x"))


async def test_a_login_that_is_refused_is_not_repeated(
    site: TransitSite,
    server: TransitServer,
    start_kmi: StartKmi,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Servers lock out whom they refuse often; and the words hold no secret."""
    with caplog.at_level(logging.DEBUG):
        kmi = await start_kmi(site.settings(**approle(site, "wrong-secret-id-of-the-tests")))
        await asyncio.sleep(1.0)
    assert kmi.state is KmiState.DISCONNECTED
    assert "refuses the login at auth/approle/login: invalid role or secret ID" in kmi.error
    assert server.failed_logins == 1
    assert "wrong-secret-id" not in caplog.text + kmi.error


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        ("sealed", "is sealed: unseal it"),
        ("mount", "there is no Transit engine at elsewhere/ (setting: mount)"),
        ("token", "refuses the token of "),
        ("policy", "the token may not use transit/random"),
        ("ca", "its certificate is not trusted by tls.ca"),
        ("namespace", "refuses the token of "),
        ("away", "cannot be reached: "),
    ],
)
async def test_each_mistake_is_named_in_a_line(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi, mistake: str, complaint: str
) -> None:
    changes: dict[str, Any] = {
        "mount": {"mount": "elsewhere"},
        "ca": {"tls": {"ca": site.directory / "stranger.crt"}},
        "namespace": {"namespace": "teams/a"},
    }.get(mistake, {})
    if mistake == "sealed":
        server.sealed = True
    elif mistake == "token":
        del server.tokens[TOKEN]
    elif mistake == "mount":
        server.tokens[TOKEN].policy = {**PROXY_POLICY, "elsewhere/*": {"update"}}
    elif mistake == "policy":
        server.tokens[TOKEN].policy = {"transit/encrypt/*": {"update"}}
    settings = site.settings(**changes)
    if mistake == "away":
        server.stop()
    kmi = await start_kmi(settings)
    assert kmi.state is KmiState.DISCONNECTED
    assert complaint in kmi.error
    assert "\n" not in kmi.error
    assert TOKEN not in kmi.error


async def test_a_server_that_is_sealed_and_unsealed(
    site: TransitSite, server: TransitServer, start_kmi: StartKmi
) -> None:
    kmi = await start_kmi(site.settings())
    server.sealed = True
    with pytest.raises(OperationError):
        await encrypt(kmi, Encrypt("key", b"x"))
    server.sealed = False
    await eventually(lambda: kmi.state is KmiState.CONNECTED)
    await encrypt(kmi, Encrypt("key", b"x"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"auth": {}}, "exactly one of token, approle, cert or kubernetes"),
        ({"address": "http://bao.example.com:8200"}, "plaintext = true goes with"),
        ({"address": "http://bao.example.com", "plaintext": True}, "loopback addresses only"),
        ({"address": "bao.example.com:8200"}, "write it as"),
        ({"auth": {"cert": {}}}, "auth.cert needs tls.certificate"),
        ({"mount": "a b"}, "write it as"),
    ],
)
def test_settings_that_contradict_each_other(
    site: TransitSite, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        site.settings(**changes)


def test_no_repr_shows_a_secret(site: TransitSite) -> None:
    assert SECRET_ID not in repr(site.settings(**approle(site)))
    assert TOKEN not in repr(site.settings())
