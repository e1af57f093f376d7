"""The conformance suite of cohorts: many clients computed at once are each the plain trainer's client."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.backends import Trainer, Weights, open_trainer
from foedus.backends.cohort import UNGUIDED, Block, Cohort, Guides, Stacked, open_cohort
from foedus.core.batches import plan
from foedus.core.client import LocalSGD
from foedus.core.packing import PADDING, calls

from .models import EVERYTHING, MEMBERS, NAMES, PLAIN, Member, assignment, examples, params

RAGGED, EVEN, FEW = [9, 1, 5, 12, 2], [8, 6, 4, 12, 7], [4, 2, 4]  # BatchNorm takes no batch of one
SPECS = {"plain": PLAIN, "whole": fd.local_sgd(lr=0.2, epochs=3, batch_size=None), "everything": EVERYTHING}
QUICK = [name for name in NAMES if not MEMBERS[name].compiles]
every, quick = (pytest.mark.parametrize("member", params(*names)) for names in (NAMES, QUICK))


@functools.cache
def opened(member: Member, spec: str, dtype: str = "float64") -> tuple[Cohort, Trainer]:
    """A cohort and a plain trainer of one task; one pair for all tests: what they did before must not matter."""
    task, chosen = member.task(dtype), SPECS[spec]
    trainer = open_trainer(task, seed=1, device="cpu")
    return open_cohort(task, chosen, trainer, examples(8, dtype=dtype)), trainer


class Work:
    """Clients' own data, in one pool, and their local steps arranged into calls."""

    def __init__(self, cohort: Cohort, spec: LocalSGD, sizes: list[int], *, dtype: str = "float64", seed: int = 2,
                 limit: int | None = None) -> None:  # fmt: skip
        self.pool, self.sizes, self.spec, self.limit = examples(sum(sizes), seed, dtype), sizes, spec, limit
        self.offsets = np.cumsum(sizes) - sizes
        own = plan(spec, np.array(sizes), np.arange(len(sizes)), seed=5, round=2, limit=limit)
        self.calls = calls(own.count, own.steps, padding=0.0 if cohort.unpadded else PADDING)
        self.plan = own._replace(rows=own.rows + self.offsets[own.client, None].astype(np.int32))

    def of(self, client: int) -> fd.Examples:
        begin = int(self.offsets[client])
        return self.pool.take(slice(begin, begin + self.sizes[client]))

    def block(self, buffers: Any, guides: Guides = UNGUIDED) -> Block:
        return Block(self.plan, self.calls, buffers, self.spec.rate(2), guides)


def sizes_of(member: Member) -> list[int]:
    return EVEN if member.mixes else FEW if member.compiles else RAGGED


def trained(cohort: Cohort, start: Weights, work: Work, buffers: Any = None) -> Stacked:
    own = np.stack([start.buffers] * len(work.sizes)) if buffers is None else buffers
    with cohort.settings():
        return cohort.train(start, cohort.resident(work.pool), work.block(own))


def bits(found: Stacked) -> tuple[bytes, ...]:
    return tuple(np.ascontiguousarray(array).tobytes() for array in found[:3])


def assert_rows(
    found: Stacked, trainer: Trainer, start: Weights, work: Work, *, within: float, buffers: Any = None
) -> None:
    """Every client's row is what the plain trainer makes of it, relative to how far it went."""
    assert found.vectors.shape == (len(work.sizes), trainer.layout.size)
    assert found.buffers.shape == (len(work.sizes), trainer.buffer_layout.size)
    assert found.vectors.dtype == start.vector.dtype
    for client in range(len(work.sizes)):
        begin = start if buffers is None else start._replace(buffers=buffers[client])
        alone = trainer.train(begin, assignment(work.of(client), work.spec, client=client, limit=work.limit))
        for row, wanted, before in zip(
            (found.vectors[client], found.buffers[client]), alone.weights, begin, strict=True
        ):
            assert np.linalg.norm(row - wanted) <= within * np.linalg.norm(wanted - before)
        assert found.losses[client] == pytest.approx(alone.loss, rel=10 * within)


@pytest.mark.parametrize("spec", ["plain", "whole"])
@quick
def test_a_round_in_float64_is_the_plain_trainers(member: Member, spec: str) -> None:
    cohort, trainer = opened(member, spec)
    work, start = Work(cohort, SPECS[spec], sizes_of(member)), trainer.initial()
    assert_rows(trained(cohort, start, work), trainer, start, work, within=1e-10)


@every
def test_a_round_of_everything_is_the_plain_trainers(member: Member) -> None:
    cohort, trainer = opened(member, "everything")
    work, start = Work(cohort, EVERYTHING, sizes_of(member)), trainer.initial()
    assert_rows(trained(cohort, start, work), trainer, start, work, within=1e-10)


@quick
def test_a_step_in_float32_is_the_plain_trainers(member: Member) -> None:
    cohort, trainer = opened(member, "everything", "float32")
    work, start = Work(cohort, EVERYTHING, sizes_of(member), dtype="float32", limit=1), trainer.initial()
    assert_rows(trained(cohort, start, work), trainer, start, work, within=1e-4)


@every
def test_a_client_does_not_depend_on_who_is_beside_it(member: Member) -> None:
    """The last client alone, in the company of others, and beside one whose data is no number."""
    cohort, trainer = opened(member, "everything")
    sizes, start = sizes_of(member), trainer.initial()
    work = Work(cohort, EVERYTHING, sizes)
    wanted = trained(cohort, start, work)
    values = work.pool.inputs[0].copy()
    values[work.offsets[0]] = np.nan
    work.pool = fd.Examples((values,), work.pool.targets)
    found = trained(cohort, start, work)
    assert not np.isfinite(found.vectors[0]).all()
    for one, other in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(one[1:], other[1:], rtol=1e-10, atol=1e-13)


@every
@pytest.mark.parametrize("common", ["mask", "bases"])
def test_guides_are_each_clients_own(member: Member, common: str) -> None:
    """Where they begin, what they are pulled towards and shifted by, momenta; and what all have in common."""
    cohort, trainer = opened(member, "everything")
    work, start, rng = Work(cohort, EVERYTHING, sizes_of(member)), trainer.initial(), np.random.default_rng(3)
    own = {
        n: rng.normal(size=(len(work.sizes), trainer.layout.size)) / 4 for n in ("start", "anchor", "shift", "momenta")
    }
    shared: Any = rng.integers(2, size=trainer.layout.size).astype(float)
    if common == "bases":
        shapes = zip(trainer.layout.names, trainer.layout.shapes, strict=True)
        shared = {n: np.linalg.qr(rng.normal(size=(s[0], 2)))[0] for n, s in shapes if len(s) == 2}
    guides = Guides(**own, **{common: shared})
    block = work.block(np.stack([start.buffers] * len(work.sizes)), guides)
    with cohort.settings():
        found = cohort.train(start, cohort.resident(work.pool), block)
    assert found.momenta is not None
    for client in range(len(work.sizes)):
        mine = {name: rows[client] for name, rows in own.items() if name != "start"}
        begin = start._replace(vector=own["start"][client])
        alone = trainer.train(begin, assignment(work.of(client), work.spec, client=client, **mine, **{common: shared}))
        for row, wanted in ((found.vectors[client], alone.weights.vector), (found.momenta[client], alone.momenta)):
            np.testing.assert_allclose(row, wanted, rtol=1e-10, atol=1e-12)


@every
def test_buffers_are_each_clients_own(member: Member) -> None:
    if member.buffers:
        cohort, trainer = opened(member, "everything")
        work, start = Work(cohort, EVERYTHING, sizes_of(member)), trainer.initial()
        own = start.buffers + 0.25 * np.arange(len(work.sizes))[:, None]
        found = trained(cohort, start, work, own)
        assert_rows(found, trainer, start, work, within=1e-10, buffers=own)
        assert len({row.tobytes() for row in found.buffers}) == len(work.sizes)


@every
def test_training_depends_on_its_arguments_only_and_changes_none(member: Member) -> None:
    cohort, trainer = opened(member, "everything")
    work, start = Work(cohort, EVERYTHING, sizes_of(member)), trainer.initial()
    held = [*start, *work.pool.inputs, work.pool.targets, *work.plan]
    before = [array.tobytes() for array in held]
    first = trained(cohort, start, work)
    other = Work(cohort, EVERYTHING, sizes_of(member)[:3], seed=7)
    moved = Weights(start.vector + 1, start.buffers + 0.5)
    assert bits(trained(cohort, moved, other)) != bits(first)
    assert bits(trained(cohort, start, work)) == bits(first)
    assert [array.tobytes() for array in held] == before


@every
def test_a_copy_is_another_cohort_of_the_same_task(member: Member) -> None:
    """Each thread has its own: what one trains, the other does not see."""
    cohort, trainer = opened(member, "everything")
    work, start = Work(cohort, EVERYTHING, sizes_of(member)), trainer.initial()
    wanted = trained(cohort, start, work)
    copy = cohort.copy()
    assert (copy.unpadded, copy.size, copy.memory, copy.cache) == (
        cohort.unpadded, cohort.size, cohort.memory, cohort.cache
    )  # fmt: skip
    trained(copy, Weights(start.vector - 1, start.buffers + 0.5), Work(copy, EVERYTHING, sizes_of(member)[1:], seed=8))
    assert bits(trained(cohort, start, work)) == bits(wanted)
    assert bits(trained(copy, start, work)) == bits(wanted)


@every
def test_it_has_the_trainers_layouts_and_says_what_it_takes(member: Member) -> None:
    cohort, trainer = opened(member, "everything")
    assert isinstance(cohort, Cohort)
    assert cohort.layout.digest() == trainer.layout.digest()
    assert cohort.buffer_layout.digest() == trainer.buffer_layout.digest()
    assert cohort.device == trainer.device == "cpu"
    assert 0 < cohort.size < cohort.memory
    assert 0 < cohort.cache <= cohort.memory
    if member.mixes:
        assert cohort.unpadded, "padding would change the statistics of a batch"


@every
def test_wherever_padding_is_allowed_it_changes_nothing(member: Member) -> None:
    """Batches of 4 beside batches of 1 or 2, computed 4 wide: far more padding than the executor ever asks for."""
    cohort, trainer = opened(member, "everything")
    if cohort.unpadded is None:
        work, start = Work(cohort, EVERYTHING, [4, 2, 4] if member.compiles else [4, 1, 5, 3]), trainer.initial()
        work.calls = calls(work.plan.count, work.plan.steps, padding=0.75)
        assert any((work.plan.count[call.steps] < call.width).any() for call in work.calls)
        assert_rows(trained(cohort, start, work), trainer, start, work, within=1e-10)
