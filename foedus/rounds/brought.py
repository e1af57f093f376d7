"""What a method's functions may give: checked where it comes in, and refused by the method's name.

A method is written by the user, and a wrong shape or type would otherwise show deep in an executor, or not at all.

Not here: values that are not finite, and updates that a gate refuses (``rounds/work.py``); those are a client's fault.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np

from foedus.backends import Weights
from foedus.core.client import LocalSGD, LocalTraining
from foedus.core.method import Consult, Contribution, Gathered, Measure, Method, Train, Vectors, Visit
from foedus.core.values import State
from foedus.errors import ConfigurationError, FoedusError, TrainingError
from foedus.tree import Layout, Vector


def check_generator(label: str, function: Callable[..., Any], found: Any) -> None:
    """``local`` and ``personal`` must give generators."""
    if not isinstance(found, Generator):
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigurationError(
            f"the method {label}: {name}(visit) must be a generator, and gave {_shown(found)}. Write in it "
            "trained = yield Train(), or `yield from ()` if it asks for nothing"
        )


def check_request(label: str, request: Any, seen: Visit) -> None:
    """What a generator yields."""
    parameters, buffers = len(seen.received), len(seen.buffers)
    if isinstance(request, Train):
        for name in ("start", "anchor", "shift", "mask", "momenta"):
            _check_vector(label, f"Train({name}=...)", getattr(request, name), parameters)
        _check_bases(label, request.bases, seen.layout)
        _check_vector(label, "Train(buffers=...)", request.buffers, buffers, of="buffers")
        if request.spec is not None and not isinstance(request.spec, LocalSGD | LocalTraining):
            raise ConfigurationError(
                f"the method {label}: Train(spec=...) is a way to train, e.g. local_sgd(lr=0.1); not "
                f"{_shown(request.spec)}"
            )
    elif isinstance(request, Measure):
        if request.vector is None:
            raise ConfigurationError(f"the method {label}: Measure(vector) needs weights, e.g. Measure(visit.received)")
        _check_vector(label, "Measure(vector)", request.vector, parameters)
        _check_vector(label, "Measure(buffers=...)", request.buffers, buffers, of="buffers")
    elif isinstance(request, Consult):
        if not callable(request.function):
            raise ConfigurationError(
                f"the method {label}: Consult(function) takes a function of examples; not {_shown(request.function)}"
            )
    else:
        raise ConfigurationError(
            f"the method {label}: its generator yields Train(...), Measure(...) or Consult(...), and yielded "
            f"{_shown(request)}"
        )


def _check_bases(label: str, bases: Any, layout: Layout) -> None:
    """``Train(bases=...)``: matrices by the names of parameters, with as many rows."""
    if bases is None:
        return
    _check_mapping(label, "Train(bases=...)", bases)
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    for name, basis in bases.items():
        rows = shapes.get(name, ())[:1]
        fits = isinstance(basis, np.ndarray) and basis.dtype.kind == "f" and basis.ndim == 2
        if not fits or len(shapes.get(name, ())) < 2 or basis.shape[:1] != rows:
            there = f"a parameter of shape {shapes[name]}" if name in shapes else "no parameter of the model"
            raise ConfigurationError(
                f"the method {label}: Train(bases={{{name!r}: ...}}) is an array [rows, rank] for a parameter "
                f"[rows, ...] of two axes or more; it is {_shown(basis)}, and {name!r} is {there}"
            )


def check_contribution(label: str, brought: Any, seen: Visit) -> None:
    """What ``local`` returns."""
    if not isinstance(brought, Contribution):
        raise ConfigurationError(
            f"the method {label}: its generator must return a Contribution, e.g. Contribution.of(trained, visit); not "
            f"{_shown(brought)}"
        )
    _check_vector(label, "Contribution(update)", brought.update, len(seen.received))
    _check_vector(label, "Contribution(buffers=...)", brought.buffers, len(seen.buffers), of="buffers")
    _check_mapping(label, "Contribution(sides=...)", brought.sides)
    for name, vector in brought.sides.items():
        if name in ("update", "buffers"):
            raise ConfigurationError(
                f"the method {label}: Contribution(sides=...) has a channel called {name!r}, which is the model's own. "
                f"Give it another name, or write Contribution({name}=...)"
            )
        _check_vector(label, f"Contribution(sides={{{name!r}: ...}})", vector, None)
        if vector is None:
            raise ConfigurationError(
                f"the method {label}: Contribution(sides={{{name!r}: None}}): leave a channel out to send nothing in it"
            )
    if brought.weight is not None:
        _check_real(label, "Contribution(weight=...)", brought.weight)
    _check_real(label, "Contribution(loss=...)", brought.loss)
    _check_real(label, "Contribution(steps=...)", brought.steps)
    _check_arrays(label, "Contribution(kept=...)", brought.kept)
    _check_mapping(label, "Contribution(report=...)", brought.report)
    for name, figure in brought.report.items():
        _check_real(label, f"Contribution(report={{{name!r}: ...}})", figure)


def check_lengths(label: str, brought: Contribution, told: Mapping[str, int]) -> None:
    """Vectors in a method's own channels are as long as the method says."""
    for name, length in told.items():
        vector = brought.sides.get(name)
        if vector is not None and len(vector) != length:
            raise ConfigurationError(
                f"the method {label}: Contribution(sides={{{name!r}: ...}}) has shape {vector.shape}, and its "
                f"lengths(layout) says {length}: correct the one or the other"
            )


def check_own(label: str, found: Any, seen: Visit) -> Weights:
    """What ``personal`` returns."""
    if not isinstance(found, tuple) or len(found) != 2 or any(v is None for v in found):
        raise ConfigurationError(
            f"the method {label}: personal(visit) must return weights and buffers, e.g. return trained.vector, "
            f"trained.buffers; not {_shown(found)}"
        )
    _check_vector(label, "the weights that personal(visit) returns", found[0], len(seen.received))
    _check_vector(label, "the buffers that personal(visit) returns", found[1], len(seen.buffers), of="buffers")
    return Weights(*found)


# --- the server's functions ---------------------------------------------------------------------------------


def first_state(method: Method, vector: Vector, population: int) -> State:
    """``method.init``, checked."""
    with _blamed(method.label, "init(vector, population)", 0):
        state = method.init(vector, population)
    _check_arrays(method.label, "the state that init(vector, population) gives", state)
    return state


def sent_down(method: Method, state: State, number: int) -> Vectors:
    """``method.down`` in a round, checked."""
    with _blamed(method.label, "down(state)", number):
        down = method.down(state)
    _check_arrays(method.label, "what down(state) gives", down)
    return down


def finished(method: Method, gathered: Gathered) -> tuple[Vector | None, State]:
    """``method.finish``, checked: the update for the server optimiser, and the new state."""
    label = method.label
    with _blamed(label, "finish(gathered)", gathered.round):
        found: Any = method.finish(gathered)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigurationError(
            f"the method {label}: finish(gathered) must return the update and the state, e.g. return gathered.update, "
            f"gathered.state; not {_shown(found)}"
        )
    _check_vector(label, "the update that finish(gathered) returns", found[0], len(gathered.vector))
    _check_arrays(label, "the state that finish(gathered) returns", found[1])
    return found


@contextmanager
def _blamed(label: str, what: str, number: int) -> Iterator[None]:
    try:
        yield
    except FoedusError:
        raise
    except Exception as error:
        when = f" in round {number}" if number else ""
        raise TrainingError(
            f"the method {label} failed in {what}{when}: {type(error).__name__}: {error}", round=number
        ) from error


# --- kinds of values ----------------------------------------------------------------------------------------


def _check_vector(label: str, what: str, value: Any, length: int | None, *, of: str = "parameters") -> None:
    """A flat array of floats (or of the numbers of a mask), of the model's length, or ``None``."""
    if value is None:
        return
    flat = isinstance(value, np.ndarray) and value.ndim == 1
    if not flat or value.dtype.kind not in ("fbiu" if "mask" in what else "f"):
        raise ConfigurationError(
            f"the method {label}: {what} must be a flat numpy array of floats, and is {_shown(value)}"
            + (". Write np.asarray(..., np.float32).reshape(-1)" if isinstance(value, list | np.ndarray) else "")
        )
    if length is not None and len(value) != length:
        raise ConfigurationError(
            f"the method {label}: {what} has shape {value.shape}; the model has {length} {of}, so it must be "
            f"({length},)"
        )


def _check_real(label: str, what: str, value: Any) -> None:
    number = np.asarray(value) if isinstance(value, Real | np.generic | np.ndarray) else None
    if number is None or number.ndim or number.dtype.kind not in "fiub":
        raise ConfigurationError(f"the method {label}: {what} must be a number, and is {_shown(value)}")


def _check_mapping(label: str, what: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigurationError(f"the method {label}: {what} must be a dict by name, and is {_shown(value)}")


def _check_arrays(label: str, what: str, value: Any) -> None:
    _check_mapping(label, what, value)
    for name, array in value.items():
        numbers = isinstance(array, np.ndarray | np.generic | Real) and np.asarray(array).dtype.kind in "fiub"
        if not numbers:
            raise ConfigurationError(
                f"the method {label}: {what} must hold arrays of numbers by name, and has {_shown(array)} as {name!r}. "
                "Write np.array(...) of numbers; None or text has to be a number, or left out"
            )


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    return f"{reprlib.repr(value)} (of type {type(value).__name__})"
