"""Fuzz the decoders with coverage as the guide, for as long as wanted:

    pip install atheris
    python tests/fuzz/decoder.py wire -max_total_time=600
    python tests/fuzz/decoder.py blob -max_total_time=600
    python tests/fuzz/decoder.py update -max_total_time=600

Anything but a typed error of ours is a find; the input is stored as ``crash-*``. The quick property tests of the same
are in tests/protocol and tests/rounds.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import atheris

with atheris.instrument_imports(include=["foedus"]):
    from foedus.errors import ProtocolError
    from foedus.protocol import blob, wire
    from foedus.rounds.freight import parcel_of


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


TARGETS: dict[str, Callable[[bytes], None]] = {"wire": read_wire, "blob": read_blob, "update": read_update}


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with contextlib.suppress(ProtocolError):
            target(data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
