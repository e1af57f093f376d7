"""What may be claimed for an algorithm, and that everything else is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.core.compose import composed
from foedus.core.drift import averaged_momentum, scaffold
from foedus.core.method import averaging
from foedus.core.select import Sampler
from foedus.errors import NoGuarantee
from foedus.privacy.claims import round_event, seen_by_nobody
from foedus.privacy.distributed import gaussian_shares, trusted_sum
from foedus.privacy.events import Gaussian, LocalGaussian, Sampled
from foedus.privacy.mechanisms import adaptive, central, local

RULE = central(clip=1.0, noise_multiplier=2.0, cohort=40)
LOCAL = fd.chain(local(clip=1.0, noise_multiplier=2.0), fd.mean())
POISSON = fd.poisson(0.05)


def algorithm(rule: fd.Aggregator = RULE, **parts: Any) -> fd.Algorithm:
    return fd.fedavg(fd.local_sgd(0.1), aggregator=rule, **parts)


@pytest.mark.parametrize("rule", [RULE, adaptive(noise_multiplier=2.0, cohort=100), fd.chain(fd.rotate(), RULE)])
def test_poisson_sampling_counts_if_it_is_hidden_and_only_then(rule: fd.Aggregator) -> None:
    assert round_event(algorithm(rule), POISSON, hidden=True) == Sampled(0.05, Gaussian(2.0))
    assert round_event(algorithm(rule), POISSON) == Gaussian(2.0)
    assert round_event(algorithm(rule), fd.uniform(10)) == Gaussian(2.0)
    assert round_event(algorithm(rule), fd.poisson(1.0), hidden=True) == Gaussian(2.0)


@pytest.mark.parametrize(
    "sampler",
    [
        fd.uniform(10),
        fd.everybody(),
        fd.by_data(3),
        fd.always([0], fd.poisson(0.05)),
        fd.available(lambda round: np.arange(5), fd.poisson(0.05)),
    ],
    ids=lambda s: s.label,
)
def test_no_other_sampling_counts(sampler: Sampler) -> None:
    with pytest.raises(NoGuarantee, match="does not let every client take part by itself"):
        round_event(algorithm(), sampler, hidden=True)


def test_sampling_never_counts_for_local_noise() -> None:
    assert round_event(algorithm(LOCAL), POISSON) == LocalGaussian(2.0)
    with pytest.raises(NoGuarantee, match="the server, which sees who takes part"):
        round_event(algorithm(LOCAL), POISSON, hidden=True)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (algorithm(fd.mean()), "adds no noise, so that nothing is private"),
        (algorithm(fd.chain(fd.clip(1.0), fd.mean(weighted=False))), "adds no noise"),
        (algorithm(fd.median()), "adds no noise"),
        (algorithm(timing=fd.buffered(5)), "takes whoever comes first"),
        (algorithm(timing=fd.asynchronous()), "takes whoever comes first"),
    ],
)
def test_what_is_not_covered_is_refused(made: fd.Algorithm, told: str) -> None:
    with pytest.raises(NoGuarantee, match=told):
        round_event(made, POISSON)


def test_methods_that_send_more_than_updates_need_noise_there_too() -> None:
    bare = replace(averaged_momentum(fd.local_sgd(0.1, momentum=0.9)), aggregator=RULE)
    with pytest.raises(NoGuarantee, match="which adds no noise"):
        round_event(bare, POISSON)
    assert bare.method is not None
    covered = bare.method._replace(sides=dict.fromkeys(bare.method.sides, RULE))
    sums = 1 + len(covered.sides)
    found = round_event(replace(bare, method=covered), POISSON)
    assert isinstance(found, Gaussian)
    assert found.noise_multiplier == pytest.approx(2.0 / sums**0.5)
    assert round_event(composed(fd.local_sgd(0.1), averaging(), aggregator=RULE), POISSON) == Gaussian(2.0)


def test_methods_that_count_who_came_are_not_covered_by_noise_on_sums() -> None:
    bare = replace(scaffold(fd.local_sgd(0.1)), aggregator=RULE)
    assert bare.method is not None
    covered = bare.method._replace(sides=dict.fromkeys(bare.method.sides, RULE))
    with pytest.raises(NoGuarantee, match="makes use of how many clients sent something"):
        round_event(replace(bare, method=covered), POISSON)
    assert round_event(replace(bare, method=covered._replace(counts=False)), POISSON)
    local_sides = covered._replace(sides=dict.fromkeys(covered.sides, LOCAL))
    assert round_event(replace(bare, method=local_sides, aggregator=LOCAL), POISSON)


def test_averaged_buffers_are_not_covered_by_the_noise_on_updates() -> None:
    with pytest.raises(NoGuarantee, match="buffers"):
        round_event(algorithm(), POISSON, buffers=True)
    both = replace(algorithm(), buffers=RULE)
    found = round_event(both, POISSON, buffers=True)
    assert isinstance(found, Gaussian)
    assert found.noise_multiplier == pytest.approx(2.0 / 2**0.5)


def test_edges_that_only_add_up_change_nothing() -> None:
    assert round_event(algorithm(timing=fd.hierarchical(3)), POISSON) == Gaussian(2.0)


def test_who_adds_the_noise_decides_whether_a_round_of_nobody_is_seen() -> None:
    assert seen_by_nobody(RULE)
    assert seen_by_nobody(fd.chain(fd.rotate(), RULE))
    assert not seen_by_nobody(LOCAL)
    assert not seen_by_nobody(fd.mean())


@pytest.mark.parametrize("method", [fd.lazy(share=0.5), fd.self_checked(within={"loss": (0.0, 1.5)})])
@pytest.mark.parametrize(
    "rule", [LOCAL, trusted_sum(gaussian_shares(clip=1.0, noise_multiplier=2.0, cohort=40, honest=20), planned=40)]
)
def test_no_noise_of_clients_covers_whether_they_send(method: fd.Method, rule: fd.Aggregator) -> None:
    silent = composed(fd.local_sgd(0.1), method, aggregator=rule)
    with pytest.raises(NoGuarantee, match="to decide whether they send anything, and the server sees who does"):
        round_event(silent, POISSON)
    assert round_event(composed(fd.local_sgd(0.1), averaging(), aggregator=rule), POISSON) == rule.event


def test_lazy_updates_are_refused_with_local_noise_even_where_all_channels_have_it() -> None:
    lag = fd.lag()
    lag = lag._replace(sides=dict.fromkeys(lag.sides, LOCAL))
    with pytest.raises(NoGuarantee, match="to decide whether they send anything"):
        round_event(composed(fd.local_sgd(0.1), lag, aggregator=LOCAL), POISSON)
