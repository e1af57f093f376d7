"""Digests of what a user wrote: functions, classes and values, so that a resumed run can tell if they have changed.

A function is known by what it does: its compiled code, its constants and defaults, the values that it closes over, and
the functions, classes and constants of the user's own that it names. Its own name does not count, nor where it lies:
the digest is the same in every process of one version of Python, and after a file has been moved. What libraries wrote
is known by its name, so that a library's next patch does not stop a run.

Seen by kind only, since it may change while a run goes on: lists and dictionaries that a function writes to, names
that it rebinds, and objects that can neither be called nor are dataclasses or tuples.

Not here: arrays and modules of frameworks (``rounds/identity.py``).
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

__all__ = ["Known", "digest"]

Known = Callable[[Any], object]  # what else stands for a value, or None if it is nothing that it knows

LIBRARIES = sys.stdlib_module_names | {
    "foedus",
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "flax",
    "scipy",
    "torch",
    "torchvision",
}
SAMPLE = 1 << 16  # elements of a large array that are looked at
_WRITING = {"append", "extend", "insert", "add", "update", "pop", "popitem", "remove", "clear", "setdefault", "discard"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), np.generic)


def digest(value: Any, known: Known = lambda value: None) -> str:
    """16 hexadecimal digits that change when a function, class or value does.

    Args:
        value: anything: functions, partials, classes, dataclasses, tuples, arrays, numbers.
        known: value → what else stands for it, e.g. a framework's array as one of numpy's; ``None`` for all else.

    Example:
        >>> digest(lambda x: 2 * x) == digest(lambda x: 2 * x), digest(lambda x: 2 * x) == digest(lambda x: 3 * x)
        (True, False)
    """
    return _Description(known).of(value)


class _Description:
    """One description: what it has met already, so that what names itself has an end."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._met: dict[int, tuple[Any, str]] = {}  # holds the values, so that no two have one id

    def of(self, value: Any) -> str:
        if isinstance(value, np.number | np.bool_):
            value = value.item()  # numpy's numbers are what Python's are
        if isinstance(value, _PLAIN):
            return _hashed("plain", type(value).__name__, repr(value))
        if id(value) not in self._met:
            self._met[id(value)] = value, f"met {len(self._met)}"  # in the order of the walk, which is always the same
            self._met[id(value)] = value, self._walk(value)
        return self._met[id(value)][1]

    def _walk(self, value: Any) -> str:
        if (stands := self._known(value)) is not None:
            return _hashed("known", self.of(stands))
        if isinstance(value, np.ndarray):
            return _array(value)
        if isinstance(value, Mapping):
            return _hashed("mapping", *sorted(self.of(k) + self.of(v) for k, v in value.items()))
        if isinstance(value, set | frozenset):
            return _hashed("set", *sorted(map(self.of, value)))
        if isinstance(value, tuple | list):
            return _hashed(type(value).__name__, *map(self.of, value))
        return self._callable(value)

    def _callable(self, value: Any) -> str:
        match value:
            case functools.partial():
                return _hashed("partial", *map(self.of, (value.func, value.args, value.keywords)))
            case MethodType():
                return _hashed("method", self.of(value.__func__), self.of(value.__self__))
            case FunctionType():
                return self._function(value)
            case CodeType():
                return self._code(value)
            case staticmethod() | classmethod():
                return _hashed(type(value).__name__, self.of(value.__func__))
            case property():
                return _hashed("property", *map(self.of, (value.fget, value.fset)))
            case type():
                return self._class(value)
            case BuiltinFunctionType() | ModuleType():
                return _hashed("name", _name(value))
            case _:
                return self._instance(value)

    def _function(self, function: FunctionType) -> str:
        kept = [function.__defaults__, function.__kwdefaults__]
        typed = function.__code__.co_filename.startswith("<")  # at a prompt, whatever module that claims to be
        if _foreign(function) and not typed:
            return _hashed("function", _name(function), self.of(kept), *map(self.of, _cells(function).values()))
        named = self._values(function.__code__, _cells(function) | _globals(function))
        return _hashed("function", self.of(function.__code__), self.of(kept), named)

    def _values(self, code: CodeType, values: Mapping[str, Any]) -> str:
        """The values that code names, by name; of what it writes to, the kind."""
        rebound, writes = _writes(code)
        told = []
        for name, value in sorted(values.items()):
            changing = name in rebound or (writes and isinstance(value, list | dict | set | np.ndarray))
            told += [name, _hashed("kind", type(value).__name__) if changing else self.of(value)]
        return _hashed("values", *told)

    def _code(self, code: CodeType) -> str:
        constants = map(self.of, code.co_consts)
        return _hashed(
            "code", code.co_code.hex(), repr((code.co_names, code.co_varnames, code.co_argcount)), *constants
        )

    def _class(self, kind: type) -> str:
        if _foreign(kind):
            return _hashed("name", _name(kind))
        functions = (FunctionType, staticmethod, classmethod, property)
        told = []
        for name, value in sorted(vars(kind).items()):
            if isinstance(value, functions) or (isinstance(value, (*_PLAIN, tuple)) and not name.startswith("__")):
                told += [name, self.of(value)]
        return _hashed("class", *told, *map(self.of, kind.__bases__))

    def _instance(self, value: Any) -> str:
        wrapped = getattr(value, "__wrapped__", None)  # of caches and compiled functions
        if wrapped is not None:
            return _hashed("wrapped", self.of(wrapped))
        kind = type(value)
        if dataclasses.is_dataclass(kind):
            fields = [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(kind)]
            return _hashed("fields", self.of(kind), *(name + self.of(field) for name, field in fields))
        if not callable(value):
            return _hashed("kind", _name(kind))
        written = _written(kind)
        told = [name + self.of(v) for name, v in sorted(_attributes(value).items()) if name not in written]
        return _hashed("callable", self.of(kind), *told)


def _attributes(value: Any) -> dict[str, Any]:
    return dict(getattr(value, "__dict__", {}))


def _written(kind: type) -> set[str]:
    """Attributes that a class's methods, apart from its constructor, write."""
    found: set[str] = set()
    for each in kind.__mro__:
        for name, method in vars(each).items():
            if isinstance(method, FunctionType) and name != "__init__" and not _foreign(each):
                found |= {i.argval for i in dis.get_instructions(method) if i.opname == "STORE_ATTR"}
    return found


def _writes(code: CodeType) -> tuple[set[str], bool]:
    """Names that code rebinds outside itself, and whether it writes into something."""
    rebound = {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "STORE_DEREF")}
    writes = bool(_WRITING & set(code.co_names)) or any(
        i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") for i in dis.get_instructions(code)
    )
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more, also = _writes(inner)
            rebound, writes = rebound | more, writes or also
    return rebound, writes


def _cells(function: FunctionType) -> dict[str, Any]:
    """What a function closes over, by name."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return found


def _globals(function: FunctionType) -> dict[str, Any]:
    """What a function names of its module, and of modules of the user's own."""
    names = set(_names(function.__code__))
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for module in [value for value in found.values() if isinstance(value, ModuleType) and not _library(value.__name__)]:
        found |= {f"{module.__name__}.{name}": vars(module)[name] for name in names if name in vars(module)}
    return found


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _foreign(value: Any) -> bool:
    """Whether a library wrote it."""
    return _library(getattr(value, "__module__", None) or "builtins")


def _library(module: str) -> bool:
    return module != "__main__" and module.partition(".")[0] in LIBRARIES


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def _array(array: np.ndarray[Any, Any]) -> str:
    """Shape, dtype and values; of a large array, a sample of them."""
    if array.dtype.hasobject:
        return _hashed("array", str(array.dtype), str(array.shape))
    flat = array.reshape(-1)
    values = np.ascontiguousarray(flat[:: max(1, flat.size // SAMPLE)])
    return _hashed("array", str(array.dtype), str(array.shape), hashlib.sha256(values.tobytes()).hexdigest())


def _hashed(*parts: str) -> str:
    return hashlib.sha256(
        "\0".join(f"{len(part)}:{part}" for part in parts).encode("utf-8", "surrogatepass")
    ).hexdigest()[:16]
