"""Masked sums are exact, survive whom they are to survive, and are the same bytes as ever."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from foedus.errors import NoGuarantee, NotEnoughShares, SecureAggregationFailed
from foedus.protocol.secagg import client as clients
from foedus.protocol.secagg import server as servers
from foedus.protocol.secagg.client import Abandoned, Numbers, Stage
from foedus.protocol.secagg.conversation import check_revealed
from foedus.protocol.secagg.messages import message_size, terms_for
from foedus.protocol.secagg.server import Close, From, Gone, Phase
from foedus.secure.planes import packed_bytes
from foedus.secure.traffic import TERMS, overhead, published, traffic

from .attempts import MODEL, Table, held, lists, own, promised, sums, termed

VECTORS = Path(__file__).parent.parent / "vectors" / "secagg.json"
LOSABLE = [Phase.KEYS, Phase.SHARES, Phase.NUMBERS, Phase.VOTES, Phase.ANSWERS]


# --- exactness ----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_the_sum_is_the_plain_sum_whoever_drops_out_when(data: st.DataObject) -> None:
    """Over random numbers of clients, channels, entries, widths, graphs and dropouts, against servers of both sorts."""
    count = data.draw(st.integers(3, 24))
    malicious = data.draw(st.booleans())
    promise = promised(
        count, sizes=data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(8, 64)), min_size=1, max_size=4)),
        malicious=malicious,
        dropouts=0.3 if malicious else data.draw(st.sampled_from([0.0, 0.1, 0.3])),
        security=data.draw(st.sampled_from([3.0, 40.0])), correctness=2.0,
    )  # fmt: skip
    chosen = data.draw(st.lists(st.integers(0, count - 1), max_size=count // 2, unique=True))
    lost = {slot: data.draw(st.sampled_from(LOSABLE)) for slot in chosen}
    found = held(promise, lost=lost)
    assert not found.left
    if found.totals is None:
        assert lost, "nobody was lost, and it failed"
        assert "it takes" in found.reason or "its secrets take" in found.reason or "is shown" in found.reason
        return
    gone = {slot for slot, phase in lost.items() if phase in (Phase.KEYS, Phase.SHARES, Phase.NUMBERS)}
    near = set(range(count)) - gone
    assert set(found.survivors.tolist()) <= near
    assert len(near) - len(found.survivors) <= len(gone) * (found.survivors.size < count)
    assert lists(found.totals) == sums(promise, found.survivors)


@pytest.mark.parametrize("phase", LOSABLE)
@pytest.mark.parametrize("malicious", [False, True])
def test_as_many_as_are_to_be_survived_are_survived_at_every_stage(phase: Phase, malicious: bool) -> None:
    promise = promised(20, malicious=malicious)
    lost = dict.fromkeys(range(6), phase)
    found = held(promise, lost=lost)
    expected = range(20) if phase in (Phase.VOTES, Phase.ANSWERS) else range(6, 20)
    assert found.survivors.tolist() == list(expected)
    assert lists(check_revealed(found)) == sums(promise, found.survivors)


@pytest.mark.parametrize("phase", LOSABLE)
def test_below_the_threshold_the_attempt_fails_and_says_why(phase: Phase) -> None:
    promise = promised(12, malicious=True, dropouts=0.3)
    found = held(promise, lost=dict.fromkeys(range(7), phase))
    assert found.totals is None
    with pytest.raises(SecureAggregationFailed, match=r"it takes 7|secrets take 7|no sum of fewer"):
        check_revealed(found)


def test_a_graph_that_is_not_complete_is_used_and_survives_dropouts() -> None:
    promise = promised(60, security=20.0, corrupt=0.05, dropouts=0.1, sizes=[(5, 30)])
    assert termed(promise).degree < 40
    found = held(promise, lost={1: Phase.KEYS, 2: Phase.SHARES, 3: Phase.NUMBERS, 4: Phase.NUMBERS, 5: Phase.ANSWERS})
    assert lists(check_revealed(found)) == sums(promise, found.survivors)
    assert found.survivors.tolist() == [i for i in range(60) if i not in (1, 2, 3, 4)]


def test_a_floor_under_the_number_of_summands() -> None:
    promise = promised(10, least=8)
    assert held(promise, lost=dict.fromkeys(range(2), Phase.NUMBERS)).totals is not None
    found = held(promise, lost=dict.fromkeys(range(3), Phase.NUMBERS))
    assert found.totals is None
    assert "7 clients have sent masked numbers, and no sum of fewer than 8 is shown" in found.reason


def test_fewer_clients_than_were_planned_have_parameters_of_their_own() -> None:
    promise = promised(40, least=2)
    terms = terms_for(promise, session=bytes(16), round=1, attempt=1, model=MODEL, graph=bytes(32), clients=5)
    assert (terms.degree, terms.clients) == (4, 5)
    few = promised(40, corrupt=0.67, dropouts=0.1)
    with pytest.raises(NoGuarantee, match="all 26 that may collude by"):
        terms_for(few, session=bytes(16), round=1, attempt=1, model=MODEL, graph=bytes(32), clients=3)


# --- the machines -------------------------------------------------------------------------------------------


def test_numbers_may_be_ready_before_or_after_the_delivery() -> None:
    early, late = Table(promised(4)), Table(promised(4))
    early.up().down().ready().up().down()
    late.up().down().up().down().ready()
    assert [early.said[s].values.tobytes() for s in range(4)] == [late.said[s].values.tobytes() for s in range(4)]  # type: ignore[union-attr]


def test_a_message_that_comes_twice_is_answered_with_the_same_bytes() -> None:
    table = Table(promised(4)).up()
    roster = table.told[0]
    first, again = table.tell(0, roster), table.tell(0, roster)
    assert first[0].message.sealed.tobytes() == again[0].message.sealed.tobytes()
    table.down().ready().up().down().up()
    survivors = table.told[0]
    answer = [a for a in table.tell(0, survivors) if isinstance(a, clients.Send)]
    again = table.tell(0, survivors)
    assert [a.message.shares.tobytes() for a in again] == [a.message.shares.tobytes() for a in answer]  # type: ignore[union-attr]


@pytest.mark.parametrize("stage", [Stage.KEYED, Stage.SHARED, Stage.MASKED, Stage.DONE, Stage.FAILED])
def test_whatever_is_not_in_the_table_ends_the_clients_part(stage: Stage) -> None:
    table = Table(promised(4))
    steps = {Stage.KEYED: 0, Stage.SHARED: 1, Stage.MASKED: 2, Stage.DONE: 3, Stage.FAILED: 3}[stage]
    for _ in range(steps):
        table.up().down().ready()
    if stage is Stage.FAILED:
        table = Table(promised(4))
        table.tell(0, Abandoned("time"))
    client = table.clients[0]
    assert client.stage is stage
    wrong = Numbers((np.zeros(5, np.uint32),)) if stage is not Stage.SHARED else servers.Survivors(np.zeros(1, "u1"), 3)
    after, actions = clients.step(client, wrong)
    if stage in (Stage.DONE, Stage.FAILED):
        assert (after, actions) == (client, ())
    else:
        assert after.stage is Stage.FAILED
        assert "came while" in actions[0].reason  # type: ignore[union-attr]
        assert after.secrets == clients._NOTHING


def test_an_attempt_that_is_given_up_forgets_its_secrets() -> None:
    table = Table(promised(4)).up().down()
    left = table.tell(0, Abandoned("too few"))
    assert left == (clients.Left("the server gave the attempt up: too few"),)
    assert table.clients[0].held is None
    assert table.clients[0].secrets.mask == b""


def test_the_server_goes_on_without_those_who_are_gone() -> None:
    table = Table(promised(5))
    for slot in range(4):
        table.hear(From(slot, table.said[slot]))
    assert table.server.phase is Phase.KEYS
    table.hear(Gone(4))
    assert table.server.phase is Phase.SHARES
    assert sorted(table.told) == [0, 1, 2, 3]


def test_strangers_and_repetitions_are_refused_and_change_nothing() -> None:
    table = Table(promised(4))
    said = dict(table.said)
    table.hear(From(0, said[0]))
    table.hear(From(0, said[1]))
    table.hear(From(9, said[1]))
    table.hear(From(1, clients.Parcels(np.zeros((3, 80), np.uint8))))
    assert [slot for slot, _ in table.refused] == [0, 9, 1]
    assert table.server.keys[0].tobytes() == said[0].mask + said[0].share  # type: ignore[union-attr]


@pytest.mark.parametrize("phase", [Phase.KEYS, Phase.SHARES, Phase.NUMBERS, Phase.ANSWERS])
def test_time_that_is_up_before_anybody_has_come_is_a_failed_attempt(phase: Phase) -> None:
    table = Table(promised(4))
    while table.server.phase is not phase:
        table.up().down().ready()
    table.hear(Close())
    assert table.server.phase is Phase.FAILED
    table.hear(Close())
    table.hear(Gone(0))
    table.hear(From(0, clients.Masked(np.zeros(1, "u1"))))
    assert "too late" in table.refused[-1][1]


def test_nothing_secret_is_shown() -> None:
    table = Table(promised(4)).up().down()
    client = table.clients[0]
    for value in (
        client,
        client.own,
        client.secrets,
        client.held,
        client.roster,
        Numbers((np.arange(3),)),
        table.server,
    ):
        text = repr(value)
        assert len(text) < 200
        for secret in (client.secrets.mask, client.secrets.seed, client.own.entropy):
            assert secret.hex() not in text
            assert repr(secret) not in text


# --- bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("malicious", [False, True])
def test_clients_send_and_receive_what_the_figures_say(malicious: bool) -> None:
    promise = promised(30, sizes=[(100, 26)], malicious=malicious)
    found, terms = held(promise), termed(promise)
    up, down = overhead(promise.withstand)
    assert set(found.up.tolist()) == {up + packed_bytes(100, 26)}
    assert set(found.down.tolist()) == {down}
    told = traffic(terms.degree, 100, 26, malicious=malicious)
    assert told.total == up + down + packed_bytes(100, 26)
    assert (told.signatures > 0) == malicious
    assert told.terms == TERMS


FORMULA = [(2**10, 2**20, 26, 1.734), (2**14, 2**20, 30, 3.626), (2**14, 2**24, 30, 1.984)]


@pytest.mark.parametrize(("count", "entries", "width", "expansion"), FORMULA)
def test_the_published_formula(count: int, entries: int, width: int, expansion: float) -> None:
    """Bytes over those of plain 16-bit numbers."""
    assert round(published(count, entries, width) / (2 * entries), 3) == expansion


@pytest.mark.parametrize(("count", "entries", "width"), [(2**10, 2**20, 26), (2**14, 2**24, 30)])
def test_traffic_is_within_three_percent_of_the_published_formula(count: int, entries: int, width: int) -> None:
    told = traffic(count - 1, entries, width)
    assert told.total <= 1.03 * published(count, entries, width)
    assert told.total - told.tags <= 1.003 * published(count, entries, width), "nearly all above it are the seals' tags"


def test_a_messages_size_is_that_of_its_parts() -> None:
    table = Table(promised(5, malicious=True))
    keys = table.said[0]
    assert message_size(keys) == 4 * 32 + 64
    assert message_size(table.up().told[0]) == 1 + 4 * (64 + 96)


# --- the same bytes as ever ---------------------------------------------------------------------------------


def transcript(malicious: bool) -> dict[str, Any]:
    """All that is said in an attempt of six with two dropouts, as text."""
    promise = promised(6, sizes=[(7, 19), (3, 33)], malicious=malicious, dropouts=0.2)
    table, said = Table(promise), []

    def note() -> None:
        said.append({str(slot): _text(message) for slot, message in sorted(table.said.items())})

    without = [set(), {1}, {2}, set(), set()]
    while table.end is None:
        note()
        gone = without[len(said) - 1]
        for slot in gone:
            del table.clients[slot]
        table.up(without=gone)
        table.told = {slot: m for slot, m in table.told.items() if slot in table.clients}
        table.down().ready()
    assert isinstance(table.end, servers.Revealed)
    return {
        "terms": {n: v.hex() if isinstance(v, bytes) else v for n, v in table.terms._asdict().items()},
        "binding": table.terms.binding.hex(), "numbers": [lists(n) for n in table.numbers], "said": said,
        "survivors": table.end.survivors.tolist(), "totals": lists(table.end.totals),
    }  # fmt: skip


def _text(message: Any) -> dict[str, str]:
    raw = {n: v if isinstance(v, bytes) else v.tobytes() for n, v in message._asdict().items()}
    return {n: v.hex() for n, v in raw.items()}


@pytest.mark.parametrize("case", ["honest server", "lying server"])
def test_every_byte_that_clients_say_is_the_one_written_down(case: str) -> None:
    """A change here is a change of the protocol: raise VERSION, and run these tests with FOEDUS_WRITE_VECTORS=1."""
    found = json.loads(json.dumps(transcript(case == "lying server")))
    stored = json.loads(VECTORS.read_text("utf-8")) if VECTORS.exists() else {}
    if os.environ.get("FOEDUS_WRITE_VECTORS"):
        VECTORS.write_text(json.dumps(stored | {case: found}, indent=1) + "\n", "utf-8")
    assert found == stored[case]


def test_the_vectors_say_themselves_that_they_are_right() -> None:
    for case in json.loads(VECTORS.read_text("utf-8")).values():
        chosen = [case["numbers"][slot] for slot in case["survivors"]]
        for i, (_, entries, width) in enumerate(case["terms"]["channels"]):
            wanted = [sum(numbers[i][j] for numbers in chosen) % 2**width for j in range(entries)]
            assert case["totals"][i] == wanted
        assert case["survivors"] == [0, 3, 4, 5]


def test_no_two_clients_and_no_two_attempts_share_a_byte_of_keys() -> None:
    promise = promised(4)
    seen = set()
    for attempt in (1, 2):
        for slot in range(4):
            _, (_, send) = clients.begin(termed(promise, attempt=attempt), own(slot, promise))
            assert isinstance(send, clients.Send)
            seen |= {send.message.mask, send.message.share, send.message.commitment}  # type: ignore[union-attr]
    assert len(seen) == 2 * 4 * 3, "the same entropy twice, and still fresh keys"


def test_a_sum_that_failed_raises_with_its_reason() -> None:
    with pytest.raises(SecureAggregationFailed, match="no sum of fewer"):
        check_revealed(held(promised(5, least=5), lost={0: Phase.KEYS}))
    assert issubclass(NotEnoughShares, SecureAggregationFailed)
