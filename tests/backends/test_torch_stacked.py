"""Layers computed for a cohort equal torch's own, client by client, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foedus.backends import torch_stacked
from foedus.backends.torch_stacked import stacked, unfolded
from foedus.errors import UnsupportedOperator

CLIENTS = 3
KEY = torch.tensor([1, 2], dtype=torch.int32)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def check(layer: Callable[..., Tensor], *arguments: Tensor, dims: tuple[int | None, ...]) -> None:
    """vmap of the layer inside ``stacked`` against a loop outside of it: values and gradients."""
    own = [a.clone().requires_grad_() for a in arguments]

    def inside(*parts: Tensor) -> Tensor:
        with stacked(KEY):
            return layer(*parts)

    together = torch.vmap(inside, in_dims=dims)(*own)
    parts = [[a if d is None else a.select(d, i) for a, d in zip(own, dims, strict=True)] for i in range(CLIENTS)]
    apart = torch.stack([layer(*p) for p in parts])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    weight = random(*together.shape)
    grads = (torch.autograd.grad((out * weight).sum(), own, materialize_grads=True) for out in (together, apart))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(4, 5), (5,), (2, 4, 5)])
@pytest.mark.parametrize("dims", [(0, 0, 0), (1, 0, 0), (None, 0, 0), (0, None, None), (0, 0, None), (0, None, 0)])
def test_linear(shape: tuple[int, ...], dims: tuple[int | None, ...]) -> None:
    x, weight, bias = random(*shape), random(6, 5), random(6)
    shared = [a if d is None else torch.stack([a + i for i in range(CLIENTS)], d) for a, d in
              zip((x, weight, bias), dims, strict=True)]  # fmt: skip
    check(F.linear, *shared, dims=dims)


def test_linear_without_bias() -> None:
    check(F.linear, random(CLIENTS, 4, 5), random(CLIENTS, 6, 5), dims=(0, 0))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"padding": "same"},
    {"groups": 2},
]


@pytest.mark.parametrize("large", [0, 1 << 40])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, 0), (0, None, None)])
def test_convolution(
    large: int, settings: dict[str, Any], dims: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_stacked, "_LARGE", large)
    x, weight, bias = random(2, 4, 8, 7), random(6, 4 // settings.get("groups", 1), 3, 3), random(6)
    shared = [a if d is None else torch.stack([a + i for i in range(CLIENTS)]) for a, d in
              zip((x, weight, bias), dims, strict=True)]  # fmt: skip
    check(lambda *a: F.conv2d(*a, **settings), *shared, dims=dims)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("settings", [(1, 0, 1, 1), ((2, 1), (1, 2), (1, 2), 1), (3, 2, 1, 1)])
def test_the_gpus_form_of_a_convolution(settings: Any, biased: bool) -> None:
    x, weight = random(CLIENTS, 2, 4, 9, 8).requires_grad_(), random(CLIENTS, 6, 4, 3, 2).requires_grad_()
    bias = random(CLIENTS, 6) if biased else None
    ours = unfolded(x, weight, bias, settings)
    plain = torch.stack(
        [torch.conv2d(x[i], weight[i], None if bias is None else bias[i], *settings) for i in range(CLIENTS)]
    )
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad((out**2).sum(), (x, weight)) for out in (ours, plain))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
def test_embeddings_keep_the_padding_rows_gradient_at_zero(padding_idx: int | None) -> None:
    words = torch.tensor([[0, 3, 5, 4], [5, 5, 1, 0], [3, 3, 3, 3]])

    def layer(weight: Tensor, own: Tensor) -> Tensor:
        return F.embedding(own.long(), weight, padding_idx)

    check(layer, random(CLIENTS, 6, 2), words.double(), dims=(0, 0))


def test_what_cannot_be_batched_is_named() -> None:
    own = torch.nn.LSTM(3, 4).double()

    def packed(x: Tensor) -> Any:
        with stacked(KEY):
            return torch.lstm(x, torch.tensor([2, 1]), [x, x], own._flat_weights, True, 1, 0.0, True, False)[0]

    with pytest.raises(UnsupportedOperator, match=r"torch\.lstm on packed sequences"):
        torch.vmap(packed)(random(CLIENTS, 3, 3))
    with pytest.raises(UnsupportedOperator, match="max_norm"), stacked(KEY):
        F.embedding(torch.tensor([0]), random(2, 2), max_norm=1.0)
