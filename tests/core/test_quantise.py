"""Quantisers: unbiased where they say so, the error that theory tells, and levels against numerical integration."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from foedus.core.aggregate import fold, mean, message_bytes
from foedus.core.quantise import (
    drive,
    eden,
    eden_error,
    levels,
    nearest,
    qsgd,
    quantise,
    sign_majority,
    signs,
)
from foedus.core.rotation import padded, rotate
from foedus.core.stage import Stage, chain, packed, unpacked
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, SumOverflow, UpdateRefused


def gone_through(stage: Stage, vector: np.ndarray, *, seed: int = 7, client: int = 0) -> np.ndarray:
    context = Context(seed, 1, client, size=len(vector))
    return stage.decode(stage.encode(Update(vector, 1.0), context), context).vector


def error(found: np.ndarray, vector: np.ndarray) -> float:
    return float(np.square(found - vector.astype("f8")).sum() / np.square(vector.astype("f8")).sum())


# --- evenly spaced levels -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [quantise(1), quantise(3), quantise(12), quantise(2, scale=3.0), qsgd(1), qsgd(4), qsgd(300)],
    ids=lambda s: s.label,
)
def test_over_many_clients_the_mean_is_the_update(stage: Stage) -> None:
    vector = np.random.default_rng(1).uniform(-2, 2, 30).astype("f4")
    clients = 4_000
    found = np.array([gone_through(stage, vector, client=c) for c in range(clients)], "f8")
    spread = found.std(0) / math.sqrt(clients)
    assert (np.abs(found.mean(0) - vector) < 5 * spread + 1e-6).all()


@given(st.integers(1, 16), st.integers(0, 30), st.integers(0, 2**32))
def test_every_entry_goes_to_one_of_the_two_levels_beside_it(bits: int, size: int, seed: int) -> None:
    vector = np.random.default_rng(seed).standard_normal(size).astype("f4")
    for stage, (low, high) in [
        (quantise(bits), (vector.min(initial=9), vector.max(initial=-9))),
        (quantise(bits, scale=9.0), (-9, 9)),
    ]:
        step = (high - low) / (2**bits - 1)
        found = gone_through(stage, vector).astype("f8")
        assert (np.abs(found - vector) <= step * (1 + 1e-3) + 1e-6).all()
        assert np.allclose((found - low) / (step or 1), np.rint((found - low) / (step or 1)), atol=2e-2)


def test_the_share_rounded_up_is_the_distance_from_the_level_below() -> None:
    vector = np.concatenate([[0.0, 3.0], np.full(200_000, 1.3)]).astype("f4")
    found = gone_through(quantise(2), vector)[2:]
    assert set(found.tolist()) == {1.0, 2.0}
    assert np.mean(found == 2.0) == pytest.approx(0.3, abs=0.005)


def test_the_error_of_two_levels_is_the_one_worked_out() -> None:
    """One bit between −a and a: an entry x becomes ±a with variance a² − x²."""
    vector = np.random.default_rng(0).standard_normal(100_000).astype("f4")
    a = np.abs(vector).max()
    vector[:2] = -a, a
    wanted = (len(vector) * float(a) ** 2 - np.square(vector.astype("f8")).sum()) / np.square(vector.astype("f8")).sum()
    assert error(gone_through(quantise(1), vector), vector) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("levels_", [1, 3, 50])
def test_qsgd_stays_below_its_papers_bound(levels_: int) -> None:
    """Lemma 3.1: E‖Q(x) − x‖² ≤ min(n / s², √n / s)·‖x‖²."""
    vector = np.random.default_rng(0).standard_normal(10_000)
    found = error(gone_through(qsgd(levels_), vector), vector)
    assert 0 < found <= min(len(vector) / levels_**2, math.sqrt(len(vector)) / levels_) * 1.05


def test_entries_beyond_a_common_scale_are_cut() -> None:
    found = gone_through(quantise(8, scale=1.0), np.array([-5.0, 0.0, 7.0], "f4"))
    assert found[[0, 2]].tolist() == [-1.0, 1.0]


@given(st.integers(2, 6), st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**32))
def test_codes_on_a_common_scale_add_up(clients: int, size: int, bits: int, seed: int) -> None:
    """The mean of what was decoded is what the mean of the codes decodes to."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 50, clients).astype(float)
    stage, rule = quantise(bits, scale=2.0), chain(quantise(bits, scale=2.0), mean())
    contexts = [Context(seed, 1, c, size=size) for c in range(clients)]
    updates = [Update(rng.standard_normal(size), w) for w in weights]
    total = fold(rule, [rule.admit(rule.encode(u, c), c) for u, c in zip(updates, contexts, strict=True)])
    assert total is not None
    alone = [stage.decode(stage.encode(u, c), c).vector for u, c in zip(updates, contexts, strict=True)]
    found, _ = rule.decode({}, total, contexts[0]._replace(client=-1))
    np.testing.assert_allclose(found, np.average(alone, axis=0, weights=weights), atol=1e-6)


# --- the best levels for rotated vectors --------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_levels_are_the_means_of_what_lies_nearest_to_them(bits: int) -> None:
    near = levels(bits)
    borders = np.concatenate([[-9], (near[1:] + near[:-1]) / 2, [9]])
    for i in {0, len(near) // 2, len(near) - 1}:
        mass = integrate.quad(stats.norm.pdf, borders[i], borders[i + 1])[0]
        middle = integrate.quad(lambda z: z * stats.norm.pdf(z), borders[i], borders[i + 1])[0] / mass
        assert near[i] == pytest.approx(middle, abs=1e-4)


def test_errors_are_those_of_the_literature() -> None:
    """Max 1960, table I: 0.3634, 0.1175, 0.03454, 0.009497, 0.002499."""
    found = [eden_error(b, biased=True) for b in range(1, 6)]
    np.testing.assert_allclose(found, [0.3634, 0.1175, 0.03454, 0.009497, 0.002499], rtol=3e-3)  # worked out by hand
    assert eden_error(1) == pytest.approx(math.pi / 2 - 1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_nearest_level_is_found(bits: int, dtype: str) -> None:
    rng = np.random.default_rng(bits)
    vector = np.concatenate([rng.standard_normal(20_000) * 1.5, [-1e9, 1e9, 0.0, 50.0]]).astype(dtype)
    borders = ((levels(bits)[1:] + levels(bits)[:-1]) / 2).astype(dtype)
    vector = np.concatenate([vector, borders, np.nextafter(borders, 9), np.nextafter(borders, -9)])
    assert (nearest(vector, bits) == np.searchsorted(borders, vector)).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tails", ["normal", "lognormal", "one spike"])
def test_edens_error_is_the_theorys_whatever_the_entries(bits: int, biased: bool, tails: str) -> None:
    rng, size = np.random.default_rng(3), 2**15 + 1000
    vector = {
        "normal": rng.standard_normal(size),
        "lognormal": rng.lognormal(0, 1, size),
        "one spike": np.full(size, 1e-3),
    }[tails]
    vector[0] += 50 * (tails == "one spike")
    vector = vector.astype("f4")
    found = np.mean([error(gone_through(eden(bits, biased=biased), vector, client=c), vector) for c in range(3)])
    if tails == "one spike" and bits == 1:  # every entry of the rotated vector is alike: one bit is nearly exact
        assert found < eden_error(bits, biased=biased)
    elif tails != "one spike":
        assert found == pytest.approx(eden_error(bits, biased=biased), rel=0.05 if tails == "lognormal" else 0.02)


def test_drive_is_the_sign_of_the_rotated_vector_and_a_scale() -> None:
    """Algorithm 1 of the paper, written with matrices."""
    vector = np.random.default_rng(0).standard_normal(64)
    context = Context(7, 1, 0, size=64)
    matrix = np.array([gone_back(row) for row in np.eye(64)]).T  # the inverse rotation of the stage
    rotated = matrix.T @ vector
    wanted = matrix @ np.sign(rotated) * np.square(vector).sum() / np.abs(rotated).sum()
    sent = drive().encode(Update(vector, 1.0), context)
    np.testing.assert_allclose(drive().decode(sent, context).vector, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        gone_through(drive(biased=True), vector),
        matrix @ np.sign(rotated) * np.abs(rotated).mean(),
        atol=1e-5,
    )


def gone_back(rotated: np.ndarray) -> np.ndarray:
    from foedus.core.coding import draws
    from foedus.core.rotation import turned_back

    return turned_back(rotated, draws(Context(7, 1, 0, size=64), "eden", own=True), 64)


def test_errors_of_clients_are_independent() -> None:
    vector = np.random.default_rng(0).standard_normal(2**12).astype("f4")
    mean_of_16 = np.mean([gone_through(eden(2), vector, client=c) for c in range(16)], axis=0)
    assert error(mean_of_16, vector) == pytest.approx(eden_error(2) / 16, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [drive(), eden(1), eden(2), eden(3)], ids=lambda s: s.label)
def test_the_error_of_the_mean_of_many_clients_vanishes(stage: Stage) -> None:
    """A bias would remain: of 400 clients' mean there is a 400th of the error left, and nothing else."""
    vector = np.random.default_rng(0).standard_normal(1500).astype("f4")
    total = np.sum([gone_through(stage, vector, client=c) for c in range(400)], axis=0, dtype="f8")
    assert error(total / 400, vector) == pytest.approx(eden_error(stage.bits or 1) / 400, rel=0.2)


# --- signs --------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32))
def test_the_majority_wins(clients: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((clients, size)) * 10.0 ** rng.integers(-5, 5, (clients, 1))
    rule, contexts = sign_majority(), [Context(0, 1, c, size=size) for c in range(clients)]
    messages = [
        rule.admit(rule.encode(Update(v, float(rng.integers(1, 99))), c), c)
        for v, c in zip(vectors, contexts, strict=True)
    ]
    assert rule.additive
    total = fold(rule, messages)
    assert total is not None
    assert rule.decode({}, total, contexts[0])[0].tolist() == np.sign(np.sign(vectors).sum(0)).tolist()


def test_zeros_vote_for_neither_side() -> None:
    found = gone_through(signs(), np.zeros(10_000))
    assert set(found.tolist()) == {-1.0, 1.0}
    assert abs(found.mean()) < 0.05


def test_a_vote_takes_a_bit_even_behind_a_rotation() -> None:
    for rule in (sign_majority(), chain(rotate(), sign_majority())):
        assert message_bytes(rule.encode(Update(np.ones(2**14), 1.0), Context(0, 1, 0, size=2**14))) == 2**14 // 8 + 8


# --- the wire -----------------------------------------------------------------------------------------------


@given(st.integers(1, 16), st.integers(0, 70), st.integers(0, 2**32))
def test_packing_is_the_bits_of_one_large_number(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count)
    number = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    wanted = number.to_bytes(-(-count * bits // 8), "little")
    assert packed(codes, bits).tobytes() == wanted
    assert unpacked(np.frombuffer(wanted, np.uint8), bits, count).tolist() == codes.tolist()


def test_bytes_that_are_no_such_codes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="9 codes of 3 bits take 4 bytes"):
        unpacked(np.zeros(3, np.uint8), 3, 9)


@pytest.mark.parametrize("size", [1, 1000, 199_210])
@pytest.mark.parametrize(
    ("stage", "bits", "more"),
    [(quantise(3), 3, 8), (quantise(4, scale=1.0), 4, 0), (qsgd(3), 3, 4), (signs(), 1, 0)],
)
def test_a_message_takes_its_bits_and_a_scale(stage: Stage, bits: int, more: int, size: int) -> None:
    vector = np.random.default_rng(0).standard_normal(size).astype("f4")
    message = chain(stage, mean()).encode(Update(vector, 1.0), Context(0, 1, 0, size=size))
    assert message_bytes(message) == math.ceil(Fraction(size * bits, 8)) + more + 8  # and the weight


@pytest.mark.parametrize(("stage", "bits"), [(drive(), 1), (eden(2), 2), (eden(5), 5)])
def test_a_rotated_message_takes_its_bits_of_the_padded_length(stage: Stage, bits: int) -> None:
    message = chain(stage, mean()).encode(Update(np.ones(199_210, "f4"), 1.0), Context(0, 1, 0, size=199_210))
    assert message_bytes(message) == padded(199_210) * bits // 8 + 4 + 8


@pytest.mark.parametrize(
    "build",
    [
        lambda: quantise(0),
        lambda: quantise(17),
        lambda: quantise(True),
        lambda: quantise(2.0),
        lambda: quantise(2, scale=0.0),
    ]  # type: ignore[arg-type]
    + [lambda: eden(9), lambda: eden(0), lambda: qsgd(0), lambda: qsgd(2**15)],
)
def test_settings_that_cannot_be_are_refused(build: object) -> None:
    with pytest.raises(ConfigurationError, match="must be a"):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("stage", [quantise(2), qsgd(2), eden(2), drive()], ids=lambda s: s.label)
def test_updates_beyond_float32_are_refused_by_the_client(stage: Stage) -> None:
    with pytest.raises(SumOverflow, match="beyond float32"), np.errstate(over="ignore"):
        stage.encode(Update(np.array([1e300, -1e300]), 1.0), Context(0, 1, 0, size=2))


BESIDE = {
    "quantise(2)": (
        "range",
        [np.zeros(1, "f4"), np.zeros(2, "f8"), np.array([0, np.nan], "f4"), np.array([1, 0], "f4")],
    ),
    "qsgd(2)": ("norm", [np.zeros(0, "f4"), np.array([-1], "f4"), np.array([np.inf], "f4")]),
    "eden(2)": ("scale", [np.zeros((1, 1), "f4"), np.array([np.inf], "f4"), np.array(["x"])]),
}


@pytest.mark.parametrize("stage", [quantise(2), qsgd(2), eden(2)], ids=lambda s: s.label)
def test_scales_that_no_client_sends_are_refused(stage: Stage) -> None:
    context = Context(0, 1, 6, size=4)
    sent = stage.encode(Update(np.ones(4, "f4"), 1.0), context)
    name, hostile = BESIDE[stage.label]
    for beside in [{}, *({name: h} for h in hostile)]:
        with pytest.raises(UpdateRefused, match="client 6 sent"):
            stage.decode(sent._replace(beside=beside), context)


@pytest.mark.parametrize(
    "stage", [quantise(2), quantise(2, scale=1.0), qsgd(2), eden(2), signs()], ids=lambda s: s.label
)
def test_codes_that_no_client_sends_are_refused(stage: Stage) -> None:
    context = Context(0, 1, 6, size=4)
    sent = stage.encode(Update(np.ones(4, "f4"), 1.0), context)
    for codes in [
        np.full(4, 200, np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((4, 1), np.uint8),
        np.full(4, -1, np.int8),
    ]:
        with pytest.raises(UpdateRefused, match="client 6 sent"):
            stage.decode(sent._replace(vector=codes), context)
