"""Poisons change what they say, where they say, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.core.examples import Examples
from foedus.core.poison import backdoor, flip_labels, patch, triggered
from foedus.core.population import Clients
from foedus.errors import ConfigurationError, DataError


def pictures(count: int = 20) -> Examples:
    rng = np.random.default_rng(count)
    return Examples.of(rng.uniform(0.1, 0.9, (count, 1, 6, 5)), rng.integers(0, 10, count))


def test_flipping_labels_twice_is_nothing() -> None:
    flip, some = flip_labels(10), pictures()
    assert (flip(some).targets == 9 - some.targets).all()
    assert (flip(flip(some)).targets == some.targets).all()
    assert flip(some).inputs[0] is some.inputs[0]


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 1, 6, 5), (4, 3, 6, 5)])
def test_a_patch_covers_the_lower_right_corner_of_every_channel(shape: tuple[int, ...]) -> None:
    plain = np.zeros(shape)
    marked = patch(2.0, size=3)(plain)
    assert (marked[..., -3:, -3:] == 2).all()
    assert (marked == 2).sum() == 9 * marked[..., 0, 0].size
    assert not plain.any()


def test_a_patch_on_pictures_in_rows_is_the_same_patch() -> None:
    rows = patch(1.0, size=2, image=(6, 5))(np.zeros((4, 30)))
    assert (rows.reshape(4, 6, 5) == patch(1.0, size=2)(np.zeros((4, 6, 5)))).all()
    with pytest.raises(DataError, match=r"does not fit into inputs of shape \[30\].*image=\(height, width\)"):
        patch()(np.zeros((4, 30)))


@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 99))
def test_a_backdoor_marks_its_share_and_labels_just_these(count: int, share: float, seed: int) -> None:
    some, trigger = pictures(count), patch(7.0, size=1)
    bad = backdoor(trigger, 3, share=share, seed=seed)(some)
    marked = bad.inputs[0][:, 0, -1, -1] == 7
    assert marked.sum() == np.ceil(share * count - 1e-9)
    assert (bad.targets[marked] == 3).all()
    assert (bad.targets[~marked] == some.targets[~marked]).all()
    assert (bad.inputs[0][~marked] == some.inputs[0][~marked]).all()


def test_success_is_measured_on_marked_examples_of_other_classes() -> None:
    some = pictures(50)
    test = triggered(some, patch(7.0, size=2), 3)
    assert len(test) == (some.targets != 3).sum()
    assert (test.targets == 3).all()
    assert (test.inputs[0][:, :, -2:, -2:] == 7).all()


# --- clients.poisoned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resident", "generated"])
def test_only_the_training_examples_of_the_chosen_change(kind: str) -> None:
    clients = Clients.pooled(pictures(12), [[0, 5, 1], [], [2, 2, 3], [4]], test=(pictures(4), [[0], [1], [2], [3]]))
    if kind == "generated":
        held = clients
        clients = Clients.generated(
            lambda i: held.train(i), 4, test=lambda i: held.test(i) or held.train(i), sizes=[3, 0, 3, 1]
        )
    bad = clients.poisoned([1, 2, 2], flip_labels(10))
    for i in range(4):
        expected = clients.train(i).targets if i != 2 else 9 - clients.train(i).targets
        assert bad.train(i).targets.tolist() == expected.tolist()
        assert bad.train(i).inputs[0].tobytes() == clients.train(i).inputs[0].tobytes()
        assert (bad.test(i) or pictures()).targets.tolist() == (clients.test(i) or pictures()).targets.tolist()
    assert bad.sizes is not None
    assert bad.sizes.tolist() == [3, 0, 3, 1]
    assert (bad.pool is None) == (kind == "generated")


def test_poisoning_nobody_is_nothing_and_strangers_are_refused() -> None:
    clients = Clients.pooled(pictures(4), [[0, 1], [2, 3]])
    assert clients.poisoned([], flip_labels(10)).fingerprint() == clients.fingerprint()
    assert clients.poisoned([1], flip_labels(10)).fingerprint() != clients.fingerprint()
    with pytest.raises(DataError, match="no client at position 2"):
        clients.poisoned([2], flip_labels(10))
    with pytest.raises(DataError, match="must keep the number of examples, and made 1 of 2"):
        clients.poisoned([0], lambda e: e.take(slice(0, 1))).train(0)


def test_shares_that_cannot_be_are_refused() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(ConfigurationError):
            backdoor(patch(), 0, share=share)
