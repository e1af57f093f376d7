"""``join``: take part in a served federation with one's own data.

Once: enrol with the join token, whose server is checked against the pin before anything is said. Then an agent works
until the run is over, or is stopped; started again with the same folder, it goes on where it was.

Not here: what the agent does (``agent.py``), what the owner rules (``owner``).
"""

from __future__ import annotations

import asyncio
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from foedus.errors import ConfigurationError, NotTrusted, Unreachable
from foedus.net.agent import Agent, Data, Place, WallClock
from foedus.net.bell import Line, listen
from foedus.net.identity.authority import plain_pin
from foedus.net.identity.credentials import Credentials
from foedus.net.identity.files import private_folder
from foedus.net.identity.keys import SigningKey
from foedus.net.identity.tls import Outward, permitted
from foedus.net.locks import alone
from foedus.net.owner.consent import plain
from foedus.net.owner.folder import OwnerFolder, default
from foedus.net.owner.rules import Finding
from foedus.net.owner.surroundings import Surroundings, observe
from foedus.net.reach import Reach
from foedus.net.sandbox import Limits, Walls
from foedus.net.training import Training
from foedus.protocol.messages import CheckIn, Kind
from foedus.record.versions import versions

__all__ = ["Joined", "Joining", "check", "join"]

TRIES = 4  # to join over a line that loses much; where nobody listens, it is told at once


@dataclass(frozen=True, kw_only=True)
class Joining:
    """How a client joins, and what it allows there and then.

    Attributes:
        folder: the owner's folder; by default one in the user's own data folder. It holds rules, consent, the
            ledger and what waits to be sent; started again with it, the client goes on.
        pin: the fingerprint of the server's authority, from the join command; ``None`` only for a server that a public
            authority vouches for.
        token: from the join command; needed once.
        name: what the client wants to be called there.
        run: take part in this run only.
        dataset: the name by which the rules offer the data; by default that of the object, or of the part.
        part: which client of a ``Clients`` the data is of.
        approve: digests of tasks that may run, besides those approved by hand and in the rules.
        silo_key: a file with the key that the silos share, for encrypted sums; by default ``silo.key`` in the owner's
            folder.
        consent: who agrees, as they call themselves: records consent for this server, if there is none.
        evaluate: also evaluate the model on what is held out, and send the figures.
        limits: what training may take of the machine.
        authorities: a file of more certificate authorities for TLS, in PEM form: an organisation's own proxy.
        system_authorities: trust those of the operating system for TLS, too: a reverse proxy with a public certificate.
        insecure_loopback: let plain HTTP through to this very machine, for trying things out.
        surroundings: how it is found out whether the machine is idle, on power, on a metered network.
        once: stop when there is something to wait for.
        stay: look for further runs of the server when one is over.
        tell: what to do with a line for the owner to read.

    Example:
        >>> Joining(pin="ab" * 32, token="t-1", approve=["9f86d081884c7d65"]).evaluate
        True
    """

    folder: str | Path | None = None
    pin: str | None = None
    token: str | None = field(default=None, repr=False)
    name: str = ""
    run: str = ""
    dataset: str = ""
    part: str = ""
    approve: Sequence[str] = ()
    silo_key: Path | None = None
    consent: str = ""
    evaluate: bool = True
    limits: Limits = field(default_factory=Limits)
    authorities: Path | None = None
    system_authorities: bool = False
    insecure_loopback: bool = False
    surroundings: Callable[[], Surroundings] = observe
    once: bool = False
    stay: bool = False
    tell: Callable[[str], None] = print

    def __post_init__(self) -> None:
        for digest in self.approve:
            if not re.fullmatch(r"[0-9a-fA-F]{16,64}", str(digest)):
                raise ConfigurationError(
                    f"approve names tasks by 16 to 64 hexadecimal digits of their digest; not {digest!r}"
                )
        if self.pin is not None and not re.fullmatch(r"[0-9a-f]{64}", plain_pin(self.pin)):
            raise ConfigurationError(f"a pin is the 64 hexadecimal digits of a SHA-256; not {self.pin!r}")

    @property
    def owner(self) -> OwnerFolder:
        """The owner's folder."""
        return OwnerFolder(default() if self.folder is None else Path(self.folder).absolute())

    @property
    def outward(self) -> Outward:
        """How the server is reached beyond the plain way."""
        return Outward(self.system_authorities, self.authorities, self.insecure_loopback)


class Joined(NamedTuple):
    """What became of it.

    Attributes:
        sessions: shapes of the last sessions, e.g. ``-v[]+^``.
        models: the folder with the final models, if there are any.
    """

    sessions: tuple[str, ...]
    models: Path


def join(url: str, *, data: Any, settings: Joining | None = None) -> Joined:
    """Take part in a served federation with one's own data, until it is over or interrupted.

    Args:
        url: the server's address.
        data: what to train on: Examples, a pair (x, y), Clients (and whose of them: ``Joining(part=...)``), an
            ExampleStore, a function without arguments that gives one of these, or ``"module:object"`` or
            ``"path/file.py:object"``, which is imported where training happens, without network.
        settings: everything else.

    Raises:
        ConfigurationError: there is no token where one is needed, or no consent.
        OwnerRefuses: with ``once``, if the owner's rules say no.
        NotTrusted: it is not the server that was pinned.
        Unreachable: it was not there to join; one that was joined before is waited for.

    Example:
        >>> settings = Joining(pin="3f1c...", token="...", consent="Dr Weiss")  # doctest: +SKIP
        >>> join("https://fl.example.org:8765", data=(x, y), settings=settings)  # doctest: +SKIP
    """
    return asyncio.run(_joined(url, data, settings or Joining()))


async def _joined(url: str, data: Any, settings: Joining) -> Joined:
    address = permitted(plain(url), settings.outward)
    agreed = _agreed(address, settings)
    folder = settings.owner.server(address)
    told = f"another agent works for {address} with the folder {settings.owner.path}; one is enough"
    with alone(folder / "agent.lock", told):
        mine = await _credentials(address, folder / "identity", settings)
        if not agreed:  # for this server, now that it is known to be the one
            called, now = _called(data, settings), WallClock().now()
            settings.owner.consents().give(address, who=settings.consent, when=now, data=called)
        settings.tell(f"joined {mine.url} as {mine.name}; it is called now and then, and what it asks for is told here")
        if settings.name not in ("", mine.name):
            settings.tell(f"the name {settings.name} is not used: a client keeps the one that it joined by")
        clock = WallClock()
        reach = Reach(mine, settings.outward, clock.now)
        await reach.renewed()
        agent = _agent(mine, data, settings, Outside(reach, clock))
        way = reach.transport
        line = Line(lambda: way.address, way.moved, reach.context, lambda: reach.ticket, settings.run)
        beside = [asyncio.create_task(listen(line, lambda _: clock.ring())), asyncio.create_task(reach.kept_fresh())]
        try:
            await agent.run(once=settings.once)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
    return Joined(tuple(agent.sessions), folder / "models")


async def check(url: str, *, data: Any, settings: Joining) -> tuple[list[Finding], Walls]:
    """What would be allowed now, and why not; what holds around training. Nothing is sent but a look at who the
    server is.

    Args:
        url, data, settings: as for :func:`join`.
    """
    from foedus.net.identity.visits import discover

    address = permitted(plain(url), settings.outward)
    folder = settings.owner.server(address)
    clock = WallClock()
    mine = _joined_before(folder / "identity", settings)
    if mine is None:
        trust = await discover(address, pin=settings.pin, outward=settings.outward, now=clock.now())
        mine = Credentials.begun(folder / "identity", url=address, trust=trust)
    with alone(folder / "agent.lock", f"an agent works for {address} already; it says itself what is not allowed"):
        agent = _agent(mine, data, settings, Outside(Reach(mine, settings.outward, clock.now), clock))
        try:
            walls = await agent.training.start()
            return await agent.findings(), walls
        finally:
            await agent.close()


class Outside(NamedTuple):
    """What of an agent is not its own: the way to the server, and time."""

    reach: Reach
    clock: WallClock


def _agent(mine: Credentials, data: Any, settings: Joining, outside: Outside) -> Agent:
    place = Place(mine.url, mine.trust.pin, mine.trust.signing, settings.owner, settings.silo_key)
    scratch = place.folder / "training"
    private_folder(scratch)
    kinds = (Kind.TRAIN, Kind.EVALUATE) if settings.evaluate else (Kind.TRAIN,)
    return Agent(
        place,
        outside.reach.transport,
        Training(settings.limits, scratch),
        _data(data, settings),
        CheckIn(run=settings.run, kinds=kinds, software=versions()),
        outside.clock,
        settings.surroundings,
        approve=tuple(digest.lower() for digest in settings.approve),
        stay=settings.stay,
        tell=settings.tell,
    )


def _data(data: Any, settings: Joining) -> Data:
    """The owner's data: where the training process finds it, or how the agent reads it."""
    if isinstance(data, str):
        name = settings.dataset or settings.part or data.rpartition(":")[2]
        return Data(name, target=data, folder=str(Path.cwd()), part=settings.part)

    def read() -> bytes:
        from foedus.net.source import own, to_bytes

        return to_bytes(own(data, settings.part))

    name = settings.dataset or settings.part or getattr(data, "__name__", "data")
    return Data(name, read=read)


def _called(data: Any, settings: Joining) -> str:
    """The data, as it stands in the words of consent."""
    own = data.rpartition(":")[2] if isinstance(data, str) else getattr(data, "__name__", "data")
    part = f', part "{settings.part}"' if settings.part else ""
    return f'the data set "{settings.dataset or own}"{part}'


def _agreed(address: str, settings: Joining) -> bool:
    """Whether consent is there; if not, it is given by name.

    Raises:
        ConfigurationError: it was withdrawn, or nobody gives it.
    """
    consents = settings.owner.consents()
    records = [record for record in consents.records() if record.server == address]
    if consents.holds(address) or (records and records[-1].given):  # perhaps for some tasks only
        return True
    if records:
        raise ConfigurationError(
            f"consent for {address} was withdrawn; it is given again by foedus consent give {address}, not in passing"
        )
    if not settings.consent:
        raise ConfigurationError(
            f"there is no consent to train for {address}. Read what is agreed to and give it: foedus consent give "
            f"{address} --who NAME, or Joining(consent=NAME)"
        )
    return False


async def _credentials(address: str, folder: Path, settings: Joining) -> Credentials:
    """Who the client is there: as it has joined before, or by the token."""
    from foedus.net.identity.visits import enrol

    clock = WallClock()
    mine = _joined_before(folder, settings)
    if mine is not None:
        return mine
    if not settings.token:
        raise ConfigurationError(
            f"{address} is not joined yet, which takes the token of its join command: --token, or Joining(token=...)"
        )
    name = settings.name or _name(settings.part, folder)
    tries = TRIES
    while True:
        try:
            return await enrol(
                address, folder=folder, pin=settings.pin, token=settings.token, name=name, outward=settings.outward,
                now=clock.now(),
            )  # fmt: skip
        except Unreachable as error:
            tries -= 1
            if not tries or not _late(error):
                raise
            settings.tell(f"{address} did not answer in time; it is asked again")


def _late(error: Unreachable) -> bool:
    """Whether a server may be there, and only the line is bad."""
    import httpx

    return isinstance(error.__cause__, httpx.TimeoutException | TimeoutError)


def _joined_before(folder: Path, settings: Joining) -> Credentials | None:
    """Who the client is where it has joined; the pin of then holds, and no other."""
    if not (folder / "joined.json").exists():
        return None
    mine = Credentials.read(folder, now=WallClock().now())
    if settings.pin is not None and plain_pin(settings.pin) != mine.trust.pin:
        raise NotTrusted(
            f"this folder has joined the server with the pin {mine.trust.pin}, and {settings.pin} was given. Leave "
            "out the pin, or choose another folder for another server"
        )
    return mine


def _name(part: str, folder: Path) -> str:
    """A name that is the same when the answer to an enrolment was lost and it is asked for again: the key's own."""
    plain_part = re.sub(r"[^A-Za-z0-9_-]+", "-", part or platform.node() or "client").strip("-") or "client"
    private_folder(folder)
    return f"{plain_part[:40]}-{SigningKey.kept(folder / 'key.pem').public.raw.hex()[:6]}"
