"""Rendered scenes with all that is known of them: boxes, masks, a salient object, joints.

`python -m tests.scenes voc DIR` (or any other layout below) writes some, to try a task by hand.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

KINDS = ("disc", "square", "triangle")


@dataclass
class Thing:
    """An object of a scene."""

    kind: str
    mask: np.ndarray  # (H, W), what can be seen of it


@dataclass
class Scene:
    """A picture, and the objects in it, the nearest last."""

    image: Image.Image
    things: list[Thing] = field(default_factory=list)


def render(seed: int, size: tuple[int, int] = (128, 96), most: int = 3) -> Scene:
    """Draw one to `most` shapes of any colour and place, the later ones before the others, on a coloured ground."""
    rng = np.random.default_rng([7, seed])
    w, h = size
    ground = Image.fromarray(rng.integers(60, 200, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    things: list[Thing] = []
    for _ in range(rng.integers(1, most + 1)):
        kind = str(rng.choice(KINDS))
        radius = rng.uniform(0.13, 0.28) * min(size)
        x, y = rng.uniform(radius, w - radius), rng.uniform(radius, h - radius)
        shape = Image.new("L", size)
        draw = ImageDraw.Draw(shape)
        if kind == "disc":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        else:
            corners, turn = (4, 3)[kind == "triangle"], rng.uniform(0, 2 * math.pi)
            angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
            draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=255)
        # Colours far from the ground's greyish ones, but none that tells the kind.
        colour = tuple(
            int(value) for value in rng.permutation([rng.integers(0, 40), rng.integers(215, 256), rng.integers(0, 256)])
        )
        ground.paste(colour, mask=shape)
        mask = np.asarray(shape) > 0
        for other in things:
            other.mask &= ~mask
        things.append(Thing(kind, mask))
    picture = ground.filter(ImageFilter.GaussianBlur(0.5))
    pixels = np.asarray(picture, dtype=np.float64) + rng.normal(0, 6, (h, w, 3))
    return Scene(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), [t for t in things if t.mask.sum() > 12])


def save_voc(folder: Path, train: int = 120, val: int = 40, size: tuple[int, int] = (128, 96)) -> Path:
    """Write PASCAL VOC's layout of segmentation: a palette's numbers, 255 on the borders, classes.txt."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(("background", *KINDS)) + "\n")
    for split, number, first in (("train", train, 0), ("val", val, 10_000)):
        names = [f"{split}_{i:05}" for i in range(number)]
        for i, name in enumerate(names):
            scene = render(first + i, size)
            numbers = np.zeros(scene.image.size[::-1], dtype=np.uint8)
            for thing in scene.things:
                numbers[thing.mask] = 1 + KINDS.index(thing.kind)
            border = np.zeros_like(numbers, dtype=bool)
            for axis in (0, 1):
                border |= np.roll(numbers, 1, axis) != numbers
            numbers[border] = 255
            mask = Image.fromarray(numbers, mode="P")
            mask.putpalette([channel for k in range(256) for channel in (k, (5 * k) % 256, (11 * k) % 256)])
            scene.image.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            mask.save(folder / "SegmentationClass" / f"{name}.png")
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


def save_saliency(folder: Path, train: int = 120, val: int = 40, size: tuple[int, int] = (128, 96)) -> Path:
    """Write SPLIT/images and SPLIT/masks, in which all objects are white."""
    for split, number, first in (("train", train, 0), ("val", val, 10_000)):
        for name in ("images", "masks"):
            (folder / split / name).mkdir(parents=True)
        for i in range(number):
            scene = render(first + i, size)
            mask = np.any([np.zeros(size[::-1], dtype=bool), *(thing.mask for thing in scene.things)], axis=0)
            scene.image.save(folder / split / "images" / f"{split}_{i:05}.jpg", quality=95)
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / split / "masks" / f"{split}_{i:05}.png")
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {"saliency": save_saliency, "voc": save_voc}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    LAYOUTS[args.layout](args.folder)
