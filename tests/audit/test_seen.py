"""What an attacker sees is what the system would show it."""

import numpy as np
import pytest

import foedus as fd
from foedus.audit.seen import Victim, look, without_noise
from foedus.core.values import Context
from foedus.errors import ConfigurationError
from foedus.privacy.noise import discrete_gaussian

from .problems import flat, pictures, start, task


def victim(spec=None, count=4, **kwargs):
    spec = fd.local_sgd(0.1, batch_size=None) if spec is None else spec
    return Victim(task=task(flat), before=start(flat), spec=spec, examples=pictures(count), **kwargs)


def test_one_plain_step_shows_the_gradient():
    import torch

    one = victim()
    seen = look(one)
    net = torch.nn.utils.vector_to_parameters
    module = flat()
    net(torch.tensor(one.before.vector), module.parameters())
    loss = torch.nn.functional.cross_entropy(
        module(torch.tensor(one.examples.inputs[0])), torch.tensor(one.examples.targets)
    )
    slopes = torch.autograd.grad(loss, list(module.parameters()))
    assert seen.gradient == pytest.approx(torch.cat([g.reshape(-1) for g in slopes]).numpy(), abs=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 700.0, 50_000.0])
def test_whoever_adds_noise_knows_what_it_is_without(sigma):
    context = Context(0, 1, 0, secret=without_noise)
    assert not discrete_gaussian(context, "test", np.zeros(50), sigma=sigma).any()


def test_the_server_sees_through_its_own_noise_and_nobody_else_does():
    rule = fd.privacy.central(clip=1e-2, noise_multiplier=1.0, cohort=1)
    plain = look(victim()).update
    server, outside = look(victim(), through=rule), look(victim(), through=rule, outside=True)

    def likeness(a):
        return float(a @ plain / np.linalg.norm(a) / np.linalg.norm(plain))

    assert likeness(server.update) > 0.999
    assert likeness(outside.update) < 0.2
    assert np.linalg.norm(server.update) == pytest.approx(1e-2, rel=1e-2)


def test_noise_of_the_clients_own_stays():
    rule = fd.chain(fd.privacy.local(clip=1e-2, noise_multiplier=1.0), fd.mean())
    plain, seen = look(victim()).update, look(victim(), through=rule).update
    assert seen @ plain / np.linalg.norm(seen) / np.linalg.norm(plain) < 0.2


def test_what_was_left_out_is_known_to_be_left_out():
    seen = look(victim(), through=fd.chain(fd.top_k(0.1), fd.mean()))
    assert seen.sent.mean() == pytest.approx(0.1, abs=0.01)
    assert look(victim()).sent.all()  # though a ReLU's gradient has zeros of its own


def test_a_sum_of_single_steps_is_a_step_on_all_examples():
    others = [pictures(4, seed=i) for i in (1, 2)]
    seen = look(victim(), others=others)
    together = fd.Examples.concat([pictures(4), *others])
    whole = look(
        Victim(task=task(flat), before=start(flat), spec=fd.local_sgd(0.1, batch_size=None), examples=together)
    )
    assert seen.examples == 12
    assert seen.update == pytest.approx(whole.update, abs=1e-6)


def test_what_cannot_be_undone_is_refused():
    with pytest.raises(ConfigurationError, match="local_sgd"):
        look(victim(fd.local_training(optimiser=lambda p: None)))
    with pytest.raises(ConfigurationError, match="without examples"):
        look(victim(count=0))
