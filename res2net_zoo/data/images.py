"""From image files to samples that a model takes: finding, decoding, timm's transform.

Without `datasets`, whose import a program that reads files alone need not wait for.
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

# The extensions of raster formats, in the order in which these are tried, and in any letter case those by which images
# are found in folders. Pillow goes by a file's content, not its name, and passes EPS to Ghostscript, which runs it as
# a program. MPO is opened as JPEG.
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

# What file managers, storage systems, archivers and notebooks leave between images, besides names with a dot in front.
SYSTEM_FOLDERS = frozenset(("@eadir", "__macosx", "#recycle", "#snapshot", "@tmp", "$recycle.bin", "lost+found"))
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))

# What a search leaves out, besides files that are no images.
HIDDEN = "hidden or system folders"
LINKS = "links to folders that are read already or lie above"

LARGEST = 2**30  # bytes of an image file

# Pixels that one byte holds at most: a JPEG takes at least one bit for 8 x 8 pixels, a bitmap packs 8 in a byte, which
# deflate (PNG) makes at most 1032 times smaller, and run lengths (BMP) 16 times. The other formats can hold a plain
# image of any size in a few bytes.
PIXELS_PER_BYTE = {"JPEG": 512, "MPO": 512, "PPM": 8, "PNG": 8 * 1032, "BMP": 8 * 16}

# An image of more than twice `Image.MAX_IMAGE_PIXELS` (179 million pixels) is an error; a smaller one is read.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | SYSTEM_FILES


def is_image(name: str) -> bool:
    """Return whether a file of this name is taken for an image; where it is hidden it is not looked for."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


class Skipped:
    """What a search for images left out, by kind, with an example of each.

    Attributes:
        files: Files that are no images.
        kinds: Number and first example of each kind.
    """

    def __init__(self) -> None:
        self.files: list[str] = []
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, path: str) -> None:
        """Count something of a kind; the kind is in the plural."""
        number, first = self.kinds.get(kind, (0, path))
        self.kinds[kind] = (number + 1, first)

    def add_file(self, path: str) -> None:
        """Count a file by its extension."""
        end = os.path.splitext(path)[1].lower()
        self.add(f"{end} files" if end else "files without an extension", path)
        self.files.append(path)

    def __str__(self) -> str:
        """Return the counts as the end of a sentence, empty where nothing was left out."""
        return ", ".join(f"{kind}: {number} (such as {first})" for kind, (number, first) in self.kinds.items())


def identity(path: str | os.PathLike) -> tuple[int, int]:
    """Return what tells a file or folder from all others, by whatever path it is reached."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def walk(folder: str, seen: set[tuple[int, int]], skipped: Skipped) -> Iterator[tuple[str, str]]:
    """Yield the folder and name of each file in a folder and below it, behind links too, in any order.

    Hidden and system files are left out.

    Args:
        folder: Is searched, even if it is in `seen`.
        seen: `identity` of each folder that is not to be searched (again); what is searched is added. A link
            to a folder above `folder` is never followed.
        skipped: Where hidden and system folders and second links are counted.

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
        # Links come last, so that what can be reached without them is found by its own path.
        here = folders.pop() if folders else links.pop() if links else None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reading it reports that
        return False


def images_below(folder: str, seen: set[tuple[int, int]], skipped: Skipped) -> list[str]:
    """Return the images that `walk` finds by folder and name; the other files are counted in `skipped`."""
    images = []
    for place in sorted(walk(folder, seen, skipped)):
        path = os.path.join(*place)
        if is_image(path):
            images.append(path)
        else:
            skipped.add_file(path)
    return images


def find_images(words: list[str]) -> list[str]:
    """Return the image files that a command line names, each once, in its order.

    What the folders hold besides images is counted in one warning, on the main process.

    Args:
        words: Files, folders (searched with all that is in them) and patterns.

    Raises:
        InputError: A word names none.
    """
    found: dict[tuple[str, str], str] = {}
    skipped = Skipped()
    for word in words:
        matches = _matches(word, skipped)
        images = []
        for match in matches:
            images += images_below(match, set(), skipped) if os.path.isdir(match) else [match]
        if not images:
            kind = "file that fits the pattern" if glob.has_magic(word) else "file or folder"
            raise InputError(f"there is no {'image in' if matches else kind} {word}")
        real = {folder: os.path.realpath(folder) for folder in {os.path.dirname(image) for image in images}}
        for image in images:
            folder, name = os.path.split(image)
            found.setdefault((real[folder], name), image)
    if skipped.kinds and int(os.environ.get("RANK", "0")) == 0:
        warn(f"left out: {skipped}")
    return list(found.values())


def _matches(word: str, skipped: Skipped) -> list[str]:
    """Return the files and folders that a word of the command line names, as `glob.glob` does.

    But `**` follows no link twice, and hidden and system folders do not match.
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
    """Return whether a path fits a pattern, in which `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _fits(parts, pattern[1:] or ["*"]) or (len(parts) > 1 and _fits(parts[1:], pattern))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


@contextlib.contextmanager
def open_image(source: str | os.PathLike | bytes) -> Iterator[Image.Image]:
    """Open an image of a raster format (`FORMATS`), as every program of the zoo does.

    Args:
        source: A file, or its content.

    Yields:
        The image, not decoded yet.

    Raises:
        InputError: The file is missing or not a regular file.
        OSError: It is not an image, is damaged, or claims more pixels than its bytes can hold.
        Exception: What else Pillow raises for a damaged image (`DecompressionBombError`, `SyntaxError`, ...).
    """
    with (
        io.BytesIO(source) if isinstance(source, bytes) else open_regular(Path(source)) as file,
        Image.open(file, formats=FORMATS) as image,
    ):
        size = len(source) if isinstance(source, bytes) else os.fstat(file.fileno()).st_size
        width, height = image.size
        if width * height > size * PIXELS_PER_BYTE.get(image.format or "", math.inf):
            raise OSError(f"it claims {width} x {height} pixels, more than its {size:,} bytes can hold")
        yield image


def check_mode(image: Image.Image) -> None:
    """Refuse pixels that have no one meaning as 8-bit ones.

    Args:
        image: From `open_image`; need not be decoded.

    Raises:
        OSError: Its pixels are floating-point, signed or 32-bit numbers, of unknown range.
    """
    sixteen_bits = image.format in ("PNG", "PPM")  # Pillow has their 16 bits in a wider mode
    if image.mode == "F" or (image.mode == "I" and not sixteen_bits):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise OSError(f"{kind} pixels are unsupported, as their range is unknown; convert it to 8 or 16 bits")


def to_mode(image: Image.Image, mode: str, upright: bool = False) -> Image.Image:
    """Convert an image to a mode of 8 bits.

    As `Image.convert`, which timm calls, but for grey images of 16 bits: Pillow would clip them at 255, here
    their whole range of 0 to 65535 becomes 0 to 255, rounded, whatever part of it an image uses.

    Args:
        image: From `open_image`.
        mode: PIL mode, `RGB` or `L`.
        upright: Whether to turn it by its EXIF orientation first, which timm does not.

    Returns:
        The decoded image.

    Raises:
        OSError: As `check_mode`.
        Exception: Whatever PIL raises for a corrupt image.
    """
    check_mode(image)
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8))
    return image.convert(mode)


class ForeignPathError(InputError):
    """An image's path in a dataset that leads out of the data's own folder."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"its path {path} is not a relative path below the data's folder; store the image's bytes in the data"
        )


@dataclass(frozen=True)
class ImageFiles:
    """The files that a dataset's images may be read from where it does not hold their content.

    The paths in a dataset come from whoever made it. Passed to fsspec, they would choose a protocol, and
    with it a host to send requests to or a template to render.

    Attributes:
        folder: Folder that relative paths start from and must not leave; None to refuse them.
        listed: Beginnings of the absolute paths and `hf://` URLs that come from listing the data's own
            folder, cache or repository.
    """

    folder: Path | None = None
    listed: tuple[str, ...] = ()

    def read(self, image: dict[str, Any]) -> bytes:
        """Return the content of an image that `datasets` has not decoded.

        Args:
            image: `bytes`, or where they are None `path`.

        Raises:
            ForeignPathError: Its path leads elsewhere.
            InputError: It has neither, or cannot be read.
        """
        if image["bytes"] is not None:
            return image["bytes"]
        path = image["path"]
        if not path:
            raise InputError("it has neither content nor a path")
        if "://" not in path and "::" not in path:
            return read_bytes(self._local(path), LARGEST)
        # `datasets` names a member of an archive zip://MEMBER::ARCHIVE.
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
    """Return the content of an image: its `bytes`, or where they are None those of a `path` that the user named.

    Raises:
        InputError: It cannot be read.
    """
    return read_bytes(image["path"], LARGEST) if image["bytes"] is None else image["bytes"]


def decode(image: bytes | dict[str, Any], mode: str) -> Image.Image:
    """Decode an image as timm's datasets do: no EXIF orientation, then one conversion of mode (`to_mode`).

    Args:
        image: The image file's content, or an undecoded image whose path the user named (`read_named`).
        mode: PIL mode, `RGB` or `L`.

    Returns:
        The decoded image.

    Raises:
        InputError: The file cannot be read.
        Exception: Whatever PIL raises for a corrupt image.
    """
    with open_image(read_named(image) if isinstance(image, dict) else image) as opened:
        return to_mode(opened, mode)


@dataclass
class Sample:
    """One image ready for a model, or what is wrong with it.

    Attributes:
        place: Where it is in the data, for a message.
        image: (C, H, W), or None where something is wrong.
        target: What `Samples` was told to make of its label and path.
        corrupt: Why the image could not be decoded.
        fatal: What else is wrong, with which no figure can be right: its label, or the data's file.
        index: Its number among the images of map-style training data.
    """

    place: str
    image: torch.Tensor | None = None
    target: Any = None
    corrupt: str | None = None
    fatal: str | None = None
    index: int | None = None


class Samples:
    """Decodes and transforms rows. Errors are returned, for a loader's worker would garble them.

    Args:
        transform: From a PIL image to a (C, H, W) tensor.
        mode: PIL mode to convert the image to before.
        target: From a row's label and path to the sample's target; an `InputError` that it raises
            becomes the sample's `fatal`.
        read: From a row's undecoded image to its content: `ImageFiles.read` or `read_named`.
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
        """Make one sample of a row."""
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
            # A damaged file makes PIL raise nearly anything: OSError, SyntaxError, struct.error, ...
            # What cannot be read over the network is not therefore damaged.
            reason = str(error) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "not an image of a supported format"  # Pillow's message names an object in memory
            if isinstance(error, ForeignPathError):
                sample.fatal = reason
            elif image["bytes"] is None and "://" in (path or ""):
                sample.fatal = f"cannot be read: {reason}"
            else:
                sample.corrupt = reason
        return sample


class MapSamples(torch.utils.data.Dataset):
    """Samples of a map-style dataset, or of those of its rows that `indices` names."""

    def __init__(self, rows: Any, samples: Samples, indices: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.samples = samples
        self.indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        index = self.indices[i]
        return self.samples(f"image {index}", self.rows[index])
