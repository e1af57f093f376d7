"""The masked objective: it equals the user's mean over real rows, and is refused where it cannot."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from foedus.backends.masking import Objective, objective
from foedus.backends.torch_random import counted

CLASSES, WIDTH = 5, 4
CLASS_WEIGHTS = torch.tensor([0.1, 1.0, 2.0, 5.0, 0.5])


def example_batch(rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, WIDTH, generator=generator)
    return x, torch.randint(CLASSES, (rows,), generator=generator)


def own_mean(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - F.one_hot(target, CLASSES)) ** 2).mean()


def of_a_subset(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Leaves out class 0, so that its denominator depends on the targets."""
    real = (target != 0).float()
    return (F.cross_entropy(output, target, reduction="none") * real).sum() / real.sum()


def ranking(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compares every example with every other."""
    score = output[:, 0]
    return F.softplus(score[:, None] - score[None, :]).mean()


MASKABLE = {
    "function": F.cross_entropy,
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "per example": functools.partial(F.cross_entropy, reduction="none"),
    "sum": functools.partial(F.cross_entropy, reduction="sum"),
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "ignored label": nn.CrossEntropyLoss(ignore_index=2),
    "multi margin": nn.MultiMarginLoss(),
    "partial module": functools.partial(nn.MultiMarginLoss()),
    "hidden in a lambda": lambda output, target: F.cross_entropy(output, target),
    "own mean": own_mean,
}


def check(found: Objective, output: torch.Tensor, target: torch.Tensor, real: int) -> None:
    assert found.masked is not None, found.reason
    mask = (torch.arange(len(target)) < real).float()
    leaf = output.detach().requires_grad_()
    value = found.masked(leaf, target, mask)
    wanted = found.exact(output[:real], target[:real])
    torch.testing.assert_close(value.detach(), wanted.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
    (grad,) = torch.autograd.grad(value, leaf)
    assert not grad[real:].any(), "padding has a gradient"


@pytest.mark.parametrize("name", MASKABLE)
def test_masked_loss_is_the_users_mean_over_real_rows(name: str) -> None:
    x, y = example_batch()
    net = nn.Linear(WIDTH, CLASSES)
    found = objective(MASKABLE[name], net, inputs=[x], target=y)
    for real in range(1, len(y) + 1):
        check(found, net(x), y, real)


@pytest.mark.parametrize("name", MASKABLE)
def test_nothing_real_is_a_loss_of_zero_without_gradient(name: str) -> None:
    x, y = example_batch()
    found = objective(MASKABLE[name], nn.Linear(WIDTH, CLASSES), inputs=[x], target=y)
    leaf = torch.randn(len(y), CLASSES, requires_grad=True)
    assert found.masked is not None
    value = found.masked(leaf, y, torch.zeros(len(y), dtype=torch.bool))
    assert value.item() == 0
    assert torch.autograd.grad(value, leaf)[0].norm() == 0


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(real=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_ignored_tokens_keep_their_denominator(real: int, seed: int) -> None:
    """Sequences in which different numbers of tokens are left out: the mean is over tokens, not sequences."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (8, 6), generator=generator)
    target[torch.rand(8, 6, generator=generator) < 0.4] = -100
    output = torch.randn(8, CLASSES, 6, generator=generator)
    found = objective(F.cross_entropy, nn.Conv1d(WIDTH, CLASSES, 1), inputs=[torch.randn(8, WIDTH, 6)], target=target)
    if (target[:real] != -100).any():
        check(found, output, target, real)


def test_regression_and_targets_of_the_outputs_shape() -> None:
    x = torch.randn(7, WIDTH)
    weighted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))
    for loss in (F.mse_loss, F.l1_loss, nn.SmoothL1Loss(), weighted):
        net = nn.Linear(WIDTH, 2)
        target = torch.rand(7, 2)
        check(objective(loss, net, inputs=[x], target=target), net(x), target, 4)


@pytest.mark.parametrize("loss", [of_a_subset, ranking])
def test_losses_that_are_no_mean_over_examples_are_not_masked(loss: object) -> None:
    x, y = example_batch()
    found = objective(loss, nn.Linear(WIDTH, CLASSES), inputs=[x], target=y)  # type: ignore[arg-type]
    assert found.masked is None
    assert found.reason is not None
    assert loss.__name__ in found.reason  # type: ignore[attr-defined]


def test_a_denominator_that_the_examples_do_not_show_is_found() -> None:
    x, y = example_batch()
    found = objective(of_a_subset, nn.Linear(WIDTH, CLASSES), inputs=[x], target=y.clamp(min=1))
    assert found.masked is None


class Frozen(nn.Sequential):
    """The usual way to keep BatchNorm's statistics fixed while training."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[1].eval()
        return self


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0))


class Counting(nn.Linear):
    """Its buffer depends on how many rows it saw, its output does not."""

    def __init__(self) -> None:
        super().__init__(WIDTH, CLASSES)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return super().forward(x)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)), "BatchNorm1d '1'"),
        (Centred(), "Centred"),
        (Counting(), "Counting"),
    ],
)
def test_models_whose_examples_interact_are_not_masked(net: nn.Module, words: str) -> None:
    x, y = example_batch()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = objective(F.cross_entropy, net, inputs=[x], target=y)
    assert found.masked is None
    assert words in (found.reason or "")
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items()), "the model was changed"


def test_an_interaction_behind_a_layer_of_zeros_is_found() -> None:
    x, y = example_batch()
    net = nn.Sequential(Centred(), nn.Linear(CLASSES, CLASSES))
    nn.init.zeros_(net[1].weight)
    assert objective(F.cross_entropy, net, inputs=[x], target=y).masked is None


@pytest.mark.parametrize(
    "net",
    [
        Frozen(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)),
        nn.Sequential(nn.Linear(WIDTH, 6), nn.GroupNorm(2, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES)),
    ],
)
def test_frozen_statistics_group_norm_and_dropout_are_masked(net: nn.Module) -> None:
    x, y = example_batch()
    found = objective(F.cross_entropy, net, inputs=[x], target=y)
    net.train()
    with counted(torch.tensor([5, 6], dtype=torch.int32)):
        output = net(x)
    check(found, output, y, 4)


def test_one_example_is_enough() -> None:
    x, y = example_batch(1)
    assert objective(F.cross_entropy, nn.Linear(WIDTH, CLASSES), inputs=[x], target=y).masked is not None


def test_masked_losses_run_under_vmap() -> None:
    _, y = example_batch(6)
    outputs = torch.randn(3, 6, CLASSES)
    masks = torch.tensor([[1.0] * 6, [1.0, 1.0, 1.0, 0, 0, 0], [0.0] * 6])
    for loss in MASKABLE.values():
        if isinstance(getattr(loss, "func", loss), nn.MultiMarginLoss):
            continue  # multi_margin_loss itself has no batching rule
        masked = objective(loss, nn.Linear(WIDTH, CLASSES), inputs=[torch.randn(6, WIDTH)], target=y).masked
        assert masked is not None
        together = torch.vmap(masked, in_dims=(0, None, 0))(outputs, y, masks)
        apart = [masked(o, y, m) for o, m in zip(outputs, masks, strict=True)]
        torch.testing.assert_close(together, torch.stack(apart))
