"""Image data sets: MNIST, Fashion-MNIST, and a lossy copy of CIFAR-10.

Inputs are float32 [example, channel, height, width] in 0 .. 1, targets int64; a model for vectors flattens
them itself (``torch.nn.Flatten()``). Pixels are converted from bytes once, and nothing else is kept.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.core.population import Examples
from foedus.data.dataset import Dataset
from foedus.data.sources import fetch, read
from foedus.errors import DataCorrupt, MissingExtra

__all__ = ["cifar10_jpeg", "fashion_mnist", "mnist"]

_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def mnist() -> Dataset:
    """Handwritten digits: 60,000 + 10,000 images, float32 [n, 1, 28, 28] in 0 .. 1; classes 0 to 9.

    No natural clients: choose a partition. Takes 188 + 31 MB.

    Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Proc. IEEE 86(11), 1998.
    Raises:
        DataNotFound: the files are not there and cannot be downloaded.
        DataCorrupt: a file is damaged, or another one.

    Example:
        >>> mnist().partition(shards(100), seed=0)  # doctest: +SKIP
        Clients(100 clients, 60,000 examples, resident)
    """
    about = "LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, 1998"
    return _idx_dataset("mnist", tuple("0123456789"), about)


def fashion_mnist() -> Dataset:
    """Pictures of clothes, a harder twin of MNIST: 60,000 + 10,000, float32 [n, 1, 28, 28] in 0 .. 1.

    Source: H. Xiao, K. Rasul, R. Vollgraf, arXiv:1708.07747, 2017. Licence: MIT.
    Raises:
        DataNotFound: the files are not there and cannot be downloaded.
        DataCorrupt: a file is damaged, or another one.

    Example:
        >>> fashion_mnist().classes[0]  # doctest: +SKIP
        'T-shirt/top'
    """
    return _idx_dataset("fashion_mnist", _CLOTHES, "Xiao, Rasul, Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017")


def cifar10_jpeg(*, per_class: int | None = None) -> Dataset:
    """A lossy JPEG copy of CIFAR-10: 50,000 + 10,000 images, float32 [n, 3, 32, 32] in 0 .. 1.

    The images were compressed with JPEG quality 75: accuracies do **not** compare with results on
    CIFAR-10, and should be reported as "CIFAR-10 (JPEG copy)". Images come class by class. The whole
    takes 614 + 123 MB and about ten seconds to decode.

    Args:
        per_class: keep only the first so many training images of each class, and a fifth as many test
            images (rounded up); at least 1.

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    Raises:
        DataNotFound: the files are not there and cannot be downloaded.
        DataCorrupt: a file is damaged, or another one.
        MissingExtra: without Pillow.
        ConfigurationError: ``per_class`` is no whole number above 0.

    Example:
        >>> cifar10_jpeg(per_class=100)  # doctest: +SKIP
        Dataset(cifar10_jpeg: train Examples(1000: float32[3, 32, 32] -> int64), test 200)
    """
    if per_class is not None:
        check_whole("per_class", per_class, also=", or None for all")
    images: dict[str, list[NDArray[np.uint8]]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for part, label, number, jpeg in _members():
        limit = per_class if part == "train" or per_class is None else math.ceil(per_class / 5)
        if limit is None or number < limit:
            images[part].append(_pixels(jpeg))
            labels[part].append(label)
    train, test = (_image_examples(np.stack(images[p]), np.array(labels[p])) for p in ("train", "test"))
    return Dataset("cifar10_jpeg", train, test, _OBJECTS, about="Krizhevsky, Tiny images, 2009; JPEG copy, lossy")


def _idx_dataset(folder: str, classes: tuple[str, ...], about: str) -> Dataset:
    train, test = (
        _image_examples(
            _idx(f"{folder}/{part}-images-idx3-ubyte.gz")[:, None],
            _idx(f"{folder}/{part}-labels-idx1-ubyte.gz"),
        )
        for part in ("train", "t10k")
    )
    return Dataset(folder, train, test, classes, about=about)


def _idx_examples(prefix: str) -> Examples:
    pixels, labels = _idx(f"{prefix}-images-idx3-ubyte.gz"), _idx(f"{prefix}-labels-idx1-ubyte.gz")
    return _image_examples(pixels[:, None], labels)


def _idx(path: str) -> NDArray[np.uint8]:
    """An array in the IDX format: two zeros, type code, number of axes, their lengths, the bytes."""
    content = read(path)
    axes = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if not axes or len(content) - start != math.prod(shape):
        raise DataCorrupt(f"{path} is not an IDX file of bytes, or is cut short.")
    values = np.frombuffer(content, np.uint8, offset=start)
    return values.reshape(shape)


def _image_examples(pixels: NDArray[np.uint8], labels: NDArray[Any]) -> Examples:
    """Examples of pixels uint8 [example, channel, height, width]."""
    inputs = np.divide(pixels, np.float32(255), dtype=np.float32)
    return Examples((inputs,), labels.astype(np.int64))


def _members() -> Iterator[tuple[str, int, int, bytes]]:
    """(part, label, number within the class, JPEG) of each image, as they stand in the archive."""
    with tarfile.open(fetch("cifar10/cifar10-jpeg.tar.xz"), "r|xz") as archive:
        for member in archive:
            if member.isfile():
                part, name, number = member.name.split("/")
                file = archive.extractfile(member)
                assert file is not None
                yield part, _OBJECTS.index(name), int(number.removesuffix(".jpg")), file.read()


def _pixels(jpeg: bytes) -> NDArray[np.uint8]:
    """The picture as bytes [channel, height, width]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "data", "cifar10_jpeg()") from error
    return np.asarray(Image.open(io.BytesIO(jpeg))).transpose(2, 0, 1)
