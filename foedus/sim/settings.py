"""How to run a simulation, as opposed to what to simulate: frozen values with defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foedus.core.examples import Examples
from foedus.errors import ConfigurationError
from foedus.record.export import Sink
from foedus.sim.executors import auto
from foedus.sim.work import Executor
from foedus.sim.world import World


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, and when to stop.

    Attributes:
        every: evaluate after each so many rounds (and after the last); 0 for never.
        clients: also evaluate on every client's own test examples (else validation, else training examples),
            and report mean, spread and worst decile.
        stop_at: stop as soon as a central figure is reached, e.g. ``{"accuracy": 0.97}``.
    """

    every: int = 1
    clients: bool = False
    stop_at: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigurationError(f"Evaluation(every=...) is a number of rounds, 0 for never; not {self.every}")
        if self.stop_at and not self.every:
            raise ConfigurationError("stop_at needs evaluation: write every=1, or another number of rounds")


@dataclass(frozen=True, kw_only=True)
class LocalCurves:
    """Evaluate every node's own model while it trains: the data of :func:`foedus.report.local.plot_local`, in
    ``local.jsonl``. Local training then runs in the executor ``debug``.

    Attributes:
        every: after so many local steps each, and after the last.
        examples: what to evaluate on; by default the central test set.
    """

    every: int = 1
    examples: Examples | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigurationError(f"LocalCurves(every=...) is a number of local steps from 1, not {self.every}")


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
        sinks: where the figures of every round go beside the run folder, e.g. ``[TensorBoard("logs")]``.
    """

    executor: Executor = field(default_factory=auto)
    folder: str | Path | None = None
    resume: bool = True
    checkpoint_seconds: float = 10.0
    world: World | None = None
    start: Any = None
    device: str | None = None
    progress: bool = True
    local_curves: LocalCurves | None = None
    sinks: Sequence[Sink] = ()
