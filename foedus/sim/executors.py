"""The executors: ways to carry out local training, all with the same result.

    executor        a cohort is …                                          runs
    debug           a plain loop; errors carry client, round, step, batch   everything
    processes       shared out over worker processes                        everything
    vectorised      one batched computation over [client, parameter]        local_sgd
    compiled        one XLA program over devices                            local_sgd, known operators
    ray             shared out over a Ray cluster                           everything
    auto            whichever of these is measured fastest                  everything

Give one to ``Settings(executor=...)``, e.g. ``Settings(executor=foedus.executors.processes(workers=4))``.
"""

from __future__ import annotations

from collections.abc import Callable

from foedus.errors import ConfigurationError
from foedus.rounds.debug import Debug
from foedus.rounds.work import Executor, Job, Orders, Session
from foedus.sim.auto import Auto, Timer, choose, clock


def debug() -> Executor:
    """One client after another in this process; the reference, and the one to find a fault with."""
    return Debug()


def compiled() -> Executor:
    """The whole cohort's local training as one XLA program; for local_sgd() and operators that are known."""
    from foedus.sim.compiled import Compiled

    return Compiled()


def vectorised() -> Executor:
    """Blocks of clients as one batched computation over [client, parameter]; for local_sgd()."""
    from foedus.sim.vectorised import Vectorised

    return Vectorised()


def processes(workers: int | None = None) -> Executor:
    """Worker processes on this machine, each training one client at a time on one core.

    Args:
        workers: how many; by default one per core.
    """
    from foedus.sim.processes import Processes

    return Processes(workers)


def ray(address: str | None = None, workers: int | None = None) -> Executor:
    """Workers on a Ray cluster, each training one client at a time on one core.

    Args:
        address: of the cluster, e.g. ``"auto"`` or ``"10.0.0.1:6379"``; by default what ``RAY_ADDRESS`` says,
            else one on this machine that ends with the run. If ``ray.init`` was called before, its cluster.
        workers: how many; by default one per free core.
    """
    from foedus.sim.ray_executor import Ray

    return Ray(address, workers)


def auto(timer: Timer = clock) -> Auto:
    """Measures the candidates on the first steps of the real cohort, takes the fastest and says so in one line.

    Args:
        timer: ``(name, rehearsal) → seconds``; by default the second of two rehearsals is timed.
    """
    return Auto((debug(), vectorised(), compiled(), processes()), timer)


BY_NAME: dict[str, Callable[[], Executor | Auto]] = {
    f.__name__: f for f in (auto, compiled, debug, processes, ray, vectorised)
}


def by_name(name: str) -> Executor | Auto:
    """The executor of that name with its defaults, as on a command line.

    Raises:
        ConfigurationError: there is none of that name.
    """
    if name not in BY_NAME:
        raise ConfigurationError(f"no executor is named {name!r}; there are: {', '.join(BY_NAME)}")
    return BY_NAME[name]()


def open_session(
    executor: Executor | Auto,
    job: Job,
    orders: Orders,
    *,
    rounds: int,
    again: str | None,
    say: Callable[[str], None],
) -> Session:
    """Open an executor for a job. ``auto`` measures on ``orders`` with ``rounds`` to run, or takes the one named
    ``again``, which an interrupted run had chosen: other executors agree only to rounding."""
    if isinstance(executor, Auto):
        if again is None:
            return choose(executor, job, orders, rounds=rounds, say=say)
        executor = by_name(again)
        assert not isinstance(executor, Auto)
        return executor.open(job)
    if again is not None and again != executor.name:
        say(f"this run was begun with the executor {again}; going on with {executor.name}, which agrees to rounding")
    return executor.open(job)
