"""From image files to samples that a model takes: finding, decoding, timm's transform.

Without `datasets`, whose import a program that reads files alone need not wait for.
"""

import glob
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from res2net_zoo.program import InputError


def find_images(words: list[str]) -> list[str]:
    """Return the image files that a command line names, each once, in its order.

    Args:
        words: Files, folders (searched with all that is in them) and patterns.

    Raises:
        InputError: A word names none.
    """
    found: dict[str, None] = {}
    for word in words:
        matches = [word] if Path(word).exists() else sorted(glob.glob(word, recursive=True))
        images = []
        for match in matches:
            if not Path(match).is_dir():
                images.append(match)
                continue
            for folder, folders, files in os.walk(match, followlinks=True):
                folders.sort()
                images += [
                    os.path.join(folder, file) for file in sorted(files) if file.lower().endswith(IMG_EXTENSIONS)
                ]
        if not images:
            kind = "holds no image" if matches else "is no file or folder, and no pattern that fits one"
            raise InputError(f"{word} {kind}")
        found |= dict.fromkeys(images)
    return list(found)


def read(image: dict[str, Any]) -> bytes:
    """Read the content of an image that `datasets` has not decoded: its bytes, or those of its path."""
    if image["bytes"] is not None:
        return image["bytes"]
    if "://" not in image["path"]:
        return Path(image["path"]).read_bytes()
    import fsspec

    with fsspec.open(image["path"]) as file:  # an image file that is streamed from the Hub
        return file.read()


def decode(image: dict[str, Any], mode: str) -> Image.Image:
    """Decode an image as timm's datasets do: no EXIF orientation, then one conversion of mode.

    Args:
        image: `bytes`, or where they are None `path`.
        mode: PIL mode, `RGB` or `L`.

    Returns:
        The decoded image.

    Raises:
        Exception: Whatever PIL or the file system raise for a corrupt or missing image.
    """
    with Image.open(io.BytesIO(read(image))) as opened:
        return opened.convert(mode)


@dataclass
class Sample:
    """One image ready for a model, or what is wrong with it.

    Attributes:
        place: Where it is in the data, for a message.
        image: (C, H, W), or None where something is wrong.
        target: What `Samples` was told to make of its label and path.
        corrupt: Why the image could not be decoded.
        fatal: What else is wrong, with which no figure can be right: its label, or the data's file.
    """

    place: str
    image: torch.Tensor | None = None
    target: Any = None
    corrupt: str | None = None
    fatal: str | None = None


class Samples:
    """Decodes and transforms rows. Errors are returned, for a loader's worker would garble them.

    Args:
        transform: From a PIL image to a (C, H, W) tensor.
        mode: PIL mode to convert the image to before.
        target: From a row's label and path to the sample's target; an `InputError` that it raises
            becomes the sample's `fatal`.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], torch.Tensor],
        mode: str,
        target: Callable[[int | None, str | None], Any],
    ) -> None:
        self.transform = transform
        self.mode = mode
        self.target = target

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
            image = {"bytes": read(image), "path": path}
            sample.image = self.transform(decode(image, self.mode))
        except Exception as error:
            # A damaged file makes PIL raise nearly anything: OSError, SyntaxError, struct.error, ...
            # What cannot be read over the network is not therefore damaged.
            reason = str(error) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "no image that Pillow can read"  # its own words name an object in memory
            if image["bytes"] is None and "://" in (path or ""):
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
