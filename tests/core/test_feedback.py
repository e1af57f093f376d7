"""Error feedback: nothing is lost, and what a biased compressor alone gets wrong comes right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.core.aggregate import Aggregator, mean
from foedus.core.feedback import error_feedback
from foedus.core.layers import power_sgd
from foedus.core.quantise import eden
from foedus.core.sparse import rand_k, random_mask, top_k
from foedus.core.stage import chain, clip
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, IncompatibleStages
from foedus.tree import Layout

LAYOUT = Layout(("w", "b"), ((6, 5), (4,)), ("float32",) * 2)
CHAINS = [
    chain(top_k(0.1), mean()), chain(rand_k(0.2), mean()), chain(random_mask(0.3, unbiased=False), mean()),
    chain(eden(1, biased=True), mean()), chain(power_sgd(1), mean()), chain(top_k(0.3), eden(2, biased=True), mean()),
]  # fmt: skip
chains = pytest.mark.parametrize("inner", CHAINS, ids=lambda a: a.label)


def visits(rule: Aggregator, updates: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What one client's messages decode to, [round, parameter], and what it keeps in the end."""
    assert rule.remember is not None
    kept, found = {}, []
    for round, vector in enumerate(updates):
        context = Context(0, round, 3, LAYOUT, size=len(vector), kept=kept)
        message = rule.encode(Update(vector, 5.0), context)
        found.append(rule.decode({}, rule.admit(message, context), context)[0])
        kept = rule.remember(Update(vector, 5.0), message, context)
    return np.array(found), kept["residual"]


@pytest.mark.slow
@chains
@given(st.integers(1, 8), st.integers(0, 2**32))
def test_what_was_learned_is_what_was_sent_and_what_is_still_held(inner: Aggregator, rounds: int, seed: int) -> None:
    """Σ updates = Σ decoded + residual: the identity that all proofs of error feedback start from."""
    updates = list(np.random.default_rng(seed).standard_normal((rounds, LAYOUT.size)))
    found, residual = visits(error_feedback(inner), updates)
    np.testing.assert_allclose(found.sum(0) + residual, np.sum(updates, axis=0), atol=1e-5 * rounds)


@chains
def test_the_residual_stays_bounded_and_the_mean_comes_right(inner: Aggregator) -> None:
    vector = np.random.default_rng(0).standard_normal(LAYOUT.size)
    found, residual = visits(error_feedback(inner), [vector] * 200)
    assert np.linalg.norm(residual) < 15 * np.linalg.norm(vector)
    np.testing.assert_allclose(found.mean(0), vector, atol=0.1 * np.linalg.norm(vector))
    if "top_k(0.1)" in inner.label:
        alone = np.array([visits(error_feedback(inner), [vector])[0][0] for _ in range(2)]).mean(0)
        assert (alone == 0).sum() == LAYOUT.size - 4  # without memory, most entries are never sent


def test_a_compressor_without_loss_keeps_nothing() -> None:
    assert not visits(error_feedback(mean()), [np.ones(LAYOUT.size)] * 3)[1].any()


def test_stages_before_it_are_part_of_what_it_remembers() -> None:
    """chain(clip, error_feedback(…)): the residual is that of the clipped update."""
    rule = chain(clip(1.0), error_feedback(chain(top_k(0.1), mean())))
    vector = 100 * np.random.default_rng(0).standard_normal(LAYOUT.size)
    found, residual = visits(rule, [vector])
    np.testing.assert_allclose(found.sum(0) + residual, vector / np.linalg.norm(vector), atol=1e-6)


def test_it_cannot_stand_behind_a_stage_that_only_the_server_undoes() -> None:
    with pytest.raises(IncompatibleStages, match=r"Write error_feedback\(chain\(top_k\(0.1\), ...\)\)"):
        chain(top_k(0.1), error_feedback(mean()))


def test_a_residual_of_another_model_is_refused() -> None:
    rule = error_feedback(mean())
    with pytest.raises(ConfigurationError, match="residual of 3 entries"):
        rule.encode(Update(np.ones(4), 1.0), Context(0, 1, 0, size=4, kept={"residual": np.ones(3)}))


def test_two_memories_do_not_overwrite_each_other() -> None:
    with pytest.raises(IncompatibleStages, match="keeps a residual already"):
        error_feedback(error_feedback(mean()))
