"""Tables: heart disease (by hospital), Adult (census income), Parkinson's telemonitoring (by patient).

Values come as they were measured, float32 [row, column]; missing ones are NaN. Scaling and filling in
are the clients' business: `foedus.data.preprocess` does both without pooling any data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from foedus.core.population import Examples
from foedus.data.dataset import Dataset
from foedus.data.sources import read
from foedus.errors import ConfigurationError

__all__ = ["adult", "heart_disease", "parkinsons"]

Text = NDArray[np.str_]

_HOSPITALS: Final = ("cleveland", "hungarian", "switzerland", "va")
_HEART: Final = (
    "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca",
    "thal",
)  # fmt: skip
_UNKNOWN_IF_ZERO: Final = ("trestbps", "chol")

_ADULT: Final = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation",
    "relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country",
)  # fmt: skip


def heart_disease() -> Dataset:
    """Heart disease in four hospitals, 920 patients: float32 [n, 13] with NaN; 0 healthy, 1 disease.

    Natural clients: ``heart_disease().clients()`` gives cleveland (303), hungarian (294), switzerland
    (123), va (200). Missing values are NaN, and so are a blood pressure (trestbps) or a cholesterol
    (chol) of 0, which stand for "unknown": all of Switzerland's cholesterol. The columns cp, restecg,
    slope and thal are categories by number (`foedus.data.one_hot` spreads them). No test set: split
    each hospital, ``.clients().split(test=0.3)``.

    Source: A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano, Heart Disease, UCI Machine Learning
    Repository, 1988, whom publications are asked to name; federated use: J. Ogier du Terrail et al.,
    FLamby, NeurIPS 2022.
    Raises:
        DataNotFound: the files are not there and cannot be downloaded.
        DataCorrupt: a file is damaged, or another one.

    Example:
        >>> heart_disease().clients().ids  # doctest: +SKIP
        ('cleveland', 'hungarian', 'switzerland', 'va')
    """
    tables = [_cells(read(f"heart_disease/processed.{name}.data")) for name in _HOSPITALS]
    numbers = _numbers(np.concatenate(tables))
    x, diagnosis = numbers[:, :-1], numbers[:, -1]
    for name in _UNKNOWN_IF_ZERO:
        column = x[:, _HEART.index(name)]
        column[column == 0] = np.nan
    hospitals = np.repeat(_HOSPITALS, [len(t) for t in tables])
    return Dataset(
        "heart_disease",
        Examples.of(x, (diagnosis > 0).astype(np.int64)),
        classes=("healthy", "disease"),
        columns=_HEART,
        groups={"hospital": hospitals},
        about="Janosi, Steinbrunn, Pfisterer, Detrano, Heart Disease, UCI, 1988",
    )


def adult() -> Dataset:
    """Adult (census income): 32,561 + 16,281 people, float32 [n, 105]; 1 if the income is above 50K.

    Six columns of numbers, then 99 of categories spread to one column each ("sex=Female"), 0 or 1; the
    categories are those of the published description. A missing category is 0 in all its columns. The
    text columns are also there as groups, for skewed partitions: ``adult().clients("education")``.

    Source: B. Becker, R. Kohavi, Adult, UCI Machine Learning Repository, 1996.
    Raises:
        DataNotFound: the files are not there and cannot be downloaded.
        DataCorrupt: a file is damaged, or another one.

    Example:
        >>> adult().clients("education")  # doctest: +SKIP
        Clients(16 clients, 32,561 examples, resident)
    """
    tables = [_cells(read(f"adult/adult.{part}.gz")) for part in ("data", "test")]
    (train, groups), (test, test_groups) = (_adult_examples(table) for table in tables)
    return Dataset(
        "adult",
        train,
        test,
        classes=("<=50K", ">50K"),
        columns=(*_adult_numeric(), *(f"{c}={v}" for c, values in _CATEGORIES.items() for v in values)),
        groups=groups,
        test_groups=test_groups,
        about="Becker, Kohavi, Adult, UCI, 1996",
    )


def parkinsons(*, target: str = "motor_UPDRS") -> Dataset:
    """Voice measures of 42 Parkinson's patients over six months, 5,875 recordings: float32 [n, 19].

    Natural clients: ``parkinsons().clients()`` gives one per patient, of 101 to 168 recordings. The
    target is a severity score, float32 [n]; a regression. No test set.

    Args:
        target: ``"motor_UPDRS"`` (5 to 40) or ``"total_UPDRS"`` (7 to 55).

    Source: A. Tsanas, M. Little, Parkinsons Telemonitoring, UCI Machine Learning Repository, 2009.
    Raises:
        DataNotFound: the files are not there and cannot be downloaded.
        DataCorrupt: a file is damaged, or another one.

    Example:
        >>> parkinsons().clients()  # doctest: +SKIP
        Clients(42 clients, 5,875 examples, resident)
    """
    header, *cells = _cells(read("parkinsons/parkinsons_updrs.data.gz"))
    names = header.tolist()
    scores = ("motor_UPDRS", "total_UPDRS")
    if target not in scores:
        raise ConfigurationError(f"target must be one of {scores}, and is {target!r}.")
    columns = tuple(n for n in names if n not in ("subject#", *scores))
    numbers = _numbers(np.stack(cells))
    return Dataset(
        "parkinsons",
        Examples.of(numbers[:, [names.index(c) for c in columns]], numbers[:, names.index(target)]),
        columns=columns,
        groups={"patient": numbers[:, names.index("subject#")].astype(np.int64)},
        about="Tsanas, Little, Parkinsons Telemonitoring, UCI, 2009",
    )


def _cells(content: bytes) -> Text:
    """The cells of a file of comma-separated values, [row, column]; empty and comment lines left out."""
    lines = content.decode("latin-1").splitlines()
    return np.array([[c.strip() for c in line.split(",")] for line in lines if line.strip() and line[0] != "|"])


def _numbers(cells: Text) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = np.where(cells == "?", "nan", cells).astype(np.float64)
    return numbers


def _adult_numeric() -> list[str]:
    return [name for name in _ADULT if name not in _CATEGORIES]


def _adult_examples(cells: Text) -> tuple[Examples, dict[str, NDArray[Any]]]:
    column = {name: cells[:, i] for i, name in enumerate(_ADULT)}
    numeric = _numbers(np.stack([column[name] for name in _adult_numeric()], axis=1))
    spread = [_spread(column[name], values) for name, values in _CATEGORIES.items()]
    y = (np.char.rstrip(cells[:, -1], ".") == ">50K").astype(np.int64)
    return Examples.of(np.concatenate([numeric, *spread], axis=1), y), {n: column[n] for n in _CATEGORIES}


def _spread(values: Text, categories: Sequence[str]) -> NDArray[np.float64]:
    spread: NDArray[np.float64] = (values[:, None] == np.array(categories)).astype(np.float64)
    return spread


_CATEGORIES: Final[dict[str, tuple[str, ...]]] = {
    "workclass": (
        "Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov", "State-gov",
        "Without-pay", "Never-worked"
    ),
    "education": (
        "Bachelors", "Some-college", "11th", "HS-grad", "Prof-school", "Assoc-acdm", "Assoc-voc", "9th",
        "7th-8th", "12th", "Masters", "1st-4th", "10th", "Doctorate", "5th-6th", "Preschool"
    ),
    "marital-status": (
        "Married-civ-spouse", "Divorced", "Never-married", "Separated", "Widowed",
        "Married-spouse-absent", "Married-AF-spouse"
    ),
    "occupation": (
        "Tech-support", "Craft-repair", "Other-service", "Sales", "Exec-managerial", "Prof-specialty",
        "Handlers-cleaners", "Machine-op-inspct", "Adm-clerical", "Farming-fishing", "Transport-moving",
        "Priv-house-serv", "Protective-serv", "Armed-Forces"
    ),
    "relationship": (
        "Wife", "Own-child", "Husband", "Not-in-family", "Other-relative", "Unmarried"
    ),
    "race": (
        "White", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other", "Black"
    ),
    "sex": (
        "Female", "Male"
    ),
    "native-country": (
        "United-States", "Cambodia", "England", "Puerto-Rico", "Canada", "Germany",
        "Outlying-US(Guam-USVI-etc)", "India", "Japan", "Greece", "South", "China", "Cuba", "Iran",
        "Honduras", "Philippines", "Italy", "Poland", "Jamaica", "Vietnam", "Mexico", "Portugal",
        "Ireland", "France", "Dominican-Republic", "Laos", "Ecuador", "Taiwan", "Haiti", "Columbia",
        "Hungary", "Guatemala", "Nicaragua", "Scotland", "Thailand", "Yugoslavia", "El-Salvador",
        "Trinadad&Tobago", "Peru", "Hong", "Holand-Netherlands"
    ),
}  # fmt: skip
