"""A lane: what goes over its socket, and what its process has and has not."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from hsm import PIN, Hsm, children, eventually, ready_lanes, submit
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.config.secrets import SecretSource
from xkiproxy.crypto.algorithms import Algorithm, KeySpec, Padding, Usage
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Describe,
    Encrypt,
    Encrypted,
    Fault,
    KeyDescription,
    Operation,
    OperationError,
    Random,
    RandomBytes,
)
from xkiproxy.kmi.base import BreakReason, LaneError
from xkiproxy.kmi.pkcs11 import wire
from xkiproxy.kmi.pkcs11.lane import Pkcs11Lane
from xkiproxy.kmi.pkcs11.process import Process, spawn

# ---- the wire --------------------------------------------------------------------------------

FRAMES = st.lists(
    st.lists(
        st.one_of(st.integers(-(2**31), 2**31), st.binary(max_size=200), st.text(), st.none()),
        min_size=1,
        max_size=5,
    ),
    max_size=8,
)


@given(FRAMES, st.data())
def test_frames_are_cut_out_of_any_pieces(frames: list[list[object]], data: st.DataObject) -> None:
    stream = b"".join(wire.pack(frame) for frame in frames)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20).map(sorted))
    buffer = wire.FrameBuffer()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += buffer.feed(stream[start:end])
    assert found == frames


@given(st.binary(max_size=300))
def test_whatever_comes_is_frames_or_a_frame_error(data: bytes) -> None:
    try:
        frames = wire.FrameBuffer().feed(data)
    except wire.FrameError:
        return
    assert all(isinstance(frame, list) and frame for frame in frames)


@given(st.recursive(st.one_of(st.integers(), st.none(), st.binary(), st.text()), st.lists))
def test_whatever_outcome_comes_is_one_or_a_frame_error(fields: object) -> None:
    try:
        outcome = wire.outcome(fields)  # type: ignore[arg-type]
    except wire.FrameError:
        return
    assert isinstance(
        outcome, RandomBytes | KeyDescription | OperationError | Encrypted | Decrypted
    )


def test_an_over_long_frame_is_refused_by_its_head() -> None:
    head = struct.pack(">I", wire.MAX_FRAME + 1)
    with pytest.raises(wire.FrameError, match="too long"):
        wire.FrameBuffer().feed(head)
    assert wire.FrameBuffer().feed(struct.pack(">I", wire.MAX_FRAME)) == []


@pytest.mark.parametrize("body", [b"\xc1", b"\x81\x01\x02", b"\x90", b"\x05", b"\x91", b""])
def test_a_body_that_is_no_frame(body: bytes) -> None:
    with pytest.raises(wire.FrameError):
        wire.FrameBuffer().feed(struct.pack(">I", len(body)) + body)


OPERATIONS: dict[Operation, list[object]] = {
    Random(16): [wire.RANDOM, 16],
    Describe("k"): [wire.DESCRIBE, "k"],
    Encrypt("k", b"p"): [wire.ENCRYPT, "k", None, None, None, b"", b"p", False],
    Encrypt(
        "k", b"p", Algorithm.AES_CBC, Padding.NONE, bytes(16), format=CiphertextFormat.RAW
    ): [wire.ENCRYPT, "k", "AES_CBC", "NO_PADDING", bytes(16), b"", b"p", True],
    Decrypt("k", b"c", bytes(12), 7, aad=b"a"): [
        wire.DECRYPT, "k", None, None, bytes(12), b"a", b"c", False, 7,
    ],
    Decrypt("k", b"c", b"", None, Algorithm.AES_ECB, Padding.PKCS7, format=CiphertextFormat.RAW): [
        wire.DECRYPT, "k", "AES_ECB", "PKCS7_PADDING", b"", b"", b"c", True, None,
    ],
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_the_wire(operation: Operation) -> None:
    fields = msgpack.unpackb(msgpack.packb(wire.operation_fields(operation)))
    assert fields == OPERATIONS[operation]


OUTCOMES = [
    ((wire.ENCRYPT, b"c", b"i", 3, Algorithm.AES_GCM, None),
     Encrypted(b"c", b"i", 3, Algorithm.AES_GCM, None)),
    ((wire.ENCRYPT, b"c", b"i", 3, Algorithm.AES_CBC, Padding.PKCS7),
     Encrypted(b"c", b"i", 3, Algorithm.AES_CBC, Padding.PKCS7)),
    ((wire.DECRYPT, b"p", 1, Algorithm.AES_ECB, Padding.NONE),
     Decrypted(b"p", 1, Algorithm.AES_ECB, Padding.NONE)),
    ((wire.RANDOM, b"r"), RandomBytes(b"r")),
    ((wire.DESCRIBE, "k", KeySpec.SM4, Usage.DECRYPT.value, 2),
     KeyDescription("k", KeySpec.SM4, Usage.DECRYPT, 2, None)),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "result"), OUTCOMES)
def test_results_over_the_wire(fields: tuple[object, ...], result: object) -> None:
    assert wire.outcome(msgpack.unpackb(msgpack.packb(fields))) == result


@pytest.mark.parametrize("fault", Fault)
def test_failures_over_the_wire(fault: Fault) -> None:
    sent = wire.failure(OperationError(fault, "why", "where"))
    came = wire.outcome(msgpack.unpackb(msgpack.packb(sent)))
    assert isinstance(came, OperationError)
    assert (came.fault, came.message, came.parameter) == (fault, "why", "where")


# ---- a process that does not speak it --------------------------------------------------------

OPEN_ANSWER = wire.pack([wire.READY])


async def lane_of(*answers: bytes) -> Pkcs11Lane:
    """A lane whose process is a script: it answers each frame with the next of these bytes."""
    script = (
        "import socket, sys\n"
        "s = socket.socket(fileno=int(sys.argv[1]))\n"
        "for answer in sys.argv[2:]:\n"
        "    size = int.from_bytes(s.recv(4, socket.MSG_WAITALL))\n"
        "    s.recv(size, socket.MSG_WAITALL)\n"
        "    s.sendall(bytes.fromhex(answer))\n"
        "s.recv(1)\n"
    )
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        arguments = [sys.executable, "-c", script, str(number), *(a.hex() for a in answers)]
        popen = await asyncio.to_thread(subprocess.Popen, arguments, pass_fds=[number])
    lane = Pkcs11Lane(Process(popen, ours), timeout=30.0)
    await lane.open({}, 30.0)
    return lane


GARBAGE = {
    "no frame": struct.pack(">I", 1) + b"\xc1",
    "over long": struct.pack(">I", wire.MAX_FRAME + 1),
    "unknown kind": wire.pack([99]),
    "kind is text": wire.pack(["x"]),
    "outcomes without any": wire.pack([wire.OUTCOMES]),
    "outcomes are a number": wire.pack([wire.OUTCOMES, 7]),
    "outcome is a number": wire.pack([wire.OUTCOMES, [7]]),
    "outcome of no kind": wire.pack([wire.OUTCOMES, [[55, 1]]]),
    "outcome too short": wire.pack([wire.OUTCOMES, [[wire.ENCRYPT, b""]]]),
    "unknown fault": wire.pack([wire.OUTCOMES, [[-1, "NONSENSE", "", ""]]]),
    "more than asked": wire.pack([wire.OUTCOMES, [[wire.RANDOM, b"x"]] * 2]),
    "broken without a word": wire.pack([wire.BROKEN]),
    "failed with an unknown reason": wire.pack([wire.FAILED, "nonsense", "x"]),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
async def test_garbage_breaks_the_lane_and_nothing_else(garbage: bytes) -> None:
    lane = await lane_of(OPEN_ANSWER, garbage)
    try:
        settled: list[object] = []
        with pytest.raises(LaneError) as caught:
            await lane.execute([Random(1)], 0, lambda *outcome: settled.append(outcome))
        assert caught.value.reason is BreakReason.EXIT
        assert (await lane.wait_broken()).message == caught.value.message
        assert len(settled) <= 1
    finally:
        await lane.close()
    assert lane._process.popen.returncode is not None


@pytest.mark.parametrize("answer", [OPEN_ANSWER * 2, OPEN_ANSWER + wire.pack([wire.PROBED])])
async def test_an_answer_that_nobody_asked_for(answer: bytes) -> None:
    lane = await lane_of(answer)
    try:
        assert (await lane.wait_broken()).reason is BreakReason.EXIT
    finally:
        await lane.close()


async def test_a_device_error_reaches_only_what_was_begun() -> None:
    """The first frame was begun, the second not: only the first counts as tried."""
    lane = await lane_of(OPEN_ANSWER, wire.pack([wire.OUTCOMES, [[wire.RANDOM, b"x"]]]), b"")
    try:
        settled: list[tuple[int, object]] = []
        begun = asyncio.create_task(
            lane.execute([Random(1)] * 2, 0, lambda *outcome: settled.append(outcome))
        )
        waiting = asyncio.create_task(lane.execute([Random(1)], 0, lambda *_: None))
        await eventually(lambda: settled)
        lane._process.popen.kill()
        with pytest.raises(LaneError) as first:
            await begun
        with pytest.raises(LaneError) as second:
            await waiting
        assert settled == [(0, RandomBytes(b"x"))]
        assert (first.value.started, second.value.started) == (True, False)
    finally:
        await lane.close()


# ---- the process -----------------------------------------------------------------------------


async def test_what_a_lane_inherits(hsm: Hsm, start_kmi, monkeypatch) -> None:
    monkeypatch.setenv("A_PIN_OF_THE_TEST", PIN)
    monkeypatch.setenv("XKIPROXY_CONFIG", "/nowhere")
    with open(os.devnull) as leak, socket.socket() as other:  # noqa: PTH123
        os.set_inheritable(leak.fileno(), True)
        os.set_inheritable(other.fileno(), True)
        kmi = await start_kmi(hsm.settings(pin=SecretSource(env="A_PIN_OF_THE_TEST"), lanes=2))
        lanes = ready_lanes(os.getpid())
        assert sorted(lanes) == [0, 1]
        for pid in lanes.values():
            proc = Path(f"/proc/{pid}")
            environment = (proc / "environ").read_bytes()
            assert PIN.encode() not in environment
            assert b"A_PIN_OF_THE_TEST" not in environment
            assert b"XKIPROXY_" not in environment
            assert PIN.encode() not in (proc / "cmdline").read_bytes()
            opened = {path.name: path.readlink() for path in (proc / "fd").iterdir()}
            beyond = [str(place) for name, place in opened.items() if int(name) > 2]
            own = [place for place in beyond if not place.startswith(str(hsm.directory))]
            assert len([place for place in own if place.startswith("socket:")]) == 1, opened
            assert all(place.startswith("socket:") for place in own), opened
            assert str(opened["0"]) == os.devnull
            assert os.getsid(pid) == pid
        assert (await submit(kmi, Random(5))).data  # type: ignore[union-attr]


async def test_its_title(hsm: Hsm, start_kmi) -> None:
    await start_kmi(hsm.settings(name="my-hsm", lanes=2))
    titles = {t for t in children(os.getpid()).values() if t.startswith("xkiproxy")}
    assert titles == {"xkiproxy: lane 0 of KMI my-hsm", "xkiproxy: lane 1 of KMI my-hsm"}


async def test_closing_leaves_no_process(hsm: Hsm, start_kmi) -> None:
    kmi = await start_kmi(hsm.settings(lanes=2))
    pids = ready_lanes(os.getpid()).values()
    await kmi.close()
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


async def test_an_interrupt_at_the_terminal_does_not_end_it(hsm: Hsm, start_kmi) -> None:
    kmi = await start_kmi(hsm.settings())
    (pid,) = ready_lanes(os.getpid()).values()
    os.kill(pid, signal.SIGINT)
    assert (await submit(kmi, Random(1))).data  # type: ignore[union-attr]
    assert ready_lanes(os.getpid()) == {0: pid}


_PARENT = """
import asyncio, sys
from xkiproxy.config.models import Pkcs11Settings
from xkiproxy.kmi.registry import open_kmi
from xkiproxy.observability.metrics import Metrics

async def main():
    kmi = open_kmi(Pkcs11Settings.model_validate_json(sys.argv[1]), Metrics())
    kmi.start()
    await kmi.check()
    print(kmi.state, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_it_dies_with_its_parent(hsm: Hsm) -> None:
    settings_ = hsm.settings(lanes=2).model_dump_json(exclude_none=True)
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PARENT, settings_, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert parent.stdout is not None
        assert await asyncio.wait_for(parent.stdout.readline(), 60) == b"connected\n"
        pids = list(ready_lanes(parent.pid).values())
        assert len(pids) == 2
        # A stopped one cannot notice that its socket is closed: the kernel must end it.
        os.kill(pids[0], signal.SIGSTOP)
    finally:
        parent.kill()
        await parent.wait()
    await eventually(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status[0] != "Z"


async def test_a_process_whose_socket_closes_before_it_starts_ends() -> None:
    process = spawn()
    process.sock.close()
    assert await asyncio.to_thread(process.popen.wait, 30) == 0


def test_a_start_that_fails_when_nobody_listens_any_more_is_silent(tmp_path: Path) -> None:
    """Its server, or `xkiproxy check`, has said why already: no traceback among that."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "xkiproxy.kmi.pkcs11.program", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
    settings_ = {"title": "lane", "module": str(tmp_path / "none.so"), "pin": PIN, "label": "t"}
    settings_ |= {"serial": None, "iv_by_hsm": False, "sm4": None, "rw": False}
    with ours:
        ours.sendall(wire.pack([wire.OPEN, settings_]))
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0
