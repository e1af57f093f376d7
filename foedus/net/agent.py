"""The agent: a client's side of a served federation, for as long as it runs.

A small asyncio program that calls a server now and then. What to say next is decided by a pure machine
(``protocol/session.py``); the agent carries its actions out, each for certain before the next: connections
(``transport.py``), files (``journal.py``), training (``training.py``), and the owner's word (``owner``), which is
asked before every check-in, before anything is trained and before anything leaves. It loads no framework and no code
of a task.

Killed at any moment it goes on from its journal: the bytes of an update are on the disk before the first of them
leaves, and stay there until they are counted or never will be; sent again, they are the same bytes. The ledger has
its line before they leave.

Not here: joining (``join.py``), who the client is (``identity``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from foedus.errors import (
    BudgetSpent,
    BundleRefused,
    ConfigurationError,
    NotTrusted,
    OwnerRefuses,
    ProtocolError,
    SecureAggregationFailed,
    SignatureInvalid,
    TrainingError,
    Unreachable,
    WorkerDied,
)
from foedus.net.identity.files import private_file, private_folder, read_secret
from foedus.net.identity.keys import PublicKey
from foedus.net.identity.signed import check, check_content
from foedus.net.journal import About, Journal
from foedus.net.owner import rules as owner_rules
from foedus.net.owner.approvals import Approvals
from foedus.net.owner.folder import OwnerFolder, file_name
from foedus.net.owner.ledger import Departure
from foedus.net.owner.releases import Release
from foedus.net.owner.rules import Finding, Protections, Rules, Situation, refused
from foedus.net.owner.spending import Row
from foedus.net.owner.surroundings import Surroundings
from foedus.net.owner.withdrawal import forget
from foedus.net.training import Training
from foedus.net.transport import Transport
from foedus.protocol import session
from foedus.protocol.messages import ENCRYPTED, SECURE, Accepted, Blob, CheckIn, Finished, Kind, Later, Problem
from foedus.record import files

if TYPE_CHECKING:  # masks take numpy and cryptography: imported by those who need them
    from foedus.protocol.secagg.client import Memory
    from foedus.protocol.secagg.messages import Promise

__all__ = ["Agent", "Clock", "Data", "Place", "promised"]

QUIET_S, STILL_S = 5.0, 600.0  # seconds of silence after which it is told what is waited for; and again
LOOK_S = 60.0  # how often the owner's rules are asked again while they say no
COOL_S = 300.0  # the training process is ended before a rest that is longer
GONE = 5  # calls in vain after which a server whose run is over is taken to be gone, some 20 seconds
DATA_S = 600.0  # how long what was found out about the data holds
DAY = "%Y-%m-%d"

OPENED = "what the sum of encrypted updates opens to"  # in the ledger
BUDGET = "privacy-budget"  # a protection that a server promises: "privacy-budget=8.0"

Event = session.Event | session.Rest


class Clock(Protocol):
    """Time, as the agent sees it."""

    def now(self) -> float:
        """Seconds since 1970."""

    async def rest(self, seconds: float) -> None:
        """Wait; shorter if there is something to look at."""


class WallClock:
    """The machine's own clock. ``ring`` ends a rest early: the doorbell."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def now(self) -> float:
        """See :class:`Clock`."""
        return time.time()

    def ring(self) -> None:
        """Wake whoever rests."""
        self._rung.set()

    async def rest(self, seconds: float) -> None:
        """See :class:`Clock`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._rung.wait(), max(0.0, seconds))
        self._rung.clear()


class Place(NamedTuple):
    """Where an agent works: which server, and where its files are.

    Attributes:
        address: the server's.
        pin: its authority's fingerprint; empty where a public authority vouches for it.
        signing: whose signature orders, bundles and models must bear.
        owner: the owner's folder.
        key: a file with the key that the silos share, for encrypted sums; ``None``: the one in the owner's folder.
    """

    address: str
    pin: str
    signing: PublicKey
    owner: OwnerFolder
    key: Path | None = None

    @property
    def silo_key(self) -> Path:
        """The file with the key that the silos share; there may be none."""
        return self.owner.silo_key if self.key is None else self.key

    @property
    def folder(self) -> Path:
        """What is of this server."""
        return self.owner.server(self.address)


@dataclass(frozen=True)
class Data:
    """The owner's data: its name, and how it is read.

    Attributes:
        name: by which the rules offer it.
        target: ``module:object`` that the training process imports; or
        read: a function that gives its bytes (``source.to_bytes``), asked by the agent.
        folder: where modules are looked for.
        part: whose, of several clients'.
    """

    name: str
    target: str = ""
    read: Callable[[], bytes] | None = None
    folder: str = ""
    part: str = ""


class _NotApproved(OwnerRefuses):
    """The task waits for its owner's word."""


class _Known(NamedTuple):
    """What was found out about the data."""

    examples: int
    findings: tuple[Finding, ...]
    when: float


class _Fetched(NamedTuple):
    """What came for a round."""

    orders: bytes
    kept: tuple[bytes, ...]


class _Made(NamedTuple):
    """Bytes that were made and are not in the journal yet."""

    content: bytes
    kept: bytes | None
    about: About


class Leaving(NamedTuple):
    """What the ledger says of bytes: of which round they are, how many, and their digest."""

    round: int
    size: int
    digest: bytes


@dataclass
class Agent:
    """One client of one server.

    Args:
        place: the server, and the owner's folder.
        transport: how the server is reached.
        training: the training process.
        data: what is trained on.
        hello: what is said at every check-in; number of examples and demands are added.
        clock: time.
        surroundings: how the machine's state is found out.
        approve: digests of tasks that may run besides those in the rules.
        stay: look for further runs when one is over.
        tell: what to do with a line for the owner to read.
        draw: gives numbers from 0 to 1, for moments of its own choice.
    """

    place: Place
    transport: Transport
    training: Training
    data: Data
    hello: CheckIn
    clock: Clock
    surroundings: Callable[[], Surroundings]
    approve: tuple[str, ...] = ()
    stay: bool = False
    tell: Callable[[str], None] = print
    draw: Callable[[], float] = field(default_factory=lambda: random.SystemRandom().random)

    def __post_init__(self) -> None:
        self.journal = Journal(private_file(self.place.folder / "agent.sqlite"))
        self.ledger = self.place.owner.ledger()
        self.approvals = Approvals(self.place.owner.path)
        self.state = session.State(self.hello, self.journal.held(), finished=self._models())
        self._known: _Known | None = None
        self._fetched: _Fetched | None = None
        self._made: _Made | None = None
        self._empty = False  # all but the data may work, and there is none
        self._over = False  # the server said that the run is
        self._cost: tuple[str, str, Row] | None = None  # of what was trained and is not in the journal yet
        self._promise: Promise | None = None  # of masks, in the round at hand
        self._sealed = 0  # where updates are encrypted in the round at hand: fewest in a sum
        self._noised = False  # whether what is sent in the round at hand has noise of this client's own
        self._release: Release | None = None  # what it is then
        self._distrust = ""  # why a sum was refused that the server gave to be decrypted
        self._attempt = 1  # of the seat that was given last
        self._said, self._said_at = "", float("-inf")
        self._waited = False  # whether what was said last is what is waited for
        self.sessions: list[str] = []  # shapes, the latest last

    async def run(self, *, once: bool = False) -> None:
        """Take part until the run is over; ``once``: until there is something to wait for.

        Raises:
            OwnerRefuses: with ``once``, if the owner's word is no.
            SecureAggregationFailed: the server's encrypted sum is not what it must be.
            FoedusError: what only a person can mend: a full disk, damaged files.
        """
        try:
            await self.work(once=once)
        finally:
            await self.close()

    async def work(self, *, once: bool = False) -> None:
        """As :meth:`run`, and leave everything open at the end."""
        event: Event | None = await self._woken(once)
        while event is not None:
            if isinstance(event, session.Rest):
                if self._distrust:
                    raise SecureAggregationFailed(
                        f"{self._distrust} This client has declined and stopped: find out why before it is started "
                        "again"
                    )
                if once or (self._over and not self.stay and self._done()):
                    return
                await self._rest(event.until)
                event = await self._woken(once)
            event = await self.advance(event)

    def _done(self) -> bool:
        """Whether nothing is to be asked any more once the run is over, or nobody is there who could answer."""
        if self.state.held and self.state.failures >= GONE:
            self._say("the server is gone; how the last update stands is asked when this is started again")
        return not self.state.held or self.state.failures >= GONE

    async def advance(self, event: session.Event) -> Event | None:
        """Carry out what an event leads to; the next event, or a rest, or ``None`` when all is over."""
        self.state, actions = session.step(self.state, event)
        follows: Event | None = None
        for action in actions:
            follows = await self._act(action) or follows
        if follows is None and self.state.phase is not session.Phase.OVER:
            return session.Rest(self.clock.now() + LOOK_S)
        return follows

    async def close(self) -> None:
        """End the training process and close files; nothing is lost."""
        await self.training.close()
        await self.transport.close()
        self.journal.close()

    # --- the owner's word

    async def findings(self) -> list[Finding]:
        """What the owner's rules say of working for this server now."""
        rules, place = self._rules(), self.place
        agreed = place.owner.consents().holds(place.address)
        told = f"there is consent for {place.address}"
        if not agreed:
            told = f"there is no consent for {place.address}; to give it: foedus consent give {place.address}"
        found = [Finding("consent", agreed, told), *owner_rules.server(rules, place.address, place.pin)]
        found += owner_rules.moment(rules, self._situation(rules))
        self._empty = False
        if all(each.passes for each in found):  # the data is not even looked at before
            known = await self._examined(rules)
            self._empty = known.examples == 0
            found += [*owner_rules.data(rules, self.data.name, known.examples), *known.findings]
        return found

    def _rules(self) -> Rules:
        rules = self.place.owner.rules()
        return replace(rules, approved=(*rules.approved, *self.approve))

    async def _woken(self, once: bool) -> session.Woke:
        """Wait until the owner's word is yes."""
        while reasons := await self._reasons():
            await self._nothing()
            if once:
                raise OwnerRefuses(*reasons)
            self._say(f"not now: {'; '.join(reasons)}")
            await self._rest(self.clock.now() + LOOK_S)
        rules, examples = self._rules(), self._known.examples if self._known else None
        if examples and not rules.tell_examples:  # that there are any; what is trained may have to hide how many
            examples = None
        if self.journal.fact(self._ended) is not None:
            examples = 0
        asked = {SECURE: rules.secure_others is not None, ENCRYPTED: rules.encrypted_others is not None}
        demands = tuple(name for name, wanted in {**asked, BUDGET: rules.budget}.items() if wanted)
        kinds = (*self.hello.kinds, *((Kind.DECRYPT,) if self.place.silo_key.exists() else ()))
        hello = replace(self.hello, kinds=kinds, examples=examples, protections=demands)
        self.state = replace(self.state, hello=hello)
        return session.Woke(self.clock.now(), self.draw())

    @property
    def _ended(self) -> str:
        """Under which name the journal has it that nothing is trained any more."""
        return f"spent {self.hello.run} {self._rules().most_example_epsilon}"  # another rule may say otherwise

    async def _nothing(self) -> None:
        """Where all but the data may work, and there is none: tell the server so, once; no round waits for it then."""
        if not self._empty or self.state.hello.examples == 0:
            return
        hello = replace(self.state.hello, examples=0)
        with contextlib.suppress(Unreachable, ProtocolError, NotTrusted):  # it is told again
            await self.transport.ask(replace(hello, pending=()))
            self.state = replace(self.state, hello=hello)

    async def _reasons(self) -> tuple[str, ...]:
        if not self.place.owner.consents().holds(self.place.address) and self.state.held:
            self._withdrawn()
        try:
            return refused(await self.findings())
        except (TrainingError, WorkerDied) as error:
            return (f"the data cannot be read: {error}",)

    def _withdrawn(self) -> None:
        forget(self.place.owner, self.place.address)
        self.state = session.State(self.hello, finished=self.state.finished)
        self._say("consent was withdrawn: what waited to be sent is deleted")

    def _situation(self, rules: Rules) -> Situation:
        asked = rules.idle_minutes or rules.on_power or rules.unmetered
        seen = self.surroundings() if asked else Surroundings()
        now = datetime.fromtimestamp(self.clock.now())
        return Situation(now, *seen, sent=self.ledger.bytes, rounds_today=self._rounds(now.strftime(DAY)))

    def _rounds(self, day: str) -> int:
        last, _, count = (self.journal.fact("rounds") or b"").decode().partition(" ")
        return int(count) if last == day else 0

    async def _examined(self, rules: Rules) -> _Known:
        """How many examples there are, and what the checks say; looked at anew now and then, and before training."""
        if self._known is None or self.clock.now() - self._known.when > DATA_S:
            await self._read_data(rules, 1)
        assert self._known is not None
        return self._known

    async def _read_data(self, rules: Rules, round: int) -> _Known:
        blobs = [] if self.data.read is None else [await asyncio.to_thread(self.data.read)]
        asked = {"target": self.data.target, "folder": self.data.folder, "part": self.data.part, "round": round}
        answer = await self.training.ask({"do": "data", **asked, "checks": asdict(rules.checks)}, blobs)
        findings = tuple(Finding(str(r), bool(p), str(t)) for r, p, t in answer.said["findings"])
        self._known = _Known(int(answer.said["examples"]), findings, self.clock.now())
        return self._known

    # --- actions

    async def _act(self, action: session.Action) -> Event | None:
        """Carry one action out; what came of it."""
        if isinstance(action, session.Rest):
            return action
        if isinstance(action, session.Log):
            self.sessions = [*self.sessions[-99:], action.shape]
        elif isinstance(action, session.Keep | session.Rename | session.Settle):
            self._write(action)
        else:
            return await self._try(action)
        return None

    async def _try(self, action: session.Action) -> Event:
        """Carry out what may fail for reasons outside of this machine."""
        try:
            return await self._do(action)
        except (Unreachable, ProtocolError) as error:
            self._say(str(error))
            return session.Lost(self.clock.now(), self.draw())
        except BudgetSpent as error:  # the server hears it now, and at every check-in that there is nothing to train on
            self._say(f"this client trains no more in run {self.hello.run or 'any'}: {error}")
            self.journal.note(self._ended, str(error).encode())
            return session.GaveUp(self.clock.now(), "spent")
        except OwnerRefuses as error:
            self._say(f"declined: {error}")
            return session.GaveUp(self.clock.now(), "approval" if isinstance(error, _NotApproved) else "rules")
        except SecureAggregationFailed as error:
            self._say(f"declined: {error}")
            return session.GaveUp(self.clock.now(), "secure-aggregation")
        except (SignatureInvalid, BundleRefused) as error:
            self._say(f"declined: {error}")
            return session.GaveUp(self.clock.now(), "signature")
        except NotTrusted as error:  # somebody else answers at that address: nothing was said, and it may pass
            self._say(str(error))
            return session.Lost(self.clock.now(), self.draw())
        except (TrainingError, WorkerDied, ConfigurationError) as error:
            self._say(f"training failed: {error}")
            return session.GaveUp(self.clock.now(), "training")

    async def _do(self, action: session.Action) -> Event:
        now = self.clock.now
        if isinstance(action, session.Say):
            answer = await self.transport.ask(action.request)
            if isinstance(answer, Problem):
                self._say(f"the server says: {answer.told or answer.code}")
            elif isinstance(answer, Accepted):
                self._attempt = answer.attempt
            elif isinstance(answer, Finished):
                self._over = True
            elif isinstance(answer, Later) and isinstance(action.request, CheckIn):
                self._waits(answer.reason)
            return session.Heard(now(), answer, self.draw())
        if isinstance(action, session.Fetch):
            await self._fetch(action.accepted)
            return session.Fetched(now())
        if isinstance(action, session.Train) and self._promise is not None:
            return await self._conferred(action.accepted)
        if isinstance(action, session.Train):
            content = await self._train(action.accepted)
            return session.Made(now(), len(content), _digest(content))
        if isinstance(action, session.Encode):
            self._unsent(self.state.key)
            content = await self._encode(action.scale)
            return session.Made(now(), len(content), _digest(content))
        if isinstance(action, session.Piece):
            return await self._send(action)
        assert isinstance(action, session.Publish)
        await self._publish(action.finished)
        return session.Fetched(now())

    def _write(self, action: session.Keep | session.Rename | session.Settle) -> None:
        """What the journal must know before anything is said of it."""
        if isinstance(action, session.Keep):
            if self._made is not None:
                self._count()
                self.journal.hold(action.held, self._made.about, self._made.content, self._made.kept)
                self._made = None
            self.journal.mark(action.held)
        elif isinstance(action, session.Rename):
            self.journal.rename(action.old, action.held, self._attempt)
        else:
            if action.counted:
                self._keep(action.key)
            about = self.journal.about(action.key)
            if about is not None and about.release and about.sends:  # these, or none, if they are wanted again
                self.journal.put_aside(action.key)
                self._say("the update is counted" if action.counted else "the update does not count")
                return
            self.journal.drop(action.key)
            self._say("the update is counted" if action.counted else "the update does not count, and is deleted")

    def _count(self) -> None:
        """What was trained may leave from now on: single examples have paid for it, once."""
        cost, self._cost = self._cost, None
        if cost is not None:
            self.place.owner.spending().add(*cost)

    def _purse(self, accepted: Accepted) -> tuple[str, str]:
        """Whose examples pay: the data set; and for what: the run."""
        return self._data_set, f"{self.place.address} {accepted.run}"

    @property
    def _data_set(self) -> str:
        """Under which name the owner's counts have the data: the set, and whose part of it."""
        return f"{self.data.name} {self.data.part}".strip()

    # --- what leaves with noise of its own

    async def _releasing(self, accepted: Accepted) -> Release | None:
        """What the update of this round is, where it has noise of its own.

        Raises:
            OwnerRefuses: it would be noised a second time, or the owner allows no more of them.
        """
        assert self._fetched is not None
        rules, releases = self._rules(), self.place.owner.releases()
        if not self._noised and rules.most_client_epsilon is None:
            return None
        data = self._data_set
        most = {"most": rules.most_client_epsilon, "delta": rules.client_delta, "kinds": releases.kinds(data)}
        asked = {"do": "release", "position": accepted.position, "limit": accepted.limit, **most}
        said = (await self.training.ask(asked, [self._fetched.orders, *self._fetched.kept])).said
        run = f"{self.place.address} {accepted.run} {self.place.signing.raw.hex()[:16]}"
        masked = self._promise is not None
        release = Release(data, run, accepted.round, int(said["part"]), str(said["kind"]), masked)
        if not masked and (aside := self.journal.aside(release.text())) is not None and aside.scale == 1.0:
            return release
        if releases.check(release):
            self._check(owner_rules.release(rules, releases.count(data), str(said["told"])))
        return release if self._noised else None

    def _again(self, accepted: Accepted, release: Release) -> bytes | None:
        """The bytes of this release, if they have left before."""
        aside = self.journal.aside(release.text())
        if aside is None:
            return None
        self._say(f"the update of round {accepted.round} has left before: the same bytes are sent again")
        about = self._about(accepted, aside.about.what)._replace(sends=aside.about.sends, release=aside.about.release)
        self._made, self._cost = _Made(aside.content, aside.kept, about), None  # paid for when they were made
        return aside.content

    def _unsent(self, key: bytes) -> None:
        """Refuse to encode anew what has noise of its own and has left, be it in part."""
        about = self.journal.about(key)
        if about is not None and about.release and about.sends:
            raise OwnerRefuses(
                "the update has begun to leave, and is to be encoded anew: noised afresh, the noise could be averaged "
                "out"
            )

    # --- a round

    async def _fetch(self, accepted: Accepted) -> None:
        """Everything that training needs, once signatures are good and the owner agrees."""
        check(self.place.signing, accepted)
        rules = self._rules()
        if accepted.bundle is None:
            raise OwnerRefuses("the server offers no source bundle, and this client runs nothing else")
        await self._approved(rules, accepted.bundle, accepted.target)
        orders = await self.transport.fetch(accepted.orders)
        check_content(accepted.orders, orders)
        if accepted.kind is Kind.DECRYPT:
            await self._fetched_sum(accepted, orders)
            return
        known = await self._read_data(rules, accepted.round)
        self._check([*owner_rules.data(rules, self.data.name, known.examples), *known.findings])
        kept = self._kept(accepted.run, accepted.position)
        self._fetched = _Fetched(orders, () if kept is None else (kept,))
        self._promise = await self._promised(accepted)
        self._check(owner_rules.protections(rules, promised(accepted, self._promise, self._sealed)))

    async def _fetched_sum(self, accepted: Accepted, closed: bytes) -> None:
        """An encrypted sum, if it is of a round that this client has sent something to, and the only one of it."""
        abouts = [self.journal.about(k) for k, held in self.state.held.items() if held.round == accepted.round]
        if not any(about is not None and about.run == accepted.run and about.what == "update" for about in abouts):
            raise SecureAggregationFailed(
                f"the server asks to decrypt a sum of round {accepted.round}, and nothing of this client's is in it"
            )
        if (known := self._opened(accepted.run)) is not None:
            round, digest = known
            if accepted.round < round or (accepted.round == round and accepted.orders.digest != digest):
                self._distrust = (
                    f"The server asks to decrypt another sum of round {accepted.round} than the one that was decrypted "
                    "for it: the difference of two shows single updates."
                )
                raise SecureAggregationFailed(self._distrust)
        self._fetched, self._promise = _Fetched(closed, ()), None
        assert accepted.bundle is not None
        await self._unlocked(await self._open(accepted.bundle, accepted.target, accepted.seed))
        self._check(owner_rules.protections(self._rules(), promised(accepted, None, self._sealed)))

    def _opened(self, run: str) -> tuple[int, bytes] | None:
        """The last round of which a sum was decrypted, and its digest."""
        found = self.journal.fact(f"opened {run}")
        return None if found is None else (int.from_bytes(found[:8], "big"), found[8:])

    async def _unlocked(self, opened: dict[str, Any]) -> None:
        """The key that the silos share: given to the training process if the task, as it was approved, encrypts.

        Raises:
            OwnerRefuses: there is no key here.
        """
        self._sealed = int(opened["sealed"])
        if not self._sealed:
            return
        path = self.place.silo_key
        if not path.exists():
            raise OwnerRefuses(
                f"updates are encrypted under a key that the silos share, and there is none at {path}. Agree on "
                "one with the others (foedus silos agree), or name its file: foedus join ... --silo-key FILE"
            )
        await self.training.ask({"do": "key"}, [read_secret(path)])

    async def _decrypted(self, accepted: Accepted) -> bytes:
        """What the sum opens to; remembered before it leaves, so that no other sum of this round ever does."""
        assert self._fetched is not None
        self._say(f"decrypting: run {accepted.run}, the sum of round {accepted.round}")
        asked = {"position": accepted.position, "run": accepted.run, "round": accepted.round}
        answer = await self.training.ask({"do": "decrypt", **asked}, [self._fetched.orders])
        if answer.said["refused"]:
            self._distrust = f"The sum of round {accepted.round} was refused: {answer.said['refused']}."
            raise SecureAggregationFailed(self._distrust)
        self.journal.note(f"opened {accepted.run}", accepted.round.to_bytes(8, "big") + accepted.orders.digest)
        self._made = _Made(answer.blobs[0], None, self._about(accepted, OPENED))
        return answer.blobs[0]

    async def _promised(self, accepted: Accepted) -> Promise | None:
        """What the task's own code, which the owner approved, promises of masks; not what the server says."""
        assert accepted.bundle is not None
        assert self._fetched is not None
        opened = await self._open(accepted.bundle, accepted.target, accepted.seed)
        self._sealed, self._noised = 0, bool(opened["noised"])
        if accepted.kind is Kind.EVALUATE:
            return None
        await self._unlocked(opened)
        if not opened["masked"]:
            return None
        asked = {"do": "promise", "position": accepted.position, "limit": accepted.limit}
        return _promise((await self.training.ask(asked, [self._fetched.orders, *self._fetched.kept])).said["promise"])

    async def _approved(self, rules: Rules, bundle: Blob, target: str) -> None:
        """The bundle, on the disk, and approved; it is fetched only to be shown otherwise."""
        digest, path = bundle.digest.hex(), self.approvals.path(bundle.digest.hex())
        if not path.exists() or _digest(path.read_bytes()) != bundle.digest:
            content = await self.transport.fetch(bundle)
            check_content(bundle, content)
            place = self.place.address
            self.approvals.file(content, bundle.digest, target=target, server=place, when=self.clock.now())
        if self.approvals.denied(bundle.digest):
            raise _NotApproved(f"the task {digest[:16]} was denied; foedus tasks review {digest[:16]}")
        by_hand = self.approvals.approved(bundle.digest)
        if reasons := refused(owner_rules.task(rules, digest, by_hand=by_hand)):
            raise _NotApproved(*reasons)
        if not by_hand:
            self.approvals.note_listed(bundle.digest, when=self.clock.now())
        if not self.place.owner.consents().holds(self.place.address, digest):
            raise OwnerRefuses(f"there is no consent for the task {digest[:16]}; foedus consent give --task {digest}")

    async def _train(self, accepted: Accepted) -> bytes:
        """Train or evaluate; the bytes to send."""
        assert self._fetched is not None
        assert accepted.bundle is not None
        if accepted.kind is Kind.DECRYPT:
            return await self._decrypted(accepted)
        opened = await self._open(accepted.bundle, accepted.target, accepted.seed)
        which = {"position": accepted.position, "limit": accepted.limit}
        if accepted.kind is Kind.EVALUATE:
            answer = await self.training.ask({"do": "evaluate", **which}, [self._fetched.orders, *self._fetched.kept])
            self._made = _Made(answer.blobs[0], None, self._about(accepted, "figures of an evaluation"))
            return answer.blobs[0]
        await self._unlocked(opened)  # in a process that may be another than a moment ago
        self._release = await self._releasing(accepted)
        if self._release is not None and (again := self._again(accepted, self._release)) is not None:
            return again
        await self._trained(accepted)
        return await self._encode(1.0)

    async def _trained(self, accepted: Accepted) -> None:
        """Train on the orders that were fetched."""
        assert self._fetched is not None
        self._say(f"training: run {accepted.run}, round {accepted.round}")
        rules, rows = self._rules(), self.place.owner.spending().rows(*self._purse(accepted))
        spent = {**rows._asdict(), "most": rules.most_example_epsilon, "delta": rules.example_delta}
        which = {"position": accepted.position, "limit": accepted.limit, "spent": spent}
        answer = await self.training.ask({"do": "train", **which}, [self._fetched.orders, *self._fetched.kept])
        cost = answer.said.get("cost")
        self._cost = None if cost is None else (*self._purse(accepted), Row(*cost))
        if told := answer.said.get("spent"):
            raise BudgetSpent(str(told))
        if not answer.said.get("trained"):
            raise OwnerRefuses("there is no example to train on")

    async def _conferred(self, accepted: Accepted) -> session.Conferred:
        """Train, and take part in a masked sum."""
        from foedus.net.conferring import Part, Ways, take_part
        from foedus.protocol.secagg.messages import session_of

        promise = self._promise
        assert promise is not None
        self._release = await self._releasing(accepted)
        own = session_of(self.place.signing.raw, accepted.run)
        part = Part(accepted, promise, own, self._identity() if promise.withstand.malicious else None)
        memory = MaskedMemory(self.journal, own)
        ways = Ways(
            self.transport, self.clock.now, self.clock.rest, self.draw, os.urandom, memory.recall, memory.remember,
            lambda what, size, digest: self._leaves(accepted, what, size, digest), self._holds,
        )  # fmt: skip
        later = await take_part(part, ways, lambda: self._numbers(accepted))
        self._made = self._cost = None  # the attempt was over before anything had left
        return session.Conferred(self.clock.now(), later, self.draw())

    def _identity(self) -> Any:
        from foedus.net.owner.peers import identity

        return identity(self.place.owner.path)

    async def _numbers(self, accepted: Accepted) -> Any:
        """The update as it is masked."""
        from foedus.protocol.blob import unpack

        await self._trained(accepted)
        answer = await self.training.ask({"do": "encode", "scale": 1.0})
        kept = answer.blobs[1] if answer.said.get("keeps") and len(answer.blobs) > 1 else None
        self._made = _Made(b"", kept, self._about(accepted, "masked update"))
        found, promise = unpack(answer.blobs[0]).arrays, self._promise
        assert promise is not None
        return tuple(found[channel.name] for channel in promise.channels)

    def _leaves(self, accepted: Accepted, what: str, size: int, digest: bytes) -> None:
        """Write down what is about to leave in the course of a masked sum, if the owner's word is still yes."""
        about = self._about(accepted, what)
        if not self.place.owner.consents().holds(self.place.address, about.task.partition(" ")[0]):
            raise OwnerRefuses("consent was withdrawn")
        self._check(owner_rules.upload(self._rules(), size, self.ledger.bytes))
        self._written(about, Leaving(accepted.round, size, digest))

    def _holds(self) -> None:
        """What is kept if the update counts is on the disk before it leaves: it may count though this process dies."""
        if self._release is not None:
            self.place.owner.releases().note(self._release, "")
        self.state, actions = session.step(self.state, session.Masked())
        for action in actions:
            assert isinstance(action, session.Keep)
            self._write(action)

    async def _encode(self, scale: float) -> bytes:
        """The update as it is sent, and what is kept if it counts."""
        assert self.state.accepted is not None
        answer = await self.training.ask({"do": "encode", "scale": scale})
        kept = answer.blobs[1] if answer.said.get("keeps") and len(answer.blobs) > 1 else None
        about = self._about(self.state.accepted, "update")
        if self._release is not None:
            about = about._replace(release=self._release.text())
        self._made = _Made(answer.blobs[0], kept, about)
        return answer.blobs[0]

    async def _open(self, bundle: Blob, target: str, seed: int) -> dict[str, Any]:
        path = str(self.approvals.path(bundle.digest.hex()))
        asked = {"bundle": path, "digest": bundle.digest, "target": target, "seed": seed}
        return (await self.training.ask({"do": "open", **asked})).said

    def _about(self, accepted: Accepted, what: str) -> About:
        task = f"{accepted.bundle.digest.hex()} {accepted.target}" if accepted.bundle else accepted.target
        told = promised(accepted, self._promise, self._sealed).told()
        return About(accepted.run, accepted.attempt, accepted.position, task, what, told)

    async def _send(self, piece: session.Piece) -> Event:
        """A piece of an upload; the ledger has its line before the first."""
        about = self.journal.about(piece.key)
        if about is None or not self.place.owner.consents().holds(self.place.address, about.task.partition(" ")[0]):
            self._withdrawn()
            return session.Rest(self.clock.now())
        if about.sends == 0 or piece.offset == 0:
            try:
                self._departs(piece.key, about)
            except OwnerRefuses as error:  # the bytes stay: the owner may say yes tomorrow
                self._say(f"not sent: {error}")
                return session.Lost(self.clock.now(), self.draw())
        content = self.journal.piece(piece.key, piece.offset, piece.length)
        gone = await self.transport.send(piece.upload, piece.offset, content)
        if isinstance(gone, Problem):
            return session.Heard(self.clock.now(), gone, self.draw())
        return session.Went(self.clock.now(), gone)

    def _departs(self, key: bytes, about: About) -> None:
        """Write down that an upload is about to leave, if the owner's limits let it."""
        held = self.state.held[key]
        rules = self._rules()
        self._check(owner_rules.upload(rules, held.size, self.ledger.bytes))
        if about.release and about.sends == 0:
            self.place.owner.releases().note(Release.of(about.release), held.digest.hex())
        again = about._replace(what=about.what if about.sends == 0 else f"{about.what}, sent again")
        self._written(again, Leaving(held.round, held.size, held.digest))
        self.journal.leaves(key)
        if about.sends == 0 and about.what != OPENED:
            day = datetime.fromtimestamp(self.clock.now()).strftime(DAY)
            self.journal.note("rounds", f"{day} {self._rounds(day) + 1}".encode())

    def _written(self, about: About, leaving: Leaving) -> None:
        """A line of the ledger."""
        to = f"{self.place.address} (pin {self.place.pin[:16]})" if self.place.pin else self.place.address
        line = Departure(
            to=to, what=about.what, run=about.run, round=leaving.round, attempt=about.attempt, task=about.task,
            bytes=leaving.size, digest=leaving.digest.hex(), protections=about.protections,
        )  # fmt: skip
        self.ledger.write(line, when=self.clock.now())

    # --- what is kept, and the end

    def _kept_file(self, run: str) -> Path:
        return self.place.folder / f"kept-{file_name(run)}.sqlite"

    def _kept(self, run: str, position: int) -> bytes | None:
        """What this client keeps since its last visit that counted."""
        path = self._kept_file(run)
        if not path.exists():
            return None
        from foedus.protocol.blob import pack
        from foedus.record.kept import Kept

        kept = Kept(path)
        try:
            found = kept.read([position]).get(position)
        finally:
            kept.close()
        return None if found is None else pack(found)

    def _keep(self, key: bytes) -> None:
        """The update counts: what the client keeps for its next visit holds from now on."""
        content, about = self.journal.kept(key), self.journal.about(key)
        if content is None or about is None:
            return
        from foedus.protocol.blob import unpack
        from foedus.record.kept import Kept

        kept = Kept(self._kept_file(about.run))
        try:
            kept.write(self.journal.held()[key].round, {about.position: unpack(content).arrays})
            kept.commit()
            kept.settle(1 << 60)
        finally:
            kept.close()

    async def _publish(self, finished: Finished) -> None:
        """The final model, and the client's own: into the folder."""
        check(self.place.signing, finished)
        assert finished.model is not None
        content = await self.transport.fetch(finished.model)
        check_content(finished.model, content)
        folder = self.place.folder / "models" / file_name(finished.run)
        private_folder(folder)
        models = await self._named(finished, content)
        if len(models) > 1:
            files.replace(folder / "personal.safetensors", models[1])
        files.replace(folder / "model.safetensors", models[0])
        self.journal.forget_aside(run=finished.run)
        self.journal.note("finished", "\n".join(sorted(self.state.finished | {finished.run})).encode())
        self._say(f"run {finished.run} is over after {finished.rounds} rounds; its model is in {folder}")

    async def _named(self, finished: Finished, content: bytes) -> tuple[bytes, ...]:
        """The model's arrays by name, and those of the client's own; as they came, where the task may not run here."""
        rules = self._rules()
        try:
            if finished.bundle is None:
                raise OwnerRefuses("there is no bundle")
            await self._approved(rules, finished.bundle, finished.target)
            await self._read_data(rules, max(1, finished.rounds))
            await self._open(finished.bundle, finished.target, finished.seed)
            kept = self._kept(finished.run, finished.position)
            asked = {"do": "finish", "position": finished.position, "personal": finished.personal}
            return (await self.training.ask(asked, [content, *([] if kept is None else [kept])])).blobs
        except (OwnerRefuses, TrainingError, WorkerDied) as error:
            self._say(f"the model is kept as it came: {error}")
            return (content,)

    def _models(self) -> frozenset[str]:
        """Runs whose model is here already."""
        there = (self.journal.fact("finished") or b"").decode().split("\n")
        return frozenset(filter(None, there))

    # --- odds

    async def _rest(self, until: float) -> None:
        seconds = max(0.0, until - self.clock.now())
        if seconds > COOL_S and self.training.warm:
            await self.training.close()
        await self.clock.rest(seconds)

    def _check(self, findings: list[Finding]) -> None:
        if reasons := refused(findings):
            raise OwnerRefuses(*reasons)

    def _say(self, told: str) -> None:
        """A line for the owner; the same one is said once."""
        if told != self._said:
            self._said, self._said_at, self._waited = told, self.clock.now(), False
            self.tell(told)

    def _waits(self, why: str) -> None:
        """Say now and then what is waited for, so that silence means that something is wrong; between two rounds that
        follow each other, nothing is said."""
        silent = self.clock.now() - self._said_at
        if silent < (STILL_S if self._waited else QUIET_S):
            return
        self._said, self._said_at, self._waited = f"waiting: {why or 'nothing is asked for'}", self.clock.now(), True
        self.tell(self._said)


class MaskedMemory:
    """What the client remembers of the masked sums of a run: a fact of the journal."""

    def __init__(self, journal: Journal, session: bytes) -> None:
        self._journal, self._session, self._name = journal, session, f"masked {session.hex()}"

    def recall(self) -> Memory | None:
        """The last that was remembered."""
        from foedus.protocol.secagg.client import Memory

        found = self._journal.fact(self._name)
        return None if found is None else Memory(self._session, *json.loads(found))

    def remember(self, memory: Memory) -> None:
        """On the disk when it returns."""
        self._journal.note(self._name, json.dumps([memory.round, memory.attempt, memory.answered]).encode())


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _promise(said: dict[str, Any]) -> Promise:
    """What the training process says that the task promises."""
    from foedus.protocol.secagg.messages import Channel
    from foedus.protocol.secagg.messages import Promise as Found
    from foedus.secure.graph import Withstand

    channels = tuple(Channel(str(name), int(entries), int(width)) for name, entries, width in said["channels"])
    return Found(Withstand(**said["withstand"]), said["least"], channels)


def promised(accepted: Accepted, masks: Promise | None, sealed: int = 0) -> Protections:
    """What holds for an update.

    Args:
        accepted: what the server promises.
        masks: that it is masked is no promise of the server's, but what the client itself does.
        sealed: nor that it is encrypted; fewest in a sum that is decrypted, 0 if it is not.
    """
    epsilon = None
    for name in accepted.protections:
        what, _, value = name.partition("=")
        if what == BUDGET:
            with contextlib.suppress(ValueError):
                epsilon = abs(float(value)) if value else float("inf")
    others = max(accepted.minimum, sealed, 0 if masks is None else masks.least)
    return Protections(max(0, others - 1), masks is not None, epsilon, sealed > 0)
