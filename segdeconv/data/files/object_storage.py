"""Copy of one object of an object storage to a file: a program that `segdeconv.data.shard_files` runs.

    python object_storage.py URL FILE

It is a process of its own, because obstore's threads do not survive a fork and the workers of a loader are forked. It
imports nothing of segdeconv, so that it starts within a tenth of a second. Errors are one line on stderr.
"""

import os
import sys
from typing import Any

MISSING, ABSENT, FAILED = 3, 4, 5  # exit codes: obstore is not installed, no such object, any other error
MIN_CHUNK = 8 << 20  # bytes
# A whole shard may take long; a connection that delivers nothing is given up.
CLIENT = {"connect_timeout": "10s", "timeout": "24h"}


def main() -> int:
    """Copy the object and return the exit code."""
    url, path, timeout = sys.argv[1:]
    try:
        import obstore
        from obstore.exceptions import NotFoundError
        from obstore.store import from_url
    except ImportError:
        return MISSING
    folder, _, name = url.rpartition("/")
    try:
        store = from_url(folder, client_options=client_options(int(timeout)))
        with open(path, "wb") as file:
            for chunk in obstore.get(store, name).stream(min_chunk_size=MIN_CHUNK):
                file.write(chunk)
    except (NotFoundError, FileNotFoundError):
        return ABSENT
    except Exception as error:  # obstore has an exception for each service and cause, with texts of many lines
        print(described(error), file=sys.stderr)
        return FAILED
    return 0


def client_options(timeout: int) -> dict[str, Any]:
    """Return obstore's options for a connection that is given up after `timeout` seconds without a byte."""
    options: dict[str, Any] = {**CLIENT, "read_timeout": f"{timeout}s"}
    # Options given here hide this variable, which lets the address of an endpoint be http.
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"):
        options["allow_http"] = "true"
    return options


def described(error: Exception) -> str:
    """Return the first line of an error of obstore, shortened."""
    return " ".join(str(error).partition("\n")[0].split())[:300] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
