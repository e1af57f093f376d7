"""Gradient inversion works where it should, and says where it does not apply."""

import numpy as np
import pytest
import torch

import foedus as fd
from foedus.audit.inversion import Knowledge, cosine, dlg, idlg, invert, labels_of, variation
from foedus.audit.quality import judge
from foedus.audit.seen import Victim, look
from foedus.core.linear import logistic
from foedus.errors import ConfigurationError

from .problems import SIDE, flat, kinked, pictures, smooth, start, task

KNOWN = Knowledge(shape=(1, SIDE, SIDE), classes=3)
ONE = fd.local_sgd(0.1, batch_size=None)
MEAN = pictures(200, seed=5).inputs[0].mean(0)


def rebuilt(network, count, by, *, spec=ONE, through=None, known=KNOWN, **kwargs):
    victim = Victim(task=task(network), before=start(network, 1), spec=spec, examples=pictures(count, seed=3))
    found = invert(victim.task, look(victim, through=through, **kwargs), known, by=by)
    return found, judge(found.inputs, victim.examples.inputs[0], baseline=MEAN), victim.examples


@pytest.mark.slow
@pytest.mark.parametrize("by", [dlg(steps=40), idlg(steps=40)], ids=lambda by: by.label)
def test_deep_leakage_finds_picture_and_label(by):
    found, judged, truth = rebuilt(smooth, 1, by)
    assert judged.recovered == 1
    assert judged.gain > 10
    assert found.targets.tolist() == truth.targets.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_the_angle_of_gradients_finds_batches(count):
    _, judged, _ = rebuilt(kinked, count, cosine(steps=300))
    assert judged.recovered >= 0.75
    assert judged.gain > 5


@pytest.mark.slow
def test_local_steps_are_gone_through():
    spec = fd.local_sgd(0.1, epochs=2, batch_size=2, momentum=0.5)
    _, judged, _ = rebuilt(kinked, 4, cosine(steps=150), spec=spec)
    assert judged.gain > 4


@pytest.mark.slow
def test_clipping_does_not_help_and_noise_does():
    clipped = fd.chain(fd.clip(1e-3), fd.mean())
    noisy = fd.chain(fd.privacy.local(clip=1e-3, noise_multiplier=0.5), fd.mean())
    assert rebuilt(kinked, 1, cosine(steps=200), through=clipped)[1].recovered == 1
    assert rebuilt(kinked, 1, cosine(steps=200), through=noisy)[1].recovered == 0


@pytest.mark.slow
def test_the_same_seed_finds_the_same():
    a, b = (rebuilt(kinked, 2, cosine(steps=5))[0] for _ in range(2))
    assert (a.inputs == b.inputs).all()


def test_true_examples_are_at_distance_zero():
    from foedus.audit.inversion import Objective, opened_torch

    victim = Victim(
        task=task(kinked), before=start(kinked, 1), spec=fd.local_sgd(0.1, epochs=2, batch_size=2, clip_norm=0.3),
        examples=pictures(4),
    )  # fmt: skip
    objective = Objective(opened_torch(victim.task), look(victim), KNOWN, cosine())
    objective.labels = torch.tensor(victim.examples.targets)
    truth = [torch.tensor(victim.examples.inputs[0]).requires_grad_(True)]
    assert float(objective.apart(truth).detach()) < 1e-4


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("network", [smooth, kinked])
def test_the_label_of_one_example_is_read_off(network, clip):
    for seed in range(3):
        victim = Victim(task=task(network), before=start(network, 1), spec=ONE, examples=pictures(1, seed=seed))
        rule = None if clip is None else fd.chain(fd.clip(clip), fd.mean())
        seen = look(victim, through=rule)
        predicted = np.full(3, 1 / 3)
        found = {tuple(labels_of(seen, predicted, scaled=scaled).tolist()) for scaled in (False, True)}
        assert tuple(victim.examples.targets.tolist()) in found


def test_numbers_are_searched_for_where_there_are_no_classes():
    net = lambda: torch.nn.Linear(4, 1)  # noqa: E731
    problem = fd.Task(net, lambda output, target: ((output[:, 0] - target) ** 2).mean())
    truth = fd.Examples.of(np.array([[0.2, 0.9, 0.1, 0.6]], np.float32), np.array([1.5], np.float32))
    victim = Victim(task=problem, before=start_of(problem), spec=ONE, examples=truth)
    found = invert(problem, look(victim), Knowledge(shape=(4,)), by=idlg(steps=20))
    assert found.inputs == pytest.approx(truth.inputs[0], abs=0.05)


def start_of(problem):
    from foedus.backends import open_trainer

    return open_trainer(problem, seed=0, device="cpu").initial()


def test_variation_is_that_of_neighbours():
    picture = torch.tensor([[0.0, 1.0], [0.0, 3.0]])[None, None]
    assert float(variation(picture)) == pytest.approx((0 + 2) / 2 + (1 + 3) / 2)


def test_models_of_other_frameworks_are_refused():
    problem = fd.Task(logistic(4, 2))
    truth = fd.Examples.of(np.ones((1, 4), np.float32), [1])
    seen = look(Victim(task=problem, before=start_of(problem), spec=ONE, examples=truth))
    with pytest.raises(ConfigurationError, match="torch models"):
        invert(problem, seen, Knowledge(shape=(4,), classes=2))


def test_a_model_of_words_is_refused():
    words = lambda: torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2))  # noqa: E731
    problem = task(words)
    truth = fd.Examples.of(np.array([[1, 3]]), [1])
    seen = look(Victim(task=problem, before=start_of(problem), spec=ONE, examples=truth))
    with pytest.raises(ConfigurationError, match="made-up inputs"):
        invert(problem, seen, Knowledge(shape=(2,), classes=2), by=cosine(steps=2))


def test_a_last_layer_without_classes_is_refused():
    seen = look(Victim(task=task(flat), before=start(flat), spec=ONE, examples=pictures(1)))
    with pytest.raises(ConfigurationError, match=r"labels=\.\.\."):
        labels_of(seen, np.full(7, 1 / 7))
