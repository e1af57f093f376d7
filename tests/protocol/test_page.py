"""The protocol's page is what the tables say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_and_its_pictures_are_not_stale() -> None:
    spec = importlib.util.spec_from_file_location("protocol_drawn", DOCS / "protocol_drawn.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    stale = [path.name for path, text in module.drawn().items() if path.read_text("utf-8") != text]
    assert stale == [], "run: python docs/protocol_drawn.py"
