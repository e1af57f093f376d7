"""What a newcomer writes wrongly, and is told: what happened, why, and what to write instead.

Each line is a slip that somebody made or will make; the second column is the part of the message that helps. Slips
with data are tested with data (tests/core/test_population.py, tests/data).
"""

# ruff: noqa: E501  # a table of one line each

import re

import numpy as np
import pytest

import foedus as fd
from foedus.backends.located import advice
from foedus.errors import ConfigurationError, DataError, FoedusError, IncompatibleStages
from foedus.sim.engine import simulate

X, Y = np.zeros((20, 3), np.float32), np.arange(20) % 2


class Loss:
    """As torch.nn.CrossEntropyLoss: a class whose instances are losses."""


def task(model=None, loss=None, metrics=()):
    return fd.Task(model or fd.logistic(3, 2), loss, metrics)


def clients():
    return fd.data.from_arrays(X, Y).partition(fd.data.iid(2))


def run(what=None, how=None, whom=None, **given):
    local = fd.fedavg(fd.local_sgd(0.1))
    return simulate(what or task(), how or local, whom or clients(), **{"rounds": 1} | given)


SLIPS = {
    # the task
    "a text as model": (lambda: task("Net"), r"such as the class itself \(model=Net\); not 'Net'"),
    "a model with arguments": (lambda: task(lambda width: 0, abs), r"model=lambda: Net\(width=64\)"),
    "no loss": (lambda: task(lambda: 0), "a loss is needed, e.g. loss=torch"),
    "a text as loss": (lambda: task(lambda: 0, "mse"), r"a function loss\(output, target\).*not 'mse'"),
    "a loss's class": (lambda: task(lambda: 0, Loss), r"loss=Loss\(\)"),
    "one metric": (lambda: task(metrics=fd.accuracy), r"write metrics=\[foedus.accuracy\]"),
    "a text as metric": (lambda: task(metrics=["accuracy"]), "'accuracy', which is no Metric. Write foedus.accuracy"),
    # the algorithm
    "a text as rate": (lambda: fd.local_sgd("0.1"), "lr must be a number of at least 0, or a function of the round; not '0.1'"),
    "no rate": (lambda: fd.local_sgd(None), "lr must be a number"),
    "momentum of 1": (lambda: fd.local_sgd(0.1, momentum=1), "momentum must be a number of at least 0 and below 1; not 1"),
    "a text as decay": (lambda: fd.local_sgd(0.1, weight_decay="0"), "weight_decay must be a number of at least 0; not '0'"),
    "clipping to 0": (lambda: fd.local_sgd(0.1, clip_norm=0), "above 0, or None for no clipping; not 0"),
    "half a batch": (lambda: fd.local_sgd(0.1, batch_size=2.5), "batch_size must be a whole number of at least 1, not 2.5"),
    "a number as penalty": (lambda: fd.local_sgd(0.1, penalty=0.1), r"e.g. foedus.proximal\(0.01\); not 0.1"),
    "a text as leash": (lambda: fd.proximal("1"), "mu must be a number of at least 0; not '1'"),
    "an optimiser itself": (lambda: fd.local_training(optimiser=3), r"optimiser=lambda p: torch.optim.AdamW\(p\)"),
    "a rate as client": (lambda: fd.fedavg(0.1), r"e.g. foedus.local_sgd\(lr=0.1\); not 0.1"),
    "a text as server": (lambda: fd.fedavg(fd.local_sgd(0.1), server="adam"), r"e.g. foedus.adam\(lr=0.01\); not 'adam'"),
    "a server not called": (lambda: fd.fedavg(fd.local_sgd(0.1), server=fd.adam), r"the function adam itself: write adam\("),
    "a mean not called": (lambda: fd.fedavg(fd.local_sgd(0.1), aggregator=fd.mean), r"the function mean itself"),
    "a stage alone": (
        lambda: fd.fedavg(fd.local_sgd(0.1), aggregator=fd.clip(1.0)),
        r"write foedus.chain\(clip\(1.0\), foedus.mean\(\)\)",
    ),
    "a text as server's rate": (lambda: fd.adam("0.1"), "lr must be a number above 0; not '0.1'"),
    "a text in a chain": (lambda: fd.chain("clip", fd.mean()), "an aggregator; not 'clip'"),
    # the run
    "swapped": (lambda: simulate(fd.fedavg(fd.local_sgd(0.1)), task(), clients(), rounds=1), "first must be a foedus.Task"),
    "local training as algorithm": (lambda: run(how=fd.local_sgd(0.1)), r"foedus.fedavg\(local_sgd\(...\)\)"),
    "a data set as clients": (lambda: run(whom=fd.data.from_arrays(X, Y)), r"dataset.partition\(...\)"),
    "a list as clients": (lambda: run(whom=[(X, Y)]), r"foedus.Clients.of\({'hospital a': \(x, y\)"),
    "a text as rounds": (lambda: run(rounds="10"), "rounds must be a whole number of at least 0, not '10'"),
    "a cohort too large": (lambda: run(cohort=50), "write cohort=2, or less"),
    "a share as cohort": (lambda: run(cohort=0.5), r"foedus.poisson\(0.1\), or None for all; not 0.5"),
    "a number as evaluation": (lambda: run(evaluation=5), r"takes foedus.Evaluation\(...\), and was given 5"),
    "a dict as settings": (lambda: run(settings={}), r"takes foedus.Settings\(...\), and was given {}"),
    "a text as executor": (lambda: fd.Settings(executor="debug"), r"executor=foedus.executors.debug\(\)"),
    "no such executor": (lambda: fd.Settings(executor="quick"), "no executor is named 'quick'; there are: auto"),
    "an executor not called": (lambda: fd.Settings(executor=fd.executors.debug), r"itself: write debug\(\)"),
    "a number as world": (lambda: fd.Settings(world=3), r"foedus.World\(device=foedus.sim.world.phone\)"),
    "a text as device": (lambda: fd.World(device="phone"), "e.g. foedus.sim.world.phone"),
    "one sink": (lambda: fd.Settings(sinks=fd.TensorBoard("tb")), r"write sinks=\[TensorBoard\(folder='tb'\)\]"),
    "a number to stop at": (lambda: fd.Evaluation(stop_at=0.9), r"stop_at={'accuracy': 0.97}; not 0.9"),
    "a text as interval": (lambda: fd.Evaluation(every="5"), r"at least 0 rounds \(0 for never\), not '5'"),
    "another name in the grid": (
        lambda: fd.sweep(lambda rate: None, {"lr": [0.1]}, progress=False),
        r"with the names of the grid: missing a required argument: 'rate'",
    ),
    # the data
    "a text as partition": (lambda: fd.data.from_arrays(X, Y).partition("iid"), r"such as foedus.data.iid\(10\)"),
    "a partition not called": (lambda: fd.data.from_arrays(X, Y).partition(fd.data.iid), "not iid"),
    "a list as population": (lambda: fd.Clients.of([(X, Y)]), r"dict\(enumerate\(pairs\)\)"),
    "no inputs": (lambda: fd.data.from_arrays(None, Y), "not the single value None"),
    "a text as share": (lambda: clients().split(test="0.2"), r"split\(validation=0.1, test='0.2'\) cannot be: each share is a number in"),
    "true as share": (lambda: clients().split(test=True), r"test=True\) cannot be"),
    "a text as alpha": (lambda: fd.data.dirichlet(3, alpha="a"), "alpha must be a number above 0; not 'a'"),
    "true as nodes": (lambda: fd.data.iid(True), "nodes must be a whole number of at least 1, not True"),
    "true as cohort": (lambda: fd.uniform(True), "a cohort has at least one client, not True"),
    "true as features": (lambda: fd.logistic(True, 2), "features must be a whole number"),
    "true as workers": (lambda: fd.executors.processes(True), "workers must be a whole number of at least 1, or None for one per core, not True"),
    "a data set to scale": (
        lambda: fd.data.federated_scaling(fd.data.from_arrays(X, Y)),
        r"of a foedus.Clients, and this is of type Dataset. Deal .*dataset.partition\(foedus.data.iid\(10\)\)",
    ),
    "pairs to scale": (lambda: fd.data.federated_mean_filling([(X, Y)]), "of type list. Deal"),
    "hashes as targets": (
        lambda: fd.Examples.of(X, np.full(20, 2**63, np.uint64)),
        r"a target of 9223372036854775808, and whole numbers become int64.*return_inverse=True",
    ),
    "no folder": (lambda: fd.data.from_folder("nowhere", target="y"), "There is no folder .*nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_told_with_what_to_write_instead(slip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong, told = SLIPS[slip]
    with pytest.raises(FoedusError, match=told) as caught:
        wrong()
    assert isinstance(caught.value, ConfigurationError | DataError | IncompatibleStages)
    assert len(str(caught.value)) < 400  # no arrays or modules printed whole


def test_numpys_whole_numbers_are_as_good_as_pythons():
    two = np.int64(2)
    assert fd.logistic(np.int32(3), two).init(np.random.default_rng(0))["weight"].shape == (3, 2)
    assert fd.linear(two).init(np.random.default_rng(0))["weight"].shape == (2, 1)
    assert fd.executors.processes(two) == fd.executors.processes(2)
    kept = fd.Examples.of(X, np.full(20, 2**63 - 1, np.uint64))
    assert (kept.targets == 2**63 - 1).all()


@pytest.mark.slow  # loads matplotlib
def test_slips_with_figures(tmp_path):
    pytest.importorskip("matplotlib")
    from foedus.record import Record
    from foedus.report.curves import plot_runs

    runs = {"a": Record(tmp_path, {}, [{"round": 1, "central": {"loss": 0.5}}], [])}
    with pytest.raises(ConfigurationError, match="no run has evaluated 'acc'; there is: loss"):
        plot_runs(runs, "acc", tmp_path / "a.png")
    with pytest.raises(ConfigurationError, match=r"'a.xyz'; name it"):
        plot_runs(runs, "loss", tmp_path / "a.xyz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        (fd, "fedavgg", "no attribute 'fedavgg'"),
        (fd, "by_class", "it is foedus.data.by_class"),
        (fd.data, "mnst", "no attribute 'mnst'"),
    ],
)
def test_a_misspelt_name_is_told_in_a_way_that_python_can_add_a_guess_to(module, name, told):
    with pytest.raises(AttributeError, match=told) as caught:
        getattr(module, name)
    assert (caught.value.name, caught.value.obj) == (name, module)


@pytest.mark.parametrize(
    ("message", "inputs", "target", "told"),
    [
        ("expected scalar type Long but found Float", X, Y, r"write y.astype\('int64'\)"),
        ("Target 7 is out of bounds.", X, Y, "reach from 0 to 1: number the classes from 0"),
        ("mat1 and mat2 must have the same dtype", X.astype(np.uint8), Y, r"are uint8, .* write x.astype\('float32'\)"),
        ("mat1 and mat2 shapes cannot be multiplied (10x3 and 4x2)", X, Y, r"another shape than \[3\]"),
        ("'float' object has no attribute 'ndim'", X, Y, "must return a torch tensor"),
        ("something nobody has ever seen", X, Y, "^$"),
    ],
)
def test_common_faults_of_training_come_with_advice(message, inputs, target, told):
    assert re.search(told, advice(message, [inputs], target))


@pytest.mark.slow  # loads torch
def test_real_messages_of_torch_are_known(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    settings = fd.Settings(executor=fd.executors.debug(), progress=False)
    ask = torch.nn.functional.cross_entropy

    def told(x, y, width=3, loss=ask):
        what = fd.Task(lambda: torch.nn.Linear(width, 2), loss)
        with pytest.raises(FoedusError) as caught:
            run(what, whom=fd.Clients.of({"a": (x, y)}), settings=settings)
        return str(caught.value)

    assert "write y.astype('int64')" in told(X, Y.astype(np.float32))
    assert "reach from 5 to 6" in told(X, Y + 5)
    assert "write x.astype('float32')" in told(X.astype(np.uint8), Y)
    assert "another shape than [3]" in told(X, Y, width=4)
    assert "The loss must return a torch tensor" in told(X, Y, loss=lambda output, target: 1.0)
    assert "something is detached" in told(X, Y, loss=lambda output, target: ask(output.detach(), target))
    assert "called with each as one argument" in told((X, X), Y)
    assert "there is: cpu" in _device_told(torch)


def _device_told(torch):
    with pytest.raises(ConfigurationError) as caught:
        run(
            fd.Task(lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy),
            settings=fd.Settings(device="gpu0"),
        )
    return str(caught.value)
