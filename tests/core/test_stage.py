"""Every pair of stages: it composes, within the errors of its parts, or it is refused when it is built, with a reason.

What a pair should give is worked out without chain(): one stage after the other, undone in reverse, client by client.
"""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.core.aggregate import Aggregator, fold, mean
from foedus.core.entropy import entropy
from foedus.core.gate import Gate, forms_of
from foedus.core.layers import low_rank, matrices, on_layers, power_sgd
from foedus.core.quantise import drive, eden, qsgd, quantise, signs
from foedus.core.robust import median
from foedus.core.rotation import rotate
from foedus.core.sparse import rand_k, random_mask, subsample, top_k
from foedus.core.stage import Kind, Stage, chain, clip
from foedus.core.values import Context, Update
from foedus.errors import FoedusError, IncompatibleStages, UpdateRefused
from foedus.privacy.mechanisms import local
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.secure.graph import Withstand
from foedus.secure.masked import masked
from foedus.tree import Layout

LAYOUT = Layout(("w", "b", "v"), ((9, 8), (5,), (4, 3)), ("float32",) * 3)
SIZE, CLIENTS = LAYOUT.size, 3
STAGES = [
    clip(2.0),
    rotate(),
    rotate(own=True),
    random_mask(0.4),
    random_mask(0.4, unbiased=False),
    subsample(0.4),
    rand_k(0.4),
    top_k(0.4),
    quantise(3),
    quantise(5, scale=2.0),
    qsgd(3),
    drive(),
    eden(3),
    eden(2, biased=True),
    signs(),
    entropy(),
    low_rank(3),
    power_sgd(2),
    matrices(rotate()),
    matrices(quantise(4)),
    on_layers(lambda name, shape: name == "v", top_k(0.5)),
]
# What is masked is weighted by 1, 2, 3, and rounded on a grid far finer than what is compared.
MASKED = masked(Withstand(clients=CLIENTS, corrupt=0.0), bits=24, bound=64.0, most=3)
LAYERED = ("low_rank", "power_sgd", "matrices", "on_layers")
KEEPING = ("clip",)  # those after which the vector still lies as the model's layout says
CODING = ("quantise", "qsgd", "drive", "eden", "signs")
UPDATES = [Update(np.random.default_rng(i).standard_normal(SIZE).astype("f4"), float(i + 1)) for i in range(CLIENTS)]
CONTEXTS = [Context(11, 2, i, LAYOUT, size=SIZE) for i in range(CLIENTS)]


def kind(stage: Stage) -> str:
    return stage.label.partition("(")[0]


def sensible(first: Stage, second: Stage) -> bool:
    """Said anew, by name: which pairs make sense."""
    if kind(first) == "entropy" or (kind(second) == "entropy") != (kind(first) in CODING):
        return False  # codes are for entropy() and entropy() is for codes, whatever it stands behind
    return kind(second) not in LAYERED or kind(first) in KEEPING


def one_by_one(stages: list[Stage]) -> list[np.ndarray]:
    """What the server should find of every client's update."""
    found = []
    for update, context in zip(UPDATES, CONTEXTS, strict=True):
        steps, sent = [], update
        for stage in stages:
            there = context._replace(size=len(sent.vector))
            sent = stage.encode(sent, there)
            steps.append((stage, there, sent.beside))
        for stage, there, beside in reversed(steps):
            sent = stage.decode(sent._replace(beside=beside), there)
        found.append(sent.vector)
    return found


def aggregated(rule: Aggregator) -> np.ndarray:
    messages = [rule.admit(rule.encode(u, c), c) for u, c in zip(UPDATES, CONTEXTS, strict=True)]
    total = fold(rule, messages)
    assert total is not None
    return rule.decode({}, total, CONTEXTS[0]._replace(client=-1))[0]


PAIRS = list(product(STAGES, STAGES))
pairs = pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda s: s.label)


@pairs
def test_a_pair_composes_or_is_refused_with_a_reason(first: Stage, second: Stage) -> None:
    if not sensible(first, second):
        for end in (mean(), median(), MASKED):
            with pytest.raises(
                IncompatibleStages, match=r" takes (codes|reals), and | looks at the model's layers, and "
            ):
                chain(first, second, end)
        return
    alone = one_by_one([first, second])
    weights = [u.weight for u in UPDATES]
    wanted = np.average(np.array(alone, "f8"), axis=0, weights=weights)
    np.testing.assert_allclose(aggregated(chain(first, second, mean())), wanted, atol=2e-5)
    np.testing.assert_allclose(aggregated(chain(first, second, median())), np.median(alone, axis=0), atol=2e-5)
    if not (first.linear and second.linear):
        with pytest.raises(IncompatibleStages, match="undone message by message, and behind masked"):
            chain(first, second, MASKED)
        return
    np.testing.assert_allclose(aggregated(chain(first, second, MASKED)), wanted, atol=3e-5)


@pytest.mark.parametrize("stage", [s for s in STAGES if s.takes is Kind.REALS], ids=lambda s: s.label)
def test_a_stage_alone_composes_with_sums_and_with_what_needs_every_update(stage: Stage) -> None:
    alone = one_by_one([stage])
    wanted = np.average(np.array(alone, "f8"), axis=0, weights=[u.weight for u in UPDATES])
    np.testing.assert_allclose(aggregated(chain(stage, mean())), wanted, atol=2e-5)
    np.testing.assert_allclose(aggregated(chain(stage, median())), np.median(alone, axis=0), atol=2e-5)


# --- chains in chains ---------------------------------------------------------------------------------------


def made(rule: Aggregator) -> list[dict[str, bytes]]:
    """What clients send."""
    contexts = [c._replace(secret=known_to_all_who_know_the_seed) for c in CONTEXTS]
    sent = [rule.encode(u, c) for u, c in zip(UPDATES, contexts, strict=True)]
    return [{name: array.tobytes() for name, array in message.items()} for message in sent]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda s: s.label)
def test_a_chain_in_a_chain_is_one_row(first: Stage, second: Stage) -> None:
    """Refused or composed as the row is, to the bytes that travel."""
    if second.takes is not Kind.REALS:
        with pytest.raises(IncompatibleStages, match=" takes "):
            chain(first, chain(second, mean()))
        return
    for end in (mean(), median()):
        inner = chain(second, end)
        if not sensible(first, second):
            with pytest.raises(
                IncompatibleStages, match=r" takes (codes|reals), and | looks at the model's layers, and "
            ):
                chain(first, inner)
            continue
        row, nested = chain(first, second, end), chain(first, inner)
        assert nested.label == row.label
        assert made(nested) == made(row)
        assert (nested.shortcut is None) == (row.shortcut is None)
        np.testing.assert_array_equal(aggregated(nested), aggregated(row))


def test_three_chains_deep_the_order_counts_too() -> None:
    assert chain(clip(1.0), chain(rotate(), chain(quantise(2), mean()))).label == (
        "chain(clip(1.0), rotate(), quantise(2), mean())"
    )
    with pytest.raises(IncompatibleStages, match=r"rotate\(\) takes reals, and quantise\(2\) before it gives codes"):
        chain(clip(1.0), chain(quantise(2), chain(rotate(), mean())))
    with pytest.raises(IncompatibleStages, match=r"low_rank\(4\) looks at the model's layers, and rotate\(\)"):
        chain(rotate(), chain(clip(1.0), chain(low_rank(4), mean())))


def test_noise_of_clients_is_never_left_to_the_server_by_nesting() -> None:
    """What is undone message by message takes everything behind it along: the row does, and so does what is nested."""
    noisy = local(clip=1.0, noise_multiplier=1.0)
    assert made(chain(top_k(0.3), chain(noisy, mean()))) == made(chain(top_k(0.3), noisy, mean()))
    changed = chain(noisy, mean())._replace(label="mine")
    with pytest.raises(IncompatibleStages, match=r"local.* in mine would run there, too, instead of on the client"):
        chain(top_k(0.3), changed)
    with pytest.raises(IncompatibleStages, match=r"local.* takes reals, and quantise\(2\) before it gives codes"):
        chain(quantise(2), changed)


def test_what_was_changed_since_it_was_made_keeps_its_change() -> None:
    doubled = chain(clip(1.0), mean())
    doubled = doubled._replace(decode=lambda state, m, c: (2 * chain(clip(1.0), mean()).decode(state, m, c)[0], state))
    found = aggregated(chain(rotate(), doubled))
    np.testing.assert_allclose(found, 2 * aggregated(chain(rotate(), clip(1.0), mean())), atol=1e-6)
    with pytest.raises(IncompatibleStages, match="takes reals"):
        chain(quantise(2), doubled)


def test_there_are_pairs_of_both_sorts() -> None:
    counts = [sensible(a, b) for a, b in PAIRS]
    assert counts.count(True) > 150
    assert counts.count(False) > 150


@given(st.lists(st.sampled_from(STAGES), min_size=3, max_size=5))
def test_longer_rows_compose_exactly_if_their_pairs_do(stages: list[Stage]) -> None:
    moved = [kind(s) not in KEEPING for s in stages]
    fine = all(sensible(a, b) for a, b in pairwise(stages)) and kind(stages[0]) != "entropy"
    fine = fine and not any(kind(s) in LAYERED and any(moved[:i]) for i, s in enumerate(stages))
    if not fine:
        with pytest.raises(IncompatibleStages):
            chain(*stages, mean())
        return
    wanted = np.average(np.array(one_by_one(stages), "f8"), axis=0, weights=[u.weight for u in UPDATES])
    np.testing.assert_allclose(aggregated(chain(*stages, mean())), wanted, atol=1e-4 * max(1, np.abs(wanted).max()))


# --- messages from outside ----------------------------------------------------------------------------------

WHOLE = [
    chain(s, mean()) for s in STAGES if s.takes is Kind.REALS
] + [chain(rotate(), quantise(3), entropy(), median()), chain(top_k(0.3), eden(2), entropy(), mean())]  # fmt: skip


@pytest.mark.parametrize("rule", WHOLE, ids=lambda r: r.label)
@given(st.data(), st.booleans())
def test_whatever_a_client_sends_is_a_finite_update_or_an_error_of_ours(
    rule: Aggregator, data: st.DataObject, checked: bool
) -> None:
    """Without the gate's look at the message, too, wherever a stage stands between it and the sum."""
    checked = checked or rule.shortcut is not None
    message = dict(rule.encode(UPDATES[1], CONTEXTS[1]))
    name = data.draw(st.sampled_from(sorted(n for n in message if n != "weight")))
    array = message[name]
    change = data.draw(st.sampled_from(["drop", "cut", "long", "wide", "dtype", "text", "nan", "noise", "huge"]))
    if change == "drop":
        del message[name]
    elif change == "noise":
        raw = bytearray(array.tobytes())
        for _ in range(data.draw(st.integers(1, 5)) if raw else 0):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        message[name] = np.frombuffer(bytes(raw), array.dtype)
    else:
        message[name] = {
            "cut": array[:-1],
            "long": np.concatenate([array, array]),
            "wide": array[None],
            "dtype": array.astype("c16"),
            "text": np.array(["x"] * len(array)),
            "nan": np.full(len(array), np.nan),
            "huge": np.full(len(array), 1e300),
        }[change]
    try:
        if checked:
            Gate().check_message(message, FORMS[rule.label], CONTEXTS[1])
        with np.errstate(all="ignore"):
            total = rule.merge(rule.admit(UPDATES_SENT[rule.label], CONTEXTS[0]), rule.admit(message, CONTEXTS[1]))
            found, _ = rule.decode({}, total, CONTEXTS[0]._replace(client=-1))
    except FoedusError:
        return
    assert found.shape == (SIZE,)
    assert np.isfinite(found).all()


FORMS = {rule.label: forms_of(rule, CONTEXTS[0]) for rule in WHOLE}
UPDATES_SENT = {rule.label: rule.encode(UPDATES[0], CONTEXTS[0]) for rule in WHOLE}


def test_codes_wider_than_the_quantiser_gives_are_refused_though_the_frame_is_sound() -> None:
    rule, hostile = chain(quantise(2, scale=1.0), entropy(), mean()), entropy()
    message = dict(rule.encode(UPDATES[0], CONTEXTS[0]))
    sent = hostile.encode(Update(np.full(SIZE, 200, np.uint8), 1.0), CONTEXTS[0])
    message["values"] = sent.vector
    with pytest.raises(UpdateRefused, match=r"client 0 sent codes that quantise\(2, scale=1.0\) never gives"):
        rule.admit(message, CONTEXTS[0])
