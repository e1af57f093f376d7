"""Attackers and watches in a simulation: what is sent, in every executor; who is kept out; runs repeat and resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.core.linear import logistic
from foedus.core.timing import hierarchical
from foedus.errors import CheckpointError, ConfigurationError, NothingToAggregate
from foedus.record.folder import METRICS
from foedus.report.scores import plot_scores, score_curves

RNG = np.random.default_rng(0)
X = RNG.normal(size=(400, 6))
Y = (X @ np.array([1.0, -1, 2, 0, 1, 1]) > 0).astype(int)
CLIENTS = fd.Clients.of({f"c{i}": (X[i::10], Y[i::10]) for i in range(10)}, central_test=(X, Y))
TASK = fd.Task(logistic(6, 2), metrics=[fd.accuracy])
LOCAL = fd.local_sgd(lr=0.5, batch_size=8)


def run(folder: Path, attack: Any, algorithm: Any = None, **changes: Any) -> fd.Run:
    given: dict[str, Any] = {
        "bad": (0, 1),
        "executor": fd.executors.debug(),
        "rounds": 4,
        "cohort": None,
        "since": 1,
        "watch": None,
    } | changes
    adversary = None if attack is None else fd.Adversary(clients=given["bad"], attack=attack, since=given["since"])
    settings = fd.Settings(
        executor=given["executor"],
        folder=folder,
        progress=False,
        adversary=adversary,
        watch=given["watch"],
        checkpoint_seconds=0.0,
    )
    asked = {name: given[name] for name in ("cohort", "rounds")}
    return fd.simulate(TASK, algorithm or fd.fedavg(LOCAL), CLIENTS, seed=1, settings=settings, **asked)


def vector(done: fd.Run) -> Any:
    return done.weights.vector


def metrics(done: fd.Run) -> bytes:
    return (done.folder / METRICS).read_bytes()


def test_attackers_send_what_the_attack_says(tmp_path: Path) -> None:
    """One round of a mean is linear in the updates: twice the sign flip's way is what honest attackers lose."""
    honest = run(tmp_path / "honest", None, rounds=1)
    flipped = run(tmp_path / "flip", fd.attacks.sign_flip(3.0), rounds=1)
    double = run(tmp_path / "double", fd.attacks.model_replacement(2.0), rounds=1)
    moved = vector(double) - vector(honest)  # what the attackers' share of the mean is
    np.testing.assert_allclose(vector(honest) - vector(flipped), 4 * moved, atol=1e-6)
    assert np.abs(moved).max() > 1e-3


@pytest.mark.parametrize(
    "executor",
    [fd.executors.vectorised(), pytest.param(fd.executors.processes(workers=2), marks=pytest.mark.slow)],
    ids=lambda e: e.name,
)
def test_every_executor_gives_single_updates(tmp_path: Path, executor: Any) -> None:
    rule = fd.fedavg(LOCAL, aggregator=fd.median())
    one = run(tmp_path / "a", fd.attacks.min_max(), rule)
    two = run(tmp_path / "b", fd.attacks.min_max(), rule, executor=executor)
    np.testing.assert_allclose(vector(one), vector(two), atol=1e-5)


def test_a_robust_rule_learns_where_a_mean_is_lost(tmp_path: Path) -> None:
    attack = fd.attacks.sign_flip(20.0)
    lost = run(tmp_path / "mean", attack)
    for i, rule in enumerate(
        [fd.median(), fd.trimmed_mean(0.2), fd.geometric_median(), fd.krum(2), fd.bulyan(1), fd.dnc(2)]
    ):
        done = run(tmp_path / str(i), attack, fd.fedavg(LOCAL, aggregator=rule))
        assert done.final["accuracy"] > 0.9 > 0.6 > lost.final["accuracy"]


def test_attackers_who_are_not_asked_change_nothing(tmp_path: Path) -> None:
    plain = run(tmp_path / "a", None)
    later = run(tmp_path / "b", fd.attacks.garbage(), since=5)
    assert metrics(plain) == metrics(later)


def test_what_is_not_finite_is_refused_and_the_rest_counts(tmp_path: Path) -> None:
    done = run(tmp_path, fd.attacks.not_finite())
    assert [r["client"] for r in done.metrics[0]["refused"]] == ["c0", "c1"]
    assert done.final["accuracy"] > 0.9


def test_attackers_cannot_stop_a_run_by_being_refused(tmp_path: Path) -> None:
    """Krum for 3 attackers needs 9 updates; 8 are left, but two attackers are out."""
    done = run(tmp_path, fd.attacks.not_finite(), fd.fedavg(LOCAL, aggregator=fd.krum(3)))
    assert done.final["accuracy"] > 0.9


def test_the_gate_refuses_by_norm_and_says_so(tmp_path: Path) -> None:
    algorithm = fd.fedavg(LOCAL, gate=fd.Gate(max_norm=5.0))
    done = run(tmp_path / "a", fd.attacks.sign_flip(100.0), algorithm)
    assert "has the norm" in done.metrics[0]["refused"][0]["reason"]
    assert done.final["accuracy"] > 0.9
    vectorised = run(tmp_path / "b", None, algorithm, executor=fd.executors.vectorised())
    assert "refused" not in vectorised.metrics[0]
    strict = replace(algorithm, gate=fd.Gate(max_norm=1e-6))
    with pytest.raises(NothingToAggregate, match="every one of the 10 updates was refused"):
        run(tmp_path / "c", None, strict, executor=fd.executors.vectorised())


def test_a_run_with_attackers_resumes_to_the_byte(tmp_path: Path) -> None:
    attack = fd.attacks.garbage(2.0)
    rule = fd.fedavg(LOCAL, aggregator=fd.centred_clipping(1.0))
    whole = run(tmp_path / "whole", attack, rule)
    run(tmp_path / "cut", attack, rule, rounds=2)
    assert metrics(run(tmp_path / "cut", attack, rule)) == metrics(whole)
    assert whole.configuration["adversary"] == "garbage(2.0) by 2 clients"
    with pytest.raises(CheckpointError):
        run(tmp_path / "cut", attack, rule, bad=(0, 2))


def test_clients_check_their_own_results(tmp_path: Path) -> None:
    def with_limit(limit: float) -> Any:
        method = fd.self_checked(within={"loss": (0.0, limit)})
        return run(tmp_path / str(limit), None, fd.Algorithm(client=LOCAL, method=method), rounds=2)

    plain, lenient, strict = run(tmp_path / "plain", None, rounds=2), with_limit(1e9), with_limit(1e-9)
    np.testing.assert_array_equal(vector(lenient), vector(plain))
    start = run(tmp_path / "start", None, fd.fedavg(fd.local_sgd(lr=1e-30)), rounds=1)
    np.testing.assert_array_equal(vector(strict), vector(start))  # nobody improves a billionfold, and nobody sends


def test_an_adversary_is_a_value_of_its_own_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Settings\(adversary=\.\.\.\) takes e\.g\. foedus\.Adversary"):
        fd.Settings(adversary=fd.attacks.sign_flip())  # type: ignore[arg-type]


# --- watched ------------------------------------------------------------------------------------------------


def test_every_update_is_scored_and_nothing_else_changes(tmp_path: Path) -> None:
    plain = run(tmp_path / "a", None)
    watched = run(tmp_path / "b", None, watch=fd.Watch())
    assert metrics(plain) == metrics(watched)
    scores = watched.record.scores
    assert len(scores) == 40
    assert all(line["previous"] is None for line in scores if line["round"] == 1)
    assert all(-1 <= line[name] <= 1 for line in scores if line["round"] > 1 for name in ("previous", "current"))
    assert all(line["loss"] is None and not line["refused"] for line in scores)


def test_who_points_the_other_way_again_and_again_is_kept_out(tmp_path: Path) -> None:
    watch = fd.Watch(quarantine=fd.quarantine(after=2, rounds=3))
    done = run(tmp_path / "a", fd.attacks.sign_flip(1.0), watch=watch, rounds=6)
    refused = [{r["client"] for r in line.get("refused", ())} for line in done.metrics]
    assert refused == [set(), set(), {"c0", "c1"}, {"c0", "c1"}, {"c0", "c1"}, {"c0", "c1"}]
    assert "in quarantine in round 3" in done.metrics[2]["refused"][0]["reason"]
    assert {line["client"] for line in done.record.scores if line["refused"]} == {"c0", "c1"}
    alone = run(tmp_path / "b", None, rounds=6)
    assert done.final["accuracy"] > alone.final["accuracy"] - 0.05
    short = run(tmp_path / "c", fd.attacks.sign_flip(1.0), watch=watch, rounds=3)
    assert (tmp_path / "c" / "scores.jsonl").read_bytes()
    again = run(tmp_path / "c", fd.attacks.sign_flip(1.0), watch=watch, rounds=6)
    assert metrics(again) == metrics(done)
    assert (short.folder / "scores.jsonl").read_bytes() == (done.folder / "scores.jsonl").read_bytes()


def test_the_servers_own_examples_tell_who_does_harm(tmp_path: Path) -> None:
    watch = fd.Watch(examples=fd.Examples.of(X[:40], Y[:40]))
    done = run(tmp_path, fd.attacks.sign_flip(2.0), watch=watch, rounds=2)
    harm = {line["client"]: line["loss"] for line in done.record.scores if line["round"] == 1}
    assert min(harm["c0"], harm["c1"]) > 0 > max(v for c, v in harm.items() if c not in ("c0", "c1"))


def test_a_watch_needs_rounds_and_says_so(tmp_path: Path) -> None:
    algorithm = fd.Algorithm(client=LOCAL, timing=hierarchical(lambda clients: clients % 2))
    with pytest.raises(ConfigurationError, match="scores the updates of a round beside each other"):
        run(tmp_path, None, algorithm, watch=fd.Watch())
    with pytest.raises(ConfigurationError, match=r"Watch\(quarantine=\.\.\.\) takes"):
        fd.Watch(quarantine=lambda history, round: [])  # type: ignore[arg-type]


def test_scores_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    watch = fd.Watch(quarantine=fd.quarantine(after=1))
    done = run(tmp_path / "a", fd.attacks.sign_flip(1.0), watch=watch)
    curves, refused = score_curves(done.record)
    assert len(curves) == 10
    assert refused["c0"] == 3
    plot_scores(done.record)
    assert (done.folder / "figures" / "scores.png").stat().st_size > 5000
    with pytest.raises(ConfigurationError, match="no scores of 'loss'"):
        plot_scores(done.record, figure="loss")


HELD = fd.heterofl(
    LOCAL,
    lambda client: 0.5 if client % 2 else 1.0,
    fractions=(1.0, 0.5),
    held=lambda layout, f: halves(layout.size, f),
)
KINDS = fd.fedavg(LOCAL, personal=fd.ifca(2))


def halves(size: int, fraction: float) -> Any:
    return np.arange(size) < fraction * size


@pytest.mark.parametrize("algorithm", [HELD, KINDS])
def test_updates_of_parts_pass_the_gate_and_are_attacked(tmp_path: Path, algorithm: fd.Algorithm) -> None:
    honest = run(tmp_path / "honest", None, algorithm, rounds=2)
    flipped = run(tmp_path / "flipped", fd.attacks.sign_flip(3.0), algorithm, rounds=2)
    assert not np.array_equal(vector(honest), vector(flipped))
    with pytest.raises(NothingToAggregate, match="at most 1e-06 passes"):
        run(tmp_path / "gate", None, replace(algorithm, gate=fd.Gate(max_norm=1e-6)))


def test_a_watch_needs_updates_of_one_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"clients of ifca\(2.* send updates of several models"):
        run(tmp_path, None, KINDS, watch=fd.Watch())
