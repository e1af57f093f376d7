"""Gradient inversion: from a client's update back to the examples that it was trained on.

The attacker makes up examples, computes the update that a client with these would send, and changes them until that
update and the one that it saw are alike. What "alike" means, how it searches and whether labels are searched for as
well is a value, :class:`Inversion`:

* :func:`dlg`: squared distance of gradients, L-BFGS, labels searched for (Zhu, Liu, Han 2019, "Deep leakage from
  gradients");
* :func:`idlg`: the same, with labels read off the gradient of the last layer first (Zhao, Mopuri, Bilen 2020);
* :func:`cosine`: angle of gradients and total variation, signed Adam (Geiping, Bauermeister, Dröge, Moeller 2020,
  "Inverting gradients").

Local training of several steps is undone by going through these very steps with the made-up examples and
differentiating through all of them; which example is in which batch follows from the seed, which everybody knows.

This file imports torch, and is imported on use. Not here: what the attacker sees (``seen.py``), how good the result is
(``quality.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call

from foedus.audit.seen import Seen
from foedus.backends import open_trainer
from foedus.backends.torch_backend import TorchTrainer, same_bits
from foedus.core.checks import check_number, check_whole
from foedus.core.client import LocalSGD, descend
from foedus.core.random import generator, key
from foedus.core.task import Task
from foedus.errors import ConfigurationError

Array = NDArray[Any]
Tensors = Sequence[torch.Tensor]
Distance = Callable[[Tensors, Tensors], torch.Tensor]
Search = Callable[["Objective", list[torch.Tensor]], None]


class Inversion(NamedTuple):
    """A way to invert.

    * ``distance(found, seen) -> scalar``: how far two lists of gradients are apart.
    * ``search(objective, variables)``: changes the variables in place until the objective is small.
    * ``guesses``: whether class labels are searched for; otherwise they are read off first.
    * ``smoothness``: the weight of total variation, for pictures.
    * ``restarts``: from how many random beginnings; the closest counts.

    Example:
        >>> cosine(steps=50)._replace(restarts=4).restarts
        4
    """

    distance: Distance
    search: Search
    label: str
    guesses: bool = False
    smoothness: float = 0.0
    restarts: int = 1


@dataclass(frozen=True, kw_only=True)
class Inverted:
    """What came out.

    Attributes:
        inputs: reconstructed examples [k, ...].
        targets: their labels, as far as known: classes [k], or numbers.
        distance: of the update that these would give from the one that was seen.
        label: of the attack.

    Example:
        >>> Inverted(inputs=np.zeros((2, 4)), targets=np.array([0, 1]), distance=0.1, label="cosine()").inputs.shape
        (2, 4)
    """

    inputs: Array
    targets: Array
    distance: float
    label: str


def dlg(*, steps: int = 100, restarts: int = 3) -> Inversion:
    """Deep leakage from gradients: squared distance, L-BFGS, labels searched for as well.

    Args:
        steps: calls of L-BFGS, of up to 20 evaluations each.
        restarts: random beginnings; some get stuck.

    Example:
        >>> dlg().label
        'dlg(steps=100)'
    """
    check_whole("steps", steps)
    return Inversion(squared, _by_lbfgs(steps), f"dlg(steps={steps})", guesses=True, restarts=_counted(restarts))


def idlg(*, steps: int = 100, restarts: int = 3) -> Inversion:
    """Improved deep leakage: as :func:`dlg`, with the labels read off the last layer's gradient.

    Example:
        >>> idlg(steps=20).guesses
        False
    """
    check_whole("steps", steps)
    return Inversion(squared, _by_lbfgs(steps), f"idlg(steps={steps})", restarts=_counted(restarts))


def cosine(*, steps: int = 1000, rate: float = 0.1, smoothness: float = 1e-2, restarts: int = 1) -> Inversion:
    """Inverting gradients: the angle between gradients, total variation, Adam on the signs of its gradient.

    The angle does not change when an update is clipped or scaled.

    Args:
        steps: of Adam; its rate falls to a tenth at 3/8, 5/8 and 7/8 of them.
        rate: of Adam, as a share of the data's range.
        smoothness: the weight of total variation.
        restarts: random beginnings.

    Example:
        >>> cosine(steps=10, smoothness=0.0).label
        'cosine(steps=10, smoothness=0.0)'
    """
    check_whole("steps", steps)
    check_number("rate", rate, above=True)
    check_number("smoothness", smoothness)
    label = f"cosine(steps={steps}, smoothness={smoothness})"
    return Inversion(angle, _by_adam(steps, rate), label, smoothness=smoothness, restarts=_counted(restarts))


def squared(found: Tensors, seen: Tensors) -> torch.Tensor:
    """The sum of squared differences."""
    return torch.stack([((a - b) ** 2).sum() for a, b in zip(found, seen, strict=True)]).sum()


def angle(found: Tensors, seen: Tensors) -> torch.Tensor:
    """One minus the cosine of the angle between all entries together."""
    pairs = list(zip(found, seen, strict=True))
    dot = torch.stack([(a * b).sum() for a, b in pairs]).sum()
    lengths = torch.stack([torch.stack([(a * a).sum(), (b * b).sum()]) for a, b in pairs]).sum(0)
    return 1 - dot / (lengths.prod().sqrt() + 1e-20)


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What the attacker knows beside the update.

    Attributes:
        shape: of one example, as the model takes it.
        limits: the smallest and the largest value of inputs.
        labels: the client's labels [k], where they are known; otherwise they are found.
        classes: how many there are; ``None`` where targets are numbers, which are then searched for.

    Example:
        >>> Knowledge(shape=(1, 28, 28), classes=10).limits
        (0.0, 1.0)
    """

    shape: tuple[int, ...]
    limits: tuple[float, float] = (0.0, 1.0)
    labels: Array | None = None
    classes: int | None = None


def invert(task: Task, seen: Seen, knowledge: Knowledge, *, by: Inversion | None = None, seed: int = 0) -> Inverted:
    """Reconstruct a client's examples from its update.

    Args:
        task: with a torch model of one input of floating-point numbers.
        seen: the update, see :func:`foedus.audit.seen.look`.
        knowledge: what else is known.
        by: how; :func:`cosine` by default.
        seed: of the random beginnings.

    Raises:
        ConfigurationError: the task is not of that kind.

    Example:
        >>> import foedus as fd
        >>> from foedus.audit.seen import Victim, look
        >>> task = fd.Task(lambda: torch.nn.Linear(4, 2), torch.nn.functional.cross_entropy)
        >>> one = fd.Examples.of([[0.1, 0.9, 0.4, 0.6]], [1])
        >>> start, spec = opened_torch(task).initial(), fd.local_sgd(0.1, batch_size=None)
        >>> seen = look(Victim(task=task, before=start, spec=spec, examples=one))
        >>> found = invert(task, seen, Knowledge(shape=(4,), classes=2), by=idlg(steps=10))
        >>> found.inputs.astype(float).round(1).tolist(), found.targets.tolist()
        ([[0.1, 0.9, 0.4, 0.6]], [1])
    """
    by = cosine() if by is None else by
    trainer = opened_torch(task)
    spec = seen.spec
    if not isinstance(spec, LocalSGD):
        raise ConfigurationError(f"clients that train by {spec.label} cannot be inverted step by step")
    with same_bits(), _reproducible(seed), _differentiable(task):
        objective = Objective(trainer, seen, knowledge, by)
        found = []
        for labels in objective.candidates():
            objective.labels = labels
            found += [_once(objective, generator(seed, "inversion", i)) for i in range(by.restarts)]
    return min(found, key=lambda one: one.distance if math.isfinite(one.distance) else math.inf)


def _once(objective: Objective, draws: np.random.Generator) -> Inverted:
    """One random beginning."""
    variables = objective.beginning(draws)
    objective.by.search(objective, variables)
    with torch.no_grad():
        inputs = variables[0].detach().clamp(*objective.knowledge.limits)
    targets = objective.targets(variables)
    hard = targets.argmax(-1) if objective.soft else targets
    return Inverted(
        inputs=inputs.cpu().numpy(),
        targets=hard.detach().cpu().numpy(),
        distance=float(objective.apart([inputs, *variables[1:]]).detach()),
        label=objective.by.label,
    )


class Objective:
    """How far the update of made-up examples is from the one that was seen, as a function of these examples."""

    def __init__(self, trainer: TorchTrainer, seen: Seen, knowledge: Knowledge, by: Inversion) -> None:
        self.trainer, self.seen, self.knowledge, self.by = trainer, seen, knowledge, by
        self.count = seen.examples
        trainer.load(seen.before)
        trainer.module.train()
        self._start = [p.detach().clone().requires_grad_(True) for p in trainer.parameters.values()]
        self._buffers = {n: b.detach().clone() for n, b in trainer.buffers.items()}
        masks = seen.layout.unflatten(seen.sent.astype(np.float32)).values()
        self._sent = None if seen.sent.all() else [torch.tensor(m) for m in masks]
        self._seen = [torch.tensor(g) for g in seen.layout.unflatten(seen.gradient).values()]
        self.soft = by.guesses and knowledge.labels is None and knowledge.classes is not None
        self.labels: torch.Tensor | None = None

    def candidates(self) -> list[torch.Tensor | None]:
        """The labels that are known; or that are read off, taking the update as it is, and as one that was scaled; none
        where they are searched for."""
        if self.soft or self.knowledge.classes is None:
            return [None]
        known = self.knowledge.labels
        if known is not None:
            return [torch.tensor(np.asarray(known, np.int64))]
        low, high = self.knowledge.limits
        noise = low + (high - low) * torch.rand(64, *self.knowledge.shape)
        with torch.no_grad():
            predicted = self._output(self._start, noise).softmax(-1).mean(0)
        read = [labels_of(self.seen, predicted.numpy(), scaled=scaled) for scaled in (False, True)]
        return [torch.tensor(one) for one in (read[:1] if (read[0] == read[1]).all() else read)]

    def beginning(self, draws: np.random.Generator) -> list[torch.Tensor]:
        """Random inputs, and what else is searched for."""
        low, high = self.knowledge.limits
        noise = draws.normal(0.5, 0.25, (self.count, *self.knowledge.shape)).clip(0, 1)
        variables = [torch.tensor(low + (high - low) * noise, dtype=torch.float32)]
        if self.soft:
            assert self.knowledge.classes is not None
            variables.append(torch.tensor(draws.normal(size=(self.count, self.knowledge.classes)), dtype=torch.float32))
        elif self.labels is None:
            known = self.knowledge.labels
            numbers = draws.normal(size=self.count) if known is None else known
            variables.append(torch.tensor(numbers, dtype=torch.float32))
        return [v.requires_grad_(True) for v in variables]

    def targets(self, variables: Tensors) -> torch.Tensor:
        """What goes into the loss: labels, their probabilities, or numbers."""
        if self.soft:
            return variables[1].softmax(-1)
        return variables[1] if self.labels is None else self.labels

    def apart(self, variables: Tensors) -> torch.Tensor:
        """The distance of the gradients, without what is known of pictures."""
        found = self._gradients(variables[0], self.targets(variables))
        if self._sent is not None:
            found = [g * m for g, m in zip(found, self._sent, strict=True)]
        return self.by.distance(found, self._seen)

    def __call__(self, variables: Tensors) -> torch.Tensor:
        value = self.apart(variables)
        if self.by.smoothness and variables[0].ndim >= 4:
            value = value + self.by.smoothness * variation(variables[0])
        return value

    def _gradients(self, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        """The mean gradient along which a client with these examples would step."""
        spec, plan = self.seen.spec, self.seen.plan
        assert isinstance(spec, LocalSGD)
        lr = spec.rate(self.seen.round)
        now: list[torch.Tensor] = list(self._start)
        memory: list[torch.Tensor] = [torch.zeros_like(p) for p in now] if spec.momentum else []
        for rows, count in zip(plan.rows, plan.count, strict=True):
            at = torch.from_numpy(rows[:count].astype(np.int64))
            loss = self._loss(now, inputs[at], targets[at])
            slopes = torch.autograd.grad(loss, now, create_graph=True, allow_unused=True, materialize_grads=True)
            now, memory = descend(spec, now, slopes, memory=memory, received=self._start, lr=lr)
        scale = lr * len(plan.count)
        return [(a - b) / scale for a, b in zip(self._start, now, strict=True)]

    def _loss(self, parameters: Tensors, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.trainer.loss(self._output(parameters, inputs), targets)

    def _output(self, parameters: Tensors, inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.trainer.parameters, parameters, strict=True))
        buffers = {n: b.clone() for n, b in self._buffers.items()}
        output: torch.Tensor = functional_call(self.trainer.module, named | buffers, (inputs,))
        return output


def variation(pictures: torch.Tensor) -> torch.Tensor:
    """Total variation, the mean absolute difference of neighbouring pixels of pictures [k, ..., height, width]."""
    down = (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().mean()
    across = (pictures[..., :, 1:] - pictures[..., :, :-1]).abs().mean()
    return down + across


def labels_of(seen: Seen, predicted: Array, *, scaled: bool = False) -> Array:
    """The labels of a batch, read off the gradient of the last layer: int64 [k], in increasing order.

    The gradient with respect to the last bias is the mean of probability minus label, so that every example of a class
    makes that class's entry smaller by 1/k (Zhao et al. 2020 for one example; for more, Wainakh et al. 2022,
    "User-level label leakage from gradients"). Without a bias, sums of the rows of the last matrix tell the sign.

    Args:
        seen: the update.
        predicted: probabilities that the model gives on average, [class]; the attacker asks it about anything.
        scaled: whether the update may have been scaled down (clipped), so that only ratios are looked at.

    Raises:
        ConfigurationError: the last layer has not as many entries as there are classes.
    """
    _, last = _last_array(seen, len(predicted))
    slopes, scale = last.reshape(len(last), -1).sum(1), 1.0
    if (
        scaled or last.ndim > 1
    ):  # what goes into a last layer is positive after ReLUs; rows without labels tell its size
        scale = float(np.median((slopes / np.maximum(predicted, 1e-12))[slopes > 0])) if (slopes > 0).any() else 1.0
    lacking = seen.examples * (predicted - slopes / max(scale, 1e-12))
    counts = np.zeros(len(last), np.int64)
    for _ in range(seen.examples):  # one after another to the class that lacks most
        counts[int(np.argmax(lacking - counts))] += 1
    return np.repeat(np.arange(len(last)), counts)


def _last_array(seen: Seen, classes: int) -> tuple[str, Array]:
    """The last array of the model that was sent whole: its name, and its part of the gradient."""
    arrays, sent = seen.layout.unflatten(seen.gradient), seen.layout.unflatten(seen.sent.astype(np.float32))
    ends = [name for name, array in list(arrays.items())[-2:] if array.shape[:1] == (classes,)]
    whole = [name for name in ends if sent[name].all()] or ends
    if not whole:
        name, array = list(arrays.items())[-1]
        raise ConfigurationError(
            f"labels cannot be read off: the last array of the model, {name!r}, has the shape {list(array.shape)}, not "
            f"one entry for each of {classes} classes. Give Knowledge(labels=...)"
        )
    return whole[-1], arrays[whole[-1]]


# --- searching ----------------------------------------------------------------------------------------------


def _by_lbfgs(steps: int) -> Search:
    def search(objective: Objective, variables: list[torch.Tensor]) -> None:
        optimiser = torch.optim.LBFGS(variables, lr=1.0, max_iter=20, history_size=50)
        best, kept = math.inf, [v.detach().clone() for v in variables]

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            value = objective(variables)
            _into(variables, value)
            return value.detach()

        for _ in range(steps):
            value = float(optimiser.step(closure))  # type: ignore[arg-type, no-untyped-call, unused-ignore]
            if not math.isfinite(value):
                break
            if value < best:
                best, kept = value, [v.detach().clone() for v in variables]
            if value < 1e-9:
                break
        _put(variables, kept)

    return search


def _by_adam(steps: int, rate: float) -> Search:
    def search(objective: Objective, variables: list[torch.Tensor]) -> None:
        low, high = objective.knowledge.limits
        optimiser = torch.optim.Adam(variables, lr=rate * (high - low))
        falls = [steps * k // 8 for k in (3, 5, 7)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, falls, gamma=0.1)
        best, kept = math.inf, [v.detach().clone() for v in variables]
        for _ in range(steps):
            value = objective(variables)
            _into(variables, value)
            if float(value.detach()) < best:
                best, kept = float(value.detach()), [v.detach().clone() for v in variables]
            variables[0].grad = torch.sign(variables[0].grad)  # type: ignore[arg-type]
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                variables[0].clamp_(low, high)
        _put(variables, kept)

    return search


def _into(variables: list[torch.Tensor], value: torch.Tensor) -> None:
    """The gradient with respect to the variables alone: the model's own is not wanted, and would add up."""
    slopes = torch.autograd.grad(value, variables, allow_unused=True, materialize_grads=True)
    for variable, slope in zip(variables, slopes, strict=True):
        variable.grad = slope


@torch.no_grad()
def _put(variables: Tensors, values: Tensors) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.copy_(value)


# --- what can be inverted -----------------------------------------------------------------------------------


def opened_torch(task: Task) -> TorchTrainer:
    """A trainer of a task with a torch model, which can be differentiated through.

    Raises:
        ConfigurationError: the model is written in something else.
    """
    trainer = open_trainer(task, seed=0, device="cpu")
    if not isinstance(trainer, TorchTrainer):
        raise ConfigurationError(
            f"this attack differentiates through the model, which is done here for torch models; "
            f"this one is of {trainer.backend}. Give a torch model of the same layers"
        )
    return trainer


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """torch's own draws (dropout) repeat, and leave no trace."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "inversion") >> 1)
        yield


@contextmanager
def _differentiable(task: Task) -> Iterator[None]:
    """torch's own errors, told as what they mean here."""
    try:
        yield
    except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        raise ConfigurationError(
            f"{task!r} cannot be inverted: torch cannot differentiate its gradient with respect to its input, or "
            f"cannot call it with made-up inputs ({str(error).splitlines()[0]})"
        ) from error


def _counted(restarts: Any) -> int:
    check_whole("restarts", restarts)
    return int(restarts)
