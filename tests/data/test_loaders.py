"""Loaders: each data set has the shape, the counts and the clients that its source says."""

import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from foedus import data
from foedus.data import sources
from foedus.data.engines import _cycles_left, _windows
from foedus.data.plays import IGNORED, PADDING, decode, encode
from foedus.data.sources import Source
from foedus.errors import ConfigurationError, DataCorrupt, MissingExtra

needs_data = pytest.mark.skipif(
    not os.environ.get("FOEDUS_DATA"), reason="FOEDUS_DATA is not set to a folder with the data files"
)


def test_every_name_is_there():

    assert data.__all__ == sorted(data.__all__)
    assert all(callable(getattr(data, name)) for name in data.__all__)
    assert dir(data) == data.__all__
    with pytest.raises(AttributeError, match="no attribute 'mnits'"):
        data.mnits  # noqa: B018
    text = Path(data.__file__).read_text()
    for name in data.__all__:
        assert text.count(f"import {name} as {name}\n") == 1


# --- bundled with scikit-learn ------------------------------------------------------------------------------


@pytest.mark.slow  # loads scikit-learn
def test_digits():
    digits = data.digits()
    assert len(digits.train) + len(digits.test) == 1797
    assert len(digits.test) == 359
    x = digits.train.inputs[0]
    assert x.shape[1:] == (1, 8, 8)
    assert x.dtype == np.float32
    assert (x.min(), x.max()) == (0, 1)
    assert digits.classes == tuple("0123456789")
    assert data.digits(test=0).test is None
    assert not np.array_equal(data.digits(seed=1).test.targets, digits.test.targets)
    with pytest.raises(ConfigurationError, match="share"):
        data.digits(test=1)


@pytest.mark.slow  # loads scikit-learn
def test_breast_cancer():
    cancer = data.breast_cancer()
    assert cancer.train.inputs[0].shape == (455, 30)
    assert len(cancer.columns) == 30
    assert cancer.classes == ("malignant", "benign")
    assert np.bincount(np.concatenate([cancer.train.targets, cancer.test.targets])).tolist() == [212, 357]


@pytest.mark.parametrize(
    ("module", "load", "package"),
    [
        ("sklearn", data.digits, "scikit-learn"),
        ("sklearn", data.breast_cancer, "scikit-learn"),
        ("narwhals", lambda: data.from_frame({}, target="y"), "narwhals"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, module, load, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.datasets", None)
    with pytest.raises(MissingExtra, match=rf"'{package}'.*pip install 'foedus\[data\]'"):
        load()


# --- files, as small copies in the same form ----------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Puts files in the data folder and in the table of sources."""
    monkeypatch.setenv("FOEDUS_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "SOURCES", ())

    def add(path, content):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
        entry = Source(path, hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(sources, "SOURCES", (*sources.SOURCES, entry))

    return add


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.tobytes())


def test_idx_files_are_read_whatever_they_hold(files):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4), np.uint8)
    for part in ("train", "t10k"):
        files(f"mnist/{part}-images-idx3-ubyte.gz", idx(pixels))
        files(f"mnist/{part}-labels-idx1-ubyte.gz", idx(np.arange(5, dtype=np.uint8)))
    train = data.mnist().train
    assert train.inputs[0].dtype == np.float32
    assert np.array_equal(train.inputs[0], (pixels / 255).astype(np.float32)[:, None])
    assert train.targets.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\x0d\x01\0\0\0\0",
        b"\0\0\x08\x01\0\0\0\x05ab",
        b"\x01\x02\x03\x01\0\0\0\0",
        b"\0\0\x08\x02\0",
        b"",
    ],
)
def test_what_is_no_idx_file_is_refused(files, content):
    files("mnist/train-images-idx3-ubyte.gz", gzip.compress(content))
    with pytest.raises(DataCorrupt, match=r"train-images-idx3-ubyte\.gz is not an IDX file"):
        data.mnist()


def test_cifar_pictures_land_with_their_class(files):
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for part, name, number, shade in [
            ("train", "truck", 0, 200),
            ("train", "truck", 1, 90),
            ("test", "airplane", 0, 50),
        ]:
            picture = io.BytesIO()
            image.new("RGB", (32, 32), (shade, 0, 0)).save(picture, "JPEG", quality=95)
            member = tarfile.TarInfo(f"{part}/{name}/{number:04}.jpg")
            member.size = len(picture.getvalue())
            archive.addfile(member, io.BytesIO(picture.getvalue()))
    files("cifar10/cifar10-jpeg.tar.xz", buffer.getvalue())
    cifar = data.cifar10_jpeg()
    assert cifar.train.targets.tolist() == [9, 9]
    assert cifar.test.targets.tolist() == [0]
    assert cifar.train.inputs[0].shape == (2, 3, 32, 32)
    assert np.allclose(cifar.train.inputs[0][:, 0].mean(axis=(1, 2)), [200 / 255, 90 / 255], atol=0.02)
    assert len(data.cifar10_jpeg(per_class=1).train) == 1


@pytest.mark.parametrize("per_class", [0, -1, 2.5, True])
def test_some_pictures_of_a_class_are_at_least_one(per_class):
    with pytest.raises(ConfigurationError, match=f"per_class must be a whole number of at least 1.*not {per_class!r}"):
        data.cifar10_jpeg(per_class=per_class)


def test_another_archive_is_not_taken_for_the_pictures(files, monkeypatch):
    files("cifar10/cifar10-jpeg.tar.xz", b"no archive")
    wrong = Source("cifar10/cifar10-jpeg.tar.xz", "0" * 64)
    monkeypatch.setattr(sources, "SOURCES", (wrong,))
    with pytest.raises(DataCorrupt, match="is not the file it should be"):
        data.cifar10_jpeg()


def test_characters_are_predicted_exactly_once(files):
    said = [("R", ["To be", "or not"]), ("R", ["to be:", "that", "is"]), ("S", ["Alone"])]
    records = [json.dumps({"play": "p", "role": role, "lines": lines}) for role, lines in said]
    files("shakespeare/speeches.jsonl.gz", gzip.compress("\n".join(records).encode()))
    plays = data.shakespeare(window=4)
    assert plays.clients().ids == ("p/R",)  # S has a single line
    for examples, text in ((plays.train, "To be\nor not\nto be:\nthat\n"), (plays.test, "is\n")):
        x, y = examples.inputs[0].ravel(), examples.targets.ravel()
        assert decode(y) == text
        assert x[0] == PADDING
        kept = y != IGNORED
        assert kept.sum() == len(text)
        assert x[kept][1:].tolist() == y[kept][:-1].tolist()
        assert (x[~kept] == PADDING).all()


def test_every_character_has_a_number():
    assert encode("A~\n \t\u00e9").tolist() == [35, 96, 1, 2, 0, 0]


def test_windows_end_at_the_last_cycle():
    run = np.arange(10, dtype=np.float32)[:, None]
    for length, window, stride in [(10, 3, 1), (10, 3, 4), (2, 3, 1), (3, 3, 2), (10, 10, 5)]:
        windows, left = _windows(run[:length], window, stride), _cycles_left(length, window, stride)
        assert len(windows) == len(left)
        assert windows[-1, -1, 0] == length - 1
        assert left[-1] == 0
        assert np.array_equal(windows[:, -1, 0], length - 1 - left)


def test_turbofan_from_text(files):
    def rows(engine, cycles):
        return "".join(
            f"{engine} {c} {' '.join(str(engine * 100 + c) for _ in range(24))}  \n" for c in range(1, cycles + 1)
        )

    files("turbofan/train_FD001.txt.gz", gzip.compress((rows(1, 5) + rows(2, 3)).encode()))
    files("turbofan/test_FD001.txt.gz", gzip.compress((rows(1, 4) + rows(2, 1)).encode()))
    files("turbofan/RUL_FD001.txt", b"7 \n2 \n")
    turbofan = data.turbofan(1, window=3, cap=2)
    assert turbofan.clients().ids == (1, 2)
    assert turbofan.train.targets.tolist() == [2, 1, 0, 0]
    assert turbofan.train.inputs[0][0, :, 0].tolist() == [101, 102, 103]
    assert turbofan.test.targets.tolist() == [7, 2]
    assert data.turbofan(1, window=3, cap=2, cap_test=True).test.targets.tolist() == [2, 2]
    assert turbofan.test.inputs[0][1, :, 0].tolist() == [201, 201, 201]  # lengthened at its start


@pytest.mark.parametrize(
    "wrong", [lambda: data.turbofan(5), lambda: data.turbofan(1, window=0), lambda: data.turbofan(1, cap=-1)]
)
def test_impossible_turbofans_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        wrong()


# --- the real files -----------------------------------------------------------------------------------------


@needs_data
@pytest.mark.slow
class TestReal:
    def test_mnist(self):
        mnist = data.mnist()
        assert mnist.train.inputs[0].shape == (60_000, 1, 28, 28)
        assert np.bincount(mnist.train.targets).tolist() == [
            5923,
            6742,
            5958,
            6131,
            5842,
            5421,
            5918,
            6265,
            5851,
            5949,
        ]
        assert np.bincount(mnist.test.targets).tolist() == [
            980,
            1135,
            1032,
            1010,
            982,
            892,
            958,
            1028,
            974,
            1009,
        ]
        assert abs(mnist.train.inputs[0].mean(dtype=np.float64) - 0.13066) < 1e-5
        assert abs(mnist.train.inputs[0].std(dtype=np.float64) - 0.30811) < 1e-5
        sizes = mnist.partition(data.by_class(10, share=0.9)).sizes
        assert sizes.tolist() == [5421] * 10

    def test_fashion_mnist(self):
        fashion = data.fashion_mnist()
        assert np.bincount(fashion.train.targets).tolist() == [6000] * 10
        assert abs(fashion.train.inputs[0].mean(dtype=np.float64) - 0.28604) < 1e-5

    def test_heart_disease(self):
        clients = data.heart_disease().clients()
        assert clients.ids == ("cleveland", "hungarian", "switzerland", "va")
        assert clients.sizes.tolist() == [303, 294, 123, 200]
        assert [int(clients.train(i).targets.sum()) for i in range(4)] == [139, 106, 115, 149]
        chol = data.heart_disease().columns.index("chol")
        missing = [int(np.isnan(clients.train(i).inputs[0][:, chol]).sum()) for i in range(4)]
        assert missing == [0, 23, 123, 56]  # va: 7 marked, 49 zeros; hungarian: 23 marked

    def test_adult(self):
        adult = data.adult()
        assert np.bincount(adult.train.targets).tolist() == [24_720, 7_841]
        assert np.bincount(adult.test.targets).tolist() == [12_435, 3_846]
        assert len(adult.columns) == adult.train.inputs[0].shape[1] == 105
        spread = adult.train.inputs[0][:, 6:]
        assert set(np.unique(spread)) == {0, 1}
        known = np.array([c.startswith("sex=") for c in adult.columns[6:]])
        assert (spread[:, known].sum(axis=1) == 1).all()
        education = adult.clients("education")
        assert len(education) == 16
        assert sum(len(education.test(i)) for i in range(16)) == 16_281

    def test_parkinsons(self):
        clients = data.parkinsons().clients()
        assert clients.ids == tuple(range(1, 43))
        assert (clients.sizes.min(), clients.sizes.max(), clients.sizes.sum()) == (101, 168, 5875)
        y = data.parkinsons(target="total_UPDRS").train.targets
        assert (round(float(y.min()), 2), round(float(y.max()), 2)) == (7.0, 54.99)
        with pytest.raises(ConfigurationError, match="'age'"):
            data.parkinsons(target="age")

    @pytest.mark.parametrize(
        ("subset", "rows", "engines", "tests"),
        [(1, 20_631, 100, 100), (2, 53_759, 260, 259), (3, 24_720, 100, 100), (4, 61_249, 249, 248)],
    )
    def test_turbofan(self, subset, rows, engines, tests):
        turbofan = data.turbofan(subset, window=1)
        assert len(turbofan.train) == rows
        assert len(turbofan.clients()) == engines
        assert len(turbofan.test) == tests
        conditions = np.bincount(data.turbofan_condition(turbofan.train.inputs[0][:, -1]), minlength=6)
        assert (conditions > 0).sum() == (6 if subset in (2, 4) else 1)

    def test_turbofan_conditions_are_told_apart_by_all_settings(self):
        x = data.turbofan(2, window=1).train.inputs[0][:, 0]
        condition = data.turbofan_condition(x)
        for k in range(6):
            assert np.ptp(x[condition == k, :2], axis=0).max() < 0.011
            assert np.ptp(x[condition == k, 2]) == 0

    def test_shakespeare(self):
        clients = data.shakespeare().clients()
        assert len(clients) == 1229
        assert min(len(clients.test(i)) for i in range(0, 1229, 50)) >= 1
        position = clients.ids.index("hamlet/HAMLET")
        assert decode(clients.train(position).targets[0]).startswith("[Aside] A little more than kin")

    def test_tiny_shakespeare(self):
        assert len(data.tiny_shakespeare().clients()) == 268

    def test_cifar10_jpeg(self):
        cifar = data.cifar10_jpeg(per_class=20)
        assert np.bincount(cifar.train.targets).tolist() == [20] * 10
        assert np.bincount(cifar.test.targets).tolist() == [4] * 10
