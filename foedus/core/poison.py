"""Poisoned training data: what malicious clients train on, and how to see whether it worked.

A poison is a function of :class:`~foedus.core.examples.Examples`; ``clients.poisoned(positions, poison)`` applies it to
the training examples of some clients. A backdoor is a trigger (a patch of pixels, say) that makes the model answer
what the attacker wants, while it stays as good as before on everything else; its success is the accuracy on
:func:`triggered` test examples.

Not here: attacks on updates (``core/attacks.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole
from foedus.core.examples import Array, Examples
from foedus.core.random import generator
from foedus.errors import ConfigurationError, DataError

Poison = Callable[[Examples], Examples]
Trigger = Callable[[NDArray[Any]], NDArray[Any]]  # inputs [example, ...] -> the same with the trigger, a copy


def flip_labels(classes: int) -> Poison:
    """Every label becomes its mirror image: class c becomes ``classes − 1 − c``.

    Source: Fang, Cao, Jia, Gong 2020, "Local model poisoning attacks to Byzantine-robust federated
    learning", section 4.

    Args:
        classes: how many there are.

    Example:
        >>> flip_labels(10)(Examples.of([[0.0], [1.0]], [0, 7])).targets.tolist()
        [9, 2]
    """
    check_whole("classes", classes, least=2)

    def poison(examples: Examples) -> Examples:
        return Examples(examples.inputs, classes - 1 - examples.targets)

    return poison


def patch(value: float = 1.0, *, size: int = 3, image: tuple[int, int] | None = None) -> Trigger:
    """A trigger: a square of pixels of one value in the lower right corner.

    Args:
        value: what the pixels become.
        size: its height and width in pixels.
        image: (height, width) of pictures that come as rows of numbers; by default the last two axes are theirs.

    Source: Gu, Dolan-Gavitt, Garg 2017, "BadNets".

    Example:
        >>> patch(9.0, size=1)(np.zeros((1, 1, 2, 2))).tolist()
        [[[[0.0, 0.0], [0.0, 9.0]]]]
    """
    check_whole("size", size, least=1)

    def trigger(inputs: Array) -> Array:
        marked = inputs.copy()
        pictures = marked if image is None else marked.reshape(*inputs.shape[:-1], *image)
        if pictures.ndim < 3 or min(pictures.shape[-2:]) < size:
            raise DataError(
                f"patch(size={size}) does not fit into inputs of shape {list(inputs.shape[1:])}. For pictures that "
                "come as rows of numbers, write patch(image=(height, width))."
            )
        pictures[..., -size:, -size:] = value
        return marked

    return trigger


def backdoor(trigger: Trigger, target: int, *, share: float = 0.5, seed: int = 0) -> Poison:
    """Some examples get the trigger and the attacker's label.

    Source: Bagdasaryan et al. 2020, "How to backdoor federated learning", with the pixel pattern of BadNets.

    Args:
        trigger: e.g. ``patch()``; applied to the first input.
        target: the label that the trigger shall bring.
        share: of the examples, in (0, 1]; of n, ``n · share`` rounded up.
        seed: which examples.

    Example:
        >>> bad = backdoor(patch(size=1), target=7, share=0.5)(Examples.of(np.zeros((4, 2, 2)), [0, 1, 2, 3]))
        >>> int((bad.targets == 7).sum()), float(bad.inputs[0].sum())
        (2, 2.0)
    """
    check_number("share", share, above=True)
    if share > 1:
        raise ConfigurationError(f"backdoor(share=...) is a share of the examples, in (0, 1]; not {share}")

    def poison(examples: Examples) -> Examples:
        count = int(np.ceil(share * len(examples) - 1e-9))
        rows = generator(seed, "backdoor", len(examples)).permutation(len(examples))[:count]
        first, targets = examples.inputs[0].copy(), examples.targets.copy()
        first[rows], targets[rows] = trigger(first[rows]), target
        return Examples((first, *examples.inputs[1:]), targets)

    return poison


def triggered(examples: Examples, trigger: Trigger, target: int) -> Examples:
    """Examples to measure a backdoor with: all that are not of the target's class, with the trigger, labelled as it.

    A model's accuracy on them is the backdoor's success; that of a model nobody attacked is what to compare with.

    Args:
        examples: honest test examples.
        trigger, target: the backdoor's.

    Example:
        >>> triggered(Examples.of(np.zeros((3, 2, 2)), [0, 7, 1]), patch(size=1), 7).targets.tolist()
        [7, 7]
    """
    others = examples.take(np.flatnonzero(examples.targets != target))
    return Examples((trigger(others.inputs[0]), *others.inputs[1:]), np.full_like(others.targets, target))
