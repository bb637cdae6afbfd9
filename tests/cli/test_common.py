"""What the commands print for people, when names in it are a stranger's."""

from __future__ import annotations

import pytest

from xkiproxy.cli.common import err, out, print_fields, print_table

HOSTILE = "me\x1b[2J\x1b]0;title\x07\r\x9b1A\x7f\u202eend"
SHOWN = "me�[2J�]0;title���1A��end"


def test_a_table_has_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["NAME", "NEXT"], [[HOSTILE, 1], ["two\nlines", 2], ["王", "\udcff"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    width = len(HOSTILE) + 2
    assert lines[1:] == [
        f"{SHOWN:<{width}}1", f"{'two�lines':<{width}}2", f"{'王':<{width}}�",
    ]  # fmt: skip


def test_fields_and_messages_have_neither(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields({"name": HOSTILE, "text": "two\nlines"})
    out.print(f"one\n{HOSTILE}", markup=False)
    err.print(HOSTILE, markup=False, style="red")
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"name  {SHOWN}", "text  two�lines", "one", SHOWN,
    ]  # fmt: skip
    assert printed.err.splitlines() == [SHOWN]
