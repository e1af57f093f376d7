"""Servers and clients that cheat: every way that is known to open masked sums, tried, and what comes of it.

docs/threat-model.md has the same list in words, and names these tests.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from foedus.core.aggregate import Aggregator, fold
from foedus.core.keystream import keystream
from foedus.core.quantise import quantise
from foedus.core.stage import chain
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, ForgedMessage, NoGuarantee, SecureAggregationFailed, SumOverflow
from foedus.protocol.secagg import client as clients
from foedus.protocol.secagg import server as servers
from foedus.protocol.secagg.client import Left, Memory, Numbers, Own, Remember, Send, Stage
from foedus.protocol.secagg.messages import (
    Channel,
    Delivery,
    Identity,
    Keys,
    Masked,
    Parcels,
    Promise,
    Roster,
    Shares,
    Survivors,
    Terms,
    Votes,
    about,
    bits,
    certificate,
    certified,
    commitment,
    flags,
    pinned,
    survivors_text,
    terms_for,
)
from foedus.protocol.secagg.server import From, Phase
from foedus.secure.graph import Withstand
from foedus.secure.masked import masked
from foedus.secure.planes import unpacked
from foedus.secure.primitives import KEY, add_mask, derived, digest, identity_key, public_key, signed
from foedus.secure.sharing import recovered

from .attempts import MODEL, PRIVATE, TRUST, Table, held, lists, own, promised, sums, termed

NOBODY = np.zeros((4, 0), np.uint8)
ONE, OTHER = Channel("channel 0", 5, 20), Channel("channel 1", 3, 33)


def left(actions: tuple[Any, ...]) -> str:
    """Why a client left; it did nothing else."""
    (action,) = actions
    assert isinstance(action, Left)
    return action.reason


def present(*slots: int, count: int = 5) -> np.ndarray:
    found = np.zeros(count, bool)
    found[list(slots)] = True
    return bits(found)


# --- both secrets of one client -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_whatever_a_server_asks_in_whatever_order_a_client_never_tells_both_shares_of_another(
    data: st.DataObject,
) -> None:
    """The same client in the survivor and the dropped list: a request names survivors only, so that it cannot say so;
    and of all requests, however many and whatever they say, one is answered."""
    table = Table(promised(5, malicious=data.draw(st.booleans()))).until_masked()
    honest = [*table.told.values(), Survivors(present(0, 1, 2, 3, 4), 5)]
    told: list[Shares] = []
    for _ in range(data.draw(st.integers(1, 6))):
        some = data.draw(st.lists(st.integers(0, 4), unique=True))
        event = data.draw(st.sampled_from([Survivors(present(*some), data.draw(st.integers(0, 6))), *honest]))
        actions = table.tell(0, event)
        told += [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, Shares)]
    assert len({answer.shares.tobytes() for answer in told}) <= 1
    for answer in told:
        assert len(answer.shares) == int(flags(answer.present, 5).sum()), "one share of each"


def test_a_second_unmask_request_with_another_set_gets_nothing() -> None:
    table = Table(promised(5)).until_masked()
    first = table.tell(0, Survivors(present(0, 1, 2, 3, 4), 5))
    assert any(isinstance(a, Send) for a in first)
    assert table.tell(0, Survivors(present(0, 1, 2, 3), 4)) == ()
    assert table.clients[0].stage is Stage.DONE


def test_a_second_attempt_of_the_round_is_not_joined_after_an_answer() -> None:
    """Two unmasked sums whose survivors differ by one client would reveal that client: here is what they reveal."""
    promise = promised(5)
    one, other = held(promise), held(promise, lost={4: Phase.NUMBERS}, attempt=2)
    assert one.totals is not None
    assert other.totals is not None
    (victim,) = Table(promise).numbers[4]
    difference = (one.totals[0] - other.totals[0]) & np.uint32(2**20 - 1)
    assert difference.tolist() == victim.tolist(), "the attack works where clients let themselves in for it"
    memory = one.memories[0]
    assert memory.answered
    with pytest.raises(
        SecureAggregationFailed, match="joins no other attempt of it: two sums with different survivors"
    ):
        clients.begin(termed(promise, attempt=2), own(0, promise, memory=memory))
    clients.begin(termed(promise, round=4), own(0, promise, memory=memory))


def test_a_client_that_has_not_answered_joins_the_next_attempt_but_no_old_one() -> None:
    promise = promised(5)
    memory = Memory(b"s" * 16, round=3, attempt=2)
    clients.begin(termed(promise, attempt=3), own(0, promise, memory=memory))
    for old in ({"attempt": 2}, {"attempt": 1}, {"round": 2, "attempt": 9}):
        with pytest.raises(SecureAggregationFailed, match="is over: this client has joined attempt 2 of round 3"):
            clients.begin(termed(promise, **old), own(0, promise, memory=memory))


def test_what_is_to_be_remembered_comes_before_what_is_sent() -> None:
    """A client killed between the two has not answered; one killed after has it on its disk."""
    promise = promised(5)
    _, actions = clients.begin(termed(promise), own(0, promise))
    assert [type(a) for a in actions] == [Remember, Send]
    table = Table(promise).until_masked()
    actions = table.tell(0, Survivors(present(0, 1, 2, 3, 4), 5))
    assert [type(a) for a in actions] == [Remember, Send]
    assert actions[0].memory == Memory(b"s" * 16, 3, 1, answered=True)


# --- other sets and other models for other clients ----------------------------------------------------------


def test_different_survivors_shown_to_different_clients_are_noticed_by_their_votes() -> None:
    """To three it says that all are left, to two that client 0 is lost; and it passes all votes on to everybody."""
    table = Table(promised(5, malicious=True)).until_masked()
    for slot in range(5):
        table.tell(slot, Survivors(present(0, 1, 2, 3, 4), 5) if slot < 3 else Survivors(present(1, 2, 3, 4), 4))
    signatures = np.stack([np.frombuffer(table.said[slot].signature, np.uint8) for slot in range(5)])  # type: ignore[union-attr]
    for slot in range(3):
        votes = Votes(present(0, 1, 2, 3, 4), signatures)
        assert "a signature is not that of the key" in left(table.tell(slot, votes))
    assert "no survivors" in left(table.tell(3, Votes(present(0, 1, 2, 3, 4), signatures)))
    assert "signature is not" in left(table.tell(4, Votes(present(1, 2, 3, 4), signatures[1:])))


def test_too_few_votes_for_one_set_get_no_answer() -> None:
    table = Table(promised(5, malicious=True)).until_masked()
    table.down()
    own_vote = np.frombuffer(table.said[0].signature, np.uint8)[None]  # type: ignore[union-attr]
    assert "1 clients have signed the set of survivors, and it takes 3" in left(
        table.tell(0, Votes(present(0), own_vote))
    )


def test_votes_of_an_earlier_attempt_or_round_do_not_count() -> None:
    promise = promised(5, malicious=True)
    before, now = Table(promise).until_masked(), Table(promise, attempt=2).until_masked()
    for table in (before, now):
        table.down()
    old = np.stack([np.frombuffer(before.said[s].signature, np.uint8) for s in range(5)])  # type: ignore[union-attr]
    assert "signature is not" in left(now.tell(0, Votes(present(0, 1, 2, 3, 4), old)))


def test_votes_of_those_who_are_no_survivors_do_not_count() -> None:
    table = Table(promised(5, malicious=True)).until_masked()
    table.tell(0, Survivors(present(0, 1, 2, 3), 4))
    signatures = np.zeros((5, 64), np.uint8)
    assert "no survivors" in left(table.tell(0, Votes(present(0, 1, 2, 3, 4), signatures)))


def test_another_model_for_one_client_than_its_terms_say_is_noticed_at_once() -> None:
    promise = promised(5)
    with pytest.raises(SecureAggregationFailed, match="about another model than this client was sent"):
        clients.begin(termed(promise, model=digest(b"another")), own(0, promise))


def test_different_models_for_different_clients_are_noticed_before_anything_is_masked() -> None:
    """Each is told terms that fit its own model: then their keys are signed for different terms."""
    promise = promised(5, malicious=True)
    other = digest(b"another model")
    table = Table(promise)
    joined, actions = clients.begin(termed(promise, model=other), own(4, promise)._replace(model=other))
    table.clients[4], table.said[4] = joined, actions[1].message  # type: ignore[union-attr, assignment]
    for slot in range(5):
        assert "signature is not" in left(table.tell(slot, passed_on(table, slot)))


def passed_on(table: Table, slot: int) -> Roster:
    """What a server that looks at nothing tells a client of the others' keys."""
    others = [table.said[s] for s in range(5) if s != slot]
    keys = [np.frombuffer(k.mask + k.share, np.uint8) for k in others]  # type: ignore[union-attr]
    proofs = [np.frombuffer(k.identity + k.signature, np.uint8) for k in others]  # type: ignore[union-attr]
    return Roster(present(*set(range(5)) - {slot}), np.stack(keys), np.stack(proofs))


def test_without_signatures_clients_of_different_models_cannot_read_each_others_shares() -> None:
    promise, other = promised(5), digest(b"another model")
    table = Table(promise)
    joined, actions = clients.begin(termed(promise, model=other), own(4, promise)._replace(model=other))
    table.clients[4], table.said[4] = joined, actions[1].message  # type: ignore[union-attr, assignment]
    table.up().down().up().down()
    assert table.clients[4].unopened == (0, 1, 2, 3)
    assert all(table.clients[slot].unopened == (4,) for slot in range(4))


@pytest.mark.parametrize("change", [
    {"threshold": 2}, {"least": 1}, {"degree": 2}, {"malicious": False}, {"version": 1},
    {"clients": 6}, {"attempt": 0}, {"graph": b"short"}, {"session": b""},
    {"channels": ()}, {"channels": (ONE,)}, {"channels": (OTHER, ONE)}, {"channels": (ONE, OTHER, OTHER)},
    {"channels": (ONE._replace(width=16), OTHER)}, {"channels": (ONE, OTHER._replace(entries=1))},
    {"channels": (ONE, OTHER._replace(name="update"))},
])  # fmt: skip
def test_terms_that_protect_less_than_was_promised_are_refused(change: dict[str, Any]) -> None:
    promise = promised(5, malicious=True, sizes=[ONE[1:], OTHER[1:]])
    assert promise.channels == (ONE, OTHER)
    clients.begin(termed(promise), own(0, promise))
    with pytest.raises(SecureAggregationFailed):
        clients.begin(termed(promise, **change), own(0, promise))


# --- fewer clients than were promised -----------------------------------------------------------------------


def fewer(promise: Promise, asked: int) -> Terms:
    return terms_for(
        promise, session=b"s" * 16, round=3, attempt=1, model=MODEL, graph=digest(b"graph"), clients=asked
    )  # fmt: skip


def asked_of(terms: Terms, promise: Promise) -> Table:
    """A table with all of those who are asked, at which their masked numbers are sent."""
    same = {name: getattr(terms, name) for name in ("clients", "degree", "threshold")}
    table = Table(promise, **same)
    assert table.terms == terms
    return table.until_masked()


def equivocated(table: Table, colluders: int, *, victim: int) -> dict[int, tuple[Any, ...]]:
    """What honest clients do when a server that has colluders' keys shows half of them a set without the victim, and
    each half as many signatures of its set as there can be: its own, and all colluders'."""
    count = table.terms.clients
    honest = [slot for slot in range(colluders, count) if slot != victim]
    everybody, without = set(range(count)), set(range(count)) - {victim}
    found = {}
    for half, told in ((honest[::2], everybody), (honest[1::2], without)):
        survivors = Survivors(present(*told, count=count), len(told))
        for slot in half:
            table.tell(slot, survivors)
        text = survivors_text(table.terms.binding, survivors.present, survivors.number)
        signatures = {s: signed(PRIVATE[s], text) for s in range(colluders)}
        signatures |= {s: table.said[s].signature for s in half}  # type: ignore[union-attr]
        rows = np.stack([np.frombuffer(signatures[s], np.uint8) for s in sorted(signatures)])
        votes = Votes(present(*signatures, count=count), rows)
        found |= {slot: table.tell(slot, votes) for slot in half}
    return found


@pytest.mark.parametrize("asked", [16, 20, 23, 30])
def test_a_server_that_asks_fewer_and_all_of_its_colluders_has_no_second_set_signed(asked: int) -> None:
    """6 of 30 may collude. Asked among fewer they are a larger share of them, and must still not help two sets to
    enough signatures: with both answered, both secrets of the victim come out."""
    promise = promised(30, least=15, corrupt=0.2, dropouts=0.2, malicious=True)
    assert promise.withstand.corrupted == 6
    done = equivocated(asked_of(fewer(promise, asked), promise), 6, victim=asked - 1)
    answered = {slot for slot, actions in done.items() if any(isinstance(a, Send) for a in actions)}
    assert len({slot % 2 for slot in answered}) <= 1, "never both halves"
    assert all("have signed the set of survivors" in left(done[slot]) for slot in set(done) - answered)


def test_with_the_same_share_of_fewer_both_sets_would_be_signed() -> None:
    """What the test above guards against: a promise about the same share of 16 lets both halves answer."""
    promise = promised(16, least=15, corrupt=0.2, dropouts=0.2, malicious=True)
    assert promise.withstand.corrupted == 3
    done = equivocated(Table(promise).until_masked(), 6, victim=15)
    assert all(any(isinstance(a, Send) for a in actions) for actions in done.values())


@pytest.mark.parametrize("malicious", [False, True])
def test_terms_for_fewer_that_count_colluders_by_their_share_are_refused(malicious: bool) -> None:
    promise = promised(30, least=15, corrupt=0.2, dropouts=0.2, malicious=malicious)
    share = Withstand(clients=16, corrupt=0.2, dropouts=0.2, malicious=malicious).parameters
    assert share.threshold < fewer(promise, 16).threshold
    with pytest.raises(SecureAggregationFailed, match="the server's terms say threshold="):
        clients.begin(fewer(promise, 16)._replace(threshold=share.threshold), own(0, promise))


def test_among_too_few_nothing_is_begun() -> None:
    """Nor are clients led to begin it by a server that makes terms up."""
    promise = promised(30, corrupt=0.2, dropouts=0.2, malicious=True)
    with pytest.raises(NoGuarantee, match="all 6 that may collude"):
        fewer(promise, 7)
    for threshold in range(1, 8):
        made = fewer(promise, 16)._replace(clients=7, degree=6, threshold=threshold)
        with pytest.raises(NoGuarantee, match="all 6 that may collude"):
            clients.begin(made, own(0, promise))


# --- keys ---------------------------------------------------------------------------------------------------


def rostered(table: Table, slot: int = 0) -> Roster:
    """What the server is about to tell a client."""
    table.up()
    found = table.told[slot]
    assert isinstance(found, Roster)
    return found


def test_unsigned_keys_are_refused_where_the_server_may_lie() -> None:
    table = Table(promised(5, malicious=True))
    roster = rostered(table)
    assert "not signed" in left(table.tell(0, roster._replace(proofs=NOBODY)))


def test_keys_that_the_server_put_in_place_of_a_clients_are_refused() -> None:
    """A server that plays another client to each of two, and would read what they share."""
    table = Table(promised(5, malicious=True))
    roster = rostered(table)
    keys = roster.keys.copy()
    keys[2, KEY:] = np.frombuffer(public_key(digest(b"the server's own")), np.uint8)
    assert "signature is not" in left(table.tell(0, roster._replace(keys=keys)))


def test_keys_that_were_signed_for_another_attempt_or_slot_are_refused() -> None:
    """Replay: every signature is by an identity on the list, and of the very keys that are told."""
    promise = promised(5, malicious=True)
    before, now = Table(promise), Table(promise, attempt=2)
    old, swapped = dict(now.said) | {2: before.said[2]}, dict(now.said) | {2: now.said[3], 3: now.said[2]}
    for said in (old, swapped):
        table = Table(promise, attempt=2)
        table.said.update(said)
        assert "signature is not" in left(table.tell(0, passed_on(table, 0)))


def test_clients_that_the_server_made_up_are_refused() -> None:
    table = Table(promised(5, malicious=True))
    private = digest(b"made up")
    keys = table.said[2]
    assert isinstance(keys, Keys)
    text = clients.keys_text(table.terms.binding, 2, keys.mask, keys.share)
    table.said[2] = keys._replace(identity=identity_key(private), signature=signed(private, text))
    assert "not on this client's list" in left(table.tell(0, rostered(table)))


def test_one_identity_in_two_slots_is_refused() -> None:
    table = Table(promised(5, malicious=True))
    keys = table.said[3]
    assert isinstance(keys, Keys)
    text = clients.keys_text(table.terms.binding, 3, keys.mask, keys.share)
    table.said[3] = keys._replace(identity=identity_key(PRIVATE[2]), signature=signed(PRIVATE[2], text))
    assert "one identity is in the roster twice" in left(table.tell(0, rostered(table)))


def test_ones_own_keys_as_anothers_and_one_key_for_two_are_refused() -> None:
    table = Table(promised(5))
    roster = rostered(table)
    twice = roster.keys.copy()
    twice[1, :KEY] = twice[2, :KEY]
    mine = roster.keys.copy()
    mine[1] = np.frombuffer(public_key(table.clients[0].secrets.mask) + mine[1, KEY:].tobytes(), np.uint8)
    for keys in (twice, mine):
        assert "the same" in left(Table(promised(5)).tell(0, roster._replace(keys=keys)))
    whole = roster._replace(present=present(0, 1, 2, 3))
    assert "its own keys as another's" in left(Table(promised(5)).tell(0, whole))


@pytest.mark.parametrize("point", [0, 1])
def test_keys_with_which_every_secret_is_the_same_are_refused(point: int) -> None:
    table = Table(promised(5))
    roster = rostered(table)
    keys = roster.keys.copy()
    keys[1, KEY:] = np.frombuffer(point.to_bytes(KEY, "little"), np.uint8)
    assert "none that a client makes" in left(table.tell(0, roster._replace(keys=keys)))


def test_a_server_that_may_lie_is_not_faced_without_identities_that_it_did_not_issue() -> None:
    promise = promised(5, malicious=True)
    with pytest.raises(NoGuarantee, match="by identities that it did not issue"):
        clients.begin(termed(promise), own(0, promise)._replace(identity=None))


def test_a_third_partys_certificates_do_as_well_as_a_list() -> None:
    promise, authority = promised(4, malicious=True), digest(b"a third party")
    trust = certified(identity_key(authority))
    keys = []
    for slot in range(4):
        mine = Identity(PRIVATE[slot], trust, certificate(authority, identity_key(PRIVATE[slot])))
        client, actions = clients.begin(termed(promise), own(slot, promise)._replace(identity=mine))
        keys.append((client, actions[1].message))  # type: ignore[union-attr]
    server = servers.open_attempt(termed(promise))
    for slot, (_, message) in enumerate(keys):
        server, sends = servers.step(server, From(slot, message))  # type: ignore[arg-type]
    for send, (client, _) in zip(sends, keys, strict=True):
        client, actions = clients.step(client, send.message)  # type: ignore[union-attr]
        assert client.stage is Stage.SHARED
    forged = Identity(PRIVATE[0], trust, certificate(digest(b"the server"), identity_key(PRIVATE[0])))
    with pytest.raises(ForgedMessage):
        trust.check(forged.public, forged.certificate)
    assert PRIVATE[0].hex() not in repr(forged)


# --- replay and tampering -----------------------------------------------------------------------------------


def test_all_that_the_terms_say_is_in_what_everything_is_bound_to() -> None:
    """The version and the session, too; and whoever adds a field is told here if it was forgotten."""
    terms = termed(promised(5, malicious=True))
    others = {
        "session": b"t" * 16, "round": 4, "attempt": 2, "model": digest(b"m"), "graph": digest(b"g"), "clients": 6,
        "degree": 2, "threshold": 2, "least": 4, "channels": (ONE, OTHER), "malicious": False, "version": 1,
    }  # fmt: skip
    assert set(others) == set(terms._fields)
    found = {terms._replace(**{name: other}).binding for name, other in others.items()}
    assert len(found | {terms.binding}) == len(others) + 1


def test_purpose_sender_and_receiver_tell_contexts_apart() -> None:
    every = [("mask", 1, 2), ("share", 1, 2), ("share", 2, 1), ("share", 1, 3), ("seed", 1, 1), ("keys", 1, 1)]
    assert len({about(bytes(32), *each) for each in every} | {about(digest(b"1"), "mask", 1, 2)}) == len(every) + 1


@pytest.mark.parametrize("change", [{"session": b"t" * 16}, {"round": 4}, {"attempt": 2}, {"graph": digest(b"g")}])
def test_shares_of_another_session_round_or_attempt_do_not_open(change: dict[str, Any]) -> None:
    """The same clients with the same entropy: still other keys, and another context."""
    promise = promised(5)
    other, table = Table(promise, **change).up().down().up(), Table(promise).up().down().up()
    old = other.told[0]
    assert isinstance(old, Delivery)
    table.tell(0, old)
    assert table.clients[0].unopened == (1, 2, 3, 4)
    assert int(table.clients[0].held.have.sum()) == 1  # type: ignore[union-attr]


def test_shares_meant_for_another_or_sent_by_another_do_not_open() -> None:
    table = Table(promised(5)).up().down().up()
    mine, others = table.told[0], table.told[1]
    assert isinstance(mine, Delivery)
    swapped = mine._replace(sealed=mine.sealed[[1, 0, 2, 3]])
    table.tell(0, swapped)
    assert table.clients[0].unopened == (1, 2)
    table.tell(2, Delivery(present(0, 1, 3, 4), others.sealed))  # type: ignore[union-attr]
    assert table.clients[2].unopened == (0, 1, 3, 4)


def test_a_client_tells_nothing_of_shares_that_did_not_open() -> None:
    table = Table(promised(5)).up().down().ready().up()
    spoilt = table.told[0]
    assert isinstance(spoilt, Delivery)
    sealed = spoilt.sealed.copy()
    sealed[1, 7] ^= 1
    table.told[0] = spoilt._replace(sealed=sealed)
    table.down().up().down()
    answer = table.said[0]
    assert isinstance(answer, Shares)
    assert flags(answer.present, 5).tolist() == [True, True, False, True, True]
    table.up()
    assert isinstance(table.end, servers.Revealed), "the others' shares are enough"


def test_another_delivery_than_the_first_is_refused() -> None:
    table = Table(promised(5)).up().down().up()
    first = table.told[0]
    assert isinstance(first, Delivery)
    table.tell(0, first)
    second = Delivery(present(1, 2), first.sealed[:2])
    assert "another delivery" in left(table.tell(0, second))


def test_a_vector_is_never_masked_twice() -> None:
    """Two vectors under one mask would reveal their difference."""
    table = Table(promised(5)).up().down()
    numbers = Numbers(table.numbers[0])
    table.tell(0, numbers)
    assert "given already" in left(table.tell(0, numbers))


# --- masks --------------------------------------------------------------------------------------------------


def test_a_mask_depends_on_every_bit_of_its_seed_and_on_the_attempt() -> None:
    promise = promised(4)
    masks = set()
    for attempt in range(1, 9):
        table = Table(promise, attempt=attempt).up().down().ready().up().down()
        masked = [unpacked(table.said[s].values, 20, 5) for s in range(4)]  # type: ignore[union-attr]
        masks |= {((m - n) & np.uint32(2**20 - 1)).tobytes() for m, (n,) in zip(masked, table.numbers, strict=True)}
    assert len(masks) == 32


def test_what_is_sent_looks_random_whatever_the_numbers_are() -> None:
    """χ² over the bits of masked zeros."""
    promise = promised(4, sizes=[(20_000, 16)])
    table = Table(promise)
    table.numbers = [(np.zeros(20_000, np.uint16),)] * 4
    table.up().down().ready().up().down()
    sent = unpacked(table.said[0].values, 16, 20_000)  # type: ignore[union-attr]
    ones = ((sent[:, None] >> np.arange(16)) & 1).sum(0)
    assert np.abs(ones - 10_000).max() < 5 * np.sqrt(20_000) / 2
    assert len(np.unique(sent)) > 15_000


def test_a_masked_vector_without_its_clients_own_mask_is_still_masked_by_the_others() -> None:
    """Double masking: neither secret of a client alone opens what it sent."""
    promise = promised(4)
    table = Table(promise).up().down()
    secrets = table.clients[0].secrets
    table.ready().up().down()
    sent = unpacked(table.said[0].values, 20, 5)  # type: ignore[union-attr]
    without = sent.copy()
    context = clients.about(table.terms.binding, "seed", 0, 0)
    add_mask([without], derived(secrets.seed, context), negative=True)
    assert ((without & np.uint32(2**20 - 1)) != table.numbers[0][0]).any()


# --- lateness, floors, dropouts -----------------------------------------------------------------------------


def test_a_masked_vector_that_comes_after_the_set_is_frozen_is_not_looked_at() -> None:
    """Its mask key is being put together by the others: then only the seed would protect it."""
    table = Table(promised(6)).up().down().ready().up().down()
    late = table.said[5]
    assert isinstance(late, Masked)
    table.up(without={5})
    assert table.server.phase is Phase.ANSWERS
    before = table.server.tallies[0].total().tolist()
    table.hear(From(5, late))
    assert table.refused[-1] == (5, "Masked came while waiting for answers")
    assert not table.server.survivors[5]
    table.down().up()
    assert isinstance(table.end, servers.Revealed)
    assert table.end.survivors.tolist() == [0, 1, 2, 3, 4]
    assert before


def test_a_late_vector_stays_masked_even_with_the_key_that_the_others_have_told() -> None:
    """The server puts the mask key of a client together, and the vector comes after all: the seed still covers it."""
    table = Table(promised(6)).up().down().ready().up().down()
    late = table.said[5]
    table.up(without={5}).down()
    answers = [table.said[s] for s in range(5)]
    threshold = table.terms.threshold
    shares = np.stack([a.shares[5] for a in answers[:threshold]])[:, None]  # type: ignore[union-attr]
    mask = recovered(shares, np.arange(1, threshold + 1))[0].tobytes()
    assert public_key(mask) == table.server.keys[5, :KEY].tobytes(), "so much it knows"
    total = unpacked(late.values, 20, 5)  # type: ignore[union-attr]
    servers._without(table.server, (total,), 5, mask)
    opened = ((np.uint32(0) - total) & np.uint32(2**20 - 1)).tolist(), (total & np.uint32(2**20 - 1)).tolist()
    assert table.numbers[5][0].tolist() not in opened


@pytest.mark.parametrize("malicious", [False, True])
def test_a_set_of_too_few_gets_no_answer(malicious: bool) -> None:
    promise = promised(6, least=5, malicious=malicious)
    table = Table(promise).until_masked()
    few = Survivors(present(0, 1, 2, 3, count=6), 4)
    assert "sums are shown of 5 or more" in left(table.tell(0, few))
    lie = Survivors(present(1, 2, 3, count=6), 6)
    assert "all survivors are named, 3, and 6 are said to be" in left(table.tell(1, lie))
    most = Survivors(present(1, 2, 3, count=6), 7)
    assert "are said to be" in left(table.tell(2, most))


def test_a_set_without_the_client_itself_gets_no_answer() -> None:
    table = Table(promised(6)).until_masked()
    assert "numbers are not in the sum" in left(table.tell(0, Survivors(present(1, 2, 3, 4, 5, count=6), 5)))


def test_survivors_who_never_shared_anything_get_no_answer() -> None:
    table = Table(promised(6)).up(without={5}).down().ready().up().down()
    assert "had shared no secrets" in left(table.tell(0, Survivors(present(0, 1, 2, 3, 4, 5, count=6), 6)))


def test_a_roster_or_delivery_of_too_few_is_left() -> None:
    table = Table(promised(6))
    roster = rostered(table)
    few = Roster(present(1, count=6), roster.keys[:1], roster.proofs[:1])
    assert "2 clients are there, and it takes 3" in left(table.tell(0, few))
    table = Table(promised(6)).up().down().up()
    delivery = table.told[0]
    assert isinstance(delivery, Delivery)
    assert "2 clients have shared" in left(table.tell(0, Delivery(present(1, count=6), delivery.sealed[:1])))


def test_a_failed_attempt_reveals_nothing_that_opens_a_vector() -> None:
    """Fewer answers than the threshold: what the server holds puts no secret together."""
    table = Table(promised(6)).until_masked()
    table.down()
    few = table.terms.threshold - 1
    answers = {slot: table.said[slot] for slot in range(few)}
    for slot, answer in answers.items():
        table.hear(From(slot, answer))
    held_shares = np.stack([a.shares[5] for a in answers.values()])[:, None]  # type: ignore[union-attr]
    found = recovered(held_shares, np.arange(1, few + 1))[0].tobytes()
    assert commitment(table.terms.binding, 5, found) != table.server.commitments[5].tobytes()
    table.hear(servers.Close())
    assert isinstance(table.end, servers.Failed)
    assert "shares came, and it takes 3" in table.end.reason
    assert not table.server.answers.size
    assert table.server.tallies == (), "nor is anything kept"


# --- clients that cheat -------------------------------------------------------------------------------------


def test_a_mask_key_put_together_that_is_not_the_one_told_ends_the_attempt() -> None:
    """A client that shares another key than it uses would spoil the sum of everybody, unnoticed."""
    table = Table(promised(6))
    honest = table.clients[5]
    wrong = honest.secrets._replace(mask=digest(b"another key"))
    table.up()
    table.clients[5] = honest._replace(secrets=wrong)
    table.down()
    table.clients[5] = table.clients[5]._replace(secrets=honest.secrets)
    table.up().down().ready()
    table.up(without={5}).down().up()
    assert isinstance(table.end, servers.Failed)
    assert "the mask key of client 5 that was put together is not the one" in table.end.reason


def test_a_seed_put_together_that_is_not_the_one_committed_to_ends_the_attempt() -> None:
    table = Table(promised(6)).up()
    table.clients[5] = table.clients[5]._replace(
        secrets=table.clients[5].secrets._replace(seed=keystream(digest(b"x"), 32))
    )
    table.down().up().down().ready().up().down().up()
    assert isinstance(table.end, servers.Failed)
    assert "the seed of client 5 that was put together is not the one it had committed to" in table.end.reason


def test_wrong_shares_of_one_client_end_the_attempt_and_never_give_a_wrong_sum() -> None:
    table = Table(promised(6)).until_masked().down()
    spoilt = table.said[0]
    assert isinstance(spoilt, Shares)
    shares = spoilt.shares.copy()
    shares[3, 0] ^= 1
    table.said[0] = spoilt._replace(shares=shares)
    table.up()
    assert isinstance(table.end, servers.Failed)
    assert "seed of client 3" in table.end.reason


@settings(max_examples=60)
@given(st.data())
def test_whatever_a_client_sends_is_taken_refused_or_ends_in_an_honest_sum_or_a_failure(data: st.DataObject) -> None:
    """Shapes, dtypes, lengths, kinds: nothing but errors of ours, and no wrong sum."""
    table = Table(promised(5, malicious=data.draw(st.booleans())))
    at = data.draw(st.integers(0, 4))
    for turn in range(6):
        if table.end is not None:
            break
        if turn == at and 0 in table.said:
            table.said[0] = _spoilt(data, table.said[0])
        table.up().down().ready()
    if isinstance(table.end, servers.Revealed):
        wanted = sums(table.promise, table.end.survivors)
        honest = [s for s in table.end.survivors.tolist() if s != 0]
        assert honest
        assert 0 in table.end.survivors or lists(table.end.totals) == wanted


def _spoilt(data: st.DataObject, message: Any, name: str = "") -> Any:
    """A message with something wrong in one of its fields, or another message."""
    if data.draw(st.integers(0, 5)) == 0:
        return data.draw(
            st.sampled_from([Masked(np.zeros(3, np.uint8)), Parcels(np.zeros((4, 80), np.uint8)), None, 7])
        )
    name = name or data.draw(st.sampled_from(message._fields))
    value = getattr(message, name)
    if isinstance(value, bytes):
        wrong: Any = data.draw(st.sampled_from([b"", value[:-1], value + b"x", bytes(len(value)), None, "text", 3]))
    else:
        wrong = data.draw(st.sampled_from([
            value[:-1], value.astype(np.int64), np.zeros_like(value), np.full_like(value, 255), value[None],
            np.concatenate([value, value]), None, b"bytes", np.array(["x"]),
        ]))  # fmt: skip
    return message._replace(**{name: wrong})


@settings(max_examples=80)
@given(st.data())
def test_whatever_a_server_sends_a_client_goes_on_or_leaves(data: st.DataObject) -> None:
    table = Table(promised(5, malicious=data.draw(st.booleans())))
    at = data.draw(st.integers(0, 3))
    for turn in range(5):
        table.up()
        if turn == at and 0 in table.told:
            table.told[0] = _spoilt_by_server(data, table.told[0])
        table.down().ready()
    assert table.clients[0].stage in Stage


def _spoilt_by_server(data: st.DataObject, message: Any) -> Any:
    name = data.draw(st.sampled_from(message._fields))
    value = getattr(message, name)
    if isinstance(value, int):
        return message._replace(**{name: data.draw(st.sampled_from([-1, 0, 3, 10**9, None, "x", 2.5]))})
    return _spoilt(data, message, name)


def test_a_client_cannot_drive_the_others_out_by_keys_that_they_must_not_take() -> None:
    """Its bad signature, a point of low order, or another's key: the server takes none of them."""
    table = Table(promised(5, malicious=True))
    good = {slot: table.said[slot] for slot in range(5)}
    keys = good[0]
    assert isinstance(keys, Keys)
    table.hear(From(1, good[1]))
    copied = good[1]
    assert isinstance(copied, Keys)
    for wrong in (
        keys._replace(signature=bytes(64)),
        keys._replace(mask=bytes(32)),
        keys._replace(share=copied.share),
        keys._replace(share=keys.mask),
        copied,
    ):
        table.hear(From(0, wrong))
        assert table.refused.pop()[0] == 0
        assert not table.server.came[0]
    table.said = good
    table.up().down()
    assert not table.left


def test_a_client_cannot_drive_the_others_out_by_a_vote_for_another_set() -> None:
    table = Table(promised(5, malicious=True)).until_masked().down()
    table.said[0] = table.said[1]
    table.up().down().up()
    assert table.refused[0][0] == 0
    assert isinstance(table.end, servers.Revealed)
    assert not table.left


# --- numbers ------------------------------------------------------------------------------------------------


LIARS = {
    "plain": masked(Withstand(clients=10, corrupt=0.1), bits=16, bound=1.0, least=5),
    "weighted": masked(Withstand(clients=10, corrupt=0.1), bits=16, bound=1.0, least=5, most=100),
    "codes": chain(quantise(4, scale=1.0), masked(Withstand(clients=10, corrupt=0.1), least=5)),
    "codes, weighted": chain(quantise(4, scale=1.0), masked(Withstand(clients=10, corrupt=0.1), least=5, most=100)),
}


def opened_with(rule: Aggregator, forged: list[int] | None, *, honest: int = 9) -> np.ndarray:
    """The mean of honest clients, all of whom say ½ in every entry and weigh 70, and of one whose masked numbers are
    what it likes."""
    contexts = [Context(0, 1, i, size=3) for i in range(honest + 1)]
    sent = [rule.admit(rule.encode(Update(np.full(3, 0.5), 70.0), c), c) for c in contexts]
    if forged is not None:
        assert rule.masking is not None
        numbers = np.array([n % 2**rule.masking.width for n in forged], np.uint64)
        sent[-1]["sum"] = numbers[: len(sent[-1]["sum"])].astype(sent[-1]["sum"].dtype)
    total = fold(rule, sent)
    assert total is not None
    return np.asarray(rule.decode({}, total, contexts[0])[0])


@pytest.mark.parametrize("kind", LIARS)
def test_one_that_lies_has_no_mean_beyond_the_bound(kind: str) -> None:
    """Whatever numbers it adds, wrapped around as it likes: nothing comes out, or a mean that clients could have."""
    rule = LIARS[kind]
    assert np.abs(opened_with(rule, None) - 0.5).max() < 0.1
    random, refused = np.random.default_rng(0), 0
    for _ in range(300):
        scale = float(random.choice([10.0, 1e3, 1e5, 1e7, 1e9]))
        try:
            found = opened_with(rule, [int(n) for n in random.uniform(-scale, scale, 4)])
        except SecureAggregationFailed:
            refused += 1
        else:
            assert np.abs(found).max() <= 1.0 + 1e-9
    assert 30 < refused < 300


@pytest.mark.parametrize("weight", [0, 1, 9, 1001, -1, 2**20])
def test_a_weight_that_so_many_cannot_have_is_refused(weight: int) -> None:
    """Nine weigh 70 each; the tenth would make the weight of all 0, 1, 9, or more than ten times the most."""
    with pytest.raises(SecureAggregationFailed, match="each weighs from 1 to 100: at least one of them lies"):
        opened_with(LIARS["weighted"], [0, 0, 0, weight - 630])


def test_what_one_that_lies_can_do_is_what_the_page_says() -> None:
    """It knows about what the others say, and puts the mean where it likes within the bound; a number beyond it ends
    the round. docs/howto/secure-aggregation.md says so."""
    rule, half = LIARS["plain"], 2**15 - 1
    others = 9 * round(1.5 * half)
    for wanted in (-0.99, 0.0, 0.99):
        lie = round((wanted + 1) * half * 10) - others
        np.testing.assert_allclose(opened_with(rule, [lie] * 3), wanted, atol=1e-3)
    with pytest.raises(SecureAggregationFailed, match="a number of the sum of 10 clients is"):
        opened_with(rule, [round(2.1 * half * 10) - others] * 3)


def test_overflow_is_refused_when_the_algorithm_is_built_and_when_sums_are_merged() -> None:
    """The incumbent warns; here n · (2^b − 1) · w < R is checked."""
    with pytest.raises(ConfigurationError, match="they could wrap around"):
        masked(Withstand(clients=2**20), bits=24, most=2**21)
    rule = masked(Withstand(clients=3, corrupt=0.0), bits=16)
    contexts = [Context(0, 1, i, size=1) for i in range(4)]
    messages = [rule.admit(rule.encode(Update(np.ones(1), 1.0), c), c) for c in contexts]
    total = messages[0]
    for message in messages[1:3]:
        total = rule.merge(total, message)
    with pytest.raises(SumOverflow, match=r"4 messages are to be added up, and .* has room for 3"):
        rule.merge(total, messages[3])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_on_the_client(value: float) -> None:
    """Behind masks nobody could find it again."""
    from foedus.core.stage import chain, clip

    rule = masked(Withstand(clients=3, corrupt=0.0))
    for one in (rule, chain(clip(1.0), rule)):
        with pytest.raises(SumOverflow, match="not finite"):
            one.encode(Update(np.array([0.0, value]), 1.0), Context(0, 1, 0, size=2))


def test_entries_are_clipped_before_they_are_rounded() -> None:
    """An entry beyond the bound counts as the bound: it neither wraps around nor reaches into others' range."""
    rule = masked(Withstand(clients=3, corrupt=0.0), bits=8, bound=1.0)
    contexts = [Context(0, 1, i, size=2) for i in range(3)]
    total: Any = None
    for value, context in zip((1e30, -1e30, 1e30), contexts, strict=True):
        message = rule.admit(rule.encode(Update(np.array([value, -value]), 1.0), context), context)
        total = message if total is None else rule.merge(total, message)
    np.testing.assert_allclose(rule.decode({}, total, contexts[0])[0], [1 / 3, -1 / 3], atol=1e-9)


def test_numbers_of_another_form_are_not_masked() -> None:
    good = np.zeros(5, np.uint32)
    for wrong in ((), (good, good), *((np.zeros(*w),) for w in ((4, np.uint32), (5, np.uint64), (5, np.float32)))):
        table = Table(promised(5)).up().down()
        assert "uint32[5] of 'channel 0' are to be masked" in left(table.tell(0, Numbers(wrong)))


def test_an_attempt_takes_32_bytes_of_entropy_and_a_slot_of_its_own() -> None:
    promise = promised(5)
    for wrong in (own(0, promise)._replace(entropy=b"short"), own(0, promise)._replace(slot=5)):
        with pytest.raises(SecureAggregationFailed):
            clients.begin(termed(promise), wrong)
    assert isinstance(own(0, promise), Own)
    assert MODEL
    assert TRUST.label == pinned({identity_key(p) for p in PRIVATE}).label
