"""Drawing and writing of predictions: labels that do not overlap, and masks as run lengths."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]  # left, top, right, bottom
Colour = tuple[int, int, int]


def draw_labels(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[str], colours: Sequence[Colour]
) -> list[Box]:
    """Draw a label at each box, placed greedily so that labels overlap as little as possible.

    Args:
        image: Image to draw on.
        boxes: Left, top, right and bottom of each box, in pixels.
        labels: Text of each label.
        colours: Background colour of each label.

    Returns:
        Left, top, right and bottom of the labels.
    """
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(10, round(max(image.size) / 50)))
    taken: list[Box] = []
    for box, label, colour in zip(boxes, labels, colours, strict=True):
        left, top, right, bottom = draw.textbbox((0, 0), label, font)
        width, height = right - left + 4, bottom - top + 4
        place = min(places(box, width, height, image.size), key=lambda at: covered(at, taken))
        taken.append(place)
        draw.rectangle(place, colour)
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        draw.text((place[0] + 2 - left, place[1] + 2 - top), label, "black" if light else "white", font)
    return taken


def places(box: Sequence[float], width: float, height: float, size: tuple[int, int]) -> Iterator[Box]:
    """Yield candidate places of a box's label, best first: above, inside and below the box, then further away.

    Args:
        box: Left, top, right and bottom of the box.
        width: Width of the label.
        height: Height of the label.
        size: Width and height of the image, in which labels are kept if they fit.
    """
    left, top, right, bottom = box
    for away in range(4):
        for y in (top - height * (1 + away), top + height * away, bottom + height * away, bottom - height * (1 + away)):
            for x in (left, right - width):
                x = max(0.0, min(x, size[0] - 1 - width))
                y = max(0.0, min(y, size[1] - 1 - height))
                yield x, y, x + width, y + height


def covered(box: Box, taken: Sequence[Box]) -> float:
    """Return the area of a box that other boxes cover, in square pixels."""
    return sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )


def run_lengths(mask: torch.Tensor) -> dict[str, Any]:
    """Return a boolean mask (H, W) as COCO's uncompressed run lengths.

    `pycocotools.mask.frPyObjects(rle, *rle["size"])` and `faster_coco_eval.core.mask` read them.
    """
    pixels = mask.numpy().flatten(order="F")  # column by column
    ends = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff([0, *ends, len(pixels)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}  # the first run is of zeros
