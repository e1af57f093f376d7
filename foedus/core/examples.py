"""Examples: the data that a model trains on, as arrays that share their first axis.

`Examples` is the one currency for data between loaders, preprocessing, clients and backends. It holds
numpy arrays of numbers and nothing else; what cannot be turned into such arrays is refused here, with
the reason, rather than deep in a training step.

Not here: which client has which examples (`core/population.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from foedus.errors import DataError

__all__ = ["Array", "Examples", "check_targets"]

Array: TypeAlias = NDArray[Any]

_NUMBERS: Final = "fiub"  # numpy's kinds of dtype that a model can be fed: float, int, unsigned, bool
_PROBED: Final = 64  # examples whose bytes a digest reads


@final
@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one kind, as arrays that share their first axis.

    Attributes:
        inputs: what the model is called with, in this order; each [example, ...].
        targets: what its output is compared with, [example, ...].

    Raises:
        DataError: the lengths differ, or an array holds something other than numbers.

    Example:
        >>> Examples((np.zeros((2, 3)),), np.array([0, 1])).take(np.array([1])).targets
        array([1])
    """

    inputs: tuple[Array, ...]
    targets: Array

    def __post_init__(self) -> None:
        if not self.inputs:
            raise DataError("Examples without any input array. Write Examples.of(x, y).")
        for name, array in self._named():
            _check_numbers(name, array)
            if len(array) != len(self.targets):
                raise DataError(self._lengths_differ())

    @classmethod
    def of(cls, x: Any, y: Any, *, keep_dtype: bool = False) -> Examples:
        """Examples of whatever numpy can read: arrays, lists, torch tensors on the CPU, frames' columns.

        Floating-point data becomes float32 and whole-numbered (or true/false) *targets* become int64,
        which is what losses expect; whole-numbered inputs stay as they are. The arrays are contiguous
        and, where nothing had to be converted, the very ones given.

        Args:
            x: one array [example, ...]; or a tuple, list or dict of arrays, for a model of several
                inputs (called in this order). A list of numbers or of lists of numbers is one array.
            y: targets, [example, ...].
            keep_dtype: leave every dtype as it is, for training in float64.

        Example:
            >>> Examples.of([[0.5, 1.0], [0.0, 2.0]], [1, 0])
            Examples(2: float32[2] -> int64)
        """
        inputs = tuple(_array(name, a, keep_dtype) for name, a in _named_inputs(x))
        targets = _array("targets", y, keep_dtype)
        if targets.dtype.kind in "iub" and not keep_dtype:
            if targets.dtype == np.uint64 and targets.size and targets.max() >= 2**63:
                raise DataError(
                    f"There is a target of {targets.max()}, and whole numbers become int64, which ends at {2**63 - 1}. "
                    "Number the classes from 0; for hashes or ids write np.unique(y, return_inverse=True)[1]."
                )
            targets = targets.astype(np.int64, copy=False)
        return cls(inputs, targets)

    @classmethod
    def concat(cls, parts: Sequence[Examples]) -> Examples:
        """All examples of ``parts``, one after another.

        Raises:
            DataError: there are no parts, or their inputs or targets differ in shape.
        """
        if not parts:
            raise DataError("Nothing to put together: an empty list of Examples.")
        signatures = [part.shapes for part in parts]
        for i, signature in enumerate(signatures):
            if signature != signatures[0]:
                raise DataError(
                    f"Examples of different shapes do not go together: part {i} is {parts[i]!r}, part 0 is "
                    f"{parts[0]!r}. Make them alike first (pad sequences, choose the same columns)."
                )
        inputs = tuple(_join(column) for column in zip(*(p.inputs for p in parts), strict=True))
        return cls(inputs, _join([p.targets for p in parts]))

    def take(self, rows: Array | slice) -> Examples:
        """The examples of these row numbers, in this order (a copy), or of a slice (a view)."""
        return Examples(tuple(a[rows] for a in self.inputs), self.targets[rows])

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of one example: of each input, then of the target."""
        return (*(a.shape[1:] for a in self.inputs), self.targets.shape[1:])

    @property
    def nbytes(self) -> int:
        """The memory that the arrays take, in bytes."""
        return sum(a.nbytes for _, a in self._named())

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        *inputs, target = (_kind(a) for _, a in self._named())
        return f"Examples({len(self)}: {', '.join(inputs)} -> {target})"

    def digest(self) -> bytes:
        """A hash of lengths, shapes, dtypes and the bytes of a few examples, evenly spread."""
        rows = np.unique(np.linspace(0, max(len(self) - 1, 0), _PROBED).astype(np.int64))[: len(self)]
        digest = hashlib.sha256(repr(self).encode())
        for _, array in self._named():
            digest.update(np.ascontiguousarray(array[rows]).tobytes())
        return digest.digest()

    def _lengths_differ(self) -> str:
        lengths = [f"{name}: {len(array)}" for name, array in self._named()]
        shown = ", ".join([*lengths[:4], "...", lengths[-1]] if len(lengths) > 6 else lengths)
        stacked = len(self.inputs) == len(self.targets) > 1
        hint = " Several arrays are several inputs; one array per example is np.stack(x)." if stacked else ""
        return f"Examples need as many inputs as targets, and the lengths are {shown}.{hint}"

    def _named(self) -> Iterator[tuple[str, Array]]:
        for i, array in enumerate(self.inputs):
            yield (f"input {i}" if len(self.inputs) > 1 else "input"), array
        yield "targets", self.targets


def check_targets(targets: Array, classes: int, *, ignore: int | None = None, where: str = "the targets") -> None:
    """Check that class labels are whole numbers from 0 to ``classes - 1``.

    Args:
        targets: labels, of any shape.
        classes: how many classes the model tells apart.
        ignore: a label that the loss leaves out (torch's ``ignore_index``), allowed too.
        where: whose they are, for the message.

    Raises:
        DataError: naming the first wrong label and its place.

    Example:
        >>> check_targets(np.array([0, 2, 1]), 3)
    """
    if targets.dtype.kind not in "iub":
        raise DataError(f"Class labels are whole numbers, and {where} are {targets.dtype}. Write y.astype(int).")
    wrong = (targets < 0) | (targets >= classes)
    if ignore is not None:
        wrong &= targets != ignore
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DataError(
            f"{int(wrong.sum())} of the {targets.size} labels of {where} lie outside 0 to {classes - 1} "
            f"({classes} classes); the first is {targets[place]} at row {place[0]}. Number the classes from "
            "0, or give the model as many outputs as there are classes."
        )


def _named_inputs(x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, Mapping):
        yield from ((f"input {name!r}", a) for name, a in x.items())
    elif isinstance(x, tuple) or (isinstance(x, list) and any(hasattr(a, "shape") and a.shape for a in x)):
        yield from ((f"input {i}", a) for i, a in enumerate(x))
    else:
        yield "input", x


def _array(name: str, values: Any, keep_dtype: bool) -> Array:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(f"The {name} cannot be read as one array ({error}). Are all examples of one shape?") from None
    _check_numbers(name, array)
    if array.dtype.kind == "f" and not keep_dtype:
        try:
            with np.errstate(over="raise"):
                array = array.astype(np.float32, copy=False)
        except FloatingPointError:
            raise DataError(
                f"There are numbers in the {name} beyond 3.4e38, which float32 cannot hold. Scale them, or write "
                "Examples.of(x, y, keep_dtype=True) and train in float64."
            ) from None
    return np.ascontiguousarray(array)


def _check_numbers(name: str, array: Array) -> None:
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise DataError(
            f"The {name} must be an array with one row per example, not {_short(array)}. "
            "Examples.of(x, y) converts lists, tensors and columns."
        )
    if array.dtype.kind not in _NUMBERS:
        raise DataError(
            f"The {name} must hold numbers, and the dtype is {array.dtype} (first value: "
            f"{array.ravel()[:1].tolist()}). Number categories (foedus.data.vocabulary), mark what is "
            "missing as NaN, and convert the rest, for example x.astype('float32')."
        )


def _short(value: Any) -> str:
    return f"the single value {value.item()!r}" if isinstance(value, np.ndarray) else type(value).__name__


def _join(arrays: Sequence[Array]) -> Array:
    """One array of many; whole numbers beside float32 stay float32 instead of growing to float64."""
    dtype = np.result_type(*arrays)
    if dtype == np.float64 and not any(a.dtype == np.float64 for a in arrays):
        dtype = np.dtype(np.float32)
    return np.concatenate(arrays, dtype=dtype, casting="unsafe")


def _kind(array: Array) -> str:
    shape = str(list(array.shape[1:])) if array.ndim > 1 else ""
    return f"{array.dtype}{shape}"
