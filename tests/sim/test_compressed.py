"""Compressed updates in the simulator: they train, the bytes that count are those of the codes, executors agree."""

from typing import Any

import pytest
import torch

import foedus as fd

LOCAL = fd.local_sgd(lr=0.1, epochs=1, batch_size=20)
ROUNDS = 6


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))


TASK = fd.Task(network, torch.nn.functional.cross_entropy, metrics=[fd.accuracy])
PARAMETERS = 64 * 30 + 30 + 30 * 10 + 10
CHAINS = {  # and bits a parameter on the wire, at most
    "eden": (fd.chain(fd.eden(2), fd.mean()), 2.3),
    "rotated common scale": (fd.chain(fd.clip(1.0), fd.rotate(), fd.quantise(6, scale=0.1), fd.mean()), 6.3),
    "masked": (fd.chain(fd.random_mask(0.5), fd.mean()), 16.3),
    "matrices": (fd.chain(fd.matrices(fd.eden(2)), fd.mean()), 2.9),
    "low rank": (fd.chain(fd.low_rank(10), fd.mean()), 15),
    "coded": (fd.chain(fd.quantise(4), fd.entropy(), fd.mean()), 4.4),
    "remembered": (fd.error_feedback(fd.chain(fd.top_k(0.1), fd.mean())), 4.2),
    "factors": (fd.error_feedback(fd.chain(fd.power_sgd(2), fd.mean())), 5),
}


def trained(aggregator: fd.Aggregator, executor: Any) -> fd.Run:
    clients = fd.data.digits().partition(fd.data.iid(10))
    algorithm = fd.fedavg(LOCAL, aggregator=aggregator)
    settings = fd.Settings(executor=executor, progress=False)
    return fd.simulate(TASK, algorithm, clients, cohort=5, rounds=ROUNDS, seed=1, settings=settings)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_compressed_federation_learns_for_fewer_bytes(name: str) -> None:
    rule, bits = CHAINS[name]
    run = trained(rule, fd.executors.debug())
    accuracies = [m["central"]["accuracy"] for m in run.metrics if "central" in m]
    assert accuracies[-1] > accuracies[0] + 0.2
    for line in run.metrics:
        assert line["bytes_up"] <= 5 * (PARAMETERS * bits / 8 + 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eden", "remembered"])
def test_executors_agree_on_what_is_sent(name: str) -> None:
    rule, _ = CHAINS[name]
    first, second = (trained(rule, executor) for executor in (fd.executors.debug(), fd.executors.vectorised()))
    ends = [run.metrics[-1]["central"]["accuracy"] for run in (first, second)]
    assert abs(ends[0] - ends[1]) < 0.05
