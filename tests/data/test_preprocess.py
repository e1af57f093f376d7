"""Federated preprocessing: what sums tell equals what the pooled data would."""

import cloudpickle
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.core.aggregate import mean
from foedus.core.population import Clients, Examples
from foedus.data import (
    federated_mean_filling,
    federated_median_filling,
    federated_mode_filling,
    federated_scaling,
    federated_sum,
    own_mean_filling,
    own_scaling,
)
from foedus.errors import ConfigurationError, DataError, SumOverflow


def population(tables, **more):
    return Clients.of({i: Examples.of(t, np.zeros(len(t), int), keep_dtype=True) for i, t in enumerate(tables)}, **more)


@st.composite
def tables(draw):
    """Tables of a few clients: columns of any magnitude, values missing, clients empty."""
    columns = draw(st.integers(1, 4))
    magnitude = 10.0 ** np.array(draw(st.lists(st.integers(-9, 12), min_size=columns, max_size=columns)))
    offset = draw(st.sampled_from([0.0, 1.0, 50.0, 1e5]))
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    found = []
    for rows in draw(st.lists(st.integers(0, 12), min_size=1, max_size=5)):
        table = (generator.normal(size=(rows, columns)) + offset) * magnitude
        table[generator.random(table.shape) < 0.2] = np.nan
        found.append(table)
    return found


class TestScaling:
    @given(tables())
    def test_federated_equals_pooled(self, found):
        """To 12 digits: the mean relative to the spread about it, the spread relative to itself."""
        scaling = federated_scaling(population(found))
        pooled = np.concatenate(found)
        for column in range(pooled.shape[1]):
            known = pooled[~np.isnan(pooled[:, column]), column].astype(np.longdouble)
            if not len(known) or known.std() < 1e-12 * abs(known).max():
                assert scaling.std[0, column] == 1
                continue
            assert abs(scaling.mean[0, column] - known.mean()) <= 1e-12 * abs(known).max()
            assert abs(scaling.std[0, column] / known.std() - 1) <= 1e-12

    def test_scaled_data_have_mean_0_and_spread_1(self):
        generator = np.random.default_rng(0)
        clients = population([generator.normal(5, 2, (n, 3)) * [1, 1e6, 1e-4] for n in (40, 7, 0, 1)])
        scaled = clients.map(federated_scaling(clients).apply).pooled_examples().inputs[0]
        assert np.allclose(scaled.mean(axis=0), 0, atol=1e-12)
        assert np.allclose(scaled.std(axis=0), 1, rtol=1e-12)

    @given(st.floats(0.001, 1000), st.integers(1, 9), st.integers(1, 9))
    def test_constant_columns_are_only_shifted(self, value, rows, others):
        """Rounding leaves a spread of 1e-17 here and there, which must not be divided by."""
        clients = population([np.full((rows, 1), value), np.full((others, 1), value)])
        scaling = federated_scaling(clients)
        assert scaling.std[0, 0] == 1
        assert np.allclose(clients.map(scaling.apply).train(0).inputs[0], 0, atol=1e-12 * value)

    def test_float32_stays_float32_and_whole_numbers_become_it(self):
        for x in (np.array([[1.0], [2.0]], np.float32), np.array([[1], [2]])):
            clients = Clients.of({0: (x, [0, 1])})
            assert clients.map(federated_scaling(clients).apply).train(0).inputs[0].dtype == np.float32

    def test_images_are_scaled_by_channel(self):
        images = np.random.default_rng(0).random((6, 3, 4, 5))
        scaling = federated_scaling(population([images[:2], images[2:]]), axis=1)
        assert np.allclose(scaling.mean[0], images.mean(axis=(0, 2, 3)), rtol=1e-12)
        assert np.allclose(scaling.std[0], images.std(axis=(0, 2, 3)), rtol=1e-12)
        whole = Examples.of(images, np.zeros(6), keep_dtype=True)
        wanted = (images - images.mean(axis=(0, 2, 3), keepdims=True)) / images.std(axis=(0, 2, 3), keepdims=True)
        assert np.allclose(scaling.apply(whole).inputs[0], wanted)

    def test_another_input_is_left_alone(self):
        clients = Clients.of({0: (([[1.0], [3.0]], [[10.0], [30.0]]), [0, 1])})
        scaled = clients.map(federated_scaling(clients, input=1).apply).train(0)
        assert scaled.inputs[0].tolist() == [[1], [3]]
        assert scaled.inputs[1].tolist() == [[-1], [1]]

    def test_regimes_are_scaled_apart(self):
        generator = np.random.default_rng(1)
        regime = generator.integers(0, 3, 90)
        series = np.stack([regime, generator.normal(size=90) * 10.0**regime + regime], axis=1).reshape(15, 6, 2)
        clients = population([series[:4], series[4:]])
        scaling = federated_scaling(clients, regime=lambda x: x[..., 0].astype(np.int64), regimes=3)
        values = clients.map(scaling.apply).pooled_examples().inputs[0][..., 1].ravel()
        for k in range(3):
            assert np.isclose(values[regime == k].mean(), 0, atol=1e-12)
            assert np.isclose(values[regime == k].std(), 1)

    def test_a_wrong_regime_is_refused(self):
        with pytest.raises(ConfigurationError, match="from 5 to 5, and regimes=2"):
            federated_scaling(population([np.ones((2, 1))]), regime=lambda x: np.full(x.shape[:-1], 5), regimes=2)

    def test_infinite_and_absurd_values_are_refused(self):
        with pytest.raises(DataError, match=r"client .*: An input has infinite"):
            federated_scaling(population([np.array([[np.inf]])]))
        with pytest.raises(DataError, match="1e\\+300"):
            federated_scaling(population([np.array([[1e300]])]))

    def test_a_missing_input_is_refused(self):
        with pytest.raises(ConfigurationError, match="input=3"):
            federated_scaling(population([np.ones((2, 1))]), input=3)

    def test_test_parts_are_scaled_by_training_figures(self):
        clients = population([np.array([[0.0], [2.0]])], central_test=([[4.0]], [0]))
        assert clients.map(federated_scaling(clients).apply).central_test.inputs[0].tolist() == [[3.0]]

    def test_the_result_travels(self):
        clients = population([np.array([[0.0], [2.0]])])
        mapped = Clients.generated(clients.train, 1).map(federated_scaling(clients).apply)
        assert cloudpickle.loads(cloudpickle.dumps(mapped)).train(0).inputs[0].tolist() == [[-1], [1]]

    def test_sums_go_through_the_aggregator_that_is_given(self):
        merged = []
        exact = mean(weighted=False)
        counting = exact._replace(merge=lambda a, b: merged.append(1) or exact.merge(a, b))
        clients = population([np.ones((2, 1))] * 3)
        assert federated_scaling(clients, aggregator=counting).mean[0, 0] == 1
        assert len(merged) == 4 * 2  # four sums over three clients


class TestFilling:
    @given(tables())
    def test_the_mean_of_what_is_there(self, found):
        filling = federated_mean_filling(population(found))
        pooled = np.concatenate(found)
        for column, value in enumerate(filling.values):
            known = pooled[~np.isnan(pooled[:, column]), column]
            wanted = known.mean() if len(known) else 0
            assert abs(value - wanted) <= 1e-12 * max(abs(known).max(initial=0), 1e-300)

    @given(tables(), st.sampled_from([0.1, 0.5, 0.9]))
    def test_quantiles_from_histograms(self, found, quantile):
        filling = federated_median_filling(population(found), quantile=quantile)
        pooled = np.concatenate(found)
        for column, value in enumerate(filling.values):
            known = np.sort(pooled[~np.isnan(pooled[:, column]), column])
            if not len(known):
                assert value == 0
                continue
            wanted = known[max(int(np.ceil(quantile * len(known))), 1) - 1]
            assert abs(value - wanted) <= 16 * abs(known).max() * 2.0**-32

    def test_the_most_frequent_value(self):
        found = [
            np.array([[1.0, 9.0], [3.0, np.nan]]),
            np.array([[3.0, 9.0], [np.nan, 8.0]]),
            np.array([[1.0, 7.0]]),
        ]
        clients = population(found)
        filling = federated_mode_filling(clients, [0])
        assert filling.values[0] == 1  # as often as 3, and less
        filled = clients.map(filling.apply)
        assert filled.train(1).inputs[0][1, 0] == 1
        assert np.isnan(filled.train(0).inputs[0][1, 1])  # a column that was not asked for

    def test_filling_leaves_nothing_missing_and_nothing_else_changed(self):
        x = np.array([[1.0, np.nan], [np.nan, 4.0]])
        filled = federated_mean_filling(population([x])).apply(Examples.of(x, [0, 0]))
        assert filled.inputs[0].tolist() == [[1, 4], [1, 4]]

    def test_an_impossible_quantile_is_refused(self):
        with pytest.raises(ConfigurationError, match="quantile"):
            federated_median_filling(population([np.ones((1, 1))]), quantile=1)


class TestOwn:
    def test_every_client_by_its_own_figures(self):
        clients = population([np.array([[1.0], [3.0]]), np.array([[100.0], [300.0], [np.nan]]), np.empty((0, 1))])
        scaled = clients.map_fitted(own_scaling())
        assert scaled.train(0).inputs[0].ravel().tolist() == [-1, 1]
        assert np.array_equal(scaled.train(1).inputs[0].ravel(), [-1, 1, np.nan], equal_nan=True)
        filled = clients.map_fitted(own_mean_filling())
        assert filled.train(1).inputs[0].ravel().tolist() == [100, 300, 200]

    def test_constant_and_unknown_columns(self):
        clients = population([np.array([[5.0, np.nan], [5.0, np.nan]])])
        assert (
            clients.map_fitted(own_mean_filling()).map_fitted(own_scaling()).train(0).inputs[0].tolist() == [[0, 0]] * 2
        )


def test_sums_are_exact_and_overflow_is_refused():
    clients = population([np.full((1, 1), 0.1)] * 10)
    assert federated_sum(clients, lambda e: np.array([float(len(e))])).tolist() == [10]
    with pytest.raises(SumOverflow):
        federated_sum(clients, lambda e: np.array([1e15]))
