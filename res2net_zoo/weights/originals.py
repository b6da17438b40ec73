"""Fetching, checking and converting an original's file: from a catalogue entry to a safetensors file."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

from res2net_zoo.catalog import Checkpoint
from res2net_zoo.utils import hub_client
from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import sha256_of, write_atomically
from res2net_zoo.weights import convert


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


class WrongFileError(InputError):
    """A file that is not the one that it should be, or is damaged."""


def read_original(
    path: Path, checkpoint: Checkpoint, source: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Check and convert an original's file.

    What is downloaded must be the released file. A local file may be another one, such as weights that
    were trained on with the original's code: a warning on stderr and its metadata (`is_released`) report that.

    Args:
        path: The file.
        checkpoint: Which of the catalogue's it is, or is a sibling of.
        source: The URL that it came from, None for a local file.

    Returns:
        The state dict, and what its safetensors file is to say of itself.

    Raises:
        WrongFileError: Its hash is not the released one, or it does not fit the model.
        InputError: It cannot be read.
    """
    import timm

    name = hub_client.shown(source) if source else str(path)
    convert.check_file(path)
    digest = sha256_of(path)
    other = f"{name} is not the released {checkpoint.name}: its SHA-256 is {digest}, not {checkpoint.sha256}..."
    if source and not digest.startswith(checkpoint.sha256):
        raise WrongFileError(other)
    with torch.device("meta"):
        target = timm.create_model(checkpoint.architecture, num_classes=checkpoint.num_classes).state_dict()
    is_dla = checkpoint.architecture.startswith("dla")
    try:
        state = convert.convert(
            path, checkpoint.format, target, lambda key: is_dla and key.startswith(convert.UNREAD_BY_DLA)
        )
    except InputError as error:
        also = "" if digest.startswith(checkpoint.sha256) else f"; {other}"
        raise WrongFileError(str(error).replace(str(path), name) + also) from error
    released = digest.startswith(checkpoint.sha256)
    if not source:  # only its hash can tell that it is what is found at the catalogue's URL
        known = released and checkpoint.sha256 and checkpoint.url
        name = checkpoint.url if known else f"a file called {path.name}"
    if not released:
        warn(f"{other}; it is converted without the release's name, licence and figures")
    metadata = {"source": name, "source_sha256": digest, "converter": convert.VERSION}
    return state, metadata


def is_released(checkpoint: Checkpoint, metadata: dict[str, str]) -> bool:
    """Tell whether a converted file is from the release, as far as its hash was ever published."""
    return metadata["source_sha256"].startswith(checkpoint.sha256)


@contextlib.contextmanager
def original(url: str, cache_dir: str | Path | None = None) -> Iterator[Path]:
    """Download an original's file, for as long as it is needed, in one process at a time.

    What a download that broke off has left is kept in the cache, and the next call goes on with it
    if the server still has the same file; so is a whole file that could not be put to use.

    Args:
        url: Where it is.
        cache_dir: Where the cache is, if not in its usual place.

    Yields:
        The file.

    Raises:
        InputError: It cannot be had.
    """
    folder = hub_client.assets("originals", hashlib.sha256(url.encode()).hexdigest()[:16], cache_dir)
    with WeakFileLock(folder / ".lock"):
        identity = hub_client.identity(url)
        path = folder / f"original-{identity}.part"
        if identity is None:
            path.unlink(missing_ok=True)  # it may be the beginning of another file
        else:
            for other in set(folder.glob("*.part")) - {path}:
                other.unlink()  # what the server had there before
        hub_client.download(url, path)
        try:
            yield path
        except WrongFileError:
            path.unlink()
            raise
        with contextlib.suppress(OSError):
            path.unlink()


def converted(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> Path:
    """Return a converted weight: the mirror's, the cache's, or fetched and converted now, once for all processes.

    Args:
        checkpoint: Which.
        cache_dir: Where the cache is, if not in its usual place.

    Returns:
        The safetensors file.

    Raises:
        InputError: It is not in the mirror, cannot be fetched, or is not the right one.
    """
    if mirror := os.environ.get("RES2NET_ZOO_MIRROR"):
        file = Path(mirror) / checkpoint.name / WEIGHTS
        if not file.is_file():
            raise InputError(
                f"the mirror {mirror} has no {checkpoint.name}/{WEIGHTS}; unset RES2NET_ZOO_MIRROR or add it"
            )
        return file
    folder = hub_client.assets("converted", f"{checkpoint.name}-v{convert.VERSION}", cache_dir)
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
            f"{checkpoint.name} is not in the cache and HF_HUB_OFFLINE is set; where there is a network, `python "
            f"hub/mirror.py --to DIR --model {checkpoint.name}` fetches it, for RES2NET_ZOO_MIRROR=DIR here"
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
