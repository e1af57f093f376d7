"""One federation on several machines: gateways, aggregation workers, a coordinator, and a broker between them.

    --role gateway       talks with clients; any number of them, behind any balancer
    --role aggregator    merges what gateways have; any number, they share the partitions
    --role coordinator   rounds, models, the record; one leads, others wait to take over
    --role all           all three in one process: to try it out, or as the first machine of several

All share one database (PostgreSQL, where they are processes), one place for blobs, and a copy of the server's
``identity`` folder, in which also the key lies that partial sums are encrypted under: mount it as a secret, in memory.

Not here: the parts (``serve.py``, ``gateway.py``, ``brokers``).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import uvicorn

from foedus.errors import ConfigurationError, FoedusError
from foedus.net import sealing
from foedus.net.blobs import Blobs, tried
from foedus.net.brokers.aggregation import Worker
from foedus.net.brokers.broker import Broker
from foedus.net.brokers.elsewhere import Elsewhere, Keeper, check_fits
from foedus.net.brokers.kafka import KafkaBroker
from foedus.net.brokers.memory import MemoryBroker
from foedus.net.brokers.partials import Partials
from foedus.net.gateway import Gateway, claims
from foedus.net.http import Shell
from foedus.net.identity import routes as door
from foedus.net.identity import tls
from foedus.net.identity.access import Access
from foedus.net.identity.authority import Authority
from foedus.net.identity.callers import OPERATE, Caller
from foedus.net.identity.files import private_folder
from foedus.net.identity.limits import Rate
from foedus.net.logs import say
from foedus.net.metrics import Metrics
from foedus.net.serve import (
    BLOBS,
    DATABASE,
    DAY,
    HOURS,
    IDENTITY,
    INVITED,
    Address,
    Ear,
    Server,
    blocking,
    configuration,
    learning_of,
    tasks,
)
from foedus.net.served import Served, common_population
from foedus.net.serving import Role, Serving
from foedus.net.store import SqlStore, open_store
from foedus.net.troubles import Troubles
from foedus.net.uploads import Uploads
from foedus.record.folder import Record, read

__all__ = ["Aggregator", "GatewayServer", "open_broker", "serve_roles"]

TOPIC, GROUP = "foedus-receipts", "foedus-aggregators"
FLUSH_S = 0.3  # seconds between two writes of partial sums
SUMS = "sums.key"


def open_broker(address: str) -> Broker:
    """The broker of an address.

    >>> open_broker("memory:").close()
    """
    if address == "memory:":
        return MemoryBroker()
    if address.startswith("kafka://"):
        broker = KafkaBroker(address)
        try:
            broker.check()
        except BaseException:
            broker.close()
            raise
        return broker
    raise ConfigurationError(f"{address!r} is no broker; write kafka://host:9092, or memory: within one process")


def serve_roles(runs: Sequence[Served], settings: Serving) -> list[Record]:
    """Carry out this process's role until the runs are over; records where it coordinates."""
    role, memory = settings.role, settings.broker == "memory:"
    if role is not Role.ALL and (memory or settings.database is None or settings.blobs is None):
        raise ConfigurationError(
            f"--role {role} works with processes on other machines: give --broker kafka://..., --database "
            "postgresql://... and --blobs s3://... (or a folder that all of them see)"
        )
    broker = open_broker(str(settings.broker))
    try:
        if role is Role.GATEWAY:
            _until_told(GatewayServer(settings, broker, runs=runs))
            return []
        if role is Role.AGGREGATOR:
            _aggregating(runs, settings, broker)
            return []
        if role is Role.COORDINATOR:
            return _coordinating(runs, settings)
        return _all(runs, settings, broker)
    finally:
        broker.close()


def _aggregating(runs: Sequence[Served], settings: Serving, broker: Broker) -> None:
    worker = Aggregator(runs, settings, broker)
    if settings.progress:
        print(f"merging what gateways tell {settings.broker} of; clients join at a gateway", flush=True)
    try:
        worker.run(threading.Event())
    except KeyboardInterrupt:
        worker.close()


def _coordinating(runs: Sequence[Served], settings: Serving) -> list[Record]:
    server = Server(runs, settings, elsewhere=_elsewhere(settings))
    try:
        _checked(server)
        blocking(server)
        return [read(server.recording.path(run.name)) for run in runs]
    finally:
        server.close()


def _all(runs: Sequence[Served], settings: Serving, broker: Broker) -> list[Record]:
    """Three roles in one process, over loopback."""
    inner = replace(settings, port=_free_port(), host="127.0.0.1", progress=False, names=("localhost",))
    server = Server(runs, inner, elsewhere=_elsewhere(settings))
    stop = threading.Event()
    try:
        _checked(server)
        gateway = GatewayServer(settings, broker, server=server, runs=runs)
        worker = Aggregator(runs, settings, broker)
        threads = [
            threading.Thread(target=blocking, args=(server,), name="coordinator"),
            threading.Thread(target=worker.run, args=(stop,), name="aggregator"),
        ]
        for thread in threads:
            thread.start()
        threading.Thread(target=_with_it, args=(threads[0], gateway), daemon=True).start()
        _until_told(gateway)
        server.uvicorn.should_exit = True
        stop.set()
        for thread in threads:
            thread.join()
        return [read(server.recording.path(run.name)) for run in runs]
    finally:
        stop.set()
        server.close()


def _with_it(coordinator: threading.Thread, gateway: GatewayServer) -> None:
    """The gateway ends when the coordinator does."""
    coordinator.join()
    gateway.uvicorn.should_exit = True


def _until_told(gateway: GatewayServer) -> None:
    try:
        blocking(gateway)
    finally:
        gateway.close()


def _checked(server: Server) -> None:
    for learning in server.coordinator.learnings:
        check_fits(learning)


class Aggregator:
    """One worker of the group, in a thread or a process of its own.

    Args:
        runs: what is served; their models are followed in the store.
        settings: folder, database, blobs.
        broker: where receipts are.
    """

    def __init__(self, runs: Sequence[Served], settings: Serving, broker: Broker) -> None:
        self._store = _store(settings)
        authority = Authority.kept(Path(settings.folder) / IDENTITY, now=time.time())
        access = Access(authority, self._store)
        self._way = _way(settings, authority, auth=_Itself(access))
        learnings = {run.name: learning_of(run, settings) for run in runs}
        for learning in learnings.values():
            check_fits(learning)
        keep = Keeper(self._store, _blobs(settings), learnings=learnings, vault=_vault(settings), way=self._way)
        partials = Partials(self._store.engine, TOPIC)
        self._worker = Worker(
            broker, topic=TOPIC, group=GROUP, partials=partials, keep=keep,
            watch=lambda event, receipt: say(event, run=receipt.run, round=receipt.round, position=receipt.position),
        )  # fmt: skip

    def run(self, stop: threading.Event) -> None:
        """Merge until told to stop."""
        written, troubles = time.monotonic(), Troubles(time.time)
        while not stop.is_set():
            try:
                self._worker.step(0.1)
                if time.monotonic() - written > FLUSH_S:
                    self._worker.flush()
                    written = time.monotonic()
            except FoedusError as error:
                troubles.failed("aggregation failed", error)
                stop.wait(1.0)
        self.close()

    def close(self) -> None:
        """Write what was merged, and let others have the partitions."""
        self._worker.close()
        self._way.close()
        self._store.close()


class GatewayServer:
    """A gateway with its port.

    Args:
        settings: where it listens, folder, database.
        broker: where receipts go.
        server: the coordinator, where it is in the same process.
        runs: what is served, to tell clients which task they are asked to approve.
    """

    def __init__(
        self, settings: Serving, broker: Broker, *, server: Server | None = None, runs: Sequence[Served] = ()
    ) -> None:  # fmt: skip
        self.settings, self._server, self._runs = settings, server, runs
        now = time.time()
        self.authority = Authority.kept(Path(settings.folder) / IDENTITY, now=now)
        self.store = _store(settings)
        plain = settings.insecure_loopback or settings.behind_proxy
        context = None if plain else tls.server_context(self.authority, list(settings.names), now=now)
        channel = None if settings.behind_proxy else "" if plain else tls.shown(self.authority)
        self.access = Access(self.authority, self.store, channel=channel)
        self._way = _way(settings, self.authority)
        port = settings.port or _free_port()
        scheme = "http" if plain else "https"
        self.url = f"{scheme}://{settings.names[0] if settings.names else settings.host}:{port}"
        self.gateway = Gateway(
            self.store, self.access, broker=broker, topic=TOPIC, own=self.url, way=self._way,
            uploads=Uploads(most=settings.uploads),
        )  # fmt: skip
        rate = Rate(per_s=20.0, burst=1000)
        self.shell = Shell(
            self.gateway, self.access, clock=time.time, metrics=Metrics(),
            more=[
                *door.routes(self.access, clock=time.time, rate=rate, aside=asyncio.to_thread),
                claims(self.gateway, clock=time.time),
            ],
        )  # fmt: skip
        self.shell.after = self._after
        self._reloaded = now
        self._context, self._renewed = context, now
        self.uvicorn: uvicorn.Server = Ear(configuration(self.shell, replace(settings, port=port), context))

    def _after(self) -> None:
        if time.time() - self._reloaded > 2.0:
            self._reloaded = time.time()
            self.access.reload()
        if self._context is not None and time.time() - self._renewed > DAY:
            self._renewed = time.time()
            names = list(self.settings.names)
            self.access.shows(tls.renewed(self._context, self.authority, names, now=self._renewed))

    def told(self) -> str:
        """What is printed when it listens."""
        extra = " --insecure-loopback" if self.settings.insecure_loopback else ""
        one = common_population(self._runs)
        token = self.access.invite(now=time.time(), hours=HOURS, uses=INVITED, population=one)
        join = f"foedus join {self.url} --pin {self.authority.pin} --token {token}{extra}"
        notes = self._server.notes() if self._server else ()
        return Address(self.url, join, tasks(self._runs)).told("a gateway", notes)

    def close(self) -> None:
        """Give everything back."""
        self._way.close()
        self.store.close()


class _Itself(httpx.Auth):
    """A worker's requests to gateways: with tickets that the federation's own key signs."""

    def __init__(self, access: Access) -> None:
        self._access, self._ticket, self._until = access, "", 0.0

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """As httpx has it."""
        now = time.time()
        if now > self._until:
            caller = Caller(-1, "aggregator", OPERATE)
            self._ticket, self._until = self._access.mint(caller, now=now, lifetime_s=900.0), now + 600.0
        request.headers["Authorization"] = f"Bearer {self._ticket}"
        yield request


def _way(settings: Serving, authority: Authority, *, auth: httpx.Auth | None = None) -> httpx.Client:
    """An HTTP client for the federation's own processes, and for nobody else's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cafile=authority.folder / "authority.pem")
    alone = httpx.Limits(max_keepalive_connections=0)  # whoever ends is not held up by a connection that idles
    return httpx.Client(verify=context, auth=auth, timeout=30.0, trust_env=False, limits=alone)


def _store(settings: Serving) -> SqlStore:
    return open_store(settings.database or f"sqlite:///{Path(settings.folder) / DATABASE}")


def _blobs(settings: Serving) -> Blobs:
    return tried(settings.blobs or Path(settings.folder) / BLOBS)


def _vault(settings: Serving) -> sealing.Vault:
    return sealing.of_file(private_folder(Path(settings.folder) / IDENTITY) / SUMS)


def _elsewhere(settings: Serving) -> Elsewhere:
    partials = Partials(_store(settings).engine, TOPIC)
    return Elsewhere(partials, _blobs(settings), _vault(settings))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
