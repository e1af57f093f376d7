"""Examples: what is converted, what is refused and how it is said."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.core.examples import Examples, check_targets
from foedus.errors import DataError


def test_floats_become_float32_and_whole_targets_int64():
    examples = Examples.of(np.zeros((3, 2)), np.array([0, 1, 2], np.uint8))
    assert examples.inputs[0].dtype == np.float32
    assert examples.targets.dtype == np.int64


def test_dtypes_are_kept_on_demand():
    examples = Examples.of(np.zeros((3, 2)), np.array([0, 1, 2], np.int8), keep_dtype=True)
    assert examples.inputs[0].dtype == np.float64
    assert examples.targets.dtype == np.int8


def test_fitting_arrays_are_not_copied():
    x, y = np.zeros((3, 2), np.float32), np.zeros(3, np.int64)
    examples = Examples.of(x, y)
    assert examples.inputs[0] is x
    assert examples.targets is y


def test_arrays_are_made_contiguous():
    assert Examples.of(np.zeros((2, 6), np.float32).T, np.zeros(6)).inputs[0].flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("several", [tuple, list, lambda arrays: dict(zip("ba", arrays, strict=True))])
def test_several_inputs_keep_their_order(several):
    examples = Examples.of(several([np.zeros((2, 3)), np.ones((2, 4), np.int32)]), [0, 1])
    assert [a.shape for a in examples.inputs] == [(2, 3), (2, 4)]
    assert examples.inputs[1].dtype == np.int32
    assert repr(examples) == "Examples(2: float32[3], int32[4] -> int64)"


@pytest.mark.slow  # loads torch
def test_torch_tensors_are_read():
    torch = pytest.importorskip("torch")
    examples = Examples.of(torch.arange(6.0, dtype=torch.float64).reshape(3, 2), torch.tensor([1, 0, 1]))
    assert examples.inputs[0].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0], [2.0]], [0], "input: 2, targets: 1"),
        (([[1.0]], [[1.0], [2.0]]), [0, 1], "input 0: 1, input 1: 2, targets: 2"),
        (["a", "b"], [0, 1], "must hold numbers, and the dtype is <U1 .first value: .'a'."),
        ([[1.0], [None]], [0, 1], "must hold numbers, and the dtype is object"),
        ([[1.0], [2.0, 3.0]], [0, 1], "cannot be read as one array"),
        ([[1.0], [2.0]], ["no", "yes"], "targets must hold numbers"),
        (1.0, [0], "one row per example"),
        ((), [0], "without any input"),
        (np.array(["2020-01-01"], "M8[D]"), [0], "datetime64"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(x, y, message):
    with pytest.raises(DataError, match=message):
        Examples.of(x, y)


def test_a_list_of_pictures_is_pointed_to_stack():
    with pytest.raises(DataError, match=r"np\.stack"):
        Examples.of([np.zeros((8, 8)) for _ in range(3)], [0, 1, 2])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_concat_undoes_cutting(sizes):
    total = sum(sizes)
    whole = Examples.of(np.arange(2.0 * total).reshape(total, 2), np.arange(total))
    ends = np.cumsum(sizes)
    parts = [whole.take(slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    joined = Examples.concat(parts)
    assert np.array_equal(joined.inputs[0], whole.inputs[0])
    assert np.array_equal(joined.targets, whole.targets)
    assert len(joined) == total


def test_concat_of_whole_numbers_and_floats_stays_float32():
    joined = Examples.concat([Examples.of([[1]], [0]), Examples.of([[0.5]], [0])])
    assert joined.inputs[0].dtype == np.float32


def test_concat_refuses_different_shapes():
    with pytest.raises(DataError, match=r"part 1 is Examples\(1: float32\[2\].*part 0 is"):
        Examples.concat([Examples.of([[1.0]], [0]), Examples.of([[1.0, 2.0]], [0])])
    with pytest.raises(DataError, match="empty list"):
        Examples.concat([])


def test_take_follows_the_rows():
    examples = Examples.of([[0.0], [1.0], [2.0]], [0, 1, 2]).take(np.array([2, 0]))
    assert examples.inputs[0].ravel().tolist() == [2, 0]
    assert examples.targets.tolist() == [2, 0]


def test_digest_changes_with_length_values_and_dtype():
    base = Examples.of(np.arange(200.0)[:, None], np.zeros(200, int))
    changed = Examples.of(np.arange(200.0)[:, None] + 1, np.zeros(200, int))
    digests = {e.digest() for e in (base, base.take(slice(0, 199)), changed, base.take(slice(0, 0)))}
    assert len(digests) == 4
    assert base.digest() == Examples.of(np.arange(200.0)[:, None], np.zeros(200, int)).digest()


class TestTargets:
    def test_labels_in_range_pass(self):
        check_targets(np.array([[0, 2], [1, -100]]), 3, ignore=-100)

    def test_the_first_wrong_label_is_named(self):
        with pytest.raises(
            DataError, match=r"2 of the 4 labels of client 'b' lie outside 0 to 9.* first is 10 at row 1"
        ):
            check_targets(np.array([9, 10, 0, -1]), 10, where="client 'b'")

    def test_fractions_are_no_labels(self):
        with pytest.raises(DataError, match="float32"):
            check_targets(np.zeros(2, np.float32), 2)
