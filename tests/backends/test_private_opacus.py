"""DP-SGD as Opacus does it: the same gradients, clipped alike, noise as large, and the same ε for it.

Opacus (Yousefpour et al. 2021, "Opacus: user-friendly differential privacy library in PyTorch") takes gradients by
hooks on layers, and has an accountant of its own: nothing in it is shared with what is tested here.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import foedus as fd
from foedus.backends.private import PrivateDescent, each
from foedus.core.client import LocalTraining, LoopContext
from foedus.core.examples import Examples
from foedus.core.values import Context
from foedus.privacy import known_to_all_who_know_the_seed, rdp
from foedus.privacy.examples import Steps

pytestmark = pytest.mark.slow  # Opacus takes seconds to import


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def convolutions() -> nn.Module:
    first, second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3)
    return nn.Sequential(
        first, nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), second, nn.InstanceNorm2d(6, affine=True),
        nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


class Words(nn.Module):
    """Embedded words and their order."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.words(x)).mean(1))


def pictures(count: int) -> Any:
    return np.random.default_rng(1).normal(size=(count, 1, 8, 8)).astype("f4")


def sentences(count: int) -> Any:
    return np.random.default_rng(1).integers(0, 11, (count, 5))


class Recurrent(nn.Module):
    """A layer that hooks do not see into: Opacus has one of its own in its place, of the same parameters."""

    def __init__(self, layer: Any = nn.LSTM) -> None:
        super().__init__()
        self.words, self.inner, self.last = nn.Embedding(11, 4), layer(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return self.last(self.inner(self.words(x))[0][:, -1])


MODELS: dict[str, tuple[Any, Any]] = {
    "perceptron": (perceptron, pictures), "convolutions": (convolutions, pictures), "words": (Words, sentences),
}  # fmt: skip
COUNT, CLIP, BATCH, RATE = 9, 0.4, 9, 0.5


def opened(name: str) -> tuple[nn.Module, Examples]:
    """A model and what it is trained on, always the same."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    return make(), Examples((inputs(COUNT),), np.random.default_rng(2).integers(0, 3, COUNT))


def theirs(module: nn.Module, examples: Examples, noise: float = 0.0) -> Any:
    """The optimiser of Opacus after the backward pass of one batch of all examples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        hooked = GradSampleModule(module, loss_reduction="mean")
        optimiser = DPOptimizer(
            torch.optim.SGD(hooked.parameters(), lr=RATE), noise_multiplier=noise, max_grad_norm=CLIP,
            expected_batch_size=BATCH, loss_reduction="mean", generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        output = hooked(torch.from_numpy(examples.inputs[0]))
        nn.functional.cross_entropy(output, torch.from_numpy(examples.targets)).backward()
    return optimiser


def descent(noise: float = 1e-6) -> PrivateDescent:
    spec = fd.dp_sgd(RATE, clip=CLIP, noise_multiplier=noise, batch_size=BATCH, steps=1)
    assert isinstance(spec, LocalTraining)
    assert isinstance(spec.loop, PrivateDescent)
    return spec.loop


def told() -> LoopContext:
    context = Context(5, 1, 0, secret=known_to_all_who_know_the_seed)
    return LoopContext(nn.functional.cross_entropy, 1, "a", [None], RATE, 7, context)


def flat(module: nn.Module) -> Any:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).numpy().copy()


@pytest.mark.parametrize("name", MODELS)
def test_every_examples_gradient_is_the_one_that_hooks_find(name: str) -> None:
    module, examples = opened(name)
    batch = [torch.from_numpy(a) for a in (*examples.inputs, examples.targets)]
    ours = each(module, dict(module.named_parameters()), batch, told())
    optimiser = theirs(module, examples)
    hooks = torch.cat([g.reshape(COUNT, -1) for g in optimiser.grad_samples], 1).numpy()
    np.testing.assert_allclose(ours, hooks, atol=2e-6)
    norms = np.linalg.norm(ours, axis=1)
    assert norms.max() > CLIP, "some are clipped"


def test_a_recurrent_layer_need_not_be_replaced_by_one_of_theirs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.layers import DPLSTM

        torch.manual_seed(0)
        plain, other = Recurrent(), Recurrent(DPLSTM)
        theirs_by_name = dict(other.named_parameters())
        with torch.no_grad():
            for name, p in plain.named_parameters():
                theirs_by_name[name].copy_(p)
        examples = Examples((sentences(COUNT),), np.random.default_rng(2).integers(0, 3, COUNT))
        batch = [torch.from_numpy(a) for a in (*examples.inputs, examples.targets)]
        ours = each(plain, dict(plain.named_parameters()), batch, told())
        hooks = dict(zip(theirs_by_name, theirs(other, examples).grad_samples, strict=True))
    wanted = torch.cat([hooks[name].reshape(COUNT, -1) for name, _ in plain.named_parameters()], 1)
    np.testing.assert_allclose(ours, wanted.numpy(), atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_theirs_but_for_the_noise(name: str) -> None:
    module, examples = opened(name)
    before = flat(module)
    theirs(module, examples).step()
    after = flat(module)
    module, _ = opened(name)
    descent()(module, examples, told())
    assert np.linalg.norm(after - before) > 0.02
    np.testing.assert_allclose(flat(module), after, atol=5e-6)


def test_the_noise_is_as_large_as_theirs() -> None:
    """Of 20,000 entries whose gradients are zero: the standard deviation of both is z · clip · lr / batch."""
    examples, noise = Examples((np.zeros((COUNT, 10_000), "f4"),), np.zeros(COUNT, np.int64)), 3.0
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        module = nn.Linear(10_000, 2)
        before = flat(module)
        if ours:
            descent(noise)(module, examples, told())
        else:
            theirs(module, examples, noise).step()
        found.append(float(np.std((flat(module) - before)[:20_000])))
    wanted = noise * CLIP * RATE / BATCH
    assert found == pytest.approx([wanted, wanted], rel=0.02)


@pytest.mark.parametrize(
    ("batch", "examples", "noise", "steps"), [(20, 600, 1.1, 300), (10, 40, 2.0, 25), (9, 9, 4.0, 7)]
)
def test_epsilon_is_the_one_that_their_accountant_says(batch: int, examples: int, noise: float, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history.append((noise, min(1.0, batch / examples), steps))
        wanted = accountant.get_epsilon(1e-5)
    own = Steps.of(noise, batch, examples, steps)
    assert rdp([(own.event, own.taken)], 1e-5) == pytest.approx(wanted, rel=0.03)
