"""Fuzz the decoders with coverage as the guide, for as long as wanted:

    python tests/fuzz/decoder.py wire -max_total_time=600
    python tests/fuzz/decoder.py blob -max_total_time=600
    python tests/fuzz/decoder.py update -max_total_time=600

It starts from valid bytes. Anything but a typed error of ours is a find; the input is stored as ``crash-*``. The tests
run each for some seconds (``test_fuzz.py``); quick property tests of the same are in tests/protocol and tests/rounds.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["foedus.protocol", "foedus.rounds"]):
    from foedus.errors import ProtocolError
    from foedus.protocol import blob, wire
    from foedus.rounds.freight import parcel_of, update_blob
    from foedus.rounds.parcel import Carried, Parcel

VECTORS = Path(__file__).parents[1] / "vectors" / "wire_v1.json"


def read_wire(data: bytes) -> None:
    """What is read can be written, and reads the same."""
    found = wire.decode(data)
    assert wire.decode(wire.encode(found)) == found


def read_blob(data: bytes) -> None:
    """What is read can be written, and holds the same bytes."""
    found = blob.unpack(data)
    again = blob.unpack(blob.pack(found.arrays, found.told))
    assert {n: a.tobytes() for n, a in again.arrays.items()} == {n: a.tobytes() for n, a in found.arrays.items()}


def read_update(data: bytes) -> None:
    """An update is read or refused."""
    parcel_of(blob.unpack(data))


def valid(target: str) -> list[bytes]:
    """Bytes to begin with, which are read."""
    if target == "wire":
        return [bytes.fromhex(text) for text in json.loads(VECTORS.read_text("utf-8"))["messages"].values()]
    arrays = {"a": np.arange(3, dtype="f4"), "b": np.eye(2, dtype="i8"), "c": np.zeros(0, "u1")}
    parcel = Parcel({"update": {"values": np.ones(2, "f4")}}, {"update": Carried(2, "<f4")}, 5.0, 5, loss=0.5)
    return [blob.pack(arrays, {"kind": "x"}), update_blob(parcel)]


TARGETS: dict[str, Callable[[bytes], None]] = {"wire": read_wire, "blob": read_blob, "update": read_update}


def main() -> None:
    name = sys.argv.pop(1)
    target = TARGETS[name]

    def one(data: bytes) -> None:
        with contextlib.suppress(ProtocolError):
            target(data)

    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(valid(name)):
            (Path(corpus) / str(number)).write_bytes(data)
        atheris.Setup([*sys.argv, corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
