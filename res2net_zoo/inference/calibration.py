"""Images for the calibration of int8 models, and held-out images on which the loss of accuracy is measured."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from res2net_zoo.data.images import MapSamples
from res2net_zoo.data.preprocessing import evaluation_samples
from res2net_zoo.data.sources import Source, open_source, splits_of
from res2net_zoo.inference.export import stacked
from res2net_zoo.inference.quantization import CALIBRATION_IMAGES, evenly_spaced
from res2net_zoo.utils.errors import InputError


class Selection(NamedTuple):
    """Some images of a source, by their positions."""

    source: Source
    indices: list[int]

    def __str__(self) -> str:
        """Return which images these are."""
        of = f" of {len(self.source.rows)}" if len(self.indices) < len(self.source.rows) else ""
        return f"{len(self.indices)}{of} images of {self.data}"

    @property
    def data(self) -> str:
        """Name and split of the source."""
        return f"{self.source.name}, split {self.source.split}"

    def samples(
        self,
        model: nn.Module,
        target: Callable[[int | None, str | None], Any] = lambda label, path: None,
        img_size: int | None = None,
    ) -> MapSamples:
        """Return the images with a model's preprocessing; the arguments are those of `evaluation_samples`."""
        made = evaluation_samples(model, target, self.source.read, img_size)
        return MapSamples(self.source.rows, made, self.indices)


def calibration_images(model: nn.Module, source: str) -> torch.Tensor:
    """Load images for the calibration of a model, evenly spaced over the training split, or else that of `open_source`.

    Args:
        model: A timm model, whose preprocessing is applied.
        source: Images as for `open_source`; labels are not needed.

    Returns:
        At most `CALIBRATION_IMAGES` images (N, C, H, W).

    Raises:
        InputError: The images cannot be read or decoded.
    """
    opened = open_source(source, "train" if "train" in splits_of(source) else None, labelled=False)
    return load_images(model, Selection(opened, evenly_spaced(len(opened.rows), CALIBRATION_IMAGES)))


def calibration_and_held_out(source: str, minimum: int, label_column: str | None = None) -> tuple[Selection, Selection]:
    """Choose images for calibration, and labelled images that are not used for it.

    With a training split and a validation or test split, the first are evenly spaced over the training split, and the
    others are the whole validation split, else the test split. Without both, the first are evenly spaced over the split
    of `open_source`, at most half of its images if these are enough, and the others are its remaining images.

    Args:
        source: Images as for `open_source`.
        minimum: Minimum number of images for calibration.
        label_column: As for `open_source`.

    Returns:
        From `minimum` to `CALIBRATION_IMAGES` images for calibration, and the held-out ones.

    Raises:
        InputError: The images cannot be read, have no labels, or are too few.
    """
    splits = splits_of(source)
    known = [name for name in ("validation", "test", "train") if name in splits]
    try:
        held_out = open_source(source, known[0] if known else None, label_column=label_column)
    except InputError as error:
        if "label_column" not in error.parameters:
            raise
        hint = "the accuracy is measured on labelled images, such as a folder for each class"
        raise InputError(f"{error}; {hint}", *error.parameters) from error
    if "train" in known[1:]:
        used = open_source(source, "train", labelled=False)
        selections = Selection(used, evenly_spaced(len(used.rows), CALIBRATION_IMAGES)), everything(held_out)
        wanted = f"at least {minimum} are needed"
    else:
        total = len(held_out.rows)
        chosen = evenly_spaced(total, min(CALIBRATION_IMAGES, max(minimum, total // 2)))
        rest = sorted(set(range(total)).difference(chosen))
        selections = Selection(held_out, chosen), Selection(held_out, rest)
        wanted = f"at least {minimum + 1} are needed, {minimum} for calibration and others to measure the accuracy"
    for selection, least in zip(selections, (minimum, 1), strict=True):
        if len(selection.indices) < least:
            number, split = len(selection.source.rows), selection.source.split
            raise InputError(f"{source} has {number} images in split {split}; {wanted}", "calibrate")
    return selections


def everything(source: Source) -> Selection:
    """Return all images of a source."""
    return Selection(source, list(range(len(source.rows))))


def load_images(model: nn.Module, selection: Selection, img_size: int | None = None) -> torch.Tensor:
    """Decode images and apply the model's preprocessing.

    Args:
        model: A timm model.
        selection: The images.
        img_size: Height and width in pixels, or None for those of the model's config.

    Returns:
        Images (N, C, H, W).

    Raises:
        InputError: The split is empty, or an image cannot be decoded.
    """
    if not selection.indices:
        raise InputError(f"{selection.source.name} has no image in split {selection.source.split}")
    samples = selection.samples(model, img_size=img_size)
    return stacked(samples[i] for i in range(len(samples)))
