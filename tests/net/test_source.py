"""The owner's data: whatever form it was given in, the same examples reach the training process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import foedus as fd
from foedus.errors import ConfigurationError, DataError
from foedus.net.source import imported, of_bytes, own, placed, to_bytes

X, Y = np.arange(12.0, dtype=np.float32).reshape(4, 3), np.array([0, 1, 1, 0])


def test_every_form_gives_the_same_examples(tmp_path: Path) -> None:
    store = fd.ExampleStore(tmp_path / "s.sqlite")
    for x, y in zip(X, Y, strict=True):
        store.log(x, int(y))
    many = fd.Clients.of({"a": (X + 1, Y), "b": (X, Y)})
    for value, part in (((X, Y), ""), (fd.Examples.of(X, Y), ""), (lambda: (X, Y), ""), (store, ""), (many, "b")):
        found = own(value, part).train(0)
        assert found.digest() == fd.Examples.of(X, Y).digest()


def test_of_several_clients_one_has_to_be_named() -> None:
    many = fd.Clients.of({"a": (X, Y), 7: (X, Y)})
    assert own(many, "7").ids == ("7",)
    with pytest.raises(ConfigurationError, match=r"2 clients .a, 7.; say which is yours"):
        own(many)
    with pytest.raises(ConfigurationError, match="no 'c' among them"):
        own(many, "c")
    with pytest.raises(DataError, match="data is Examples"):
        own("heart.csv")


def test_all_parts_travel_and_arrays_stay_to_the_bit() -> None:
    many = fd.Clients.of({"a": ((X, X.astype(np.int32)), Y)}, test={"a": ((X[:1], X[:1].astype(np.int32)), Y[:1])})
    back = of_bytes(to_bytes(own(many)))
    assert back.validating is None
    test = back.test(0)
    assert test is not None
    assert len(test) == 1
    for there, here in zip(back.train(0).inputs, many.train(0).inputs, strict=True):
        assert there.dtype == here.dtype
        np.testing.assert_array_equal(there, here)


def test_a_population_of_one_stands_where_the_server_knows_it() -> None:
    mine = own(fd.Clients.of({"a": (X, Y)}, validation={"a": (X[:2], Y[:2])}))
    there = placed(mine, 5)
    assert len(there.train(5)) == 4
    validation = there.validation(5)
    assert validation is not None
    assert len(validation) == 2
    assert there.testing is None


def test_data_that_arrives_over_rounds_still_does() -> None:
    many = fd.Clients.of({"a": (X, Y), "b": (X, Y)}).arriving(1)
    there = placed(own(many, "b"), 2)
    assert [len(there.at(r).train(2)) for r in (1, 2, 3)] == [1, 2, 3]


def test_objects_are_found_in_files_and_modules(tmp_path: Path) -> None:
    (tmp_path / "mine_for_test.py").write_text("import numpy\ndata = ([[1.0]], [1])\n")
    assert imported("mine_for_test.py:data", tmp_path) == ([[1.0]], [1])
    assert imported("mine_for_test:data", tmp_path) == ([[1.0]], [1])
    for wrong, told in (
        ("mine_for_test.py", "module:object"), ("mine_for_test.py:dat", "has no 'dat'"), ("no.py:data", "no file"),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=told):
            imported(wrong, tmp_path)
