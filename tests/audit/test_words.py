"""What is said follows from figures."""

import pytest

from foedus.audit.protections import Protections
from foedus.audit.words import Level, advice, places

BARE = Protections(
    algorithm="mean()", hidden=False, sealed=False, local=False, shared=False, noisy=False, bound=None, compares=False,
    claimed=None, refused=None, clients=100, cohort=10.0, rounds=20,
)  # fmt: skip


def seen(least, epsilon=None):
    return {"epsilon": least if epsilon is None else epsilon, "least": least, "delta": 1e-5, "canaries": 32}


def told(guard, parts):
    return " ".join(sentence for place in places(guard, parts) for sentence in place.told)


@pytest.mark.parametrize(("least", "level"), [(0.2, Level.LITTLE), (3.0, Level.SOME), (20.0, Level.MUCH)])
def test_levels_follow_the_lower_bound(least, level):
    found = places(BARE, {"canaries": {"every model": seen(least)}})
    assert found[1].level is level


def test_without_a_measurement_nothing_is_claimed():
    found = places(BARE, {})
    assert found[1].level is Level.SOME
    assert found[2].level is None
    assert "Canaries" not in told(BARE, {})


def test_an_alarm_is_raised_where_more_is_seen_than_was_promised():
    from dataclasses import replace

    noisy = replace(BARE, noisy=True, claimed=2.0)
    assert "ALARM" in advice(noisy, {"canaries": {"every model": seen(3.0)}}, delta=1e-5)[0]
    assert not any("ALARM" in text for text in advice(noisy, {"canaries": {"every model": seen(1.5, 2.5)}}, delta=1e-5))


def test_secure_aggregation_is_not_proposed_twice_and_not_beside_a_median():
    from dataclasses import replace

    hidden = replace(BARE, hidden=True)
    assert not any("secure aggregation" in text for text in advice(hidden, {}, delta=1e-5))
    assert "you cannot have both" in advice(replace(BARE, compares=True), {}, delta=1e-5)[0]
    assert places(hidden, {})[0].level is Level.SOME, "nobody has measured what the models tell"


@pytest.mark.parametrize("how", [{"hidden": True}, {"hidden": True, "sealed": True}, {"hidden": True, "shared": True}])
@pytest.mark.parametrize(("least", "level"), [(0.2, Level.LITTLE), (3.0, Level.SOME), (20.0, Level.MUCH)])
def test_a_server_that_sees_sums_only_learns_what_models_tell(how, least, level):
    from dataclasses import replace

    server, client, *_ = places(replace(BARE, **how), {"canaries": {"every model": seen(least)}})
    assert server.level is client.level is level
    assert any("the model of every round" in sentence for sentence in server.told)


def test_what_clients_send_all_rounds_long_counts_together():
    from dataclasses import replace

    local = replace(BARE, local=True, noisy=True, claimed=96.1)
    found = {"every model": seen(0.1), "message": seen(0.9), "messages": seen(20.0) | {"sent": 400, "looked at": 100}}
    server = places(local, {"canaries": found})[0]
    assert server.level is Level.MUCH
    text = " ".join(server.told)
    assert "of 100 of the 400 updates of one client, put together" in text
    assert "ε = 96.1" in text
    assert "ALARM" in advice(replace(local, claimed=12.0), {"canaries": found}, delta=1e-5)[0]


def test_noise_that_is_proposed_takes_no_masks_away():
    from dataclasses import replace

    masked = next(t for t in advice(replace(BARE, hidden=True, honest=7), {}, delta=1e-5) if "drown" in t)
    assert "gaussian_shares(" in masked
    assert "honest=7" in masked
    assert "foedus.masked(..., planned=10)" in masked
    sealed = next(t for t in advice(replace(BARE, hidden=True, sealed=True), {}, delta=1e-5) if "drown" in t)
    assert "in place of encryption" in sealed
    assert not any("central(" in text for text in (masked, sealed))


def test_few_clients_are_warned_of_what_noise_costs():
    from dataclasses import replace

    few = next(text for text in advice(BARE, {}, delta=1e-5) if "central(" in text)
    many = next(text for text in advice(replace(BARE, cohort=1000.0), {}, delta=1e-5) if "central(" in text)
    assert "learn little" in few
    assert "learn little" not in many


def test_reasons_why_something_failed_are_told():
    text = told(BARE, {"inversion": {"failed": "no torch"}, "membership": {"failed": "no test data"}})
    assert "no torch" in text
    assert "no test data" in text
