"""Write the vectors of a version of the wire format, once, when the version is released:

    python tests/vectors/write_wire.py > tests/vectors/wire_v2.json

Those of version 1 are never written again: tests/protocol/test_wire.py holds that they are read for ever.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

from foedus.protocol import blob, wire

PLACE = Path(__file__).parents[1] / "protocol" / "examples.py"


def examples() -> list[object]:
    spec = importlib.util.spec_from_file_location("examples", PLACE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[object] = module.EXAMPLES
    return found


def main() -> None:
    arrays = {"vector": np.linspace(-1, 1, 5), "mask": np.array([True, False]), "counts": np.arange(3, dtype="i4")}
    blobs = [blob.pack(arrays, {"round": "1", "kind": "vector"}), blob.pack({})]
    messages = {type(m).__name__: wire.encode(m).hex() for m in examples()}  # type: ignore[arg-type]
    json.dump({"messages": messages, "blobs": [b.hex() for b in blobs]}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
