"""The gateway: one coroutine carries a request from its headers to its answer.

The steps, in order: find the key store by its path; verify the signature; admit the nonce; decode;
let the key store perform; encode. What came of several requests is then committed together: their
audit records are written in one go, and only then may their answers leave. There is no middleware
around it and nothing here that a request does not need: this is the hot path.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from random import getrandbits
from typing import Any

from xkiproxy.crypto.operations import Fault, Health, HealthReport, OperationError, Result
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.trail import Trail
from xkiproxy.observability.audit import AuditError, Sink, encode
from xkiproxy.observability.metrics import Metrics
from xkiproxy.observability.series import Count, Distribution
from xkiproxy.observability.timing import Timing
from xkiproxy.observability.tracing import Period, Tracer
from xkiproxy.protocols.base import Protocol, Refusal, Trouble
from xkiproxy.protocols.ekm.tokens import PublicKeys
from xkiproxy.server.condition import Condition
from xkiproxy.server.http import Answer, PlainAnswer, Request
from xkiproxy.server.networks import Networks
from xkiproxy.server.strangers import Strangers

_log = logging.getLogger(__name__)

_SAMPLED = 64
"""One request in so many has its stages timed: to time them all would be a stage of its own.

More are if more than that are traced.
"""

_CANNOT_SERVE = "The proxy cannot serve at the moment."
_SUCCESS = "OK"
_NOTHING: Mapping[str, str | int] = {}
_THROTTLED = 429


class Tenant:
    """A key store with its protocol, where it is mounted, and its metrics at hand."""

    def __init__(
        self,
        path_prefix: str,
        protocol: Protocol,
        store: KeyStore,
        networks: Networks | None = None,
        last_used: dict[str, float] | None = None,
        token_keys: PublicKeys | None = None,
    ) -> None:
        """`last_used` is told when an access key is used, in seconds since the epoch.

        `token_keys` are what verifies tokens, if it has such: for who keeps them fresh.
        """
        self.networks = networks
        self.last_used = {} if last_used is None else last_used
        self.token_keys = token_keys
        self.base = path_prefix + protocol.base_path
        self.protocol = protocol
        self.store = store
        self.series: dict[tuple[str, str], tuple[Distribution, Count]] = {}
        """By call and code: what an answer is counted in."""


class Exchange(Trail):
    """One request to a key store: what is known of it so far, and in the end its answer.

    The answer may leave once the exchange has been committed.
    """

    __slots__ = (
        "began", "body", "call", "code", "details", "headers", "key_segment", "reason", "record",
        "request_id", "status", "tenant",
    )  # fmt: skip

    def __init__(
        self, tenant: Tenant, call: str, key_segment: str, request: Request, timing: Timing | None
    ) -> None:
        super().__init__(request.source, timing)
        self.tenant = tenant
        self.began = request.began
        self.call = call
        self.key_segment = key_segment
        self.request_id = new_request_id()
        self.reason = ""
        self.details = _NOTHING
        self.status = 200
        self.code = _SUCCESS
        self.body = b""

    def complete(self, recorded: bool) -> None:
        """Make what is derived of the outcome: the headers and the audit record, if it has one."""
        self.headers = self.tenant.protocol.headers(self.caller.request_id)
        if self.status == _THROTTLED:
            self.headers += f"Retry-After: {self.details.get('retry_after', 1)}\r\n".encode()
        self.record = _encode_record(self) if recorded else b""


class Gateway:
    """Serves the requests of all key stores on a listener."""

    def __init__(
        self,
        tenants: Iterable[Tenant],
        audit: Sink,
        condition: Condition,
        metrics: Metrics,
        strangers: Strangers,
        tracer: Tracer | None = None,
    ) -> None:
        self.draining = False
        self.in_flight = 0
        self.clock = time.monotonic
        self._tenants: dict[str, Tenant] = {}
        self._with_methods: dict[str, Tenant] = {}
        self.serve(tenants)
        self._audit = audit
        self._condition = condition
        self._metrics = metrics
        self._strangers = strangers
        self._count = 0
        self._tracer = tracer
        self._timed = _SAMPLED if tracer is None else min(_SAMPLED, tracer.every)
        self._untraced = 0
        metrics.requests_in_flight.labels().set_function(lambda: self.in_flight)

    def serve(self, tenants: Iterable[Tenant]) -> None:
        """Serve these key stores from the next request on, in place of those before."""
        self._tenants = {tenant.base: tenant for tenant in tenants}
        self._with_methods = {
            f"{base}/keys": tenant
            for base, tenant in self._tenants.items()
            if tenant.protocol.key_methods
        }

    async def handle(self, request: Request) -> Answer:
        """Answer one request; never raises. The answer is to be committed before it leaves."""
        tenant, call, key_segment = self._route(request.path)
        if tenant is None:
            return self._answer_stranger(request)
        self._count += 1
        timing = None if self._count % self._timed else Timing()
        exchange = Exchange(tenant, call, key_segment, request, timing)
        recorded = True
        try:
            exchange.body = await self._work(tenant, request, exchange)
        except Exception as error:
            self._refuse(exchange, error)
            recorded = bool(exchange.access_key_id) or self._has_record(exchange)
        exchange.complete(recorded)
        return exchange

    def _has_record(self, exchange: Exchange) -> bool:
        """Whether the refusal of an unknown client is written down by itself, or only counted."""
        if self._strangers.admit(time.monotonic()):
            return True
        keystore = exchange.tenant.store.name
        self._strangers.leave_out(keystore, exchange.code, exchange.reason, exchange.source)
        return False

    def _refuse(self, exchange: Exchange, error: Exception) -> None:
        """Make a failure the outcome, in the protocol's words."""
        if exchange.timing is not None:
            exchange.timing.refuse()
        protocol = exchange.tenant.protocol
        if isinstance(error, Refusal):
            refusal = error
        elif isinstance(error, OperationError):
            refusal = protocol.refuse(error)
            exchange.details = error.details
            if "policy" in error.details:
                refusal.reason = "policy"
        else:
            # The traceback of a fault of ours; messages and `repr`s hold no secrets.
            _log.error(
                "request %s failed", exchange.request_id, exc_info=error,
                extra={"request_id": exchange.request_id},
            )  # fmt: skip
            refusal = protocol.refuse(OperationError(Fault.INTERNAL, "An internal error."))
        exchange.reason = refusal.reason
        exchange.status, exchange.code = refusal.status, refusal.code
        exchange.body = protocol.encode_refusal(refusal, exchange.request_id)

    def commit(self, answers: Sequence[Answer]) -> None:
        """Write the audit records of requests; without them their answers become refusals."""
        exchanges = [answer for answer in answers if isinstance(answer, Exchange)]
        if not exchanges:
            return
        records = [record for exchange in exchanges if (record := exchange.record)]
        try:
            if records:
                self._audit.append(records)
        except AuditError as error:
            self._condition.fail("audit", str(error))
            for exchange in exchanges:
                # Nothing of what came of the request may leave.
                self._refuse(exchange, OperationError(Fault.UNAVAILABLE, _CANNOT_SERVE))
        else:
            self._metrics.audit_records.inc(len(records))
        for exchange in exchanges:
            self._observe(exchange)

    def _route(self, path: str) -> tuple[Tenant | None, str, str]:
        """The key store, the call and the key segment that a path names."""
        head, _, call = path.rpartition("/")
        tenant = self._tenants.get(head)
        if tenant is not None:
            return (tenant if call in tenant.protocol.calls else None), call, ""
        head, _, key_segment = head.rpartition("/")
        head, _, keys = head.rpartition("/")
        tenant = self._tenants.get(head)
        if tenant is None or keys != "keys" or call not in tenant.protocol.key_calls:
            return self._route_method(path)
        return tenant, call, key_segment

    def _route_method(self, path: str) -> tuple[Tenant | None, str, str]:
        """The same for a path that ends in `{key}:{call}`."""
        head, _, last = path.rpartition("/")
        key_segment, _, call = last.rpartition(":")
        tenant = self._with_methods.get(head)
        if tenant is None or not key_segment or call not in tenant.protocol.key_methods:
            return None, "", ""
        return tenant, call, key_segment

    async def _work(self, tenant: Tenant, request: Request, exchange: Exchange) -> bytes:
        """The body of a good answer; raises Refusal or OperationError."""
        protocol, store = tenant.protocol, tenant.store
        if tenant.networks is not None and not tenant.networks.admit(request.source):
            raise protocol.refuse(Trouble.SOURCE_FORBIDDEN)
        if request.trouble is not None:
            raise protocol.refuse(request.trouble)
        if self._condition.reasons:
            raise OperationError(Fault.UNAVAILABLE, _CANNOT_SERVE)
        if store.is_full and exchange.key_segment:
            # Before the signature, which costs more than all that follows.
            raise protocol.refuse(Trouble.OVERLOADED)
        timing = exchange.timing
        if timing is not None:
            timing.mark()

        now = time.time()
        identity = protocol.authenticate(request, store.signing_keys, now)
        if identity.nonce and not store.replay.admit(
            identity.access_key_id, identity.nonce, identity.expires, now
        ):
            raise protocol.refuse(Trouble.REPLAYED)
        exchange.access_key_id = identity.access_key_id
        tenant.last_used[identity.access_key_id] = now
        if timing is not None:
            timing.mark()

        exchange.caller, fields = protocol.open(exchange.call, request.body, identity)
        action = protocol.decode(exchange.call, exchange.key_segment, fields)
        if timing is not None:
            timing.mark()

        if isinstance(action, Health):
            result: Result | HealthReport = store.health()
        else:
            result = await store.perform(action, exchange.began + store.deadline, exchange)
        if timing is not None:
            timing.mark()
        answer = protocol.encode(action, result, exchange.request_id)
        if timing is not None:
            timing.mark()
        return answer

    def _observe(self, exchange: Exchange) -> None:
        tenant, call, code = exchange.tenant, exchange.call, exchange.code
        series = tenant.series.get((call, code))
        if series is None:
            labels = (tenant.store.name, tenant.protocol.name, call)
            series = tenant.series[call, code] = (
                self._metrics.request_duration.labels(*labels),
                self._metrics.requests.labels(*labels, code),
            )
        duration, counter = series
        now = time.monotonic()
        duration.observe(now - exchange.began)
        counter.inc()
        if exchange.status == _THROTTLED:
            self._metrics.shed.labels(tenant.store.name, _why_shed(exchange)).inc()
        if exchange.reason:
            self._metrics.auth_failures.labels(tenant.store.name, exchange.reason).inc()
        if exchange.timing is not None:
            self._follow(exchange, exchange.timing, now)

    def _follow(self, exchange: Exchange, timing: Timing, ended: float) -> None:
        """Tell where the time of a request went."""
        for stage, start, end in timing.stages(exchange.began, ended):
            self._metrics.stage_duration.labels(stage).observe(end - start)
        self._untraced += self._timed
        if self._tracer is not None and self._untraced >= self._tracer.every:
            self._untraced -= self._tracer.every
            name = f"{exchange.tenant.protocol.name} {exchange.call}"
            period = Period(exchange.began, ended)
            self._tracer.trace(name, _attributes(exchange), exchange.status, timing, period)

    def _answer_stranger(self, request: Request) -> Answer:
        """A request to no key store: answered in the protocol that its path looks like."""
        protocols = [tenant.protocol for tenant in self._tenants.values()]
        looks = [protocol for protocol in protocols if protocol.base_path in request.path]
        return self._refuse_unserved((looks or protocols)[0], Trouble.NOT_FOUND)

    def count_refused_connection(self) -> None:
        """A connection over the limit was closed."""
        self._metrics.shed.labels("", "connections").inc()

    def count_unproxied_connection(self, reason: str) -> None:
        """A connection without a PROXY header from a trusted balancer was closed."""
        self._metrics.proxy_protocol_refused.labels(reason).inc()

    def answer_not_http(self) -> Answer:
        """The answer to bytes that are no HTTP request."""
        protocol = next(iter(self._tenants.values())).protocol
        return self._refuse_unserved(protocol, Trouble.NOT_HTTP)

    def _refuse_unserved(self, protocol: Protocol, trouble: Trouble) -> Answer:
        """The answer to what never became a request to a key store."""
        refusal = protocol.refuse(trouble)
        self._metrics.requests.labels("", protocol.name, "", refusal.code).inc()
        body = protocol.encode_refusal(refusal, new_request_id())
        return PlainAnswer(refusal.status, protocol.headers(""), body)


def _why_shed(exchange: Exchange) -> str:
    quota = exchange.details.get("quota")
    return f"quota_{quota}" if quota else str(exchange.details.get("full", "overload"))


def _encode_record(exchange: Exchange) -> bytes:
    """The audit record of a request; never a plaintext, a ciphertext or a secret."""
    caller = exchange.caller
    record: dict[str, Any] = {
        "time": datetime.now(UTC),
        "request_id": exchange.request_id,
        "kms_request_id": caller.request_id,
        "keystore": exchange.tenant.store.name,
        "operation": exchange.call,
        "key": exchange.key_id or ascii(exchange.key_segment[:_MAX_KEY_SEGMENT])[1:-1],
        "key_version": exchange.version or None,
        "access_key_id": exchange.access_key_id,
        "principal": caller.principal,
        "instance": caller.instance,
        "kms_operation": caller.operation,
        "kms_key_arn": caller.key_arn,
        "source_vpc": caller.source_vpc,
        "source_ip": caller.source_ip,
        "source": exchange.source,
        "kmi": exchange.kmi,
        "status": exchange.status,
        "code": exchange.code,
        "duration_us": int((time.monotonic() - exchange.began) * 1e6),
    }
    if caller.source_vpc_endpoint:
        record["source_vpc_endpoint"] = caller.source_vpc_endpoint
    if caller.access_reason:
        record["access_reason"] = caller.access_reason
    if exchange.reason:
        record["reason"] = exchange.reason
    if exchange.details:
        record.update(exchange.details)
    return encode(record)


def _attributes(exchange: Exchange) -> dict[str, str | int]:
    """What a trace says of a request: enough to find it in the audit log."""
    found: dict[str, str | int] = {
        "http.request.method": "POST",
        "http.response.status_code": exchange.status,
        "xkiproxy.keystore": exchange.tenant.store.name,
        "xkiproxy.operation": exchange.call,
        "xkiproxy.key": exchange.key_id[:_MAX_KEY_SEGMENT],
        "xkiproxy.key_version": exchange.version,
        "xkiproxy.kmi": exchange.kmi,
        "xkiproxy.code": exchange.code,
        "xkiproxy.reason": exchange.reason,
        "xkiproxy.request_id": exchange.request_id,
        "xkiproxy.kms_request_id": exchange.caller.request_id,
    }
    return {name: value for name, value in found.items() if value}


def new_request_id() -> str:
    """A UUID in the form of version 4 (RFC 9562): it has to be unique, not secret.

    Half of its random bits are those of the process, half are drawn for each request, from a
    generator that is seeded by the system: `uuid.uuid4` costs eight times as much.
    """
    drawn = getrandbits(60)
    return f"{_PROCESS_ID}{drawn >> 48:03x}-{drawn & 0xFFFF_FFFF_FFFF:012x}"


_PROCESS_ID = str(uuid.uuid4())[:20]
_MAX_KEY_SEGMENT = 128
