"""A common key agreed through a server that must not learn it, and that may try anything."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("tenseal")

from foedus.errors import ConfigurationError, FoedusError, ForgedMessage, SecureAggregationFailed
from foedus.secure.homomorphic import SiloKey
from foedus.secure.primitives import identity_key
from foedus.secure.silo_keys import Offer, Receipt, Silo, Wrapped

NAMES = ["ann", "bob", "cyn"]
SECRETS = {name: bytes([i + 1]) * 32 for i, name in enumerate(NAMES)}
ROSTER = {name: identity_key(secret) for name, secret in SECRETS.items()}
KEY = SiloKey(b"what silos share")
OTHER = SiloKey(b"another of them")
LACKING = SecureAggregationFailed


def party(session: bytes = b"s", fresh: int = 7, roster: dict[str, bytes] | None = None) -> dict[str, Silo]:
    return {
        name: Silo(name, identity=SECRETS[name], roster=roster or ROSTER, session=session,
                   fresh=bytes([fresh, i]) * 16)
        for i, name in enumerate(NAMES)
    }  # fmt: skip


def offered(silos: dict[str, Silo]) -> dict[str, Offer]:
    return {name: silo.offer() for name, silo in silos.items()}


def test_all_end_with_one_key_and_know_that_they_do() -> None:
    silos = party()
    offers = offered(silos)
    wrapped = silos["ann"].wrap(KEY, offers)
    keys = {"ann": KEY} | {name: silos[name].unwrap(wrapped[name], offers) for name in wrapped}
    assert {bytes(key) for key in keys.values()} == {bytes(KEY)}
    receipts = {name: silo.receipt(keys[name], offers) for name, silo in silos.items()}
    for name, silo in silos.items():
        silo.check(keys[name], receipts, offers)


def test_nothing_that_travels_holds_the_key() -> None:
    silos = party()
    offers = offered(silos)
    wrapped = silos["ann"].wrap(KEY, offers)
    seen = [*offers.values(), *wrapped.values(), silos["ann"].receipt(KEY, offers)]
    flat = b"".join(part if isinstance(part, bytes) else part.encode() for message in seen for part in message)
    assert bytes(KEY) not in flat
    assert "what silos" not in f"{silos!r} {KEY!r} {KEY}"
    assert len({w.body for w in wrapped.values()}) == 2


def refused(change: Any, kind: type[FoedusError] = ForgedMessage) -> None:
    """What a server puts in the place of a message is refused by bob."""
    silos, others = party(), party(session=b"t")
    offers = offered(silos)
    wrapped = silos["ann"].wrap(KEY, offers)["bob"]
    offers, wrapped = change(offers, wrapped, silos, others)
    with pytest.raises(kind):
        silos["bob"].unwrap(wrapped, offers)


@pytest.mark.parametrize("at", [0, 20, -1])
def test_a_body_that_was_changed_is_refused(at: int) -> None:
    def change(offers: Any, wrapped: Wrapped, *_: Any) -> Any:
        body = bytearray(wrapped.body)
        body[at] ^= 1
        return offers, wrapped._replace(body=bytes(body))

    refused(change)


def test_an_offer_of_the_servers_own_is_refused() -> None:
    """The man in the middle: a key pair of its own in ann's name."""
    server = Silo("ann", identity=bytes([99]) * 32, roster=ROSTER | {"ann": identity_key(bytes([99]) * 32)},
                  session=b"s", fresh=bytes([3]) * 32)  # fmt: skip
    refused(lambda offers, wrapped, *_: (offers | {"ann": server.offer()}, wrapped))


def test_what_is_for_another_silo_or_session_or_set_of_offers_is_refused() -> None:
    refused(lambda offers, wrapped, silos, others: (offers, silos["ann"].wrap(KEY, offers)["cyn"]))
    refused(lambda offers, wrapped, silos, others: (offers, silos["ann"].wrap(KEY, offers)["cyn"]._replace(silo="bob")))
    refused(lambda offers, wrapped, silos, others: (offers, others["ann"].wrap(KEY, offered(others))["bob"]))
    again = party(fresh=8)
    refused(lambda offers, wrapped, silos, others: (offers, again["ann"].wrap(KEY, offered(again))["bob"]))
    refused(lambda offers, wrapped, silos, others: (offers | {"cyn": again["cyn"].offer()}, wrapped))
    refused(lambda offers, wrapped, silos, others: (offers | {"bob": again["bob"].offer()}, wrapped))
    refused(lambda offers, wrapped, silos, others: ({n: offers[n] for n in NAMES[:2]}, wrapped), LACKING)


def test_silos_with_different_rosters_do_not_agree() -> None:
    """The server told bob another cyn: what ann signs is not what bob checks."""
    silos = party()
    other = ROSTER | {"cyn": identity_key(bytes([50]) * 32)}
    bob = Silo("bob", identity=SECRETS["bob"], roster=other, session=b"s", fresh=bytes([7, 1]) * 16)
    offers = offered(silos)
    with pytest.raises(ForgedMessage):
        bob.unwrap(silos["ann"].wrap(KEY, offers)["bob"], offers)


def test_two_keys_given_out_are_found_by_the_receipts() -> None:
    silos, double = party(), party()
    offers = offered(silos)
    one = silos["bob"].unwrap(silos["ann"].wrap(KEY, offers)["bob"], offers)
    two = silos["cyn"].unwrap(double["ann"].wrap(OTHER, offers)["cyn"], offers)
    receipts = {"ann": silos["ann"].receipt(KEY, offers), "bob": silos["bob"].receipt(one, offers),
                "cyn": silos["cyn"].receipt(two, offers)}  # fmt: skip
    with pytest.raises(SecureAggregationFailed, match="'cyn' has another key than 'bob'"):
        silos["bob"].check(one, receipts, offers)
    forged = receipts | {"cyn": Receipt("cyn", KEY.id, receipts["cyn"].signature)}
    with pytest.raises(ForgedMessage):
        silos["bob"].check(one, forged, offers)
    with pytest.raises(SecureAggregationFailed, match="no receipt has come from cyn"):
        silos["bob"].check(one, {n: receipts[n] for n in NAMES[:2]}, offers)


def test_what_seals_one_key_seals_no_other() -> None:
    silos = party()
    offers = offered(silos)
    first = silos["ann"].wrap(KEY, offers)
    assert silos["ann"].wrap(KEY, offers) == first, "sent again it is the same bytes"
    with pytest.raises(ConfigurationError, match="must not seal another"):
        silos["ann"].wrap(OTHER, offers)
    with pytest.raises(ConfigurationError, match="made by 'ann'"):
        silos["bob"].wrap(KEY, offers)


def test_a_party_that_cannot_be_is_refused() -> None:
    def one(**changes: Any) -> Silo:
        how = {"identity": SECRETS["ann"], "roster": ROSTER, "session": b"s", "fresh": bytes(32)}
        return Silo("ann", **(how | changes))

    with pytest.raises(ConfigurationError, match="another identity for 'ann'"):
        one(identity=SECRETS["bob"])
    with pytest.raises(ConfigurationError, match="three silos at least"):
        one(roster={n: ROSTER[n] for n in NAMES[:2]})
    with pytest.raises(ConfigurationError, match="32 random bytes"):
        one(fresh=b"short")


def test_the_bytes_of_an_agreement_are_those_of_the_protocol() -> None:
    """A vector: with given secrets all messages are given. Whoever changes them changes VERSION."""
    silos = party()
    offers = offered(silos)
    wrapped = silos["ann"].wrap(KEY, offers)
    assert offers["bob"].public.hex()[:32] == VECTOR["offer"]
    assert offers["bob"].signature.hex()[:32] == VECTOR["signature"]
    assert wrapped["cyn"].body.hex() == VECTOR["body"]
    assert KEY.id.hex() == VECTOR["id"]


VECTOR = {
    "offer": "993c20d9922027436ed55b5a4c3ca072",
    "signature": "ba1a09ba3e401f07bfe8e12f76173876",
    "body": "56f05e21284e6eb9b07b1123c3a07461e224e2c21c3f7310fc41f5af5e37419f",
    "id": "0e88ca129455857bd2c79a3abf826227",
}
