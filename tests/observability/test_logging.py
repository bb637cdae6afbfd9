"""A line of the log is an event, whatever is in it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


def journal_of(descriptor: int) -> str:
    status = os.fstat(descriptor)
    return f"{status.st_dev}:{status.st_ino}"


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_for_the_journal_have_their_priority(
    form: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", journal_of(2))
    configure_logging("debug", form)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "a\n<0>forged")
    log.error("it failed", exc_info=ValueError("why"))
    lines = capfd.readouterr().err.splitlines()
    assert [line[:3] for line in lines[:6]] == ["<7>", "<6>", "<4>", "<3>", "<2>", "<3>"]
    assert {line[:3] for line in lines[5:]} == {"<3>"}
    assert "why" in lines[-1]
    if form == "json":
        assert json.loads(lines[2][3:])["level"] == "warning"


@pytest.mark.parametrize("named", [None, "", "1:2"])
def test_what_is_no_journal_has_none(
    named: str | None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that a service's shell runs inherits the variable, with its output elsewhere."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    if named is not None:
        monkeypatch.setenv("JOURNAL_STREAM", named)
    configure_logging("info", "text")
    log.error("it failed")
    assert capfd.readouterr().err.startswith("20")


def test_a_start_that_fails_is_an_error_in_the_journal(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as pipe, os.fdopen(writing, "w") as stderr:
        subprocess.run(
            [sys.executable, "-m", "xkiproxy", "serve", "--config", tmp_path / "xkiproxy.toml"],
            env={**os.environ, "JOURNAL_STREAM": journal_of(writing)},
            stderr=stderr, check=False, timeout=60,
        )  # fmt: skip
        stderr.close()
        lines = pipe.read().splitlines()
    assert lines
    assert {line[:3] for line in lines} == {"<3>"}
