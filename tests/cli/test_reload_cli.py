"""What `xkiproxy reload` believes of an answer that anybody may give: only what it can check."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cli_site import Answer, Run, Site


@pytest.fixture
def status(site: Site) -> dict[str, Any]:
    came = {"number": 0, "time": "", "problems": [], "changes": []}
    return {"config": str(site.config.resolve()), "pid": 0, "reload": came}


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that SIGHUP would end."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_process_that_is_no_server_gets_no_signal(
    run: Run,
    site: Site,
    answer: Answer,
    status: dict[str, Any],
    stranger: subprocess.Popen[bytes],
) -> None:
    answer({**status, "pid": stranger.pid})
    outcome = run("reload", "--config", site.config)
    assert outcome.status == 1
    assert f"process {stranger.pid} is no xkiproxy serve" in outcome.err
    time.sleep(0.1)
    assert stranger.poll() is None


@pytest.mark.parametrize("pid", [-1, 0, True, "self", None, 2**40])
def test_what_is_no_process_gets_no_signal(
    run: Run, site: Site, answer: Answer, status: dict[str, Any], pid: Any
) -> None:
    answer({**status, "pid": pid})
    outcome = run("reload", "--config", site.config)
    assert (outcome.status, "is no xkiproxy serve" in outcome.err) == (1, True)


def test_systemd_says_which_process_the_server_is(
    run: Run,
    site: Site,
    answer: Answer,
    status: dict[str, Any],
    stranger: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its unit hides the server's process from /proc."""
    monkeypatch.setenv("MAINPID", str(stranger.pid))
    answer({**status, "pid": stranger.pid})
    run("reload", "--config", site.config, "--timeout", "0.1")
    assert stranger.wait(timeout=10) == -signal.SIGHUP


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has processes of other users")
def test_the_server_of_another_user_is_not_ours() -> None:
    """Root's, asked for by root and by one who is not."""
    waiting = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", waiting, "xkiproxy", "serve"]) as process:
        text = f"""
import os
from xkiproxy.cli.reload import _is_server
print(_is_server({process.pid}))
os.seteuid(65534)
print(_is_server({process.pid}))
"""
        command = [sys.executable, "-c", text]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        process.kill()
    assert done.stdout == "True\nFalse\n", done.stderr


@pytest.mark.parametrize("said", [[], {}, {"pid": 1}, "xkiproxy"])
def test_something_else_listens_there(run: Run, site: Site, answer: Answer, said: Any) -> None:
    answer(said)
    outcome = run("reload", "--config", site.config)
    assert (outcome.status, "this is no xkiproxy" in outcome.err) == (1, True)


def test_a_server_that_does_not_name_its_configuration(
    run: Run, site: Site, answer: Answer, status: dict[str, Any]
) -> None:
    del status["config"]
    answer({**status, "pid": 1})
    outcome = run("reload", "--config", site.config)
    assert (outcome.status, "earlier version, restart it" in outcome.err) == (1, True)
