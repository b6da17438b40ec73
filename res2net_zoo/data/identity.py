"""Hashes that change with the data, without reading all of it."""

import glob
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.utils.errors import InputError, one_line

if TYPE_CHECKING:
    import datasets

    from res2net_zoo.data.sources import Source

CHUNK = 10_000  # rows read at once, so that memory does not grow with the data


def files_sha256(paths: Iterable[str]) -> str:
    """Return a hash of the names, sizes and modification times of files."""
    digest = hashlib.sha256()
    for path in paths:
        stat = os.stat(path) if os.path.exists(path) else None
        digest.update(os.fsencode(path) + (f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode() if stat else b"\0-\0"))
    return digest.hexdigest()


def source_sha256(source: "Source") -> str | None:
    """Return a hash of the images and labels of a map-style source, as `rows_sha256`; None for a stream."""
    import datasets

    from res2net_zoo.data.sources import labels_of

    if not isinstance(source.rows, datasets.Dataset):
        return None
    digest = hashlib.sha256(json.dumps([source.class_names, source.num_rows]).encode())
    if "label" in source.rows.features:
        digest.update(labels_of(source).tobytes())
    _add_images(digest, source.rows)
    return digest.hexdigest()


def rows_sha256(rows: "datasets.Dataset") -> str:
    """Return a hash of the images of a map-style dataset.

    For image files, it covers names, sizes and modification times; for other data, the fingerprint of `datasets`, which
    depends on modification times.
    """
    digest = hashlib.sha256(str(len(rows)).encode())
    _add_images(digest, rows)
    return digest.hexdigest()


def _add_images(digest: Any, rows: "datasets.Dataset") -> None:
    from res2net_zoo.utils.private_apis import fingerprint_of

    first = rows[0]["image"] if len(rows) else None
    if not first or first["bytes"] is not None:
        digest.update(fingerprint_of(rows).encode())
        return
    for start in range(0, len(rows), CHUNK):
        for image in rows[start : start + CHUNK]["image"]:
            stat = os.stat(image["path"]) if image and os.path.exists(image["path"]) else None
            digest.update(f"{image} {stat.st_size} {stat.st_mtime_ns}".encode() if stat else b"-")


def stream_sha256(src: str) -> str | None:
    """Return a hash of the local files that a stream is read from, or of its revision on the Hub.

    Args:
        src: As for `open_source`.

    Raises:
        InputError: The Hub cannot be reached.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        return files_sha256(sorted(os.path.join(here, name) for here, _, names in os.walk(path) for name in names))
    if matches := sorted(glob.glob(str(path))):
        return files_sha256(matches)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        return HfApi().dataset_info(src).sha
    except (HTTPError, OSError) as error:
        raise InputError(f"cannot find the revision of {src} on the Hub: {one_line(error)}") from error
