"""Curves over rounds: rounds to a target against a brute-force oracle; figures hold what the record says."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import ConfigurationError, MissingExtra
from foedus.record import Record
from foedus.report.curves import curve, plot_accuracy_by_partition, plot_run, plot_runs, rounds_to

from .records import record

VALUES = st.lists(st.one_of(st.none(), st.integers(0, 20).map(lambda k: k / 20)), min_size=1, max_size=12)


def oracle(values: list[float | None], target: float, *, smaller: bool) -> float | None:
    """Walk along the curve of the best so far, in steps of a ten-thousandth of a round."""
    points: list[tuple[int, float]] = []
    for number, value in enumerate(values, 1):
        if value is not None:
            best = value if not points else (min if smaller else max)(points[-1][1], value)
            points.append((number, best))
    reached = (lambda v: v <= target + 1e-9) if smaller else (lambda v: v >= target - 1e-9)
    if reached(points[0][1]):
        return points[0][0]
    for (a, x), (b, y) in pairwise(points):
        for share in np.linspace(0, 1, 10_001):
            if reached(x + share * (y - x)):
                return float(a + share * (b - a))
    return None


@pytest.mark.slow
@given(VALUES.filter(lambda v: any(x is not None for x in v)), st.integers(1, 19), st.booleans())
def test_rounds_to_is_where_the_best_so_far_crosses_the_target(
    values: list[float | None], target: int, smaller: bool
) -> None:
    found = rounds_to(record(values).metrics, "accuracy", target / 20, better=min if smaller else max)
    wanted = oracle(values, target / 20, smaller=smaller)
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert found == pytest.approx(wanted, abs=2e-3)


def test_a_loss_is_better_when_it_is_smaller_unless_said_otherwise() -> None:
    run = record([0.1, 0.2, 0.3])  # its loss is 2, 1, 2/3
    assert rounds_to(run.metrics, "loss", 1.5) == pytest.approx(1.5)
    assert rounds_to(run.metrics, "loss", 1.5, better=max) == 1.0


def test_rounds_to_names_the_metrics_that_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"'auroc' was never evaluated.*loss, accuracy"):
        rounds_to(record([0.5]).metrics, "auroc", 0.9)
    with pytest.raises(ConfigurationError, match="no test set"):
        rounds_to(record([None]).metrics, "accuracy", 0.9)


def test_a_curve_leaves_out_what_is_no_number() -> None:
    lines = [{"round": 1, "central": {"auroc": None}}, {"round": 2}, {"round": 3, "central": {"auroc": 0.5}}]
    found = curve(lines, "central", "auroc")
    assert found.rounds.tolist() == [3.0]
    assert found.values.tolist() == [0.5]


@pytest.mark.slow
def test_a_run_is_drawn_as_it_was_recorded(tmp_path: Path) -> None:
    run = record([0.5, None, 0.7, 0.9])._replace(folder=tmp_path)
    figure = plot_run(run)
    loss, accuracy, traffic = figure.axes
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [list(line.get_ydata()) for line in loss.lines] == [[1, 1 / 2, 1 / 3, 1 / 4], [2, 2 / 3, 2 / 4]]
    assert list(accuracy.lines[0].get_xdata()) == [1, 3, 4]
    assert list(traffic.lines[0].get_ydata()) == [2, 4, 6, 8]  # kB to the clients
    assert {text.get_text() for text in traffic.texts} == {"to clients", "from clients"}


@pytest.mark.slow
def test_figures_of_clients_come_with_a_band_and_the_worst_decile(tmp_path: Path) -> None:
    run = record([0.5, 0.6])._replace(folder=tmp_path)
    for line in run.metrics:
        line["clients"] = {"accuracy": {"mean": 0.4, "spread": 0.1, "worst_decile": 0.2}}
    axes = plot_run(run, tmp_path / "here.svg").axes[1]
    assert {text.get_text() for text in axes.texts} == {"test", "mean client", "worst decile"}
    low, high = axes.collections[0].get_paths()[0].vertices[:, 1].min(), 0.5
    assert (low, high) == pytest.approx((0.3, 0.5))
    assert (tmp_path / "here.svg").exists()


@pytest.mark.slow
def test_names_at_the_ends_of_curves_never_overlap(tmp_path: Path) -> None:
    runs = {f"run {i}": record([0.5, 0.9 + i * 1e-4]) for i in range(8)}
    figure = plot_runs(runs, "accuracy", tmp_path / "runs.png")
    figure.canvas.draw()
    boxes = sorted((t.get_window_extent() for t in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 8
    assert all(a.y1 <= b.y0 + 1 for a, b in pairwise(boxes))


@pytest.mark.slow
def test_nothing_is_drawn_in_pyplots_global_state(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; sys.path.insert(0, 'tests/report')\n"
        "from records import record; from foedus.report.curves import plot_run\n"
        f"figure = plot_run(record([0.5, 0.6]), {str(tmp_path / 'x.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert figure._repr_png_().startswith(b'\\x89PNG')  # what a notebook shows\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)


def test_a_run_without_rounds_says_so() -> None:
    with pytest.raises(ConfigurationError, match="no finished round"):
        plot_run(record([]))


@pytest.mark.slow
def test_runs_without_a_common_metric_are_named() -> None:
    other = record([0.5], metric="auroc")
    del other.metrics[0]["central"]["loss"]
    with pytest.raises(ConfigurationError, match="a: loss, accuracy; b: auroc"):
        plot_runs({"a": record([0.5]), "b": other})


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import foedus.report

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith("matplotlib.") or n == "foedus.report.canvas"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(foedus.report, "canvas", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install 'foedus\[report\]'"):
        plot_run(record([0.5]))


@pytest.mark.slow
def test_the_second_figure_has_a_curve_per_partition_in_percent(tmp_path: Path) -> None:
    runs: dict[str, Record] = {"uniform": record([0.5, 0.9]), "100 %": record([0.2, 0.4])}
    figure = plot_accuracy_by_partition(runs, tmp_path / "partitions.png")
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.9], [0.2, 0.4]]
    assert axes.yaxis.get_major_formatter()(0.5, 0) == "50 %"
