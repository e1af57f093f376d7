"""What is packaged says what the command line knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from foedus.cli import foedus

PACKAGING = Path(__file__).parents[1] / "packaging"
COMPOSE, KUBERNETES = PACKAGING / "compose.kafka.yaml", PACKAGING / "kubernetes.yaml"
ROLES = ("coordinator", "aggregator", "gateway")


def services() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(COMPOSE.read_text("utf-8"))
    return told["services"]


def test_every_role_is_there_and_every_service_that_is_needed() -> None:
    found = services()
    assert {"kafka", "postgres", "coordinator", "aggregator", "gateway"} == set(found)
    for name in ("coordinator", "aggregator", "gateway"):
        assert found[name]["command"][found[name]["command"].index("--role") + 1] == name
        assert set(found[name]["depends_on"]) <= set(found)
        assert found[name]["image"] == "foedus"


@pytest.mark.parametrize("role", ROLES)
def test_its_commands_are_read_by_the_command_line(role: str) -> None:
    check_command(services()[role]["command"])


def check_command(words: list[str]) -> None:
    """It is read, up to the point where the federation is loaded, which is not there."""
    assert words[0] == "foedus"
    done = CliRunner().invoke(foedus, [*words[1:2], "not-there.py", *words[3:]])
    assert "No such option" not in done.output
    assert "Invalid value for '--" not in done.output


def manifests() -> dict[tuple[str, str], Any]:
    """Kubernetes' objects by kind and name."""
    found = list(yaml.safe_load_all(KUBERNETES.read_text("utf-8")))
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


@pytest.mark.parametrize("role", ROLES)
def test_kubernetes_has_every_role(role: str) -> None:
    objects = manifests()
    deployment = objects["Deployment", f"foedus-{role}"]["spec"]
    pod = deployment["template"]
    assert pod["metadata"]["labels"] == deployment["selector"]["matchLabels"] == {"app": "foedus", "role": role}
    (container,) = pod["spec"]["containers"]
    assert container["command"][container["command"].index("--role") + 1] == role
    check_command(container["command"])
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    mounted = {mount["name"] for each in (container, *pod["spec"]["initContainers"]) for mount in each["volumeMounts"]}
    assert mounted == set(volumes)
    assert volumes["identity"]["emptyDir"]["medium"] == "Memory"  # keys of partial sums are on no disk
    assert volumes["secret"]["secret"]["defaultMode"] == 0o400
    for source in container["envFrom"]:
        ((kind, where),) = source.items()
        told = objects[{"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], where["name"]]
        given = set(told.get("data") or told["stringData"])
        assert any(f"$({name})" in container["command"] for name in given)
    assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_kubernetes_services_find_their_pods() -> None:
    objects = manifests()
    for (kind, _), each in objects.items():
        if kind == "Service":
            labels = objects["Deployment", f"foedus-{each['spec']['selector']['role']}"]["spec"]["template"]["metadata"]
            assert each["spec"]["selector"] == labels["labels"]
