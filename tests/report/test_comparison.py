"""What a comparison says: means over clients alone, what diverged, and how far federation gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from foedus.report.comparison import Arm, comparison_table, plot_comparison, verdict
from foedus.report.tables import plain

from .records import record


def arms(federated: float, centralised: float, alone: list[float]) -> list[Arm]:
    return [
        Arm("federated", [record([0.1, federated])]),
        Arm("centralised", [record([0.1, centralised])]),
        Arm("alone", [record([0.9, value]) for value in alone]),
    ]


def test_the_verdict_says_how_far_federation_gets() -> None:
    told = verdict(arms(0.8, 0.9, [0.3, 0.5]))
    assert "from 0.4 (a client alone, on average) to 0.8" in told
    assert told.endswith("all data in one place: 0.9. That is 80 % of the way.")


def test_no_share_is_told_where_pooling_does_not_help() -> None:
    assert "of the way" not in verdict(arms(0.8, 0.4, [0.5]))
    assert "That is all of the way" in verdict(arms(0.8, 0.7, [0.5]))


def test_for_errors_the_way_goes_down() -> None:
    told = [record([9.0, value], metric="rmse") for value in (3.0, 2.0, 6.0)]
    for each in told:
        for line in each.metrics:
            line["central"].pop("loss")
    names = ("federated", "centralised", "alone")
    assert "75 % of the way" in verdict([Arm(n, [r]) for n, r in zip(names, told, strict=True)])


def test_the_table_has_means_spread_and_extremes() -> None:
    text = plain(comparison_table(arms(0.8, 0.9, [0.3, 0.5])))
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "0.4 ± 0.1" in rows["accuracy"]
    assert rows["accuracy"].split()[-2:] == ["0.5", "0.3"]  # best and worst of two
    assert rows["best accuracy"].split()[-1] == "0.9"  # both were at 0.9 once
    assert "6 kB" in rows["traffic"]


def test_a_run_that_diverged_is_not_counted_and_is_named() -> None:
    lost = record([0.5], status="running")
    three = arms(0.8, 0.9, [0.3])
    assert "Training diverged: federated." in verdict([Arm("federated", [lost]), *three[1:]])
    both = Arm("alone", [lost, record([0.1, 0.4])])
    assert "from 0.4" in verdict([*three[:2], both])
    assert "diverged" in plain(comparison_table([Arm("federated", [lost]), *three[1:]]))


@pytest.mark.slow
def test_the_figure_has_the_mean_of_the_clients_alone_and_their_range(tmp_path: Path) -> None:
    figure = plot_comparison(arms(0.8, 0.9, [0.3, 0.5]), tmp_path / "c.png")
    loss, accuracy = figure.axes
    drawn = [list(line.get_ydata()) for line in accuracy.lines]
    assert [0.9, pytest.approx(0.4)] in drawn
    band = accuracy.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.3, 0.9)
    assert "alone, mean of 2" in {text.get_text() for text in loss.texts}
    assert (tmp_path / "c.png").exists()
