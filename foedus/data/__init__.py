"""Data: loaders, own data, partitions, preprocessing. Everything ends as `foedus.Clients`.

    import foedus as fd
    clients = fd.data.mnist().partition(fd.data.by_class(nodes=10, share=0.9), seed=0)

Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foedus.data.bundled import breast_cancer as breast_cancer
    from foedus.data.bundled import digits as digits
    from foedus.data.dataset import Dataset as Dataset
    from foedus.data.engines import turbofan as turbofan
    from foedus.data.engines import turbofan_condition as turbofan_condition
    from foedus.data.folders import from_folder as from_folder
    from foedus.data.frames import from_frame as from_frame
    from foedus.data.frames import values_by_client as values_by_client
    from foedus.data.images import cifar10_jpeg as cifar10_jpeg
    from foedus.data.images import fashion_mnist as fashion_mnist
    from foedus.data.images import mnist as mnist
    from foedus.data.own import from_arrays as from_arrays
    from foedus.data.own import from_torch as from_torch
    from foedus.data.partition import Partition as Partition
    from foedus.data.partition import by_class as by_class
    from foedus.data.partition import by_key as by_key
    from foedus.data.partition import dirichlet as dirichlet
    from foedus.data.partition import iid as iid
    from foedus.data.partition import quantity_skew as quantity_skew
    from foedus.data.partition import shards as shards
    from foedus.data.plays import shakespeare as shakespeare
    from foedus.data.plays import tiny_shakespeare as tiny_shakespeare
    from foedus.data.preprocess import Filling as Filling
    from foedus.data.preprocess import Scaling as Scaling
    from foedus.data.preprocess import federated_mean_filling as federated_mean_filling
    from foedus.data.preprocess import federated_median_filling as federated_median_filling
    from foedus.data.preprocess import federated_scaling as federated_scaling
    from foedus.data.preprocess import federated_sum as federated_sum
    from foedus.data.preprocess import own_mean_filling as own_mean_filling
    from foedus.data.preprocess import own_scaling as own_scaling
    from foedus.data.sources import data_folder as data_folder
    from foedus.data.tables import adult as adult
    from foedus.data.tables import heart_disease as heart_disease
    from foedus.data.tables import parkinsons as parkinsons
    from foedus.data.vocabulary import OneHot as OneHot
    from foedus.data.vocabulary import Vocabulary as Vocabulary
    from foedus.data.vocabulary import federated_mode_filling as federated_mode_filling
    from foedus.data.vocabulary import federated_vocabulary as federated_vocabulary
    from foedus.data.vocabulary import one_hot as one_hot
    from foedus.data.words import bag_of_words as bag_of_words
    from foedus.data.words import frequent_words as frequent_words
    from foedus.data.words import shakespeare_questions as shakespeare_questions

# Where each name lives. A test holds this table and the imports above together.
_HOMES = {
    "Dataset": "dataset",
    "Filling": "preprocess",
    "OneHot": "vocabulary",
    "Partition": "partition",
    "Scaling": "preprocess",
    "Vocabulary": "vocabulary",
    "adult": "tables",
    "bag_of_words": "words",
    "breast_cancer": "bundled",
    "by_class": "partition",
    "by_key": "partition",
    "cifar10_jpeg": "images",
    "data_folder": "sources",
    "digits": "bundled",
    "dirichlet": "partition",
    "fashion_mnist": "images",
    "federated_mean_filling": "preprocess",
    "federated_median_filling": "preprocess",
    "federated_mode_filling": "vocabulary",
    "federated_scaling": "preprocess",
    "federated_sum": "preprocess",
    "federated_vocabulary": "vocabulary",
    "frequent_words": "words",
    "from_arrays": "own",
    "from_folder": "folders",
    "from_frame": "frames",
    "from_torch": "own",
    "heart_disease": "tables",
    "iid": "partition",
    "mnist": "images",
    "one_hot": "vocabulary",
    "own_mean_filling": "preprocess",
    "own_scaling": "preprocess",
    "parkinsons": "tables",
    "quantity_skew": "partition",
    "shakespeare": "plays",
    "shakespeare_questions": "words",
    "shards": "partition",
    "tiny_shakespeare": "plays",
    "turbofan": "engines",
    "turbofan_condition": "engines",
    "values_by_client": "frames",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"foedus.data.{_HOMES[name]}"), name)
        return value
    message = f"module 'foedus.data' has no attribute {name!r}"
    raise AttributeError(message, name=name, obj=import_module("foedus.data"))  # Python adds "Did you mean ..."


def __dir__() -> list[str]:
    return __all__
