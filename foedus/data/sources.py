"""Where data files are found: in a folder, or downloaded with a checksum, or clearly missing.

All files lie in one folder, `data_folder()`: what the environment variable FOEDUS_DATA names, else a
cache folder of the user. A file that is there is checked against its SHA-256 before it is read; one
that is not is downloaded from the place that its authors (or a well-known mirror) offer it at, by pooch.
Nothing is ever overwritten: a file with the wrong checksum is named and left alone.

The table `SOURCES` at the end lists every file. A compressed file may also lie there uncompressed.

Not here: what is in the files (`images.py`, `tables.py`, `engines.py`, `plays.py`).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from foedus.errors import DataCorrupt, DataError, DataNotFound, StorageError

__all__ = ["SOURCES", "Source", "data_folder", "fetch", "read"]


class Source(NamedTuple):
    """A data file and where the public finds it.

    Attributes:
        path: inside the data folder, e.g. ``mnist/train-labels-idx1-ubyte.gz``.
        sha256: of the file.
        plain: for a ``.gz``, the SHA-256 of its content, which may lie there instead.
        urls: where it is downloaded from, tried in order. With ``plain``, they have the content.
        members: if the download is a zip archive, the member in it, and the member in that one, ...
    """

    path: str
    sha256: str
    plain: str | None = None
    urls: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def forms(self) -> list[tuple[str, str]]:
        """The names under which it may lie in the data folder, each with its SHA-256."""
        plain = [] if self.plain is None else [(self.path.removesuffix(".gz"), self.plain)]
        return [(self.path, self.sha256), *plain]


def data_folder() -> Path:
    """The folder that data files are looked for in, and downloaded to.

    FOEDUS_DATA if it is set, else ``foedus/data`` in the user's cache folder.

    Example:
        >>> os.environ["FOEDUS_DATA"] = "/data"  # doctest: +SKIP
        >>> data_folder()  # doctest: +SKIP
        PosixPath('/data')
    """
    if named := os.environ.get("FOEDUS_DATA"):
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("foedus", appauthor=False) / "data"


def read(path: str) -> bytes:
    """The content of a data file, uncompressed; it is downloaded first if it has to be.

    Raises:
        DataNotFound: it is nowhere to be had.
        DataCorrupt: its checksum is wrong.
    """
    file = fetch(path)
    content = file.read_bytes()
    return gzip.decompress(content) if file.suffix == ".gz" else content


def fetch(path: str, sources: Sequence[Source] | None = None) -> Path:
    """Where a data file lies, its checksum verified; it is downloaded first if it has to be.

    Args:
        path: as in `SOURCES`.
        sources: the table to look in.

    Errors: as for `read`.
    """
    source = next(s for s in (SOURCES if sources is None else sources) if s.path == path)
    for name, sha256 in source.forms:
        file = data_folder() / name
        if file.is_file():
            _verify(file, sha256)
            return file
    return _download(source)


def _verify(file: Path, sha256: str) -> None:
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != sha256:
        raise DataCorrupt(
            f"{file} is not the file it should be: its SHA-256 is {actual} ({file.stat().st_size} bytes), "
            f"and {sha256} was expected. It may be damaged, or cut short. Delete it to have it downloaded "
            "anew, or let FOEDUS_DATA name a folder with a sound copy."
        )


def _download(source: Source) -> Path:
    """Download to the data folder: the file, or the uncompressed content where only that is public."""
    name, sha256 = source.forms[-1]
    target = data_folder() / name
    failures: list[str] = []
    kind: type[DataError] = DataNotFound
    for url in source.urls:
        print(f"foedus: downloading {name} from {url}", file=sys.stderr)
        try:
            content = _retrieve(url, source.members)
        except (OSError, KeyError, zipfile.BadZipFile) as error:  # requests' errors are OSErrors
            failures.append(f"{url}: {_reason(error)}")
            continue
        actual = hashlib.sha256(content).hexdigest()
        if actual == sha256:
            return _save(target, content)
        kind = DataCorrupt
        failures.append(f"{url}: not the file it should be, its SHA-256 is {actual} ({len(content)} bytes)")
    raise kind(_advice(source, target, failures))


def _reason(error: Exception) -> str:
    """What happened, without the eight layers of a connection that cannot be made."""
    offline = any(kind.__name__ == "ConnectionError" for kind in type(error).__mro__)
    return f"no connection ({type(error).__name__})" if offline else str(error)


def _advice(source: Source, target: Path, failures: list[str]) -> str:
    where = f"It was looked for in {data_folder()}" + (
        " (FOEDUS_DATA)." if os.environ.get("FOEDUS_DATA") else ", as FOEDUS_DATA is not set."
    )
    reason = f" Downloading failed: {'; '.join(failures)}." if failures else " It has no public download."
    if source.members:
        reason += f" (It is {' / '.join(source.members)} in that archive.)"
    return (
        f"The data file {source.path} is missing. {where}{reason} Put the file at {target} (SHA-256 "
        f"{source.forms[-1][1]}), or set the environment variable FOEDUS_DATA to a folder that has it as "
        f"{source.path}."
    )


def _retrieve(url: str, members: Sequence[str]) -> bytes:
    """The bytes at a URL, or of a member of the archive there."""
    content = _bytes_at(url)
    for member in members:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = archive.read(member)
    return content


@lru_cache(maxsize=1)  # three files come out of one archive
def _bytes_at(url: str) -> bytes:
    import pooch

    pooch.get_logger().setLevel("WARNING")  # it would tell the user to write down a checksum
    with tempfile.TemporaryDirectory() as folder:
        return Path(pooch.retrieve(url, known_hash=None, fname="download", path=folder)).read_bytes()


def _save(target: Path, content: bytes) -> Path:
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(target)  # a reader sees the whole file or none
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise StorageError(
            f"{target} cannot be written ({error}). Set FOEDUS_DATA to a folder that you may write to."
        ) from error
    return target


_UCI: Final = "https://archive.ics.uci.edu/ml/machine-learning-databases"
_MNIST: Final = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
_FASHION: Final = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",)
_NASA: Final = "https://phm-datasets.s3.amazonaws.com/NASA/6.+Turbofan+Engine+Degradation+Simulation+Data+Set.zip"
_NASA_INNER: Final = "6. Turbofan Engine Degradation Simulation Data Set/CMAPSSData.zip"


def _images(folder: str, places: tuple[str, ...], digests: Sequence[str]) -> Iterator[Source]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for name, sha256 in zip(names, digests, strict=True):
        file = f"{name}-ubyte.gz"
        yield Source(f"{folder}/{file}", sha256, urls=tuple(f"{place}/{file}" for place in places))


def _uci(path: str, sha256: str, plain: str | None, url: str) -> Source:
    return Source(path, sha256, plain, urls=(f"{_UCI}/{url}",))


def _turbofan(name: str, sha256: str, plain: str | None = None) -> Source:
    member = name.removesuffix(".gz")
    return Source(f"turbofan/{name}", sha256, plain, urls=(_NASA,), members=(_NASA_INNER, member))


SOURCES: Final[tuple[Source, ...]] = (
    *_images(
        "mnist",
        _MNIST,
        [
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ],
    ),
    *_images(
        "fashion_mnist",
        _FASHION,
        [
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ],
    ),
    _uci(
        "adult/adult.data.gz",
        "c7a2b4716a97f930123e0baf879188d701e798172631a654fc703d4b082907f3",
        "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
        "adult/adult.data",
    ),
    _uci(
        "adult/adult.test.gz",
        "8a2c1bffa6e7ce5abfa43881ae5e87c4311ebc2b3cd526c9c40a43f19f06f799",
        "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
        "adult/adult.test",
    ),
    _uci(
        "heart_disease/processed.cleveland.data",
        "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
        None,
        "heart-disease/processed.cleveland.data",
    ),
    _uci(
        "heart_disease/processed.hungarian.data",
        "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
        None,
        "heart-disease/processed.hungarian.data",
    ),
    _uci(
        "heart_disease/processed.switzerland.data",
        "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
        None,
        "heart-disease/processed.switzerland.data",
    ),
    _uci(
        "heart_disease/processed.va.data",
        "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
        None,
        "heart-disease/processed.va.data",
    ),
    _uci(
        "parkinsons/parkinsons_updrs.data.gz",
        "ec885a5157077b00d1ff5dd0d24ca57d3cfbe083f0c252c89bcc80f742d74f63",
        "f2c7d5025dec4e92e7feae367a5f7ccf58789a10ac6b54bdf15976c599f9dd39",
        "parkinsons/telemonitoring/parkinsons_updrs.data",
    ),
    _turbofan(
        "train_FD001.txt.gz",
        "129645b2abec2ff391d6677af8828e9f8957164923e75a928fb1ad93b3ad5346",
        "963b5e22825b34d8b21c69e1aeb4af3e647050eb672ee8834ba4b5d91d2de0f8",
    ),
    _turbofan(
        "test_FD001.txt.gz",
        "b132843f5188d465a4b252dbbf0b6940c45af1fe12afbdf427acfa71f9618c54",
        "3cda7109ce17bafb5443f2ac926cfcf88154b941b8c4cf95eb55d1ddd6f52851",
    ),
    _turbofan("RUL_FD001.txt", "a19c8ec94931949d0485bdc35118206e9c81c4547b422efb9cf86f4ceddbceca"),
    _turbofan(
        "train_FD002.txt.gz",
        "ebc877202ad6630f624b453d96a1c19030d97002db72791455a54756bbd20620",
        "dac6c4dbc4e7c1bdeb5747da3d313d05c395bb99801b44a002b26a2ba13d788f",
    ),
    _turbofan(
        "test_FD002.txt.gz",
        "69156f4e20ad30c0c0ca93ac40ec889d595cb3b1ed60325350b9a9795c67f09d",
        "de7b5bf7e998a985c378488480528b7c02cff1406a46740def362dda8d9b4e02",
    ),
    _turbofan("RUL_FD002.txt", "c851dd96a6ea6998d3c4a8f834d3c8013aa90e93a6ed950dc826ad0655b2906b"),
    _turbofan(
        "train_FD003.txt.gz",
        "da3b3e5ee97d87e7c7f394d9dbf634a412fe2e2c1ad52a3f9e67b1f1363b2247",
        "2abbe9968cc5e8eb091980f51b20f62bb4127336d3482cb52071d53bf23329e2",
    ),
    _turbofan(
        "test_FD003.txt.gz",
        "26b9116c32657b82414a5cdfb968b0f18d5834ba37bda95178ba4db91293db37",
        "299babd63c8d987cef079c4a425429f33b3a34797d803bbe2ad48c29dbd0d790",
    ),
    _turbofan("RUL_FD003.txt", "df1e0566306b174a2de41c67a3e7a51877889598b78643fc3e5685259091b7cb"),
    _turbofan(
        "train_FD004.txt.gz",
        "00d9e88f0f72e1ed1a90386e4f2a454408040200b0975550d474a4a01f0264a5",
        "27ef6160b6a1dcb2613a88de9c239f763b223f02cdc41dc5cdedc5dc189b6218",
    ),
    _turbofan(
        "test_FD004.txt.gz",
        "fe6a66aaae62d6483b1fcf773a12e1c6efc05536fc84361edae0ee86bbd6d435",
        "1dc675fff0624bac10786927c6715b37d1297657137400d2b1a3138d777a3ba5",
    ),
    _turbofan("RUL_FD004.txt", "196b836b85a95ac7fdbbf29c5fdf1657382eafa445644d114ffaaf50dc2975e1"),
    Source(
        "shakespeare/speeches.jsonl.gz",
        "5b1ece9b338debe5b319e7ea537ae10c9c13478100f2cd82b8b1533dd56df544",
        "053b0b2af0f992b1ca437d20c00b81f71b75914877ce462370bc862bd6631890",
    ),
    Source(
        "shakespeare/tinyshakespeare.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        urls=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
            "/data/tinyshakespeare/input.txt",
        ),
    ),
    Source("cifar10/cifar10-jpeg.tar.xz", "d36960ba7d386e9c0d3147498ca8dc8a014059b7f0f5a5001b93852f72a1c8eb"),
)
