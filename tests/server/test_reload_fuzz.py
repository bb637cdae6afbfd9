"""A fuzzer of the reload: good and broken files of each kind, in any order.

After each step the server is asked what it serves: what the files say if all of them are good, what
it served before if one is not. Nothing between.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cloud import Cloud
from harness import make_certificate
from test_end_to_end import BASE, Installation
from test_reload import SECOND, presented

from xkiproxy.config import load_config
from xkiproxy.server.serve import PublicSide, public_side, running_parts

STEPS = 200

ALLOW = "permit(principal, action, resource);\n"
DENY = ALLOW + '@id("no") forbid(principal, action == Action::"encrypt", resource);\n'


@dataclass(frozen=True)
class Served:
    """What can be seen of a server from outside."""

    certificate: str
    accepted: frozenset[str]
    encrypts: bool
    has_second: bool


@dataclass
class Files:
    """The files of an installation, and what they say while all of them are good."""

    site: Installation
    rng: random.Random
    clouds: list[Cloud] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        folder = self.site.directory
        self.config = self.site.config
        self.credentials = folder / "credentials" / "demo.toml"
        self.certificate, self.key = folder / "tls" / "server.crt", folder / "tls" / "server.key"
        self.policy = folder / "policies" / "demo.cedar"
        self.policy.parent.mkdir()
        self._config = self.config.read_text() + 'policies = "policies"\n'
        for n in range(4):
            secret = "".join(self.rng.choices("abcdefghkmnpqrstuvwxyz23456789", k=40))
            self.clouds.append(Cloud(f"XKIFUZZ{n}AAAAAAAAAAAAAAAA", secret, self.site.cloud.host))
        self.good: dict[str, Callable[[], None]] = {
            "config": self.write_config,
            "credentials": self.write_credentials,
            "tls": self.write_certificate,
            "policy": self.write_policy,
        }
        for write in self.good.values():
            write()

    # ---- good files --------------------------------------------------------------------------

    def write_config(self) -> None:
        self.has_second = self.rng.random() < 0.5
        self._put(self.config, self._config + (SECOND if self.has_second else ""))

    def write_credentials(self) -> None:
        chosen = self.rng.sample(self.clouds, self.rng.randint(1, 4))
        self.accepted = frozenset(cloud.access_key_id for cloud in chosen)
        self._put(
            self.credentials,
            "".join(
                f'[[credential]]\naccess_key_id = "{cloud.access_key_id}"\n'
                f'access_key_secret = "{cloud.secret}"\ncreated = 2026-01-01T00:00:00Z\n'
                for cloud in chosen
            ),
        )

    def write_certificate(self) -> None:
        made, _ = make_certificate(self.certificate.parent)
        self.fingerprint = made.fingerprint(made.signature_hash_algorithm).hex()  # type: ignore[arg-type]

    def write_policy(self) -> None:
        self.encrypts = self.rng.random() < 0.5
        self._put(self.policy, ALLOW if self.encrypts else DENY)

    def says(self) -> Served:
        return Served(self.fingerprint, self.accepted, self.encrypts, self.has_second)

    # ---- broken ones -------------------------------------------------------------------------

    def break_one(self, kind: str) -> None:
        """Make a file of this kind one that no server may take."""
        file, texts = {
            "config": (
                self.config,
                [
                    "", "[server", self._config + "nonsense = 1\n", "\ud800",
                    self._config + SECOND.replace('"local"', '"nowhere"'),
                    self._config + SECOND.replace("/second", "/demo"),
                    self._config.replace("workers = 1 ", "workers = 2 "),
                    self._config.replace("credentials/demo.toml", "credentials/none.toml"),
                ],
            ),
            "credentials": (
                self.credentials,
                [
                    "", "# nothing\n", "[[credential]]\n", "credential = 1\n", "\ud800", None,
                    '[[credential]]\naccess_key_id = "A"\naccess_key_secret = ""\n',
                ],
            ),
            "tls": (
                self.rng.choice([self.certificate, self.key]),
                ["", "-----BEGIN CERTIFICATE-----\n", "\ud800", None],
            ),
            "policy": (
                self.policy,
                ["permit(", "permit(principal, action, resorce);", "\ud800",
                 "permit(principal, action, resource) when { context.nothing == 1 };"],
            ),
        }[kind]  # fmt: skip
        self._put(file, self.rng.choice(texts))
        how = self.rng.random()
        if kind == "credentials" and how < 0.4:
            accepted = self.accepted
            self.write_credentials()
            if how < 0.2:
                self.credentials.chmod(0o644)  # good, but for all to read
            else:
                self._put(self.credentials, self.credentials.read_text() * 2)
            self.accepted = accepted

    def damage(self, kind: str) -> None:
        """A few octets of a file are others; it may be good all the same."""
        file = self.rng.choice({
            "config": [self.config], "credentials": [self.credentials],
            "tls": [self.certificate, self.key], "policy": [self.policy],
        }[kind])  # fmt: skip
        data = bytearray(file.read_bytes())
        for _ in range(self.rng.randint(1, 3)):
            place = self.rng.randrange(len(data))
            what = self.rng.random()
            if what < 0.4:
                data[place] ^= 1 << self.rng.randrange(8)
            elif what < 0.7:
                del data[place : place + self.rng.randint(1, 40)]
            else:
                data[place:place] = self.rng.randbytes(3)
            if not data:
                break
        file.write_bytes(data)

    def _put(self, file: Path, text: str | None) -> None:
        """Write a file for its owner only; None removes it."""
        if text is None:
            file.unlink(missing_ok=True)
            return
        file.touch()
        file.chmod(0o600)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))


def seen(site: Installation, clouds: list[Cloud]) -> Served:
    def ask(cloud: Cloud, path: str, **fields: str) -> int:
        body = cloud.body(**fields)
        return site.send(path, body, cloud.headers(path, body))[0]

    certificate = presented(site)
    answers = {cloud.access_key_id: ask(cloud, f"{BASE}/health") for cloud in clouds}
    assert set(answers.values()) <= {200, 401}
    accepted = [cloud for cloud in clouds if answers[cloud.access_key_id] == 200]
    assert accepted
    encrypt = ask(accepted[0], f"{BASE}/keys/demo-key/encrypt", Plaintext="eA==")
    second = ask(accepted[0], "/second/kms/xki/v1/health")
    assert encrypt in (200, 403)
    assert second in (200, 404)
    return Served(
        certificate,
        frozenset(cloud.access_key_id for cloud in accepted),
        encrypt == 200,
        second == 200,
    )


def _any_certificate() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path / "demo")
    text = made.config.read_text()
    made.config.write_text(text + "deadline_ms = 5000\n")
    yield made
    made.stop()


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_good_and_broken_files_in_any_order(site: Installation, seed: int) -> None:
    rng = random.Random(seed)
    files = Files(site, rng)
    site.trust = _any_certificate()
    async with (
        running_parts(load_config(site.config)) as (runtime, audit),
        public_side(runtime, audit) as public,
    ):
        served = files.says()
        assert await asyncio.to_thread(seen, site, files.clouds) == served
        for _ in range(STEPS):
            served = await step(files, public, served)
            assert await asyncio.to_thread(seen, site, files.clouds) == served
        counted = runtime.metrics.registry.get_sample_value
        succeeded = counted("xkiproxy_reloads_total", {"outcome": "ok"})
        failed = counted("xkiproxy_reloads_total", {"outcome": "failed"})
        assert succeeded
        assert failed
        assert succeeded + failed >= STEPS


async def step(files: Files, public: PublicSide, served: Served) -> Served:
    """Change a file, reload, and tell what is to be seen then."""
    kind = files.rng.choice([*files.good])
    what = files.rng.random()
    if what < 0.5:
        files.good[kind]()
        files.broken.discard(kind)
    elif what < 0.8:
        files.break_one(kind)
        files.broken.add(kind)
    elif kind not in files.broken:
        return await damaged(files, public, kind, served)
    await public.reload()
    problems = public._runtime.history.problems
    assert bool(problems) == bool(files.broken), (problems, files.broken)
    return served if problems else files.says()


async def damaged(files: Files, public: PublicSide, kind: str, served: Served) -> Served:
    """Refused, or taken for what it is: then it must be possible to go on from there."""
    files.damage(kind)
    await public.reload()
    was_taken = not public._runtime.history.problems
    files.good[kind]()
    if was_taken:
        assert not files.broken
        await public.reload()
        assert public._runtime.history.problems == []
        return files.says()
    return served
