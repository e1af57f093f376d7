"""Nothing is lost: hundreds of seeds, each a federation in which everything goes wrong; and that it would be seen.

``make simulate-faults`` runs ten thousand. A seed that fails is run again by ``python -m tests.faults SEED``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from .bugs import BUGS, planted
from .simulation import Plan, Report, Violation, run

FOUND = (4, 46, 74, 1284)  # seeds that failed once, each of which is a mistake that was mended


def failed(seed: int) -> str | None:
    """What a seed breaks."""
    try:
        run(seed)
    except Violation as error:
        return f"seed {seed}: {error}   replay: python -m tests.faults {seed}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_nothing_is_lost(first: int) -> None:
    assert [told for seed in range(first, first + 20) if (told := failed(seed))] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", FOUND)
def test_what_was_lost_once_is_not_lost_again(seed: int) -> None:
    assert failed(seed) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_fault_is_found_within_200_seeds(name: str) -> None:
    seeds = [BUGS[name].seed, *range(200)]
    with planted(name):
        assert any(failed(seed) for seed in seeds), f"{name}: not found in 200 seeds"


@pytest.mark.slow
def test_a_seed_always_does_the_same() -> None:
    for seed in (1, 4, 9):
        assert run(seed) == run(seed)


@pytest.mark.slow
def test_without_faults_every_session_goes_well() -> None:
    check_calm(replace(Plan.of(2).calm, flowing=False))


@pytest.mark.slow
def test_without_faults_every_encrypted_sum_is_opened() -> None:
    check_calm(replace(Plan.of(2).calm, flowing=False, sealed=True, minimum=3, cohort=None))


def check_calm(plan: Plan) -> None:
    report = run(2, plan=plan)
    assert isinstance(report, Report)
    assert not +report.faults
    assert {shape for shape in report.shapes if "!" in shape} == set()
    assert report.shapes["-v[]+^"] >= plan.rounds
