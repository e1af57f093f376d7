"""The picture of a partition shows the counts that there are."""

import sys

import numpy as np
import pytest

from foedus.core.population import Clients, Examples
from foedus.errors import MissingExtra
from foedus.report.partition import plot_partition

matplotlib = pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow  # loads matplotlib


def clients_of(targets, **more):
    pool = Examples.of(np.zeros((sum(map(len, targets)), 1)), np.concatenate([np.array(t) for t in targets]))
    ends = np.cumsum([len(t) for t in targets])
    return Clients.pooled(pool, [np.arange(e - len(t), e) for e, t in zip(ends, targets, strict=True)], **more)


def test_bubbles_have_areas_in_proportion_to_counts():
    clients = clients_of([[0, 0, 0, 0, 2], [2], np.empty(0, int)], ids=["north", "south", "empty"])
    grid, side = plot_partition(clients, classes=["zero", "one", "two"]).axes
    bubbles = grid.collections[0]
    assert bubbles.get_offsets().tolist() == [[0, 0], [1, 0], [1, 1]]
    areas = bubbles.get_sizes()
    assert np.allclose(areas / areas.max(), [1, 0.25, 0.25])
    assert [t.get_text() for t in grid.get_yticklabels()] == ["north", "south", "empty"]
    assert [t.get_text() for t in grid.get_xticklabels()] == ["zero", "two"]
    assert [bar.get_width() for bar in side.patches] == [5, 1, 0]


def test_bars_are_stacked_to_one_hundred_and_sorted_by_main_class():
    clients = clients_of([[i % 3] * 9 + [(i + 1) % 3] for i in range(60)])
    above, below = plot_partition(clients).axes
    heights = np.array([bar.get_height() for bar in above.patches]).reshape(3, 60)
    assert np.allclose(heights.sum(axis=0), 100)
    assert np.allclose(heights[0], 90)
    colours = [bar.get_facecolor() for bar in above.patches[:60]]
    assert all(colours[i] == colours[0] for i in range(20))
    assert colours[20] != colours[0]
    assert [bar.get_height() for bar in below.patches] == [10] * 60


def test_numbers_are_drawn_as_ranges_sorted_by_the_median():
    clients = clients_of([[5.0, 7.0, 9.0], [1.0], []])
    above, below = plot_partition(clients).axes
    assert above.collections[1].get_offsets()[:, 1].tolist() == [1, 7]
    assert [bar.get_height() for bar in below.patches] == [1, 3]


def test_sequences_and_empty_populations_show_sizes():
    for targets, sizes in (([[[1, 2]], [[1, 2], [3, 4]]], [2, 1]), ([[], []], [0, 0])):
        axes = plot_partition(clients_of(targets)).axes[0]
        assert [bar.get_height() for bar in axes.patches] == sizes


def test_of_a_large_population_an_even_sample_is_read():
    asked = []

    def function(i):
        asked.append(i)
        return [[0.0]], [i % 2]

    figure = plot_partition(Clients.generated(function, 1_000_000))
    assert len(asked) == 400
    assert (asked[0], asked[-1]) == (0, 999_999)
    assert "an even sample of 400 is shown" in figure.get_suptitle()


def test_it_is_saved(tmp_path):
    file = tmp_path / "partition.png"
    plot_partition(clients_of([[0, 1], [1]]), file, title="mine")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'foedus\[report\]'"):
        plot_partition(clients_of([[0]]))
