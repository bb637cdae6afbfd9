"""A line of the log is an event, whatever is in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from xkiproxy.observability.logging import configure_logging

log = logging.getLogger("xkiproxy.test")


@pytest.fixture(autouse=True)
def others() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_is_one_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "text")
    log.info("the server said %s", "a\n2026-01-01 INFO forged\x1b[2J\x85é\t.")
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.endswith("said a\\x0a2026-01-01 INFO forged\\x1b[2J\\x85é\t.")
    assert "INFO    xkiproxy.test: the server" in line


def test_a_traceback_follows_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "text")
    log.error("it failed", exc_info=ValueError("why"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("it failed")
    assert lines[-1] == "ValueError: why"


def test_json_is_one_object_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("warning", "json")
    log.info("not shown")
    log.error("request %s\nfailed", "r-1", extra={"request_id": "r-1"}, exc_info=ValueError("why"))
    log.warning("nothing of a request, but \udcff of a file")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"]) == ("error", "request r-1\nfailed")
    assert first["request_id"] == "r-1"
    assert "ValueError: why" in first["exception"]
    assert second["message"] == "nothing of a request, but \\udcff of a file"
    assert "request_id" not in second
    assert "exception" not in second
