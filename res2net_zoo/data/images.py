"""Finding image files, decoding them, and applying timm's transform.

This module does not import `datasets`, which is slow and not needed to read individual files.
"""

import contextlib
import fnmatch
import glob
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import open_regular, read_bytes

# Supported formats, in the order in which Pillow tries them, and their extensions, by which images are found in folders
# (case-insensitive). Pillow detects a format by content rather than name, and would pass EPS to Ghostscript, which
# executes it. MPO is opened as JPEG.
EXTENSIONS_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
FORMATS = tuple(EXTENSIONS_OF)
EXTENSIONS = frozenset(extension for extensions in EXTENSIONS_OF.values() for extension in extensions)

# Created by file managers, storage systems, archivers and notebooks, in addition to names that begin with a dot.
SYSTEM_FOLDERS = frozenset(("@eadir", "__macosx", "#recycle", "#snapshot", "@tmp", "$recycle.bin", "lost+found"))
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))

# What a search skips, in addition to files that are not images.
HIDDEN = "hidden or system folders"
LINKS = "links to parent folders or folders already included"

LARGEST = 2**30  # bytes of an image file

# Largest number of pixels per byte: a JPEG needs at least one bit for 8 x 8 pixels; a bitmap has up to 8 pixels per
# byte, which deflate (PNG) compresses at most 1032 times and run-length encoding (BMP) 16 times. Other formats can
# store a single-colour image of any size in a few bytes.
PIXELS_PER_BYTE = {"JPEG": 512, "MPO": 512, "PPM": 8, "PNG": 8 * 1032, "BMP": 8 * 16}

# An image of more than twice `Image.MAX_IMAGE_PIXELS` (179 million pixels) is an error; a smaller one is read.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or belongs to the system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | SYSTEM_FILES


def is_image(name: str) -> bool:
    """Return whether a file name has the extension of a supported image format."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


class Skipped:
    """What a search for images skipped, by kind, with an example of each.

    Attributes:
        files: Files that are not images.
        kinds: Number and first example of each kind.
    """

    def __init__(self) -> None:
        self.files: list[str] = []
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, path: str) -> None:
        """Count a skipped item; the kind is given in the plural."""
        number, first = self.kinds.get(kind, (0, path))
        self.kinds[kind] = (number + 1, first)

    def add_file(self, path: str) -> None:
        """Count a skipped file by its extension."""
        end = os.path.splitext(path)[1].lower()
        self.add(f"{end} files" if end else "files without an extension", path)
        self.files.append(path)

    def __str__(self) -> str:
        """Return the counts as text; empty if nothing was skipped."""
        return ", ".join(f"{kind}: {number} (such as {first})" for kind, (number, first) in self.kinds.items())


def identity(path: str | os.PathLike) -> tuple[int, int]:
    """Return a unique identifier of a file or folder, which does not depend on the path to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def walk(folder: str, seen: set[tuple[int, int]], skipped: Skipped) -> Iterator[tuple[str, str]]:
    """Yield folder and name of each file in a folder, recursively, following links, in any order.

    Hidden and system files are skipped.

    Args:
        folder: The folder to search, even if it is in `seen`.
        seen: `identity` of folders that are not searched (again); searched folders are added. Links to parents
            of `folder` are never followed.
        skipped: Counts hidden and system folders and repeated links.

    Raises:
        InputError: A folder cannot be read.
    """
    above = {identity(parent) for parent in Path(folder).resolve().parents}
    folders: list[str] = []
    links: list[str] = []
    here: str | None = folder
    while here:
        key = identity(here)
        if here != folder and (key in seen or key in above):
            skipped.add(LINKS, here)
        else:
            seen.add(key)
            try:
                entries = list(os.scandir(here))
            except OSError as error:
                raise InputError(f"cannot read the folder {here}: {error.strerror}") from error
            for entry in entries:
                if not _is_folder(entry):
                    if not is_hidden(entry.name):
                        yield here, entry.name
                elif is_hidden(entry.name):
                    skipped.add(HIDDEN, entry.path)
                else:
                    (links if entry.is_symlink() else folders).append(entry.path)
        # Links are followed last, so that files are found by their real path if possible.
        here = folders.pop() if folders else links.pop() if links else None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reported when it is read
        return False


def images_below(folder: str, seen: set[tuple[int, int]], skipped: Skipped) -> list[str]:
    """Return the images that `walk` finds, sorted; other files are counted in `skipped`."""
    images = []
    for place in sorted(walk(folder, seen, skipped)):
        path = os.path.join(*place)
        if is_image(path):
            images.append(path)
        else:
            skipped.add_file(path)
    return images


def find_images(words: list[str]) -> list[str]:
    """Return the image files given on a command line, each once, in that order.

    A warning on the main process counts the other files in the folders.

    Args:
        words: Files, folders (searched recursively) and patterns.

    Raises:
        InputError: No image is found for one of the words.
    """
    found: dict[tuple[str, str], str] = {}
    skipped = Skipped()
    for word in words:
        matches = _matches(word, skipped)
        images = []
        for match in matches:
            images += images_below(match, set(), skipped) if os.path.isdir(match) else [match]
        if not images:
            kind = "file that matches the pattern" if glob.has_magic(word) else "file or folder"
            raise InputError(f"there is no {'image in' if matches else kind} {word}")
        real = {folder: os.path.realpath(folder) for folder in {os.path.dirname(image) for image in images}}
        for image in images:
            folder, name = os.path.split(image)
            found.setdefault((real[folder], name), image)
    if skipped.kinds:
        warn(f"skipped: {skipped}")
    return list(found.values())


def _matches(word: str, skipped: Skipped) -> list[str]:
    """Return the files and folders that match a word of the command line.

    This is `glob.glob`, except that `**` follows no link twice, and hidden and system folders do not match.
    """
    for path in (word, os.path.expanduser(word)):
        if os.path.exists(path):
            return [path]
    head, deep, tail = os.path.expanduser(word).partition("**")
    if not deep or (head and not head.endswith(os.sep)):
        return [match for match in sorted(glob.glob(head + deep + tail)) if not is_hidden(os.path.basename(match))]
    pattern = ("**" + tail).split(os.sep)
    found = []
    for folder in sorted(glob.glob(head)) if head else [os.curdir]:
        for here, name in sorted(walk(folder, set(), skipped)):
            path = os.path.normpath(os.path.join(here, name))
            if _fits(os.path.relpath(path, folder).split(os.sep), pattern):
                found.append(path)
    return found


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """Return whether a path matches a pattern, in which `**` matches any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _fits(parts, pattern[1:] or ["*"]) or (len(parts) > 1 and _fits(parts[1:], pattern))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


@contextlib.contextmanager
def open_image(source: str | os.PathLike | bytes) -> Iterator[Image.Image]:
    """Open an image in one of the supported formats (`FORMATS`).

    Args:
        source: A file, or its content.

    Yields:
        The image, not decoded yet.

    Raises:
        InputError: The file is missing or not a regular file.
        OSError: It is not an image, is damaged, or declares more pixels than its bytes can hold.
        Exception: Other errors of Pillow for a damaged image (`DecompressionBombError`, `SyntaxError`, ...).
    """
    with (
        io.BytesIO(source) if isinstance(source, bytes) else open_regular(Path(source)) as file,
        Image.open(file, formats=FORMATS) as image,
    ):
        size = len(source) if isinstance(source, bytes) else os.fstat(file.fileno()).st_size
        width, height = image.size
        if width * height > size * PIXELS_PER_BYTE.get(image.format or "", math.inf):
            raise OSError(f"it declares {width} x {height} pixels, more than its {size:,} bytes can hold")
        yield image


def check_mode(image: Image.Image) -> None:
    """Check that the pixels of an image can be converted to 8 bits.

    Args:
        image: An image from `open_image`; need not be decoded.

    Raises:
        OSError: The pixels are floating-point, signed or 32-bit numbers, whose range is unknown.
    """
    sixteen_bits = image.format in ("PNG", "PPM")  # Pillow uses a 32-bit mode for their 16 bits
    if image.mode == "F" or (image.mode == "I" and not sixteen_bits):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise OSError(f"{kind} pixels are unsupported, as their range is unknown; convert it to 8 or 16 bits")


def to_mode(image: Image.Image, mode: str, upright: bool = False) -> Image.Image:
    """Convert an image to an 8-bit mode.

    This is `Image.convert`, which timm uses, except for 16-bit grey images: Pillow would clip them at 255, whereas
    here the full range of 0 to 65535 is scaled to 0 to 255 and rounded.

    Args:
        image: An image from `open_image`.
        mode: PIL mode, `RGB` or `L`.
        upright: Whether to apply the EXIF orientation first, which timm does not.

    Returns:
        The decoded image.

    Raises:
        OSError: As for `check_mode`.
        Exception: Any error of Pillow for a corrupt image.
    """
    check_mode(image)
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8))
    return image.convert(mode)


class ForeignPathError(InputError):
    """A path in a dataset that is outside of the data's folder."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"its path {path} is not a relative path below the data's folder; store the image's bytes in the data"
        )


@dataclass(frozen=True)
class ImageFiles:
    """The files that may be read for the images of a dataset that stores paths instead of content.

    The paths in a dataset are untrusted. Passed to fsspec, they would select a protocol, and thereby a host to
    send requests to or a template to render.

    Attributes:
        folder: Folder for relative paths, which must not leave it; None to refuse relative paths.
        listed: Allowed prefixes of absolute paths and `hf://` URLs: the data's own folder, cache or
            repository.
    """

    folder: Path | None = None
    listed: tuple[str, ...] = ()

    def read(self, image: dict[str, Any]) -> bytes:
        """Return the content of an undecoded image of `datasets`.

        Args:
            image: `bytes` or, if they are None, `path`.

        Raises:
            ForeignPathError: The path is outside of the allowed folders.
            InputError: Both are missing, or the file cannot be read.
        """
        if image["bytes"] is not None:
            return image["bytes"]
        path = image["path"]
        if not path:
            raise InputError("it has neither content nor a path")
        if "://" not in path and "::" not in path:
            return read_bytes(self._local(path), LARGEST)
        # `datasets` uses zip://MEMBER::ARCHIVE for a member of an archive.
        member, _, archive = path.removeprefix("zip://").rpartition("::")
        hops = path.startswith("zip://") == bool(member)
        if not hops or "::" in member or "://" in member or not archive.startswith(self.listed):
            raise ForeignPathError(path)
        import fsspec

        with fsspec.open(path) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise InputError(f"cannot read {path}: it is larger than the limit of {LARGEST:,} bytes")
        return content

    def _local(self, path: str) -> Path:
        if os.path.isabs(path):
            if os.path.normpath(path).startswith(self.listed):
                return Path(path)
        elif self.folder is not None:
            file, folder = (self.folder / path).resolve(), self.folder.resolve()
            if file.is_relative_to(folder):
                return file
        raise ForeignPathError(path)


def read_named(image: dict[str, Any]) -> bytes:
    """Return the content of an image: its `bytes` or, if they are None, the file `path`, given by the user.

    Raises:
        InputError: The file cannot be read.
    """
    return read_bytes(image["path"], LARGEST) if image["bytes"] is None else image["bytes"]


def decode(content: bytes, mode: str) -> Image.Image:
    """Decode an image as timm's datasets do: without applying the EXIF orientation, and converted by `to_mode`.

    Args:
        content: The content of an image file.
        mode: PIL mode, `RGB` or `L`.

    Returns:
        The decoded image.

    Raises:
        Exception: Any error of Pillow for a corrupt image.
    """
    with open_image(content) as opened:
        return to_mode(opened, mode)


def reason_of(error: Exception) -> str:
    """Return why an image cannot be decoded, for a message."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a supported format"  # Pillow's message has the repr of a file object
    return str(error) or type(error).__name__


@dataclass
class Sample:
    """A transformed image with its target, or an error.

    Attributes:
        place: Its position in the data, for messages.
        image: (C, H, W), or None in case of an error.
        target: The target that `Samples` computes from label and path.
        corrupt: Why the image could not be decoded.
        fatal: Another error, of the label or the data's file, which makes any result wrong.
        index: Its index in map-style training data.
    """

    place: str
    image: torch.Tensor | None = None
    target: Any = None
    corrupt: str | None = None
    fatal: str | None = None
    index: int | None = None


class Samples:
    """Decodes and transforms rows. Errors are returned, because workers would obscure raised ones.

    Args:
        transform: Transforms a PIL image to a (C, H, W) tensor.
        mode: PIL mode to convert the image to first.
        target: Returns the target for a row's label and path; if it raises an `InputError`, that becomes
            the sample's `fatal`.
        read: Returns the content of a row's undecoded image: `ImageFiles.read` or `read_named`.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], torch.Tensor],
        mode: str,
        target: Callable[[int | None, str | None], Any],
        read: Callable[[dict[str, Any]], bytes],
    ) -> None:
        self.transform = transform
        self.mode = mode
        self.target = target
        self.read = read

    def __call__(self, place: str, row: dict[str, Any]) -> Sample:
        """Return the sample of a row."""
        image = row["image"] or {"bytes": b"", "path": None}
        path = image["path"]
        sample = Sample(f"{place} ({path})" if path else place)
        try:
            sample.target = self.target(row.get("label"), path)
        except InputError as error:
            sample.fatal = str(error)
            return sample
        try:
            content = self.read(image)
            sample.image = self.transform(decode(content, self.mode))
        except Exception as error:
            # Pillow may raise almost anything for a damaged file: OSError, SyntaxError, struct.error, ...
            # A file that cannot be read over the network is not considered damaged.
            reason = reason_of(error)
            if isinstance(error, ForeignPathError):
                sample.fatal = reason
            elif image["bytes"] is None and "://" in (path or ""):
                sample.fatal = f"cannot be read: {reason}"
            else:
                sample.corrupt = reason
        return sample


class MapSamples(torch.utils.data.Dataset):
    """Samples of the rows of a map-style dataset whose numbers are in `indices`."""

    def __init__(self, rows: Any, samples: Samples, indices: Sequence[int]) -> None:
        self.rows = rows
        self.samples = samples
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        index = self.indices[i]
        return self.samples(f"image {index}", self.rows[index])
