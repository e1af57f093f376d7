"""The command line: every verb on real runs, every error one message, every flag one field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest

import foedus as fd
from foedus.cli import foedus as group
from foedus.cli import run
from foedus.cli.plot import names
from foedus.cli.verb import Flags, Verb, load
from foedus.errors import ConfigurationError

from ..report.records import clients, task

FILE = """
import sys
sys.path.insert(0, {tests!r})
import foedus as fd
from records import clients, settings, task

federation = fd.Federation(
    task=task(), algorithm=fd.fedavg(fd.local_sgd(0.3, batch_size=4)), clients=clients(), rounds=3,
    settings=fd.Settings(executor=fd.executors.debug(), progress=False),
)

def made():
    return federation

number = 3

def broken():
    raise ZeroDivisionError("the user's own fault")
"""
TESTS = str(Path(__file__).parents[1] / "report")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a federation in ``own.py``, as the working directory; imports are forgotten afterwards."""
    (tmp_path / "own.py").write_text(FILE.format(tests=TESTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in {"own", "records", "broken_import", "federation"}:
            del sys.modules[name]


def test_simulate_runs_and_tells_where_everything_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "own.py", "--folder", "here"]) == 0
    told = capsys.readouterr().out
    metrics = [json.loads(line) for line in (project / "here" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3
    assert f"after round 3: loss {metrics[-1]['central']['loss']:.4g}" in told
    assert "run folder: here" in told


@pytest.mark.parametrize("target", ["own.py", "own.py:federation", "own:federation", "own:made", "./own.py:made"])
def test_targets(project: Path, target: str) -> None:
    assert load(target).rounds == 3


def test_flags_replace_one_field_each() -> None:
    federation = fd.Federation(task=task(), algorithm=fd.fedavg(fd.local_sgd(0.3)), clients=clients(), rounds=3)
    none = dict.fromkeys(("rounds", "cohort", "seed", "every", "folder", "executor", "device", "start"))
    assert Flags(**none, no_resume=False, no_progress=False).over(federation) == federation
    given = {
        "rounds": 7, "cohort": 2, "seed": 5, "every": 0, "folder": Path("x"), "executor": "debug", "device": "cpu",
        "start": "w.safetensors",
    }  # fmt: skip
    wanted = replace(
        federation, rounds=7, cohort=2, seed=5, evaluation=fd.Evaluation(every=0),
        settings=fd.Settings(
            folder=Path("x"), executor=fd.executors.debug(), device="cpu", start="w.safetensors", resume=False,
            progress=False,
        ),
    )  # fmt: skip
    assert Flags(**given, no_resume=True, no_progress=True).over(federation) == wanted


def test_stop_at(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "own.py", "--folder", "a", "--rounds", "50", "--stop-at", "accuracy=0.3"]) == 0
    assert len((project / "a" / "metrics.jsonl").read_text().splitlines()) < 50
    assert run(["simulate", "own.py", "--stop-at", "accuracy"]) == 2
    assert "accuracy=0.97" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["simulate", "own.py:nobody"], 2, "own.py has no 'nobody'; it has: own.py:federation"),
        (["simulate", "own.py:number"], 2, "foedus.Federation"),
        (["simulate", "nowhere.py"], 2, "there is no file nowhere.py"),
        (["simulate", "nowhere.at.all:x"], 2, "there is no module 'nowhere.at.all'"),
        (["simulate", "own.py", "--executor", "warp"], 2, "no executor is named 'warp'"),
        (["simulate", "own.py", "--cohort", "99"], 2, "99"),
        (["simulate"], 2, "Missing argument"),
        (["simulate", "own.py", "--rounds", "-1"], 2, "-1"),
        (["nonsense"], 2, "nonsense"),
        (["plot", "."], 2, "no run folder with a finished round in .;"),
        (["export", ".", "--to", "paper"], 2, "paper"),
        (["new", "."], 2, "not empty"),
    ],
)
def test_errors_are_one_message_without_a_traceback(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, told: str
) -> None:
    assert run(arguments) == code
    output = capsys.readouterr()
    assert told in output.err
    assert "Traceback" not in output.err + output.out


def test_debug_shows_the_traceback(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "nowhere.py", "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "ConfigurationError: there is no file nowhere.py" in told


def test_errors_that_are_no_question_of_configuration_exit_with_1(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", "own.py", "--folder", "here"]) == 0
    assert run(["simulate", "own.py", "--folder", "here", "--seed", "3"]) == 1
    assert "seed is 0 there and 3 here" in capsys.readouterr().err


def test_faults_of_the_users_own_code_keep_their_traceback(project: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(["simulate", "own.py:broken"])
    (project / "broken_import.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        run(["simulate", "broken_import.py"])


def test_a_file_with_the_name_of_a_module_is_refused(project: Path) -> None:
    (project / "json.py").write_text("federation = None\n")
    with pytest.raises(ConfigurationError, match="Rename the file"):
        load("json.py")


@pytest.mark.slow
def test_compare_prints_the_table_and_draws(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "own.py", "--alone", "2", "--rounds", "2", "--folder", "both"]) == 0
    told = capsys.readouterr().out
    assert "alone, mean of 2" in told
    assert "Federation takes accuracy from" in told
    assert (project / "both" / "figures" / "comparison.png").exists()
    assert len(list((project / "both" / "alone").iterdir())) == 2


@pytest.mark.slow
def test_plot_one_and_several(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", "0"), ("b", "1")):
        assert run(["simulate", "own.py", "--folder", name, "--seed", seed]) == 0
    assert run(["plot", "a"]) == 0
    assert (project / "a" / "figures" / "curves.png").exists()
    assert run(["plot", "a", "b", "--output", "both.svg", "--metric", "accuracy"]) == 0
    assert (project / "both.svg").read_text().count("<svg") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "both.svg"


def test_folders_of_runs_are_searched_and_what_holds_none_is_left_out(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("deep/er/one", "two"):
        assert run(["simulate", "own.py", "--folder", f"runs/{name}"]) == 0
    (project / "runs" / "empty").mkdir()
    assert run(["simulate", "own.py", "--folder", "runs/nothing", "--rounds", "0"]) == 0
    everything = [str(path) for path in sorted((project / "runs").iterdir())]
    assert run(["plot", *everything]) == 0
    told = capsys.readouterr()
    assert (project / "runs.png").exists()
    assert "empty holds no run" in told.err
    assert "nothing has not done a round" in told.err
    assert run(["export", "runs", "--to", "tensorboard"]) == 0
    assert capsys.readouterr().out.count("3 rounds written") == 2


def test_a_call_that_fails_leaves_no_folder_behind(project: Path) -> None:
    (project / "junk").write_text("no weights")
    assert run(["simulate", "own.py", "--start", "junk"]) == 2
    assert list((project / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["simulate", "."], ". is a folder; give a file in it: own.py"),
        (["simulate", "own.py", "--cohort", "99"], "write --cohort 3, or less"),
        (["simulate", "own.py", "--folder", "done", "--no-resume"], "leave out --no-resume"),
        (["simulate", "own.py", "--folder", "done", "--rounds", "2"], "Write --rounds 3, or more"),
        (["runs", "nope"], "there is no folder nope"),
        (["new", "own.py/x"], "own.py is a file; choose another name"),
        (["new", ""], "a project needs a name"),
    ],
)
def test_messages_speak_of_flags_and_files(
    project: Path, capsys: pytest.CaptureFixture[str], line: list[str], told: str
) -> None:
    if "done" in line:
        assert run(["simulate", "own.py", "--folder", "done"]) == 0
    assert run(line) == 2
    assert told in capsys.readouterr().err


def test_any_name_makes_a_project_that_python_can_read(project: Path) -> None:
    assert run(["new", 'my"""x']) == 0
    compile((project / 'my"""x' / "federation.py").read_text(), "federation.py", "exec")


def test_values_are_shown_in_a_line() -> None:
    made = fd.Federation(task=task(), algorithm=fd.fedavg(fd.local_sgd(0.3)), clients=clients(), rounds=3)
    assert len(repr(made)) < 300
    assert repr(task()) in repr(made)
    assert "accuracy" in repr(task())


def test_runs_are_told_apart_by_what_differs() -> None:
    assert names([Path("runs/a/federated"), Path("runs/b/federated")]) == ["a/federated", "b/federated"]
    assert names([Path("runs/a"), Path("runs/a")]) == [". (1)", ". (2)"]
    assert names([Path("runs/a")]) == ["a"]


def test_runs_lists_finished_and_unfinished(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs"]) == 0
    assert "no run folders in runs" in capsys.readouterr().out
    assert run(["simulate", "own.py", "--folder", "runs/a"]) == 0
    assert run(["simulate", "own.py", "--folder", "runs/deep/b"]) == 0
    told = json.loads((project / "runs/deep/b/run.json").read_text())
    (project / "runs/deep/b/run.json").write_text(json.dumps(told | {"status": "running", "rounds": 9}))
    capsys.readouterr()
    assert run(["runs", "--long"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "3/3" in rows["a"]
    assert "finished" in rows["a"].split()
    assert "local_sgd(lr=0.3, epochs=1, batch_size=4)" in rows["a"]
    assert "3/9" in rows["deep/b"]
    assert "unfinished" in rows["deep/b"].split()


@pytest.mark.slow
def test_export(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "own.py", "--folder", "a"]) == 0
    assert run(["export", "a", "--to", "tensorboard", "--output", "logs"]) == 0
    assert len(list((project / "logs" / "a").glob("events.out.tfevents.*"))) == 1
    assert run(["export", "a", "--to", "mlflow", "--output", "tracking", "--experiment", "ours"]) == 0
    assert list((project / "tracking").rglob("central/accuracy"))
    assert "3 rounds written to mlflow" in capsys.readouterr().out


@pytest.mark.slow
def test_new_then_simulate_as_a_newcomer_would(tmp_path: Path) -> None:
    """In processes of their own, with nothing but the console script, offline."""
    foedus = [sys.executable, "-m", "foedus"]
    subprocess.run([*foedus, "new", "mine"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    folder = tmp_path / "mine"
    assert {path.name for path in folder.iterdir()} == {"federation.py", "README.md", ".gitignore"}
    assert (folder / "README.md").read_text().startswith("# mine\n")
    environment = os.environ | {"FOEDUS_DATA": str(tmp_path / "nothing")}
    made = subprocess.run(
        [*foedus, "simulate", "federation.py", "--rounds", "5", "--folder", "run"],
        cwd=folder, check=True, capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert "after round 5" in made.stdout
    accuracy = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["central"]["accuracy"]
    assert accuracy > 0.7
    script = subprocess.run(
        [sys.executable, "federation.py"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert "Run(20 rounds" in script.stdout
    assert list(folder.rglob("curves.png"))


def verbs(of: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """The commands of a group, with those of groups in it, by the words that they are called by."""
    for name, command in of.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def test_every_verb_has_help_with_examples() -> None:
    assert set(group.commands) == {
        "audit", "backup", "compare", "consent", "demo", "doctor", "export", "join", "ledger", "members", "new", "plot",
        "privacy", "restore", "runs", "serve", "silos", "simulate", "status", "tasks",
    }  # fmt: skip
    for name, command in verbs(group):
        assert isinstance(command, Verb)
        assert command.examples, name
        context = click.Context(command, info_name=name)
        told = command.get_help(context)
        assert "Examples:" in told
        for example in command.examples:
            assert example in told
            assert " ".join(example.split()[1:]).startswith(name)
        assert " " in name or "\n" in (command.help or ""), f"{name}: a first line, then the rest"
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name != "folder":
                assert parameter.help, f"{name} --{parameter.name}"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert "0.1" in capsys.readouterr().out


def test_stopping_is_no_error_message(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "own.py").write_text("def federation():\n    raise KeyboardInterrupt\n")
    assert run(["simulate", "own.py"]) == 130


# --- privacy ------------------------------------------------------------------------------------------------


def test_privacy_prints_the_cost_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dp_accounting")
    words = "--noise-multiplier 1 --rounds 1500 --cohort 100 --population 3400 --hidden --delta 0.000294118 --points 2"
    assert run(["privacy", *words.split()]) == 0
    told = capsys.readouterr().out
    assert "poisson(0.02941) that nobody sees" in told
    assert [line.split() for line in told.splitlines()][-1] == ["1500", "6.697", "5.969"]


def test_privacy_finds_the_noise_for_an_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dp_accounting")
    words = "--epsilon 8 --rounds 50 --cohort 10 --delta 1e-4 --points 1"
    assert run(["privacy", *words.split()]) == 0
    told = capsys.readouterr().out
    z = fd.calibrate(8.0, 1e-4, rounds=50, cohort=10)
    assert f"noise multiplier {z:.4f}" in told
    assert "sampling does not count" in told


@pytest.mark.slow
def test_privacy_draws_its_curve_and_says_what_noise_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noisy_federation.py").write_text(
        "import numpy as np, foedus as fd\n"
        "x = np.random.default_rng(0).normal(size=(300, 3)); y = (x[:, 0] > 0).astype(int)\n"
        "clients = fd.Clients.of({i: (x[i::30], y[i::30]) for i in range(30)}, central_test=(x, y))\n"
        "task = fd.Task(fd.logistic(3, 2), metrics=[fd.accuracy])\n"
        "federation = fd.Federation(task=task, algorithm=fd.fedavg(fd.local_sgd(0.5)), clients=clients, rounds=9,\n"
        "    settings=fd.Settings(executor=fd.executors.debug()))\n"
    )
    words = "--noise-multiplier 0.01 --rounds 4 --cohort 20 --delta 1e-3 --points 2 --plot epsilon.png"
    assert run(["privacy", *words.split(), "--simulate", "noisy_federation.py", "--clip", "1.0"]) == 0
    told = capsys.readouterr().out
    assert (tmp_path / "epsilon.png").stat().st_size > 10_000
    rows = {
        line.split("  ")[0]: line.split()[-1] for line in told.splitlines() if line.startswith(("clipped", "with n"))
    }
    assert float(rows["clipped, no noise"]) > 0.8
    assert abs(float(rows["clipped, no noise"]) - float(rows["with noise"])) < 0.1
    assert run(["privacy", *words.split(), "--clip", "1.0"]) == 2
    capsys.readouterr()
    for more, wanted in (
        ("--cohort 50", "50 clients in a round, and the federation has 30"),
        ("--cohort 20 --population 100000 --hidden --delta 1e-6", "for 100000 clients, and the federation has 30"),
    ):
        words = f"--noise-multiplier 1 --rounds 4 --delta 1e-3 {more} --simulate noisy_federation.py --clip 1.0"
        assert run(["privacy", *words.split()]) == 2
        assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--cohort 100 --delta 0.5", "100 clients in a round"),
        ("--cohort 100 --population 3400 --delta 3e-4", "delta=0.0003 with 3400 clients"),
        ("--cohort 100 --population 3400 --delta 1", "delta"),
    ],
)
@pytest.mark.parametrize("noise", ["--epsilon 8", "--noise-multiplier 1"])
def test_privacy_takes_no_delta_that_promises_nothing(
    words: str, told: str, noise: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("dp_accounting")
    assert run(["privacy", "--rounds", "5", *words.split(), *noise.split()]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("more", ["", "--epsilon 8 --noise-multiplier 1", "--epsilon 8 --hidden", "--epsilon -1"])
def test_privacy_says_what_is_missing(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dp_accounting")
    assert run(["privacy", *f"--rounds 5 --cohort 10 --delta 1e-4 {more}".split()]) == 2
    assert "foedus:" in capsys.readouterr().err
