"""The engine: rounds as they should be, and runs that end with the same bytes however often they were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.core.linear import logistic
from foedus.core.select import Population
from foedus.errors import CheckpointError, ConfigurationError, StorageError, TrainingError
from foedus.record.folder import CHECKPOINT, METRICS, MODEL
from foedus.record.folder import CLIENTS as EACH
from foedus.rounds.debug import Debug, DebugSession
from foedus.rounds.work import Job, Orders, Outcome
from foedus.sim.world import phone

RNG = np.random.default_rng(0)
X = RNG.normal(size=(400, 6))
Y = (X @ np.array([1.0, -1, 2, 0, 1, 1]) > 0).astype(int)
CLIENTS = fd.Clients.of({f"c{i}": (X[i::10], Y[i::10]) for i in range(10)}, central_test=(X, Y))
TASK = fd.Task(logistic(6, 2), metrics=[fd.accuracy])
ALGORITHM = fd.fedavg(fd.local_sgd(lr=0.2, batch_size=8, momentum=0.5), server=fd.adam(lr=0.05))


def run(folder: Path, *, rounds: int = 6, **changes: Any) -> fd.Run:
    """A small run; ``changes`` go to Settings or to simulate."""
    fields = {"executor", "world", "start", "checkpoint_seconds", "resume"}
    settings = {
        "executor": fd.executors.debug(),
        "progress": False,
        "checkpoint_seconds": 0.0,
        "folder": folder,
    }
    settings |= {name: changes.pop(name) for name in fields & changes.keys()}
    asked: dict[str, Any] = {
        "cohort": 4,
        "seed": 1,
        "task": TASK,
        "algorithm": ALGORITHM,
        "clients": CLIENTS,
    } | changes
    task, algorithm, clients = (asked.pop(name) for name in ("task", "algorithm", "clients"))
    return fd.simulate(task, algorithm, clients, rounds=rounds, settings=fd.Settings(**settings), **asked)


def metrics(folder: Path) -> bytes:
    return (folder / METRICS).read_bytes()


# --- a run --------------------------------------------------------------------------------------------------


def test_a_run_learns_and_records(tmp_path: Path) -> None:
    done = run(tmp_path, rounds=20, cohort=None)
    assert [m["round"] for m in done.metrics] == list(range(1, 21))
    assert done.final["accuracy"] > 0.95
    line = done.metrics[-1]
    assert (line["cohort"], line["trained"], line["examples"], line["steps"]) == (10, 10, 400, 50)
    assert line["bytes_down"] == 10 * 14 * 4
    assert line["bytes_up"] == 10 * (14 * 4 + 8)
    configuration = done.record.configuration
    assert (configuration["status"], configuration["executor"], configuration["seed"]) == (
        "finished",
        "debug",
        1,
    )
    assert sum(t["seconds"] for t in done.record.timings) > 0


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    one, two, three = (run(tmp_path / str(i), seed=seed) for i, seed in enumerate([1, 1, 2]))
    assert metrics(one.folder) == metrics(two.folder) != metrics(three.folder)
    assert one.weights.vector.tobytes() == two.weights.vector.tobytes()


def test_equal_runs_leave_equal_models(tmp_path: Path) -> None:
    models = {(run(tmp_path / str(i), rounds=1).folder / MODEL).read_bytes() for i in range(6)}
    assert len(models) == 1


def test_fewer_rounds_than_the_folder_holds_are_refused_and_as_many_are_said_to_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, rounds=3)
    with pytest.raises(ConfigurationError, match=r"holds 3 rounds .* and rounds=2 asks for fewer.* rounds=3, or more"):
        run(tmp_path, rounds=2)
    assert run(tmp_path, rounds=3).metrics == done.metrics
    assert capsys.readouterr().err == ""
    settings = fd.Settings(folder=tmp_path, executor=fd.executors.debug(), checkpoint_seconds=0.0)
    fd.simulate(TASK, ALGORITHM, CLIENTS, rounds=3, cohort=4, seed=1, settings=settings)
    assert capsys.readouterr().err == f"foedus: nothing to train: 3 rounds done; everything is in {tmp_path}\n"
    once = fd.Settings(folder=tmp_path / "one", executor=fd.executors.debug())
    fd.simulate(TASK, ALGORITHM, CLIENTS, rounds=1, settings=once)
    assert "1 round done; everything" in capsys.readouterr().err


def test_clients_without_data_send_no_bytes(tmp_path: Path) -> None:
    some = fd.Clients.of({"a": (X[:9], Y[:9]), "none": (X[:0], Y[:0]), "b": (X[9:20], Y[9:20])})
    done = run(tmp_path, clients=some, cohort=None, rounds=2)
    each = 14 * 4 + 8
    assert [m["bytes_up"] for m in done.metrics] == [2 * each] * 2
    assert [m["bytes_down"] for m in done.metrics] == [3 * 14 * 4] * 2
    costs = {row["client"]: row["bytes_up"] for row in done.record.costs}
    assert costs == {"a": 2 * each, "none": 0, "b": 2 * each}


def test_metrics_hold_no_clocks(tmp_path: Path) -> None:
    keys = {key for m in run(tmp_path).metrics for key in m}
    assert keys == {
        "round", "cohort", "trained", "examples", "steps", "train_loss", "bytes_up", "bytes_down", "central",
    }  # fmt: skip


def test_the_train_loss_is_the_mean_over_examples_of_the_cohort(tmp_path: Path) -> None:
    sizes = {"small": (X[:5], Y[:5]), "large": (X[5:45], Y[5:45])}
    once = fd.fedavg(fd.local_sgd(lr=0.1, batch_size=None))
    found = run(tmp_path, clients=fd.Clients.of(sizes), algorithm=once, cohort=None, rounds=1).metrics[0]
    assert found["train_loss"] == pytest.approx(np.log(2))  # of weights that are zero
    assert "central" not in found


def test_evaluation_every_few_rounds_and_after_the_last(tmp_path: Path) -> None:
    done = run(tmp_path, rounds=7, evaluation=fd.Evaluation(every=3))
    assert [m["round"] for m in done.metrics if "central" in m] == [3, 6, 7]
    assert run(tmp_path / "never", evaluation=fd.Evaluation(every=0)).final == {}


def test_every_client_is_evaluated_on_its_own_data(tmp_path: Path) -> None:
    found = run(tmp_path, clients=CLIENTS.split(test=0.25), evaluation=fd.Evaluation(clients=True)).metrics[-1][
        "clients"
    ]
    assert set(found) == {"loss", "accuracy"}
    assert found["accuracy"]["worst_decile"] <= found["accuracy"]["mean"] <= 1
    assert found["loss"]["worst_decile"] >= found["loss"]["mean"]


def test_every_clients_figures_are_kept_by_id_and_add_up_to_those_of_all(tmp_path: Path) -> None:
    split = fd.Clients.of({f"c{i}": (X[i::10], Y[i::10]) for i in range(10)} | {"none": (X[:0], Y[:0])})
    asked = fd.Evaluation(every=2, clients=True)
    done = run(tmp_path, clients=split, task=fd.Task(logistic(6, 2), metrics=[fd.accuracy, fd.auroc]), rounds=5,
               evaluation=asked)  # fmt: skip
    assert [(row["round"], row["client"]) for row in done.clients] == [
        (number, f"c{i}") for number in (2, 4, 5) for i in range(10)
    ]
    assert {tuple(row) for row in done.clients} == {("round", "client", "examples", "loss", "accuracy", "auroc")}
    for line in (line for line in done.metrics if "clients" in line):
        for name in ("loss", "accuracy", "auroc"):
            values = [row[name] for row in done.clients if row["round"] == line["round"]]
            assert line["clients"][name]["mean"] == pytest.approx(np.mean(values), rel=1e-12)
    wrong = (done.model["weight"].T @ X[3::10].T + done.model["bias"][:, None]).argmax(0) != Y[3::10]
    own = done.final_clients["c3"]
    assert (own["accuracy"], own["examples"]) == (pytest.approx(1 - wrong.mean()), 40)
    assert list(done.final_clients) == [f"c{i}" for i in range(10)]


def test_without_clients_evaluated_there_is_no_file_of_them(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.clients, done.final_clients) == ([], {})
    assert not (tmp_path / EACH).exists()


def test_a_figure_that_a_client_has_not_is_null(tmp_path: Path) -> None:
    """AUROC where only one class occurs; the others' is kept."""
    one_class = fd.Clients.of({"both": (X, Y), "ones": (X[Y == 1], Y[Y == 1])})
    task = fd.Task(logistic(6, 2), metrics=[fd.auroc])
    done = run(tmp_path, clients=one_class, task=task, cohort=2, rounds=1, evaluation=fd.Evaluation(clients=True))
    assert done.final_clients["ones"]["auroc"] is None
    assert done.final_clients["both"]["auroc"] == done.metrics[0]["clients"]["auroc"]["mean"]


def test_a_run_stops_when_a_figure_is_reached(tmp_path: Path) -> None:
    done = run(tmp_path, rounds=200, cohort=None, evaluation=fd.Evaluation(stop_at={"accuracy": 0.9}))
    assert len(done.metrics) < 200
    assert done.final["accuracy"] >= 0.9
    assert all(m["central"]["accuracy"] < 0.9 for m in done.metrics[:-1])
    again = run(tmp_path, rounds=200, cohort=None, evaluation=fd.Evaluation(stop_at={"accuracy": 0.9}))
    assert len(again.metrics) == len(done.metrics)
    further = run(tmp_path, rounds=200, cohort=None, evaluation=fd.Evaluation(stop_at={"accuracy": 0.95}))
    assert len(done.metrics) < len(further.metrics) < 200


def test_no_rounds_give_the_first_weights(tmp_path: Path) -> None:
    done = run(tmp_path, rounds=0)
    assert done.metrics == []
    assert done.weights.vector.tolist() == [0.0] * 14
    assert (tmp_path / MODEL).exists()
    assert len(run(tmp_path, rounds=2).metrics) == 2


def test_the_model_comes_back_and_starts_another_run(tmp_path: Path) -> None:
    done = run(tmp_path / "a", rounds=10)
    assert done.model["weight"].shape == (6, 2)
    np.testing.assert_array_equal(done.parameters["weight"], done.model["weight"])
    for i, start in enumerate([done.folder / MODEL, str(done.folder / MODEL), done.model, done.parameters]):
        again = run(tmp_path / f"b{i}", rounds=0, start=start)
        assert again.weights.vector.tobytes() == done.weights.vector.tobytes()


def test_a_cohort_that_turns_out_empty_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    done = run(tmp_path, cohort=fd.poisson(0.01), rounds=5)
    assert {m["cohort"] for m in done.metrics} >= {0}
    empty = [m for m in done.metrics if not m["cohort"]]
    assert all((m["trained"], m["train_loss"], m["bytes_up"]) == (0, None, 0) for m in empty)


class Listening:
    """The plain executor, which notes what it is told of the coming rounds."""

    name = "listening"

    def __init__(self) -> None:
        self.cohorts: list[list[int]] = []
        self.following: list[list[int] | None] = []

    def open(self, job: Job) -> DebugSession:
        session = Debug().open(job)
        plain = session.run

        def listened(orders: Orders) -> Outcome:
            self.cohorts.append(orders.cohort.tolist())
            self.following.append(None if orders.following is None else orders.following.tolist())
            return plain(orders)

        session.run = listened  # type: ignore[method-assign]
        return session


WORLD = fd.World(device=lambda draw: phone(draw)._replace(dropout=0.3), over_selection=1.5)


@pytest.mark.parametrize("world", [None, WORLD], ids=["plain", "world"])
def test_an_executor_is_told_who_trains_next(tmp_path: Path, world: fd.World | None) -> None:
    listening = Listening()
    run(tmp_path / "told", executor=listening, world=world, rounds=5)
    # In a world it depends on how many bytes are sent, which is known when the round has ended.
    assert listening.following == ([*listening.cohorts[1:], None] if world is None else [None] * 5)
    assert len({tuple(c) for c in listening.cohorts}) > 1
    run(tmp_path / "plain", world=world, rounds=5)
    assert metrics(tmp_path / "told") == metrics(tmp_path / "plain")


def test_a_sampler_that_fails_in_a_later_round_does_so_then(tmp_path: Path) -> None:
    def sample(population: Population, seed: int, number: int) -> Any:
        if number == 3:
            raise ConfigurationError("nobody is there")
        return fd.uniform(4).sample(population, seed, number)

    sampler = fd.uniform(4)._replace(sample=sample)
    with pytest.raises(ConfigurationError, match="nobody is there"):
        run(tmp_path, cohort=sampler)
    assert [json.loads(line)["round"] for line in metrics(tmp_path).splitlines()] == [1, 2]


# --- going on -----------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Nothing catches it."""


def interrupted(after: int, error: type[BaseException]) -> Callable[..., Any]:
    """A metric that raises at its so-manieth evaluation, in the middle of a round."""
    seen = iter(range(10**6))

    def value(output: Any, target: Any) -> Any:
        if next(seen) == after:
            raise error
        return (output.argmax(1) == target).astype(float)

    return value


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1000.0])
@pytest.mark.parametrize("after", [0, 17, 55])  # of 66: the central test set and ten clients a round
def test_a_run_interrupted_within_a_round_ends_with_the_same_bytes(
    tmp_path: Path, after: int, checkpoint_seconds: float, error: type[BaseException]
) -> None:
    asked = fd.Evaluation(clients=True)
    whole = run(tmp_path / "whole", evaluation=asked)
    task = fd.Task(TASK.model, metrics=[fd.accuracy._replace(value=interrupted(after, error))])
    with pytest.raises(error):
        run(tmp_path / "cut", task=task, checkpoint_seconds=checkpoint_seconds, evaluation=asked)
    found = run(tmp_path / "cut", task=task, evaluation=asked)
    assert metrics(found.folder) == metrics(whole.folder)
    assert (found.folder / EACH).read_bytes() == (whole.folder / EACH).read_bytes()
    assert len(found.clients) == 60
    assert found.weights.vector.tobytes() == whole.weights.vector.tobytes()


def test_a_run_that_failed_before_its_first_round_leaves_the_folder_to_another(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="label"):
        run(tmp_path, clients=fd.Clients.of({"a": (X, Y + 7)}), cohort=1)
    assert (tmp_path / "run.json").exists()
    fresh = fd.Settings(folder=tmp_path, resume=False, executor=fd.executors.debug(), progress=False)
    mended = fd.simulate(TASK, ALGORITHM, CLIENTS, rounds=1, settings=fresh)
    assert len(mended.metrics) == 1
    with pytest.raises(CheckpointError, match="holds another run"):
        run(tmp_path, rounds=1, seed=3)


def test_a_folder_of_the_users_own_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(ConfigurationError, match="lack"):
            run(folder, start={"other": np.ones(3)})
    assert (tmp_path / "notes").exists()
    assert not (tmp_path / "new").exists()


def test_more_rounds_go_on_where_the_run_ended(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", rounds=6)
    run(tmp_path / "parts", rounds=2)
    parts = run(tmp_path / "parts", rounds=6)
    assert metrics(parts.folder) == metrics(whole.folder)
    with pytest.raises(ConfigurationError, match="holds 6 rounds"):
        run(tmp_path / "parts", rounds=3)
    assert metrics(parts.folder) == metrics(whole.folder), "what is done is not undone"


def test_a_world_goes_on_in_another_process(tmp_path: Path) -> None:
    """What tells runs apart must not be an address in memory."""
    world = fd.World(device=phone, over_selection=1.5)
    assert "0x" not in world.label
    run(tmp_path, rounds=2, world=world)
    assert len(run(tmp_path, rounds=4, world=fd.World(device=phone, over_selection=1.5)).metrics) == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2}, "seed is 1 there and 2 here"),
        ({"cohort": 5}, r"cohort is 'uniform\(4\)' there and 'uniform\(5\)' here"),
        ({"algorithm": fd.fedavg(fd.local_sgd(lr=0.3))}, "algorithm is "),
        ({"clients": CLIENTS.subset(range(9))}, "clients is 10 there and 9 here"),
        ({"clients": CLIENTS.with_test((X[:50], Y[:50]))}, "the data is not"),
        ({"task": fd.Task(logistic(6, 3), metrics=[fd.accuracy])}, "parameters is 14 there and 21 here"),
        ({"task": fd.Task(TASK.model)}, "metrics is"),
        ({"world": fd.World(device=phone)}, "the world is not"),
        ({"start": {"weight": np.ones((6, 2)), "bias": np.ones(2)}}, "first weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_folder_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    run(tmp_path, rounds=1)
    before = metrics(tmp_path)
    with pytest.raises(CheckpointError, match=rf"holds another run: .*{told}.*Choose another folder"):
        run(tmp_path, rounds=3, **change)
    assert metrics(tmp_path) == before


def test_a_folder_with_a_run_may_be_asked_to_be_new(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    with pytest.raises(ConfigurationError, match=r"holds a run already.*resume=True"):
        run(tmp_path, resume=False)


@pytest.mark.parametrize("name", [METRICS, EACH])
def test_lines_edited_by_hand_are_refused(tmp_path: Path, name: str) -> None:
    asked = fd.Evaluation(clients=True)
    run(tmp_path, rounds=3, evaluation=asked)
    edited = (tmp_path / name).read_bytes().replace(b'"round": 1', b'"round": 9')
    (tmp_path / name).write_bytes(edited)
    with pytest.raises(CheckpointError, match=rf"{name} differs"):
        run(tmp_path, rounds=5, evaluation=asked)
    assert (tmp_path / name).read_bytes() == edited


@pytest.mark.parametrize("at", [10, 100, 400, -20])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, at: int) -> None:
    run(tmp_path, rounds=2)
    content = bytearray((tmp_path / CHECKPOINT).read_bytes())
    content[at] ^= 4
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors"):
        run(tmp_path, rounds=4)


def test_a_checkpoint_of_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", rounds=2)
    run(tmp_path / "b", rounds=2, seed=5)
    (tmp_path / "a" / CHECKPOINT).write_bytes((tmp_path / "b" / CHECKPOINT).read_bytes())
    with pytest.raises(CheckpointError):
        run(tmp_path / "a", rounds=4)


# --- kill -9, and full disks --------------------------------------------------------------------------------

SCRIPT = """
    import sys
    from pathlib import Path
    import numpy as np
    import foedus as fd
    from foedus.sim.world import phone

    FOLDER, LIMIT, KIND = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if LIMIT:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))

    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 6))
    y = (x.sum(1) > 0).astype(int)
    clients = fd.Clients.of({f"c{i}": (x[i::8], y[i::8]) for i in range(8)}, central_test=(x, y))

    def told(output, target):  # one line to whoever watches, in the middle of every round
        print("round", flush=True)
        return (output.argmax(1) == target).astype(float)

    metrics = [fd.accuracy._replace(value=told)]
    if KIND == "numpy":
        from foedus.core.linear import logistic
        task = fd.Task(logistic(6, 2), metrics=metrics)
        executor = fd.executors.debug()
    else:
        import torch
        net = lambda: torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)
        )
        task = fd.Task(net, torch.nn.functional.cross_entropy, metrics=metrics, average_buffers=False)
        executor = fd.executors.by_name(KIND)
    fd.simulate(
        task,
        fd.fedavg(fd.local_sgd(lr=0.1, batch_size=5, momentum=0.9), server=fd.yogi(lr=0.05)),
        clients,
        rounds=int(sys.argv[4]),
        cohort=4,
        evaluation=fd.Evaluation(clients=KIND == "numpy"),
        settings=fd.Settings(
            folder=FOLDER, checkpoint_seconds=0.002, progress=False, executor=executor,
            world=fd.World(device=phone, over_selection=1.5, deadline=60.0) if KIND == "numpy" else None,
        ),
    )
"""


def started(folder: Path, *, kind: str, rounds: int, limit: int = 0) -> subprocess.Popen[str]:
    words = [str(folder), str(limit), kind, str(rounds)]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=200)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rounds", "kills"), [("numpy", 60, 6), ("debug", 30, 3), ("processes", 8, 2)])
def test_kill_9_at_any_moment_changes_nothing(tmp_path: Path, kind: str, rounds: int, kills: int) -> None:
    if kind != "numpy":
        pytest.importorskip("torch")
    whole = started(tmp_path / "whole", kind=kind, rounds=rounds)
    rng, killed = np.random.default_rng(7), 0
    evaluations = 9 if kind == "numpy" else 1  # a round
    for _ in range(kills):
        process = started(tmp_path / "killed", kind=kind, rounds=rounds)
        assert process.stdout is not None
        for _ in range(int(rng.integers(1, evaluations * rounds // (kills + 1)))):
            process.stdout.readline()
        for _ in range(int(rng.integers(0, 300_000))):  # some milliseconds: anywhere within a round
            pass
        process.send_signal(signal.SIGKILL)
        finished(process)
        killed += process.returncode == -signal.SIGKILL
    last = started(tmp_path / "killed", kind=kind, rounds=rounds)
    assert finished(last) == ""
    assert finished(whole) == ""
    assert killed >= 2
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert len(metrics(tmp_path / "whole").splitlines()) == rounds
    if kind == "numpy":
        clients = [(tmp_path / name / EACH).read_bytes() for name in ("whole", "killed")]
        assert clients[0] == clients[1]
        assert len(clients[0].splitlines()) == 8 * rounds
    from safetensors.numpy import load_file

    models = [load_file(tmp_path / name / MODEL) for name in ("whole", "killed")]
    assert {n: a.tobytes() for n, a in models[0].items()} == {n: a.tobytes() for n, a in models[1].items()}
    assert (tmp_path / "killed" / "costs.jsonl").read_bytes() == (tmp_path / "whole" / "costs.jsonl").read_bytes()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
@pytest.mark.parametrize("limit", [300, 3000, 9000])
def test_a_full_disk_is_an_error_that_says_so_and_nothing_is_lost(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stands in for the disk: it is met in one file or another."""
    whole = started(tmp_path / "whole", kind="numpy", rounds=40)
    cut = finished(started(tmp_path / "full", kind="numpy", rounds=40, limit=limit))
    assert "foedus.errors.StorageError" in cut
    assert "could not be written: File too large" in cut
    assert "goes on from its last checkpoint" in cut.replace("\n", " ")
    assert "Exception ignored" not in cut
    assert not list((tmp_path / "full").glob(".*.tmp"))
    assert finished(started(tmp_path / "full", kind="numpy", rounds=40)) == ""
    assert finished(whole) == ""
    assert metrics(tmp_path / "full") == metrics(tmp_path / "whole")
    assert (tmp_path / "full" / EACH).read_bytes() == (tmp_path / "whole" / EACH).read_bytes()


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A memory disk of 64 kB, where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "foedus", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("we may mount no disk here")
    try:
        with pytest.raises(StorageError, match="No space left on device"):
            run(disk / "run", rounds=3000)
        done = len(metrics(disk / "run").splitlines())
        assert done > 10
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid") or not os.geteuid(), reason="root may write")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        run(tmp_path / "run")


def test_runs_without_a_folder_get_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = fd.Settings(progress=False, executor=fd.executors.debug())
    folders = [fd.simulate(TASK, ALGORITHM, CLIENTS, rounds=1, settings=settings).folder for _ in range(3)]
    assert len(set(folders)) == 3
    assert {f.parent for f in folders} == {Path("runs")}
