"""The owner's data, where it comes from: an object in a file or module of theirs, or arrays that are at hand.

What is written as ``module:object`` is imported where training happens, which has no network. What is given as a
value, or as a function that gives one, is read by the agent itself, and goes to the training process as arrays.

Not here: checks (``owner/checks.py``).
"""

from __future__ import annotations

import importlib
import importlib.util
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from foedus.core.examples import Array, Examples
from foedus.core.population import ClientId, Clients, Pair
from foedus.errors import ConfigurationError, DataError
from foedus.net.owner.examples import ExampleStore
from foedus.protocol.blob import pack, unpack

__all__ = ["imported", "of_bytes", "own", "placed", "to_bytes"]

PARTS = ("train", "validation", "test")


def own(value: Any, part: str = "") -> Clients:
    """What an owner gave, as a population of one.

    Args:
        value: Examples, a pair (x, y), an ExampleStore, Clients, or a function without arguments that gives one of
        these. part: of Clients of several, whose; an id.

    Raises:
        DataError: it is none of these.
        ConfigurationError: there is nobody of that name, or several and no name.

    Example:
        >>> own(([[0.5], [1.0]], [0, 1])).train(0)
        Examples(2: float32[1] -> int64)
    """
    if callable(value) and not isinstance(value, Clients | type):
        value = value()
    if isinstance(value, ExampleStore):
        value = value.examples()
    if isinstance(value, Clients):
        return value if len(value) == 1 and not part else _one(value, part)
    if isinstance(value, Examples) or (isinstance(value, tuple) and len(value) == 2):
        return Clients.of({part or "mine": value})
    raise DataError(
        f"data is Examples, a pair (x, y), Clients, an ExampleStore, or a function that gives one of these; not "
        f"{reprlib.repr(value)} (of type {type(value).__name__})"
    )


def placed(mine: Clients, position: int) -> Clients:
    """A population of one, at the position that the server knows it by; before it there is nobody who is ever read."""

    def at(whole: Clients) -> Clients:
        validation = None if whole.validating is None else lambda _: _there(whole.validation(0))
        test = None if whole.testing is None else lambda _: _there(whole.test(0))
        return Clients.generated(lambda _: whole.train(0), range(position + 1), validation=validation, test=test)

    return at(mine) if mine.later is None else Clients.streamed(lambda round: at(mine.at(round)))


def to_bytes(mine: Clients) -> bytes:
    """A population of one as tensors; of one whose data arrives over rounds, what is there now."""
    arrays: dict[str, Array] = {}
    for name in PARTS:
        examples = {"train": mine.train, "validation": mine.validation, "test": mine.test}[name](0)
        if examples is not None:
            arrays |= {f"{name}/x{i:03}": array for i, array in enumerate(examples.inputs)}
            arrays[f"{name}/y"] = examples.targets
    return pack(arrays)


def of_bytes(data: bytes) -> Clients:
    """The inverse of :func:`to_bytes`.

    Example:
        >>> of_bytes(to_bytes(own(([[0.5]], [1])))).train(0).targets
        array([1])
    """
    arrays = unpack(data).arrays
    parts: dict[str, dict[ClientId, Pair]] = {}
    for name in PARTS:
        if f"{name}/y" in arrays:
            inputs = tuple(np.array(arrays[n]) for n in sorted(arrays) if n.startswith(f"{name}/x"))
            parts[name] = {"mine": Examples(inputs, np.array(arrays[f"{name}/y"]))}
    return Clients.of(parts["train"], validation=parts.get("validation"), test=parts.get("test"))


def imported(target: str, folder: Path) -> Any:
    """The object that ``module:object`` or ``path/file.py:object`` names.

    Args:
        target: where it is.
        folder: where paths and modules are looked for.
    """
    place, _, name = target.rpartition(":")
    if not place or not name or place.endswith((":", "/")):
        raise ConfigurationError(f"data is named module:object or path/file.py:object; not {target!r}")
    module = _module_of_file(folder / place) if place.endswith(".py") else _module(place, folder)
    if not hasattr(module, name):
        there = ", ".join(n for n in vars(module) if not n.startswith("_"))
        raise ConfigurationError(f"{place} has no {name!r}; it has: {reprlib.repr(there)}")
    return getattr(module, name)


def _module_of_file(path: Path) -> ModuleType:
    """A file under a name that no module of the task's can have, so that neither hides the other."""
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"_own_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str, folder: Path) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(name)


def _one(clients: Clients, part: str) -> Clients:
    """One of a population, by its id."""
    names = [str(i) for i in clients.ids]
    if part not in names:
        there = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        told = f"there is no {part!r} among them" if part else "say which is yours: --part NAME, or Joining(part=...)"
        raise ConfigurationError(f"the data is of {len(names)} clients ({there}); {told}")
    at = names.index(part)

    def only(whole: Clients) -> Clients:
        ask: dict[str, Callable[[Any], Any] | None] = {
            "validation": None if whole.validating is None else lambda _: _there(whole.validation(at)),
            "test": None if whole.testing is None else lambda _: _there(whole.test(at)),
        }
        return Clients.generated(lambda _: whole.train(at), [part], **ask)  # type: ignore[arg-type]

    return only(clients) if clients.later is None else Clients.streamed(lambda round: only(clients.at(round)))


def _there(examples: Examples | None) -> Examples:
    assert examples is not None
    return examples
