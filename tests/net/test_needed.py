"""The extra that the whole package needs is asked for by name."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import foedus.net as net
from foedus.errors import MissingExtra


def test_what_is_looked_for_is_the_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    extra = {line.partition(">=")[0] for line in project["optional-dependencies"]["net"]}
    assert set(net.NEEDED.values()) == extra - {"uvloop"}  # which is not to be had everywhere


@pytest.mark.parametrize("package", ["httpx", "sqlalchemy"])
def test_what_is_missing_is_named_with_the_line_that_installs_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(MissingExtra, match=rf"machines needs the package '{package}'.*foedus\[net\]"):
        net._look()
