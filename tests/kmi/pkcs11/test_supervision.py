"""Real faults on the real module: lanes are replaced, and no request pays for it.

A lane is only ever killed once it has logged in: SoftHSM 2.6.1 writes the token's file in place
while it logs in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hsm import (
    DEADLINE,
    PIN,
    Hsm,
    by_cryptodome,
    encrypt,
    eventually,
    opening,
    ready_lanes,
    restarts,
    run,
    submit,
)

from xkiproxy.config.secrets import write_secret_file
from xkiproxy.crypto.operations import Encrypt, Encrypted, Fault, OperationError, Random
from xkiproxy.kmi.base import KmiState
from xkiproxy.kmi.queued import QueuedKmi

VALUE = os.urandom(32)
RETURN_SECONDS = 5.0
"""Within this a KMI is well again once its token is back (and a slow machine's slack)."""
SLACK = 5.0

DEVICE_CODES = {
    "CKR_GENERAL_ERROR": "5",
    "CKR_FUNCTION_FAILED": "6",
    "CKR_DEVICE_ERROR": "30",
    "CKR_DEVICE_MEMORY": "31",
    "CKR_DEVICE_REMOVED": "32",
    "CKR_SESSION_CLOSED": "B0",
    "CKR_SESSION_HANDLE_INVALID": "B3",
    "CKR_TOKEN_NOT_PRESENT": "E0",
    "CKR_USER_NOT_LOGGED_IN": "101",
    "CKR_CRYPTOKI_NOT_INITIALIZED": "190",
}


def lanes_here() -> dict[int, int]:
    return ready_lanes(os.getpid())


async def is_whole(kmi: QueuedKmi, lanes: int, seconds: float = 20.0) -> float:
    """Wait until every lane is there; returns how long it took."""
    return await eventually(
        lambda: kmi.state is KmiState.CONNECTED and len(lanes_here()) == lanes, seconds
    )


async def fault_of(kmi: QueuedKmi, plaintext: bytes, seconds: float = DEADLINE) -> Fault:
    with pytest.raises(OperationError) as caught:
        await submit(kmi, Encrypt("key", plaintext), seconds)
    return caught.value.fault


class Load:
    """Clients that encrypt without a pause and check every answer."""

    def __init__(self, kmi: QueuedKmi) -> None:
        self._kmi = kmi
        self.answers = 0
        self.slowest = 0.0
        self.errors: list[Exception] = []

    async def client(self) -> None:
        while True:
            way = Encrypt("key", os.urandom(32), aad=b"an aad")
            began = time.monotonic()
            try:
                made = await encrypt(self._kmi, way)
                assert made.ciphertext == by_cryptodome(VALUE, way, made)
            except (OperationError, AssertionError) as error:
                self.errors.append(error)
            self.answers += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def loaded(kmi: QueuedKmi, clients: int = 8) -> AsyncIterator[Load]:
    load = Load(kmi)
    tasks = [asyncio.create_task(load.client()) for _ in range(clients)]
    try:
        yield load
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ---- one lane --------------------------------------------------------------------------------


async def test_an_idle_lane_is_killed(hsm: Hsm, start_kmi) -> None:
    hsm.plant("key", VALUE)
    kmi = await start_kmi(hsm.settings(lanes=2))
    assert kmi.state is KmiState.CONNECTED
    before = lanes_here()
    os.kill(before[1], signal.SIGKILL)
    await eventually(lambda: kmi.state is KmiState.DEGRADED)
    assert (await encrypt(kmi, Encrypt("key", b"x"))).version == 1
    await is_whole(kmi, 2)
    assert lanes_here()[0] == before[0]
    assert lanes_here()[1] != before[1]
    assert restarts(kmi) == 1
    assert kmi.error == ""


async def test_the_only_lane_is_killed(hsm: Hsm, start_kmi) -> None:
    """What comes meanwhile waits for the next one."""
    hsm.plant("key", VALUE)
    kmi = await start_kmi(hsm.settings())
    os.kill(lanes_here()[0], signal.SIGKILL)
    done = await asyncio.gather(*(encrypt(kmi, Encrypt("key", b"x")) for _ in range(50)))
    assert len(done) == 50
    assert kmi.state is KmiState.CONNECTED


async def test_lanes_are_killed_under_load(hsm: Hsm, start_kmi) -> None:
    hsm.plant("key", VALUE)
    kmi = await start_kmi(hsm.settings(lanes=2))
    async with loaded(kmi) as load:
        for kills in range(1, 6):
            await is_whole(kmi, 2)
            seen = load.answers
            await eventually(lambda seen=seen: load.answers > seen + 20)
            os.kill(random.choice(list(lanes_here().values())), signal.SIGKILL)
            await eventually(lambda kills=kills: restarts(kmi) == kills)
        await is_whole(kmi, 2)
    print(f"{load.answers} answers, the slowest after {load.slowest:.3f} s")
    assert load.errors == []
    assert load.answers > 100


async def test_a_stopped_lane_is_replaced_and_its_batch_runs_elsewhere(hsm: Hsm, start_kmi) -> None:
    hsm.plant("key", VALUE)
    kmi = await start_kmi(hsm.settings(lanes=2, operation_timeout_ms=500))
    before = lanes_here()
    async with loaded(kmi) as load:
        await eventually(lambda: load.answers > 20)
        os.kill(before[0], signal.SIGSTOP)
        await eventually(lambda: restarts(kmi) >= 1)
        await is_whole(kmi, 2)
    assert before[0] not in lanes_here().values()
    assert not Path(f"/proc/{before[0]}").exists()
    assert load.errors == []
    print(f"the slowest answer came after {load.slowest:.3f} s")


async def test_an_idle_stopped_lane_is_found_by_the_check(hsm: Hsm, start_kmi) -> None:
    kmi = await start_kmi(hsm.settings(lanes=2, operation_timeout_ms=500))
    before = lanes_here()
    os.kill(before[1], signal.SIGSTOP)
    await kmi.check()
    await eventually(lambda: restarts(kmi) == 1)
    await is_whole(kmi, 2)


# ---- the module ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [b"SHIM-ABORT", b"SHIM-HANG"])
async def test_a_poisoned_operation_harms_itself_alone(
    shimmed: Hsm, start_kmi, order: bytes
) -> None:
    """In a batch with others: these run again, it fails for good, both lanes are replaced."""
    shimmed.plant("key", VALUE)
    kmi = await start_kmi(shimmed.settings(lanes=2, operation_timeout_ms=500))
    ways = [Encrypt("key", str(n).encode()) for n in range(40)]
    ways.insert(17, Encrypt("key", b"a text with " + order))
    outcomes = await asyncio.gather(*(submit(kmi, way) for way in ways), return_exceptions=True)
    for way, outcome in zip(ways, outcomes, strict=True):
        if order in way.plaintext:
            assert isinstance(outcome, OperationError)
            assert outcome.fault is Fault.UNAVAILABLE
        else:
            assert isinstance(outcome, Encrypted), (way.plaintext, outcome)
            assert outcome.ciphertext == by_cryptodome(VALUE, way, outcome)
    await eventually(lambda: restarts(kmi) == 2)
    await is_whole(kmi, 2)


async def test_a_poisoned_operation_under_load(shimmed: Hsm, start_kmi) -> None:
    shimmed.plant("key", VALUE)
    kmi = await start_kmi(shimmed.settings(lanes=2))
    async with loaded(kmi, 16) as load:
        for _ in range(3):
            await is_whole(kmi, 2)
            assert await fault_of(kmi, b"SHIM-ABORT") is Fault.UNAVAILABLE
        await eventually(lambda: restarts(kmi) == 6)
        await is_whole(kmi, 2)
    assert load.errors == []


@pytest.mark.parametrize("code", DEVICE_CODES.values(), ids=list(DEVICE_CODES))
async def test_a_device_error_replaces_the_lane(shimmed: Hsm, start_kmi, code: str) -> None:
    shimmed.plant("key", VALUE)
    kmi = await start_kmi(shimmed.settings(lanes=2))
    before = lanes_here()
    poison = f"SHIM-RV:{code};".encode()
    innocents = [Encrypt("key", str(n).encode()) for n in range(10)]
    outcomes = await asyncio.gather(
        fault_of(kmi, poison), *(encrypt(kmi, way) for way in innocents)
    )
    assert outcomes[0] is Fault.UNAVAILABLE
    await eventually(lambda: restarts(kmi) == 2)
    await is_whole(kmi, 2)
    assert not set(before.values()) & set(lanes_here().values())
    assert (await encrypt(kmi, Encrypt("key", b"x"))).version == 1


@pytest.mark.parametrize(
    ("code", "fault"),
    [("70", Fault.UNSUPPORTED), ("21", Fault.INVALID_PARAMETER), ("80000001", Fault.INTERNAL)],
)
async def test_an_error_of_one_operation_stays_with_it(
    shimmed: Hsm, start_kmi, code: str, fault: Fault
) -> None:
    """CKR_MECHANISM_INVALID, CKR_DATA_LEN_RANGE, and a code that only its vendor knows."""
    shimmed.plant("key", VALUE)
    kmi = await start_kmi(shimmed.settings())
    assert await fault_of(kmi, f"SHIM-RV:{code};".encode()) is fault
    assert restarts(kmi) == 0
    assert (await encrypt(kmi, Encrypt("key", b"x"))).version == 1


# ---- the login -------------------------------------------------------------------------------


async def test_a_wrong_pin_is_tried_once(
    shimmed: Hsm, start_kmi, tmp_path: Path, monkeypatch, caplog
) -> None:
    """Whatever the number of lanes: HSMs lock after a few."""
    logins, wrong = tmp_path / "logins", tmp_path / "wrong"
    monkeypatch.setenv("SHIM_COUNT_LOGINS", str(logins))
    write_secret_file(wrong, "not-the-pin-987")
    kmi = await start_kmi(shimmed.settings(lanes=4, pin=wrong))
    assert kmi.state is KmiState.DISCONNECTED
    began = time.monotonic()
    assert await fault_of(kmi, b"x") is Fault.UNAVAILABLE
    assert time.monotonic() - began < DEADLINE
    await asyncio.sleep(3)
    await kmi.check()
    assert logins.read_bytes() == b"x"
    assert kmi.state is KmiState.DISCONNECTED
    assert "PIN" in kmi.error
    assert "not-the-pin-987" not in kmi.error + caplog.text


async def test_a_pin_that_one_token_refuses_another_takes(
    shimmed: Hsm, start_kmi, tmp_path: Path, monkeypatch
) -> None:
    """It is tried once there, and what happens to the lanes of the other ends nothing."""
    logins = tmp_path / "logins"
    monkeypatch.setenv("SHIM_COUNT_LOGINS", str(logins))
    pin, shimmed.pin = shimmed.pin, "another-pin-99"
    shimmed.add_token("t2")
    shimmed.pin = pin
    shimmed.plant("key", VALUE)
    before = len(logins.read_bytes()) if logins.exists() else 0
    kmi = await start_kmi(shimmed.settings(token=["t1", "t2"], lanes=4))
    (refusal,) = await kmi.first_failures()
    assert refusal.startswith("token t2: the token refused the PIN")
    await is_whole(kmi, 4)
    assert len(logins.read_bytes()) - before == 5
    for pid in lanes_here().values():
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: restarts(kmi) >= 6)
    await is_whole(kmi, 4)
    assert len(logins.read_bytes()) - before == 9
    assert (await encrypt(kmi, Encrypt("key", b"x"))).version == 1


async def test_a_right_pin_is_used_once_for_each_lane(
    shimmed: Hsm, start_kmi, tmp_path: Path, monkeypatch, caplog
) -> None:
    logins = tmp_path / "logins"
    monkeypatch.setenv("SHIM_COUNT_LOGINS", str(logins))
    kmi = await start_kmi(shimmed.settings(lanes=3))
    assert kmi.state is KmiState.CONNECTED
    assert logins.read_bytes() == b"xxx"
    assert PIN not in caplog.text


# ---- the token -------------------------------------------------------------------------------


async def go_and_return(
    kmi: QueuedKmi, away: Callable[[], object], back: Callable[[], object], lanes: int = 2
) -> None:
    """The token goes, with all lanes; nothing waits for it; it returns, and all is well."""
    away()
    for pid in lanes_here().values():
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: kmi.state is KmiState.DISCONNECTED)
    # Requests of this moment may wait for the start that fails; after it none does.
    with contextlib.suppress(OperationError):
        await submit(kmi, Random(1))
    began = time.monotonic()
    outcomes = await asyncio.gather(*(fault_of(kmi, b"x", 60.0) for _ in range(20)))
    assert set(outcomes) == {Fault.UNAVAILABLE}
    assert time.monotonic() - began < 5.0
    await kmi.check()
    assert kmi.state is KmiState.DISCONNECTED
    assert kmi.error
    assert "()" not in kmi.error
    await asyncio.sleep(2.5)  # pauses have grown
    back()
    took = await is_whole(kmi, lanes)
    print(f"well again after {took:.2f} s")
    assert took <= RETURN_SECONDS + SLACK
    assert (await encrypt(kmi, Encrypt("key", b"x"))).version == 1
    await kmi.check()
    assert (kmi.state, kmi.error) == (KmiState.CONNECTED, "")


async def test_a_token_that_is_not_present(
    shimmed: Hsm, start_kmi, tmp_path: Path, monkeypatch
) -> None:
    away = tmp_path / "away"
    monkeypatch.setenv("SHIM_REFUSE_TOKEN", str(away))
    shimmed.plant("key", VALUE)
    kmi = await start_kmi(shimmed.settings(lanes=2))
    await go_and_return(kmi, away.touch, away.unlink)


async def test_a_token_directory_that_is_moved_away(hsm: Hsm, start_kmi) -> None:
    hsm.plant("key", VALUE)
    kmi = await start_kmi(hsm.settings(lanes=2))
    tokens, elsewhere = hsm.directory / "tokens", hsm.directory / "elsewhere"
    await go_and_return(kmi, lambda: tokens.rename(elsewhere), lambda: elsewhere.rename(tokens))


async def test_a_token_directory_that_cannot_be_read(hsm: Hsm, start_kmi) -> None:
    """Under root a mode stops nobody, so the folder's place is taken by a file as well."""
    hsm.plant("key", VALUE)
    kmi = await start_kmi(hsm.settings(lanes=2))
    tokens, aside = hsm.directory / "tokens", hsm.directory / "aside"

    def take() -> None:
        tokens.chmod(0)
        tokens.rename(aside)
        tokens.write_text("")

    def give() -> None:
        tokens.unlink()
        aside.rename(tokens)
        tokens.chmod(0o700)

    await go_and_return(kmi, take, give)


async def test_a_token_that_comes_after_the_start(
    shimmed: Hsm, start_kmi, tmp_path: Path, monkeypatch
) -> None:
    away = tmp_path / "away"
    away.touch()
    monkeypatch.setenv("SHIM_REFUSE_TOKEN", str(away))
    kmi = await start_kmi(shimmed.settings(lanes=2))
    assert kmi.state is KmiState.DISCONNECTED
    assert "t1" in kmi.error
    with pytest.raises(OperationError) as caught:
        await submit(kmi, Random(1), 60.0)
    assert caught.value.fault is Fault.UNAVAILABLE
    away.unlink()
    assert await is_whole(kmi, 2) <= RETURN_SECONDS + SLACK
    await submit(kmi, Random(1))


async def test_a_token_that_is_initialized_again(hsm: Hsm, start_kmi, open_manager) -> None:
    """Its keys are gone: requests say so, and a key made anew is used."""
    hsm.plant("key", VALUE)
    kmi = await start_kmi(hsm.settings(lanes=2))
    await encrypt(kmi, Encrypt("key", b"x"))
    run(
        "softhsm2-util", "--init-token", "--token", "t1", "--label", "t1", "--pin", PIN,
        "--so-pin", "an-so-pin-1234",
    )  # fmt: skip
    for pid in lanes_here().values():
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: restarts(kmi) >= 2)
    await is_whole(kmi, 2)
    assert await fault_of(kmi, b"x") is Fault.KEY_NOT_FOUND
    hsm.plant("key", VALUE)
    way = Encrypt("key", b"x")
    made = await encrypt(kmi, way)
    assert made.ciphertext == by_cryptodome(VALUE, way, made)


async def test_a_token_that_is_initialized_again_under_running_lanes(hsm: Hsm, start_kmi) -> None:
    """Nobody restarts anything: what was found before is not trusted for ever."""
    hsm.plant("key", VALUE)
    kmi = await start_kmi(hsm.settings(lanes=2))
    await asyncio.gather(*(encrypt(kmi, Encrypt("key", b"x")) for _ in range(20)))
    run(
        "softhsm2-util", "--init-token", "--token", "t1", "--label", "t1", "--pin", PIN,
        "--so-pin", "an-so-pin-1234",
    )  # fmt: skip
    fresh = os.urandom(32)
    hsm.plant("key", fresh)
    kmi.refresh(True)
    way = Encrypt("key", b"x")

    async def is_well() -> bool:
        try:
            made = await encrypt(kmi, way)
        except OperationError:
            return False
        return made.ciphertext == by_cryptodome(fresh, way, made)

    deadline = time.monotonic() + 20
    while not await is_well():
        assert time.monotonic() < deadline, "the new token is not used"
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("module", ["/nowhere/at-all.so", "libc"])
async def test_a_module_that_is_none(hsm: Hsm, start_kmi, module: str) -> None:
    if module == "libc":
        module = str(next(Path("/usr/lib").glob("*/libc.so.6")))
    kmi = await start_kmi(hsm.settings(module=Path(module), lanes=2))
    assert kmi.state is KmiState.DISCONNECTED
    assert module in kmi.error
    began = time.monotonic()
    assert await fault_of(kmi, b"x", 60.0) is Fault.UNAVAILABLE
    assert time.monotonic() - began < 5.0


# ---- two tokens ------------------------------------------------------------------------------


async def test_two_tokens_share_the_lanes_and_one_may_go_and_return(
    hsm: Hsm, start_kmi, monkeypatch
) -> None:
    monkeypatch.setattr("xkiproxy.kmi.supervision._HOME_SECONDS", 0.2)
    folder = hsm.add_token("t2")
    hsm.plant("key", VALUE)
    hsm.plant("key", VALUE, token="t2")
    hsm.plant("only-in-t2", VALUE, token="t2")
    kmi = await start_kmi(hsm.settings(token=["t1", "t2"], lanes=4, max_batch=1))
    assert sorted(lanes_here()) == [0, 1, 2, 3]

    async def kinds() -> set[type]:
        ways = [Encrypt("only-in-t2", b"x") for _ in range(40)]
        outcomes = await asyncio.gather(*(submit(kmi, way) for way in ways), return_exceptions=True)
        return {type(outcome) for outcome in outcomes}

    assert await kinds() == {Encrypted, OperationError}, "the lanes are spread over both"

    async with loaded(kmi) as load:
        folder.rename(hsm.directory / "away")
        for index in (1, 3):
            os.kill(lanes_here()[index], signal.SIGKILL)
        await eventually(lambda: restarts(kmi) >= 2)
        await is_whole(kmi, 4)
        seen = load.answers
        await eventually(lambda: load.answers > seen + 100)
        assert await kinds() == {OperationError}
        before = lanes_here()
        (hsm.directory / "away").rename(folder)
        seen, broken = load.answers, restarts(kmi)
        await eventually(lambda: all(lanes_here().get(i, before[i]) != before[i] for i in (1, 3)))
        await is_whole(kmi, 4)
        await eventually(lambda: load.answers > seen + 100)
        assert await kinds() == {Encrypted, OperationError}, "they are back at their own tokens"
        assert restarts(kmi) == broken
        assert {i: lanes_here()[i] for i in (0, 2)} == {i: before[i] for i in (0, 2)}
    assert load.errors == []


async def test_what_one_token_wrote_the_other_reads(hsm: Hsm, start_kmi) -> None:
    hsm.add_token("t2")
    hsm.plant("key", VALUE)
    hsm.plant("key", VALUE, token="t2")
    kmi = await start_kmi(hsm.settings(token=["t1", "t2"], lanes=2, max_batch=1))
    way = Encrypt("key", b"a text")
    made = await encrypt(kmi, way)
    opened = await asyncio.gather(*(submit(kmi, opening(way, made)) for _ in range(20)))
    assert {o.plaintext for o in opened} == {b"a text"}  # type: ignore[union-attr]
