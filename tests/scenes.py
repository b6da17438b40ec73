"""Rendered scenes with annotations: boxes, masks, a salient object, keypoints.

`python -m tests.scenes voc DIR` (or any other layout below) writes some, to try a task by hand.
"""

import argparse
import json
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
    mask: np.ndarray  # (H, W), its visible part


@dataclass
class Scene:
    """An image and its objects, the nearest last."""

    image: Image.Image
    things: list[Thing] = field(default_factory=list)


def render(seed: int, size: tuple[int, int] = (128, 96), most: int = 3) -> Scene:
    """Draw one to `most` shapes with random colours and positions, later ones in front, on a coloured background."""
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
        # Colours differ from the greyish background, but do not depend on the kind.
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
    """Write PASCAL VOC's segmentation layout: palette indices, 255 on the borders, classes.txt."""
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


def polygon_of(mask: np.ndarray) -> list[float]:
    """Return a polygon of the ends of a mask's rows, down on the left and up on the right."""
    rows = np.flatnonzero(mask.any(1))
    left = [(int(mask[y].argmax()), int(y)) for y in rows]
    right = [(mask.shape[1] - int(mask[y, ::-1].argmax()), int(y)) for y in rows]
    down = [value for x, y in left for value in (x, y, x, y + 1)]
    up = [value for x, y in reversed(right) for value in (x, y + 1, x, y)]
    return [float(value) for value in (*down, *up)]


def run_lengths(mask: np.ndarray) -> dict:
    """Return a mask as COCO's uncompressed run lengths, by columns, starting with background."""
    pixels = np.concatenate([[0], mask.T.flatten(), [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(pixels))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, mask.size]).tolist()}


def box_of(mask: np.ndarray) -> list[float]:
    """Return left, top, width and height of a mask."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return [float(value) for value in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)]


def save_coco(folder: Path, train: int = 120, val: int = 40, size: tuple[int, int] = (128, 96)) -> Path:
    """Write COCO's instance layout, with non-contiguous ids, polygons, and run lengths for occluded objects."""
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": 3 * k + 2, "name": kind} for k, kind in enumerate(KINDS)]
    for split, number, first in (("train", train, 0), ("val", val, 10_000)):
        (folder / split).mkdir()
        images, annotations = [], []
        for i in range(number):
            scene, name = render(first + i, size), f"{split}_{i:05}.jpg"
            scene.image.save(folder / split / name, quality=95)
            images.append({"id": 10 * i + 7, "file_name": name, "width": size[0], "height": size[1]})
            for thing in scene.things:
                # The rows of an object without occlusion are contiguous.
                whole = all(np.abs(np.diff(row.astype(int), prepend=0, append=0)).sum() <= 2 for row in thing.mask)
                shape = [polygon_of(thing.mask)] if whole else run_lengths(thing.mask)
                about = {"category_id": 3 * KINDS.index(thing.kind) + 2, "area": int(thing.mask.sum()), "iscrowd": 0}
                about |= {"id": len(annotations) + 1, "image_id": 10 * i + 7}
                annotations.append({**about, "bbox": box_of(thing.mask), "segmentation": shape})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def save_voc_boxes(folder: Path, train: int = 120, val: int = 40, size: tuple[int, int] = (128, 96)) -> Path:
    """Write PASCAL VOC's detection layout, in which mostly occluded objects are difficult."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(KINDS) + "\n")
    for split, number, first in (("train", train, 0), ("val", val, 10_000)):
        names = [f"{split}_{i:05}" for i in range(number)]
        for i, name in enumerate(names):
            scene, objects = render(first + i, size), []
            scene.image.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            for thing in scene.things:
                x, y, w, h = (int(value) for value in box_of(thing.mask))
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
                box = "".join(f"<{corner}>{value}</{corner}>" for corner, value in corners.items())
                difficult = int(thing.mask.sum() < 150)
                about = f"<name>{thing.kind}</name><difficult>{difficult}</difficult>"
                objects.append(f"<object>{about}<bndbox>{box}</bndbox></object>")
            shape = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
            text = f"<annotation><filename>{name}.jpg</filename>{shape}{''.join(objects)}</annotation>"
            (folder / "Annotations" / f"{name}.xml").write_text(text)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


def save_saliency(folder: Path, train: int = 120, val: int = 40, size: tuple[int, int] = (128, 96)) -> Path:
    """Write SPLIT/images and SPLIT/masks with white objects."""
    for split, number, first in (("train", train, 0), ("val", val, 10_000)):
        for name in ("images", "masks"):
            (folder / split / name).mkdir(parents=True)
        for i in range(number):
            scene = render(first + i, size)
            mask = np.any([np.zeros(size[::-1], dtype=bool), *(thing.mask for thing in scene.things)], axis=0)
            scene.image.save(folder / split / "images" / f"{split}_{i:05}.jpg", quality=95)
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / split / "masks" / f"{split}_{i:05}.png")
    return folder


# Keypoints of a stick figure, with COCO's names. Each body part has a colour, the same on both sides.
PARTS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
JOINTS = ("nose", *(f"{side}_{part}" for part in PARTS for side in ("left", "right")))
SHADES = dict(
    zip(("nose", *PARTS), ("#ffd0b0", "#20c020", "#e0e000", "#e02020", "#00c8c8", "#c000c0", "#2040ff"), strict=True)
)
BONES = [
    *((f"{side}_{PARTS[i]}", f"{side}_{PARTS[i + 1]}") for side in ("left", "right") for i in (0, 1, 3, 4)),
    *((f"{side}_shoulder", f"{side}_hip") for side in ("left", "right")),
    *((f"left_{part}", f"right_{part}") for part in ("shoulder", "hip")),
]


def render_person(rng: np.random.Generator, draw: ImageDraw.ImageDraw, box: tuple[float, ...]) -> np.ndarray:
    """Draw a stick figure that faces the camera, and return its keypoints (J, 3)."""
    x, y, w, h = box
    unit = 0.2 * min(h, 1.3 * w)
    turn, centre = rng.uniform(-0.3, 0.3), np.array([x + w / 2, y + h / 2])
    places = {"nose": np.array([0, -1.75])}
    for side, sign in (("left", 1), ("right", -1)):
        shoulder, hip = np.array([0.5 * sign, -1.1]), np.array([0.35 * sign, 0.1])
        angles = rng.uniform([0.1, 0.1, 0.0, 0.0], [1.9, 2.2, 0.5, 0.4])  # from vertical, outwards
        arm, fore, thigh, shin = (0.8 * np.array([sign * math.sin(a), math.cos(a)]) for a in angles)
        limbs = (shoulder, shoulder + arm, shoulder + arm + fore, hip, hip + thigh, hip + thigh + shin)
        places |= {f"{side}_{part}": place for part, place in zip(PARTS, limbs, strict=True)}
    spin = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    places = {name: centre + unit * spin @ places[name] for name in JOINTS}
    cloth = tuple(int(value) for value in rng.integers(0, 60, 3))
    for one, other in BONES:
        draw.line([*places[one], *places[other]], cloth, max(2, round(unit / 7)))
    joints = np.zeros((len(JOINTS), 3))
    for joint, (name, place) in zip(joints, places.items(), strict=True):
        joint[:] = [*place.round(1), rng.choice([0, 1, 2], p=[0.05, 0.05, 0.9])]
        r = unit * (0.4 if name == "nose" else 0.14)
        if joint[2] != 1:  # hidden keypoints are annotated as well
            shade = SHADES[name.rpartition("_")[2]]
            draw.ellipse([*(place - r), *(place + r)], shade)
    joints[joints[:, 2] == 0] = 0
    return joints


def save_keypoints(folder: Path, train: int = 120, val: int = 40, size: tuple[int, int] = (160, 120)) -> Path:
    """Write COCO's keypoint layout: one or two stick figures per image."""
    (folder / "annotations").mkdir(parents=True)
    for split, number, first in (("train", train, 0), ("val", val, 10_000)):
        (folder / split).mkdir()
        images, persons = [], []
        for i in range(number):
            rng = np.random.default_rng([8, first + i])
            ground = Image.fromarray(rng.integers(90, 230, (4, 4, 3), dtype=np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            )
            draw, many = ImageDraw.Draw(ground), int(rng.integers(1, 3))
            for place in range(many):
                room = (place * size[0] / many, 0, size[0] / many, size[1])
                joints = render_person(rng, draw, room)
                seen = joints[joints[:, 2] > 0, :2]
                low, high = np.maximum(seen.min(0) - 4, 0), np.minimum(seen.max(0) + 5, size)
                bbox = [*low.tolist(), *(high - low).tolist()]
                about = {"area": 0.6 * bbox[2] * bbox[3], "iscrowd": 0, "num_keypoints": len(seen)}
                record = {"id": len(persons) + 1, "image_id": i + 1, "category_id": 1, "bbox": bbox, **about}
                persons.append({**record, "keypoints": joints.flatten().tolist()})
            pixels = np.asarray(ground, dtype=np.float64) + rng.normal(0, 6, (*size[::-1], 3))
            name = f"{split}_{i:05}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name, quality=95)
            images.append({"id": i + 1, "file_name": name, "width": size[0], "height": size[1]})
        bones = [[1 + JOINTS.index(one), 1 + JOINTS.index(other)] for one, other in BONES]
        category = {"id": 1, "name": "person", "keypoints": JOINTS, "skeleton": bones}
        content = {"images": images, "annotations": persons, "categories": [category]}
        (folder / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(content))
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "coco": save_coco,
    "keypoints": save_keypoints,
    "saliency": save_saliency,
    "voc": save_voc,
    "voc-boxes": save_voc_boxes,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    LAYOUTS[args.layout](args.folder)
