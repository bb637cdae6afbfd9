"""The Helm chart, rendered by Helm's own engine and held against the schemas of Kubernetes.

No cluster is here: what is rendered is validated, and the configuration in it serves a proxy of the
tests, with a token of SoftHSM in place of an HSM.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm
import kubernetes_validate
import pytest
import yaml
from hsm import SOFTHSM, Hsm, make_hsm

from xkiproxy.config import load_config

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "xkiproxy"
CI = sorted((CHART / "ci").glob("*.yaml"))
KUBERNETES = ["1.27", "1.33"]
"""The oldest that Chart.yaml admits, and one that is current."""
OPERATOR = {"ServiceMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, whose schemas are not Kubernetes' own."""

Manifest = dict[str, Any]


def values(name: str, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{name}.yaml").read_text())
    return {**found, **changes}


def render(given: dict[str, Any]) -> list[Manifest]:
    rendered = helm.render(CHART, given)
    texts = [text for path, text in rendered.items() if not path.endswith("NOTES.txt")]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def one(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def pod(manifests: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
    return spec


def settings(manifests: list[Manifest]) -> str:
    """The xkiproxy.toml that a replica reads."""
    (found,) = [
        manifest["data"]["xkiproxy.toml"]
        for manifest in manifests
        if manifest["kind"] == "ConfigMap" and "xkiproxy.toml" in manifest["data"]
    ]
    return str(found)


@pytest.mark.parametrize("file", CI, ids=lambda file: file.stem)
@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_follow_the_schemas(file: Path, version: str) -> None:
    given = yaml.safe_load(file.read_text())
    assert helm.lint(CHART, given, version) == []
    for manifest in render(given):
        if manifest["kind"] not in OPERATOR:
            kubernetes_validate.validate(manifest, version, strict=True)
        assert manifest["metadata"]["name"].startswith("kms-xkiproxy")


def test_the_schemas_see_a_mistake() -> None:
    stateful = one(render(values("pkcs11")), "StatefulSet")
    stateful["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] = "yes"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(stateful, KUBERNETES[0], strict=True)


REFUSED = {
    "configuration: give": {"configuration": ""},
    "tls.secret: name a Secret": {"tls": {}},
    "credentials.secrets: name the Secrets": {"credentials": {}},
    "keeps keys in a file of one replica": {
        "configuration": '[[kmi]]\nname = "local"\ntype = "software"\n'
    },
    r"the chart writes \[audit\] itself": {"configuration": '[audit]\npath = "x"\n'},
    "needs workers: 1": {"workers": 2, "configuration": '[[audit.sink]]\ntype = "stdout"\n'},
    "needs a lane to each KMI, and KMI number 1 .* has 2; write lanes = 3": {"workers": 3},
    "KMI number 2 .* has 4; write lanes = 5": {
        "workers": 5,
        "configuration": '[[kmi]]\ntype = "pkcs11"\nlanes = 8\n[[kmi]]\ntype = "kmip"\n'
        '[[keystore]]\nname = "demo"\n',
    },
    "persistence/accessModes": {"persistence": {"accessModes": ["ReadOnlyMany"]}},
    "list the keys in the value keys": {"autoscaling": {"enabled": True}, "keys": []},
    "replicas.*minimum": {"replicas": 0},
    "preStopSeconds": {"preStopSeconds": 3},
    "digest.*pattern": {"image": {"digest": "latest"}},
    "pin.*not allowed|additional properties 'pin'": {"credentials": {"pin": "123456"}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(message: str) -> None:
    with pytest.raises(helm.HelmRefused, match=f"(?s){message}"):
        render({**values("pkcs11"), **REFUSED[message]})


def test_somebody_takes_leave_of_orphans() -> None:
    """Lanes of a worker that was killed fall to process 1, which must not be the proxy."""
    assert pod(render(values("pkcs11")))["shareProcessNamespace"] is True


def test_workers_may_be_as_many_as_the_lanes() -> None:
    given = values("pkcs11")
    lanes = given["configuration"].replace('type = "pkcs11"', 'type = "pkcs11"\nlanes = 8')
    assert "workers = 8" in settings(render({**given, "workers": 8, "configuration": lanes}))
    assert "workers = 2" in settings(render({**given, "workers": 2}))


def test_volumes_are_of_one_pod_where_the_driver_knows_that() -> None:
    for changes, modes in (
        ({}, ["ReadWriteOncePod"]),
        ({"persistence": {"accessModes": ["ReadWriteOnce"]}}, ["ReadWriteOnce"]),
    ):
        stateful = one(render(values("pkcs11", **changes)), "StatefulSet")
        assert stateful["spec"]["volumeClaimTemplates"][0]["spec"]["accessModes"] == modes


@pytest.mark.parametrize("file", CI, ids=lambda file: file.stem)
def test_pods_have_no_rights(file: Path) -> None:
    spec = pod(render(yaml.safe_load(file.read_text())))
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= container["resources"].keys()
        for variable in container["env"]:
            assert not re.search(r"PASSWORD|SECRET|TOKEN|PIN\b", variable["name"]), variable
    for volume in spec["volumes"]:
        assert "hostPath" not in volume
    (credentials,) = [volume for volume in spec["volumes"] if volume["name"] == "credentials"]
    assert credentials["projected"]["defaultMode"] == 0o440


def test_a_replica_is_asked_and_stopped_as_the_server_expects() -> None:
    manifests = render(values("kmip", shutdownDelaySeconds=20, shutdownTimeoutSeconds=10))
    spec = pod(manifests)
    (container,) = spec["containers"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    text = settings(manifests)
    assert "shutdown_delay_seconds = 20" in text
    assert "shutdown_timeout_seconds = 10" in text
    # The server needs both, and ten seconds for its lanes and logs.
    assert spec["terminationGracePeriodSeconds"] > 20 + 10 + 10
    readiness = probes["readiness"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] < 20


def test_replicas_are_kept_and_scaled() -> None:
    manifests = render(values("kmip"))
    budget = one(manifests, "PodDisruptionBudget")["spec"]
    stateful = one(manifests, "StatefulSet")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == stateful["selector"]
    assert "replicas" not in stateful  # the autoscaler's
    scaler = one(manifests, "HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 6)
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == "xkiproxy_requests_in_flight"
    assert scaler["scaleTargetRef"]["name"] == one(manifests, "StatefulSet")["metadata"]["name"]
    # Audit logs outlive the replica that wrote them.
    assert stateful["persistentVolumeClaimRetentionPolicy"] == {
        "whenScaled": "Retain",
        "whenDeleted": "Retain",
    }


def test_the_network_is_closed_but_for_what_is_named() -> None:
    policy = one(render(values("pkcs11")), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    public, admin = policy["ingress"]
    assert public == {
        "ports": [{"port": "https", "protocol": "TCP"}],
        "from": [{"ipBlock": {"cidr": "10.0.0.0/16"}}],
    }
    assert [port["port"] for port in admin["ports"]] == ["admin"]
    assert admin["from"]  # metrics are for someone, not for everyone
    dns, hsm = policy["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert hsm["to"] == [{"ipBlock": {"cidr": "10.0.20.0/24"}}]


def test_monitoring_is_that_of_the_project() -> None:
    manifests = render(values("kmip"))
    monitor = one(manifests, "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    (service,) = [
        manifest
        for manifest in manifests
        if manifest["kind"] == "Service"
        and monitor["selector"]["matchLabels"].items() <= manifest["metadata"]["labels"].items()
    ]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["targetLabel"] == "job"
    assert "xkiproxy" in relabeling["replacement"]  # what the alert on a proxy that is down goes by
    assert service["metadata"]["name"] == f"{relabeling['replacement']}-admin"  # of one release

    groups = one(manifests, "PrometheusRule")["spec"]["groups"]
    written = [
        group
        for name in ("recording", "alerts")
        for group in yaml.safe_load((ROOT / "grafana/rules" / f"{name}.yml").read_text())["groups"]
    ]
    assert [group["name"] for group in groups] == [group["name"] for group in written]
    links = {
        rule["annotations"]["runbook_url"]
        for group in groups
        for rule in group["rules"]
        if "alert" in rule
    }
    assert all(link.startswith("https://wiki.internal/xkiproxy/runbook#") for link in links)
    plain = render(values("kmip", prometheusRule={"enabled": True}))
    assert one(plain, "PrometheusRule")["spec"]["groups"] == written

    boards = {
        name: text
        for manifest in manifests
        if manifest["metadata"].get("labels", {}).get("grafana_dashboard")
        for name, text in manifest["data"].items()
    }
    folder = ROOT / "grafana" / "dashboards"
    assert {name: json.loads(text) for name, text in boards.items()} == {
        path.name: json.loads(path.read_text()) for path in folder.glob("*.json")
    }


def test_the_archive_has_what_is_linked(tmp_path: Path) -> None:
    archive = helm.package(CHART, tmp_path)
    found = helm.files(archive)
    assert helm.render(archive, values("kmip")) == helm.render(CHART, values("kmip"))
    boards = {f"files/dashboards/xkiproxy-{name}.json" for name in ("kmi", "overview", "security")}
    assert boards <= found
    assert not [name for name in found if name.startswith("ci/")]


@pytest.mark.parametrize("file", CI, ids=lambda file: file.stem)
def test_the_proxy_reads_what_is_written(file: Path, tmp_path: Path) -> None:
    manifests = render(yaml.safe_load(file.read_text()))
    path = tmp_path / "xkiproxy.toml"
    path.write_text(settings(manifests))
    config = load_config(path)
    assert config.server.shutdown_delay_seconds == 15
    container = pod(manifests)["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.server.listen.endswith(f":{ports['https']}")
    assert config.server.admin_listen.endswith(f":{ports['admin']}")
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for used in (config.catalog.path, config.server.tls and config.server.tls.certificate):
        assert any(str(used).startswith(f"{mount}/") for mount in mounts), used


def test_the_values_of_the_page_work(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "deploy-kubernetes.md").read_text()
    (printed,) = re.findall(r"```yaml\n# values\.yaml\n(.*?)```", page, re.DOTALL)
    manifests = render(yaml.safe_load(printed))
    path = tmp_path / "xkiproxy.toml"
    path.write_text(settings(manifests))
    assert load_config(path).keystore[0].kmi == ("hsm",)
    assert one(manifests, "NetworkPolicy")["spec"]["egress"][1]["ports"][0]["port"] == 1792


@pytest.fixture
def hsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hsm:
    return make_hsm(tmp_path / "hsm", monkeypatch)


def test_a_replica_prepares_itself_and_passes_its_check(tmp_path: Path, hsm: Hsm) -> None:
    """The rendered files, with their folders moved; keys are made before, as an operator does."""
    given = values(
        "pkcs11",
        configuration=values("pkcs11")["configuration"]
        .replace("/usr/safenet/lunaclient/lib/libCryptoki2_64.so", str(SOFTHSM))
        .replace('token = "production"', f'token = "{hsm.token}"'),
        proxyProtocolTrusted=[],
    )
    made = tmp_path / "made"
    xkiproxy({}, "init", str(made), "--protocol", "xks", "--keystore", "demo")
    credentials, state, etc = tmp_path / "credentials", tmp_path / "state", tmp_path / "etc"
    for folder in (credentials, state, etc):
        folder.mkdir(mode=0o700)
    for name, source in {
        "tls.crt": made / "tls/server.crt",
        "tls.key": made / "tls/server.key",
        "demo.toml": made / "credentials/demo.toml",
    }.items():
        (credentials / name).write_bytes(source.read_bytes())
    (credentials / "hsm-pin").write_text(hsm.pin)
    for path in credentials.iterdir():
        path.chmod(0o440)  # as Kubernetes makes them, with fsGroup
    (config_map,) = [m for m in render(given) if m["kind"] == "ConfigMap"]
    for name, text in config_map["data"].items():
        moved = text.replace("/run/xkiproxy/credentials", str(credentials))
        (etc / name).write_text(moved.replace("/var/lib/xkiproxy", str(state)))
    environment = {
        "XKIPROXY_CONFIG": str(etc / "xkiproxy.toml"),
        "CREDENTIALS_DIRECTORY": str(credentials),
    }
    for key in ("payroll", "retired"):
        xkiproxy(environment, "keys", "create", key)
    (state / "catalog.db").unlink()  # the keys are the HSM's; this replica is new

    (init,) = pod(render(given))["initContainers"]
    _, script, keys, folder = init["command"]
    command = [
        sys.executable, etc / Path(script).name, etc / Path(keys).name,
        folder.replace("/var/lib/xkiproxy", str(state)),
    ]  # fmt: skip
    for _ in range(2):  # and again, at its next start
        done = subprocess.run(
            command, env=around(environment), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    listed = json.loads(xkiproxy(environment, "keys", "list", "--json"))
    states = {key["id"]: key["state"] for key in listed}
    assert states == {"payroll": "ENABLED", "retired": "DISABLED"}
    assert (state / "audit").is_dir()
    xkiproxy(environment, "check")

    # What was disabled by hand stays so, and a key that the HSM does not have stops the start.
    xkiproxy(environment, "keys", "disable", "payroll")
    again = subprocess.run(
        command, env=around(environment), capture_output=True, text=True, check=False
    )
    assert (again.returncode, "key payroll of hsm stays DISABLED" in again.stderr) == (0, True)
    (etc / "keys.json").write_text(json.dumps([{"id": "nowhere", "kmi": "hsm"}]))
    refused = subprocess.run(
        command, env=around(environment), capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "nowhere" in refused.stderr


def around(environment: dict[str, str]) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **environment}


def xkiproxy(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "xkiproxy", *arguments],
        env=around(environment), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
