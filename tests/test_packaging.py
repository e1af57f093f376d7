"""What is packaged says what the command line knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from foedus.cli import foedus

COMPOSE = Path(__file__).parents[1] / "packaging" / "compose.kafka.yaml"


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


@pytest.mark.parametrize("name", ["coordinator", "aggregator", "gateway"])
def test_its_commands_are_read_by_the_command_line(name: str) -> None:
    """Up to the point where the federation is loaded, which is not there."""
    words = services()[name]["command"]
    assert words[0] == "foedus"
    done = CliRunner().invoke(foedus, [*words[1:2], "not-there.py", *words[3:]])
    assert "No such option" not in done.output
    assert "Invalid value for '--" not in done.output
