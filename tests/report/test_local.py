"""The first figure: every node's own model between averagings, exact where exactness can be had."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import foedus as fd
from foedus.errors import ConfigurationError
from foedus.record.folder import LOCAL, lines
from foedus.report.local import local_steps, plot_local

from .records import clients, record, settings, task

ALGORITHM = fd.fedavg(fd.local_sgd(0.3, epochs=1, batch_size=4))


def run(folder: Path, rounds: int = 3, *, every: int = 1, cohort: int | None = None) -> fd.Run:
    curves = fd.LocalCurves(every=every)
    return fd.simulate(
        task(),
        ALGORITHM,
        clients(),
        rounds=rounds,
        cohort=cohort,
        settings=settings(folder, local_curves=curves),
    )


def test_the_federated_model_is_at_every_rounds_beginning_and_at_the_end(tmp_path: Path) -> None:
    found = run(tmp_path)
    shared = local_steps(found.record).shared
    assert shared.rounds.tolist() == [0, 3, 6, 9]  # 12 examples in batches of 4 are the longest round
    central = [line["central"]["loss"] for line in found.metrics]
    np.testing.assert_allclose(shared.values[1:], central, rtol=1e-12)
    fresh = found._trainer.evaluate(found._trainer.initial(), clients().central_test)
    assert shared.values[0] == pytest.approx(fresh["loss"], rel=1e-12)


def test_every_nodes_curve_starts_from_the_federated_model_in_every_round(tmp_path: Path) -> None:
    steps = local_steps(run(tmp_path).record)
    assert set(steps.nodes) == {"c0", "c1", "c2"}
    begins = dict(zip(steps.shared.rounds, steps.shared.values, strict=True))
    for own in steps.nodes.values():
        at = [i for i, x in enumerate(own.rounds) if x in (0, 3, 6) and own.values[i] == begins[x]]
        assert len(at) == 3
    assert steps.nodes["c0"].rounds.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]
    assert steps.nodes["c1"].rounds.tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ]  # 5 examples: 2 steps, then it waits


def test_the_last_step_is_evaluated_whatever_the_stride(tmp_path: Path) -> None:
    whole, thin = run(tmp_path / "whole"), run(tmp_path / "thin", every=2)
    told = {(x["round"], x["client"], x["step"]): x["loss"] for x in lines(whole.folder / LOCAL)}
    kept = {(x["round"], x["client"], x["step"]): x["loss"] for x in lines(thin.folder / LOCAL)}
    assert {step for r, c, step in kept if c == "c0" and r == 1} == {0, 2, 3}
    assert kept == {key: told[key] for key in kept}


def test_rounds_that_a_node_sat_out_are_gaps(tmp_path: Path) -> None:
    found = run(tmp_path, rounds=6, cohort=1)
    steps = local_steps(found.record)
    for client, own in steps.nodes.items():
        rounds = sorted({x["round"] for x in lines(found.folder / LOCAL) if x["client"] == client})
        breaks = sum(b != a + 1 for a, b in pairwise(rounds))
        assert int(np.isnan(own.values).sum()) == breaks


def test_an_interrupted_run_ends_with_the_same_local_curves(tmp_path: Path) -> None:
    """Interrupted in the middle of a round, in the middle of a client, and resumed from its checkpoint."""
    calls = 0

    def hits(output: np.ndarray, target: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 25:
            raise KeyboardInterrupt
        return output.argmax(-1) == target

    watched = fd.Task(fd.logistic(4, classes=3), metrics=[fd.Metric("accuracy", hits)])

    def go(folder: Path) -> fd.Run:
        return fd.simulate(
            watched, ALGORITHM, clients(), rounds=4,
            settings=settings(folder, local_curves=fd.LocalCurves(), checkpoint_seconds=0),
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "interrupted")
    go(tmp_path / "interrupted")
    go(tmp_path / "whole")
    assert (tmp_path / "interrupted" / LOCAL).read_bytes() == (tmp_path / "whole" / LOCAL).read_bytes()


def test_without_local_curves_the_error_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="local_curves=LocalCurves"):
        local_steps(record([0.5])._replace(folder=tmp_path))


def test_local_curves_need_something_to_evaluate_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="with_test"):
        fd.simulate(
            task(), ALGORITHM, clients().with_test(None), rounds=1,
            settings=settings(tmp_path, local_curves=fd.LocalCurves()),
        )  # fmt: skip
    with pytest.raises(ConfigurationError, match="at least 1 local step, not 0"):
        fd.LocalCurves(every=0)


@pytest.mark.slow
def test_the_figure_has_all_nodes_the_isolated_one_and_the_federated_model(tmp_path: Path) -> None:
    together = run(tmp_path / "together").record
    alone = fd.simulate(
        task(), ALGORITHM, clients().subset([0]), rounds=3,
        settings=settings(tmp_path / "alone", local_curves=fd.LocalCurves()),
    ).record  # fmt: skip
    figure = plot_local(together, alone)
    names = {text.get_text() for text in figure.axes[0].texts}
    assert names == {"each node's own", "a node alone", "the federated model"}
    assert (tmp_path / "together" / "figures" / "local.png").exists()
    with pytest.raises(ConfigurationError, match="has 3 nodes"):
        plot_local(together, together)
