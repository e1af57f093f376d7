"""Counted randomness: the same bits eagerly, under vmap and in jax; and as random as it should be."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from foedus.backends.lowering import Batch, lower, tensors_of
from foedus.backends.torch_random import counted
from foedus.errors import UnsupportedOperator

KEY = torch.tensor([1234567, -987], dtype=torch.int32)
words = st.integers(-(2**31), 2**31 - 1)


def drawn(function: Callable[[], Tensor], key: Tensor = KEY) -> Tensor:
    with counted(key):
        return function()


X = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(0))
FLAT = X.reshape(6, -1)
MHA = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
LSTM = nn.LSTM(16, 3, num_layers=3, dropout=0.5, batch_first=True)

COUNTED: dict[str, Callable[[], Tensor]] = {
    "dropout": lambda: functional.dropout(X, 0.4),
    "module": lambda: nn.Dropout(0.4)(X),
    "inplace": lambda: functional.dropout(X.clone(), 0.4, inplace=True),
    "dropout1d": lambda: functional.dropout1d(X[:, :, 0], 0.4),
    "dropout2d": lambda: functional.dropout2d(X, 0.4),
    "dropout3d": lambda: functional.dropout3d(X[:, :, :, None], 0.4),
    "alpha": lambda: functional.alpha_dropout(X, 0.4, training=True),
    "feature_alpha": lambda: functional.feature_alpha_dropout(X, 0.4, training=True),
    "attention": lambda: functional.scaled_dot_product_attention(X, X, X, dropout_p=0.4),
    "multihead": lambda: MHA(X.reshape(6, 10, 8), X.reshape(6, 10, 8), X.reshape(6, 10, 8))[0],
    "lstm": lambda: LSTM(X.flatten(2))[0],
    "rand": lambda: torch.rand(3, 4) + torch.rand((3, 4)) + torch.rand_like(X[0, 0, :3]),
    "randn": lambda: torch.randn(3, 4) * torch.randn_like(X[0, 0, :3]),
    "bernoulli": lambda: torch.bernoulli(torch.full((40,), 0.4)) + torch.zeros(40).bernoulli_(0.3),
    "normal": lambda: torch.normal(X, 0.5) + torch.normal(0.0, 1.0, X.shape),
}

SEEDED: dict[str, Callable[[], Tensor]] = {
    "multinomial": lambda: torch.multinomial(torch.ones(50), 20),
    "exponential": lambda: torch.empty(20).exponential_(),
    "gumbel": lambda: functional.gumbel_softmax(FLAT),
    "rrelu": lambda: functional.rrelu(X, training=True),
    "randint": lambda: torch.randint(0, 1000, (20,)),
}


@pytest.mark.parametrize("name", [*COUNTED, *SEEDED])
def test_a_function_of_the_key_alone(name: str) -> None:
    function = (COUNTED | SEEDED)[name]
    state = torch.random.get_rng_state()
    first = drawn(function)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator was used up"
    torch.manual_seed(99)
    assert torch.equal(first, drawn(function))
    assert not torch.equal(first, drawn(function, KEY + torch.tensor([1, 0], dtype=torch.int32)))
    assert not torch.equal(first, drawn(function, KEY + torch.tensor([0, 1], dtype=torch.int32)))


def test_every_call_draws_anew() -> None:
    with counted(KEY) as draw:
        assert not torch.equal(functional.dropout(X), functional.dropout(X))
    assert draw.calls == 2


def test_nothing_is_drawn_in_evaluation() -> None:
    with counted(KEY) as draw:
        assert torch.equal(nn.Dropout(0.5).eval()(X), X)
        assert torch.equal(functional.dropout(X, 0.0), X)
        LSTM.eval()(X.flatten(2))
        LSTM.train()
    assert draw.calls == 0


@given(words, words, st.floats(0.02, 0.98))
def test_masks_have_their_share(a: int, b: int, share: float) -> None:
    """Counts of a fair coin: mean within five standard deviations, neighbours and other calls not correlated."""
    draw = counted(torch.tensor([a, b], dtype=torch.int32))
    mask, other = (draw.kept((200, 100), share).double() - share for _ in range(2))
    five = 5 * share * (1 - share) / 20000**0.5
    assert abs(mask.mean()) < 5 * (share * (1 - share) / 20000) ** 0.5
    for shifted in (other, mask.roll(1, 0), mask.roll(1, 1), mask.roll((1, 1), (0, 1)), mask.roll(16, 0)):
        assert abs((mask * shifted).mean()) < five


@given(words, words, st.sampled_from([0, 1]), st.integers(0, 31))
def test_close_keys_are_far_apart(a: int, b: int, word: int, bit: int) -> None:
    key = np.array([a, b], np.int32)
    other = key.copy()
    other[word] ^= np.array(1 << bit, np.uint32).astype(np.int32)
    masks = [counted(torch.from_numpy(k)).kept((200, 100), 0.5).double() - 0.5 for k in (key, other)]
    assert abs((masks[0] * masks[1]).mean()) < 5 * 0.25 / 20000**0.5


def test_uniform_and_normal_numbers() -> None:
    draw = counted(KEY)
    u, n = draw.uniform((400, 250), torch.float64), draw.normal((400, 250), torch.float64)
    assert 0 <= u.min()
    assert u.max() < 1
    # Kolmogorov–Smirnov at 1e-6: 2.7 / √n
    for values, cumulative in ((u, lambda v: v), (n, torch.special.ndtr)):
        ranks = (torch.arange(1, values.numel() + 1, dtype=torch.float64)) / values.numel()
        assert (cumulative(values.flatten().sort().values) - ranks).abs().max() < 2.7 / values.numel() ** 0.5


def test_dropout_keeps_the_mean_and_alpha_dropout_the_variance() -> None:
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(300, 300)
    assert abs(drawn(lambda: functional.dropout(ones, 0.3)).mean() - 1) < 0.01
    alpha = drawn(lambda: functional.alpha_dropout(x, 0.3, training=True))
    assert abs(alpha.mean()) < 0.02
    assert abs(alpha.var() - 1) < 0.02
    assert drawn(lambda: functional.dropout(ones, 1.0)).sum() == 0


def test_whole_channels_are_dropped() -> None:
    mask = drawn(lambda: functional.dropout2d(torch.ones(9, 8, 3, 3), 0.5)).flatten(2)
    assert (mask == mask[:, :, :1]).all()
    assert 0 < (mask == 0).float().mean() < 1


def test_padded_rows_do_not_change_the_others() -> None:
    """Elements are known by their coordinates: a longer batch draws the same for its first rows."""
    long, short = (drawn(lambda n=n: functional.dropout(torch.ones(n, 7, 3))) for n in (10, 6))
    assert torch.equal(long[:6], short)
    along = [drawn(lambda n=n: functional.dropout(torch.ones(7, n, 3))) for n in (10, 6)]
    assert torch.equal(along[0][:, :6], along[1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("both_ways", [False, True])
def test_recurrent_layers_are_torchs_but_for_the_mask(kind: type[nn.LSTM], both_ways: bool) -> None:
    """With almost no dropout the layer-by-layer form equals torch's own, padded and packed."""
    net = kind(16, 3, num_layers=3, bidirectional=both_ways)
    x = X.flatten(2)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 6, 4, 2, 1]))
    plain, plain_packed = net(x), net(packed)
    net.dropout = 1e-12
    with counted(KEY) as draw:
        ours, ours_packed = net(x), net(packed)
    assert draw.calls == 4
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(ours_packed[0].data, plain_packed[0].data)
    torch.testing.assert_close(ours_packed[1], plain_packed[1])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs_but_for_the_mask(causal: bool) -> None:
    q, k, v = X[:, :4], X[:, 1:5], X[:, 1:5]
    bias = None if causal else torch.randn(4, 4)
    plain = functional.scaled_dot_product_attention(q, k, v, bias, is_causal=causal)
    ours = drawn(lambda: functional.scaled_dot_product_attention(q, k, v, bias, 1e-12, causal))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", ["dropout", "dropout2d", "rand", "multihead"])
def test_vmap_draws_the_same(name: str) -> None:
    keys = torch.tensor([[1, 2], [-3, 4], [5, -6]], dtype=torch.int32)

    def one(key: Tensor) -> Tensor:
        return drawn(COUNTED[name], key)

    together = torch.func.vmap(one)(keys)
    torch.testing.assert_close(together, torch.stack([one(k) for k in keys]), rtol=1e-6, atol=1e-6)
    if name != "multihead":
        assert torch.equal(together, torch.stack([one(k) for k in keys]))


def test_vmap_refuses_what_cannot_be_counted() -> None:
    with pytest.raises(UnsupportedOperator, match=r"torch\.exponential_"):
        torch.func.vmap(lambda key: drawn(SEEDED["exponential"], key))(KEY[None])


@pytest.mark.slow
def test_jax_draws_the_same_bits() -> None:
    """Through the lowered step, with the key as an argument: the gradient of the weights shows every mask."""

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(6, 5, 7))

        def forward(self, x: Tensor) -> Tensor:
            dropped = functional.dropout(self.w, 0.4) * 4 + functional.dropout1d(self.w, 0.5) * 16
            return dropped + torch.rand_like(self.w)

    module = Masks()
    batch = Batch((torch.ones(6, 1),), torch.ones(6), torch.ones(6), KEY)
    lowered = lower(module, lambda output, target, mask: output.sum(), batch)
    for key in (KEY, torch.tensor([-5, 2**31 - 1], dtype=torch.int32)):
        with counted(key):
            total = module(batch.inputs[0]).sum()
        (grad,) = torch.autograd.grad(total, [module.w])
        with jax.enable_x64(True):
            arguments = jax.tree.map(Tensor.numpy, (*tensors_of(module), *batch._replace(key=key)))
            loss, grads, _ = jax.jit(lowered.step)(*arguments)
        assert np.array_equal(np.asarray(grads["w"]), grad.numpy())
        assert abs(float(loss) / total.item() - 1) < 1e-6
