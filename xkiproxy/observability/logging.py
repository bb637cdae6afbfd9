"""The operator's log: a line an event on standard error, as text or as JSON.

Only a traceback has more lines, in the form for people. A message that has control characters in
it, because a server or a file did, must not begin a line of its own. For systemd's journal each
line begins with its priority (sd-daemon(3)), which `journalctl -p` asks for and people never see.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime

import orjson

_ESCAPES = {
    code: f"\\x{code:02x}"
    for code in (*range(0x20), 0x7F, *range(0x80, 0xA0))
    if chr(code) not in "\t"
}


_PRIORITIES = {
    logging.CRITICAL: "<2>",
    logging.ERROR: "<3>",
    logging.WARNING: "<4>",
    logging.INFO: "<6>",
    logging.DEBUG: "<7>",
}


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": utf8(record.getMessage()),
        }
        if request_id := getattr(record, "request_id", ""):
            fields["request_id"] = request_id
        if record.exc_info:
            fields["exception"] = utf8(self.formatException(record.exc_info))
        return orjson.dumps(fields).decode()


def utf8(text: str) -> str:
    """A text as it can be sent on: names of files may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return super().formatMessage(record).translate(_ESCAPES)


class _JournalFormatter(logging.Formatter):
    """Another formatter's lines, each with its priority."""

    def __init__(self, lines: logging.Formatter) -> None:
        super().__init__()
        self._lines = lines

    def format(self, record: logging.LogRecord) -> str:
        return for_journal(self._lines.format(record), record.levelno)


def for_journal(text: str, level: int) -> str:
    """A text for standard error: if that is the journal, each line with the level's priority."""
    if not _goes_to_journal():
        return text
    priority = _PRIORITIES.get(level, "<6>")
    return "\n".join(priority + line for line in text.split("\n"))


def _goes_to_journal() -> bool:
    """Whether $JOURNAL_STREAM (systemd.exec(5)) is the device and inode of standard error."""
    named = os.environ.get("JOURNAL_STREAM")
    if not named:
        return False
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return named == f"{status.st_dev}:{status.st_ino}"


def configure_logging(level: str, form: str) -> None:
    """Send all logs to standard error, in the form `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    lines = _JsonFormatter() if form == "json" else _TextFormatter()
    handler.setFormatter(_JournalFormatter(lines))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
