"""The executor that shares a cohort out over a Ray cluster.

Ray starts actors, moves bytes and notices deaths, nothing more: who trains what, and what is done again, is
decided as for worker processes (``crew.py``), with the same results to the bit. The job lies in Ray's object
store once for each machine, and so do a round's weights.

Ray lets an actor for which there is no room wait for ever, and says nothing. Therefore every worker first
reserves its core (a placement group), and if that does not come soon, the error says what is missing.

Not here: how a cluster is set up, and how the user's modules get onto its machines (Ray's runtime environments:
call ``ray.init`` before ``simulate``, and it is used as it is).
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.backends.cores import cores
from foedus.core.method import Vectors
from foedus.errors import ConfigurationError, MissingExtra
from foedus.rounds.work import Job, Orders, Outcome
from foedus.sim.crew import CrewSession, check_workers, dismiss
from foedus.sim.parcels import Failure, pack, unpack
from foedus.sim.worker import Begin, Share, Trainee, Word, caught

PATIENCE = 20  # seconds until a core that is not free is given up
SETTLING = 2  # seconds until Ray counts the cores of a session that was just closed as free

Parcel = tuple[bytes, list[NDArray[np.uint8]]]  # a value as Ray stores it best


@dataclass(frozen=True)
class Ray:
    """See :func:`foedus.executors.ray`."""

    address: str | None = None
    workers: int | None = None
    name: str = "ray"

    def __post_init__(self) -> None:
        check_workers(self.workers)

    def open(self, job: Job) -> RaySession:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtra("ray", "ray", "The executor ray") from error
        ours = not ray.is_initialized()
        if ours:
            _connect(ray, self.address or os.environ.get("RAY_ADDRESS"), self.workers)
        try:
            return RaySession(job, ray, _count(ray, self.workers), ours)
        except BaseException:
            if ours:
                ray.shutdown()
            raise


class RaySession(CrewSession["Actor"]):
    """See :class:`foedus.sim.crew.CrewSession`."""

    name = "ray"

    def __init__(self, job: Job, ray: Any, workers: int, ours: bool) -> None:
        super().__init__(job, workers)
        self._ray, self._store = ray, Store(ray)
        self._parcel = ray.put(_parcel(job))
        gpus = ray.cluster_resources().get("GPU", 0) if (job.device or "").startswith("cuda") else 0
        self._needs = {"CPU": 1.0} | ({"GPU": min(1.0, gpus / workers)} if gpus else {})
        self._end = weakref.finalize(self, _close, self._crew, ray if ours else None)

    def close(self) -> None:
        self._end()

    def _hire(self) -> Actor:
        from ray.util import placement_group, remove_placement_group

        place = placement_group([self._needs])
        if not place.wait(PATIENCE):
            remove_placement_group(place)
            raise ConfigurationError(_missing(self._ray, self._workers))
        return Actor(self._store, place, self._needs, self._parcel)

    def _answers(self) -> Iterator[tuple[Actor, Any]]:
        asked = {answer: worker for worker in self._crew for answer in worker.asked}
        for answer in self._ray.wait(list(asked))[0]:
            worker = asked[answer]
            worker.asked.remove(answer)
            yield worker, worker.answer(answer)


class Store:
    """The cluster, seen by its workers; puts a round's weights into the object store, once for all of them."""

    def __init__(self, ray: Any) -> None:
        self.ray, self.remote = ray, ray.remote(Remote)
        self._put: tuple[Weights, Vectors] | None = None
        self._reference: Any = None

    def reference(self, orders: Orders) -> Any:
        """What the server sends to every client: its model, and what travels beside it."""
        if self._put is None or self._put[0] is not orders.start or self._put[1] is not orders.down:
            self._put = orders.start, orders.down
            self._reference = self.ray.put((*orders.start, dict(orders.down)))
        return self._reference


NO_WEIGHTS = Weights(np.zeros(0, np.float32), np.zeros(0, np.float32))


class Actor:
    """A worker on the cluster, seen from here; see :class:`foedus.sim.crew.Worker`."""

    def __init__(self, store: Store, place: Any, needs: dict[str, float], job: Any) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.ready, self._death = False, ""
        self._store, self._place = store, place
        remote = store.remote.options(
            num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(place),
        )  # fmt: skip
        self._remote = remote.remote()
        self.asked = [self._remote.open.remote(job, sys.path)]  # answers that are to come

    def tell(self, message: Begin | Share | Word) -> None:
        if isinstance(message, Begin):
            rest = replace(message.orders, start=NO_WEIGHTS, down={})
            self._remote.begin.remote(rest, self._store.reference(message.orders))
        else:
            self.asked.append(self._remote.hear.remote(message))

    def answer(self, reference: Any) -> Any:
        """What it says; None if it is no more."""
        errors = self._store.ray.exceptions
        try:
            return _value(self._store.ray.get(reference))
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            self._death = str(error).strip().partition("\n")[0]
            self.asked.clear()
            return None

    def alive(self) -> bool:
        return not self._death

    def ended(self) -> str:
        return f"with Ray's words: {self._death}"

    def end(self, *, at_once: bool) -> None:  # noqa: ARG002 (Ray knows one way only)
        from ray.util import remove_placement_group

        with suppress(Exception):  # the cluster itself may be gone
            self._store.ray.kill(self._remote)
            remove_placement_group(self._place)


class Remote:
    """What lives on the cluster. It catches every exception of the user's code, since Ray would wrap it."""

    def __init__(self) -> None:
        self._trainee: Trainee | Failure | None = None

    def open(self, job: Parcel, path: list[str]) -> Parcel:
        sys.path += [p for p in path if p not in sys.path and os.path.exists(p)]  # Ray takes the script's only
        self._trainee = caught(lambda parcel: Trainee(unpack(*parcel)), job)
        return _parcel(self._trainee if isinstance(self._trainee, Failure) else Word.READY)

    def begin(self, orders: Orders, held: tuple[NDArray[Any], NDArray[Any], dict[str, NDArray[Any]]]) -> None:
        assert isinstance(self._trainee, Trainee)
        vector, buffers, down = held  # of the store, where nothing may be written
        start = Weights(vector.copy(), buffers.copy())
        self._trainee.hear(Begin(replace(orders, start=start, down={n: v.copy() for n, v in down.items()})))

    def hear(self, message: Share | Word) -> Parcel:
        assert isinstance(self._trainee, Trainee)
        return _parcel(caught(self._trainee.hear, message))


def _parcel(value: Job | Word | Outcome | Failure | None) -> Parcel:
    body, buffers = pack(value)
    return body, [np.frombuffer(b, np.uint8) for b in buffers]


def _value(parcel: Parcel) -> Any:
    """The value; its arrays are copies, since those of the store must not be written to."""
    body, buffers = parcel
    return unpack(body, [b.copy() for b in buffers])


# --- the cluster --------------------------------------------------------------------------------------------


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    """Join a cluster, or start one of our own on this machine, which ends with the session."""
    if address and address != "local":
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise ConfigurationError(
                f"no Ray cluster answers at {address!r}: {error}. Start one there (ray start --head), correct "
                "address= or RAY_ADDRESS, or leave both away for one on this machine"
            ) from error
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of its own change of mind
    ray.init(address="local", num_cpus=workers or cores(), include_dashboard=False, logging_level=logging.ERROR)


def _knock(address: str) -> None:
    """Whether anybody answers at ``host:port``: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _count(ray: Any, workers: int | None) -> int:
    """How many workers there shall be: as wanted, else one for each core that is free."""
    total = int(ray.cluster_resources().get("CPU", 0))
    if total < (workers or 1):
        raise ConfigurationError(_missing(ray, workers or 1))
    if workers:
        return workers
    last = time.monotonic() + SETTLING
    while (free := int(ray.available_resources().get("CPU", 0))) < total and time.monotonic() < last:
        time.sleep(0.05)
    return max(1, free)


def _missing(ray: Any, workers: int) -> str:
    total, free = (int(r.get("CPU", 0)) for r in (ray.cluster_resources(), ray.available_resources()))
    gpus = f" and {ray.available_resources().get('GPU', 0):g} GPUs" if ray.cluster_resources().get("GPU") else ""
    return (
        f"{workers} workers need a core each, and of the Ray cluster's {total} cores {free} are free{gpus}. Write "
        f"executor=foedus.executors.ray(workers={max(1, free)}), or free some: `ray status` shows what holds them"
    )


def _close(crew: list[Actor], ray: Any) -> None:
    dismiss(crew, at_once=False)
    if ray is not None:
        ray.shutdown()
