"""A lowered training step equals eager torch: loss, gradients, buffers and dropout, over the usual layers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foedus.backends.lowering import Batch, Lowered, lower, tensors_of, verify
from foedus.errors import LoweringMismatch, UnsupportedOperator

B = 5


def masked(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """The masked mean of a loss per example."""

    def objective(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        each = loss(output, target, reduction="none", **options)
        each = each.reshape(len(each), -1).mean(1)
        return (each * mask).sum() / mask.sum()

    return objective


cross_entropy = masked(functional.cross_entropy)
mse = masked(functional.mse_loss)


class Function(nn.Module):
    """A module that is a function of its own parts."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(words).mean(1)))


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.body.weight.requires_grad_(False)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


class Assigned(nn.Module):
    """Sets its buffer anew, instead of changing it in place, and changes another one in place by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(7, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("places", torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen * 0.5 + x.detach().abs().max()
        self.places[1].add_(2.0)
        y = torch.zeros_like(x)
        y[:, ::2] = x[:, ::2] * 2
        y[:, 0] += 1
        return self.head(y) + self.places.sum() * 0.1


def recurrent(kind: Any, **options: Any) -> nn.Module:
    both = 2 if options.get("bidirectional") else 1
    return Function(
        lambda m, words: m.head(m.body(m.table(words))[0][:, -1]),
        table=nn.Embedding(11, 6), body=kind(6, 8, batch_first=True, **options), head=nn.Linear(8 * both, 4),
    )  # fmt: skip


def conv(rank: int, **options: Any) -> nn.Module:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return nn.Sequential(layer(4, 8, 3, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))


def pooled(pool: nn.Module, rank: int = 2) -> nn.Module:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return nn.Sequential(layer(4, 3, 3), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(4))


def wide(size: int = 7) -> Tensor:
    return torch.randn(B, size)


def image(rank: int = 2, side: int = 9) -> Tensor:
    return torch.randn(B, 4, *[side - i for i in range(rank)])


def words(length: int = 6) -> Tensor:
    return torch.randint(0, 11, (B, length))


def sequence() -> Tensor:
    return torch.randn(B, 6, 8)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "logistic": (lambda: nn.Linear(7, 4), wide),
    "mlp": (lambda: nn.Sequential(nn.Linear(7, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), wide),
    "activations": (
        lambda: nn.Sequential(
            nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 9), nn.SiLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9),
            nn.Sigmoid(), nn.Linear(9, 9), nn.GELU("tanh"), nn.Linear(9, 9), nn.LeakyReLU(), nn.Linear(9, 9),
            nn.ELU(), nn.Linear(9, 9), nn.Softplus(), nn.Linear(9, 9), nn.Hardtanh(), nn.Linear(9, 9), nn.Mish(),
            nn.Linear(9, 9), nn.Hardswish(), nn.Linear(9, 9), nn.SELU(), nn.PReLU(), nn.Softmax(-1), nn.Linear(9, 4),
        ),
        wide,
    ),
    "conv1d": (lambda: conv(1, padding=1), lambda: image(1)),
    "conv2d": (lambda: conv(2, stride=2, padding=(1, 0), dilation=2), image),
    "conv2d_grouped": (lambda: conv(2, groups=4, padding="same"), image),
    "conv3d": (lambda: conv(3, stride=2, bias=False), lambda: image(3, 7)),
    "conv_circular": (lambda: conv(2, padding=1, padding_mode="circular"), image),
    "conv_transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Flatten(),
            nn.LazyLinear(4),
        ),
        lambda: image(2, 5),
    ),
    "max_pool": (lambda: pooled(nn.MaxPool2d(2)), image),
    "max_pool_overlapping": (lambda: pooled(nn.MaxPool2d(3, 2, padding=1, dilation=1, ceil_mode=True)), image),
    "max_pool_dilated": (lambda: pooled(nn.MaxPool2d(2, 1, dilation=2)), image),
    "max_pool1d": (lambda: pooled(nn.MaxPool1d(3, 2), 1), lambda: image(1)),
    "max_pool3d": (lambda: pooled(nn.MaxPool3d(2), 3), lambda: image(3)),
    "avg_pool": (lambda: pooled(nn.AvgPool2d(2)), image),
    "avg_pool_padded": (lambda: pooled(nn.AvgPool2d(3, 2, padding=1, ceil_mode=True)), image),
    "avg_pool_uncounted": (
        lambda: pooled(nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False)), image
    ),
    "avg_pool1d": (lambda: pooled(nn.AvgPool1d(3, 2), 1), lambda: image(1)),
    "adaptive_avg_pool": (lambda: pooled(nn.AdaptiveAvgPool2d((3, 2))), image),
    "adaptive_avg_pool_1": (lambda: pooled(nn.AdaptiveAvgPool2d(1)), image),
    "adaptive_max_pool": (lambda: pooled(nn.AdaptiveMaxPool2d((3, 2))), image),
    "adaptive_avg_pool1d": (lambda: pooled(nn.AdaptiveAvgPool1d(4), 1), lambda: image(1)),
    "lstm": (lambda: recurrent(nn.LSTM), words),
    "lstm_deep": (lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True), words),
    "lstm_dropout": (lambda: recurrent(nn.LSTM, num_layers=3, dropout=0.4), words),
    "gru": (lambda: recurrent(nn.GRU, num_layers=2, bias=False), words),
    "gru_dropout": (lambda: recurrent(nn.GRU, num_layers=2, bidirectional=True, dropout=0.4), words),
    "rnn": (lambda: recurrent(nn.RNN, nonlinearity="relu"), words),
    "lstm_cell": (
        lambda: Function(lambda m, x: m.head(m.cell(x)[0]), cell=nn.LSTMCell(7, 6), head=nn.Linear(6, 4)), wide
    ),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(7, 8), nn.LayerNorm(8), nn.Linear(8, 4)), wide),
    "rms_norm": (lambda: nn.Sequential(nn.Linear(7, 8), nn.RMSNorm(8), nn.Linear(8, 4)), wide),
    "group_norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)), image
    ),
    "batch_norm": (lambda: nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), wide),
    "batch_norm2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)), image
    ),
    "batch_norm_bare": (
        lambda: nn.Sequential(
            nn.Linear(7, 8), nn.BatchNorm1d(8, affine=False, track_running_stats=False), nn.Linear(8, 4)
        ),
        wide,
    ),
    "instance_norm": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.Flatten(),
            nn.LazyLinear(4),
        ),
        image,
    ),
    "embedding": (
        lambda: Function(
            lambda m, x: m.head(m.table(x).sum(1)), table=nn.Embedding(11, 6, padding_idx=2), head=nn.Linear(6, 4)
        ),
        words,
    ),
    "embedding_large": (
        lambda: Function(
            lambda m, x: m.head(m.table(x).sum(1)),
            table=nn.Embedding(2000, 3, scale_grad_by_freq=True), head=nn.Linear(3, 4),
        ),
        words,
    ),
    "attention": (
        lambda: Function(
            lambda m, x: m.head(m.attend(x, x, x, need_weights=False)[0].mean(1)),
            attend=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 4),
        ),
        sequence,
    ),
    "attention_causal": (
        lambda: Function(
            lambda m, x: m.head(functional.scaled_dot_product_attention(m.q(x), m.k(x), x, is_causal=True).mean(1)),
            q=nn.Linear(8, 8), k=nn.Linear(8, 8), head=nn.Linear(8, 4),
        ),
        sequence,
    ),
    "attention_masked": (
        lambda: Function(
            lambda m, x: m.head(m.attend(x, x, x, key_padding_mask=x[..., 0] > 1.0)[0].mean(1)),
            attend=nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.3), head=nn.Linear(8, 4),
        ),
        sequence,
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True, activation="gelu"), nn.Flatten(),
            nn.Linear(48, 4),
        ),
        sequence,
    ),
    "transformer_decoder": (
        lambda: Function(
            lambda m, x: m.head(m.body(x, x * 2).mean(1)),
            body=nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True),
            head=nn.Linear(8, 4),
        ),
        sequence,
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(7, 30), nn.Dropout(0.3), nn.Linear(30, 4), nn.Dropout(0.1, inplace=True)), wide
    ),
    "dropout2d": (lambda: nn.Sequential(nn.Conv2d(4, 9, 3), nn.Dropout2d(0.4), nn.Flatten(), nn.LazyLinear(4)), image),
    "alpha_dropout": (lambda: nn.Sequential(nn.Linear(7, 30), nn.AlphaDropout(0.3), nn.Linear(30, 4)), wide),
    "noise": (
        lambda: Function(lambda m, x: m.head(x + torch.randn_like(x) * torch.rand_like(x)), head=nn.Linear(7, 4)), wide
    ),
    "tied": (Tied, words),
    "frozen": (Frozen, wide),
    "buffers": (Assigned, wide),
    "constant": (
        lambda: Function(lambda m, x: m.head(x * torch.tensor([1.0, 2, 3, 4, 5, 6, 7])), head=nn.Linear(7, 4)), wide
    ),
    "gather": (
        lambda: Function(
            lambda m, x: m.head(x).gather(1, x[:, :3].abs().clamp(0, 3).long()) @ m.tail, head=nn.Linear(7, 5),
            tail=nn.Parameter(torch.randn(3, 4)),
        ),
        wide,
    ),
    "scatter": (
        lambda: Function(
            lambda m, x: m.head(torch.zeros(len(x), 4).to(x).scatter_add(1, x.abs().clamp(0, 3).long(), m.body(x))),
            body=nn.Linear(7, 7), head=nn.Linear(4, 4),
        ),
        wide,
    ),
    "indexing": (
        lambda: Function(
            lambda m, x: m.head(torch.cat([m.body(x)[:, [0, 2, 2, -1]], m.body(x)[:, 1:3].flip(1)], 1)),
            body=nn.Linear(7, 7), head=nn.Linear(6, 4),
        ),
        wide,
    ),
    "reductions": (
        lambda: Function(
            lambda m, x: m.head(
                torch.stack(
                    [
                        (y := m.body(x)).amax(1), y.max(1).values, y.std(1), y.logsumexp(1), y.norm(dim=1),
                        y.cumsum(1)[:, 3], y.prod(1), y.sort(1).values[:, 2], y.topk(2, 1).values[:, 1],
                        y.median(1).values, y.var(1, False), y.min(1)[0],
                    ],
                    1,
                )
            ),
            body=nn.Linear(7, 7), head=nn.Linear(12, 4),
        ),
        wide,
    ),
    "rounding": (
        lambda: Function(
            lambda m, x: m.head(
                x + (3 * x).round() / 3 + (x * 4).long() // 3 + torch.div((x * 9).int(), -4, rounding_mode="trunc")
                + (x * 9).int() % 4 + torch.fmod(x, 0.3) + torch.remainder(x, -0.7) + x.trunc() + x.sign() * x.frac()
            ),
            head=nn.Linear(7, 4),
        ),
        wide,
    ),
    "einsum": (
        lambda: Function(
            lambda m, x: torch.einsum("btc,cdk->bk", x, m.w) + torch.bmm(x, x.transpose(1, 2)).mean((1, 2))[:, None],
            w=nn.Parameter(torch.randn(8, 3, 4)),
        ),
        sequence,
    ),
}  # fmt: skip


def example(name: str, dtype: torch.dtype, *, real: int = B) -> tuple[nn.Module, Batch]:
    """A model of the list, and a batch for it of which ``real`` rows are real."""
    torch.manual_seed(3)
    make, inputs = MODELS[name]
    x = inputs()
    module = make()
    module.train(name != "frozen")
    if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters()):
        module(x)
    module = module.to(dtype)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))
    x = x.to(dtype) if x.is_floating_point() else x
    mask = (torch.arange(B) < real).to(dtype)
    return module, Batch((x,), torch.randint(0, 4, (B,)), mask, torch.tensor([17, -5], dtype=torch.int32))


def target_of(name: str, batch: Batch) -> Batch:
    return batch._replace(target=torch.randint(0, 11, (B,))) if name == "tied" else batch


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equals_torch(name: str, dtype: torch.dtype) -> None:
    module, batch = example(name, dtype)
    batch = target_of(name, batch)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    lowered = lower(module, cross_entropy, batch)
    for n, t in module.state_dict().items():
        assert torch.equal(t, before[n]), "lowering changed the module"
    verify(lowered, module, cross_entropy, batch=batch, tolerance=1e-5 if dtype == torch.float32 else 1e-10)


ROWS_APART = [n for n in MODELS if n != "embedding_large"]  # which counts how often a word occurs


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS_APART)
def test_padding_changes_nothing(name: str) -> None:
    """With padded rows the lowered step equals torch's on the real rows alone; dropout and norms included."""
    module, batch = example(name, torch.float64)
    batch = target_of(name, batch)
    lowered = lower(module, cross_entropy, batch)
    padded = batch._replace(mask=(torch.arange(B) < 3).double())
    verify(lowered, module, cross_entropy, batch=padded, tolerance=1e-10)


def _weighted(**options: Any) -> Callable[..., Tensor]:
    return masked(functional.cross_entropy, weight=torch.tensor([0.2, 1.0, 3.0, 0.7], dtype=torch.float64), **options)


def _binary(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    each = functional.binary_cross_entropy_with_logits(
        output[:, 0], target.to(output) % 2, reduction="none", pos_weight=torch.tensor(2.0).to(output)
    )
    return (each * mask).sum() / mask.sum()


def _regression(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    inner = masked(loss, **options)
    return lambda output, target, mask: inner(output, target.to(output)[:, None].expand_as(output) / 2, mask)


def _by_hand(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    chosen = output.softmax(1)[torch.arange(len(target)), target]
    return -(chosen.clamp_min(1e-6).log() * mask).sum() / mask.sum()


def _mean_reduced(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return functional.cross_entropy(output, target) * (mask.sum() / mask.sum())


def _spatial(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    scores = output[:, :, None].expand(-1, -1, 3) * torch.arange(1, 4).to(output)
    each = functional.cross_entropy(scores, target[:, None].expand(-1, 3), reduction="none").mean(1)
    return (each * mask).sum() / mask.sum()


def _soft(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    wanted = functional.one_hot(target, 4).to(output) * 0.8 + 0.05
    return (functional.cross_entropy(output, wanted, reduction="none") * mask).sum() / mask.sum()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "weighted": _weighted(),
    "smoothed": masked(functional.cross_entropy, label_smoothing=0.1),
    "weighted_smoothed": _weighted(label_smoothing=0.1),
    "ignoring": masked(functional.cross_entropy, ignore_index=1),
    "mean": _mean_reduced,
    "soft": _soft,
    "spatial": _spatial,
    "binary": _binary,
    "by_hand": _by_hand,
    "mse": _regression(functional.mse_loss),
    "l1": _regression(functional.l1_loss),
    "smooth_l1": _regression(functional.smooth_l1_loss, beta=0.5),
    "huber": _regression(functional.huber_loss),
    "poisson": _regression(functional.poisson_nll_loss),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_torch(name: str) -> None:
    module, batch = example("logistic", torch.float64)
    lowered = lower(module, LOSSES[name], batch)
    verify(lowered, module, LOSSES[name], batch=batch, tolerance=1e-10)
    if name != "mean":
        real = batch._replace(mask=(torch.arange(B) < 3).double())
        verify(lowered, module, LOSSES[name], batch=real, tolerance=1e-10)


def run(lowered: Lowered, module: nn.Module, batch: Batch) -> Any:
    """One lowered step's results as numpy."""
    with jax.enable_x64(True):
        arguments = jax.tree.map(np.asarray, (*tensors_of(module), *batch))
        return jax.tree.map(np.asarray, jax.jit(lowered.step)(*arguments))


@pytest.mark.slow
def test_dtypes_are_torchs() -> None:
    module, batch = example("batch_norm", torch.float32)
    loss, grads, buffers = run(lower(module, cross_entropy, batch), module, batch)
    assert loss.dtype == np.float32
    assert {g.dtype for g in grads.values()} == {np.dtype(np.float32)}
    assert buffers["1.num_batches_tracked"].dtype == np.int64
    assert int(buffers["1.num_batches_tracked"]) == int(module[1].num_batches_tracked) + 1


@pytest.mark.slow
def test_other_keys_other_masks() -> None:
    module, batch = example("dropout", torch.float32)
    lowered = lower(module, cross_entropy, batch)
    other = batch._replace(key=torch.tensor([18, -5], dtype=torch.int32))
    assert run(lowered, module, batch)[0] == run(lowered, module, batch)[0]
    assert run(lowered, module, batch)[0] != run(lowered, module, other)[0]


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_out_of_range_gives_nan(label: int) -> None:
    """Torch raises; compiled code cannot, but the update will not be finite and so be refused."""
    module, batch = example("logistic", torch.float32)
    lowered = lower(module, cross_entropy, batch)
    wrong = batch._replace(target=torch.tensor([0, 1, label, 2, 3]))
    loss, grads, _ = run(lowered, module, wrong)
    assert np.isnan(loss)
    assert np.isnan(grads["weight"]).any()


def test_a_word_out_of_range_gives_nan() -> None:
    module, batch = example("embedding", torch.float32)
    lowered = lower(module, cross_entropy, batch)
    assert np.isnan(run(lowered, module, batch._replace(inputs=(batch.inputs[0] + 6,)))[0])


@pytest.mark.slow
def test_unknown_operators_are_all_named() -> None:
    def forward(module: Function, x: Tensor) -> Tensor:
        y = module.head(x)
        return y + torch.linalg.inv(y[:4, :4] + 9 * torch.eye(4)).sum() + torch.special.bessel_j0(y)

    _, batch = example("logistic", torch.float32)
    with pytest.raises(UnsupportedOperator) as caught:
        lower(Function(forward, head=nn.Linear(7, 4)), cross_entropy, batch)
    assert "aten.linalg_inv_ex.default" in caught.value.operators
    assert "aten.special_bessel_j0.default" in caught.value.operators
    assert pickle.loads(pickle.dumps(caught.value)).operators == caught.value.operators


def test_python_reading_a_value_is_refused() -> None:
    def forward(module: Function, x: Tensor) -> Tensor:
        return module.head(x) * (2.0 if x.sum() > 0 else 1.0)

    _, batch = example("logistic", torch.float32)
    with pytest.raises(UnsupportedOperator, match="_local_scalar_dense"):
        lower(Function(forward, head=nn.Linear(7, 4)), cross_entropy, batch)


def test_a_shape_that_depends_on_data_is_refused() -> None:
    def forward(module: Function, x: Tensor) -> Tensor:
        return module.head(x) + x[x > 0].sum()

    _, batch = example("logistic", torch.float32)
    with pytest.raises(UnsupportedOperator, match=r"nonzero|boolean|index"):
        lower(Function(forward, head=nn.Linear(7, 4)), cross_entropy, batch)


@pytest.mark.parametrize(
    ("draw", "name"),
    [(lambda x: torch.multinomial(x.abs(), 1), "multinomial"), (lambda x: x.exponential_(), "exponential_")],
)
def test_uncounted_randomness_is_refused(draw: Callable[[Tensor], Tensor], name: str) -> None:
    _, batch = example("logistic", torch.float32)
    module = Function(lambda m, x: m.head(x) + draw(x.clone()).sum(), head=nn.Linear(7, 4))
    with pytest.raises(UnsupportedOperator, match=name):
        lower(module, cross_entropy, batch)


def test_a_model_that_leaves_torch_is_refused() -> None:
    module = Function(lambda m, x: m.head(x + torch.from_numpy(np.sin(x.numpy()))), head=nn.Linear(7, 4))
    _, batch = example("logistic", torch.float32)
    with pytest.raises(UnsupportedOperator, match=r"torch\.Tensor\.numpy"):
        lower(module, cross_entropy, batch)


def test_a_model_that_cannot_be_recorded_is_refused() -> None:
    def forward(module: Function, x: Tensor) -> Tensor:
        raise RuntimeError("not on my watch")

    _, batch = example("logistic", torch.float32)
    with pytest.raises(UnsupportedOperator, match=r"could not be recorded .*not on my watch"):
        lower(Function(forward, head=nn.Linear(7, 4)), cross_entropy, batch)


def test_verify_finds_what_got_stuck_in_the_recording() -> None:
    """A number that Python computed from the example's weights, behind the recorder's back."""
    kept: list[float] = []

    def forward(module: Function, x: Tensor) -> Tensor:
        kept.append(0.5 + len(kept))
        return module.head(x) * kept[0 if len(kept) == 1 else 1]

    module = Function(forward, head=nn.Linear(7, 4))
    _, batch = example("logistic", torch.float32)
    lowered = lower(module, cross_entropy, batch)
    with pytest.raises(LoweringMismatch):
        verify(lowered, module, cross_entropy, batch=batch)


def test_packed_sequences_are_refused() -> None:
    def forward(module: Function, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 5, 4, 3, 2]), batch_first=True)
        return module.head(module.body(packed)[1][0][0])

    _, batch = example("attention", torch.float32)
    module = Function(forward, body=nn.LSTM(8, 5, batch_first=True), head=nn.Linear(5, 4))
    with pytest.raises(UnsupportedOperator):
        lower(module, cross_entropy, batch)


def test_batch_norm_over_merged_rows_is_refused() -> None:
    module = Function(
        lambda m, x: m.head(m.norm(x.flatten(0, 1)).view(x.shape).mean(1)), norm=nn.BatchNorm1d(8), head=nn.Linear(8, 4)
    )
    _, batch = example("attention", torch.float32)
    with pytest.raises(UnsupportedOperator, match="batch_norm over 30 rows in a batch of 5"):
        lower(module, cross_entropy, batch)


def test_verify_finds_a_wrong_gradient() -> None:
    module, batch = example("logistic", torch.float32)
    lowered = lower(module, cross_entropy, batch)
    other = masked(functional.cross_entropy, label_smoothing=0.01)
    with pytest.raises(LoweringMismatch, match="differs from eager torch in the loss"):
        verify(lowered, module, other, batch=batch)


@pytest.mark.slow
def test_verify_finds_rows_that_influence_each_other() -> None:
    module = Function(lambda m, x: m.head(x - x.mean(0)), head=nn.Linear(7, 4))
    _, batch = example("logistic", torch.float32)
    lowered = lower(module, cross_entropy, batch)
    verify(lowered, module, cross_entropy, batch=batch)
    with pytest.raises(LoweringMismatch):
        verify(lowered, module, cross_entropy, batch=batch._replace(mask=(torch.arange(B) < 3).float()))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 3)
        self.again, self.head = self.cells, self.out

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.cells(x)[0])[0][:, -1])


def test_a_module_under_two_names_is_left_as_it_was() -> None:
    module = Shared()
    before = {name: (p, p.detach().clone()) for name, p in module.named_parameters(remove_duplicate=False)}
    batch = Batch((torch.rand(B, 4, 6),), torch.arange(B) % 3, torch.ones(B), torch.tensor([1, 2], dtype=torch.int32))
    verify(lower(module, cross_entropy, batch), module, cross_entropy, batch=batch)
    for name, p in module.named_parameters(remove_duplicate=False):
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
    assert all(
        w is dict(module.cells.named_parameters())[n]
        for w, n in zip(module.cells._flat_weights, module.cells._flat_weights_names, strict=True)
    )
