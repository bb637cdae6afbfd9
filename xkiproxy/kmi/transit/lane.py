"""A lane to Transit: one batch at a time, as one request for each key and kind of operation.

A ciphertext of Transit is `vault:vN:` and Base64 of nonce, ciphertext and tag, under version N. The
envelope authenticates the version, so it must be known before the encryption: the latest one is
looked up (and remembered for some seconds), and the request names it. The IV is Transit's own.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from xkiproxy.config.models import TransitSettings
from xkiproxy.crypto.algorithms import IV_SIZES, TAG_SIZE, Algorithm
from xkiproxy.crypto.envelope import authenticated_data, version_unknown
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
    Result,
    invalid_ciphertext,
)
from xkiproxy.kmi.base import BreakReason, LaneError, Settle
from xkiproxy.kmi.endpoints import Endpoints
from xkiproxy.kmi.transit.client import TransitClient, TransitKey
from xkiproxy.kmi.transit.http import Answer

_IV_SIZE = IV_SIZES[Algorithm.AES_GCM]
_MAX_RANDOM = 64 << 10
_VERSION_WORDS = "requested version for encryption"
_CIPHERTEXT_WORDS = (
    "invalid ciphertext",
    "ciphertext or signature",
    "message authentication failed",
    "no such key version",
)
"""What Transit says of a ciphertext that it cannot open: altered, of another key or version."""

Outcome = Result | OperationError


_Run = Callable[[list[tuple[int, Any]], int, Settle], Coroutine[Any, Any, None]]


class _Group(NamedTuple):
    """The operations of a batch that go in one request, with their places in the batch."""

    run: _Run
    items: list[tuple[int, Any]]


class TransitLane:
    """See `xkiproxy.kmi.base.Lane`."""

    def __init__(self, client: TransitClient) -> None:
        """The lane has acquired the client, and releases it when it is closed."""
        self._client = client
        self._timeout = client.settings.operation_timeout_ms / 1000
        self._broken: asyncio.Future[LaneError] = asyncio.get_running_loop().create_future()
        self._works: set[asyncio.Task[None]] = set()
        self._released = False

    # ---- Lane ------------------------------------------------------------------------------

    async def execute(self, batch: Sequence[Operation], epoch: int, settle: Settle) -> None:
        """See `Lane.execute`."""
        limit = asyncio.timeout(self._timeout)
        await self._guard(self._run(batch, epoch, settle, limit), limit)

    async def probe(self) -> None:
        """See `Lane.probe`; `TransitClient.check` says what it shows."""
        await self._guard(self._client.check(), asyncio.timeout(self._timeout))

    async def wait_broken(self) -> LaneError:
        """See `Lane.wait_broken`."""
        return await asyncio.shield(self._broken)

    async def close(self) -> None:
        """See `Lane.close`; the token is given back if nothing was wrong."""
        was_well = not self._broken.done()
        self._break(LaneError("closed", BreakReason.EXIT))
        for work in self._works:
            work.cancel()
        if not self._released:
            self._released = True
            await self._client.release(revoke=was_well)

    async def _guard(self, coroutine: Coroutine[Any, Any, None], limit: asyncio.Timeout) -> None:
        """Run it within a limit; what breaks the lane is raised."""
        if self._broken.done():
            coroutine.close()
            broken = self._broken.result()
            raise LaneError(broken.message, broken.reason, started=False)
        work = asyncio.ensure_future(coroutine)
        self._works.add(work)
        try:
            async with limit:
                await work
        except TimeoutError:
            message = f"{self._client.address}: no answer for {self._timeout:g} s"
            raise self._break(LaneError(message, BreakReason.TIMEOUT)) from None
        except LaneError as error:
            raise self._break(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            broken = self._broken.result()
            raise LaneError(broken.message, broken.reason) from None
        finally:
            self._works.discard(work)

    def _break(self, error: LaneError) -> LaneError:
        if not self._broken.done():
            self._broken.set_result(error)
        return error

    # ---- batches ---------------------------------------------------------------------------

    async def _run(
        self, batch: Sequence[Operation], epoch: int, settle: Settle, limit: asyncio.Timeout
    ) -> None:
        """All groups, as many at once as there are connections; each begins the time anew.

        A batch of many keys is many requests: that they wait for each other says nothing of the
        server. Those that can be settled are, also when another breaks the lane.
        """
        groups = self._groups(batch)
        if len(groups) == 1:
            await groups[0].run(groups[0].items, epoch, settle)
            return
        turn = asyncio.Semaphore(self._client.settings.connections)

        async def run(group: _Group) -> None:
            async with turn:
                await group.run(group.items, epoch, settle)
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time() + self._timeout)

        works = [run(group) for group in groups]
        for failure in await asyncio.gather(*works, return_exceptions=True):
            if failure is not None:
                raise failure

    def _groups(self, batch: Sequence[Operation]) -> list[_Group]:
        runs: dict[type, _Run] = {
            Encrypt: self._encrypt,
            Decrypt: self._decrypt,
            Describe: self._describe,
            Random: self._random,
        }
        groups: dict[tuple[type, str], _Group] = {}
        for index, operation in enumerate(batch):
            kind = type(operation)
            key_id = "" if isinstance(operation, Random) else operation.key_id
            group = groups.get((kind, key_id))
            if group is None:
                group = groups[kind, key_id] = _Group(runs[kind], [])
            group.items.append((index, operation))
        return list(groups.values())

    async def _encrypt(
        self, items: list[tuple[int, Encrypt]], epoch: int, settle: Settle, again: bool = True
    ) -> None:
        key_id = items[0][1].key_id
        try:
            key = await self._client.key(key_id, epoch)
        except OperationError as error:
            _settle_all(items, error, settle)
            return
        asked = list(_admitted(items, key, settle))
        results = await self._ask(f"encrypt/{key_id}", key_id, asked, settle, _plaintext_of(key))
        stale: list[tuple[int, Encrypt]] = []
        for (index, operation), result in results:
            words = result.get("error")
            if words and _VERSION_WORDS in words and again:
                stale.append((index, operation))
            else:
                settle(index, self._encrypted(operation, result, key))
        if stale:
            # Another has forbidden this version meanwhile, or restored the key.
            self._client.forget(key_id)
            await self._encrypt(stale, epoch, settle, again=False)

    async def _decrypt(self, items: list[tuple[int, Decrypt]], epoch: int, settle: Settle) -> None:
        key_id = items[0][1].key_id
        try:
            key = await self._client.key(key_id, epoch)
        except OperationError as error:
            _settle_all(items, error, settle)
            return
        asked = list(_admitted(items, key, settle))
        results = await self._ask(f"decrypt/{key_id}", key_id, asked, settle, _ciphertext_of)
        for (index, operation), result in results:
            settle(index, self._decrypted(operation, result))

    async def _describe(
        self, items: list[tuple[int, Describe]], epoch: int, settle: Settle
    ) -> None:
        key_id = items[0][1].key_id
        outcome: Outcome
        try:
            key = await self._client.fetch(key_id, epoch)
            key.check()
            info = key.info
            assert info.spec is not None  # noqa: S101 - the key was checked
            outcome = KeyDescription(key_id, info.spec, info.usage, key.latest, info.created)
        except OperationError as error:
            outcome = error
        _settle_all(items, outcome, settle)

    async def _random(self, items: list[tuple[int, Random]], epoch: int, settle: Settle) -> None:
        """Bytes for all are drawn at once and divided: no byte is given out twice."""
        del epoch
        while items:
            size, count = 0, 0
            while count < len(items) and (not count or size + items[count][1].length < _MAX_RANDOM):
                size += items[count][1].length
                count += 1
            now, items = items[:count], items[count:]
            answer = await self._client.call("POST", "random", {"bytes": size, "format": "base64"})
            if answer.status != 200:
                _settle_all(now, self._client.refusal(answer, "random"), settle)
                continue
            drawn = _binary(answer.data.get("random_bytes"))
            if len(drawn) != size:
                raise self._client.problem(answer, "random")
            for index, operation in now:
                settle(index, RandomBytes(drawn[: operation.length]))
                drawn = drawn[operation.length :]

    async def _ask(
        self,
        path: str,
        key_id: str,
        items: list[tuple[int, Any]],
        settle: Settle,
        fields: Callable[[Any], Mapping[str, Any]],
    ) -> list[tuple[tuple[int, Any], Mapping[str, Any]]]:
        """Ask for these; returns each with its result, having settled what has none."""
        if not items:
            return []
        body = {"batch_input": [fields(operation) for _, operation in items]}
        answer = await self._client.call("POST", path, body)
        results = answer.data.get("batch_results")
        if isinstance(results, list):
            if len(results) != len(items) or not all(isinstance(r, dict) for r in results):
                raise self._client.problem(Answer(200, {}), path)
            return list(zip(items, results, strict=True))
        if answer.status == 413 and len(items) > 1:
            half = len(items) // 2
            parts = (items[:half], items[half:])
            made = [await self._ask(path, key_id, part, settle, fields) for part in parts]
            return made[0] + made[1]
        if answer.status == 200:
            raise self._client.problem(answer, path)
        self._client.forget(key_id)
        _settle_all(items, self._client.refusal(answer, path), settle)
        return []

    def _encrypted(self, operation: Encrypt, result: Mapping[str, Any], key: TransitKey) -> Outcome:
        words = result.get("error")
        if words:
            return self._client.item_refusal(str(words), "encrypt")
        prefix = f"vault:v{key.latest}:"
        text = result.get("ciphertext")
        is_right = isinstance(text, str) and text.startswith(prefix)
        made = _binary(str(text)[len(prefix) :]) if is_right else b""
        if len(made) != _IV_SIZE + len(operation.plaintext) + TAG_SIZE:
            # Under another version it would not open: the envelope has authenticated this one.
            return self._client.item_refusal("a ciphertext of another version or size", "encrypt")
        return Encrypted(made[_IV_SIZE:], made[:_IV_SIZE], key.latest, Algorithm.AES_GCM, None)

    def _decrypted(self, operation: Decrypt, result: Mapping[str, Any]) -> Outcome:
        words = result.get("error")
        if words:
            if any(known in words for known in _CIPHERTEXT_WORDS):
                return invalid_ciphertext()
            return self._client.item_refusal(str(words), "decrypt")
        plaintext = _binary(result.get("plaintext"))
        if len(plaintext) != len(operation.ciphertext) - TAG_SIZE:
            return self._client.item_refusal("a plaintext of another size", "decrypt")
        return Decrypted(plaintext, operation.version or 1, Algorithm.AES_GCM, None)


class TransitLauncher:
    """Starts the lanes of a KMI; those to one address share connections and token."""

    def __init__(self, settings: TransitSettings) -> None:
        """Raises KeyManagerError or SecretError: files for TLS cannot be used."""
        self._settings = settings
        self._clients = [TransitClient(settings, address) for address in settings.address]
        self._endpoints = Endpoints(len(self._clients))

    async def launch(self, index: int, *, home: bool = False) -> TransitLane:
        """See `xkiproxy.kmi.base.Launcher`; every lane begins with a check of the server."""
        with self._endpoints.starting(index, home=home) as endpoint:
            return await self._open(self._clients[endpoint])

    def is_away(self, index: int) -> bool:
        """See `xkiproxy.kmi.base.Launcher`."""
        return self._endpoints.is_away(index)

    async def _open(self, client: TransitClient) -> TransitLane:
        seconds = self._settings.start_timeout_seconds
        await client.acquire()
        try:
            async with asyncio.timeout(seconds):
                await client.check()
        except BaseException as error:
            await client.release(revoke=False)
            if isinstance(error, LaneError):
                # A login that was refused is not sent again at once: `Login` sees to that.
                raise LaneError(error.message, BreakReason.START) from None
            if isinstance(error, TimeoutError):
                message = f"{client.address}: no answer for {seconds:g} s"
                raise LaneError(message, BreakReason.START) from None
            raise
        return TransitLane(client)


def _admitted(
    items: Iterable[tuple[int, Any]], key: TransitKey, settle: Settle
) -> Iterable[tuple[int, Any]]:
    """The operations that Transit can do; the others are settled."""
    for index, operation in items:
        refusal = _unsupported(operation, key)
        if refusal is not None:
            settle(index, refusal)
        else:
            yield index, operation


def _unsupported(operation: Encrypt | Decrypt, key: TransitKey) -> OperationError | None:
    algorithm = operation.algorithm
    if algorithm is not None and algorithm is not Algorithm.AES_GCM:
        what = f"The key's manager, Transit, does AES_GCM, not {algorithm}."
        return OperationError(Fault.UNSUPPORTED, what)
    if isinstance(operation, Encrypt) and operation.iv is not None:
        what = "The key's manager, Transit, draws every IV itself: send none."
        return OperationError(Fault.UNSUPPORTED, what)
    if operation.format is CiphertextFormat.RAW and key.latest != 1:
        return version_unknown()
    return None


def _plaintext_of(key: TransitKey) -> Callable[[Encrypt], Mapping[str, Any]]:
    def fields(operation: Encrypt) -> Mapping[str, Any]:
        made = {"plaintext": _text(operation.plaintext), "key_version": key.latest}
        return made | _associated_data(operation, key.latest)

    return fields


def _ciphertext_of(operation: Decrypt) -> Mapping[str, Any]:
    version = operation.version or 1
    made = {"ciphertext": f"vault:v{version}:{_text(operation.iv + operation.ciphertext)}"}
    return made | _associated_data(operation, version)


def _associated_data(operation: Encrypt | Decrypt, version: int) -> dict[str, Any]:
    raw = operation.format is CiphertextFormat.RAW
    data = operation.aad if raw else authenticated_data(operation.aad, version)
    return {"associated_data": _text(data)} if data else {}


def _settle_all(items: Iterable[tuple[int, Any]], outcome: Outcome, settle: Settle) -> None:
    for index, _ in items:
        settle(index, outcome)


def _text(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _binary(text: object) -> bytes:
    """What Base64 says; nothing if it is none."""
    try:
        return binascii.a2b_base64(text, strict_mode=True) if isinstance(text, str) else b""
    except binascii.Error:
        return b""
