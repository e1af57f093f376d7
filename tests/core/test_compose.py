"""Algorithms that cannot work are refused when they are written, not when they run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import foedus as fd
from foedus.core.method import averaging
from foedus.errors import ConfigurationError

SGD = fd.local_sgd(lr=0.1)
LOOP = fd.local_training(loop=lambda module, examples, context: None)
ADAM = fd.local_training(optimiser=lambda parameters: torch.optim.AdamW(parameters))
Build = Callable[[], fd.Algorithm]


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: fd.fedavg(SGD, aggregator=fd.krum(1), timing=fd.buffered(4)), r"at least 5 updates.*buffered\(5\)"),
        (lambda: fd.fedavg(SGD, aggregator=fd.multi_krum(1), timing=fd.asynchronous()), "a step of .* has 1"),
        (lambda: fd.fedavg(SGD, aggregator=fd.chain(fd.clip(1.0), fd.bulyan(1)), timing=fd.buffered(6)), "at least 7"),
        (lambda: fd.fedavg(SGD, personal=fd.local_parts("head"), downlink=fd.mean()), "stay with the clients"),
        (lambda: fd.fedavg(SGD, personal=fd.fedbn(), downlink=fd.mean()), "stay with the clients"),
        (lambda: fd.fedavg(LOOP, personal=fd.ditto(0.1)), r"needs local_sgd\(\)"),
        (lambda: fd.fedavg(ADAM, personal=fd.ditto(0.1)), r"needs local_sgd\(\)"),
        (lambda: fd.fedavg(ADAM, personal=fd.pfedme(0.1, rounds=1, steps=1, lr=0.1)), r"needs local_sgd\(\)"),
        (lambda: fd.fedavg(LOOP, personal=fd.fedrep("head")), "a loop of your own hides"),
        (lambda: fd.heterofl(LOOP, lambda client: 1.0), "a loop of your own hides"),
        (lambda: fd.qfedavg(ADAM), "does not say its own"),
        (
            lambda: fd.heterofl(SGD, lambda client: 1.0, aggregator=fd.clip(1.0)),
            r"chain\(clip\(1.0\), foedus.mean",
        ),
        (lambda: fd.scaffold(SGD, control=fd.clip(1.0)), "aggregates 'control' by clip"),
        (lambda: fd.fedavg(SGD, personal=fd.ifca(2, aggregator=fd.power_sgd(2))), "aggregates 'model0'"),
        (lambda: sides(update=fd.mean()), "has a channel 'update' of its own"),
        (lambda: sides(buffers=fd.mean()), "has a channel 'buffers' of its own"),
        (lambda: sides(more=3), "aggregates 'more' by 3"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_written(build: Build, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        build()


def sides(**given: object) -> fd.Algorithm:
    return fd.Algorithm(client=SGD, method=averaging()._replace(sides=given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "build",
    [
        lambda: fd.fedavg(SGD, aggregator=fd.krum(1), timing=fd.buffered(5)),
        lambda: fd.fedavg(ADAM, personal=fd.ditto(0.1, SGD)),
        lambda: fd.fedavg(LOOP, personal=fd.local_parts("head")),
        lambda: fd.fedavg(ADAM, personal=fd.fedrep("head")),
        lambda: fd.heterofl(ADAM, lambda client: 1.0),
        lambda: fd.qfedavg(fd.local_training(optimiser=lambda p: torch.optim.AdamW(p), lr=0.1)),
    ],
)
def test_what_works_is_not(build: Build) -> None:
    assert build().label


@pytest.mark.parametrize("algorithm", [fd.scaffold(SGD), fd.fednova(SGD), fd.heterofl(SGD, lambda client: 1.0)])
def test_any_algorithm_takes_a_timing_a_gate_and_a_downlink(algorithm: fd.Algorithm) -> None:
    gate, timing, eight = fd.Gate(max_norm=3.0), fd.buffered(2), fd.chain(fd.quantise(8), fd.mean())
    changed = algorithm.with_(gate=gate).with_(timing=timing, downlink=eight, buffers=fd.median())
    assert (changed.gate, changed.timing, changed.downlink) == (gate, timing, eight)
    assert changed.buffers.label == "median()"
    assert changed.method is algorithm.method
    assert algorithm.with_() == algorithm
