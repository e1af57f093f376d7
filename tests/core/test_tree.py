"""Layouts: nested arrays become one vector and come back the same."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.errors import ConfigurationError
from foedus.tree import Layout, leaves

names = st.text("abcxyz_", min_size=1, max_size=5)
arrays = hnp.arrays(
    st.sampled_from(["float32", "float16", "int8", "bool"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements={"allow_nan": False, "allow_infinity": False},
)
trees = st.dictionaries(
    names,
    st.recursive(arrays, lambda inner: st.dictionaries(names, inner, max_size=3) | st.lists(inner, max_size=3)),
)


@given(trees)
def test_a_tree_comes_back_as_it_was(tree: dict[str, Any]) -> None:
    layout, wanted = Layout.of(tree), dict(leaves(tree))
    vector = layout.flatten(tree)
    assert vector.shape == (layout.size,)
    assert str(vector.dtype) == layout.dtype
    found = layout.unflatten(vector)
    assert list(found) == list(wanted) == list(layout.names)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(vector[layout.slice(name)], array.reshape(-1))


@given(trees)
def test_the_layout_of_what_comes_back_is_the_same(tree: dict[str, Any]) -> None:
    layout = Layout.of(tree)
    again = Layout.of(layout.unflatten(layout.flatten(tree)))
    assert again == layout
    assert again.digest() == layout.digest()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_every_entry_has_a_name(sizes: list[int]) -> None:
    layout = Layout.of({f"p{i}": np.zeros(size, np.float32) for i, size in enumerate(sizes)})
    owners = [f"p{i}" for i, size in enumerate(sizes) for _ in range(size)]
    assert [layout.name_at(position) for position in range(layout.size)] == owners


def test_order_is_that_of_the_tree_and_names_are_joined_by_dots() -> None:
    layout = Layout.of({"b": {"w": np.ones(1), "v": [np.ones(2), np.ones(3)]}, "a": np.ones(4), "none": None})
    assert layout.names == ("b.w", "b.v.0", "b.v.1", "a")
    assert layout.offsets == (0, 1, 3, 6)


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        (["float32", "float32"], "float32"),
        (["float64", "float64"], "float64"),
        (["float64", "int64"], "float64"),  # BatchNorm in double precision counts its batches in int64
        (["float32", "int64"], "float32"),
        (["float64", "float32"], "float32"),
        (["int64"], "float32"),
        (["bfloat16"], "float32"),
        ([], "float32"),
    ],
)
def test_the_vector_is_double_where_the_model_is(dtypes: list[str], wanted: str) -> None:
    assert Layout(tuple(f"p{i}" for i in range(len(dtypes))), ((1,),) * len(dtypes), tuple(dtypes)).dtype == wanted


def test_averaged_counters_become_whole_numbers_again() -> None:
    layout = Layout(("n", "flag", "half"), ((1,), (1,), (1,)), ("int64", "bool", "bfloat16"))
    found = layout.unflatten(np.array([2.6, 0.9, 0.3], np.float32))
    assert found["n"].tolist() == [3]
    assert found["n"].dtype == np.int64
    assert found["flag"].tolist() == [True]
    assert found["half"].dtype == np.float32  # numpy has no bfloat16


def test_an_array_of_the_vectors_own_dtype_is_a_view() -> None:
    layout = Layout.of({"w": np.ones((2, 2), np.float32)})
    vector = np.arange(4, dtype=np.float32)
    layout.unflatten(vector)["w"][0, 0] = 7
    assert vector[0] == 7


LAYOUT = Layout.of({"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)})


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: LAYOUT.flatten({"w": np.zeros((2, 3))}), r"missing \['b'\]"),
        (lambda: LAYOUT.flatten({"w": 0, "b": 0, "c": 0}), r"not expected \['c'\]"),
        (lambda: LAYOUT.flatten({"w": np.zeros((3, 2)), "b": np.zeros(3)}), r"'w' has shape \(3, 2\)"),
        (lambda: LAYOUT.unflatten(np.zeros(8)), r"shape \(9,\) is needed, not \(8,\)"),
        (lambda: LAYOUT.slice("weight"), "no array is named 'weight'; there are: w, b"),
        (lambda: Layout(("w", "v", "w"), ((1,),) * 3, ("float32",) * 3), "same name: w"),
        (lambda: Layout.of({"w": np.zeros(2, np.complex64)}), "complex numbers do not fit.*: w"),
        (lambda: Layout.of({"a": {"b": np.zeros(1)}, "a.b": np.zeros(1)}), "same name: a.b"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(act: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        act()
