"""Memories on object storage, `s3://bucket/prefix`: a local folder of each has its serving images and locks."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import icechunk

from treemem.config import cache_folder
from treemem.errors import InputError

_URL = re.compile(r"s3:/{1,2}(?=[^/])")
_FILE = "remote"
OPTIONS = ("endpoint", "region")
"""What a URL may say behind its `?`, in place of AWS_ENDPOINT_URL and AWS_REGION."""


def local_side(memory: str | Path) -> Path:
    """The local folder of a memory: its own where it lies on a disk, one among the user's caches where it is remote.

    Raises InputError for a URL that names no bucket, or a scheme that is not known.
    """
    text = str(memory)
    if not _URL.match(text):
        if re.match(r"[a-z][a-z0-9+]+://", text):
            raise InputError(f"{text}: only s3://bucket/prefix and folders are known")
        return Path(memory)
    url = _URL.sub("s3://", text, count=1)
    parts = urlsplit(url)
    unknown = parse_qs(parts.query).keys() - set(OPTIONS)
    if not parts.netloc or not parts.path.strip("/") or unknown:
        raise InputError(f"{url}: give s3://bucket/prefix, with ?endpoint=URL and &region=NAME where they are needed")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{parts.netloc}{parts.path}").strip("-")[:60]
    folder = cache_folder() / "remote" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _FILE).exists():
        (folder / _FILE).write_text(url)
    return folder


def url_of(path: Path) -> str | None:
    """The URL of the memory whose local folder this is, None where it lies in the folder itself."""
    try:
        return (path / _FILE).read_text()
    except OSError:
        return None


def named(path: Path) -> str:
    """What a memory is called in messages."""
    return url_of(path) or str(path)


def is_local_part(name: str) -> bool:
    """Whether a file or folder of this name belongs to the local side of a remote memory."""
    return name in (_FILE, "cache", "training")


def storage_of(path: Path) -> icechunk.Storage:
    """Where the repository of a memory lies. Credentials are found as the AWS tools find them."""
    url = url_of(path)
    if url is None:
        return icechunk.local_filesystem_storage(str(path / "store"))
    parts = urlsplit(url)
    given = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    endpoint = given.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = given.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return icechunk.s3_storage(
        bucket=parts.netloc,
        prefix=parts.path.strip("/"),
        region=region or "us-east-1",
        endpoint_url=endpoint,
        allow_http=bool(endpoint and endpoint.startswith("http://")),
        force_path_style=endpoint is not None,
        from_env=True,
    )
