"""Communication when it is worth it, beside loops written down, and what it saves."""

from __future__ import annotations

import numpy as np
import pytest

import foedus as fd
from foedus.core.drift import scaffold
from foedus.core.lazy import lag, lazy
from foedus.errors import ConfigurationError

from .oracle import COUNT, FEATURES, SIZES, Floats, cohort, descended, final, gradient, loss, optimum, simulated

SPEC = fd.local_sgd(lr=0.05, epochs=2, batch_size=4)
GRADIENT = fd.local_sgd(lr=0.15, steps=1, batch_size=None)
START = np.zeros(FEATURES + 1)
N = np.array(SIZES, float)


def test_the_norm_rule_is_its_loop() -> None:
    w, unsent, senders = START, np.zeros((COUNT, FEATURES + 1)), []
    for t in range(1, 13):
        chosen, sent = cohort(3, t), []
        for i in chosen:
            total = unsent[i] + descended(SPEC, i, t, w) - w
            sends = np.linalg.norm(total) >= 0.25 * np.linalg.norm(w)
            unsent[i] = 0.0 if sends else total
            sent += [(i, total)] if sends else []
        senders.append(len(sent))
        if sent:
            mean = np.average([v for _, v in sent], axis=0, weights=N[[i for i, _ in sent]])
            w = w + mean * len(sent) / len(chosen)
    assert 0 in senders
    assert senders[0] == 3
    run = simulated(fd.Algorithm(client=SPEC, method=lazy(share=0.25)), rounds=12, size=3)
    np.testing.assert_allclose(run.weights.vector, w, rtol=1e-10)
    assert [line["senders"] for line in run.metrics] == senders
    bytes_up = [line["bytes_up"] for line in run.metrics]
    assert bytes_up == [k * bytes_up[0] // 3 for k in senders], "a silent client sends nothing at all"
    assert run.metrics[0]["report"] == {"sent": 1.0}


def test_lag_is_its_papers_loop() -> None:
    """Algorithm 1: the server keeps every worker's last gradient; a worker sends the change of its own if
    ‖change‖² ≥ ξ/α² Σ ‖θ differences‖², for M = 1 where the mean of gradients is taken instead of their sum."""
    rate, xi, depth = 0.15, 0.5, 4
    theta, held, steps, count = START, np.zeros((COUNT, FEATURES + 1)), [0.0] * depth, 0
    for k in range(1, 26):
        for i in range(COUNT):
            g = gradient(i, theta)
            if k == 1 or np.square(g - held[i]).sum() >= xi / rate**2 * sum(steps):
                held[i], count = g, count + 1
        new = theta - rate * N @ held / N.sum()
        steps = [*steps[1:], float(np.square(new - theta).sum())]
        theta = new
    run = simulated(fd.Algorithm(client=GRADIENT, method=lag(rounds=depth, xi=xi)), rounds=25)
    np.testing.assert_allclose(run.weights.vector, theta, rtol=1e-10)
    assert sum(line["senders"] for line in run.metrics) == count < 25 * COUNT


@pytest.mark.slow
def test_lag_reaches_the_optimum_with_fewer_messages() -> None:
    def excess(w: Floats) -> float:
        return float(sum(n * (loss(i, w) - loss(i, optimum())) for i, n in enumerate(N)) / N.sum())

    fast = fd.executors.vectorised()
    run = simulated(fd.Algorithm(client=GRADIENT, method=lag()), rounds=200, executor=fast)
    plain = final(fd.fedavg(GRADIENT), rounds=200, executor=fast)
    messages = sum(line["senders"] for line in run.metrics)
    assert messages < 0.6 * 200 * COUNT
    assert excess(run.weights.vector) < 2 * excess(plain) + 1e-12


def test_nothing_that_was_learned_is_lost_only_late() -> None:
    """With a share that is never reached the client's unsent sum is all it learned."""
    run = simulated(fd.Algorithm(client=SPEC, method=lazy(share=1e9)), rounds=2)
    sent_at_once = simulated(fd.Algorithm(client=SPEC, method=lazy(share=0.0)), rounds=2)
    assert [line["senders"] for line in run.metrics] == [COUNT, 0], "the first model has no length"
    assert [line["senders"] for line in sent_at_once.metrics] == [COUNT, COUNT]
    np.testing.assert_allclose(sent_at_once.weights.vector, final(fd.fedavg(SPEC), rounds=2), rtol=1e-12)


@pytest.mark.parametrize("rule", [lambda m: lazy(m, share=0.1), lag])
def test_methods_that_keep_sums_on_the_server_need_every_message(rule: object) -> None:
    with pytest.raises(ConfigurationError, match=r"scaffold\(.*keeps sums to which all must send"):
        rule(scaffold(SPEC).method)  # type: ignore[operator]
