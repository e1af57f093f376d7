"""Small data sets that come with scikit-learn: nothing is downloaded.

Not here: anything larger.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.population import Examples
from foedus.core.random import key, order
from foedus.data.dataset import Dataset
from foedus.errors import ConfigurationError, MissingExtra

__all__ = ["breast_cancer", "digits"]


def digits(*, test: float = 0.2, seed: int = 0) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels: float32 [n, 1, 8, 8] in 0 .. 1; classes 0 to 9.

    Args:
        test: share of the images set aside at random as the test set; 0 for none.
        seed: of that choice.

    Source: E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998; in scikit-learn.
    Raises:
        MissingExtra: without scikit-learn.

    Example:
        >>> digits()
        Dataset(digits: train Examples(1438: float32[1, 8, 8] -> int64), test 359)
    """
    loaded = _datasets("digits()").load_digits()
    x = (loaded.images / 16).astype(np.float32)[:, None]
    about = "Alpaydin, Kaynak, Optical recognition of handwritten digits, UCI, 1998"
    return _divided(
        Dataset("digits", Examples.of(x, loaded.target), classes=tuple("0123456789"), about=about), test, seed
    )


def breast_cancer(*, test: float = 0.2, seed: int = 0) -> Dataset:
    """569 tumours, 30 measurements each, float32 [n, 30] as measured (scale them); 0 malignant, 1 benign.

    Args:
        test: share of the tumours set aside at random as the test set; 0 for none.
        seed: of that choice.

    Source: W. Wolberg, W. Street, O. Mangasarian, UCI Machine Learning Repository, 1993; in scikit-learn.
    Raises:
        MissingExtra: without scikit-learn.

    Example:
        >>> breast_cancer().classes
        ('malignant', 'benign')
    """
    loaded = _datasets("breast_cancer()").load_breast_cancer()
    dataset = Dataset(
        "breast_cancer",
        Examples.of(loaded.data, loaded.target),
        classes=tuple(str(name) for name in loaded.target_names),
        columns=tuple(str(name) for name in loaded.feature_names),
        about="Wolberg, Street, Mangasarian, Breast Cancer Wisconsin (Diagnostic), UCI, 1993",
    )
    return _divided(dataset, test, seed)


def _divided(dataset: Dataset, test: float, seed: int) -> Dataset:
    """The data set with a share of its rows, chosen at random, as the test set."""
    if not 0 <= test < 1:
        raise ConfigurationError(f"test is a share in [0, 1), and is {test}.")
    count = len(dataset.train)
    rows: NDArray[Any] = order(np.array([key(seed, dataset.name)], np.uint64), [count])
    held, rest = np.split(rows, [round(test * count)])
    tests = dataset.train.take(np.sort(held)) if len(held) else None
    return replace(dataset, train=dataset.train.take(np.sort(rest)), test=tests)


def _datasets(purpose: str) -> Any:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise MissingExtra("scikit-learn", "data", purpose) from error
    return sklearn.datasets
