"""Encrypted sums: whole numbers come out exactly, whoever encrypted them; and what a server can do with them."""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cloudpickle
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("tenseal")

import foedus as fd
from foedus.core.aggregate import fold, message_bytes
from foedus.core.values import SERVER, Context, Message, Update
from foedus.errors import (
    ConfigurationError,
    IncompatibleStages,
    NoGuarantee,
    SecureAggregationFailed,
    SumOverflow,
    UpdateRefused,
)
from foedus.secure import homomorphic
from foedus.secure.fixed_point import Grid
from foedus.secure.homomorphic import PRIMES, SLOTS, SPREAD, TAIL, SiloKey, encrypted, silo_key

KEY, OTHER = silo_key(), silo_key()
RULE = encrypted(5, key=KEY, bits=16, bound=2.0, most=1000)
ROOM = SLOTS - 5 - len(PRIMES)  # entries of a ciphertext of five silos


def at(client: int, size: int = 3, round: int = 1) -> Context:
    return Context(4, round, client, size=size)


def message(client: int, vector: Any = (0.5, -1.0, 2.0), rule: Any = RULE, round: int = 1) -> Message:
    vector = np.asarray(vector)
    context = at(client, len(vector), round)
    return rule.admit(rule.encode(Update(vector, 10.0), context), context)


def decoded(total: Message, size: int = 3, rule: Any = RULE, round: int = 1) -> Any:
    return rule.decode({}, total, at(SERVER, size, round))[0]


# --- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 5), st.sampled_from([0, 1, 7, ROOM - 1, ROOM, 3000]))
def test_the_sum_is_that_of_the_whole_numbers(seed: int, count: int, size: int) -> None:
    """To the bit: beside numbers that were never encrypted."""
    rng, grid = np.random.default_rng(seed), Grid(16, 2.0)
    vectors, weights = rng.uniform(-3, 3, (count, size)), rng.integers(1, 1200, count)
    contexts = [at(i, size) for i in range(count)]
    updates = [Update(v, float(w)) for v, w in zip(vectors, weights, strict=True)]
    codes = [grid.codes(u, c).astype(np.int64) - grid.half for u, c in zip(updates, contexts, strict=True)]
    capped = np.minimum(weights, 1000)
    whole = sum(int(w) * c for w, c in zip(capped, codes, strict=True))
    total = fold(RULE, [RULE.admit(RULE.encode(u, c), c) for u, c in zip(updates, contexts, strict=True)])
    assert total is not None
    assert decoded(total, size).tobytes() == (whole * (grid.step / capped.sum())).tobytes()


def test_no_order_of_adding_changes_a_bit_of_the_ciphertexts() -> None:
    a, b, c = (message(i, np.full(2100, i - 1.0)) for i in range(3))
    one, two = RULE.merge(RULE.merge(a, b), c), RULE.merge(c, RULE.merge(b, a))
    assert {n: x.tobytes() for n, x in one.items()} == {n: x.tobytes() for n, x in two.items()}
    assert decoded(one, 2100)[0] == pytest.approx(0.0)


def test_encrypting_anew_gives_other_bytes_and_the_same_sum() -> None:
    first, second = (fold(RULE, [message(i) for i in range(3)]) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first["values"].tobytes() != second["values"].tobytes()
    assert decoded(first).tobytes() == decoded(second).tobytes()


@pytest.mark.slow
def test_the_noise_is_what_it_is_said_to_be() -> None:
    """At the largest numbers there is room for; no run of this test should ever come near the bound."""
    rule = encrypted(64, key=KEY, bits=24, bound=1.0)
    held = homomorphic._context(bytes(KEY))
    scale = 2.0 ** _scale_bits(rule)
    library, rng = homomorphic._library(), np.random.default_rng(1)
    rows = rng.choice([-1.0, 1.0], (16, SLOTS)) * 2**23
    total = library.ckks_vector(held, rows[0], scale)
    for row in rows[1:]:
        total.add_(library.ckks_vector(held, row, scale))
    noise = np.array(total.decrypt()) - rows.sum(0)
    assert noise.std() * scale == pytest.approx(SPREAD * 4, rel=0.1)
    assert np.abs(noise).max() < 0.25 * 6 / TAIL
    assert rule.sealed is not None
    assert rule.sealed.correctness > 110


def _scale_bits(rule: Any) -> int:
    return int(rule.encode.__self__.scale_bits)


def test_it_says_its_size_and_its_error() -> None:
    size = 5000
    sent = RULE.encode(Update(np.random.default_rng(0).normal(size=size), 1.0), at(0, size))
    assert RULE.sealed is not None
    assert message_bytes(sent) == pytest.approx(RULE.sealed.bytes(size), rel=0.01)
    assert RULE.sealed.error == Grid(16, 2.0).step
    vectors = np.random.default_rng(1).uniform(-2, 2, (3, size))
    total = fold(RULE, [message(i, v) for i, v in enumerate(vectors)])
    assert total is not None
    assert np.abs(decoded(total, size) - vectors.mean(0)).max() <= RULE.sealed.error


# --- who can do what ----------------------------------------------------------------------------------------


def test_a_server_without_the_key_adds_up_and_reads_nothing() -> None:
    server = encrypted(5, bits=16, bound=2.0, most=1000)
    assert server.label == RULE.label, "it is the same algorithm"
    context = at(0)
    sent = [RULE.encode(Update(np.array([0.5, -1.0, 2.0]), 10.0), at(i)) for i in range(3)]
    total = fold(server, [server.admit(m, context) for m in sent])
    assert total is not None
    assert decoded(total)[2] == pytest.approx(2.0, abs=1e-3)
    for act in (lambda: decoded(total, rule=server), lambda: message(0, rule=server)):
        with pytest.raises(NoGuarantee, match="only silos have one"):
            act()


def test_another_key_is_refused_and_opens_nothing() -> None:
    other = encrypted(5, key=OTHER, bits=16, bound=2.0, most=1000)
    with pytest.raises(UpdateRefused, match="another key"):
        RULE.admit(other.encode(Update(np.ones(3), 1.0), at(0)), at(0))
    blind = encrypted(5, bits=16, bound=2.0, most=1000)
    with pytest.raises(SecureAggregationFailed, match="different keys"):
        blind.merge(message(0), message(1, rule=other))
    total = fold(RULE, [message(i) for i in range(3)])
    assert total is not None
    with pytest.raises(SecureAggregationFailed, match="another key"):
        decoded(total, rule=other)
    lying = total | {"key": np.frombuffer(OTHER.id, np.uint8)}
    with pytest.raises(SecureAggregationFailed):
        decoded(lying, rule=other)


def test_a_server_that_shows_one_silo_for_many_is_found_out() -> None:
    """Twice the same silo, too few, a silo of another round, a count that is not true: silos refuse the sum."""
    again = [message(0), message(0), message(1)]
    few = [message(0), message(1)]
    old = [message(0), message(1), message(2, round=7)]
    for messages, told in ((again, "a silo twice"), (few, "2 silos are in the sum"), (old, "another round")):
        total = fold(RULE, messages)
        assert total is not None
        with pytest.raises(SecureAggregationFailed, match=told):
            decoded(total)
    total = fold(RULE, [message(i) for i in range(3)])
    assert total is not None
    with pytest.raises(SecureAggregationFailed, match="said to be 5"):
        decoded(total | {"count": np.array([5])})


# --- a server that computes with what it cannot read --------------------------------------------------------

LONG = 2 * ROOM + 50  # three ciphertexts
VECTORS = np.random.default_rng(5).uniform(-2, 2, (5, LONG))


def rows_of(given: Message) -> list[bytes]:
    return homomorphic._parted(given["values"], given["lengths"])


def long(client: int, *, rule: Any = RULE, size: int = LONG, **where: Any) -> list[bytes]:
    """The ciphertexts of a silo, from where it is said; all silos have something else to say."""
    context = at(client, size)._replace(**where)
    return rows_of(rule.admit(rule.encode(Update(VECTORS[client][:size], 10.0), context), context))


def added(*ciphertexts: bytes, less: bytes | None = None) -> bytes:
    """A sum, or a sum less another ciphertext."""
    there = homomorphic._context(homomorphic._public())
    read = [homomorphic._library().ckks_vector_from(there, raw) for raw in ciphertexts]
    for other in read[1:]:
        read[0].add_(other)
    if less is not None:
        read[0].sub_(homomorphic._library().ckks_vector_from(there, less))
    found: bytes = read[0].serialize()
    return found


def plus(raw: bytes, numbers: Any) -> bytes:
    """Known numbers added to unknown ones: it takes no key."""
    there = homomorphic._context(homomorphic._public())
    total = homomorphic._library().ckks_vector_from(there, raw)
    total.add_(homomorphic._library().plain_tensor(np.asarray(numbers, float).tolist()))
    found: bytes = total.serialize()
    return found


def times(raw: bytes, numbers: Any) -> bytes:
    """Unknown numbers multiplied by known ones, said to be of the old scale."""
    library = homomorphic._library()
    there = library.context_from(homomorphic._public(), n_threads=1)
    there.auto_rescale, there.global_scale = False, 2.0 ** _scale_bits(RULE)
    product = library.ckks_vector_from(there, raw)
    product.mul_(library.plain_tensor(np.asarray(numbers, float).tolist()))
    return rescaled(product.serialize(), 2.0 ** _scale_bits(RULE))


def rescaled(raw: bytes, scale: float) -> bytes:
    """The same ciphertext, said to be of another scale, in both places where one is written."""
    there = homomorphic._context(homomorphic._public())
    (only,) = homomorphic._library().ckks_vector_from(there, raw).ciphertext()
    only.scale = scale
    with tempfile.NamedTemporaryFile() as file:
        only.save(file.name)
        inner = Path(file.name).read_bytes()
    size = bytes([len(inner) & 127 | 128, len(inner) >> 7 & 127 | 128, len(inner) >> 14])
    return raw[:4] + b"\x12" + size + inner + b"\x19" + struct.pack("<d", scale)


def slots(**values: float) -> np.ndarray:
    """Numbers to add to the slots s0, s1, ..., and to the marks of silos m0, m1, ..."""
    found = np.zeros(SLOTS)
    for name, value in values.items():
        found[int(name[1:]) + (ROOM if name[0] == "m" else 0)] = value
    return found


def with_row(place: int, make: Any) -> Any:
    """A sum in which one ciphertext is another."""

    def changed(honest: list[bytes]) -> list[bytes]:
        return [make(raw, i) if i == place else raw for i, raw in enumerate(honest)]

    return changed


NO_SUM, MIXED, TWICE = "is no sum of what silos encrypted there", "other silos in one place", "a silo twice"
WRONG, SCALE = "a silo twice|not made of whole numbers", "another size, scale"
OTHER_RULE = encrypted(5, key=KEY, bits=16, bound=4.0, most=1000)
SPLICES: dict[str, tuple[Any, str]] = {
    "all but the last of one silo": (lambda honest: [*long(0)[:-1], honest[-1]], MIXED),
    "only the last of one silo": (lambda honest: [*honest[:-1], long(0)[-1]], MIXED),
    "one of one silo": (with_row(1, lambda raw, i: long(0)[i]), MIXED),
    "one without a silo": (with_row(0, lambda raw, i: added(raw, less=long(1)[i])), MIXED),
    "one silo for another": (with_row(0, lambda raw, i: added(raw, long(3)[i], less=long(1)[i])), MIXED),
    "one silo twice in one": (with_row(2, lambda raw, i: added(raw, long(1)[i])), TWICE),
    "one silo twice, another not": (with_row(1, lambda raw, i: added(raw, long(1)[i], less=long(2)[i])), TWICE),
    "two places exchanged": (lambda honest: [honest[1], honest[0], honest[2]], NO_SUM),
    "one place twice": (lambda honest: [honest[0], honest[0], honest[2]], NO_SUM),
    "one silo's places exchanged": (
        lambda honest: [added(honest[0], long(0)[1], less=long(0)[0]), *honest[1:]], NO_SUM,
    ),
    "another round": (with_row(1, lambda raw, i: added(*(long(c, round=2)[i] for c in range(3)))), NO_SUM),
    "one silo of another round": (
        with_row(1, lambda raw, i: added(raw, long(0, round=2)[i], less=long(0)[i])), NO_SUM,
    ),
    "a difference of two rounds": (
        with_row(0, lambda raw, i: added(raw, long(0, round=2)[i], less=long(0, round=3)[i])), NO_SUM,
    ),
    "another run": (with_row(1, lambda raw, i: added(*(long(c, seed=9)[i] for c in range(3)))), NO_SUM),
    "another channel": (with_row(1, lambda raw, i: added(*(long(c, channel="buffers")[i] for c in range(3)))), NO_SUM),
    "another grid": (with_row(1, lambda raw, i: added(*(long(c, rule=OTHER_RULE)[i] for c in range(3)))), NO_SUM),
    "another length": (with_row(1, lambda raw, i: added(*(long(c, size=LONG - 1)[i] for c in range(3)))), NO_SUM),
    "one silo, with marks put on it": (
        lambda honest: [plus(raw, slots(m1=1, m2=1)) for raw in long(0)], NO_SUM,
    ),
    "a number added": (with_row(0, lambda raw, i: plus(raw, slots(s7=1))), NO_SUM),
    "a prime added": (with_row(0, lambda raw, i: plus(raw, slots(s7=float(PRIMES[0, 0])))), NO_SUM),
    "a silo made up": (lambda honest: [plus(raw, slots(m3=1)) for raw in honest], NO_SUM),
    "multiplied": (lambda honest: [times(raw, np.ones(SLOTS)) for raw in honest], WRONG),
    "a place multiplied": (with_row(0, lambda raw, i: times(raw, slots(s7=1, m0=1, m1=1, m2=1))), WRONG),
    "another scale": (lambda honest: [rescaled(raw, 2.0 ** _scale_bits(RULE) / 2) for raw in honest], SCALE),
    "one of another scale": (with_row(2, lambda raw, i: rescaled(raw, 2.0**40)), SCALE),
    "fewer ciphertexts": (lambda honest: honest[:-1], "has 2 ciphertexts where"),
    "more ciphertexts": (lambda honest: [*honest, honest[-1]], "has 4 ciphertexts where"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPLICES)
def test_whatever_a_server_makes_of_ciphertexts_is_no_sum(kind: str) -> None:
    """It has all messages of silos, of this round and of others, and puts a sum together as it likes."""
    honest = [added(*(long(c)[i] for c in range(3))) for i in range(3)]
    change, told = SPLICES[kind]
    key = {"key": np.frombuffer(KEY.id, np.uint8), "count": np.array([4 if kind == "a silo made up" else 3])}
    with pytest.raises(SecureAggregationFailed, match=told):
        decoded(homomorphic._joined(change(honest)) | key, LONG)


def test_what_an_honest_server_makes_of_them_is_the_sum() -> None:
    """By the means of the test above, so that it is not their form that is refused."""
    honest = homomorphic._joined([added(*(long(c)[i] for c in range(3))) for i in range(3)])
    key = {"key": np.frombuffer(KEY.id, np.uint8), "count": np.array([3])}
    assert np.abs(decoded(honest | key, LONG) - VECTORS[:3].mean(0)).max() <= RULE.sealed.error  # type: ignore[union-attr]
    same = [plus(rescaled(raw, 2.0 ** _scale_bits(RULE)), np.zeros(SLOTS)) for raw in rows_of(honest)]
    assert decoded(homomorphic._joined(same) | key, LONG).tobytes() == decoded(honest | key, LONG).tobytes()


@given(st.integers(0, 2), st.integers(0, SLOTS - 1 - len(PRIMES)), st.integers(-(2**36), 2**36).filter(bool))
def test_no_change_of_a_number_has_the_same_tags(place: int, slot: int, by: int) -> None:
    """Without ciphertexts: what is in them, changed in one slot by any number."""
    rows = TOTAL.copy()
    rows[place, slot] += by
    with pytest.raises(SecureAggregationFailed, match=NO_SUM):
        RULE.encode.__self__._check_tags(rows, at(SERVER, LONG))  # type: ignore[attr-defined]


TOTAL = sum(RULE.encode.__self__._rows(Update(VECTORS[c], 10.0), at(c, LONG)) for c in range(3))  # type: ignore[attr-defined]


def test_sums_of_any_silos_have_the_tags_that_are_expected() -> None:
    rule = encrypted(64, key=KEY, bits=20, most=10)
    own = rule.encode.__self__  # type: ignore[attr-defined]
    made = [own._rows(Update(np.full(4100, 1.0 - c / 32), float(c)), at(c, 4100)) for c in range(1, 64)]
    for count in (1, 2, 40, 63):
        own._check_tags(sum(made[:count]), at(SERVER, 4100))


def test_ciphertexts_that_were_changed_are_refused_or_give_nothing() -> None:
    total = fold(RULE, [message(i) for i in range(3)])
    assert total is not None
    values = total["values"].copy()
    values[len(values) // 2] ^= 1
    with pytest.raises(SecureAggregationFailed):
        decoded(total | {"values": values})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["empty", "noise", "cut", "long", "zeros", "key", "scale", "short", "lengths"])
def test_what_no_silo_sends_is_refused_at_the_door(kind: str) -> None:
    sound, rng = RULE.encode(Update(np.ones(3), 1.0), at(0)), np.random.default_rng(0)
    values = sound["values"]
    library, own = homomorphic._library(), homomorphic._context(bytes(KEY))
    raw = {
        "empty": b"",
        "noise": rng.bytes(61_000),
        "cut": values.tobytes()[:-9],
        "long": values.tobytes() + bytes(70_000),
        "zeros": bytes(1000),
        "key": homomorphic._public(),
        "scale": library.ckks_vector(own, np.ones(SLOTS), 2.0**30).serialize(),
        "short": library.ckks_vector(own, np.ones(7), 2.0 ** _scale_bits(RULE)).serialize(),
    }.get(kind, values.tobytes())
    lengths = np.array([len(raw)]) if kind != "lengths" else np.array([-1])
    hostile = sound | {"values": np.frombuffer(raw, np.uint8), "lengths": lengths.astype(np.int64)}
    with pytest.raises(UpdateRefused):
        RULE.admit(hostile, at(0))


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=0, max_size=300))
def test_whatever_bytes_come_they_are_refused_and_nothing_breaks(raw: bytes) -> None:
    sound = {"key": np.frombuffer(KEY.id, np.uint8)}
    hostile = sound | {"values": np.frombuffer(raw, np.uint8), "lengths": np.array([len(raw)], np.int64)}
    with pytest.raises(UpdateRefused):
        RULE.admit(hostile, at(0))


def test_secrets_are_in_no_text_and_travel_only_where_they_must() -> None:
    assert "secret" in repr(KEY)
    assert bytes(KEY)[:50] not in repr((RULE, KEY)).encode()
    sent = RULE.encode(Update(np.ones(3), 1.0), at(0))
    assert all(bytes(KEY)[-4000:] not in array.tobytes() for array in sent.values())
    again = cloudpickle.loads(cloudpickle.dumps(RULE))  # a worker process of one's own
    assert again.encode(Update(np.ones(3), 1.0), at(0))["key"].tobytes() == KEY.id


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "kind", "told"),
    [
        (lambda: encrypted(200), NoGuarantee, r"masked\(foedus.Withstand\(clients=200"),
        (lambda: encrypted(2), NoGuarantee, "finds the other's update"),
        (lambda: encrypted(5, least=2), NoGuarantee, "Write least=3"),
        (lambda: encrypted(5, least=9), ConfigurationError, "from 1 to 5"),
        (lambda: encrypted(64, bits=24, most=10**7), ConfigurationError, "Write bits=|most="),
        (lambda: encrypted(5, key=b"secret"), ConfigurationError, "of type bytes"),  # type: ignore[arg-type]
        (lambda: encrypted(5, bound=0.0), ConfigurationError, "bound"),
        (lambda: fd.chain(fd.eden(2), RULE), IncompatibleStages, "message by message|codes"),
        (lambda: fd.chain(fd.subsample(0.5), RULE), IncompatibleStages, "message by message"),
        (lambda: fd.chain(fd.rotate(), fd.quantise(4, scale=1.0), RULE), IncompatibleStages, "Leave it out"),
        (lambda: fd.error_feedback(RULE), IncompatibleStages, "shows sums only"),
        (lambda: fd.fedavg(LOCAL, aggregator=RULE, gate=fd.Gate(max_norm=1.0)), IncompatibleStages, "norms or weights"),
        (lambda: fd.scaffold(LOCAL, aggregator=RULE), IncompatibleStages, r"encrypted\(...\), too"),
        (lambda: fd.fedavg(LOCAL, downlink=RULE), ConfigurationError, "downlink"),
        (lambda: SiloKey(b"no key").id and homomorphic._context(b"no key"), ConfigurationError, "no key"),
    ],
)  # fmt: skip
def test_what_would_not_hold_is_refused_when_it_is_built(build: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        build()


def test_more_bits_than_there_is_room_for_are_told_with_what_fits() -> None:
    with pytest.raises(ConfigurationError, match=r"Write bits=(\d+)") as found:
        encrypted(20, bits=24, most=100_000)
    fits = int(str(found.value).rsplit("bits=", 1)[1])
    assert 8 <= fits < 24
    encrypted(20, bits=fits, most=100_000)
    with pytest.raises(ConfigurationError):
        encrypted(20, bits=fits + 1, most=100_000)


def test_a_silo_beyond_the_last_and_one_too_many_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"encrypted\(8, ...\)"):
        message(7)
    total = fold(RULE, [message(i) for i in range(5)])
    assert total is not None
    with pytest.raises(SumOverflow):
        RULE.merge(total, message(0))


# --- in the simulator ---------------------------------------------------------------------------------------

LOCAL = fd.local_sgd(lr=0.1, epochs=1, batch_size=4)


def ran(folder: Path, rule: Any, *, rounds: int = 3, executor: Any = None, clients: int = 4, **more: Any) -> fd.Run:
    rng = np.random.default_rng(0)
    own = {f"s{i}": (rng.normal(size=(8 + i, 3)), rng.integers(2, size=8 + i)) for i in range(clients)}
    settings = fd.Settings(folder=folder, executor=executor or fd.executors.debug(), progress=False,
                           watch=more.pop("watch", None))  # fmt: skip
    return fd.simulate(fd.Task(fd.logistic(3, 2)), fd.fedavg(LOCAL, aggregator=rule), fd.Clients.of(own),
                       rounds=rounds, seed=3, settings=settings, **more)  # fmt: skip


def test_a_run_is_the_same_under_any_key_and_goes_on_under_another(tmp_path: Path) -> None:
    rule = lambda key: fd.chain(fd.clip(1.0), encrypted(4, key=key, bits=24, most=100))  # noqa: E731
    whole = ran(tmp_path / "whole", rule(KEY))
    ran(tmp_path / "parts", rule(KEY), rounds=1)
    parts = ran(tmp_path / "parts", rule(OTHER))
    assert parts.weights.vector.tobytes() == whole.weights.vector.tobytes()
    plain = ran(tmp_path / "plain", fd.chain(fd.clip(1.0), fd.mean()))
    np.testing.assert_allclose(whole.weights.vector, plain.weights.vector, atol=1e-5)
    assert whole.metrics[0]["bytes_up"] > 4 * 60_000
    stored = b"".join(p.read_bytes() for p in (tmp_path / "whole").iterdir())
    assert bytes(KEY)[-4000:-3000] not in stored, "the key is in no file"


@pytest.mark.slow
def test_workers_share_the_key_they_are_given(tmp_path: Path) -> None:
    rule = encrypted(4, key=KEY, bits=24, most=100)
    one = ran(tmp_path / "a", rule)
    two = ran(tmp_path / "b", rule, executor=fd.executors.processes(2))
    assert one.weights.vector.tobytes() == two.weights.vector.tobytes()


def test_a_population_that_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"write encrypted\(6, ...\)"):
        ran(tmp_path / "a", RULE, clients=6)
    with pytest.raises(ConfigurationError, match="no sum of fewer than 3, and 2 are asked"):
        ran(tmp_path / "b", RULE, cohort=2)
    with pytest.raises(ConfigurationError, match="lets nobody see one"):
        ran(tmp_path / "c", RULE, watch=fd.Watch())


def test_a_round_with_too_few_changes_nothing_and_is_told(tmp_path: Path) -> None:
    """Silos come as they are called; the second round has two of them."""
    cohorts = [[0, 1, 2, 3], [0, 1], [1, 2, 3]]
    sampler = fd.uniform(1)._replace(
        sample=lambda population, seed, number: np.array(cohorts[number - 1]), label="called"
    )
    rule = encrypted(4, key=KEY, bits=20, most=100)
    run = ran(tmp_path / "run", rule, cohort=sampler)
    before = ran(tmp_path / "one", rule, cohort=sampler, rounds=1)
    after = ran(tmp_path / "two", rule, cohort=sampler, rounds=2)
    assert after.weights.vector.tobytes() == before.weights.vector.tobytes() != run.weights.vector.tobytes()
    assert run.metrics[1]["secure"]["failed"] == "2 clients are in the sum, and 3 are needed"


def test_averaged_buffers_are_hidden_too_or_refused(tmp_path: Path) -> None:
    from torch import nn

    task = fd.Task(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.functional.cross_entropy)
    rng = np.random.default_rng(0)
    own = {f"s{i}": (rng.normal(size=(8, 3)).astype("f4"), rng.integers(2, size=8)) for i in range(4)}
    settings = fd.Settings(folder=tmp_path / "run", executor=fd.executors.debug(), progress=False)
    algorithm = fd.fedavg(LOCAL, aggregator=encrypted(4, key=KEY))
    with pytest.raises(IncompatibleStages, match="BatchNorm's statistics"):
        fd.simulate(task, algorithm, fd.Clients.of(own), rounds=1, settings=settings)
    hidden = algorithm.with_(buffers=encrypted(4, key=KEY, bound=100.0))
    assert fd.simulate(task, hidden, fd.Clients.of(own), rounds=1, settings=settings).metrics[0]["trained"] == 4


@pytest.mark.slow
def test_it_is_imported_when_it_is_used() -> None:
    code = "import foedus, foedus.secure.homomorphic, sys; assert 'tenseal' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
