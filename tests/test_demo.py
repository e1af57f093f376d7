"""The demo shows what the talk showed, in numbers: a sawtooth that collapses, and skewed data that is slow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from foedus.demo import SCENES, demo, mnist_at_hand
from foedus.errors import MissingExtra
from foedus.record.folder import read
from foedus.report.curves import rounds_to
from foedus.report.local import local_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo on the bundled digits."""
    folder = tmp_path_factory.mktemp("demo")
    pictures = demo(folder, "digits", progress=False)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.values())
    return folder / "digits"


def test_averaging_brings_every_node_back_below_where_it_started(shown: Path) -> None:
    steps = local_steps(read(shown / "together"))
    begins, ends = steps.shared.rounds[:-1], steps.shared.rounds[1:]
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        before, after = steps.shared.values[number], steps.shared.values[number + 1]
        assert after < before
        # a node's last value of the round is that before the drop, at the same step as the average
        astray = [own.values[np.flatnonzero(own.rounds == end)[0]] for own in steps.nodes.values()]
        assert min(astray) > after, f"round {number + 1} from step {begin:.0f}"


def test_a_node_alone_ends_far_above_the_federated_model(shown: Path) -> None:
    together, alone = (read(shown / name).metrics[-1]["central"] for name in ("together", "alone"))
    assert alone["loss"] > 1.3 * together["loss"]
    assert alone["accuracy"] < together["accuracy"] - 0.3


def test_the_more_skewed_the_slower(shown: Path) -> None:
    names = ("non-federated", "uniform", "90-of-one-class", "100-of-one-class")
    runs = [read(shown / name) for name in names]
    needed = [rounds_to(run.metrics, "accuracy", SCENES["digits"].target) for run in runs]
    assert None not in needed
    assert needed == sorted(needed)
    assert needed[3] > 2 * needed[2], "100 % of one class is much slower than 90 %"
    final = [run.metrics[-1]["central"]["accuracy"] for run in runs]
    assert final[0] > 0.95
    assert final[1] > 0.94
    assert final[3] < final[2] - 0.03


def test_called_again_it_shows_the_same_and_trains_nothing(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in shown.rglob("timings.jsonl")}
    demo(shown.parent, "digits", progress=False)
    assert {path: path.read_bytes() for path in shown.rglob("timings.jsonl")} == before
    told = capsys.readouterr().out
    assert "100 % of one class" in told
    assert str(shown / "local.png") in told


def test_what_is_missing_is_told_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "foedus.report.canvas", raising=False)
    monkeypatch.delattr("foedus.report.canvas", raising=False)
    for name in {"matplotlib", *(n for n in sys.modules if n.startswith("matplotlib."))}:  # other tests load it
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match="matplotlib"):
        demo(tmp_path, "digits")
    assert capsys.readouterr().out == ""
    assert not any(tmp_path.iterdir())


def test_mnist_is_taken_only_if_all_of_it_is_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_folder: Path
) -> None:
    assert mnist_at_hand()
    monkeypatch.setenv("FOEDUS_DATA", str(tmp_path))
    assert not mnist_at_hand()
    (tmp_path / "mnist").mkdir()
    for path in list((data_folder / "mnist").iterdir())[:-1]:
        (tmp_path / "mnist" / path.name).touch()
    assert not mnist_at_hand()
