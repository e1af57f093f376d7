"""PSNR and SSIM, and which reconstruction belongs to which original."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.audit.quality import judge, paired, psnr, ssim
from foedus.errors import DataError


@given(st.floats(1e-3, 0.5), st.floats(0.5, 4.0))
def test_psnr_is_ten_times_the_logarithm_of_peak_squared_over_error(error, peak):
    truth = np.zeros((3, 5))
    assert psnr(truth + error, truth, peak=peak) == pytest.approx(20 * math.log10(peak / error), abs=1e-6)


def test_ssim_agrees_with_its_definition_by_loops():
    draws = np.random.default_rng(0)
    a, b = draws.random((16, 14)), draws.random((16, 14))
    at = np.arange(11) - 5
    line = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for i in range(16 - 10):
        for j in range(14 - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            both = (window * (p - mp) * (q - mq)).sum()
            above = (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
            found.append(above / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert ssim(a, b) == pytest.approx(np.mean(found), abs=1e-10)


def test_what_is_no_picture_has_no_ssim():
    assert math.isnan(ssim(np.zeros(20), np.zeros(20)))
    assert math.isnan(ssim(np.zeros((6, 40)), np.zeros((6, 40))))


@given(st.permutations(list(range(5))))
def test_order_does_not_matter(order):
    truth = np.random.default_rng(0).random((5, 9, 9))
    judged = judge(truth[list(order)] + 1e-3, truth, baseline=truth.mean(0))
    assert [order[j] for j in judged.order] == [0, 1, 2, 3, 4]
    assert judged.recovered == 1


def test_guessing_the_mean_recovers_nothing():
    truth = np.random.default_rng(0).random((4, 9, 9))
    mean = truth.mean(0)
    judged = judge(np.stack([mean] * 4), truth, baseline=mean)
    assert judged.recovered == 0
    assert judged.gain == pytest.approx(0, abs=1e-9)


def test_every_reconstruction_is_used_once():
    truth = np.zeros((3, 4))
    assert sorted(paired(np.ones((3, 4)), truth)) == [0, 1, 2]


def test_other_shapes_are_refused():
    with pytest.raises(DataError, match=r"\[2, 4\]"):
        judge(np.zeros((2, 4)), np.zeros((3, 4)), baseline=np.zeros(4))


def test_of_more_reconstructions_than_originals_the_closest_count():
    truth = np.random.default_rng(0).random((2, 9, 9))
    found = np.concatenate([np.zeros((3, 9, 9)), truth[1:], np.ones((1, 9, 9)), truth[:1]])
    assert judge(found, truth, baseline=truth.mean(0)).order == (5, 3)
