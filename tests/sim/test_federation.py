"""A Federation is simulate's arguments by the same names."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path

import pytest

import foedus as fd
from foedus.errors import ConfigurationError
from foedus.sim.federation import run_federation

from ..report.records import clients, settings, task


def federation(folder: Path) -> fd.Federation:
    return fd.Federation(
        task=task(), algorithm=fd.fedavg(fd.local_sgd(0.1)), clients=clients(), rounds=2, cohort=2, seed=3,
        evaluation=fd.Evaluation(every=2), settings=settings(folder),
    )  # fmt: skip


def test_fields_are_the_arguments_of_simulate() -> None:
    assert [f.name for f in fields(fd.Federation)] == list(inspect.signature(fd.simulate).parameters)


def test_it_can_be_taken_apart(tmp_path: Path) -> None:
    run = run_federation(federation(tmp_path / "a"))
    again = fd.simulate(**vars(federation(tmp_path / "b")))
    assert run.metrics == again.metrics
    assert [line["cohort"] for line in run.metrics] == [2, 2]
    assert "central" not in run.metrics[0]


def test_clients_may_be_made_when_they_are_asked_for(tmp_path: Path) -> None:
    """So that whoever imports the file for its task loads nobody's data."""
    asked: list[int] = []

    def made() -> fd.Clients:
        asked.append(1)
        return clients()

    later = replace(federation(tmp_path / "a"), clients=made)
    assert "clients made when asked" in repr(later)
    assert not asked
    assert run_federation(later).metrics == run_federation(federation(tmp_path / "b")).metrics
    assert asked == [1]
    with pytest.raises(ConfigurationError, match=r"the function must give foedus\.Clients, and gave list"):
        run_federation(replace(later, clients=list))


def test_swapped_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Federation\(task=\.\.\.\) takes a foedus\.Task, .* Algorithm"):
        fd.Federation(task=fd.fedavg(fd.local_sgd(0.1)), algorithm=task(), clients=clients(), rounds=1)
