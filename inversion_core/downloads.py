"""Fetching one file whose hash is known."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

CHUNK = 1 << 20
TIMEOUT_SECONDS = 60
"""Without a single byte."""


class DownloadError(RuntimeError):
    """A file that could not be fetched, or was not the right one; nothing of it is left behind."""


def fetch(url: str, path: Path, sha256: str, progress: Callable[[int, int], object] | None = None) -> None:
    """Put the file of a URL at a path, in one step once it is whole and has the right hash.

    Args:
        url: https, or a file URL.
        path: where; folders are made.
        sha256: of the whole file, in hexadecimal.
        progress: told after every part how many bytes came, and of how many (0 if the server does not say); what it
            raises ends the download.

    Raises:
        DownloadError: no answer, a broken transfer, no room, or another file than expected.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    found = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, partial.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            while part := answer.read(CHUNK):
                file.write(part)
                found.update(part)
                if progress is not None:
                    progress(file.tell(), total)
        if found.hexdigest() != sha256:
            raise DownloadError(
                f"{url} has the SHA-256 {found.hexdigest()}, but {sha256} is expected: it was cut off, or changed. "
                "Try again, or fetch it by hand"
            )
        os.replace(partial, path)
    except (OSError, urllib.error.URLError) as error:
        raise DownloadError(f"{url} could not be fetched to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
