"""Two key stores on one KMI over a real server: neither can tell that the other's keys exist."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_xks_server as aws
from harness import Answer, Proxy
from test_workers import Workers

from xkiproxy.crypto.operations import no_such_key
from xkiproxy.keystores.key_patterns import KeyPatterns

XKI_CALLS = [
    ("meta", {}),
    ("encrypt", {"Plaintext": base64.b64encode(b"x").decode()}),
    (
        "decrypt",
        {
            "CiphertextBlob": base64.b64encode(b"\x01\0\0\0\x01" + b"c" * 17).decode(),
            "Iv": base64.b64encode(b"i" * 12).decode(),
        },
    ),
]


def told(answer: Answer) -> tuple[object, ...]:
    """All that an answer says, but for the request's own number and the time."""
    fields = {name: text for name, text in answer.fields.items() if name != "RequestId"}
    return answer.status, fields, {k: v for k, v in answer.headers.items() if k != "Date"}


async def test_xki(proxy: Proxy) -> None:
    proxy.store.keys = KeyPatterns(["aes1*"])
    for name, fields in XKI_CALLS:
        outside = await proxy.call(name, "aes256", **fields)
        missing = await proxy.call(name, "missing", **fields)
        assert (outside.status, outside.code) == (404, "KeyNotFound")
        assert told(outside) == told(missing)
        assert outside.fields["Message"] == no_such_key().message
        assert (await proxy.call(name, "aes128", **fields)).code != "KeyNotFound"
    codes = {(r["key"], r["code"], r.get("kmi")) for r in proxy.records() if r["key"] != "aes128"}
    assert codes == {("aes256", "KeyNotFound", ""), ("missing", "KeyNotFound", "")}


async def test_xks(proxy: Proxy) -> None:
    made = (await aws.encrypt(proxy)).fields
    (tenant,) = [t for t in proxy.gateway._tenants.values() if t.store.name == "aws"]
    tenant.store.keys = KeyPatterns(["sm4", "aes1*"])
    for key in ("aes256", "disabled", "encrypt-only"):
        for outside, missing in (
            (await aws.call(proxy, "metadata", key), await aws.call(proxy, "metadata", "none")),
            (await aws.encrypt(proxy, key=key), await aws.encrypt(proxy, key="none")),
            (await aws.decrypt(proxy, made, key), await aws.decrypt(proxy, made, "none")),
        ):
            assert aws.error(outside) == (404, "KeyNotFoundException")
            assert told(outside) == told(missing)
    assert (await proxy.call("meta", "aes256")).status == 200  # the other key store is not limited


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo", request.param)
    made.start()
    yield made
    made.stop()


def test_it_changes_on_reload_and_a_mistake_changes_nothing(server: Workers) -> None:
    original = server.config.read_text()

    def asked() -> set[int]:
        return {server.encrypt(b"x")[0] for _ in range(8)}

    assert asked() == {200}
    server.config.write_text(original + 'keys = ["payroll-*"]\n')
    assert "the settings of key store demo have changed" in server.run("reload").stdout
    assert asked() == {404}
    server.config.write_text(original + 'keys = ["demo-?"]\n')
    assert "keystore[0].keys[0]: write a key ID" in server.run("reload", status=1).stderr
    assert asked() == {404}
    server.config.write_text(original + 'keys = ["payroll-*", "demo-*"]\n')
    server.run("reload")
    assert asked() == {200}


def test_the_configuration_disables_a_key_at_a_reload(server: Workers) -> None:
    original = server.config.read_text()

    def asked() -> set[int]:
        return {server.encrypt(b"x")[0] for _ in range(8)}

    server.config.write_text(original + 'disabled_keys = ["demo-*"]\n')
    assert asked() == {200}  # not before
    server.run("reload")
    assert asked() == {403}
    assert server.records()[-1]["code"] == "KeyDisabledForbidden"
    told = server.run("keys", "enable", "demo-key")
    assert told.stderr == "warning: key demo-key: disabled_keys of key store demo\n"
    assert asked() == {403}
    server.config.write_text(original)
    server.run("reload")
    assert asked() == {200}
