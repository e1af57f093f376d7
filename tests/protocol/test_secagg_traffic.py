"""Bytes beside the published formula, from one client's real messages at a size that it is published for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from foedus.secure.traffic import published, traffic

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "secagg_traffic.py"


def measured(count: int, entries: int) -> dict[str, Any]:
    """As the benchmark measures it."""
    found = importlib.util.spec_from_file_location("secagg_traffic", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    told: dict[str, Any] = module.measured(count, entries)
    return told


@pytest.mark.slow
def test_one_clients_messages_among_1024_of_a_million_numbers_are_within_three_percent_of_the_formula() -> None:
    found = measured(2**10, 2**20)
    assert found["bits"] == 26
    assert found["formula times plain"] == pytest.approx(1.734, abs=5e-4)
    assert found["total"] == traffic(2**10 - 1, 2**20, 26).total, "what is counted elsewhere is what is sent"
    assert found["total"] <= 1.03 * published(2**10, 2**20, 26)
    assert found["total"] - found["tags"] <= 1.003 * published(2**10, 2**20, 26), "nearly all above it are the tags"


@pytest.mark.parametrize("count", [4, 30])
def test_what_is_counted_is_what_one_client_sends_and_is_sent(count: int) -> None:
    found = measured(count, 100)
    assert found["total"] == traffic(count - 1, 100, found["bits"]).total
