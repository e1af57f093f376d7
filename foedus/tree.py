"""Nested arrays ↔ one flat vector.

A model's trainable parameters travel as *one* float vector; a :class:`Layout` knows where in it each named
array lies. Everything between a client's encode and the server's decode works on flat vectors, so that
neither needs the framework the model is written in; layers stay visible through the Layout.

Not here: anything that knows torch or jax. Arrays are whatever ``numpy.asarray`` takes.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foedus.errors import ConfigurationError

if TYPE_CHECKING:
    from jaxtyping import Float

Vector = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Layout:
    """Where each named array lies in a flat vector.

    Attributes:
        names: one name per array, in the order of the vector, e.g. ``"body.0.weight"``.
        shapes: one shape per array.
        dtypes: the arrays' own dtypes as strings, to which :meth:`unflatten` casts back.
        dtype: the vector's dtype: ``"float64"`` if all floating-point arrays are, else ``"float32"``. Whole
            numbers (BatchNorm's counter) follow the others; dtypes that numpy lacks (bfloat16) become float32.

    Raises:
        ConfigurationError: two arrays share a name, or one is complex, which a real vector cannot hold.

    Example:
        >>> layout = Layout.of({"w": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)})
        >>> layout.size, layout.slice("b")
        (8, slice(6, 8, None))
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    def __post_init__(self) -> None:
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ConfigurationError(f"two arrays have the same name: {', '.join(repeated)}")
        if complex_ := [name for name, dtype in zip(self.names, self.dtypes, strict=True) if "complex" in dtype]:
            raise ConfigurationError(
                f"complex numbers do not fit into a vector of real ones: {', '.join(complex_)}. Keep real and "
                "imaginary parts as two parameters (torch.view_as_real)"
            )

    @staticmethod
    def of(tree: Any) -> Layout:
        """The layout of a nested mapping or sequence of arrays; nested names are joined by dots."""
        items = list(leaves(tree))
        arrays = [np.asarray(value) for _, value in items]
        return Layout(
            tuple(name for name, _ in items),
            tuple(tuple(int(n) for n in a.shape) for a in arrays),
            tuple(str(a.dtype) for a in arrays),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each array."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each array begins."""
        return tuple(np.concatenate([[0], np.cumsum(self.sizes)]).astype(int).tolist()[: len(self.sizes)])

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    @property
    def dtype(self) -> str:
        floating = {d for d in self.dtypes if "float" in d}
        return "float64" if floating == {"float64"} else "float32"

    def slice(self, name: str) -> slice:
        """The part of the vector that holds the array ``name``.

        Raises:
            ConfigurationError: there is no such array.
        """
        if name not in self.names:
            raise ConfigurationError(f"no array is named {name!r}; there are: {', '.join(self.names)}")
        i = self.names.index(name)
        return slice(self.offsets[i], self.offsets[i] + self.sizes[i])

    def name_at(self, position: int) -> str:
        """The name of the array that holds entry ``position`` of the vector."""
        return self.names[int(np.searchsorted(self.offsets, position, side="right")) - 1]

    def without(self, names: Collection[str]) -> Layout:
        """The layout of a vector that lacks some arrays.

        Example:
            >>> Layout(("w", "b"), ((2, 3), (2,)), ("float32", "float32")).without(["w"]).size
            2
        """
        rows = zip(self.names, self.shapes, self.dtypes, strict=True)
        kept = [row for row in rows if row[0] not in names]
        return Layout(tuple(r[0] for r in kept), tuple(r[1] for r in kept), tuple(r[2] for r in kept))

    def positions(self, names: Collection[str]) -> NDArray[np.int64]:
        """Where the entries of some arrays lie in the vector, int64 [entry], ascending.

        Example:
            >>> Layout(("w", "b"), ((2, 3), (2,)), ("float32", "float32")).positions(["b"]).tolist()
            [6, 7]
        """
        parts = zip(self.names, self.offsets, self.sizes, strict=True)
        found = [np.arange(at, at + size, dtype=np.int64) for name, at, size in parts if name in names]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def flatten(self, tree: Any) -> Float[Vector, " size"]:
        """One flat vector ``[size]`` of a tree that has this layout.

        Raises:
            ConfigurationError: a name or a shape differs.
        """
        found = dict(leaves(tree))
        if set(found) != set(self.names):
            missing, extra = sorted(set(self.names) - set(found)), sorted(set(found) - set(self.names))
            raise ConfigurationError(f"the arrays differ from the layout: missing {missing}, not expected {extra}")
        vector = np.empty(self.size, self.dtype)
        for name, shape, at, size in zip(self.names, self.shapes, self.offsets, self.sizes, strict=True):
            array = np.asarray(found[name])
            if array.shape != shape:
                raise ConfigurationError(f"{name!r} has shape {array.shape}, the layout says {shape}")
            vector[at : at + size] = array.reshape(-1)
        return vector

    def unflatten(self, vector: Any) -> dict[str, NDArray[Any]]:
        """The named arrays of a flat vector ``[size]``: views where the dtype is the vector's own."""
        flat = np.asarray(vector)
        if flat.shape != (self.size,):
            raise ConfigurationError(f"a vector of shape ({self.size},) is needed, not {flat.shape}")
        parts = zip(self.names, self.shapes, self.offsets, self.sizes, self.dtypes, strict=True)
        return {name: _cast(flat[at : at + size], dtype).reshape(shape) for name, shape, at, size, dtype in parts}

    def digest(self) -> str:
        """A short fingerprint of names, shapes and dtypes."""
        return hashlib.sha256(repr((self.names, self.shapes, self.dtypes)).encode()).hexdigest()[:16]


def _cast(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype.startswith(("bfloat", "float8")):
        return values  # numpy has no such dtype; float32 holds every value of it
    if dtype.startswith(("int", "uint", "bool")):
        values = np.rint(values)
    return values.astype(dtype, copy=False)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted name, array) pairs of a nested mapping or sequence, in order."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from leaves(value, f"{prefix}{name}.")
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{prefix}{i}.")
    elif tree is not None:
        yield prefix.removesuffix("."), tree
