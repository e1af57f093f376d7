"""How to run a simulation, as opposed to what to simulate: frozen values with defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foedus.core.attacks import Adversary
from foedus.core.checks import check_number, check_whole
from foedus.core.examples import Examples
from foedus.core.scores import Watch
from foedus.errors import ConfigurationError
from foedus.privacy.ledger import Budget
from foedus.record.export import Sink
from foedus.rounds.work import Executor
from foedus.sim.auto import Auto
from foedus.sim.executors import auto, by_name
from foedus.sim.world import World


@dataclass(frozen=True, kw_only=True)
class LocalCurves:
    """Evaluate every node's own model while it trains: the data of :func:`foedus.report.local.plot_local`, in
    ``local.jsonl``. Local training then runs in the executor ``debug``.

    Attributes:
        every: after so many local steps each, and after the last.
        examples: what to evaluate on; by default the central test set.

    Example:
        >>> Settings(local_curves=LocalCurves(every=5)).local_curves.every
        5
    """

    every: int = 1
    examples: Examples | None = None

    def __post_init__(self) -> None:
        check_whole("LocalCurves(every=...)", self.every, also=" local step")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a simulation runs; everything has a default.

    Attributes:
        executor: how local training is carried out, see :mod:`foedus.executors`; by default ``auto`` measures.
        folder: the run folder; by default a new one under ``runs/``. A folder with an unfinished run of the
            same configuration is resumed.
        resume: whether to go on with what is in the folder; if not, a folder with a run in it is an error.
        checkpoint_seconds: at most so much work is lost by a crash (0: a checkpoint after every round).
        world: simulated devices, dropouts and deadlines; see :class:`World`.
        start: first weights: a trained module, a mapping of names to arrays, or a path of a
            ``model.safetensors`` (warm start).
        device: e.g. ``"cuda"``; by default a GPU if the framework sees one.
        progress: show a progress bar and table.
        local_curves: see :class:`LocalCurves`.
        adversary: clients that attack, and how; see :class:`Adversary`.
        watch: score every update, and keep out who is suspicious; see :class:`Watch`.
        budget: of privacy; the run ends before it would be exceeded, see :class:`foedus.privacy.Budget`.
        cryptography: where sums are masked (:func:`foedus.masked`), run the real protocol among the simulated clients,
            with keys, shares and those that a simulated world loses; otherwise sums are added up in the plain, with the
            same result, and the protocol's bytes are counted.
        sinks: where the figures of every round go beside the run folder, e.g. ``[TensorBoard("logs")]``.

    Example:
        >>> from foedus.sim import executors
        >>> Settings(folder="runs/first", executor=executors.processes(workers=4)).checkpoint_seconds
        10.0
    """

    executor: Executor | Auto = field(default_factory=auto)
    folder: str | Path | None = None
    resume: bool = True
    checkpoint_seconds: float = 10.0
    world: World | None = None
    start: Any = None
    device: str | None = None
    progress: bool = True
    local_curves: LocalCurves | None = None
    adversary: Adversary | None = None
    watch: Watch | None = None
    budget: Budget | None = None
    cryptography: bool = False
    sinks: Sequence[Sink] = ()

    def __post_init__(self) -> None:
        check_number("checkpoint_seconds", self.checkpoint_seconds)
        if not isinstance(self.executor, Executor | Auto):
            raise ConfigurationError(_no_executor(self.executor))
        for name, kind, example in (
            ("world", World, "foedus.World(device=foedus.sim.world.phone)"),
            ("local_curves", LocalCurves, "foedus.LocalCurves()"),
            ("watch", Watch, "foedus.Watch(quarantine=foedus.quarantine(after=3))"),
            ("budget", Budget, "foedus.privacy.Budget(epsilon=8.0, delta=1e-5)"),
            ("adversary", Adversary, "foedus.Adversary(clients=[0], attack=foedus.attacks.sign_flip())"),
        ):
            if (value := getattr(self, name)) is not None and not isinstance(value, kind):
                raise ConfigurationError(f"Settings({name}=...) takes e.g. {example}, and was given {value!r}")
        if not isinstance(self.sinks, Sequence):
            raise ConfigurationError(f"sinks is a list; write sinks=[{self.sinks!r}]")


def _no_executor(value: Any) -> str:
    if isinstance(value, str):
        meant = by_name(value).name  # refuses names that do not exist, and lists those that do
        return f"executor is a value, not a text: write executor=foedus.executors.{meant}()"
    name = getattr(value, "__name__", None)
    told = f"the function {name} itself: write {name}()" if name else repr(value)
    return f"executor must be an executor, e.g. foedus.executors.debug(); not {told}"
