"""The replay window that several processes share."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.keystores.shared_replay import SharedReplayWindow, make_replay_table

NOW = 1_800_000_000.0

CHILD = """
import sys
from xkiproxy.keystores.shared_replay import SharedReplayWindow
window = SharedReplayWindow(int(sys.argv[1]), "demo")
print("ready", flush=True)
sys.stdin.readline()
def admit(n):
    return window.admit("id", str(n), 1800000900.0, 1800000000.0)
print(*filter(admit, range(int(sys.argv[2]))))
"""


@pytest.fixture
def table() -> Iterator[int]:
    descriptor = make_replay_table(capacity=256 * 32)
    yield descriptor
    os.close(descriptor)


def test_a_nonce_is_admitted_once(table: int) -> None:
    window = SharedReplayWindow(table, "demo")
    assert window.admit("id", "nonce", NOW + 900, NOW)
    assert not window.admit("id", "nonce", NOW + 900, NOW)
    assert not SharedReplayWindow(table, "demo").admit("id", "nonce", NOW + 900, NOW)


def test_who_uses_it_is_part_of_it(table: int) -> None:
    window = SharedReplayWindow(table, "demo")
    assert window.admit("id", "nonce", NOW + 900, NOW)
    assert window.admit("other", "nonce", NOW + 900, NOW)
    assert window.admit("id", "other", NOW + 900, NOW)
    assert SharedReplayWindow(table, "second").admit("id", "nonce", NOW + 900, NOW)


def test_it_may_be_used_again_once_it_has_expired(table: int) -> None:
    window = SharedReplayWindow(table, "demo")
    assert window.admit("id", "nonce", NOW + 5, NOW)
    assert not window.admit("id", "nonce", NOW + 5, NOW + 5.9)
    assert window.admit("id", "nonce", NOW + 900, NOW + 7)


def test_a_full_bucket_admits_nothing_until_one_expires() -> None:
    table = make_replay_table(capacity=32)
    window = SharedReplayWindow(table, "demo")
    for number in range(64):
        assert window.admit("id", str(number), NOW + 10 + number, NOW)
    with pytest.raises(OperationError) as refused:
        window.admit("id", "one more", NOW + 900, NOW)
    assert refused.value.fault is Fault.THROTTLED
    assert not window.admit("id", "1", NOW + 900, NOW)
    assert window.admit("id", "one more", NOW + 900, NOW + 12)
    assert not window.admit("id", "1", NOW + 900, NOW + 11)
    os.close(table)


def test_as_a_dictionary_would_do_it(table: int) -> None:
    """Random nonces and times against a plain model."""
    window, known = SharedReplayWindow(table, "demo"), dict[str, int]()
    chance, now = random.Random(7), NOW
    for _ in range(20_000):
        now += chance.random()
        nonce = str(chance.randrange(4000))
        expected = known.get(nonce, 0) < int(now)
        assert window.admit("id", nonce, now + 600, now) == expected
        if expected:
            known[nonce] = int(now + 600) + 1


def children(table: int, count: int, nonces: int) -> list[subprocess.Popen[str]]:
    made = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(table), str(nonces)],
            pass_fds=[table], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(count)
    ]  # fmt: skip
    for child in made:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    return made


def test_of_several_processes_one_admits(table: int) -> None:
    nonces = 6000
    started = children(table, 4, nonces)
    for child in started:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    admitted = [number for child in started for number in child.communicate()[0].split()]
    assert sorted(map(int, admitted)) == list(range(nonces))


def test_a_process_that_dies_holds_nothing_up() -> None:
    table = make_replay_table(capacity=1_000_000)
    window = SharedReplayWindow(table, "demo")
    for round_ in range(10):
        (child,) = children(table, 1, 2_000_000)
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        for number in range(300):
            nonce = f"after {round_} {number}"
            assert window.admit("id", nonce, NOW + 900, NOW)
            assert not window.admit("id", nonce, NOW + 900, NOW)
    os.close(table)


def test_the_key_is_the_tables_own() -> None:
    """The same nonce lands elsewhere in another table: nobody can choose a bucket to fill."""
    places = set()
    for _ in range(8):
        table = make_replay_table(capacity=4096 * 32)
        window = SharedReplayWindow(table, "demo")
        window.admit("id", "nonce", NOW + 900, NOW)
        places.add(next(i for i, when in enumerate(window._times) if when))
        os.close(table)
    assert len(places) > 1
