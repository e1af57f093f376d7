"""Stages that see a model's layers: matrices of low rank, and a choice of which layers a stage is for.

These know from the ``Layout`` where each array lies, so they come first in a chain, before anything that moves
entries (rotations, masks). A matrix is an array of two axes or more, its first against all the others: a torch
convolution [out, in, height, width] is a matrix [out, in·height·width].

Not here: the stages that are chosen from (``core/sparse.py``, ``core/quantise.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.core.coding import draws, peak, reals
from foedus.core.stage import Kind, Stage, Subspace, check_order, lengths, received, sent
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, IncompatibleStages
from foedus.tree import Layout

Choose = Callable[[str, tuple[int, ...]], bool]


def low_rank(rank: int, *, unbiased: bool = True) -> Stage:
    """Send, of every matrix H [rows, columns], only Aᵀ·H [rank, columns], A [rows, rank] random and common to all.

    A's columns are orthonormal and drawn from the seed; the server puts A·(Aᵀ·H) in the matrix's place. Linear: works
    under secure aggregation. Matrices of at most ``rank`` rows, and all that is no matrix, are sent whole.
    Source: Konečný et al. 2016 (arXiv 1610.05492), section 2, "low rank". There clients train the second factor
    itself, which is ``structured(client, low_rank(rank, unbiased=False))``; in a chain the update is projected after
    training.

    Args:
        rank: at least 1.
        unbiased: multiply by rows / rank, so that the expectation over rounds is the update, with error ‖x‖²·(rows
            / rank − 1);
            otherwise the nearest matrix of that form, with error ‖x‖²·(1 − rank / rows), as ``error_feedback``
            needs it.

    Example:
        >>> layout = Layout(("w", "b"), ((4, 3), (4,)), ("float32", "float32"))
        >>> stage, context = low_rank(2), Context(0, 1, 0, layout, size=16)
        >>> sent = stage.encode(Update(np.ones(16, "f4"), 1.0), context)
        >>> len(sent.vector), stage.decode(sent, context).vector.shape  # 2 x 3 in place of 4 x 3
        (10, (16,))
    """
    check_whole("rank", rank, least=1)

    def bases(context: Context, pieces: Sequence[_Piece]) -> list[NDArray[np.float64] | None]:
        draw = draws(context, "low_rank", own=False)
        return [_orthonormal(draw.standard_normal((p.rows, rank))) if _projected(p, rank) else None for p in pieces]

    def encode(update: Update, context: Context) -> Update:
        peak(update)
        pieces = _pieces(_layout(context, "low_rank()"))
        parts = [
            update.vector[p.place]
            if a is None
            else (a.T.astype(update.vector.dtype) @ p.matrix(update.vector)).reshape(-1)
            for p, a in zip(pieces, bases(context, pieces), strict=True)
        ]
        return update._replace(vector=_joined(parts, update.vector))

    def decode(update: Update, context: Context) -> Update:
        layout = _layout(context, "low_rank()")
        pieces, vector, at = _pieces(layout), reals(update, context, size(context.size, layout)), 0
        whole = np.empty(context.size, vector.dtype)
        for p, a in zip(pieces, bases(context, pieces), strict=True):
            count = p.size if a is None else rank * p.columns
            part = vector[at : at + count]
            if a is not None:
                factor = p.rows / rank if unbiased else 1.0
                part = ((factor * a).astype(vector.dtype) @ part.reshape(rank, -1)).reshape(-1)
            whole[p.place], at = part, at + count
        return update._replace(vector=whole)

    def size(n: int, layout: Layout | None) -> int:
        return sum(rank * p.columns if _projected(p, rank) else p.size for p in _pieces(layout)) if layout else n

    def inside(context: Context) -> Subspace:
        layout = _layout(context, "low_rank()")
        found = zip(layout.names, bases(context, _pieces(layout)), strict=True)
        return Subspace(bases={name: a for name, a in found if a is not None})

    label = f"low_rank({rank})" if unbiased else f"low_rank({rank}, unbiased=False)"
    return Stage(
        encode, decode, label, size=size, layers=True, scatters=True, inside=None if unbiased else inside
    )  # fmt: skip


def power_sgd(rank: int, *, steps: int = 1) -> Stage:
    """Send every matrix H [rows, columns] as two factors of its own, P [rows, rank] and Q [columns, rank]: H ≈ P·Qᵀ.

    P is an orthonormal basis of (H·Hᵀ)^(steps−1)·H·S, S random; Q = Hᵀ·P. Biased: use it inside ``error_feedback``,
    as the paper does. Matrices that two factors would not make smaller, and all that is no matrix, are sent whole.
    Source: Vogels, Karimireddy & Jaggi 2019 (arXiv 1905.13727), algorithm 1.

    Two things differ from the paper's form for data centres. There P is averaged over the workers, made
    orthonormal, and only then is Q computed and averaged, which takes two rounds of messages but adds up under
    masks; here every client factorises its own update, both factors are sent at once, and the server multiplies
    them out before merging. And S is drawn anew from the seed, where the paper starts from the last Q: clients of a
    federation come back too rarely for an old Q to help. ``steps=2`` makes up for it at twice the work.

    Args:
        rank: at least 1.
        steps: of subspace iteration, at least 1.

    Example:
        >>> layout = Layout(("w",), ((6, 5),), ("float32",))
        >>> stage, context = power_sgd(1), Context(0, 1, 0, layout, size=30)
        >>> outer = np.outer([1, 2, 3, 4, 5, 6], [1, 0, 2, 0, 1]).astype("f4").reshape(-1)  # of rank 1
        >>> sent = stage.encode(Update(outer, 1.0), context)
        >>> len(sent.vector), bool(np.abs(stage.decode(sent, context).vector - outer).max() < 1e-5)
        (11, True)
    """
    check_whole("rank", rank, least=1)
    check_whole("steps", steps, least=1)

    def encode(update: Update, context: Context) -> Update:
        largest, parts = peak(update), []
        draw = draws(context, "power_sgd", own=True)
        for p in _pieces(_layout(context, "power_sgd()")):
            if _factored(p, rank):
                left, right = _factors(p.matrix(update.vector), draw.standard_normal((p.columns, rank)), steps, largest)
                parts += [left.reshape(-1), right.reshape(-1)]
            else:
                parts.append(update.vector[p.place])
        return update._replace(vector=_joined(parts, update.vector))

    def decode(update: Update, context: Context) -> Update:
        layout = _layout(context, "power_sgd()")
        vector, at = reals(update, context, size(context.size, layout)), 0
        whole = np.empty(context.size, vector.dtype)
        for p in _pieces(layout):
            split, end = at + p.rows * rank, at + (p.rows + p.columns) * rank
            if _factored(p, rank):
                left, right = (
                    vector[at:split].reshape(p.rows, rank),
                    vector[split:end].reshape(p.columns, rank),
                )
                with np.errstate(over="ignore", invalid="ignore"):  # a hostile client's; looked at below
                    whole[p.place], at = (left @ right.T).reshape(-1), end
            else:
                whole[p.place], at = vector[at : at + p.size], at + p.size
        return update._replace(vector=reals(Update(whole, 1.0), context, context.size))

    def size(n: int, layout: Layout | None) -> int:
        each = (
            [(p.rows + p.columns) * rank if _factored(p, rank) else p.size for p in _pieces(layout)] if layout else [n]
        )
        return sum(each)

    label = f"power_sgd({rank})" if steps == 1 else f"power_sgd({rank}, steps={steps})"
    return Stage(encode, decode, label, linear=False, size=size, layers=True, scatters=True)


def _factors(
    matrix: NDArray[Any], start: NDArray[np.float64], steps: int, largest: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """P [rows, rank], orthonormal, and Q = HᵀP [columns, rank] of a matrix H [rows, columns]."""
    unit = matrix.astype(np.float64) / (largest or 1.0)
    left = _orthonormal(unit @ start)
    for _ in range(steps - 1):
        left = _orthonormal(unit @ (unit.T @ left))
    return left.astype(matrix.dtype), (unit.T @ left * largest).astype(matrix.dtype)


def _orthonormal(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """An orthonormal basis [rows, rank] whose span holds that of the columns."""
    return np.asarray(np.linalg.qr(columns)[0])


# --- choosing layers ----------------------------------------------------------------------------------------


def on_layers(choose: Choose, *stages: Stage) -> Stage:
    """Apply stages to some arrays of the model, all of them as one vector, and send the others as they are.

    Args:
        choose: name and shape of an array -> whether the stages are for it.
        stages: in the order of a chain; what they give may be codes or bytes.

    Raises:
        IncompatibleStages: the stages cannot follow each other.

    Example:
        >>> from foedus.core.quantise import quantise
        >>> layout = Layout(("w", "b"), ((4, 3), (4,)), ("float32", "float32"))
        >>> stage = on_layers(lambda name, shape: name == "w", quantise(1))
        >>> context = Context(0, 1, 0, layout, size=16)
        >>> sent = stage.encode(Update(np.arange(16.0, dtype="f4"), 1.0), context)
        >>> stage.decode(sent, context).vector[12:].tolist()
        [12.0, 13.0, 14.0, 15.0]
    """
    return _on_layers(choose, stages, f"on_layers({getattr(choose, '__name__', 'choose')}, ")


def matrices(*stages: Stage) -> Stage:
    """Apply stages to arrays of two axes or more; biases and the scales of norms are sent as they are.

    They are few, and matter more than their number: the papers leave them alone.

    Args:
        stages: in the order of a chain.

    Example:
        >>> from foedus.core.rotation import rotate
        >>> matrices(rotate()).label
        'matrices(rotate())'
    """
    return _on_layers(lambda name, shape: len(shape) > 1, stages, "matrices(")


def _on_layers(choose: Choose, stages: Sequence[Stage], name: str) -> Stage:
    """One stage of a row of stages for some of the arrays.

    Linear stages that give numbers leave the vector [chosen and encoded, then the others]. What any other gives
    travels beside the vector, which is then [the others].
    """
    if not stages:
        raise IncompatibleStages(f"{name.partition('(')[0]}() takes the stages that are for these layers")
    check_order(stages)
    together = all(s.linear for s in stages) and stages[-1].gives is Kind.REALS

    def split(context: Context) -> _Split:
        return _split(_layout(context, f"{name}...)"), choose)

    def encode(update: Update, context: Context) -> Update:
        peak(update)
        parts = split(context)
        chosen, others = (_joined([update.vector[p] for p in places], update.vector) for places in parts[:2])
        inside = context._replace(layout=parts.layout, size=len(chosen))
        message = sent(stages, update._replace(vector=chosen), inside)
        if together:
            return update._replace(vector=np.concatenate([message["values"], others]))
        return update._replace(vector=others, beside=message)

    def decode(update: Update, context: Context) -> Update:
        parts, vector = split(context), reals(update, context, size(context.size, context.layout))
        inside = context._replace(layout=parts.layout, size=parts.layout.size)
        at = lengths(stages, inside)[-1] if together else 0
        message = {"values": vector[:at]} if together else dict(update.beside)
        whole = np.empty(context.size, vector.dtype)
        for places, values in (
            (parts.chosen, received(stages, message, inside).vector),
            (parts.others, vector[at:]),
        ):
            ends = np.cumsum([p.stop - p.start for p in places])
            for p, end in zip(places, ends, strict=True):
                whole[p] = values[end - (p.stop - p.start) : end]
        return update._replace(vector=whole)

    def size(n: int, layout: Layout | None) -> int:
        if layout is None or layout.size != n:
            return n
        parts = _split(layout, choose)
        others = n - parts.layout.size
        return others + (lengths(stages, _bare(parts.layout))[-1] if together else 0)

    def inside(context: Context) -> Subspace:
        assert confined is not None
        parts = split(context)
        own = confined(context._replace(layout=parts.layout, size=parts.layout.size))
        if own.mask is None:
            return own
        mask, ends = np.ones(context.size, own.mask.dtype), np.cumsum([p.stop - p.start for p in parts.chosen])
        for p, end in zip(parts.chosen, ends, strict=True):
            mask[p] = own.mask[end - (p.stop - p.start) : end]
        return own._replace(mask=mask)

    label, confined = f"{name}{', '.join(s.label for s in stages)})", stages[0].inside
    return Stage(
        encode, decode, label, linear=together, size=size, layers=True, scatters=True,
        inside=None if confined is None else inside,
    )  # fmt: skip


class _Split(NamedTuple):
    """A model's arrays in two parts: where they lie, and the layout of the chosen ones by themselves."""

    chosen: tuple[slice, ...]
    others: tuple[slice, ...]
    layout: Layout


@lru_cache(maxsize=64)
def _split(layout: Layout, choose: Choose) -> _Split:
    picked = [bool(choose(name, shape)) for name, shape in zip(layout.names, layout.shapes, strict=True)]
    places = [layout.slice(name) for name in layout.names]
    rows = [
        row
        for row, yes in zip(zip(layout.names, layout.shapes, layout.dtypes, strict=True), picked, strict=True)
        if yes
    ]
    names, shapes, dtypes = zip(*rows, strict=True) if rows else ((), (), ())
    chosen = tuple(p for p, yes in zip(places, picked, strict=True) if yes)
    return _Split(
        chosen,
        tuple(p for p, yes in zip(places, picked, strict=True) if not yes),
        Layout(names, shapes, dtypes),
    )


def _bare(layout: Layout) -> Context:
    """A context for counting lengths."""
    return Context(0, 0, 0, layout, size=layout.size)


# --- the layout ---------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """One array of the model, as a matrix."""

    place: slice
    rows: int
    columns: int
    flat: bool  # whether it has fewer than two axes

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def matrix(self, vector: NDArray[Any]) -> NDArray[Any]:
        return vector[self.place].reshape(self.rows, self.columns)


@lru_cache(maxsize=64)
def _pieces(layout: Layout) -> tuple[_Piece, ...]:
    return tuple(
        _Piece(layout.slice(name), shape[0] if shape else 1, math.prod(shape[1:]), len(shape) < 2)
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    )


def _projected(piece: _Piece, rank: int) -> bool:
    return not piece.flat and piece.rows > rank


def _factored(piece: _Piece, rank: int) -> bool:
    return not piece.flat and rank * (piece.rows + piece.columns) < piece.size


def _layout(context: Context, what: str) -> Layout:
    """The model's layout.

    Raises:
        ConfigurationError: there is none, or the vector is no model's.
    """
    if context.layout is None or context.layout.size != context.size:
        there = "none" if context.layout is None else f"one of {context.layout.size} entries"
        raise ConfigurationError(
            f"{what} needs the layout of the vector of {context.size} entries, and there is {there}. "
            "Give it as Context(layout=...)"
        )
    return context.layout


def _joined(parts: Sequence[NDArray[Any]], like: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else like[:0].copy()
