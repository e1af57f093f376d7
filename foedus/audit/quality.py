"""How good a reconstruction is: PSNR and SSIM, beside what somebody gets who has seen nothing.

A reconstruction is a set of examples in no particular order, so each is first paired with the original that it is
closest to. Both figures are then compared with those of the *baseline*: the mean of other examples, which is the best
guess of somebody who knows what such data looks like and nothing of this client. An attack that is no better than the
baseline has learnt nothing.

Source: SSIM by Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment", with its 11 × 11 Gaussian window.

Not here: the attacks (``inversion.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.errors import DataError

Array = NDArray[Any]

_WINDOW, _SPREAD = 11, 1.5
CLEAR = 3.0  # decibels above the baseline from which on a reconstruction counts as one: half of the error is gone
ALIKE = 0.5  # SSIM from which on a picture is recognised


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How close reconstructions come, one figure per original.

    Attributes:
        psnr: peak signal-to-noise ratio in decibels, of each original's reconstruction.
        ssim: structural similarity, at most 1; NaN where the examples are no pictures.
        baseline_psnr, baseline_ssim: the same for the mean of other examples.
        order: which reconstruction each original was paired with.

    Example:
        >>> once = Judged(psnr=(20.0,), ssim=(0.9,), baseline_psnr=(12.0,), baseline_ssim=(0.1,), order=(0,))
        >>> once.gain, once.recovered
        (8.0, 1.0)
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    baseline_psnr: tuple[float, ...]
    baseline_ssim: tuple[float, ...]
    order: tuple[int, ...]

    @property
    def gain(self) -> float:
        """Decibels above the baseline, on average."""
        return float(np.mean(self.psnr) - np.mean(self.baseline_psnr))

    @property
    def recovered(self) -> float:
        """The share of originals that are clearly closer than the baseline: by 3 dB, and pictures recognisably so
        (SSIM of at least 0.5 and above the baseline's)."""
        pictures = zip(self.psnr, self.ssim, self.baseline_psnr, self.baseline_ssim, strict=True)
        return float(np.mean([p >= b + CLEAR and (math.isnan(s) or s >= max(ALIKE, c)) for p, s, b, c in pictures]))

    def figures(self) -> dict[str, float]:
        """Means, for a record."""
        names = ("psnr", "ssim", "baseline_psnr", "baseline_ssim")
        means = {name: float(np.mean(getattr(self, name))) for name in names}
        return means | {"gain": self.gain, "recovered": self.recovered}


def judge(found: Array, truth: Array, *, baseline: Array, limits: tuple[float, float] = (0.0, 1.0)) -> Judged:
    """How close reconstructions come to the originals.

    Args:
        found: reconstructions [m, ...], at least as many as there are originals: whoever attacks a sum over many
            clients has one for each of their examples.
        truth: originals [k, ...].
        baseline: one example [...], what is guessed without any attack.
        limits: the smallest and the largest value that the data can have.

    Raises:
        DataError: the shapes differ.

    Example:
        >>> truth = np.stack([np.zeros((16, 16)), np.ones((16, 16))])
        >>> seen = judge(truth[::-1] * 0.9, truth, baseline=np.full((16, 16), 0.5))
        >>> seen.order, round(seen.psnr[1], 1), round(seen.baseline_psnr[1], 1), seen.recovered
        ((1, 0), 20.0, 6.0, 1.0)
    """
    if found.shape[1:] != truth.shape[1:] or len(found) < len(truth) or baseline.shape != truth.shape[1:]:
        raise DataError(
            f"reconstructions {list(found.shape)}, originals {list(truth.shape)} and a baseline "
            f"{list(baseline.shape)} do not go together: [m, ...], [k, ...] with k ≤ m, and [...] are wanted"
        )
    peak = limits[1] - limits[0]
    order = paired(found, truth)
    pairs = [(found[j], original) for original, j in zip(truth, order, strict=True)]
    return Judged(
        psnr=tuple(psnr(a, b, peak=peak) for a, b in pairs),
        ssim=tuple(ssim(a, b, peak=peak) for a, b in pairs),
        baseline_psnr=tuple(psnr(baseline, b, peak=peak) for b in truth),
        baseline_ssim=tuple(ssim(baseline, b, peak=peak) for b in truth),
        order=tuple(order),
    )


def paired(found: Array, truth: Array) -> list[int]:
    """For every original the reconstruction that it is paired with: the closest pair first, each used once."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (found, truth))
    apart = ((a[None] - b[:, None]) ** 2).sum(-1)  # [original, reconstruction]
    order = [-1] * len(b)
    for place in np.argsort(apart, axis=None, kind="stable").tolist():
        original, one = divmod(place, len(a))
        if order[original] < 0 and one not in order:
            order[original] = one
    return order


def psnr(found: Array, truth: Array, *, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in decibels; 100 at most, where nothing differs.

    Example:
        >>> round(psnr(np.full(4, 0.1), np.zeros(4)), 1)
        20.0
    """
    error = float(np.mean((found.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return min(100.0, 10 * math.log10(peak**2 / error)) if error else 100.0


def ssim(found: Array, truth: Array, *, peak: float = 1.0) -> float:
    """Structural similarity of two pictures [..., height, width], the mean over channels; NaN for what is no picture
    (fewer than two axes, or a side under 7).

    Example:
        >>> picture = np.outer(np.linspace(0, 1, 16), np.linspace(0, 1, 16))
        >>> round(ssim(picture, picture), 3), ssim(picture, 1 - picture) < 0.1
        (1.0, True)
    """
    if truth.ndim < 2 or min(truth.shape[-2:]) < 7:
        return math.nan
    a, b = (x.astype(np.float64).reshape(-1, *x.shape[-2:]) for x in (found, truth))
    small, tiny = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    both = _blurred(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + small) * (2 * both + tiny)
    return float((alike / ((mean_a**2 + mean_b**2 + small) * (var_a + var_b + tiny))).mean())


def _blurred(pictures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian means of all whole windows, [picture, height, width]; smaller windows for smaller pictures."""
    side = min(_WINDOW, *pictures.shape[-2:])
    at = np.arange(side) - (side - 1) / 2
    window = np.exp(-(at**2) / (2 * _SPREAD**2))
    window /= window.sum()
    for axis in (-1, -2):
        pictures = np.lib.stride_tricks.sliding_window_view(pictures, side, axis) @ window
    return pictures
