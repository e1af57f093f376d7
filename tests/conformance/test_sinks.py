"""The conformance suite of sinks: what a tool reads back is what was written, once, and its faults are not the run's.

A member brings a sink and a way to read, with the tool's own reader, what is in it. The suite of MLflow and
TensorBoard needs both packages; the sink of lines needs none and shows what is asked of the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import foedus as fd
from foedus.errors import TrainingError
from foedus.record import Record
from foedus.record.export import MLflow, Sink, TensorBoard, export, figures
from foedus.record.folder import METRICS

from ..report.records import clients, record, settings, task

Table = dict[str, dict[int, list[float]]]  # figure → round → all values found


class Member(NamedTuple):
    """A sink; ``make(place)`` opens nothing yet, ``read(place, run)`` gives what is there of the run folder."""

    make: Callable[[Path], Sink]
    read: Callable[[Path, Path], Table]


class Lines(NamedTuple):
    """A sink of one's own: a JSON line per round, in a file named after the run."""

    place: Path

    def open(self, folder: Path, configuration: Mapping[str, Any]) -> Lines:
        self.place.mkdir(parents=True, exist_ok=True)
        return Lines(self.place / folder.name)

    def write(self, round: int, figures: Mapping[str, float], *, at: float) -> None:
        known = json.loads(self.place.read_text()) if self.place.exists() else {}
        self.place.write_text(json.dumps(known | {str(round): dict(figures)}))

    def close(self) -> None: ...


def lines_read(place: Path, run: Path) -> Table:
    found: Table = {}
    for round, line in json.loads((place / run.name).read_text()).items():
        for name, value in line.items():
            found.setdefault(name, {}).setdefault(int(round), []).append(value)
    return found


def events_read(place: Path, run: Path) -> Table:
    """As TensorBoard draws it: of values of one round, the one that was written last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(place / run.name))
    events.Reload()
    return {
        tag: {e.step: [float(make_ndarray(e.tensor_proto))] for e in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }


def mlflow_read(place: Path, run: Path) -> Table:
    from mlflow import MlflowClient

    client = MlflowClient(place.resolve().as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "tests"]
    runs = client.search_runs([experiment.experiment_id])
    (found,) = [r for r in runs if r.info.run_name == run.name]
    table: Table = {}
    for name in found.data.metrics:
        for point in client.get_metric_history(found.info.run_id, name):
            table.setdefault(name, {}).setdefault(point.step, []).append(point.value)
    return table


MEMBERS = [
    pytest.param(Member(Lines, lines_read), id="lines"),
    pytest.param(Member(TensorBoard, events_read), id="tensorboard", marks=pytest.mark.slow),
    pytest.param(Member(lambda place: MLflow(place, "tests"), mlflow_read), id="mlflow", marks=pytest.mark.slow),
]
every = pytest.mark.parametrize("member", MEMBERS)


def simulated(folder: Path, *, rounds: int = 3, sinks: tuple[Sink, ...] = ()) -> fd.Run:
    algorithm = fd.fedavg(fd.local_sgd(0.3))
    return fd.simulate(task(), algorithm, clients(), rounds=rounds, settings=settings(folder, sinks=sinks))


def assert_holds(found: Table, metrics: list[dict[str, Any]]) -> None:
    """Every figure of every round, once; a tool may keep float32, and more figures (of timings)."""
    wanted: Table = {}
    for line in metrics:
        for name, value in figures(line).items():
            wanted.setdefault(name, {})[line["round"]] = [pytest.approx(value, rel=1e-6)]
    assert {name: rounds for name, rounds in found.items() if not name.startswith("timing/")} == wanted


@every
def test_what_was_exported_is_read_back(member: Member, tmp_path: Path) -> None:
    made = simulated(tmp_path / "first")
    export(made.record, member.make(tmp_path / "sink"))
    found = member.read(tmp_path / "sink", made.folder)
    assert_holds(found, made.metrics)
    seconds = {line["round"]: [pytest.approx(line["seconds"], rel=1e-6)] for line in made.timings}
    assert found["timing/seconds"] == seconds


@every
def test_a_run_can_be_watched(member: Member, tmp_path: Path) -> None:
    made = simulated(tmp_path / "live", sinks=(member.make(tmp_path / "sink"),))
    found = member.read(tmp_path / "sink", made.folder)
    assert_holds(found, made.metrics)
    assert set(found["timing/seconds"]) == {1, 2, 3}


@every
def test_a_run_that_goes_on_and_is_exported_once_more_is_there_once(member: Member, tmp_path: Path) -> None:
    """Opened three times for the same folder; a later checkpoint's rounds may be written again."""
    sink = member.make(tmp_path / "sink")
    simulated(tmp_path / "live", rounds=2, sinks=(sink,))
    longer = simulated(tmp_path / "live", rounds=4, sinks=(sink,))
    export(longer.record, sink)
    assert_holds(member.read(tmp_path / "sink", longer.folder), longer.metrics)


@every
def test_two_runs_do_not_mix(member: Member, tmp_path: Path) -> None:
    sink = member.make(tmp_path / "sink")
    both = [simulated(tmp_path / name, rounds=n, sinks=(sink,)) for name, n in (("a", 1), ("b", 2))]
    for made in both:
        assert_holds(member.read(tmp_path / "sink", made.folder), made.metrics)


@every
def test_rounds_come_in_order_and_what_is_no_number_is_left_out(member: Member, tmp_path: Path) -> None:
    made = record([0.25, None, 0.75])._replace(folder=tmp_path / "some")
    export(made, member.make(tmp_path / "sink"))
    found = member.read(tmp_path / "sink", made.folder)
    assert_holds(found, made.metrics)
    assert list(found["central/accuracy"]) == [1, 3]
    assert list(found["train_loss"]) == [1, 2, 3]


@every
def test_nothing_to_write_is_no_error(member: Member, tmp_path: Path) -> None:
    export(Record(tmp_path / "empty", {"rounds": 0}, [], []), member.make(tmp_path / "sink"))


@every
def test_the_place_is_made_where_it_is_named_and_the_run_folder_stays_as_it_is(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = simulated(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    export(made.record, member.make(tmp_path / "deep" / "sink"))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "deep" / "sink").exists()
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before


# --- faults -------------------------------------------------------------------------------------------------


class Failing:
    """A sink that fails when told to, and remembers."""

    def __init__(self, at: str) -> None:
        self.at, self.rounds, self.closed = at, [], 0  # type: tuple[str, list[int], int]  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Failing({self.at!r})"

    def open(self, folder: Path, configuration: Mapping[str, Any]) -> Failing:
        self._perhaps("open")
        return self

    def write(self, round: int, figures: Mapping[str, float], *, at: float) -> None:
        self.rounds.append(round)
        self._perhaps(f"write {round}")

    def close(self) -> None:
        self.closed += 1
        self._perhaps("close")

    def _perhaps(self, now: str) -> None:
        if now == self.at:
            raise OSError("no space")


@pytest.mark.parametrize(
    ("at", "told", "rounds"), [("write 2", "in round 2", [1, 2]), ("close", "at its end", [1, 2, 3])]
)
def test_a_sink_that_fails_is_warned_of_and_the_run_and_the_other_sinks_go_on(
    tmp_path: Path, at: str, told: str, rounds: list[int]
) -> None:
    plain = simulated(tmp_path / "plain")
    failing, well = Failing(at), Failing("never")
    with pytest.warns(UserWarning, match=rf"Failing\('{at}'\) failed {told} \(OSError: no space\).*foedus export"):
        made = simulated(tmp_path / "run", sinks=(failing, well))
    assert (made.folder / METRICS).read_bytes() == (plain.folder / METRICS).read_bytes()
    assert made.configuration["status"] == "finished"
    assert (failing.rounds, failing.closed) == (rounds, 1)
    assert (well.rounds, well.closed) == ([1, 2, 3], 1)


def test_a_sink_that_cannot_be_opened_stops_the_run_before_its_first_round(tmp_path: Path) -> None:
    well = Failing("never")
    with pytest.raises(OSError, match="no space"):
        simulated(tmp_path, sinks=(well, Failing("open")))
    assert not (tmp_path / METRICS).exists(), "no line was written"
    assert (well.rounds, well.closed) == ([], 1)
    assert len(simulated(tmp_path).metrics) == 3, "the same call without it goes on"


@pytest.mark.parametrize("at", ["write 2", "close"])
def test_an_export_that_fails_is_an_error_and_closes_the_sink(at: str) -> None:
    failing = Failing(at)
    with pytest.raises(OSError, match="no space"):
        export(record([0.5, 0.6]), failing)
    assert failing.closed == 1


def test_sinks_are_closed_when_the_run_fails(tmp_path: Path) -> None:
    sink = Failing("never")
    wrong = fd.Task(fd.logistic(4, classes=2), metrics=[fd.accuracy])  # the data has three
    with pytest.raises(TrainingError):
        fd.simulate(wrong, fd.fedavg(fd.local_sgd(0.3)), clients(), rounds=3, settings=settings(tmp_path, sinks=[sink]))
    assert sink.closed == 1
