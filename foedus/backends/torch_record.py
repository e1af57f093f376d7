"""Tensor programs recorded once and replayed: a cohort's step without the Python of its layers.

A batched step spends more time in Python (modules, vmap, modes, autograd's bookkeeping) than in small models'
arithmetic. ``make_fx`` writes down the tensor operations that one step carries out, forwards and backwards, as
straight-line code; replaying it takes a third to a half of the time, and gives the same bits, which is checked
before a recording is used. A program belongs to the shapes it was recorded with.

Not here: what a step computes (``torch_cohort.py``).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

Program = Callable[..., Sequence[Tensor]]

USES = 24  # a recording takes as long as about fifty steps, so that shapes that are rare are not recorded


class Recorder:
    """Programs by shape, shared by the threads that compute a cohort's blocks."""

    def __init__(self) -> None:
        self._uses: Counter[Any] = Counter()
        self._programs: dict[Any, Program | None] = {}
        self._recording = threading.Lock()

    def run(self, shape: Any, function: Program, arguments: Sequence[Tensor], changed: slice) -> Sequence[Tensor]:
        """``function(*arguments)``, replayed once it has been called often enough with this shape.

        Args:
            shape: whatever tells programs apart.
            function: tensors in, tensors out; it does the same operations whatever the tensors hold.
            arguments: its tensors.
            changed: which of them the function changes in place.
        """
        program = self._programs.get(shape)
        if program is not None:
            with torch.no_grad():
                return program(*arguments)
        self._uses[shape] += 1
        wanted = self._uses[shape] >= USES and shape not in self._programs
        if wanted and self._recording.acquire(blocking=False):  # one thread records; the others go on
            try:
                self._programs[shape] = recorded(function, arguments, changed)
            finally:
                self._recording.release()
        return function(*arguments)


@contextmanager
def restored(module: torch.nn.Module) -> Iterator[None]:
    """Put a module's own tensors back in their places at the end.

    ``functional_call`` does so itself, except where a module is registered under two names: there it swaps twice,
    and leaves the tensors it was given.
    """
    places = [(m, name, t) for m in module.modules() for own in (m._parameters, m._buffers) for name, t in own.items()]
    try:
        yield
    finally:
        for owner, name, tensor in places:
            if getattr(owner, name) is not tensor:
                setattr(owner, name, tensor)  # not past the module: recurrent ones keep lists of their weights


def recorded(function: Program, arguments: Sequence[Tensor], changed: slice) -> Program | None:
    """A function's tensor operations as straight-line code; ``None`` if it cannot be had with the same bits."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def copies() -> list[Tensor]:
        own = list(arguments)
        own[changed] = [a.clone() for a in own[changed]]
        return own

    try:
        graph = _tidied(make_fx(function)(*copies()))
        first, second = copies(), copies()
        with torch.no_grad():
            replayed = graph.forward(*first)
        wanted = function(*second)
    except Exception:
        return None  # it goes on unrecorded: slower, and right
    same = zip((*replayed, *first), (*wanted, *second), strict=True)
    program: Program = graph.forward
    return program if all(torch.equal(_bits(a), _bits(b)) for a, b in same) else None


def _tidied(module: fx.GraphModule) -> fx.GraphModule:
    """Without the steps that only autograd needed."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (
            torch.ops.aten.detach.default,
            torch.ops.aten.alias.default,
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return module


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.uint8) if x.ndim else x.detach().reshape(1).view(torch.uint8)
