"""Fetching and unpacking what strangers serve: https, resumed, hashed before it is opened, unpacked strictly."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import stat
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from segdeconv import __version__
from segdeconv.errors import UsageError

CHUNK = 1 << 20
MAX_FILES = 100_000
MAX_BYTES = 50 << 30
MAX_RATIO = 200  # unpacked size of a file to its packed size; pictures are below 10
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _require_secure(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_secure(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise UsageError(f"will not download from {url}: only https is - check the address for a redirect")


def fetch(urls: Sequence[str], target: Path, *, way_out: str, sha256: str | None = None, timeout: float = 30) -> Path:
    """Download from the first address that answers; continue a `.part` that an earlier try left.

    timeout: seconds without a byte before the next address is tried. Raises UsageError with what each address said
    and `way_out`, or if the hash differs (the file is then kept as `.bad`).
    """
    if target.exists() and (sha256 is None or hash_file(target) == sha256):
        return target
    part = target.with_name(target.name + ".part")
    said = []
    for url in urls:
        _require_secure(url)
        try:
            _fetch(url, part, timeout)
            break
        except (OSError, http.client.HTTPException, EOFError) as error:
            said.append(f"{url}: {error}")
    else:
        raise UsageError(f"could not download {target.name} ({'; '.join(said)}) - {way_out}")
    if sha256 is not None and hash_file(part) != sha256:
        bad = target.with_name(target.name + ".bad")
        part.replace(bad)
        raise UsageError(f"{bad} is not the published file: its sha256 is {hash_file(bad)} - {way_out}")
    part.replace(target)
    return target


def _fetch(url: str, part: Path, timeout: float) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": f"segdeconv/{__version__}"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    opener = urllib.request.build_opener(_SecureRedirects)
    try:
        response = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing after what we have: it is whole, or it is of another file
            part.unlink()
            return _fetch(url, part, timeout)
        raise
    with response:
        continued = response.status == 206
        length = response.headers.get("Content-Length")
        total = int(length) + (done if continued else 0) if length else None
        with (
            part.open("ab" if continued else "wb") as file,
            tqdm(total=total, initial=done if continued else 0, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            if total is not None and file.tell() != total:
                raise EOFError(f"connection closed after {file.tell()} of {total} bytes")


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_zip(archive: Path, folder: Path, *, strip: int = 0, only: str = "") -> None:
    """Unpack regular files and folders of a zip into a new folder; anything else in it is refused.

    strip: leading path parts to drop. only: prefix, after stripping, of the files to unpack.
    No links, no devices, no path that leaves the folder, no more than MAX_FILES files and MAX_BYTES bytes, and no file
    packed more than MAX_RATIO times: each raises UsageError and nothing is left behind.
    """
    folder.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = _members(archive, file.infolist(), strip, only)
            for member, path in members:
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink, CHUNK)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, FileExistsError, NotADirectoryError, EOFError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UsageError(f"{archive} is not a whole zip file ({error}) - delete it and try again") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _members(
    archive: Path, entries: Sequence[zipfile.ZipInfo], strip: int, only: str
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    members = []
    total = 0
    for entry in entries:
        path = PurePosixPath(entry.filename)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
            raise UsageError(f"{archive} holds '{entry.filename}', which leaves its folder - do not trust this archive")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UsageError(f"{archive} holds '{entry.filename}', a link or device - do not trust this archive")
        path = PurePosixPath(*path.parts[strip:])
        if entry.is_dir() or not str(path).startswith(only):
            continue
        total += entry.file_size
        if entry.file_size > MAX_RATIO * max(entry.compress_size, 1024):
            raise UsageError(f"{archive} holds '{entry.filename}', packed over {MAX_RATIO} times - it may be a bomb")
        members.append((entry, path))
        if len(members) > MAX_FILES or total > MAX_BYTES:
            raise UsageError(
                f"{archive} unpacks to more than {MAX_FILES} files or {MAX_BYTES} bytes - it may be a bomb"
            )
    return members
