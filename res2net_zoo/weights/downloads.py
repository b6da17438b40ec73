"""Download, verify and convert the original file of a checkpoint to safetensors."""

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

from res2net_zoo import catalog
from res2net_zoo.catalog import Checkpoint
from res2net_zoo.utils import hub_client
from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import sha256_of, write_atomically
from res2net_zoo.weights import backbone, convert
from res2net_zoo.weights.backbone import Backbone


def save_weights(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors as safetensors; the same input gives the same bytes.

    Args:
        tensors: The tensors, contiguous and on the CPU.
        path: The file.
        metadata: Metadata of the file.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error  # for example a full disk
    with path.open("r+b") as file:
        # safetensors writes the metadata in an arbitrary order.
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise AssertionError("the header of a safetensors file has grown by being sorted")
        file.seek(8)
        file.write(text.ljust(size))


class WrongFileError(InputError):
    """A file that is damaged or not the expected one."""


def read_original(
    path: Path, checkpoint: Checkpoint, source: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Verify and convert an original weight file.

    A download must be the released file. A local file may differ, for example if it was fine-tuned with the
    original code; this is reported by a warning and recorded in the metadata (see `is_released`).

    Args:
        path: The file.
        checkpoint: The checkpoint whose architecture and format the file has.
        source: The URL of a download; None for a local file.

    Returns:
        The state dict, and the metadata for its safetensors file.

    Raises:
        WrongFileError: The hash is not the released one, or the weights do not fit the model.
        InputError: The file cannot be read.
    """
    import timm

    name = hub_client.shown(source) if source else str(path)
    convert.check_file(path)
    digest = sha256_of(path)
    released = digest.startswith(checkpoint.sha256)
    other = f"{name} is not the released {checkpoint.name}: its SHA-256 is {digest}, not {checkpoint.sha256}..."
    if source and not released:
        raise WrongFileError(other)
    with torch.device("meta"):
        target = timm.create_model(checkpoint.architecture, num_classes=checkpoint.num_classes).state_dict()
    is_dla = checkpoint.architecture.startswith("dla")
    try:
        state = convert.convert(
            path, checkpoint.format, target, lambda key: is_dla and key.startswith(convert.UNREAD_BY_DLA)
        )
    except InputError as error:
        hint = f"to find a {checkpoint.architecture} in another checkpoint, name the model without its tag"
        also = "" if released else f"; {other}; {hint}"
        raise WrongFileError(str(error).replace(str(path), name) + also, *["model"] * bool(also)) from error
    if not source:  # the catalogue's URL is recorded only if the hash confirms it
        known = released and checkpoint.sha256 and checkpoint.url
        name = checkpoint.url if known else f"a file called {path.name}"
    if not released:
        warn(f"{other}; it is converted without the release's name, licence and accuracies")
    metadata = {"source": name, "source_sha256": digest, "converter": convert.VERSION}
    return state, metadata


def is_released(checkpoint: Checkpoint, metadata: dict[str, str]) -> bool:
    """Return whether a converted file is the released one, according to the published digits of its hash."""
    return metadata["source_sha256"].startswith(checkpoint.sha256)


def released_as(path: Path, architecture: str | None = None, wiring: str | None = None) -> Checkpoint | None:
    """Return the checkpoint of the catalogue that a file was released as, according to its hash; None if none.

    Args:
        path: The file.
        architecture: The architecture that it must have; default any.
        wiring: The wiring that it must have; default any.
    """
    convert.check_file(path)
    digest = sha256_of(path)
    for checkpoint in catalog.load().checkpoints.values():
        if checkpoint.sha256 and digest.startswith(checkpoint.sha256):
            if architecture not in (None, checkpoint.architecture):
                continue
            if wiring in (None, backbone.known_models()[checkpoint.architecture].wiring or "official"):
                return checkpoint
    return None


def read_backbone(
    path: Path, prefix: str | None, wiring: str | None, architecture: str | None, source: str | None = None
) -> tuple[Backbone, dict[str, str]]:
    """Find the backbone in any checkpoint.

    Args:
        path: The file.
        prefix: The prefix, see `backbone.find`.
        wiring: The wiring.
        architecture: The architecture.
        source: The URL of a download; None for a local file.

    Returns:
        The backbone, and the metadata for its safetensors file.

    Raises:
        InputError: As `backbone.find`.
    """
    name = hub_client.shown(source) if source else f"a file called {path.name}"
    try:
        found = backbone.find(path, prefix, wiring, architecture)
    except InputError as error:
        raise InputError(str(error).replace(str(path), name if source else str(path)), *error.parameters) from error
    metadata = {"source": name, "source_sha256": sha256_of(path), "converter": convert.VERSION}
    return found, {**metadata, "prefix": found.prefix, "wiring": found.wiring}


@contextlib.contextmanager
def original(url: str, cache_dir: str | Path | None = None) -> Iterator[Path]:
    """Download an original file and delete it when the context exits; one process at a time.

    A partial download is kept in the cache, and the next call resumes it if the server still has the
    same file. A complete file is kept too if the context exits with an error.

    Args:
        url: The URL of the file.
        cache_dir: Cache folder; default huggingface_hub's assets cache.

    Yields:
        The path of the file.

    Raises:
        InputError: The download fails.
    """
    folder = hub_client.assets("originals", hashlib.sha256(url.encode()).hexdigest()[:16], cache_dir)
    with WeakFileLock(folder / ".lock"):
        identity = hub_client.identity(url)
        path = folder / f"original-{identity}.part"
        if identity is None:
            path.unlink(missing_ok=True)  # it may be part of a different file
        else:
            for other in set(folder.glob("*.part")) - {path}:
                other.unlink()  # an earlier version of the file
        hub_client.download(url, path)
        try:
            yield path
        except WrongFileError:
            path.unlink()
            raise
        with contextlib.suppress(OSError):
            path.unlink()


def converted(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> Path:
    """Return the converted weights of a checkpoint, from the mirror, the cache or its release.

    With several processes, one downloads and converts and the others wait.

    Args:
        checkpoint: The checkpoint.
        cache_dir: Cache folder; default huggingface_hub's assets cache.

    Returns:
        The path of the safetensors file.

    Raises:
        InputError: The mirror lacks it, the download fails, or the file is not the released one.
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
            f"{checkpoint.name} has no direct download ({checkpoint.notes}); convert a local copy with "
            "`res2net-zoo convert`, and load it as local-dir:DIR"
        )
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{checkpoint.name} is not in the cache and HF_HUB_OFFLINE is set; on a machine with a network, "
            "`res2net-zoo mirror` downloads it, to use here with RES2NET_ZOO_MIRROR=DIR"
        )
    with WeakFileLock(folder / ".lock"):
        if not file.exists():
            fetch(checkpoint, folder, cache_dir)
    return file


def fetch(checkpoint: Checkpoint, folder: Path, cache_dir: str | Path | None = None) -> None:
    """Download the original file of a checkpoint and write it to a folder as safetensors.

    Raises:
        InputError: The download fails or the file is not the released one; then nothing is written.
    """
    with original(checkpoint.url, cache_dir) as path:
        state, metadata = read_original(path, checkpoint, checkpoint.url)
        try:
            write_atomically(folder / WEIGHTS, lambda path: save_weights(state, path, metadata))
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror or error}") from error
    if not checkpoint.sha256:
        warnings.warn(
            f"{checkpoint.url} has no published hash and could not be verified; "
            f"the SHA-256 of the downloaded file is {metadata['source_sha256']}, recorded in {folder / WEIGHTS}",
            stacklevel=2,
        )
