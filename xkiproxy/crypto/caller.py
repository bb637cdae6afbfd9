"""Who asks: what a cloud says of its own request."""

from __future__ import annotations

from xkiproxy.crypto.record import record


@record
class Caller:
    """What the cloud says of its own request: for the audit log and for policies, opaque."""

    request_id: str = ""
    operation: str = ""
    instance: str = ""
    key_arn: str = ""
    principal: str = ""
    source_vpc: str = ""
    source_ip: str = ""
    via_service: str = ""
    source_vpc_endpoint: str = ""
    access_reason: str = ""
