"""A comparison is fair: same weights, same data, same number of passes; and it goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import foedus as fd
from foedus.errors import ConfigurationError
from foedus.record import Record
from foedus.record.folder import METRICS
from foedus.report.tables import plain
from foedus.sim.compare import centralised_client, some_with_data, without_penalty

from ..report.records import clients, settings, task

LOCAL = fd.local_sgd(0.3, epochs=2, batch_size=4)


def compared(folder: Path, algorithm: fd.Algorithm | None = None, **more: object) -> fd.Comparison:
    arguments = {"rounds": 3, "settings": settings(folder)} | more
    return fd.compare(task(), algorithm or fd.fedavg(LOCAL), clients(), **arguments)


def test_all_begin_with_the_same_weights_and_train_in_the_same_way(tmp_path: Path) -> None:
    """One client that has all the data: then the three are the same run."""
    one = clients((26,))
    found = fd.compare(task(), fd.fedavg(LOCAL), one, rounds=3, settings=settings(tmp_path))
    models = [load_file(path)["weight"] for path in sorted(tmp_path.rglob("model.safetensors"))]
    assert len(models) == 3
    assert all(np.array_equal(models[0], other) for other in models)
    assert found.federated.metrics[-1]["central"] == found.centralised.metrics[-1]["central"]


def test_the_centralised_run_has_all_examples_and_as_many_passes(tmp_path: Path) -> None:
    found = compared(tmp_path)
    assert [line["examples"] for line in found.centralised.metrics] == [26] * 3
    assert found.centralised.metrics[0]["steps"] == 2 * 7  # two epochs of 26 in batches of 4


def test_clients_alone_take_as_many_steps_as_in_the_federation(tmp_path: Path) -> None:
    found = compared(tmp_path)
    assert set(found.alone) == {"c0", "c1", "c2"}
    steps = {client: sum(line["steps"] for line in record.metrics) for client, record in found.alone.items()}
    assert steps == {"c0": 3 * 2 * 3, "c1": 3 * 2 * 2, "c2": 3 * 2 * 3}
    assert sum(steps.values()) == sum(line["steps"] for line in found.federated.metrics)


@pytest.mark.parametrize(
    ("client", "lines", "steps"),
    [
        # 100 examples; a round trains 20 of them, once: 20 / 10 batches
        (fd.local_sgd(0.1, epochs=1, batch_size=10), [(20, 2, 2), (20, 2, 2)], 2),
        (fd.local_sgd(0.1, epochs=5, batch_size=10), [(20, 10, 2), (40, 20, 4)], 15),
        # the whole pool is one batch: half a pass per round is rounded to a step
        (fd.local_sgd(0.1, epochs=1, batch_size=None), [(50, 5, 5)], 1),
        (fd.local_sgd(0.1, steps=6, batch_size=None), [(50, 30, 5)], 3),
        # steps: two clients of 5 take 3 steps each in batches of at most 4: 24 examples
        (fd.local_sgd(0.1, steps=3, batch_size=4), [(10, 6, 2)], 6),
    ],
)
def test_with_few_clients_a_round_the_passes_are_counted_in_steps(
    client: fd.Algorithm, lines: list[tuple[int, int, int]], steps: int
) -> None:
    metrics = [{"examples": n, "steps": s, "trained": c} for n, s, c in lines]
    found = centralised_client(client, Record(Path(), {}, metrics, []), examples=100)
    assert (found.epochs, found.steps) == (None, steps)
    assert replace(found, epochs=client.epochs, steps=client.steps) == client


def test_full_participation_keeps_epochs() -> None:
    lines = [{"examples": 100, "steps": 30, "trained": 3}] * 2
    assert centralised_client(LOCAL, Record(Path(), {}, lines, []), examples=100) == LOCAL


@pytest.mark.slow
def test_a_penalty_towards_the_received_model_is_for_the_federation_only(tmp_path: Path) -> None:
    prox = fd.local_sgd(0.3, epochs=2, batch_size=4, penalty=fd.proximal(1.0))
    assert without_penalty(prox) == LOCAL
    plain_run, with_penalty = (
        compared(tmp_path / "a"),
        compared(tmp_path / "b", fd.fedavg(prox, server=fd.adam())),
    )
    assert plain_run.centralised.metrics == with_penalty.centralised.metrics
    assert plain_run.alone["c1"].metrics == with_penalty.alone["c1"].metrics
    assert plain_run.federated.metrics != with_penalty.federated.metrics


def test_a_finished_comparison_is_read_and_an_unfinished_one_goes_on(tmp_path: Path) -> None:
    first = compared(tmp_path)
    written = {path: path.read_bytes() for path in tmp_path.rglob(METRICS)}
    (tmp_path / "alone" / "2" / "metrics.jsonl").unlink()
    (tmp_path / "alone" / "2" / "run.json").unlink()
    (tmp_path / "alone" / "2" / "checkpoint.safetensors").unlink()
    (tmp_path / "alone" / "2" / "timings.jsonl").unlink()
    again = compared(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob(METRICS)} == written
    assert again.alone["c2"].metrics == first.alone["c2"].metrics


def test_at_most_so_many_clients_alone_and_only_such_with_data() -> None:
    many = clients((3, 0, 4, 5, 0, 6))
    assert some_with_data(many, 10, seed=0) == [0, 2, 3, 5]
    chosen = {tuple(some_with_data(many, 2, seed=s)) for s in range(20)}
    assert len(chosen) > 1
    assert all(len(c) == 2 and not {1, 4} & set(c) for c in chosen)


def test_clients_own_test_examples_serve_where_there_is_no_central_test(tmp_path: Path) -> None:
    own = clients().with_test(None).split(validation=0.0, test=0.3, seed=0)
    found = fd.compare(task(), fd.fedavg(LOCAL), own, rounds=1, settings=settings(tmp_path))
    assert "accuracy" in found.federated.metrics[0]["central"]
    with pytest.raises(ConfigurationError, match=r"clients\.split\(test=0\.2\)"):
        fd.compare(task(), fd.fedavg(LOCAL), clients().with_test(None), rounds=1, settings=settings(tmp_path))


def test_evaluation_every_few_rounds(tmp_path: Path) -> None:
    found = compared(tmp_path, rounds=5, arms=fd.Arms(alone=1, every=2))
    for record in (found.federated, found.centralised, *found.alone.values()):
        assert [line["round"] for line in record.metrics if "central" in line] == [2, 4, 5]
    with pytest.raises(ConfigurationError, match="at least 1"):
        fd.Arms(alone=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow is what is asked for
def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    wild = fd.fedavg(fd.local_sgd(1e38, epochs=2, batch_size=4))
    found = compared(tmp_path, wild)
    assert "diverged" in repr(found)
    assert "diverged" in plain(found.table())


@pytest.mark.slow
def test_the_table_and_figure_are_in_the_folder(tmp_path: Path) -> None:
    found = compared(tmp_path)
    found.plot()
    assert (tmp_path / "figures" / "comparison.png").exists()
    assert (tmp_path / "comparison.txt").read_text() == plain(found.table()) + "\n"
