"""Resumable downloads over https from the first working address, verified by hash before use."""

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
TRIES = 5  # attempts per address, as long as each receives some bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Failed(Exception):
    """An address failed to serve the file; the message gives the reason."""


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not _is_secure(newurl):
            raise _Failed(f"it redirects to {newurl}, which is not https")
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
    name: str | None = None,
) -> Path:
    """Download a file from the first address that serves it, unless it exists already.

    A `.part` file of an earlier attempt or another address is continued. A download with the wrong hash is kept as
    `.bad` until an address serves the right file.

    Args:
        urls: The addresses, tried in order.
        target: The file to write.
        way_out: The last part of the error message, which suggests what to do instead.
        sha256: The expected hash, or None to accept any file.
        md5: The expected hash of a file without a published sha256. It detects damage, but not forgery.
        timeout: Seconds without a byte before the next address is tried.
        name: What messages call the file, without a progress bar; None for the name of `target`, with one.

    Returns:
        `target`.

    Raises:
        UsageError: No address serves the file; the message gives each reason and `way_out`.
        OSError: The disk refuses the file, for example because it is full.
    """
    kind, expected = ("md5", md5) if sha256 is None and md5 is not None else ("sha256", sha256)
    failures: dict[str, list[str]] = {}  # reason -> addresses: without a network all fail for the same reason
    if target.exists():
        digest = None if expected is None else hash_file(target, kind)
        if digest == expected:
            return target
        failures[f"it is not the published file, its {kind} is {digest}"] = [str(target)]
    part = target.with_name(target.name + ".part")
    # An earlier run may have stopped after the last byte and before the rename.
    if expected is not None and part.exists() and hash_file(part, kind) == expected:
        return part.replace(target)
    for number, url in enumerate(urls, start=1):
        if not _is_secure(url):
            raise UsageError(f"{url} is not an https address; only https is downloaded - check the address")
        try:
            _fetch_verified(url, part, kind, expected, timeout, name is None)
        except _Failed as error:
            failures.setdefault(str(error), []).append(urllib.parse.urlsplit(url).netloc)
            if number < len(urls):
                print(f"{url}: {error}; trying the next address", flush=True)
            continue
        part.replace(target)
        _bad_file(part).unlink(missing_ok=True)
        return target
    reasons = "; ".join(f"{', '.join(addresses)}: {reason}" for reason, addresses in failures.items())
    raise UsageError(f"could not download {name or target.name} ({reasons}) - {way_out}")


def _bad_file(part: Path) -> Path:
    return part.with_suffix(".bad")


def _fetch_verified(url: str, part: Path, kind: str, expected: str | None, timeout: float, progress: bool) -> None:
    continued = part.exists()
    for tries_left in reversed(range(TRIES)):
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part, timeout, progress)
            break
        except _Failed:
            if not tries_left or not part.exists() or part.stat().st_size <= before:
                raise
    if expected is None or (digest := hash_file(part, kind)) == expected:
        return
    if continued:  # perhaps only the bytes from before are wrong
        part.unlink()
        return _fetch_verified(url, part, kind, expected, timeout, progress)
    part.replace(_bad_file(part))
    raise _Failed(f"it is not the published file, its {kind} is {digest} (kept as {_bad_file(part)})")


def _fetch(url: str, part: Path, timeout: float, progress: bool) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": f"segdeconv/{__version__}"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        response = urllib.request.build_opener(_SecureRedirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and done:  # no bytes after ours: the part is complete, or it is of another file
            part.unlink()
            return _fetch(url, part, timeout, progress)
        raise _Failed(str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(str(getattr(error, "reason", error))) from error
    with response:
        continued = response.status == 206
        if continued and not response.headers.get("Content-Range", f"bytes {done}-").startswith(f"bytes {done}-"):
            raise _Failed(f"it answered the request for bytes={done}- with {response.headers['Content-Range']}")
        start = done if continued else 0
        total = None if response.length is None else start + response.length
        if total is not None and total < done:  # an error page, for example: the existing bytes are worth more
            raise _Failed(f"it serves {total} bytes, but {part} already holds {done}")
        try:
            with (
                part.open("ab" if continued else "wb") as file,
                tqdm(
                    total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=not progress
                ) as bar,
            ):
                while chunk := _read(response):
                    file.write(chunk)
                    bar.update(len(chunk))
                received = file.tell()
        except OSError as error:
            error.filename = error.filename or str(part)  # the error of a full disk names no file
            raise
    if total is not None and received != total:
        raise _Failed(f"connection closed after {received} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(str(error)) from error
