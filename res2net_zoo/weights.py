"""Fetching, checking and converting an original's file: from a catalogue entry to a safetensors file."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

from res2net_zoo import catalog, convert
from res2net_zoo.catalog import Checkpoint
from res2net_zoo.hub import one_line, patiently
from res2net_zoo.program import WEIGHTS, InputError, sha256_of, write_atomically


def save_weights(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors as safetensors, the same bytes every time.

    Args:
        tensors: The tensors, contiguous and on the CPU.
        path: The file.
        metadata: What the file is to say of itself.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error  # a full disk, say
    with path.open("r+b") as file:
        # safetensors writes the metadata in an order that changes from run to run.
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise AssertionError("the header of a safetensors file has grown by being sorted")
        file.seek(8)
        file.write(text.ljust(size))


def read_original(
    path: Path, checkpoint: Checkpoint, source: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Check and convert an original's file.

    Args:
        path: The file.
        checkpoint: Which of the catalogue's it is.
        source: The URL that it came from, None for a file that somebody had.

    Returns:
        The state dict, and what its safetensors file is to say of itself.

    Raises:
        InputError: Its hash is not the released one, or it does not fit the model.
    """
    import timm

    from res2net_zoo.dla import drop_unread

    try:
        digest = sha256_of(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not digest.startswith(checkpoint.sha256):
        raise InputError(
            f"{source or path} is not the released {checkpoint.name}: "
            f"its SHA-256 is {digest}, not {checkpoint.sha256}..."
        )
    with torch.device("meta"):
        target = timm.create_model(checkpoint.architecture, num_classes=checkpoint.num_classes).state_dict()
    is_dla = checkpoint.architecture.startswith("dla")
    nothing = torch.empty(0)
    state = convert.convert(path, checkpoint.format, target, lambda name: is_dla and not drop_unread({name: nothing}))
    if source is None:  # only its hash can tell that it is what is found at the catalogue's URL
        source = checkpoint.url if checkpoint.sha256 and checkpoint.url else f"a file called {path.name}"
    metadata = {"source": source, "source_sha256": digest, "converter": convert.VERSION}
    return state, metadata


def download(url: str, path: Path, headers: dict[str, str] | None = None, size: int | None = None) -> None:
    """Download a file, going on where a connection, or an earlier call, broke off.

    Args:
        url: Where it is.
        path: Where to put it; what is there already is taken for its beginning.
        headers: What else to tell the server.
        size: How many bytes there should be, if known.

    Raises:
        InputError: It cannot be had.
    """

    def go_on() -> None:
        done = path.stat().st_size if path.exists() else 0
        name = url.rpartition("/")[2]
        with path.open("ab") as file:
            try:
                http_get(url, file, resume_size=done, headers=headers, expected_size=size, displayed_filename=name)
            except HfHubHTTPError as error:
                if error.response.status_code != 416:  # nothing is left to be fetched
                    raise

    try:
        patiently(go_on)
    except OfflineModeIsEnabled as error:
        raise InputError(f"cannot download {url}: HF_HUB_OFFLINE is set; unset it") from error
    except HTTPError as error:
        raise InputError(f"cannot download {url}: {one_line(error)}; run it again to go on") from error
    except OSError as error:
        if error.errno is not None:
            reason = error.strerror or error
            raise InputError(f"cannot write {path}: {reason}; make room and run it again to go on") from error
        # The client's own: there are fewer bytes than there should be, or more.
        path.unlink(missing_ok=True)
        raise InputError(f"what came from {url} has not the size that it should have; run it again") from error


@contextlib.contextmanager
def original(url: str, cache_dir: str | Path | None = None) -> Iterator[Path]:
    """Download an original's file, for as long as it is needed, in one process at a time.

    A download that breaks off is kept in the cache, and the next call goes on with it.

    Args:
        url: Where it is.
        cache_dir: Where the cache is, if not in its usual place.

    Yields:
        The file.

    Raises:
        InputError: It cannot be had.
    """
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = cached_assets_path("res2net_zoo", "originals", key, assets_dir=cache_dir)
    path = folder / "original.part"
    with WeakFileLock(folder / ".lock"):
        download(url, path)
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def converted(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """Return a converted weight: the mirror's, the cache's, or fetched and converted now, once for all processes.

    Args:
        name: `arch.tag`, or `arch` for its default.
        cache_dir: Where the cache is, if not in its usual place.

    Returns:
        The safetensors file, or None where the catalogue knows no such weight.

    Raises:
        InputError: It is not in the mirror, cannot be fetched, or is not the right one.
    """
    checkpoint = catalog.load().checkpoint(name)
    if checkpoint is None:
        return None
    if mirror := os.environ.get("RES2NET_ZOO_MIRROR"):
        file = Path(mirror) / checkpoint.name / WEIGHTS
        if not file.is_file():
            raise InputError(
                f"the mirror {mirror} has no {checkpoint.name}/{WEIGHTS}; unset RES2NET_ZOO_MIRROR or add it"
            )
        return file
    folder = cached_assets_path("res2net_zoo", "converted", checkpoint.name, assets_dir=cache_dir)
    file = folder / WEIGHTS
    if file.exists():
        return file
    if not checkpoint.url:
        raise InputError(
            f"{checkpoint.name} is no direct download ({checkpoint.notes}); `python hub/convert.py --model "
            f"{checkpoint.name} --checkpoint FILE --output DIR` makes a folder of it, to load as local-dir:DIR"
        )
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{checkpoint.name} is not in the cache and HF_HUB_OFFLINE is set; where there is a network, "
            f"`python hub/convert.py --model {checkpoint.name} --output DIR` fetches it"
        )
    with WeakFileLock(folder / ".lock"):
        if not file.exists():
            fetch(checkpoint, folder, cache_dir)
    return file


def fetch(checkpoint: Checkpoint, folder: Path, cache_dir: str | Path | None = None) -> None:
    """Download a checkpoint's original and leave it as safetensors in a folder.

    Raises:
        InputError: It cannot be had or is not the right one; then nothing wrong is left.
    """
    with original(checkpoint.url, cache_dir) as path:
        state, metadata = read_original(path, checkpoint, checkpoint.url)
    try:
        write_atomically(folder / WEIGHTS, lambda path: save_weights(state, path, metadata))
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror or error}") from error
    if not checkpoint.sha256:
        warnings.warn(
            f"no hash of {checkpoint.url} was ever published, so it could not be checked; "
            f"the SHA-256 of what came is {metadata['source_sha256']}, recorded in {folder / WEIGHTS}",
            stacklevel=2,
        )
