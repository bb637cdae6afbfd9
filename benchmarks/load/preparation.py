"""What is asked of a target before a load and after it: one request after the other."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from orjson import JSONDecodeError, loads

from benchmarks.load.client import Answer, Connection, Target
from benchmarks.load.loops import Tally
from benchmarks.load.requests import RIGHT, Checker, Material, Request, RequestMaker, Workload
from benchmarks.load.results import LoadError

ANSWER_SECONDS = 10.0


class _Caller:
    """A connection whose answers are awaited."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._connection: Connection | None = None
        self._answer: asyncio.Future[Answer] | None = None

    async def call(self, request: Request) -> Answer:
        """Send and wait; raises OSError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_SECONDS):
            if self._connection is None:
                context = self._target.context()
                _, self._connection = await loop.create_connection(
                    lambda: Connection(self), self._target.host, self._target.port, ssl=context,
                    server_hostname=self._target.host if context else None,
                )  # fmt: skip
            self._answer = loop.create_future()
            self._connection.send(request, 0)
            return await self._answer

    def answered(
        self, connection: Connection, request: Request, began: int, now: int, answer: Answer
    ) -> None:
        """See `client.Owner`."""
        del connection, request, began, now
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def lost(self, connection: Connection, kind: str) -> None:
        """See `client.Owner`."""
        del connection
        self._connection = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(kind))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.abort()


async def prepare(target: Target, workload: Workload) -> Material:
    """Encrypt every plaintext of a workload and decrypt it again.

    Raises:
        LoadError: the target does not do that rightly, so a load would measure nothing.
    """
    maker = RequestMaker(replace(workload, call="encrypt"))
    checker = Checker(workload, ())
    caller = _Caller(target)
    decrypts: list[dict[str, str]] = []
    sizes: tuple[int, ...] = ()
    try:
        for request in maker.make(workload.plaintexts):
            status, body = await caller.call(request)
            fields = _good_fields(status, body)
            decrypts.append(workload.dialect.decrypt_fields(fields))
            sizes = workload.dialect.sizes(fields)
            back = maker.decrypt(decrypts[-1], request.number)
            verdict = checker.check(back, *await caller.call(back))
            if verdict != RIGHT:
                raise LoadError(f"the target decrypts its own ciphertext wrongly: {verdict}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise LoadError(f"the target does not answer as it should: {error!r}") from None
    finally:
        caller.close()
    return Material(tuple(decrypts), sizes)


async def check_samples(target: Target, workload: Workload, tally: Tally) -> dict[str, int]:
    """Decrypt the encrypt answers that a load has kept; how many of each verdict."""
    maker = RequestMaker(replace(workload, call="encrypt"))
    checker = Checker(workload, ())
    caller = _Caller(target)
    verdicts: dict[str, int] = {}
    try:
        for number, body in tally.samples:
            try:
                request = maker.decrypt(workload.dialect.decrypt_fields(loads(body)), number)
                verdict = checker.check(request, *await caller.call(request))
            except (OSError, KeyError) as error:
                verdict = f"{type(error).__name__}"
            verdicts[verdict] = verdicts.get(verdict, 0) + 1
    finally:
        caller.close()
    return verdicts


def _good_fields(status: int, body: bytes) -> dict[str, Any]:
    try:
        fields = loads(body)
    except JSONDecodeError:
        raise LoadError(f"the target answered {status} and no JSON") from None
    if status != 200 or not isinstance(fields, dict):
        raise LoadError(f"the target answered {status}: {body[:200]!r}")
    return fields
