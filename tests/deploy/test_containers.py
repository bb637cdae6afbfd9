"""The Dockerfile and the compose file, as far as they can be tried without building an image.

The build's steps are done by hand, with the files that .dockerignore lets through; the health check
is asked of a running proxy; the compose file's setup makes a real token. test_image.py builds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hsm import SOFTHSM
from ports import free_ports

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
COMPOSE = ROOT / "deploy" / "compose"
BIN = Path(sys.executable).parent
XKIPROXY = [sys.executable, "-m", "xkiproxy"]


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, timeout=110, **options
    )


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), with continued lines joined."""
    lines = [x for x in DOCKERFILE.read_text().splitlines() if x and not x.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def stages() -> list[list[tuple[str, str]]]:
    made: list[list[tuple[str, str]]] = []
    for instruction in instructions():
        if instruction[0] == "FROM":
            made.append([])
        if made:
            made[-1].append(instruction)
    return made


def test_dockerfile_has_no_finding() -> None:
    done = run(BIN / "hadolint", DOCKERFILE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_sees_a_mistake(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace("WORKDIR /source", "WORKDIR source"))
    assert "DL3000" in run(BIN / "hadolint", bad).stdout


def test_every_image_runs_as_a_user_without_rights() -> None:
    users = {}
    for stage in stages():
        base, _, name = stage[0][1].partition(" AS ")
        own = [value for keyword, value in stage if keyword == "USER"]
        users[name] = own[-1] if own else users.get(base, "0:0")
    assert users.pop("build") == "0:0"  # from which only files are taken
    assert users == {"runtime": "10001:10001", "softhsm": "10001:10001", "": "10001:10001"}


def context_files() -> list[Path]:
    """What .dockerignore lets through, which uses three kinds of lines only."""
    lines = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if not x.startswith("#")]
    assert (lines[0], lines[-1]) == ("*", "**/__pycache__")
    assert all(re.fullmatch(r"![\w./-]+", line) for line in lines[1:-1])
    found = [ROOT / line[1:] for line in lines[1:-1]]
    inside = [path for top in found for path in (top.rglob("*") if top.is_dir() else [top])]
    return [path for path in inside if path.is_file() and "__pycache__" not in path.parts]


@pytest.fixture(scope="module")
def context() -> Iterator[Path]:
    """A copy of the build context."""
    with elsewhere() as folder:
        for path in context_files():
            place = folder / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        yield folder


@contextmanager
def elsewhere() -> Iterator[Path]:
    """A folder outside of pytest's own: a source that is called token.py holds no secret."""
    with tempfile.TemporaryDirectory(prefix="xkiproxy-image-test-", dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with elsewhere() as folder:
        yield folder


def test_what_is_copied_is_in_the_context(context: Path) -> None:
    copies = [rest.split() for keyword, rest in stages()[0] if keyword == "COPY"]
    sources = {source for *names, _ in copies for source in names}
    folders = [path for path in context.iterdir() if path.name != "deploy"]
    lists = {f"deploy/{path.name}" for path in (context / "deploy").iterdir()}
    assert lists == {"deploy/requirements.txt", "deploy/build-requirements.txt"}
    assert sources == {path.name for path in folders} | lists


def test_the_context_installs_and_runs(context: Path, scratch: Path) -> None:
    """As the image does, but with the dependencies of these tests instead of anew."""
    assert ("RUN", "python3 -m venv /opt/xkiproxy") in stages()[0]
    assert any(
        "/opt/xkiproxy/bin/pip install --no-deps --no-build-isolation ." in rest
        for _, rest in stages()[0]
    )
    place = scratch / "venv"
    venv.create(place, with_pip=True)
    own = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    done = run(place / "bin" / "pip", "install", "--quiet", "--no-deps", context)
    assert done.returncode == 0, done.stderr
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    program = place / "bin" / "xkiproxy"
    version = run(program, "--version", cwd=scratch, env=clean)
    assert version.returncode == 0, version.stderr
    where = "import xkiproxy; print(xkiproxy.__file__)"
    assert run(place / "bin" / "python", "-c", where, cwd=scratch, env=clean).stdout.startswith(
        str(own)
    )
    # A file of the package that is no module.
    assert "action random" in run(program, "policy", "schema", cwd=scratch, env=clean).stdout


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A running proxy with the admin listener where `init` puts it, but for the port."""
    config = tmp_path / "etc" / "xkiproxy.toml"
    assert run(*XKIPROXY, "init", config.parent).returncode == 0
    port, admin = free_ports(2)
    text = config.read_text().replace("0.0.0.0:8443", f"127.0.0.1:{port}")
    config.write_text(text.replace("127.0.0.1:9464", f"127.0.0.1:{admin}"))
    process = subprocess.Popen([*XKIPROXY, "serve", "--config", config], stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{admin}/readyz", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None
            time.sleep(0.1)
    yield admin, process
    process.kill()
    process.wait(timeout=30)


def health_check() -> list[str]:
    """Its command."""
    (check,) = [rest for keyword, rest in instructions() if keyword == "HEALTHCHECK"]
    command: list[str] = json.loads(check[check.index("[") :])
    return command


def test_health_check_tells_a_running_proxy(proxy: tuple[int, subprocess.Popen[bytes]]) -> None:
    port, process = proxy
    program, *arguments = health_check()
    assert program == "python3"
    assert "127.0.0.1:9464/livez" in arguments[-1]
    arguments[-1] = arguments[-1].replace(":9464", f":{port}")
    # A proxy for the web that is not there must not come between.
    elsewhere = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
    assert run(sys.executable, *arguments, env=elsewhere).returncode == 0
    process.terminate()
    process.wait(timeout=60)
    assert run(sys.executable, *arguments, env=elsewhere).returncode != 0


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return document


def check_schema(file: Path) -> subprocess.CompletedProcess[str]:
    return run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)


def test_prometheus_keeps_what_the_objectives_look_back_to() -> None:
    command = compose()["services"]["prometheus"]["command"]
    (days,) = [part.partition("=")[2] for part in command if "retention.time" in part]
    assert int(days.removesuffix("d")) > 30


def test_compose_file_follows_the_specification(tmp_path: Path) -> None:
    done = check_schema(COMPOSE / "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((COMPOSE / "compose.yaml").read_text().replace("cap_drop", "capdrop"))
    assert "capdrop" in check_schema(wrong).stdout


@pytest.mark.parametrize("name", ["setup", "proxy", "prometheus", "grafana"])
def test_services_are_confined(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "pid", "ipc", "devices", "user"}
    assert service.get("network_mode") in ({"none"} if name == "setup" else {None})
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:"), port
    for variable in service.get("environment", {}):
        assert not re.search(r"PASSWORD|SECRET|TOKEN|PIN|KEY", variable), variable


def test_somebody_takes_leave_of_orphans() -> None:
    """Lanes of a worker that was killed fall to process 1, which must not be the proxy."""
    assert compose()["services"]["proxy"]["init"] is True
    page = (ROOT / "docs" / "deploy-containers.md").read_text()
    started = re.findall(r"docker run --detach.*", page)
    assert started
    assert all("--init" in line for line in started)


def test_what_compose_mounts_is_there() -> None:
    document = compose()
    for service in document["services"].values():
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (COMPOSE / source).exists(), volume
                assert mode == ["ro"], volume
            else:
                assert source in document["volumes"], volume
            assert target.startswith("/")
        if "build" in service:
            base = COMPOSE / service["build"]["context"]
            assert (base / service["build"]["dockerfile"]).samefile(DOCKERFILE)
            names = [stage[0][1].partition(" AS ")[2] for stage in stages()]
            assert service["build"]["target"] in names


def mounted(service: str, target: str) -> Path:
    """What a service sees at a place."""
    for volume in compose()["services"][service]["volumes"]:
        source, place, *_ = volume.split(":")
        if target == place or target.startswith(place + "/"):
            return (COMPOSE / source / target.removeprefix(place).lstrip("/")).resolve()
    raise AssertionError(f"{service} has nothing at {target}")


def test_prometheus_reads_its_configuration_and_the_rules(tmp_path: Path) -> None:
    (argument,) = [x for x in compose()["services"]["prometheus"]["command"] if "config.file" in x]
    file = mounted("prometheus", argument.partition("=")[2])
    document = yaml.safe_load(file.read_text())
    (pattern,) = document["rule_files"]
    rules = mounted("prometheus", str(Path(pattern).parent))
    here = tmp_path / "prometheus.yaml"
    here.write_text(file.read_text().replace(str(Path(pattern).parent), str(rules)))
    done = run("promtool", "check", "config", here)
    assert done.returncode == 0, done.stderr
    assert "2 rule files found" in done.stdout
    (job,) = document["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["proxy:9464"]}]
    assert "xkiproxy" in job["job_name"]


def test_grafana_finds_data_source_and_dashboards() -> None:
    (provider,) = yaml.safe_load(
        mounted("grafana", "/etc/grafana/provisioning/dashboards/xkiproxy.yml").read_text()
    )["providers"]
    dashboards = mounted("grafana", provider["options"]["path"])
    assert len(list(dashboards.glob("*.json"))) == 3
    (source,) = yaml.safe_load(
        mounted("grafana", "/etc/grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"]
    variable = re.fullmatch(r"\$\{(\w+)\}", source["url"])
    assert variable is not None
    settings = compose()["services"]["grafana"]["environment"]
    assert settings[variable[1]] == "http://prometheus:9090"


def test_setup_makes_a_token_and_a_configuration_once(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    conf = tmp_path / "softhsm2.conf"
    text = mounted("setup", "/etc/softhsm2.conf").read_text()
    conf.write_text(text.replace("/var/lib/xkiproxy", str(state)))
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "STATE": str(state),
        "MODULE": str(SOFTHSM),
        "SOFTHSM2_CONF": str(conf),
        "XKIPROXY_CONFIG": str(state / "conf" / "xkiproxy.toml"),
    }
    (state / "new").mkdir()  # what a try left behind that was ended midway
    setup = mounted("setup", "/setup.sh")
    done = run("/bin/sh", setup, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in state.iterdir()) == ["conf", "tokens"]

    settings = tomllib.loads((state / "conf" / "xkiproxy.toml").read_text())
    assert settings["server"]["admin_listen"] == "0.0.0.0:9464"
    assert run(*XKIPROXY, "check", env=environment).returncode == 0
    listed = run(*XKIPROXY, "keys", "list", "--json", env=environment)
    assert [(key["id"], key["state"]) for key in json.loads(listed.stdout)] == [
        ("demo-key", "ENABLED")
    ]
    for path in (state / "conf").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path

    before = (state / "conf" / "pin").read_bytes()
    assert run("/bin/sh", setup, env=environment).returncode == 0
    assert (state / "conf" / "pin").read_bytes() == before
