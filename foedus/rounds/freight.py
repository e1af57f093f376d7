"""Parcels, orders and figures as blobs that travel between machines, and back.

An update's blob has an array ``CHANNEL/NAME`` for every array of a message; orders have ``vector`` and ``buffers`` (the
parts that travel), ``down/NAME`` and ``told/CHANNEL/NAME``. Figures are texts beside them; floats are written so that
they read back to the bit. Whatever is read may come from anybody: types and lengths are checked here, the meaning in
``parcel.py``.

Not here: the layout of the bytes (``foedus/protocol/blob.py``), who may send what (``foedus/net``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.method import Travels, Vectors
from foedus.core.values import Message
from foedus.errors import MalformedMessage, NoGuarantee
from foedus.protocol import blob
from foedus.protocol.blob import Tensors
from foedus.rounds.evaluate import ClientFigures
from foedus.rounds.parcel import Carried, Parcel
from foedus.rounds.work import Orders
from foedus.tree import Vector

FIGURES = 64  # reported by one client, at most
WHOLE = 2**53

# --- updates --------------------------------------------------------------------------------------------------


def update_blob(parcel: Parcel) -> bytes:
    """What a client sends; the same bytes for the same parcel. What it keeps is not in it.

    Raises:
        NoGuarantee: a message of it is to travel under masks only.

    Example:
        >>> parcel = Parcel({"update": {"values": np.ones(2, "f4")}}, {"update": Carried(2, "<f4")}, 5.0, 5, loss=0.5)
        >>> parcel_of(blob.unpack(update_blob(parcel))).loss
        0.5
    """
    if parcel.masked:
        raise NoGuarantee(
            f"the algorithm masks {', '.join(sorted(parcel.masked))}, and an upload would show it to the server. "
            "Masked messages go through foedus.protocol.secagg, or not at all"
        )
    arrays: dict[str, NDArray[Any]] = {}
    for channel, message in parcel.messages.items():
        if "/" in channel:
            raise MalformedMessage(f"a channel that travels cannot have a name with a slash: {channel!r}")
        arrays |= {f"{channel}/{name}": array for name, array in message.items()}
    told = {
        "kind": "update", "examples": str(parcel.examples), "steps": str(parcel.steps),
        "loss": repr(float(parcel.loss)), "weight": repr(float(parcel.weight)), "report": _figures_text(parcel.report),
        "vectors": json.dumps({channel: list(carried) for channel, carried in sorted(parcel.vectors.items())}),
    }  # fmt: skip
    return blob.pack(arrays, told)


def parcel_of(given: Tensors) -> Parcel:
    """The parcel of a blob that came.

    Raises:
        MalformedMessage: it is no update; says what is missing or wrong.
    """
    told = _of_kind(given, "update")
    carried = {name: _carried(name, entry) for name, entry in _object(told, "vectors").items()}
    messages: dict[str, Message] = {channel: {} for channel in carried}
    for path, array in given.arrays.items():
        channel, slash, name = path.partition("/")
        if not slash or channel not in messages:
            raise MalformedMessage(f"no update: the array {path[:80]!r} belongs to no channel that is told of")
        messages[channel][name] = array
    return Parcel(
        messages, carried, _real(told, "weight"), _whole(told, "examples"), _whole(told, "steps"), _real(told, "loss"),
        _figures(told, "report"),
    )  # fmt: skip


def _carried(channel: str, entry: Any) -> Carried:
    sound = isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and isinstance(entry[1], str)
    if not (sound and 0 <= entry[0] <= 2**40 and len(entry[1]) <= 3):
        raise MalformedMessage(f"no update: of channel {channel[:80]!r}, length and dtype are told, and nothing else")
    return Carried(*entry)


# --- figures of an evaluation ---------------------------------------------------------------------------------


def figures_blob(found: ClientFigures) -> bytes:
    """What a client sends that was asked to evaluate.

    Example:
        >>> figures_of(blob.unpack(figures_blob(ClientFigures(3, {"loss": 0.25}))))
        ClientFigures(examples=3, figures={'loss': 0.25}, personal=None)
    """
    told = {"kind": "figures", "examples": str(found.examples), "figures": _figures_text(found.figures)}
    if found.personal is not None:
        told["personal"] = _figures_text(found.personal)
    return blob.pack({}, told)


def figures_of(given: Tensors) -> ClientFigures:
    """The figures of a blob that came.

    Raises:
        MalformedMessage: there are none in it.
    """
    told = _of_kind(given, "figures")
    personal = _figures(told, "personal") if "personal" in told else None
    return ClientFigures(_whole(told, "examples"), _figures(told, "figures"), personal)


# --- encrypted sums -------------------------------------------------------------------------------------------


def closed_blob(message: Message, *, run: str, round: int) -> bytes:
    """An encrypted sum, as those are given it who decrypt it."""
    return blob.pack(dict(message), {"kind": "closed-sum", "run": run, "round": str(round)})


def closed_of(given: Tensors, *, run: str, round: int) -> Message:
    """The encrypted sum of a blob that came.

    Raises:
        MalformedMessage: it is none, or one of another run or round.
    """
    told = _of_kind(given, "closed-sum")
    if (told.get("run"), told.get("round")) != (run, str(round)):
        raise MalformedMessage(f"this is no sum of round {round} of the run {run!r}")
    return dict(given.arrays)


def opened_blob(message: Message, of: bytes) -> bytes:
    """What a sum opens to; ``of``: the digest of the sum as it was given.

    Example:
        >>> opened = {"sum": np.arange(2), "weight": np.ones(1, np.int64)}
        >>> opened_of(blob.unpack(opened_blob(opened, bytes(32))))[0]["sum"].tolist()
        [0, 1]
    """
    return blob.pack({name: message[name] for name in ("sum", "weight")}, {"kind": "opened-sum", "of": of.hex()})


def opened_of(given: Tensors) -> tuple[Message, bytes]:
    """What a blob says that a sum opens to, and the digest of which sum; its shape is for the aggregator to check.

    Raises:
        MalformedMessage: it says nothing of the kind.
    """
    told = _of_kind(given, "opened-sum")
    try:
        of = bytes.fromhex(told.get("of", ""))
    except ValueError:
        raise MalformedMessage("no answer about a sum: it does not say which") from None
    return dict(given.arrays), of


# --- orders ---------------------------------------------------------------------------------------------------


Parts = tuple[Travels | None, Travels | None]  # of parameters and buffers, what travels; ``None`` where it is all


def orders_blob(orders: Orders, travels: Parts, *, run: str) -> bytes:
    """What every client of a round is sent; nothing in it depends on who takes part, or on the attempt.

    Args:
        orders: of the round.
        travels: the parts of parameters and buffers that travel (``Terms.travels``): the others are cut out.
        run: its name.
    """
    arrays: dict[str, NDArray[Any]] = dict(zip(("vector", "buffers"), map(_cut, orders.start, travels), strict=True))
    arrays |= beside_arrays(orders.down, orders.told)
    return blob.pack(arrays, {"kind": "orders", "run": run, "round": str(orders.round), "part": str(orders.part)})


def orders_of(given: Tensors, first: Weights, travels: Parts) -> Orders:
    """The orders of a blob that came, for nobody yet: ``replace(orders, cohort=..., kept=..., limit=...)`` adds who.

    Args:
        given: the blob, whose digest and signature are checked.
        first: the weights before any round; what does not travel is taken from them.
        travels: as in :func:`orders_blob`.

    Raises:
        MalformedMessage: it holds no orders, or those of another model.
    """
    told = _of_kind(given, "orders")
    arrays = {name: array.copy() for name, array in given.arrays.items()}  # what trains may write to its own copy
    down, beside = beside_of(arrays)
    parts = zip(("vector", "buffers"), first, travels, strict=True)
    start = Weights(*(_filled(arrays, name, own, part) for name, own, part in parts))
    nobody = np.empty(0, np.int64)
    return Orders(_whole(told, "round"), start, nobody, down=down, told=beside, part=_whole(told, "part"))


def beside_arrays(down: Vectors, told: Mapping[str, Vectors]) -> dict[str, NDArray[Any]]:
    """What goes beside a model, as arrays by name: the downlink's message, and what each channel tells its clients.

    Example:
        >>> beside_of(beside_arrays({"seed": np.arange(1)}, {"drift": {"vector": np.zeros(2)}}))
        ({'seed': array([0])}, {'drift': {'vector': array([0., 0.])}})
    """
    arrays = {f"down/{name}": array for name, array in down.items()}
    for channel, message in told.items():
        arrays |= {f"told/{channel}/{name}": array for name, array in message.items()}
    return arrays


def beside_of(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], dict[str, dict[str, NDArray[Any]]]]:
    """What :func:`beside_arrays` wrote; arrays of other names are left out."""
    down: dict[str, NDArray[Any]] = {}
    told: dict[str, dict[str, NDArray[Any]]] = {}
    for path, array in arrays.items():
        kind, _, rest = path.partition("/")
        if kind == "down":
            down[rest] = array
        elif kind == "told":
            channel, _, name = rest.partition("/")
            told.setdefault(channel, {})[name] = array
    return down, told


def _cut(vector: Vector, part: Travels | None) -> Vector:
    return vector if part is None else vector[part.at]


def _filled(arrays: Mapping[str, NDArray[Any]], name: str, first: Vector, part: Travels | None) -> Vector:
    """What came, in the place of what was there at first."""
    came = arrays.get(name)
    shape = first.shape if part is None else part.at.shape
    if came is None or came.shape != shape or came.dtype != first.dtype:
        found = "nothing" if came is None else f"{came.dtype}{list(came.shape)}"
        raise MalformedMessage(
            f"no orders for this model: its {name} takes {first.dtype}{list(shape)}, and {found} came"
        )
    if part is None:
        return came
    whole = first.copy()
    whole[part.at] = came
    return whole


# --- texts ----------------------------------------------------------------------------------------------------


def _of_kind(given: Tensors, kind: str) -> dict[str, str]:
    if given.told.get("kind") != kind:
        raise MalformedMessage(f"this blob is no {kind}: it calls itself {given.told.get('kind', 'nothing')[:40]!r}")
    return given.told


def _figures_text(figures: Mapping[str, float]) -> str:
    return json.dumps({name: repr(float(value)) for name, value in figures.items()})


def _figures(told: Mapping[str, str], name: str) -> dict[str, float]:
    found = _object(told, name)
    if len(found) > FIGURES or any(len(n) > 128 or not n.isprintable() for n in found):
        raise MalformedMessage(f"malformed {name}: at most {FIGURES} figures, by names of at most 128 letters")
    return {n: _number(value, float, f"{name}.{n}") for n, value in found.items()}


def _object(told: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(told[name])
    except (KeyError, ValueError, RecursionError):
        raise MalformedMessage(f"malformed {name}: it is no JSON object") from None
    if not isinstance(found, dict):
        raise MalformedMessage(f"malformed {name}: it is no JSON object")
    return found


def _whole(told: Mapping[str, str], name: str) -> int:
    found: int = _number(told.get(name), int, name)
    if not 0 <= found <= WHOLE:
        raise MalformedMessage(f"malformed {name}: it goes from 0 to {WHOLE}")
    return found


def _real(told: Mapping[str, str], name: str) -> float:
    found: float = _number(told.get(name), float, name)
    return found


def _number(text: Any, kind: Callable[[str], Any], name: str) -> Any:
    if isinstance(text, str) and len(text) <= 40:
        try:
            return kind(text)
        except ValueError:
            pass
    raise MalformedMessage(f"malformed {name}: it is no number")
