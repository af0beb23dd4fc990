"""Download one file: progress, resume, hash, and an atomic rename, so that a half-written file is never used."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO

from filelock import FileLock
from tqdm import tqdm

from sam2_propagation.errors import PropagationError

_CHUNK = 1 << 20
_PARTIAL_CONTENT = 206
_RANGE_NOT_SATISFIABLE = 416


def file_sum(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, target: Path, sha256: str | None = None) -> None:
    """Fetch `url` to `target`; what an earlier, interrupted call left is continued where the server allows it.

    Raises:
        PropagationError: the address cannot be read (it says where to put the file by hand), or the sum differs.
    """
    partial = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Shards that start at once would write into one partial file: the others wait, and find it done.
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_file():
                _fetch(url, partial)
                _keep(url, partial, target, sha256)
    except (urllib.error.URLError, HTTPException, OSError) as error:
        raise PropagationError(
            f"expected to download {url}, found {error}; fetch it by other means and put it as {target.name} "
            f"into {target.parent}"
        ) from error


def _keep(url: str, partial: Path, target: Path, sha256: str | None) -> None:
    if sha256 is not None and (found := file_sum(partial)) != sha256:
        partial.unlink()
        raise PropagationError(f"expected sha256 {sha256} of {url}, found {found}; the file was removed, try again")
    os.replace(partial, target)


def _fetch(url: str, partial: Path) -> None:
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if not done or error.code != _RANGE_NOT_SATISFIABLE:
            raise
        # The partial file is as long as the whole one, or longer: neither can be continued.
        partial.unlink()
        response = urllib.request.urlopen(url, timeout=60)
        done = 0
    with response:
        resumed = getattr(response, "status", None) == _PARTIAL_CONTENT
        _save(response, partial, done if resumed else 0)


def _save(response: IO[bytes], partial: Path, done: int) -> None:
    length = getattr(response, "headers", {}).get("Content-Length")
    total = done + int(length) if length else None
    label = partial.name.removesuffix(".part")
    with (
        partial.open("ab" if done else "wb") as stream,
        tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=label) as bar,
    ):
        while chunk := response.read(_CHUNK):
            stream.write(chunk)
            bar.update(len(chunk))
    if total is not None and partial.stat().st_size < total:
        raise OSError(f"{partial.stat().st_size} of {total} bytes; run it again to continue")
