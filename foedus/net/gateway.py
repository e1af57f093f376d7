"""A gateway: a stateless process that clients talk with, in front of a coordinator and a broker.

It ends TLS, knows who calls, takes uploads into its memory, and gives blobs out of it. An update that is whole becomes
a receipt in the broker; an aggregation worker fetches the bytes here, once, by the receipt's claim check. Everything
else is said to the coordinator, in the client's name. Any number of gateways may stand side by side; one that dies
loses the uploads in its memory, and their clients, who still hold the bytes, are asked again.

Not here: merging (``brokers/aggregation.py``), what is answered (``coordinator``).
"""

from __future__ import annotations

import ssl
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from foedus.errors import Code, FoedusError, MalformedMessage, NotNow, ProtocolError, TooLarge, UploadRefused
from foedus.net import api
from foedus.net.brokers.broker import Broker
from foedus.net.brokers.receipts import Receipt
from foedus.net.course import DECRYPTION, EVALUATION
from foedus.net.identity.access import Access
from foedus.net.identity.callers import OPERATE, TRAIN, Caller, Scope
from foedus.net.identity.routes import peer_of, refusal
from foedus.net.lookout import Lookout
from foedus.net.rings import Ring
from foedus.net.store import LEADER, SeatRow, Store
from foedus.net.uploads import Uploads
from foedus.protocol import blob, wire
from foedus.protocol.messages import Ask, Message, Place, Received, Standings, StartUpload, Submit, raised
from foedus.protocol.messages import Problem as Trouble

__all__ = ["CLAIMS", "Gateway", "claims"]

CLAIMS = "/internal/claims"
_GIVEN = 4  # blobs that are kept to be given out
_TICKET_S = 600.0


class Gateway:
    """What is behind a gateway's HTTP shell.

    Args:
        store: shared with the coordinator; seats are read in it, nothing is written.
        access: mints the tickets with which clients' messages are passed on.
        broker, topic: where receipts go.
        own: this process's address, as workers reach it.
        way: an HTTP client that trusts the federation's authority.
        uploads: memory for uploads.
    """

    def __init__(
        self,
        store: Store,
        access: Access,
        *,
        broker: Broker,
        topic: str,
        own: str,
        way: httpx.Client,
        uploads: Uploads,
    ) -> None:
        self.uploads = uploads
        self._store, self._access, self._broker, self._topic = store, access, broker, topic
        self._own, self._way = own, way
        self._lookout = Lookout(store)
        self._leads, self._looked_at = "", 0.0
        self._given: OrderedDict[bytes, bytes] = OrderedDict()
        self._tickets: OrderedDict[Caller, tuple[str, float]] = OrderedDict()

    def handle(self, caller: Caller, message: Message, now: float) -> Message:
        """Answer a message: what belongs to an upload here, everything else by the coordinator."""
        if not isinstance(message, StartUpload | Submit):
            return self._passed_on(caller, message, now)
        seat = self._seat(caller, message.key)
        if seat is None or (isinstance(message, Submit) and self._unknown(caller, message)):
            return self._passed_on(caller, message, now)
        if isinstance(message, StartUpload):
            return self._place(caller, message, now)
        if seat.run.endswith((EVALUATION, DECRYPTION)):
            return self._answered(caller, message, now)
        return self._receipt(caller, message, seat, now)

    def load(self, now: float) -> None:
        """There is nothing here to go on from."""

    def tick(self, now: float) -> Sequence[Ring]:
        """Give up places that nobody writes to. What the doorbell is to ring."""
        self.uploads.tidy(now=now)
        return self._lookout.rung(now)

    def blob(self, caller: Caller, digest: bytes) -> bytes:
        """A blob, fetched from the coordinator once and kept for a while."""
        found = self._given.get(digest)
        if found is None:
            found = self._asked("GET", api.blob_path(digest), caller, time.time()).content
            if blob.digest_of(found) != digest:
                raise NotNow("the coordinator's bytes were cut on their way; ask again")
            self._given[digest] = found
            if len(self._given) > _GIVEN:
                self._given.popitem(last=False)
        return found

    def runs(self) -> list[dict[str, Any]]:
        """How all runs stand, as the coordinator says."""
        runs: list[dict[str, Any]] = self._asked("GET", "/v1/runs", _ITSELF, time.time()).json()["runs"]
        return runs

    def lines(self, run: str, file: str, after: int) -> bytes:
        """Lines of a run's record, as the coordinator has them."""
        return self._asked("GET", f"/v1/runs/{run}/{file}?after={after}", _ITSELF, time.time()).content

    # --- uploads

    def _seat(self, caller: Caller, key: bytes) -> SeatRow | None:
        """The caller's own seat of a key; others' are as though they were not there."""
        with self._store.begin() as rows:
            found = rows.seat(key)
        return found if found is not None and found.position == caller.position else None

    def _unknown(self, caller: Caller, message: Submit) -> bool:
        """Whether the bytes came by another gateway, or not at all."""
        try:
            self.uploads.offset(message.upload, owner=caller.position)
        except ProtocolError:
            return True
        return False

    def _place(self, caller: Caller, message: StartUpload, now: float) -> Message:
        """A place in this process's memory, if the coordinator lets the client send."""
        asked = StartUpload(key=message.key, version=message.version)  # without a size, it sets no room aside
        answer = self._passed_on(caller, asked, now)
        if not isinstance(answer, Place) or not message.size:
            return answer
        if message.size > answer.most:
            raise TooLarge(
                f"an upload of {message.size} bytes is announced, and {answer.most} are more than anybody needs here",
                fatal=True,
            )
        offset = self.uploads.open(answer.upload, message.size, owner=caller.position, now=now)
        return Place(upload=answer.upload, offset=offset, scale=answer.scale, most=min(answer.most, self.uploads.each))

    def _whole(self, message: Submit) -> memoryview:
        content = self.uploads.whole(message.upload)
        if len(content) != message.size or self.uploads.digest(message.upload) != message.digest:
            self.uploads.drop(message.upload)
            raise UploadRefused("other bytes came than were announced; send them again", code=Code.WRONG_DIGEST)
        return content

    def _receipt(self, caller: Caller, message: Submit, seat: SeatRow, now: float) -> Message:
        """An update that is whole: told to the broker; its client keeps its bytes until it is counted."""
        self._whole(message)
        receipt = Receipt(
            seat.run, seat.round, seat.part, seat.attempt, caller.position, message.key, seat.round, 1.0,
            f"{self._own}{CLAIMS}/{message.upload.hex()}", message.size, message.digest,
        )  # fmt: skip
        self._broker.publish(self._topic, caller.position.to_bytes(8, "big"), receipt.packed())
        answer = self._passed_on(caller, Ask(keys=(message.key,)), now)
        if not isinstance(answer, Standings):
            raise MalformedMessage("the coordinator does not say when to come back")
        return Received(later=answer.later)

    def _answered(self, caller: Caller, message: Submit, now: float) -> Message:
        """What is no update, but figures or what a sum opens to, goes on to the coordinator as it is."""
        content = bytes(self._whole(message))
        begin = StartUpload(key=message.key, size=message.size, digest=message.digest)
        place = self._passed_on(caller, begin, now)
        if not isinstance(place, Place):
            return place
        path = f"{api.upload_path(place.upload)}?offset={place.offset}"
        self._asked("PUT", path, caller, now, content[place.offset :])
        self.uploads.drop(message.upload)
        last = Submit(key=message.key, upload=place.upload, size=message.size, digest=message.digest)
        return self._passed_on(caller, last, now)

    # --- the coordinator

    def _passed_on(self, caller: Caller, message: Message, now: float) -> Message:
        found = wire.decode(self._asked("POST", api.PATHS[type(message)], caller, now, wire.encode(message)).content)
        if isinstance(found, Trouble):
            raise raised(found)
        return found

    def _asked(
        self, method: str, path: str, caller: Caller, now: float, content: bytes | None = None
    ) -> httpx.Response:
        """One request to whoever leads, in the caller's name."""
        address = self._leader(now)
        headers = {"Authorization": f"Bearer {self._ticket(caller, now)}", api.AT_ONCE: "1"}
        try:
            response = self._way.request(method, f"{address}{path}", content=content, headers=headers)
        except (httpx.HTTPError, ssl.SSLError) as error:
            raise NotNow(f"the coordinator cannot be reached: {error or type(error).__name__}") from error
        if response.status_code >= 400 and not response.headers.get("content-type", "").startswith(api.MEDIA):
            raise NotNow(f"the coordinator answered {response.status_code}")
        if response.status_code >= 400 and method != "POST":
            problem = wire.decode(response.content)
            raise raised(problem) if isinstance(problem, Trouble) else NotNow("the coordinator answered nonsense")
        return response

    def _leader(self, now: float) -> str:
        """Where the coordinator that leads can be reached; looked up once a second."""
        if now - self._looked_at > 1.0 or not self._leads:
            with self._store.begin() as rows:
                lease = rows.lease(LEADER)
            self._looked_at = now
            self._leads = "" if lease is None or lease.expires_at < now else lease.address
        if not self._leads:
            raise NotNow("no coordinator leads at the moment; come back", code=Code.NOT_LEADER)
        return self._leads

    def _ticket(self, caller: Caller, now: float) -> str:
        """A ticket for a client that this gateway has let in; the coordinator knows the signature."""
        ticket, until = self._tickets.get(caller, ("", 0.0))
        if now > until - 60:
            ticket = self._access.mint(caller, now=now, lifetime_s=_TICKET_S)
            self._tickets[caller] = ticket, now + _TICKET_S
            if len(self._tickets) > 20_000:
                self._tickets.popitem(last=False)
        return ticket


_ITSELF = Caller(-1, "gateway", OPERATE | TRAIN)


def claims(gateway: Gateway, *, clock: Any) -> Route:
    """Where workers fetch the bytes of receipts, and say that they have them; nobody else is let in."""

    async def claim(request: Request) -> Response:
        try:
            caller = gateway._access.caller(
                request.headers.get("authorization"), peer=peer_of(request.scope), now=clock()
            )
            caller.may(Scope.OPERATE)
            upload = bytes.fromhex(request.path_params["upload"])
            if request.method == "DELETE":
                gateway.uploads.drop(upload)
                return Response(status_code=204)
            return Response(bytes(gateway.uploads.whole(upload)), media_type=api.BYTES)
        except ValueError:
            return Response(status_code=404)
        except FoedusError as error:
            return refusal(error)

    return Route(f"{CLAIMS}/{{upload}}", claim, methods=["GET", "DELETE"])
