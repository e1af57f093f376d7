"""Where data files come from: found, downloaded with a checksum, or clearly missing."""

import gzip
import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from foedus.data import sources
from foedus.data.sources import SOURCES, Source, data_folder, fetch, read
from foedus.errors import DataCorrupt, DataNotFound, StorageError

CONTENT = b"what the file should hold"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FOEDUS_DATA", str(tmp_path))
    sources._bytes_at.cache_clear()
    return tmp_path


@pytest.fixture
def site():
    """A web server on this machine; ``site.files`` maps paths to bytes, ``site.asked`` lists requests."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            content = server.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.files, server.asked = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join(20)


def test_the_folder_is_the_one_that_is_named(monkeypatch):
    monkeypatch.setenv("FOEDUS_DATA", "~/data")
    assert data_folder().is_absolute()
    monkeypatch.delenv("FOEDUS_DATA")
    assert data_folder().parts[-2:] == ("foedus", "data")


def test_a_file_that_is_there_is_used(folder):
    (folder / "set").mkdir()
    (folder / "set/file.txt").write_bytes(CONTENT)
    assert fetch("set/file.txt", [Source("set/file.txt", sha256(CONTENT))]).read_bytes() == CONTENT


def test_a_compressed_file_may_lie_there_uncompressed(folder, monkeypatch):
    source = Source("file.txt.gz", sha256(gzip.compress(CONTENT, mtime=0)), sha256(CONTENT))
    monkeypatch.setattr(sources, "SOURCES", (source,))
    (folder / "file.txt").write_bytes(CONTENT)
    assert read("file.txt.gz") == CONTENT
    (folder / "file.txt.gz").write_bytes(gzip.compress(CONTENT, mtime=0))
    assert read("file.txt.gz") == CONTENT


@pytest.mark.parametrize("damaged", [CONTENT[:-3], b"", CONTENT.replace(b"w", b"v")])
def test_a_damaged_file_is_named_with_both_digests_and_left_alone(folder, damaged):
    file = folder / "file.txt"
    file.write_bytes(damaged)
    with pytest.raises(DataCorrupt) as error:
        fetch("file.txt", [Source("file.txt", sha256(CONTENT), urls=("http://127.0.0.1:1/never",))])
    message = str(error.value)
    assert str(file) in message
    assert sha256(CONTENT) in message
    assert sha256(damaged) in message
    assert file.read_bytes() == damaged


def test_a_missing_file_is_downloaded_once(folder, site):
    site.files["/file"] = CONTENT
    source = Source("set/file.txt", sha256(CONTENT), urls=(f"{site.url}/file",))
    for _ in range(2):
        assert fetch("set/file.txt", [source]) == folder / "set/file.txt"
    assert (folder / "set/file.txt").read_bytes() == CONTENT
    assert [p.name for p in (folder / "set").iterdir()] == ["file.txt"]
    assert site.asked == ["/file"]


def test_the_next_address_is_tried(folder, site):
    site.files["/second"] = CONTENT
    source = Source("file.txt", sha256(CONTENT), urls=(f"{site.url}/first", f"{site.url}/second"))
    assert fetch("file.txt", [source]).read_bytes() == CONTENT


def test_a_member_of_an_archive_in_an_archive(folder, site):
    def packed(name, content):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(name, content)
        return buffer.getvalue()

    site.files["/all.zip"] = packed("inner.zip", packed("a.txt", CONTENT))
    source = Source("a.txt.gz", "?", sha256(CONTENT), (f"{site.url}/all.zip",), ("inner.zip", "a.txt"))
    assert fetch("a.txt.gz", [source]) == folder / "a.txt"
    wrong = source._replace(members=("inner.zip", "b.txt"), path="b.txt.gz")
    with pytest.raises(DataNotFound, match=r"not found|b\.txt"):
        fetch("b.txt.gz", [wrong])
    assert site.asked == ["/all.zip"]  # the archive is not fetched twice in a row


def test_a_missing_file_says_where_to_put_it(folder, site):
    source = Source("set/file.txt", sha256(CONTENT), urls=(f"{site.url}/gone",))
    with pytest.raises(DataNotFound) as error:
        fetch("set/file.txt", [source])
    message = str(error.value)
    assert "404" in message
    assert str(folder / "set/file.txt") in message
    assert "FOEDUS_DATA" in message
    assert sha256(CONTENT) in message
    assert not (folder / "set").exists()


def test_a_file_that_nobody_offers_says_so(folder):
    with pytest.raises(DataNotFound, match="no public download"):
        fetch("file.txt", [Source("file.txt", sha256(CONTENT))])


def test_no_connection_is_no_traceback_of_the_library(folder):
    source = Source("file.txt", sha256(CONTENT), urls=("http://127.0.0.1:9/file",))
    with pytest.raises(DataNotFound, match=r"Downloading failed: http://127\.0\.0\.1:9/file"):
        fetch("file.txt", [source])


def test_a_download_of_something_else_is_not_kept(folder, site):
    site.files["/file"] = b"<html>Sorry</html>"
    source = Source("file.txt", sha256(CONTENT), urls=(f"{site.url}/file",))
    with pytest.raises(DataCorrupt, match="not the file it should be"):
        fetch("file.txt", [source])
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, site):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("FOEDUS_DATA", str(blocked))
    sources._bytes_at.cache_clear()
    site.files["/file"] = CONTENT
    with pytest.raises(StorageError, match="cannot be written"):
        fetch("file.txt", [Source("file.txt", sha256(CONTENT), urls=(f"{site.url}/file",))])


def test_the_table_is_sound():
    assert len({s.path for s in SOURCES}) == len(SOURCES)
    for source in SOURCES:
        assert all(len(digest) == 64 and int(digest, 16) for _, digest in source.forms)
        assert (source.plain is None) or source.path.endswith(".gz")
