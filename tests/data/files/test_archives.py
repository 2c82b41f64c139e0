"""Archives are unpacked strictly: regular files into one new folder, or an error that leaves no file behind."""

from __future__ import annotations

import errno
import gzip
import io
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from segdeconv.data.files import archives
from segdeconv.data.files.archives import unpack_tar, unpack_zip
from segdeconv.errors import UsageError

CONTENT = np.random.default_rng(0).bytes(300_000)


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# unpack_zip


def zipped(path: Path, *entries: tuple[str, bytes] | tuple[str, bytes, int]) -> Path:
    """Write a zip of (name, content[, file type]) entries."""
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
    "parent": (("../x", b"1"), "a path outside its folder"),
    "inner parent": (("a/../../x", b"1"), "a path outside its folder"),
    "absolute": (("/tmp/segdeconv-attack", b"1"), "a path outside its folder"),
    "backslash": (("..\\x", b"1"), "a path outside its folder"),
    "drive": (("C:/x", b"1"), "a path outside its folder"),
    "symbolic link": (("x", b"/etc/passwd", stat.S_IFLNK), "a link or device"),
    "fifo": (("x", b"", stat.S_IFIFO), "a link or device"),
    "device": (("x", b"", stat.S_IFCHR), "a link or device"),
    "bomb": (("x", bytes(10_000_000)), "may be a decompression bomb"),
    "long name": (("x" * 256, b"1"), "too long for a file system"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_zip_attacks_are_refused_and_leave_nothing(tmp_path: Path, attack: str) -> None:
    entry, message = ATTACKS[attack]
    archive = zipped(tmp_path / "a.zip", ("good", b"1"), entry)
    with pytest.raises(UsageError, match=rf"a\.zip holds '{re.escape(entry[0][:40])}.*', .*{message}"):
        unpack_zip(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.zip"]
    assert not Path("/tmp/segdeconv-attack").exists()


@pytest.mark.parametrize("limit", ["MAX_FILES", "MAX_BYTES"])
def test_too_many_files_or_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(archives, limit, 2)
    archive = zipped(tmp_path / "a.zip", *((name, b"1") for name in "abc"))
    with pytest.raises(UsageError, match="unpacks to more than"):
        unpack_zip(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.zip"]


def damaged(archive: Path, damage: str) -> None:
    content = bytearray(archive.read_bytes())
    central = content.rindex(b"PK\x01\x02")  # the last entry of the central directory: 'b'
    local = content.rindex(b"PK\x03\x04")
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "flipped":
        content[local + 31 : local + 60] = bytes(29)
    elif damage == "false size":
        content[central + 24 : central + 28] = (10).to_bytes(4, "little")
    elif damage == "encrypted":
        content[central + 8] |= 1
        content[local + 6] |= 1
    elif damage == "unknown method":
        content[central + 10] = content[local + 8] = 97
    elif damage == "name that is not text":
        content[central + 9] |= 8  # this bit declares the name as UTF-8
        content[central + 46] = 255
    elif damage == "directory before its start":
        content[-6:-2] = (1 << 24).to_bytes(4, "little")
    archive.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "empty",
        "flipped",
        "false size",
        "encrypted",
        "unknown method",
        "name that is not text",
        "directory before its start",
    ],
)
def test_a_damaged_zip_is_refused_and_leaves_nothing(tmp_path: Path, damage: str) -> None:
    archive = zipped(tmp_path / "a.zip", ("a", b"1"), ("b", CONTENT))
    damaged(archive, damage)
    with pytest.raises(UsageError, match=r"a\.zip is not a complete zip file .* - delete it and try again"):
        unpack_zip(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_every_method_is_unpacked_or_refused_if_it_is_damaged(tmp_path: Path, method: int) -> None:
    random = np.random.default_rng(method)
    archive = tmp_path / "a.zip"
    stored = random.integers(0, 9, 3000).astype(np.uint8).tobytes()
    with zipfile.ZipFile(archive, "w", method) as file:
        file.writestr("a", stored)
    content = archive.read_bytes()
    unpack_zip(archive, tmp_path / "whole")
    refused = 0
    for number in range(60):
        damaged_content = bytearray(content)
        damaged_content[random.integers(31, len(content) - 80)] ^= 1 << random.integers(8)
        archive.write_bytes(damaged_content)
        try:
            unpack_zip(archive, tmp_path / f"new{number}")
            assert (tmp_path / f"new{number}" / "a").read_bytes() == stored  # a bit of no meaning
        except UsageError as error:
            refused += "is not a complete zip file" in str(error)
    assert refused > 50


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["a", "a/b"])
def test_two_entries_for_one_path_are_refused_and_leave_nothing(tmp_path: Path, second: str) -> None:
    archive = zipped(tmp_path / "a.zip", ("a", b"1"), (second, b"2"))
    with pytest.raises(UsageError, match=r"a\.zip"):
        unpack_zip(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.zip"]


def test_unselected_entries_of_a_zip_are_not_checked(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", ("in/x", b"1"), ("out/link", b"/etc/passwd", stat.S_IFLNK), ("../x", b"1"))
    unpack_zip(archive, tmp_path / "new", only="in/")
    assert listing(tmp_path / "new") == ["in", "in/x"]


def test_a_full_disk_raises_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = zipped(tmp_path / "a.zip", ("x", b"1"))
    monkeypatch.setattr(archives.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left") as raised:
        unpack_zip(archive, tmp_path / "new")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "new"))
    assert listing(tmp_path) == ["a.zip"]


# unpack_tar


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> tuple[bytes, bytes]:
    """Return (header, padded content) of one entry; `fields` are other fields of the header."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT), content + bytes(-len(content) % 512)


def tarred(path: Path, *entries: tuple[bytes, bytes], end: bytes = bytes(1024)) -> Path:
    """Write a tar of such entries, gzipped if its suffix is .tgz."""
    content = b"".join(header + body for header, body in entries) + end
    path.write_bytes(gzip.compress(content) if path.suffix == ".tgz" else content)
    return path


NAMES = pytest.mark.parametrize("name", ["a.tar", "a.tgz"])


@NAMES
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_every_format_is_unpacked_stripped_and_filtered(tmp_path: Path, name: str, form: int) -> None:
    long = "in/" + "/".join(["y" * 60] * 3)
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w", format=form) as file:
        for path in ("in/x", "out/x", "also/x", long, "in", "empty"):
            info = tarfile.TarInfo(f"top/{path}")
            info.type = tarfile.DIRTYPE if path in ("in", "empty") else tarfile.REGTYPE
            info.size = 0 if info.isdir() else len(CONTENT)
            file.addfile(info, io.BytesIO(CONTENT))
    unpack_tar(tmp_path / name, tmp_path / "new", strip=1, only=("in/", "also/"))
    files = [path for path in listing(tmp_path / "new") if (tmp_path / "new" / path).is_file()]
    assert files == ["also/x", "in/x", long]
    assert all((tmp_path / "new" / path).read_bytes() == CONTENT for path in files)
    assert not any(path.stat().st_mode & stat.S_IXUSR for path in (tmp_path / "new").rglob("x"))


TAR_ATTACKS = {
    "parent": (entry("../x", b"1"), "a path outside its folder"),
    "inner parent": (entry("a/../../x", b"1"), "a path outside its folder"),
    "parent folder": (entry("../x", kind=tarfile.DIRTYPE), "a path outside its folder"),
    "absolute": (entry("/tmp/segdeconv-attack", b"1"), "a path outside its folder"),
    "symbolic link": (entry("x", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link or device"),
    "hard link": (entry("x", kind=tarfile.LNKTYPE, linkname="/etc/passwd"), "a link or device"),
    "hard link inside": (entry("x", kind=tarfile.LNKTYPE, linkname="good"), "a link or device"),
    "character device": (entry("x", kind=tarfile.CHRTYPE, devmajor=1, devminor=3), "a link or device"),
    "block device": (entry("x", kind=tarfile.BLKTYPE, devmajor=8), "a link or device"),
    "fifo": (entry("x", kind=tarfile.FIFOTYPE), "a link or device"),
    "contiguous file": (entry("x", b"1", tarfile.CONTTYPE), "a link or device"),
    "unknown type": (entry("x", b"1", b"Z"), "a link or device"),
    "long name": (entry("x" * 256, b"1"), "too long for a file system"),
    "long path": (entry("x/" * 1000, b"1"), "too long for a file system"),
    "twice": (entry("good", b"2"), "not a complete tar file"),
    "file as a folder": (entry("good/x", b"2"), "not a complete tar file"),
    "negative size": (entry("x", size=-1024), "not a complete tar file .*(-1024 bytes|no entry)"),
    "header too large": (
        entry("x", kind=tarfile.XHDTYPE, size=8 << 30),
        "not a complete tar file .*(header of|empty header)",
    ),
    "name too large": (
        entry("x", kind=tarfile.GNUTYPE_LONGNAME, size=8 << 30),
        "not a complete tar file .*(header of|empty header)",
    ),
    "false size": (entry("x", b"1", size=8 << 30), "unpacks to more than|not a complete tar file"),
    "too big": (entry("x", b"1", size=60 << 30), "unpacks to more than 100000 files or"),
}


@NAMES
@pytest.mark.parametrize("attack", TAR_ATTACKS)
def test_tar_attacks_are_refused_and_leave_nothing(tmp_path: Path, name: str, attack: str) -> None:
    attack_entry, message = TAR_ATTACKS[attack]
    archive = tarred(tmp_path / name, entry("good", b"1"), attack_entry)
    with pytest.raises(UsageError, match=rf"^\S*/{name} .*({message})"):
        unpack_tar(archive, tmp_path / "new")
    assert listing(tmp_path) == [name]
    assert not Path("/tmp/segdeconv-attack").exists()


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    """The 512 bytes unpack to eight gigabytes of zeros."""
    header = bytearray(entry("x", bytes(512), tarfile.GNUTYPE_SPARSE)[0])
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512  # the only stored block
    header[483:495] = b"%011o\0" % (8 << 30 & 0o77777777777)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    archive = tarred(tmp_path / "a.tar", (bytes(header), bytes(512)))
    with tarfile.open(archive) as file:
        assert file.getmembers()[0].issparse()
    with pytest.raises(UsageError, match="a link or device"):
        unpack_tar(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("only", ["", "good"])
def test_a_gzip_bomb_is_refused_even_if_it_is_only_skipped(tmp_path: Path, only: str) -> None:
    archive = tarred(tmp_path / "a.tgz", entry("bomb", bytes(30_000_000)), entry("good", b"1"))
    assert archive.stat().st_size < 40_000
    with pytest.raises(
        UsageError, match=r"a\.tgz unpacks to more than .* 200 times its own size - it may be a decompression"
    ):
        unpack_tar(archive, tmp_path / "new", only=only)
    assert listing(tmp_path) == ["a.tgz"]


def test_zeros_after_the_end_are_a_bomb_too(tmp_path: Path) -> None:
    archive = tarred(tmp_path / "a.tgz", entry("good", b"1"), end=bytes(30_000_000))
    with pytest.raises(UsageError, match="may be a decompression bomb"):
        unpack_tar(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.tgz"]


@pytest.mark.parametrize("limit", ["MAX_FILES", "MAX_BYTES"])
def test_a_tar_of_too_many_files_or_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(archives, limit, 2 if limit == "MAX_FILES" else 20_000)
    archive = tarred(tmp_path / "a.tar", *(entry(name, bytes(9000)) for name in "abc"))
    with pytest.raises(UsageError, match="unpacks to more than"):
        unpack_tar(archive, tmp_path / "new")
    assert listing(tmp_path) == ["a.tar"]


def damaged_tar(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    plain = path.suffix == ".tar"
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "cut near its end":
        content = content[: -1500 if plain else -4]
    elif damage == "empty":
        content = bytearray()
    elif damage == "not a tar":
        content = bytearray(CONTENT)
    elif plain:  # the header of the third entry; tarfile alone treats it as the end
        content[1024 + 512 + 300_032] ^= 1
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@NAMES
@pytest.mark.parametrize("damage", ["cut", "cut near its end", "empty", "not a tar", "flipped"])
def test_a_damaged_tar_is_refused_and_leaves_nothing(tmp_path: Path, name: str, damage: str) -> None:
    archive = tarred(tmp_path / name, entry("a", b"1"), entry("b", CONTENT), entry("c", b"1" * 2000))
    damaged_tar(archive, damage)
    with pytest.raises(UsageError, match=rf"{name} is not a complete tar file .* - delete it and try again"):
        unpack_tar(archive, tmp_path / "new")
    assert listing(tmp_path) == [name]


@NAMES
@pytest.mark.parametrize("end", [b"", bytes(512), bytes(10240)])
def test_a_tar_may_end_with_any_number_of_zeros(tmp_path: Path, name: str, end: bytes) -> None:
    unpack_tar(tarred(tmp_path / name, entry("a", b"1"), end=end), tmp_path / "new")
    assert (tmp_path / "new" / "a").read_bytes() == b"1"


def test_unselected_entries_of_a_tar_are_not_checked(tmp_path: Path) -> None:
    link = entry("out/link", kind=tarfile.SYMTYPE, linkname="/etc")
    archive = tarred(tmp_path / "a.tar", link, entry("in/x", b"1"), entry("../x", b"1"))
    unpack_tar(archive, tmp_path / "new", only="in/")
    assert listing(tmp_path / "new") == ["in", "in/x"]
