"""Models of clients' own, beside loops written from their papers' pseudocode; what stays at home does not travel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.core.drift import feddyn, fednova, scaffold
from foedus.core.lazy import lazy
from foedus.core.method import Personal, averaging, travelling
from foedus.core.personal import ditto, fedbn, fedrep, fine_tune, ifca, local_parts, pfedme
from foedus.errors import ConfigurationError
from foedus.sim.world import Device
from foedus.tree import Layout

from .oracle import COUNT, DATA, FEATURES, SEED, SIZES, Floats, cohort, descended, final, loss, simulated, steps

ROUNDS = 6
SPEC = fd.local_sgd(lr=lambda r: 0.05 / r, epochs=2, batch_size=4, momentum=0.5)
START = np.zeros(FEATURES + 1)
N = np.array(SIZES, float)
HEAD = np.array([0.0] * FEATURES + [1.0])  # the intercept, "bias"
LAYOUT = Layout(("weight", "bias"), ((FEATURES, 1), (1,)), ("float64", "float64"))
NOTHING = Layout((), (), ())


def each(algorithm: fd.Algorithm, size: int = 3, **more: Any) -> fd.Run:
    return simulated(algorithm, rounds=ROUNDS, size=size, evaluation=fd.Evaluation(clients=True), **more)


def check(run: fd.Run, models: list[Floats], vector: Floats | None = None) -> None:
    """Figures of clients' own models, and the global one."""
    losses = np.array([loss(i, w) for i, w in enumerate(models)])
    found = run.metrics[-1]["personal"]["loss"]
    np.testing.assert_allclose(
        [found["mean"], found["spread"], found["worst_decile"]], [losses.mean(), losses.std(), losses.max()], rtol=1e-10
    )
    if vector is not None:
        np.testing.assert_allclose(run.weights.vector, vector, rtol=1e-10, atol=1e-12)


def mean(chosen: list[int], vectors: list[Floats]) -> Floats:
    return np.average(vectors, axis=0, weights=N[chosen])


@pytest.mark.slow
def test_fine_tuning_trains_a_copy_before_evaluation_and_changes_nothing_else() -> None:
    run = each(fd.fedavg(SPEC, personal=fine_tune(epochs=3)))
    w = final(fd.fedavg(SPEC), rounds=ROUNDS, size=3)
    longer = fd.local_sgd(lr=SPEC.lr, epochs=3, batch_size=4, momentum=0.5)
    check(run, [descended(longer, i, ROUNDS, w) for i in range(COUNT)], w)
    other = fd.local_sgd(lr=0.02, steps=2)
    run = each(scaffold(SPEC, personal=fine_tune(other)))
    w = final(scaffold(SPEC), rounds=ROUNDS, size=3)
    check(run, [descended(other, i, ROUNDS, w) for i in range(COUNT)], w)


def test_local_parts_are_their_papers_loop() -> None:
    w, own = START, [0.0] * COUNT
    for t in range(1, ROUNDS + 1):
        chosen, ends = cohort(3, t), []
        for i in chosen:
            ends.append(descended(SPEC, i, t, w * (1 - HEAD) + own[i] * HEAD))
            own[i] = ends[-1][-1]
        w = mean(chosen, ends) * (1 - HEAD)
    run = each(fd.fedavg(SPEC, personal=local_parts("bias")))
    check(run, [w + b * HEAD for b in own], w)


def test_what_stays_at_home_does_not_travel() -> None:
    plain = simulated(fd.fedavg(SPEC), rounds=1).metrics[0]
    found = simulated(fd.fedavg(SPEC, personal=local_parts("bias")), rounds=1).metrics[0]
    for way in ("bytes_up", "bytes_down"):
        assert plain[way] - found[way] == COUNT * 8, "one float64 of each client"
    compressed = fd.chain(fd.clip(1.0), fd.mean())
    run = simulated(fd.fedavg(SPEC, aggregator=compressed, personal=local_parts("weight")), rounds=2)
    assert run.metrics[0]["bytes_up"] == COUNT * 16
    assert run.weights.vector[:FEATURES].tolist() == [0.0] * FEATURES
    assert run.weights.vector[FEATURES] != 0


def test_a_simulated_world_foresees_the_bytes_of_what_travels() -> None:
    steady = fd.World(device=lambda draw: Device(speed=1.0, download=1.0, upload=1.0))
    plain, found = (
        simulated(fd.fedavg(SPEC, personal=p), rounds=1, world=steady).metrics[0] for p in (None, local_parts("bias"))
    )
    for way in ("bytes_up", "bytes_down"):
        assert found[way] == plain[way] - 8 * COUNT
    assert found["simulated"]["seconds"] == plain["simulated"]["seconds"] - 16, "at a byte a second, both ways"


def test_scaffold_corrects_only_what_is_common() -> None:
    """SCAFFOLD of the weights, and plain descent of each client's own intercept."""
    x, c, own = START, START, np.zeros((COUNT, FEATURES + 1))
    heads = [0.0] * COUNT
    for t in range(1, ROUNDS + 1):
        chosen, ends = cohort(COUNT, t), []
        before = [x * (1 - HEAD) + heads[i] * HEAD for i in chosen]
        ends = [descended(RATED, i, t, w, shift=(c - own[i]) * (1 - HEAD)) for i, w in zip(chosen, before, strict=True)]
        for i, w, y in zip(chosen, before, ends, strict=True):
            own[i] = own[i] - c + (w - y) / (steps(RATED, i) * 0.05)
            heads[i] = y[-1]
        c = N @ own / N.sum() * (1 - HEAD)
        x = mean(chosen, ends) * (1 - HEAD)
    run = each(scaffold(RATED, personal=local_parts("bias")), COUNT)
    check(run, [x + b * HEAD for b in heads], x)


RATED = fd.local_sgd(lr=0.05, epochs=2, batch_size=4)


@pytest.mark.parametrize("algorithm", [feddyn, fednova])
def test_parts_are_kept_as_training_left_them_whatever_is_sent(algorithm: Any) -> None:
    """FedNova sends shortened updates; the intercept must not be shortened with them."""
    one = simulated(algorithm(RATED, personal=local_parts("bias")), rounds=1, evaluation=fd.Evaluation(clients=True))
    mu = 0.1 if algorithm is feddyn else 0.0
    ends = [descended(RATED, i, 1, START, mu=mu, anchor=START) for i in range(COUNT)]
    check(one, [one.weights.vector * (1 - HEAD) + end * HEAD for end in ends])


def test_fedrep_is_its_papers_loop() -> None:
    """Algorithm 1: the head by itself, then the representation by itself."""
    w, own = START, [0.0] * COUNT
    heads = fd.local_sgd(lr=SPEC.lr, epochs=3, batch_size=4, momentum=0.5)
    for t in range(1, ROUNDS + 1):
        chosen, ends = cohort(3, t), []
        for i in chosen:
            first = descended(heads, i, t, w * (1 - HEAD) + own[i] * HEAD, moving=HEAD)
            ends.append(descended(SPEC, i, t, first, phase=1, moving=1 - HEAD))
            own[i] = first[-1]
        w = mean(chosen, ends) * (1 - HEAD)
    check(each(fd.fedavg(SPEC, personal=fedrep("bias", epochs=3))), [w + b * HEAD for b in own], w)


def test_ditto_is_its_papers_loop() -> None:
    """Algorithm 1: v ← v − η (∇F(v) + λ (v − w)), beside federated averaging."""
    w, own = START, {}
    for t in range(1, ROUNDS + 1):
        chosen = cohort(3, t)
        ends = [descended(SPEC, i, t, w) for i in chosen]
        own |= {i: descended(SPEC, i, t, own.get(i, w), phase=1, mu=0.7, anchor=w) for i in chosen}
        w = mean(chosen, ends)
    check(each(fd.fedavg(SPEC, personal=ditto(0.7))), [own.get(i, w) for i in range(COUNT)], w)


@pytest.mark.parametrize("lam", [0.0, 19.0])
def test_ditto_is_between_local_models_and_the_global_one(lam: float) -> None:
    spec = fd.local_sgd(lr=0.05, steps=30, batch_size=None)
    run = each(fd.fedavg(spec, personal=ditto(lam)), COUNT)
    figures = run.metrics[-1]
    mine, common = figures["personal"]["loss"]["mean"], figures["clients"]["loss"]["mean"]
    assert (mine < 0.05 * common) if lam == 0.0 else (0.3 * common < mine < common)


def test_pfedme_is_its_papers_loop() -> None:
    """Algorithm 1: R times θ ≈ argmin F(θ) + λ/2 ‖θ − w‖² and w ← w − η λ (w − θ); β mixes on the server."""
    lam, eta, beta = 2.0, 0.1, 0.8
    inner = fd.local_sgd(lr=SPEC.lr, steps=3, batch_size=4, momentum=0.5)
    w, own = START, {}
    for t in range(1, ROUNDS + 1):
        chosen, ends = cohort(3, t), []
        for i in chosen:
            local, theta = w, w
            for r in range(4):
                theta = descended(inner, i, t, theta, phase=r, mu=lam, anchor=local)
                local = local - eta * lam * (local - theta)
            ends.append(local)
            own[i] = theta
        w = (1 - beta) * w + beta * mean(chosen, ends)
    algorithm = fd.fedavg(SPEC, server=fd.sgd(lr=beta), personal=pfedme(lam, rounds=4, steps=3, lr=eta))
    check(each(algorithm), [own.get(i, w) for i in range(COUNT)], w)


def test_ifca_is_its_papers_loop() -> None:
    """Algorithm 1, model averaging: the model of the least loss is trained, and averaged over those who chose it."""
    noise = np.random.Generator(np.random.Philox(4)).normal(size=(3, FEATURES + 1))
    models = [START, 2 * noise[1], 2 * noise[2]]
    chosen_by: list[int] = []
    for t in range(1, ROUNDS + 1):
        chosen = cohort(3, t)
        chosen_by = [int(np.argmin([loss(i, w) for w in models])) for i in chosen]
        ends = [descended(SPEC, i, t, models[j]) for i, j in zip(chosen, chosen_by, strict=True)]
        for j in set(chosen_by):
            mine = [k for k, other in enumerate(chosen_by) if other == j]
            models[j] = mean([chosen[k] for k in mine], [ends[k] for k in mine])
    run = each(fd.fedavg(SPEC, personal=ifca(3, spread=2.0, seed=4)))
    best = [min(models, key=lambda w, i=i: loss(i, w)) for i in range(COUNT)]
    check(run, best, models[int(np.argmax(np.bincount(chosen_by)))])
    assert run.metrics[-1]["senders"] == 3


# --- normalisation at home ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("average_buffers", [True, False])
def test_fedbn_is_its_papers_loop(average_buffers: bool, tmp_path: Path) -> None:
    """Algorithm 1, in plain torch: everything but batch normalisation is averaged."""
    torch = pytest.importorskip("torch")
    from foedus.backends import open_trainer

    def net() -> Any:
        layers = torch.nn
        return layers.Sequential(
            layers.Linear(FEATURES, 4), layers.BatchNorm1d(4), layers.Tanh(), layers.Linear(4, 1)
        ).double()

    squares = lambda output, target: ((output[:, 0] - target) ** 2).mean()  # noqa: E731
    task = fd.Task(net, squares, average_buffers=average_buffers)
    spec = fd.local_sgd(lr=0.1, steps=3, batch_size=None)
    settings = fd.Settings(folder=tmp_path / "run", executor=fd.executors.debug(), progress=False)
    examples = {i: fd.Examples.of(*pair, keep_dtype=True) for i, pair in enumerate(DATA)}
    run = fd.simulate(
        task, fd.fedavg(spec, personal=fedbn()), fd.Clients.of(examples), rounds=3, seed=SEED, settings=settings,
        evaluation=fd.Evaluation(clients=True),
    )  # fmt: skip

    trainer = open_trainer(task, seed=SEED)
    first = trainer.initial()
    begin = trainer.layout.unflatten(first.vector) | trainer.buffer_layout.unflatten(first.buffers)
    modules = [net() for _ in range(COUNT)]
    for module in modules:
        module.load_state_dict({name: torch.as_tensor(a) for name, a in begin.items()})
    common = [name for name, _ in modules[0].named_parameters() if not name.startswith("1.")]
    pairs = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in DATA]
    for _ in range(3):
        for module, (x, y) in zip(modules, pairs, strict=True):
            for _ in range(3):
                module.zero_grad()
                squares(module(x), y).backward()
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= 0.1 * parameter.grad
        states = [module.state_dict() for module in modules]
        shared = {n: sum(k / N.sum() * s[n] for k, s in zip(N, states, strict=True)) for n in common}
        for module in modules:
            module.load_state_dict(module.state_dict() | shared)
    losses = [float(squares(m.eval()(x), y).detach()) for m, (x, y) in zip(modules, pairs, strict=True)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["personal"]["loss"] for line in lines[-COUNT:]], losses, rtol=1e-9)
    there = run.parameters
    for name in common:
        np.testing.assert_allclose(there[name], shared[name].numpy(), rtol=1e-9, atol=1e-12)
    assert there["1.running_mean"].tolist() == [0.0] * 4
    travelled = sum(int(np.prod(there[name].shape)) for name in common)
    assert run.metrics[0]["bytes_down"] == COUNT * travelled * 8
    assert run.metrics[0]["bytes_up"] == COUNT * (travelled * 8 + 8)


# --- what they refuse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("personal", [fedrep("bias"), pfedme(1.0, rounds=1, steps=1, lr=0.1), ifca(2)])
def test_methods_that_say_what_clients_do_go_with_federated_averaging_only(personal: Personal) -> None:
    with pytest.raises(ConfigurationError, match=r"says itself what clients do, and so does scaffold\("):
        scaffold(SPEC, personal=personal)


def test_names_that_are_not_there_are_told() -> None:
    with pytest.raises(ConfigurationError, match=r"no parameter is named 'head'.* there are: weight, bias"):
        simulated(fd.fedavg(SPEC, personal=local_parts("head")), rounds=1)
    with pytest.raises(ConfigurationError, match="every parameter would stay with the clients"):
        simulated(fd.fedavg(SPEC, personal=local_parts("bias", "weight")), rounds=1)
    with pytest.raises(ConfigurationError, match=r'no buffer is named running_mean.*local_parts\("norm"\)'):
        simulated(fd.fedavg(SPEC, personal=fedbn()), rounds=1)
    with pytest.raises(ConfigurationError, match="needs names of layers"):
        local_parts()


def test_a_part_is_a_name_or_all_that_lies_below_it() -> None:
    layout = Layout(("head.0.weight", "header", "head"), ((2,), (3,), (1,)), ("float32",) * 3)
    parts = travelling(local_parts("head")(averaging()), (layout, NOTHING))
    assert parts[0] is not None
    assert parts[0].layout.names == ("header",)
    assert parts[0].at.tolist() == [2, 3, 4]
    assert parts[1] is None
    assert travelling(averaging(), (LAYOUT, NOTHING)) == (None, None)


def test_a_penalty_of_its_own_and_lambda_do_not_go_together() -> None:
    held = fd.local_sgd(lr=0.1, penalty=fd.proximal(0.1))
    with pytest.raises(ConfigurationError, match=r"has the penalty proximal\(0.1\) already.*λ = 0.5"):
        simulated(fd.fedavg(held, personal=ditto(0.5)), rounds=1)
    simulated(fd.fedavg(held, personal=ditto(0.5, client=SPEC)), rounds=1)


def test_wrappers_wrap_each_other() -> None:
    algorithm = fd.Algorithm(client=SPEC, method=ditto(0.5)(lazy(share=0.01)))
    assert algorithm.label.startswith("ditto(lazy(plain(), share=0.01), lam=0.5): local_sgd(")
    assert "personal" in each(algorithm).metrics[-1]


def test_a_client_that_never_took_part_has_the_global_model() -> None:
    run = simulated(fd.fedavg(SPEC, personal=ditto(0.5)), rounds=1, size=2, evaluation=fd.Evaluation(clients=True))
    own = {i: descended(SPEC, i, 1, START, phase=1, mu=0.5, anchor=START) for i in cohort(2, 1)}
    check(run, [own.get(i, run.weights.vector) for i in range(COUNT)])


def test_personal_is_a_value() -> None:
    with pytest.raises(ConfigurationError, match="personal is a value such as"):
        fd.fedavg(SPEC, personal="fine_tune")  # type: ignore[arg-type]
