"""Images annotated with objects, as boxes and masks: the data of detection.

Data are in one of two layouts:

- COCO's: annotations/instances_SPLIT.json, and images in SPLIT;
- PASCAL VOC's, for boxes: JPEGImages, Annotations, ImageSets/Main/SPLIT.txt, and, for classes other than
  VOC's, a classes.txt with one name per line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import torch
from PIL import Image

from res2net_zoo.tasks import annotations as checked
from res2net_zoo.tasks.base import Annotated, reason
from res2net_zoo.tasks.segmentation import VOC
from res2net_zoo.tasks.upright import BACK, Frames, Turn, read_rgb, transpose_box
from res2net_zoo.utils.console import progress_bar
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import LARGEST_TEXT, read_bytes

LEAST = 0.01  # minimum side of a training box in pixels; smaller ones may become empty in float32


@dataclass(slots=True)
class Instance:
    """An annotated object.

    Attributes:
        label: Number of its class, from 1; 0 is the background.
        bbox: Left, top, width and height, as annotated.
        area: Area in pixels, which defines COCO's size classes; infinite for an ignored object.
        crowd: Whether it is a group of objects, in which any number of detections is accepted.
        rle: Its mask in COCO's run-length encoding.
    """

    label: int
    bbox: list[float]
    area: float
    crowd: bool = False
    rle: dict[str, Any] | None = None

    @property
    def trained_on(self) -> bool:
        """Whether it is a single, not ignored object with an area; two boxes of COCO's train2017 have height 0."""
        return not self.crowd and math.isfinite(self.area) and min(self.bbox[2:]) > 0


class Instances(Annotated):
    """Images with objects, in COCO's or VOC's layout.

    Args:
        folder: The data folder.
        split: Name of the split, such as train2017 or, for short, train.
        masks: Whether to read the objects' masks.
        classes: The classes to use; defaults to those of the data.

    Attributes:
        images: File, width and height of each image.
        voc: Whether the layout is VOC's.
        instances: The objects of each image.
        image_ids: COCO's id of each image; in VOC's layout its name.
        category_ids: COCO's id of each class, None if it is not in the data; in VOC's layout from 1.
        turns: Transpositions that made annotations for stored pixels upright, by image.

    Raises:
        InputError: An annotation is invalid, or an image is missing.
    """

    def __init__(self, folder: Path, split: str, masks: bool, classes: Sequence[str] | None = None) -> None:
        self.masks = masks
        self.images: list[tuple[Path, int, int]] = []
        self.image_ids: list[Any] = []
        self.category_ids: list[Any] = []
        self.instances: list[list[Instance]] = []
        self.turns: dict[int, Turn] = {}
        self.voc = (folder / "ImageSets" / "Main").is_dir()
        read = self._read_voc if self.voc else self._read_coco
        source = read(folder, split, classes)
        if not any(instance.trained_on for instances in self.instances for instance in instances):
            raise InputError(f"{source} has no objects to train on or evaluate: all are crowds, difficult or empty")
        for i, turn in self.turns.items():
            self._turn(i, turn)

    def _check_images(self, source: Path) -> None:
        """Check that the images exist and match their annotations' sizes, before allocating masks of that size."""
        frames = Frames()
        for i, (file, width, height) in enumerate(
            progress_bar(None, self.images, desc="check the images", unit="image")
        ):
            turn = frames.turn(file, (width, height), source, "its annotations are for")
            if turn is not None:
                self.turns[i] = turn
        frames.warn()

    def _turn(self, i: int, turn: Turn) -> None:
        """Make an image's annotations upright."""
        file, width, height = self.images[i]
        self.images[i] = (file, height, width)
        for instance in self.instances[i]:
            instance.bbox = transpose_box(instance.bbox, turn, width, height)
            instance.rle = None if instance.rle is None else transpose_mask(instance.rle, turn)

    def as_annotated(self, i: int, bbox: list[float], rle: Any) -> tuple[list[float], Any]:
        """Transpose a box and a mask back to the stored pixels of their image, which the annotations refer to."""
        _, width, height = self.images[i]
        back = BACK.get(self.turns[i], self.turns[i])
        return transpose_box(bbox, back, width, height), None if rle is None else transpose_mask(rle, back)

    def _read_coco(self, folder: Path, split: str, classes: Sequence[str] | None) -> Path:
        names = (split, f"{split}2017")
        places = [folder / place / f"{what}{name}.json" for place in ("annotations", "") for what in ("instances_", "")
                  for name in names]  # fmt: skip
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            there = ", ".join(sorted(file.name for file in (folder / "annotations").glob("*.json"))) or "nothing"
            raise InputError(
                f"{folder} has no annotations/instances_{split}.json, as in COCO's layout (found: {there}), "
                "and no ImageSets/Main, as in VOC's"
            )
        content = checked.read_coco(path, "categories", "images", "annotations")
        known = self._categories(path, content["categories"], classes)
        images = checked.coco_images(path, content["images"])
        roots = [*(folder / name for name in names), folder / "images" / split, folder / "images", folder]
        first = next((name for name, *_ in images.values()), "")
        root = next((root for root in roots if first and checked.is_file(folder, root, first, path)), roots[0])
        self.images = [(checked.path_inside(folder, root, name, path), w, h) for name, w, h in images.values()]
        self.image_ids = list(images)
        self._check_images(path)
        numbers = {number: i for i, number in enumerate(images)}
        self.instances = [[] for _ in self.images]
        records = progress_bar(None, content["annotations"], desc="check the annotations", unit="annotation")
        for place, record in enumerate(records, 1):
            try:
                i = checked.find_by_id(numbers, record, "image_id", "image")
                label = checked.find_by_id(known, record, "category_id", "category")
                self.instances[i].append(self._instance(record, label, *self.images[i][1:]))
            except ValueError as error:
                raise InputError(f"{path}, {checked.annotation_name(record, place)}: {error}") from error
        return path

    def _categories(self, path: Path, records: list[Any], classes: Sequence[str] | None) -> dict[Any, int]:
        """Read the categories, and return the class index of each by its id."""
        ids: dict[str, Any] = {}
        for place, record in enumerate(records, 1):
            try:
                number, name = (
                    checked.identifier(checked.require_field(record, "id"), "id"),
                    checked.require_field(record, "name"),
                )
                if type(name) not in (str, int):
                    raise ValueError(f"its name {checked.format_value(name)} must be a string")
                if str(name) in ids or number in ids.values():
                    raise ValueError(f"another category has the same id {checked.format_value(number)} or name {name}")
            except ValueError as error:
                raise InputError(f"{path}, category {place}: {error}") from error
            ids[str(name)] = number
        self.classes = list(ids) if classes is None else list(classes)
        for name, number in ids.items():
            if name not in self.classes:
                raise InputError(f"{path} has the category {name} (id {number}), which is not a class of the model")
        self.category_ids = [ids.get(name) for name in self.classes]
        return {number: self.classes.index(name) + 1 for name, number in ids.items()}

    def _instance(self, record: dict[str, Any], label: int, width: int, height: int) -> Instance:
        bbox = checked.numbers(checked.require_field(record, "bbox"), "bbox", 4)
        check_box(bbox, width, height)
        area = checked.number(record.get("area", bbox[2] * bbox[3]), "area")
        if area < 0:
            raise ValueError(f"its area {area} is negative")
        rle = encoded(checked.require_field(record, "segmentation"), width, height) if self.masks else None
        return Instance(label, bbox, area, checked.boolean(record.get("iscrowd", 0), "iscrowd"), rle)

    def _read_voc(self, folder: Path, split: str, classes: Sequence[str] | None) -> Path:
        if self.masks:
            raise InputError(f"{folder} is in VOC's layout, which has no masks; maskrcnn needs COCO's layout")
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
            raise InputError(f"{path}, as in VOC's layout, is missing; available lists: {there}")
        named = folder / "classes.txt"
        own = [name for name in (checked.read_classes(named) if named.is_file() else VOC) if name != "background"]
        self.classes = own if classes is None else list(classes)
        pairs = list_voc(folder, path)
        for image, about in progress_bar(None, pairs, desc="check the annotations", unit="image"):
            try:
                root = parse_xml(read_bytes(about, LARGEST_TEXT))
                width, height = (
                    checked.positive_integer(checked.number_from_text(root.findtext(f"size/{side}"), side), side)
                    for side in ("width", "height")
                )
            except (InputError, ValueError, SyntaxError, expat.ExpatError) as error:
                raise InputError(f"{about} is not a VOC annotation: {reason(error, about)}") from error
            self.images.append((image, width, height))
            self.instances.append([])
            for number, element in enumerate(root.iterfind("object"), 1):
                try:
                    self.instances[-1].append(self._object(element, width, height))
                except ValueError as error:
                    raise InputError(f"{about}, object {number}: {error}") from error
        images = folder / "JPEGImages"
        inside = [image.relative_to(images) if image.is_relative_to(images) else image for image, _ in pairs]
        self.image_ids = [image.with_suffix("").as_posix() for image in inside]
        self.category_ids = list(range(1, len(self.classes) + 1))
        self._check_images(path)
        return path

    def _object(self, element: ElementTree.Element, width: int, height: int) -> Instance:
        label = (element.findtext("name") or "").strip()
        if label not in self.classes:
            raise ValueError(
                f"its class {label} is unknown; known: {', '.join(self.classes[:20])}"
                if label
                else "its name is missing"
            )
        left, top, right, bottom = (
            checked.number_from_text(element.findtext(f"bndbox/{x}"), x) for x in ("xmin", "ymin", "xmax", "ymax")
        )
        # VOC counts pixels from 1, and a box includes its last pixel.
        bbox = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        check_box(bbox, width, height)
        difficult = checked.boolean(element.findtext("difficult", "0"), "difficult")
        # COCO's code ignores objects outside the requested range of areas.
        area = math.inf if difficult else bbox[2] * bbox[3]
        return Instance(self.classes.index(label) + 1, bbox, area)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> Path:
        """Return the path of an image."""
        return self.images[i][0]

    def __getitem__(self, i: int) -> tuple[Image.Image, dict[str, Any]]:
        file, width, height = self.images[i]
        instances, boxes = [], []
        for instance in self.instances[i]:
            x, y, w, h = instance.bbox
            box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
            if instance.trained_on and min(box[2] - box[0], box[3] - box[1]) >= LEAST:
                instances.append(instance)
                boxes.append(box)
        target: dict[str, Any] = {"labels": torch.tensor([instance.label for instance in instances], dtype=torch.long)}
        target["boxes"] = torch.tensor(boxes).reshape(-1, 4)
        if self.masks:
            masks = torch.zeros(len(instances), height, width, dtype=torch.uint8)
            for mask, instance in zip(masks, instances, strict=True):
                mask[:] = decoded(instance.rle)
            target["masks"] = masks
        return read_rgb(file), target


def list_voc(folder: Path, path: Path) -> list[checked.Pair]:
    """Return the images and annotations in a list of VOC's layout, whose lines may end with a class's flag."""
    images, abouts = folder / "JPEGImages", folder / "Annotations"

    def single(line: str) -> checked.Pair | None:
        image = checked.find_file(folder, images, line, (".jpg",), path)
        if image is None:
            name, _, last = line.replace("\t", " ").rpartition(" ")
            if name and last in ("-1", "0", "1"):
                image = checked.find_file(folder, images, name.strip(), (".jpg",), path)
        if image is None:
            return None
        inside = image.relative_to(images) if image.is_relative_to(images) else Path(image.name)
        return image, (abouts / inside).with_suffix(".xml")

    def pair(one: str, other: str) -> checked.Pair | None:
        image = checked.find_file(folder, images, one, (), path)
        about = checked.find_file(folder, abouts, other, (), path)
        return None if image is None or about is None else (image, about)

    return checked.read_list(path, single, pair)


def parse_xml(content: bytes) -> ElementTree.Element:
    """Parse XML, and reject a document type, whose entity declarations can exhaust the memory.

    Raises:
        ValueError: It declares a document type, or its encoding is unknown.
        ExpatError: It is not XML.
    """

    def refuse(*_: Any) -> None:
        raise ValueError("it declares a document type, which is unsupported")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
        return ElementTree.fromstring(content)
    except LookupError as error:  # raised for an unknown encoding
        raise ValueError(str(error)) from error


def check_box(bbox: Sequence[float], width: int, height: int) -> None:
    """Check that a box (left, top, width, height) is within its image, with a tolerance of one pixel.

    A box may have width or height 0, as two of COCO's do, but not both.

    Raises:
        ValueError: It is outside the image, or empty.
    """
    x, y, w, h = bbox
    if not (x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1):
        raise ValueError(f"its box {list(bbox)} is not within its image, {width} x {height}")
    flat = min(w, h) == 0 < max(w, h)
    if not flat and not (w > 0 and h > 0 and min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)):
        raise ValueError(f"its box {list(bbox)} is empty")


def encoded(segmentation: Any, width: int, height: int) -> dict[str, Any]:
    """Convert a mask, COCO's run lengths or polygons, to compressed run lengths.

    Args:
        segmentation: The annotation's segmentation.
        width: Width of the image.
        height: Height of the image.

    Raises:
        ValueError: It is not a mask for an image of this size.
    """
    from faster_coco_eval.core import mask

    if isinstance(segmentation, dict):
        size, counts = (
            checked.numbers(checked.require_field(segmentation, "size"), "mask's size", 2),
            checked.require_field(segmentation, "counts"),
        )
        if size != [height, width]:
            raise ValueError(f"its mask is {size[1]:g} x {size[0]:g}, but its image is {width} x {height}")
        try:
            if isinstance(counts, list):
                if not set(map(type, counts)) <= {int} or min(counts, default=0) < 0 or sum(counts) != width * height:
                    raise ValueError("they must be whole numbers whose sum is the number of pixels")
                return mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
            if not isinstance(counts, str):
                raise ValueError("they must be a list or a string")
            rle = {"size": [height, width], "counts": counts}
            mask.decode(rle)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the run lengths of its mask are invalid: {error}") from error
        return rle
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError(
            f"its segmentation {checked.format_value(segmentation)} must be a list of polygons, or run lengths"
        )
    if not all(set(map(type, polygon)) <= {int, float} for polygon in segmentation):
        raise ValueError("its polygon must contain only numbers")
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        raise ValueError("its mask must have a polygon of at least three points")
    for polygon in polygons:
        low, right, bottom = min(polygon), max(polygon[::2]), max(polygon[1::2])
        # `sum` propagates NaN, which `min` and `max` can miss.
        if not (low >= -1 and right <= width + 1 and bottom <= height + 1 and math.isfinite(sum(polygon))):
            raise ValueError(f"its polygon is not within its image, {width} x {height}")
    return mask.merge(mask.frPyObjects([list(map(float, polygon)) for polygon in polygons], height, width))


def decoded(rle: Any) -> torch.Tensor:
    """Decode run lengths to a mask (H, W) of 0 and 1."""
    from faster_coco_eval.core import mask

    return torch.from_numpy(mask.decode(rle))


def transpose_mask(rle: Any, turn: Turn) -> dict[str, Any]:
    """Transpose a mask that is given as run lengths."""
    from faster_coco_eval.core import mask

    return mask.encode(np.asfortranarray(Image.fromarray(mask.decode(rle)).transpose(turn)))
