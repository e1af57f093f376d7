"""Masked sums in simulations: every executor, what is counted, what is refused, and the real protocol among clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.core.select import Sampler
from foedus.errors import ConfigurationError, IncompatibleStages, NoGuarantee
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.rounds.freight import update_blob
from foedus.rounds.parcel import Carried, Parcel
from foedus.secure.planes import packed, packed_bytes
from foedus.secure.traffic import overhead
from foedus.sim.world import Device

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 6)).astype("f4")
Y = (X @ RNG.normal(size=(6, 3))).argmax(1)
CLIENTS = fd.Clients.of({i: (X[i::12], Y[i::12]) for i in range(12)})
TASK = fd.Task(fd.logistic(6, 3))
LOCAL = fd.local_sgd(lr=0.1)
TEN = fd.Withstand(clients=10, corrupt=0.1, dropouts=0.2)
EXECUTORS = [fd.executors.debug(), fd.executors.processes(workers=2), fd.executors.vectorised()]


def run(rule: fd.Aggregator, folder: Path, *, cohort: Any = 10, rounds: int = 2, **how: Any) -> fd.Run:
    settings = fd.Settings(folder=folder, progress=False, **{"executor": fd.executors.debug(), **how})
    return fd.simulate(
        TASK, fd.fedavg(LOCAL, aggregator=rule), CLIENTS, rounds=rounds, cohort=cohort, settings=settings
    )


def lossy(draw: np.random.Generator) -> Device:
    return Device(float(draw.uniform(10, 100)), 1e6, 1e6, dropout=0.15)


# --- the result ---------------------------------------------------------------------------------------------


def test_a_fine_grid_gives_what_the_plain_mean_gives(tmp_path: Path) -> None:
    fine = fd.masked(TEN, bits=24, bound=4.0)
    one, other = run(fine, tmp_path / "a"), run(fd.mean(weighted=False), tmp_path / "b")
    np.testing.assert_allclose(one.weights.vector, other.weights.vector, atol=1e-5)


def test_weights_count_up_to_the_most_and_nobody_sees_them(tmp_path: Path) -> None:
    sizes = [3, 9, 30]
    clients = fd.Clients.of({i: (X[:n], Y[:n]) for i, n in enumerate(sizes)})
    rule = fd.masked(fd.Withstand(clients=3, corrupt=0.0), bits=24, bound=4.0, most=10)
    plain = fd.simulate(TASK, fd.fedavg(LOCAL), clients, rounds=1, settings=_quiet(tmp_path / "a"))
    found = fd.simulate(TASK, fd.fedavg(LOCAL, aggregator=rule), clients, rounds=1, settings=_quiet(tmp_path / "b"))
    assert np.abs(plain.weights.vector - found.weights.vector).max() > 1e-3, "the third counts 10, not 30"
    one = [_update(clients, i) for i in range(3)]
    wanted = np.average(one, axis=0, weights=[3, 9, 10])
    np.testing.assert_allclose(found.weights.vector, wanted, atol=1e-5)


def _quiet(folder: Path) -> fd.Settings:
    return fd.Settings(folder=folder, progress=False, executor=fd.executors.debug())


def _update(clients: fd.Clients, position: int) -> np.ndarray:
    """What one client learns, from zeros: its own batches, in the first round."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        only = fd.chain(_only(position), fd.mean(weighted=False))
        settings = _quiet(Path(folder) / "run")
        found = fd.simulate(TASK, fd.fedavg(LOCAL, aggregator=only), clients, rounds=1, settings=settings)
        return found.weights.vector * len(clients)


def _only(position: int) -> fd.Stage:
    """Nothing of anybody else's."""
    return fd.Stage(
        lambda u, c: u if c.client == position else u._replace(vector=np.zeros_like(u.vector)),
        lambda u, c: u, f"only({position})",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cryptography", [False, True])
def test_every_executor_gives_the_bits_of_the_plain_one(tmp_path: Path, cryptography: bool) -> None:
    rule = fd.chain(fd.clip(1.0), fd.rotate(), fd.masked(TEN, bits=8))
    found = [
        run(rule, tmp_path / executor.name, executor=executor, cryptography=cryptography) for executor in EXECUTORS[:2]
    ]
    assert found[0].weights.vector.tobytes() == found[1].weights.vector.tobytes()
    batched = run(rule, tmp_path / "v", executor=fd.executors.vectorised(), cryptography=cryptography)
    np.testing.assert_allclose(batched.weights.vector, found[0].weights.vector, atol=2e-2)  # on an 8-bit grid


@pytest.mark.slow
@pytest.mark.parametrize("executor", [fd.executors.compiled(), fd.executors.ray(workers=2)], ids=lambda e: e.name)
def test_heavier_executors_too(tmp_path: Path, executor: Any) -> None:
    if executor.name == "ray":
        pytest.importorskip("ray")
    torch = pytest.importorskip("torch")
    task = fd.Task(lambda: torch.nn.Linear(6, 3), torch.nn.functional.cross_entropy)
    rule, mean = fd.masked(TEN, bits=24, bound=4.0), fd.mean(weighted=False)
    weights = []
    for name, how in (("masked", executor), ("plain", fd.executors.debug())):
        masks = name == "masked"
        settings = fd.Settings(folder=tmp_path / name, progress=False, executor=how, cryptography=masks)
        algorithm = fd.fedavg(LOCAL, aggregator=rule if masks else mean)
        weights.append(fd.simulate(task, algorithm, CLIENTS, rounds=1, cohort=10, settings=settings).weights.vector)
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-5)


@pytest.mark.parametrize("malicious", [False, True])
def test_the_real_protocol_gives_the_same_bits(tmp_path: Path, malicious: bool) -> None:
    """Keys and masks are no part of the result."""
    ten = fd.Withstand(clients=10, corrupt=0.1, dropouts=0.2, malicious=malicious)
    rule = fd.chain(fd.rotate(), fd.quantise(6, scale=0.3), fd.masked(ten, most=20))
    plain, real = run(rule, tmp_path / "a"), run(rule, tmp_path / "b", cryptography=True)
    assert plain.weights.vector.tobytes() == real.weights.vector.tobytes()
    assert real.metrics[0]["secure"] == {"survivors": 10, "left": 0}


def test_dropouts_of_a_simulated_world_are_survived_by_the_real_protocol(tmp_path: Path) -> None:
    rule = fd.masked(fd.Withstand(clients=12, corrupt=0.0, dropouts=0.4), bits=16, bound=2.0, least=3)
    world = fd.World(device=lossy)
    plain = run(rule, tmp_path / "a", cohort=None, rounds=4, world=world)
    real = run(rule, tmp_path / "b", cohort=None, rounds=4, world=world, cryptography=True)
    assert sum(line["simulated"]["dropped"] for line in real.metrics) > 0
    assert plain.weights.vector.tobytes() == real.weights.vector.tobytes()
    survivors = [line["secure"]["survivors"] for line in real.metrics]
    assert survivors == [line["trained"] for line in real.metrics]


@pytest.mark.parametrize("cryptography", [False, True])
def test_one_without_examples_is_not_in_the_sum(tmp_path: Path, cryptography: bool) -> None:
    """It sends nothing, as though it had been lost; the mean is that of the others."""
    five = {i: (X[i::12], Y[i::12]) for i in range(5)}
    rule = fd.masked(fd.Withstand(clients=6, corrupt=0.0, dropouts=0.2), bits=24)
    how = fd.Settings(folder=tmp_path, progress=False, executor=fd.executors.debug(), cryptography=cryptography)
    clients = fd.Clients.of(five | {5: (X[:0], Y[:0])})
    found = fd.simulate(TASK, fd.fedavg(LOCAL, aggregator=rule), clients, rounds=1, cohort=6, settings=how)
    wanted = np.mean([_update(fd.Clients.of(five), i) for i in range(5)], axis=0)
    np.testing.assert_allclose(found.weights.vector, wanted, atol=1e-5)


def test_a_round_with_too_few_shows_nothing_and_changes_nothing(tmp_path: Path) -> None:
    rule = fd.masked(fd.Withstand(clients=12, corrupt=0.0, dropouts=0.1), bits=16, bound=2.0, least=12)
    world = fd.World(device=lambda draw: Device(10.0, 1e6, 1e6, dropout=0.5))
    for name, cryptography in (("a", False), ("b", True)):
        found = run(rule, tmp_path / name, cohort=None, rounds=2, world=world, cryptography=cryptography)
        assert all("failed" in line["secure"] for line in found.metrics)
        assert not found.weights.vector.any()


def test_a_round_in_which_somebody_lies_beyond_the_bound_shows_nothing(tmp_path: Path) -> None:
    """With and without the real protocol; the model stays as it is, and the other rounds count."""
    rule = fd.masked(TEN, bits=16, bound=2.0)
    assert rule.masking is not None
    width = rule.masking.width

    def lying(update: Any, context: Any) -> Any:
        sent = rule.encode(update, context)
        if context.client == 3 and context.round == 1:
            sent["values"] = packed(np.full(len(update.vector), 1 << width - 1, np.uint32), width)
        return sent

    for cryptography in (False, True):
        found = run(rule._replace(encode=lying), tmp_path / str(cryptography), cryptography=cryptography)
        assert "at least one of them lies" in found.metrics[0]["secure"]["failed"]
        assert "failed" not in found.metrics[1].get("secure", {})
        one = run(rule._replace(encode=lying), tmp_path / f"{cryptography} one", rounds=1, cryptography=cryptography)
        assert not one.weights.vector.any()
        assert found.weights.vector.any()


def test_a_round_that_asks_too_few_to_withstand_what_was_promised_shows_nothing(tmp_path: Path) -> None:
    """4 of 10 may collude, and still do where 6 are asked: with and without the real protocol, and told at once where
    the number is known."""
    rule = fd.masked(fd.Withstand(clients=10, corrupt=0.4, dropouts=0.4), bits=16, bound=2.0, least=6)
    some = Sampler(lambda population, seed, round: np.arange(10 if round == 1 else 6), lambda population: 8.0, "some()")
    plain, real = (run(rule, tmp_path / str(c), cohort=some, cryptography=c) for c in (False, True))
    for found in (plain, real):
        assert "failed" not in found.metrics[0].get("secure", {})
        assert "6 clients are asked, and all 4 that may collude" in found.metrics[1]["secure"]["failed"]
    assert plain.weights.vector.tobytes() == real.weights.vector.tobytes()
    with pytest.raises(NoGuarantee, match="6 clients are asked, and all 4 that may collude"):
        run(rule, tmp_path / "known", cohort=6)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    rule = fd.masked(TEN, bits=8, bound=2.0)
    whole = run(rule, tmp_path / "a", rounds=3, cryptography=True)
    run(rule, tmp_path / "b", rounds=1, cryptography=True)
    assert run(rule, tmp_path / "b", rounds=3).weights.vector.tobytes() == whole.weights.vector.tobytes()


def test_an_edge_merges_partial_sums(tmp_path: Path) -> None:
    rule = fd.masked(TEN, bits=8, bound=2.0)
    flat = run(rule, tmp_path / "a")
    settings = fd.Settings(folder=tmp_path / "b", progress=False, executor=fd.executors.debug())
    algorithm = fd.fedavg(LOCAL, aggregator=rule, timing=fd.hierarchical(3))
    edged = fd.simulate(TASK, algorithm, CLIENTS, rounds=2, cohort=10, settings=settings)
    assert edged.weights.vector.tobytes() == flat.weights.vector.tobytes()


# --- bytes --------------------------------------------------------------------------------------------------


def test_modelled_bytes_are_those_of_the_real_protocol(tmp_path: Path) -> None:
    rule = fd.masked(TEN, bits=16, bound=2.0)
    plain, real = run(rule, tmp_path / "a"), run(rule, tmp_path / "b", cryptography=True)
    for one, other in zip(plain.metrics, real.metrics, strict=True):
        assert one["bytes_up"] == other["bytes_up"]
        assert one["bytes_down"] == other["bytes_down"]
    assert rule.masking is not None
    up, _ = overhead(TEN)
    assert plain.metrics[0]["bytes_up"] == 10 * (up + packed_bytes(21, rule.masking.width))


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"cohort": 11}, r"11 clients are asked in a round, and masked\(.*room for 10.*Write Withstand\(clients=11"),
        ({"cohort": 4}, "4 clients are asked in a round, .* shows no sum of fewer than 5"),
        ({"cohort": 9, "world": fd.World(device=lossy, over_selection=1.3)}, "12 clients are asked"),
        ({"watch": fd.Watch()}, "scores every client's update, and masked.* lets nobody see one"),
        ({"cohort": fd.poisson(1.0)}, "12 clients are asked in a round"),
    ],
)
def test_runs_that_could_not_be_masked_are_refused(how: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=told):
        run(fd.masked(TEN), tmp_path / "run", **how)


def test_the_protocol_is_run_for_masked_sums_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"mean\(\) masks nothing"):
        run(fd.mean(), tmp_path / "run", cryptography=True)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: fd.fedavg(LOCAL, aggregator=fd.masked(TEN), timing=fd.buffered(5)), "masks cancel only among clients"),
        (
            lambda: fd.fedavg(LOCAL, aggregator=fd.masked(TEN), timing=fd.hierarchical(2, rounds=2)),
            "edges average 2 times",
        ),
        (lambda: fd.fedavg(LOCAL, aggregator=fd.masked(TEN), gate=fd.Gate(max_norm=1.0)), "nobody sees these"),
        (
            lambda: fd.scaffold(fd.local_sgd(0.1, epochs=1), aggregator=fd.masked(TEN)),
            "sends 'control' beside the update",
        ),
        (lambda: fd.fedavg(LOCAL, downlink=fd.masked(TEN)), "adds noise for privacy, or masks"),
        (lambda: fd.error_feedback(fd.masked(TEN)), "shows sums only, and a residual"),
        (lambda: fd.chain(fd.eden(2), fd.masked(TEN)), "undone message by message, and behind masked"),
        (lambda: fd.chain(fd.top_k(0.1), fd.masked(TEN)), "undone message by message"),
        (lambda: fd.chain(fd.subsample(0.1), fd.masked(TEN)), "undone message by message"),
        (lambda: fd.chain(fd.quantise(4), fd.masked(TEN)), "undone message by message"),
        (lambda: fd.chain(fd.quantise(4, scale=1.0), fd.entropy(), fd.masked(TEN)), "undone message by message"),
        (lambda: fd.chain(fd.quantise(4, scale=1.0), fd.masked(TEN, planned=9.0)), "codes count from the lowest level"),
        (lambda: fd.chain(fd.masked(TEN), fd.mean()), "stands before mean"),
        (lambda: fd.masked(fd.Withstand(clients=2**20), bits=24, most=2**21), "they could wrap around"),
        (lambda: fd.masked(TEN, least=2), "least=3, or more"),
        (lambda: fd.masked(10), "masked.. is told what to withstand"),
    ],
)
def test_algorithms_that_make_no_sense_are_refused_when_built(build: Any, told: str) -> None:
    with pytest.raises((IncompatibleStages, ConfigurationError), match=told):
        build()


def test_buffers_that_are_averaged_must_be_masked_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = lambda: torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))  # noqa: E731
    task = fd.Task(net, torch.nn.functional.cross_entropy)
    algorithm = fd.fedavg(LOCAL, aggregator=fd.masked(TEN))
    settings = _quiet(tmp_path / "run")
    with pytest.raises(IncompatibleStages, match=r"buffers .* are averaged by mean\(\), which the server sees"):
        fd.simulate(task, algorithm, CLIENTS, rounds=1, cohort=10, settings=settings)


def test_masked_messages_never_leave_in_the_plain() -> None:
    parcel = Parcel({"update": {"values": np.ones(2, "u1")}}, {"update": Carried(2, "<f4")}, 5.0, 5)
    update_blob(parcel)
    with pytest.raises(NoGuarantee, match="masks update, and an upload would show it"):
        update_blob(parcel._replace(masked=frozenset({"update"})))


# --- whole numbers with noise in them -----------------------------------------------------------------------


def noisy(step: float, bits: int) -> fd.Stage:
    """A stage that gives whole numbers of either sign, as distributed noise does."""
    from foedus.core.stage import Kind
    from foedus.privacy.noise import discrete_gaussian

    def encode(update: Any, context: Any) -> Any:
        whole = np.rint(update.vector / step).astype(np.int64)
        return update._replace(vector=whole + discrete_gaussian(context, "test", whole, sigma=2.0))

    def decode(update: Any, context: Any) -> Any:
        return update._replace(vector=update.vector * step)

    return fd.Stage(encode, decode, f"noisy({step}, {bits})", gives=Kind.WHOLE, bits=bits)


def test_whole_numbers_of_either_sign_are_added_as_they_are() -> None:
    from foedus.core.aggregate import fold
    from foedus.core.values import Context, Update

    rule = fd.chain(fd.rotate(), noisy(2.0**-10, 20), fd.masked(TEN, planned=8.0))
    contexts = [Context(1, 1, i, size=50, secret=known_to_all_who_know_the_seed) for i in range(6)]
    updates = [Update(np.random.default_rng(i).normal(size=50).astype("f4"), 1.0) for i in range(6)]
    messages = [rule.admit(rule.encode(u, c), c) for u, c in zip(updates, contexts, strict=True)]
    total = fold(rule, messages)
    assert total is not None
    found, _ = rule.decode({}, total, contexts[0]._replace(client=-1))
    wanted = np.sum([u.vector for u in updates], axis=0) / 8
    np.testing.assert_allclose(found, wanted, atol=6 * 2.0**-10 * 5 * 2 / 8)
    assert rule.masking is not None
    assert rule.masking.width == 20


def test_whole_numbers_go_to_masked_sums_only_and_are_not_weighed() -> None:
    with pytest.raises(IncompatibleStages, match=r"mean\(\) does not mask"):
        fd.chain(noisy(0.1, 16), fd.mean())
    with pytest.raises(IncompatibleStages, match="would multiply whole numbers, and the noise in them"):
        fd.chain(noisy(0.1, 16), fd.masked(TEN, most=10))


# --- attackers ----------------------------------------------------------------------------------------------


def _attacked(rule: fd.Aggregator, folder: Path, factor: float) -> np.ndarray:
    bad = fd.Adversary(clients=[0], attack=fd.attacks.model_replacement(factor))
    found = run(rule, folder, cohort=fd.always([0], fd.uniform(9)), rounds=1, adversary=bad, cryptography=True)
    return found.weights.vector


def test_who_keeps_the_bound_gains_nothing_by_length_and_who_does_not_is_not_found_out(tmp_path: Path) -> None:
    """The real protocol: nobody sees that one client has left out its clipping."""
    sums = fd.masked(TEN, bits=24, bound=4.0)
    kept = fd.chain(fd.clip(0.01), sums)

    def encode(update: Any, context: Any) -> Any:
        return (sums if context.client == 0 else kept).encode(update, context)

    short, long = (_attacked(kept, tmp_path / f"kept {k}", k) for k in (1.0, 10.0))
    np.testing.assert_allclose(short, long, atol=1e-6)
    loose = _attacked(kept._replace(encode=encode), tmp_path / "not kept", 10.0)
    assert np.linalg.norm(loose - short) > 5 * np.linalg.norm(short)
