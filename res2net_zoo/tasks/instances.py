"""Images with objects, their boxes and masks: what detection reads.

Data are in one of two layouts:

- COCO's: annotations/instances_SPLIT.json, and images in SPLIT;
- PASCAL VOC's, for boxes: JPEGImages, Annotations, ImageSets/Main/SPLIT.txt, and, for classes other than
  VOC's, a classes.txt with a name a line.
"""

import json
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

from res2net_zoo.images import open_image
from res2net_zoo.program import InputError, progress_bar
from res2net_zoo.tasks.base import NO_IMAGE, Annotated, read_lines
from res2net_zoo.tasks.segmentation import VOC

LEAST = 0.01  # a side of a box that is trained on, in pixels: of less, float32 may leave nothing


@dataclass(slots=True)
class Instance:
    """An annotated object.

    Attributes:
        label: Number of its class, from 1; 0 is the background.
        bbox: Left, top, width and height, as annotated.
        area: In pixels, by which COCO tells small from large; infinite for one that counts for nothing.
        crowd: Whether it is of many objects together, in which any number may be found.
        rle: Its mask, run-length encoded as COCO has it.
    """

    label: int
    bbox: list[float]
    area: float
    crowd: bool = False
    rle: dict[str, Any] | None = None

    @property
    def trained_on(self) -> bool:
        """Whether it is one object, that counts, with an area: two boxes of COCO's train2017 have no height."""
        return not self.crowd and math.isfinite(self.area) and min(self.bbox[2:]) > 0


class Instances(Annotated):
    """Images with objects, in COCO's or VOC's layout.

    Args:
        folder: The data's folder.
        split: Such as train2017, for which `train` will do.
        masks: Whether the objects' masks are needed.
        classes: What the classes must be; default those of the data.

    Attributes:
        images: File, width and height of each image.
        voc: Whether the layout is VOC's.
        instances: The objects of each image.
        image_ids: COCO's number of each image; of VOC's its name.
        category_ids: COCO's number of each class, None where the data do not know it; of VOC's from 1.

    Raises:
        InputError: Annotations that cannot be right, or an image that is missing.
    """

    def __init__(self, folder: Path, split: str, masks: bool, classes: Sequence[str] | None = None) -> None:
        self.masks = masks
        self.images: list[tuple[Path, int, int]] = []
        self.image_ids: list[Any] = []
        self.category_ids: list[Any] = []
        self.instances: list[list[Instance]] = []
        self.voc = (folder / "ImageSets" / "Main").is_dir()
        read = self._read_voc if self.voc else self._read_coco
        source = read(folder, split, classes)
        if not any(instance.trained_on for instances in self.instances for instance in instances):
            raise InputError(f"{source} has no objects that count")
        for file, *size in progress_bar(None, self.images, desc="check the images", unit="image"):
            try:
                with open_image(file) as image:
                    found = list(image.size)
            except NO_IMAGE as error:
                raise InputError(f"cannot read {file}, which {source} names: {error}") from error
            if found != size:
                raise InputError("{} is {} x {}; its annotations are for {} x {}".format(file, *found, *size))

    def _read_coco(self, folder: Path, split: str, classes: Sequence[str] | None) -> Path:
        names = (split, f"{split}2017")
        places = [folder / place / f"{what}{name}.json" for place in ("annotations", "") for what in ("instances_", "")
                  for name in names]  # fmt: skip
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            there = ", ".join(sorted(file.name for file in (folder / "annotations").glob("*.json"))) or "nothing"
            raise InputError(
                f"{folder} has no annotations/instances_{split}.json of COCO's layout (there is {there}), "
                "and no ImageSets/Main of VOC's"
            )
        try:
            content = json.loads(path.read_text())
            categories = [(category["id"], str(category["name"])) for category in content["categories"]]
            named = [(image["id"], image["file_name"], image["width"], image["height"]) for image in content["images"]]
            numbers = {number: i for i, (number, *_) in enumerate(named)}
            records = [(record["id"], record) for record in content["annotations"]]
            roots = [*(folder / name for name in names), folder / "images" / split, folder / "images", folder]
            root = next((root for root in roots if named and (root / named[0][1]).is_file()), roots[0])
            self.images = [(root / name, width, height) for _, name, width, height in named]
            labels = dict(categories)
            self.image_ids = [number for number, *_ in named]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no file of COCO's: {type(error).__name__}: {error}") from error
        if len(numbers) < len(named) or len(labels) < len(categories) or len(set(labels.values())) < len(categories):
            raise InputError(f"{path} has two images or two categories of the same id, or categories of the same name")
        self.classes = [name for _, name in categories] if classes is None else list(classes)
        for number, name in categories:
            if name not in self.classes:
                raise InputError(f"{path} has the category {name} (id {number}), which the model does not know")
        ids = {name: number for number, name in categories}
        self.category_ids = [ids.get(name) for name in self.classes]
        known = {number: self.classes.index(name) + 1 for number, name in categories}
        self.instances = [[] for _ in self.images]
        for number, record in progress_bar(None, records, desc="check the annotations", unit="annotation"):
            try:
                if record["image_id"] not in numbers:
                    raise ValueError(f"its image {record['image_id']} is not in the list of images")
                if record["category_id"] not in known:
                    raise ValueError(f"its category {record['category_id']} is not in the list of categories")
                i = numbers[record["image_id"]]
                self.instances[i].append(self._instance(record, known[record["category_id"]], *self.images[i][1:]))
            except (KeyError, TypeError, ValueError) as error:
                what = f"it has no {error}" if isinstance(error, KeyError) else error
                raise InputError(f"{path}, annotation {number}: {what}") from error
        return path

    def _instance(self, record: dict[str, Any], label: int, width: int, height: int) -> Instance:
        bbox = [float(value) for value in record["bbox"]]
        check_box(bbox, width, height)
        area = float(record.get("area", bbox[2] * bbox[3]))
        if not 0 <= area < math.inf:
            raise ValueError(f"its area {area} is no number of pixels")
        rle = encoded(record["segmentation"], width, height) if self.masks else None
        return Instance(label, bbox, area, bool(record.get("iscrowd", 0)), rle)

    def _read_voc(self, folder: Path, split: str, classes: Sequence[str] | None) -> Path:
        if self.masks:
            raise InputError(f"{folder} is in VOC's layout, which has boxes only; maskrcnn takes COCO's, with masks")
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
            raise InputError(f"there is no {path} of VOC's layout; lists there: {there}")
        named = folder / "classes.txt"
        own = [name for name in (read_lines(named) if named.is_file() else VOC) if name != "background"]
        self.classes = own if classes is None else list(classes)
        names = [line.split()[0] for line in read_lines(path)]
        self.image_ids, self.category_ids = names, list(range(1, len(self.classes) + 1))
        for name in progress_bar(None, names, desc="check the annotations", unit="image"):
            about = folder / "Annotations" / f"{name}.xml"
            try:
                root = parse_xml(about.read_bytes())
                width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
            except (OSError, ValueError, SyntaxError, expat.ExpatError) as error:
                raise InputError(f"{about} is no annotation of VOC's: {error}") from error
            self.images.append((folder / "JPEGImages" / f"{name}.jpg", width, height))
            self.instances.append([])
            for number, element in enumerate(root.iterfind("object"), 1):
                label = element.findtext("name", "").strip()
                if label not in self.classes:
                    raise InputError(f"{about}, object {number}: there is no class {label or 'named'}")
                try:
                    corners = (float(element.findtext(f"bndbox/{x}", "")) for x in ("xmin", "ymin", "xmax", "ymax"))
                    left, top, right, bottom = corners
                    # VOC counts pixels from 1, and the last one is in the box.
                    bbox = [left - 1, top - 1, right - left + 1, bottom - top + 1]
                    check_box(bbox, width, height)
                    difficult = bool(int(element.findtext("difficult", "0")))
                except ValueError as error:
                    raise InputError(f"{about}, object {number}: {error}") from error
                # COCO's code does not count what is of another size than it is asked for.
                area = math.inf if difficult else bbox[2] * bbox[3]
                self.instances[-1].append(Instance(self.classes.index(label) + 1, bbox, area))
        return path

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> Path:
        """Return an image's file."""
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
        with open_image(file) as image:
            return image.convert("RGB"), target


def parse_xml(content: bytes) -> ElementTree.Element:
    """Parse XML without a document type: in one, entities of a few bytes can be declared that fill the memory.

    Raises:
        ValueError: It has one.
        ExpatError: It is no XML.
    """

    def refuse(*_: Any) -> None:
        raise ValueError("it declares a document type, which VOC's have not")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(content, True)
    return ElementTree.fromstring(content)


def check_box(bbox: Sequence[float], width: int, height: int) -> None:
    """Check that a box, as left, top, width and height, is within its image but for a pixel of rounding.

    A box may be flat, as two of COCO's are, but no point.

    Raises:
        ValueError: It is not.
    """
    x, y, w, h = bbox
    if not (x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1):
        raise ValueError(f"its box {list(bbox)} is not within its image, {width} x {height}")
    flat = min(w, h) == 0 < max(w, h)
    if not flat and not (w > 0 and h > 0 and min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)):
        raise ValueError(f"its box {list(bbox)} is empty")


def encoded(segmentation: Any, width: int, height: int) -> dict[str, Any]:
    """Return a mask, run lengths or polygons as COCO has them, as compressed run lengths.

    Raises:
        ValueError: It is no mask of an image of this size.
    """
    from faster_coco_eval.core import mask

    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            size = " x ".join(str(side) for side in reversed(segmentation["size"]))
            raise ValueError(f"its mask is {size}, and its image {width} x {height}")
        try:
            rle = (
                mask.frPyObjects(segmentation, height, width)
                if isinstance(segmentation["counts"], list)
                else segmentation
            )
            mask.decode(rle)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"its mask has no run lengths of its size: {error}") from error
        return rle
    polygons = [np.asarray(polygon, dtype=np.float64) for polygon in segmentation]
    polygons = [polygon for polygon in polygons if polygon.ndim == 1 and len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        raise ValueError("its mask is no polygon of three points or more")
    places = np.concatenate(polygons).reshape(-1, 2)
    if not ((places >= -1) & (places <= np.array([width, height]) + 1)).all():
        raise ValueError(f"its polygon is not within its image, {width} x {height}")
    return mask.merge(mask.frPyObjects([polygon.tolist() for polygon in polygons], height, width))


def decoded(rle: Any) -> torch.Tensor:
    """Return a mask (H, W) of 0 and 1."""
    from faster_coco_eval.core import mask

    return torch.from_numpy(mask.decode(rle))
