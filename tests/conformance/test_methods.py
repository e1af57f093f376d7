"""The conformance suite of methods: what every algorithm must do, whoever carries it out. A method is one line.

* Executors agree: all that a run leaves behind, after rounds with ragged clients, to 10⁻¹⁰ in float64.
* A run that is interrupted and goes on ends with the same bytes as one that never was.
* Any number of worker processes gives the same bits.
* Where there is nothing to correct, it is gradient descent on all data.
* Rounds in which nobody trains, or nobody sends, are survived.
* A client whose data holds NaN is refused and named, and keeps what it kept.

What each computes is compared with its paper elsewhere (tests/core/test_drift.py, test_fair.py, test_personal.py,
test_lazy.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import foedus as fd
from foedus.core.drift import averaged_momentum, feddyn, fednova, mime_lite, scaffold
from foedus.core.fair import afl, qfedavg
from foedus.core.gate import self_checked
from foedus.core.lazy import lag, lazy
from foedus.core.method import Consult, Contribution, Local, Method, Personal, Train, Visit, averaging
from foedus.core.personal import ditto, fedbn, fedrep, fine_tune, ifca, local_parts, pfedme
from foedus.core.select import Sampler
from foedus.core.structured import structured
from foedus.core.widths import heterofl
from foedus.record.kept import Kept

SIZES = [12, 5, 0, 18, 9]
LOCAL = fd.local_sgd(lr=lambda r: 0.1 / r, epochs=2, batch_size=4, momentum=0.5)
HEAD = "3"  # the last layer

Make = Callable[[], fd.Algorithm]


def personal(chosen: Personal) -> Make:
    return lambda: fd.fedavg(LOCAL, personal=chosen)


def consulted(visit: Visit) -> Local:
    """Steps as long as the client's own inputs say, found by the method's own function."""
    length = yield Consult(lambda examples: float(np.abs(examples.inputs[0]).mean()))
    trained = yield Train()
    brought = Contribution.of(trained, visit)
    return brought._replace(update=(trained.vector - visit.received) / (1 + length), report={"length": length})


METHODS: dict[str, Make] = {
    "plain": lambda: fd.Algorithm(client=LOCAL, method=averaging()),
    "scaffold, option I": lambda: scaffold(LOCAL, full_gradient=True),
    "scaffold, option II": lambda: scaffold(LOCAL, server=fd.sgd(lr=0.9)),
    "scaffold, compressed control": lambda: scaffold(LOCAL, control=fd.chain(fd.clip(0.5), fd.mean())),
    "feddyn": lambda: feddyn(LOCAL, alpha=0.2),
    "fednova": lambda: fednova(LOCAL),
    "mime_lite": lambda: mime_lite(LOCAL),
    "averaged_momentum": lambda: averaged_momentum(LOCAL),
    "structured, mask": lambda: structured(LOCAL, fd.matrices(fd.random_mask(0.4, unbiased=False))),
    "structured, each its own": lambda: structured(LOCAL, fd.rand_k(0.4), server=fd.sgd(lr=1.5)),
    "structured, low rank": lambda: structured(LOCAL, fd.low_rank(2, unbiased=False)),
    "qfedavg": lambda: qfedavg(LOCAL, q=1.5),
    "afl": lambda: afl(LOCAL, domains=[0, 1, 1, 0, 2]),
    "fine_tune": personal(fine_tune()),
    "local_parts": personal(local_parts(HEAD)),
    "fedbn": personal(fedbn()),
    "fedrep": personal(fedrep(HEAD)),
    "ditto": personal(ditto(0.5)),
    "pfedme": personal(pfedme(2.0, rounds=2, steps=2, lr=0.1)),
    "ifca": personal(ifca(2)),
    "scaffold with local parts": lambda: scaffold(LOCAL, personal=local_parts(HEAD)),
    "feddyn with fedbn": lambda: feddyn(LOCAL, personal=fedbn()),
    "heterofl": lambda: heterofl(LOCAL, lambda client: 0.5 if client % 2 else 1.0, fractions=(1.0, 0.5)),
    "lazy": lambda: fd.Algorithm(client=LOCAL, method=lazy(share=0.2)),
    "lag": lambda: fd.Algorithm(client=LOCAL, method=lag(xi=2.0)),
    "consult": lambda: fd.Algorithm(client=LOCAL, method=Method(consulted, "consulted()")),
    "self_checked": lambda: fd.Algorithm(client=LOCAL, method=self_checked(within={"loss": (0.0, 2.0)})),
}
EXECUTORS: dict[str, Callable[[], Any]] = {
    "debug": fd.executors.debug,
    "vectorised": fd.executors.vectorised,
    "compiled": fd.executors.compiled,
}


def net(normal: bool) -> nn.Module:
    middle = nn.BatchNorm1d(4) if normal else nn.Identity()
    return nn.Sequential(nn.Linear(5, 4), middle, nn.Tanh(), nn.Linear(4, 3)).double()


def task(*, average_buffers: bool = True, normal: bool = True) -> fd.Task:
    return fd.Task(
        partial(net, normal), nn.functional.cross_entropy, metrics=[fd.accuracy], average_buffers=average_buffers
    )


def population(*, spoilt: int | None = None, ragged: bool = False) -> fd.Clients:
    """Uneven clients, one without data; of whole batches unless ``ragged``: batch normalisation takes no padding."""
    rng, own = np.random.default_rng(1), {}
    for i, n in enumerate(SIZES):
        count = n if ragged else n - n % 4
        x = rng.normal(size=(count, 5))
        if i == spoilt:
            x[0, 0] = np.nan
        own[f"c{i}"] = fd.Examples.of(x, rng.integers(3, size=count), keep_dtype=True)
    return fd.Clients.of(own)


def ran(folder: Path, algorithm: fd.Algorithm, **how: Any) -> fd.Run:
    """A small run of rounds with some of the clients each."""
    settings = fd.Settings(
        folder=folder, executor=how.pop("executor", fd.executors.debug()), progress=False,
        checkpoint_seconds=how.pop("checkpoint_seconds", 1e9),
    )  # fmt: skip
    clients, cohort = how.pop("clients", None) or population(), how.pop("cohort", 3)  # a cohort of None is everybody
    evaluation = fd.Evaluation(clients=True, every=how.pop("every", 2))
    return fd.simulate(
        how.pop("task", None) or task(), algorithm, clients, rounds=how.pop("rounds", 4), cohort=cohort, seed=2,
        evaluation=evaluation, settings=settings,
    )  # fmt: skip


def left(folder: Path) -> dict[str, Any]:
    """All that a run left behind: the model's arrays, what clients keep, and every figure."""
    run = fd.read_run(folder)
    found: dict[str, Any] = {f"model {name}": a for name, a in run.parameters.items()}
    kept = Kept(folder / "kept.sqlite")
    for client, arrays in kept.read(range(len(SIZES))).items():
        found |= {f"client {client} {name}": array for name, array in arrays.items()}
    kept.close()
    for line in run.metrics:
        found |= {f"round {line['round']} {name}": v for name, v in flat(line)}
    return found


def flat(line: Any, prefix: str = "") -> list[tuple[str, float]]:
    if not isinstance(line, dict):
        return [(prefix, float(line))] if isinstance(line, int | float) else []
    return [pair for name, value in line.items() for pair in flat(value, f"{prefix}.{name}")]


def bits(folder: Path) -> dict[str, bytes]:
    return {name: np.asarray(value).tobytes() for name, value in left(folder).items()}


# --- executors ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "model"),
    [
        ("vectorised", "batch norm, averaged"),
        ("vectorised", "batch norm, kept"),
        ("vectorised", "ragged"),
        ("compiled", "ragged"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_executors_agree(tmp_path: Path, name: str, executor: str, model: str) -> None:
    ragged = model == "ragged"
    if ragged and "fedbn" in name:
        pytest.skip("without batch normalisation")
    own = {"task": task(average_buffers=model != "batch norm, kept", normal=not ragged)}
    for kind in ("debug", executor):
        ran(tmp_path / kind, METHODS[name](), executor=EXECUTORS[kind](), clients=population(ragged=ragged), **own)
    wanted, found = left(tmp_path / "debug"), left(tmp_path / executor)
    assert found.keys() == wanted.keys()
    assert any(what.startswith("client") for what in wanted) == (name in KEEPERS or model == "batch norm, kept")
    for what, value in wanted.items():
        np.testing.assert_allclose(found[what], value, rtol=1e-10, atol=1e-10, err_msg=what)


def thrice(visit: Visit) -> Local:
    """Trainings of three kinds, in batches of other sizes than the algorithm's; specs are made anew each time."""
    first = yield Train(spec=fd.local_sgd(lr=lambda r: 0.1 / r, batch_size=2, penalty=fd.proximal(0.1)))
    whole = yield Train(spec=fd.local_sgd(lr=0.1, steps=1, batch_size=None))
    trained = yield Train(start=first.vector, buffers=first.buffers)
    return Contribution.of(trained, visit)._replace(update=trained.vector + whole.vector - 2 * visit.received)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold, option I", "mime_lite", "ditto", "thrice"])
def test_batches_of_other_sizes_are_not_padded_where_they_must_not_be(tmp_path: Path, name: str) -> None:
    """Batch normalisation, and a method that trains in batches of another size than the algorithm's."""
    own = METHODS | {"thrice": lambda: fd.Algorithm(client=LOCAL, method=Method(thrice, "thrice()"))}
    for kind, executor in EXECUTORS.items():
        ran(tmp_path / kind, own[name](), executor=executor(), rounds=3)
    wanted = left(tmp_path / "debug")
    for kind in EXECUTORS:
        found = left(tmp_path / kind)
        for what, value in wanted.items():
            np.testing.assert_allclose(found[what], value, rtol=1e-10, atol=1e-10, err_msg=f"{kind}: {what}")


KEEPERS = {
    "scaffold, option I", "scaffold, option II", "scaffold, compressed control", "feddyn", "local_parts", "fedbn",
    "fedrep", "ditto", "pfedme", "scaffold with local parts", "feddyn with fedbn", "lazy", "lag",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_any_number_of_worker_processes_gives_the_same_bits(tmp_path: Path, name: str) -> None:
    for workers in (1, 3):
        ran(tmp_path / str(workers), METHODS[name](), executor=fd.executors.processes(workers))
    ran(tmp_path / "debug", METHODS[name]())
    assert bits(tmp_path / "1") == bits(tmp_path / "3") == bits(tmp_path / "debug")


# --- resume ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, name: str) -> None:
    ran(tmp_path / "whole", METHODS[name](), rounds=5, every=1)
    for rounds in (1, 2, 4, 5):
        ran(tmp_path / "resumed", METHODS[name](), rounds=rounds, every=1)
    assert bits(tmp_path / "resumed") == bits(tmp_path / "whole")
    for file in ("metrics.jsonl", "clients.jsonl", "model.safetensors"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# --- the linear oracle ----------------------------------------------------------------------------------------

ONE = fd.local_sgd(lr=0.2, steps=1, batch_size=None)
POOLED: dict[str, Make] = {
    "plain": lambda: fd.Algorithm(client=ONE, method=averaging()),
    "scaffold, option I": lambda: scaffold(ONE, full_gradient=True),
    "scaffold, option II": lambda: scaffold(ONE),
    "fednova": lambda: fednova(ONE),
    "mime_lite": lambda: mime_lite(ONE, beta=0.0),
    "qfedavg": lambda: qfedavg(ONE, q=0.0),
    "fine_tune": lambda: fd.fedavg(ONE, personal=fine_tune()),
    "ditto": lambda: fd.fedavg(ONE, personal=ditto(0.5)),
    "ifca": lambda: fd.fedavg(ONE, personal=ifca(1)),
    "lazy": lambda: fd.Algorithm(client=ONE, method=lazy(share=0.0)),
    "lag": lambda: fd.Algorithm(client=ONE, method=lag(xi=0.0)),
    "self_checked": lambda: fd.Algorithm(client=ONE, method=self_checked(within={"loss": (0.0, 9.0)})),
}


@pytest.mark.parametrize("name", POOLED)
def test_one_whole_step_of_everybody_is_gradient_descent_on_all_data(tmp_path: Path, name: str) -> None:
    """Whatever corrects drift has nothing to correct there."""
    clients = population(ragged=True)
    linear = fd.Task(fd.logistic(5, 3, dtype="float64"))
    run = ran(tmp_path / "run", POOLED[name](), clients=clients, task=linear, cohort=None, rounds=8)
    pool = clients.pooled_examples()
    x, w = np.concatenate([pool.inputs[0], np.ones((len(pool), 1))], 1), np.zeros((6, 3))
    for _ in range(8):
        shares = np.exp(x @ w)
        w = w - 0.2 * x.T @ (shares / shares.sum(1, keepdims=True) - np.eye(3)[pool.targets]) / len(x)
    np.testing.assert_allclose(run.weights.vector, w.reshape(-1), rtol=1e-10, atol=1e-12)


# --- rounds without anybody -----------------------------------------------------------------------------------


def called(*cohorts: list[int]) -> Sampler:
    """Who is asked round by round, written down."""
    return fd.uniform(1)._replace(
        sample=lambda population, seed, number: np.array(cohorts[number - 1], np.int64), label=f"called{cohorts}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_rounds_in_which_nobody_trains_are_survived(tmp_path: Path, name: str) -> None:
    """Before anybody ever did, and after; an empty client is nobody."""
    run = ran(tmp_path / "run", METHODS[name](), cohort=called([], [2], [0, 1], []), every=1)
    assert [line["trained"] for line in run.metrics] == [0, 0, 2, 0]
    assert all(np.isfinite(array).all() for array in run.parameters.values())
    plain = ran(tmp_path / "plain", METHODS[name](), cohort=called([], [2]), rounds=2)
    first = ran(tmp_path / "first", METHODS[name](), rounds=0)
    for parameter, array in plain.parameters.items():
        np.testing.assert_array_equal(array, first.parameters[parameter], err_msg="nobody taught it anything")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_client_that_sends_nothing_changes_nothing(tmp_path: Path, name: str) -> None:
    """Nobody passes a check of its own that nothing passes: as though nobody had been asked."""
    own = METHODS[name]()
    assert own.method is not None
    if name in ("ifca", "lag", "lazy"):
        pytest.skip("sends by a rule of its own")
    if own.method.updates:
        with pytest.raises(fd.errors.ConfigurationError, match="channels of its own"):
            self_checked(own.method, within={"loss": (0.0, 0.0)})
        return
    silent = fd.Algorithm(client=own.client, method=self_checked(own.method, within={"loss": (0.0, 0.0)}))
    run = ran(tmp_path / "run", silent, rounds=2)
    assert [line["senders"] for line in run.metrics] == [0, 0]
    first = ran(tmp_path / "first", silent, rounds=0)
    for parameter, array in run.parameters.items():
        np.testing.assert_array_equal(array, first.parameters[parameter])


# --- NaN ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_client_with_nan_is_refused_and_named_and_keeps_what_it_kept(tmp_path: Path, name: str) -> None:
    """In the third round client 3's data has gone bad."""

    def arriving(number: int) -> fd.Clients:
        own = population(spoilt=3 if number == 3 else None)
        return fd.Clients.generated(lambda client: own.train(own.ids.index(client)), own.ids, sizes=own.sizes)

    clients = fd.Clients.streamed(arriving)
    how: dict[str, Any] = {"cohort": called([0, 3], [1, 3], [0, 3], [0, 1]), "clients": clients}
    ran(tmp_path / "run", METHODS[name](), rounds=2, **how)
    before = {what: v for what, v in left(tmp_path / "run").items() if what.startswith("client 3")}
    assert bool(before) == (name in KEEPERS)
    run = ran(tmp_path / "run", METHODS[name](), rounds=4, **how)
    told = run.metrics[2].get("refused", [])
    if name == "self_checked":
        assert run.metrics[2]["senders"] == 1, "it finds out by itself"
    else:
        assert [r["client"] for r in told] == ["c3"]
        assert "finite" in told[0]["reason"] or "nan" in told[0]["reason"]
    after = {what: v for what, v in left(tmp_path / "run").items() if what.startswith("client 3")}
    assert after.keys() == before.keys()
    for what, value in before.items():
        np.testing.assert_array_equal(after[what], value)
    assert all(np.isfinite(array).all() for array in run.parameters.values())
