"""Mirrors: the catalogue's checkpoints as model folders, for machines without internet access."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock
from huggingface_hub.utils import WeakFileLock

from res2net_zoo.catalog import Checkpoint
from res2net_zoo.utils import hub_client
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import check_can_make, sweep
from res2net_zoo.weights import bill_of_materials, downloads, fingerprint, signature
from res2net_zoo.weights.model_folder import write_converted
from res2net_zoo.weights.verification import Check, verify

PARTIAL = ".partial"


def mirror(checkpoint: Checkpoint, root: Path, trust: signature.Trust | None = None) -> str:
    """Download a checkpoint to a mirror, as the folder ROOT/ARCH.TAG that `RES2NET_ZOO_MIRROR=ROOT` reads.

    The source is its repository on the Hub or, if it has none, its release. Partial downloads are
    resumed. The folder is created atomically.

    Args:
        checkpoint: The checkpoint.
        root: The mirror.
        trust: The required signer of the folder; None to accept unsigned folders.

    Returns:
        A description of the source.

    Raises:
        SignatureError: The folder is not signed as it must be.
        InputError: The download fails, differs from the catalogue, or cannot be written.
    """
    folder = root / checkpoint.name
    if folder.is_dir():
        _check_signature(folder, checkpoint, trust)
        if failed := _damages(folder, checkpoint):
            raise InputError(f"{folder} is damaged ({failed[0].what}: {failed[0].found}); remove it and run this again")
        return "already present"
    try:
        if checkpoint.hub_id:
            return _from_hub(checkpoint, root, trust)
        if trust:
            raise signature.SignatureError(f"{checkpoint.name} is converted from its release, which is not signed")
        if not checkpoint.url:
            raise InputError(
                f"{checkpoint.name} has no direct download: {checkpoint.notes}; convert a local copy into {folder} "
                "with `res2net-zoo convert`"
            )
        with downloads.original(checkpoint.url) as path:
            state, metadata = downloads.read_original(path, checkpoint, checkpoint.url)
            write_converted(folder, checkpoint, state, metadata)
    except OSError as error:
        raise InputError(f"cannot write into {root}: {error.strerror or error}; run it again to continue") from error
    return f"converted from {checkpoint.released_by}"


def _from_hub(checkpoint: Checkpoint, root: Path, trust: signature.Trust | None) -> str:
    info = hub_client.model_info(checkpoint.hub_id)
    if trust and signature.NAME not in {file.rfilename for file in info.siblings or []}:
        raise signature.SignatureError(f"{checkpoint.name} is refused: {checkpoint.hub_id} is not signed")
    sha = info.sha or ""
    partial = root / PARTIAL / checkpoint.name
    hub_client.fetch_repository(checkpoint.hub_id, sha, partial)
    for unfinished in partial.rglob("*.part"):  # from an earlier commit
        unfinished.unlink()
    try:
        _check_signature(partial, checkpoint, trust)
    except InputError:
        shutil.rmtree(partial)
        _remove_if_empty(partial.parent)
        raise
    try:
        failed = _damages(partial, checkpoint)
    except InputError as error:
        raise InputError(f"{checkpoint.hub_id} at {sha[:12]} is not {checkpoint.name}: {error}") from error
    if failed:
        what, found, expected, _ = failed[0]
        shutil.rmtree(partial)
        raise InputError(f"{checkpoint.hub_id} is not {checkpoint.name}: {what} is {found}, not {expected}")
    # The download has been verified, so later checks can rely on what is added; a signed folder must stay as it is.
    if not (partial / signature.NAME).exists():
        if not (partial / fingerprint.NAME).exists():
            fingerprint.write(partial)
        if not (partial / bill_of_materials.NAME).exists():
            bill_of_materials.write(partial)
    partial.rename(root / checkpoint.name)
    _remove_if_empty(partial.parent)
    return f"Hub {checkpoint.hub_id} at {sha[:12]}"


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty: other downloads are in progress
        folder.rmdir()


def _check_signature(folder: Path, checkpoint: Checkpoint, trust: signature.Trust | None) -> None:
    """Check a folder's signature before anything else is read.

    Raises:
        SignatureError: It is not signed as it must be.
        InputError: Its signature cannot be read.
    """
    if trust and not (result := signature.check(folder, trust)).passed:
        raise signature.SignatureError(f"{checkpoint.name} is refused: it is not {result.expected}: {result.found}")


def _damages(folder: Path, checkpoint: Checkpoint) -> list[Check]:
    """Return the failed checks of a folder, except preprocessing and card, which the Hub's copy need not have."""
    return [c for c in verify(folder, checkpoint) if c.passed is False and c.what not in ("preprocessing", "card")]


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Create a mirror if it does not exist, and lock it against other programs.

    Raises:
        InputError: The mirror cannot be created, or another program is writing to it.
    """
    check_can_make(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(root / ".lock", timeout=1):
            sweep(root)
            yield
    except filelock.Timeout as error:
        raise InputError(f"another program is writing into {root}; wait for it") from error
    except OSError as error:
        raise InputError(f"cannot write into {root}: {error.strerror or error}") from error
