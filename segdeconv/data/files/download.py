"""Fetching what strangers serve: https only, from the first address that can, resumed, hashed before it is used."""

import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from segdeconv import __version__
from segdeconv.errors import UsageError
from segdeconv.system.files import hash_file

CHUNK = 1 << 20
TRIES = 5  # at one address, as long as each brings some bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Failed(Exception):
    """What an address did instead of serving the file."""


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not _is_secure(newurl):
            raise _Failed(f"it redirects to {newurl}, and only https is fetched")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_secure(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    way_out: str,
    sha256: str | None = None,
    md5: str | None = None,
    timeout: float = 30,
) -> Path:
    """Download from the first address that serves the file, unless it is there already.

    A `.part` that an earlier try or another address left is continued. Bytes of the wrong hash are kept as `.bad`
    until an address serves the right ones.

    md5: of a file whose sha256 nobody publishes. It tells damage, and not who made the file.
    timeout: seconds without a byte before the next address is tried. Raises UsageError with what each address said
    and `way_out`. What the disk refuses, a full one above all, is raised as the OSError that it is.
    """
    kind, expected = ("md5", md5) if sha256 is None and md5 is not None else ("sha256", sha256)
    said: dict[str, list[str]] = {}  # reason -> who: without a network all addresses fail alike
    if target.exists():
        found = None if expected is None else hash_file(target, kind)
        if found == expected:
            return target
        said[f"it is not the published file, its {kind} is {found}"] = [str(target)]
    part = target.with_name(target.name + ".part")
    # Stopped between the last byte and here:
    if expected is not None and part.exists() and hash_file(part, kind) == expected:
        return part.replace(target)
    for number, url in enumerate(urls, start=1):
        if not _is_secure(url):
            raise UsageError(f"will not download from {url}: only https is - check the address")
        try:
            _fetch_verified(url, part, kind, expected, timeout)
        except _Failed as error:
            said.setdefault(str(error), []).append(urllib.parse.urlsplit(url).netloc)
            if number < len(urls):
                print(f"{url}: {error}; trying the next address", flush=True)
            continue
        part.replace(target)
        _bad(part).unlink(missing_ok=True)
        return target
    reasons = "; ".join(f"{', '.join(who)}: {reason}" for reason, who in said.items())
    raise UsageError(f"could not download {target.name} ({reasons}) - {way_out}")


def _bad(part: Path) -> Path:
    return part.with_suffix(".bad")


def _fetch_verified(url: str, part: Path, kind: str, expected: str | None, timeout: float) -> None:
    continued = part.exists()
    for left in reversed(range(TRIES)):
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part, timeout)
            break
        except _Failed:
            if not left or not part.exists() or part.stat().st_size <= before:
                raise
    if expected is None or (found := hash_file(part, kind)) == expected:
        return
    if continued:  # perhaps only what was there before is wrong
        part.unlink()
        return _fetch_verified(url, part, kind, expected, timeout)
    part.replace(_bad(part))
    raise _Failed(f"it is not the published file, its {kind} is {found} (kept as {_bad(part)})")


def _fetch(url: str, part: Path, timeout: float) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": f"segdeconv/{__version__}"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        response = urllib.request.build_opener(_SecureRedirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and done:  # nothing after what we have: it is whole, or it is of another file
            part.unlink()
            return _fetch(url, part, timeout)
        raise _Failed(str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(str(getattr(error, "reason", error))) from error
    with response:
        continued = response.status == 206
        if continued and not response.headers.get("Content-Range", f"bytes {done}-").startswith(f"bytes {done}-"):
            raise _Failed(f"it answered with {response.headers['Content-Range']} to bytes={done}-")
        start = done if continued else 0
        total = None if response.length is None else start + response.length
        if total is not None and total < done:  # a page that says sorry, say: not worth what is here
            raise _Failed(f"it serves {total} bytes, and {part} holds {done} already")
        try:
            with (
                part.open("ab" if continued else "wb") as file,
                tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
            ):
                while chunk := _read(response):
                    file.write(chunk)
                    bar.update(len(chunk))
                received = file.tell()
        except OSError as error:
            error.filename = error.filename or str(part)  # a full disk does not say which file it was
            raise
    if total is not None and received != total:
        raise _Failed(f"connection closed after {received} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(str(error)) from error
