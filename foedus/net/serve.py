"""A server process: everything that ``fd.serve`` puts together.

    store, blobs, identity → coordinator → HTTP, doorbell → uvicorn

The same folder started again goes on. Several runs on one server are several federations given to :func:`serve_all`.

Not here: the parts (their own files).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import uvicorn

from foedus.backends import open_trainer
from foedus.core.compose import Algorithm
from foedus.core.examples import Examples
from foedus.core.population import Clients
from foedus.core.select import Sampler
from foedus.core.task import Task
from foedus.errors import ConfigurationError
from foedus.net import bundle, sealing
from foedus.net.blobs import tried
from foedus.net.brokers.elsewhere import Elsewhere
from foedus.net.coordinator import Coordinator, Ground
from foedus.net.doorbell import with_doorbell
from foedus.net.http import Shell
from foedus.net.identity import routes as door
from foedus.net.identity import tls
from foedus.net.identity.access import Access
from foedus.net.identity.authority import Authority
from foedus.net.identity.connections import guarded, guarded_socket
from foedus.net.identity.limits import Rate
from foedus.net.identity.tls_line import over_tls
from foedus.net.leader import Leader, OwnFolder
from foedus.net.learning import Learning
from foedus.net.logs import say
from foedus.net.metrics import Metrics
from foedus.net.owner import rules as owner_rules
from foedus.net.recording import Recording
from foedus.net.served import Served, common_population
from foedus.net.serving import Serving
from foedus.net.store import SqlStore, open_store
from foedus.net.troubles import Troubles
from foedus.net.uploads import Uploads
from foedus.protocol.round import Phase
from foedus.record.folder import Record, read
from foedus.rounds.evaluate import Evaluation, checked

DATABASE, BLOBS, IDENTITY, RUNS, SEALING = "foedus.sqlite", "blobs", "identity", "runs", "sealing.key"
KEEP_ALIVE = 120  # seconds that an idle connection is held open
DAY = 86400.0  # seconds between two looks at whether the certificate is to be renewed
INVITED = 1000  # clients that the printed token lets in
HOURS = 24.0 * 7
LAST_WORDS = 1.0  # seconds for the last answers to arrive, when all have the model and nothing left to ask


def serve(
    task: Task, algorithm: Algorithm, *, rounds: int, cohort: int | Sampler | None = None, seed: int = 0,
    evaluation: Evaluation | None = None, settings: Serving | None = None,
) -> Record:  # fmt: skip
    """Serve a federation, until its last round is done; clients join from other machines.

    Args:
        task, algorithm: as for ``simulate``; clients have the same, out of the bundle or installed.
        rounds: how many rounds in all. A folder that holds fewer is gone on with.
        cohort: clients per round: a number (the first that come), a sampler (drawn among those enrolled), or ``None``
            for all.
        seed: everything random is a function of it.
        evaluation: by default on ``Serving(test=...)`` after every round.
        settings: folder, address, minimum of contributors, ...

    Returns:
        The record: ``record.metrics``, ``record.final``, ``record.parameters``.

    Raises:
        ConfigurationError: the parts do not fit together.
        CheckpointError: the folder holds another run.

    Example:
        >>> record = serve(task, fedavg(local_sgd(lr=0.1)), rounds=20)  # doctest: +SKIP
    """
    settings = settings or Serving()
    served = _served(task, algorithm, settings, rounds)
    served = replace(served, cohort=cohort, seed=seed, evaluation=evaluation or Evaluation())
    return serve_all([served], settings)[0]


def serve_all(runs: Sequence[Served], settings: Serving) -> list[Record]:
    """Serve several runs at once, from one address; clients ask for one by its name, or take what is offered.

    Args:
        runs: each with a name of its own.
        settings: what is said about one run in it (name, test, ...) is not looked at.
    """
    if settings.broker is not None:
        from foedus.net.roles import serve_roles

        return serve_roles(runs, settings)
    server = Server(runs, settings)
    try:
        _run(server)
        return [read(server.recording.path(run.name)) for run in runs]
    finally:
        server.close()


def _served(task: Task, algorithm: Algorithm, settings: Serving, rounds: int) -> Served:
    """What is served, as far as the settings say."""
    test = settings.test
    if test is not None and not isinstance(test, Examples):
        test = Clients.of({"test": test}).train(0)
    return Served(
        name=settings.name, task=task, algorithm=algorithm, rounds=rounds, each=settings.rounds,
        keeping=settings.keeping, budget=settings.budget, start=settings.start, central_test=test,
        target=settings.target, source=None if settings.source is None else Path(settings.source),
    )  # fmt: skip


@dataclass(frozen=True)
class Address:
    """Where a server listens, and what it says of itself."""

    url: str
    join: str
    tasks: tuple[str, ...] = ()  # digests of the source bundles that clients are given

    def told(self, what: str, notes: Sequence[str] = ()) -> str:
        """What is printed when it listens."""
        lines = [f"{what} at {self.url}; clients join with\n\n    {self.join} --data MODULE:OBJECT\n"]
        lines += [f"{note}\n" for note in notes]
        # an owner who knows the source need not look at it again
        lines += [f"the task they are asked to approve: {digest}\n" for digest in self.tasks]
        return "\n".join(lines)


class Listening(Protocol):
    """What :func:`blocking` runs."""

    settings: Serving
    uvicorn: uvicorn.Server

    def told(self) -> str: ...


class Server:
    """One server process, from its folder to its port.

    Args:
        runs: what is served.
        settings: how.
    """

    def __init__(
        self, runs: Sequence[Served], settings: Serving, *, elsewhere: Elsewhere | None = None
    ) -> None:  # fmt: skip
        if len({run.name for run in runs}) < len(runs):
            raise ConfigurationError("two runs have one name; clients ask for runs by name, so give each its own")
        self.settings, self.folder, self._elsewhere = settings, Path(settings.folder), elsewhere
        self.own = OwnFolder(self.folder)
        with contextlib.ExitStack() as undone:
            undone.callback(self.own.close)
            if settings.database is None:
                self.own.check_alone()
            now = time.time()
            self.authority = Authority.kept(self.folder / IDENTITY, now=now)
            self.store: SqlStore = open_store(settings.database or f"sqlite:///{self.folder / DATABASE}")
            undone.callback(self.store.close)
            self.metrics, self.troubles = Metrics(), Troubles(time.time, self.folder)
            self.leader = Leader(self.store, self.own.name, self._url(settings.port), fresh=self.own.alone)
            self.coordinator = Coordinator(self._ground(), [learning_of(run, settings) for run in runs])
            self.coordinator.check()
            for learning in self.coordinator.learnings:
                learning.check_start()
            self._bundle()
            self.recording = Recording(self.coordinator, self.folder / RUNS)
            self.context = None if self._plain else tls.server_context(self.authority, list(settings.names), now=now)
            channel = None if settings.behind_proxy else "" if self._plain else tls.shown(self.authority)
            self.access = Access(self.authority, self.store, channel=channel)
            self.shell = Shell(
                self.coordinator, self.access, clock=time.time, metrics=self.metrics, leading=self.leader,
                troubles=self.troubles,
                more=door.routes(
                    self.access, clock=time.time, rate=Rate(per_s=20.0, burst=1000), aside=asyncio.to_thread
                ),
            )  # fmt: skip
            self.shell.after = self._after
            self._ended_at: float | None = None
            self._told_at: float | None = None
            self._reloaded, self._renewed = 0.0, now
            self.stopped = threading.Event()
            for warned in self.warnings():
                say("few contributors", level=logging.WARNING, told=warned)
            self.uvicorn: uvicorn.Server = Ear(configuration(self.shell, settings, self.context))
            undone.pop_all()

    @property
    def _plain(self) -> bool:
        return self.settings.insecure_loopback or self.settings.behind_proxy

    def _url(self, port: int) -> str:
        scheme = "http" if self.settings.insecure_loopback else "https"
        return f"{scheme}://{self.settings.names[0] if self.settings.names else self.settings.host}:{port}"

    def _ground(self) -> Ground:
        settings = self.settings
        operator = sealing.of_file(self.folder / IDENTITY / SEALING)  # made in any mode: it is copied with the identity
        return Ground(
            store=self.store, blobs=tried(settings.blobs or self.folder / BLOBS),
            secret=secrets.token_bytes, uploads=Uploads(most=settings.uploads), epoch=self.leader.epoch,
            signing=self.authority.signing, watch=self._watch,
            memory=sealing.in_memory(self.folder), operator=operator, elsewhere=self._elsewhere,
        )  # fmt: skip

    def _bundle(self) -> None:
        """The source that clients get."""
        for learning in self.coordinator.learnings:
            if learning.served.source is not None:
                learning.bundle = self.coordinator.offer(bundle.build(learning.served.source).content)

    def _watch(self, event: str, told: Mapping[str, Any]) -> None:
        """What the coordinator tells, for logs and counters."""
        match event:
            case "session":
                self.metrics.sessions.labels(told["shape"]).inc()
            case "refused":
                self.metrics.refused.labels(told["code"]).inc()
            case "begun":
                self.metrics.round.labels(told["run"]).set(told["round"])
            case "committed" | "failed":
                self.metrics.steps.labels(told["run"], event).inc()
            case "storage failed":
                self.troubles.failed(event, str(told["error"]), run=str(told["run"]))
                return
        say(event, **told)

    def _after(self) -> None:
        """After every tick, in the coordinator's thread: the run folders, who is revoked, and whether all is done."""
        self.recording.update()
        now = time.time()
        if now - self._reloaded > 2.0:
            self._reloaded = now
            self.access.reload()
        if self.context is not None and now - self._renewed > DAY:
            self._renewed = now
            names = list(self.settings.names)
            self.access.shows(tls.renewed(self.context, self.authority, names, now=now))
        if self.settings.stay or any(c.state.phase is not Phase.OVER for c in self.coordinator.courses()):
            self._ended_at = None
            return
        self._ended_at = self._ended_at or now
        self._told_at = (self._told_at or now) if self.coordinator.all_told else None
        told = self._told_at is not None and now - self._told_at > LAST_WORDS
        if told or now - self._ended_at > self.settings.farewell:
            self.uvicorn.should_exit = True

    def invite(self, *, uses: int = INVITED, hours: float = HOURS) -> str:
        """A join token, shown once; for the population that all runs are for, if there is one."""
        one = common_population(learning.served for learning in self.coordinator.learnings)
        return self.access.invite(now=time.time(), hours=hours, uses=uses, population=one)

    def address(self) -> Address:
        """Where it can be reached, and what clients write; a new token is made for it."""
        url = self._url(self.port)
        extra = " --insecure-loopback" if self.settings.insecure_loopback else ""
        join = f"foedus join {url} --pin {self.authority.pin} --token {self.invite()}{extra}"
        bundles = [learning.bundle for learning in self.coordinator.learnings]
        return Address(url, join, tuple(each.digest.hex() for each in bundles if each is not None))

    def told(self) -> str:
        """What is printed when it listens."""
        if self._elsewhere is not None:
            return f"coordinating at {self._url(self.port)}; clients join at a gateway\n"
        return self.address().told("serving", self.notes())

    def notes(self) -> list[str]:
        """What is told besides."""
        found = {learning.served.population for learning in self.coordinator.learnings}
        return [
            f"clients of the population {name} join with another token: foedus members invite --population {name}"
            for name in sorted(found - {""})
            if len(found) > 1
        ] + self.warnings()

    def warnings(self) -> list[str]:
        """What is likely not as it was meant."""
        usual = owner_rules.Rules().least_others
        few = [run.served for run in self.coordinator.learnings if run.served.minimum <= usual]
        return [
            f"{run.name}: updates may be summed with no more than {run.minimum - 1} of others, and owners' rules, as "
            f"they come, decline fewer than {usual}. Write --minimum {usual + 1}, or have the owners write "
            f"least_others = {run.minimum - 1}"
            for run in few
        ]

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.uvicorn.servers[0].sockets[0].getsockname()[1])

    def close(self) -> None:
        """Give everything back."""
        with contextlib.suppress(RuntimeError):
            self.shell.shut()
        self.store.close()
        self.own.close()


class Ear(uvicorn.Server):
    """Listens; where it cannot, it says why, and does not end the process."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn has it.

        Raises:
            ConfigurationError: the address is taken, or not this machine's.
        """
        try:
            await super().startup(sockets)
        except SystemExit as end:
            where, why = f"{self.config.host}:{self.config.port}", end.__context__
            raise ConfigurationError(
                f"nothing can listen on {where}: {getattr(why, 'strerror', None) or why}. Perhaps another server does; "
                "write another port: --port 0, or Serving(port=0), takes any that is free"
            ) from why


def configuration(shell: Shell, settings: Serving, context: ssl.SSLContext | None) -> uvicorn.Config:
    """How a shell listens."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    spoken: Any = guarded(HttpToolsProtocol)
    if context is not None:
        spoken = over_tls(spoken, context)
    return uvicorn.Config(
        with_doorbell(shell, shell.application()), host=settings.host, port=settings.port,
        log_config=None, access_log=False, lifespan="on", loop="auto", http=spoken,
        ws=guarded_socket(WebSocketsSansIOProtocol), ws_max_size=1 << 16, ws_per_message_deflate=False,
        server_header=False, date_header=False, backlog=4096, timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=10, proxy_headers=settings.behind_proxy,
    )  # fmt: skip


def tasks(runs: Iterable[Served]) -> tuple[str, ...]:
    """Digests of the source bundles that clients are given."""
    return tuple(bundle.build(run.source).digest.hex() for run in runs if run.source is not None)


def learning_of(run: Served, settings: Serving) -> Learning:
    """A run with its trainer opened."""
    return Learning(run, open_trainer(checked(run.task), seed=run.seed, device=settings.device))


def _run(server: Server) -> None:
    """Run until the end; in a thread of its own where a loop runs here already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        blocking(server)
        return
    thread = threading.Thread(target=blocking, args=(server,), daemon=True)
    thread.start()
    thread.join()


def blocking(server: Listening) -> None:
    """Serve until the end, in a loop of its own."""

    async def main() -> None:
        serving = asyncio.ensure_future(server.uvicorn.serve())
        while not server.uvicorn.started and not serving.done():
            await asyncio.sleep(0.01)
        try:
            if server.uvicorn.started and server.settings.progress:
                print(await asyncio.to_thread(server.told), flush=True)
        except BaseException:
            server.uvicorn.should_exit = True
            raise
        finally:
            await serving

    with contextlib.suppress(ImportError):
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
            return
    asyncio.run(main())


__all__ = ["Address", "Server", "blocking", "configuration", "learning_of", "serve", "serve_all", "tasks"]
