"""The administrator's side of Transit."""

from __future__ import annotations

import time

import pytest
from conftest import OpenManager
from transit import TransitSite
from transit_server import TransitServer

from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.kmi.base import KeyManagerError


def test_keys_are_made_listed_rotated_and_destroyed(
    site: TransitSite, server: TransitServer, open_manager: OpenManager
) -> None:
    manager = open_manager(site.admin_settings())
    assert manager.get("payroll") is None
    made = manager.create("payroll", KeySpec.AES_256)
    assert (made.spec, made.versions, made.usage, made.problem) == (
        KeySpec.AES_256, (1,), Usage.BOTH, "",
    )  # fmt: skip
    assert time.time() - 60 < (made.created or 0) < time.time() + 60
    assert not server.keys["payroll"].exportable
    assert manager.rotate("payroll").versions == (1, 2)
    assert {info.key_id for info in manager.list()} == {"key", "payroll"}
    manager.destroy("payroll")
    assert manager.get("payroll") is None
    assert "payroll" not in server.keys
    assert manager.create("small", KeySpec.AES_128).spec is KeySpec.AES_128


def test_what_is_refused_says_why(
    site: TransitSite, server: TransitServer, open_manager: OpenManager
) -> None:
    manager = open_manager(site.admin_settings())
    for call, complaint in (
        (lambda: manager.create("key", KeySpec.AES_256), "key key is there already"),
        (lambda: manager.create("k", KeySpec.AES_192), "Transit has no keys of AES_192"),
        (lambda: manager.create("-k", KeySpec.AES_256), "a letter, digit or _ at both ends"),
        (lambda: manager.create("a/b", KeySpec.AES_256), "must be 1 to 128"),
        (lambda: manager.rotate("none"), "key none is not there"),
        (lambda: manager.destroy("none"), "key none is not there"),
    ):
        with pytest.raises(KeyManagerError, match=complaint):
            call()
    server.add_key("signs", "ed25519")
    assert "its type is ed25519" in (manager.get("signs") or manager.list()[0]).problem
    with pytest.raises(KeyManagerError, match="may not use transit/keys/key/rotate"):
        open_manager(site.settings()).rotate("key")  # a proxy's token is no administrator's


def test_an_engine_without_keys(
    site: TransitSite, server: TransitServer, open_manager: OpenManager
) -> None:
    server.keys.clear()
    assert open_manager(site.admin_settings()).list() == []
