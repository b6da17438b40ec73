"""Keypoint estimation (paper, Table 10): the positions of a person's joints.

The network is SimpleBaseline (Xiao, Wu and Wei, "Simple Baselines for Human Pose Estimation and Tracking",
ECCV 2018, arXiv 1804.06208). Data are in COCO's layout: annotations/person_keypoints_SPLIT.json, and images
in SPLIT. A sample is one person in the annotated box. Evaluation can use a detector's boxes instead, which lowers
the metrics; the boxes of Table 10 have 56.4 AP of persons on val.

Positions in an image, in a crop and in heatmaps are (x, y) from the upper left corner, so the centre of the first
pixel is (0.5, 0.5). In COCO's annotations and in predictions it is (0, 0).
"""

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.v2 import functional as TF

from res2net_zoo.tasks import annotations as checked
from res2net_zoo.tasks.base import Annotated, Figures, Score, TaskModel, check_options
from res2net_zoo.tasks.upright import BACK, Frames, Turn, read_rgb, transpose_box, transpose_points
from res2net_zoo.utils.console import progress_bar
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import read_json

# The sigma of each of COCO's joints in OKS, which is the deviation of human annotators; other joints have SIGMA.
COCO = {
    **{"nose": 0.026, "left_eye": 0.025, "right_eye": 0.025, "left_ear": 0.035, "right_ear": 0.035},
    **{"left_shoulder": 0.079, "right_shoulder": 0.079, "left_elbow": 0.072, "right_elbow": 0.072},
    **{"left_wrist": 0.062, "right_wrist": 0.062, "left_hip": 0.107, "right_hip": 0.107},
    **{"left_knee": 0.087, "right_knee": 0.087, "left_ankle": 0.089, "right_ankle": 0.089},
}
SIGMA = 0.05
LIMBS = [
    *(("shoulder", "elbow"), ("elbow", "wrist"), ("shoulder", "hip"), ("hip", "knee"), ("knee", "ankle")),
    *(("eye", "ear"), ("ear", "shoulder")),
]
BONES = [
    *((f"{side}_{one}", f"{side}_{other}") for side in ("left", "right") for one, other in LIMBS),
    *((f"left_{name}", f"right_{name}") for name in ("shoulder", "hip", "eye")),
    *(("nose", "left_eye"), ("nose", "right_eye")),
]
COLOURS = {"left": (40, 120, 255), "right": (255, 120, 20)}  # other joints have MIDDLE
MIDDLE = (60, 210, 90)
SIDES = {"left": "left", "l": "left", "right": "right", "r": "right"}
WORDS = r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[A-Z]|\d+|[^\W\d_A-Za-z]+"  # of a joint's name: R and Shoulder of RShoulder
HOW_TO_PAIR = "name the pairs as ONE:OTHER, or none to mirror no images"
FAR = 1e15  # coordinates are clamped to this, which is outside any image
MARGIN = 1.25  # a crop is larger than its box by this factor
SURE = 0.5  # minimum score of a detected person whose joints are drawn
ALIKE = 0.9  # OKS above which the detected person of lower score is a duplicate
SEEN = 0.2  # minimum score of a joint that is drawn and counts for its person's score, as in SimpleBaseline


@dataclass(slots=True)
class Person:
    """An annotated person.

    Attributes:
        image: Index of the image.
        joints: (J, 3) as in COCO: x, y and 0 (not labelled), 1 (hidden) or 2 (visible).
        labelled: Number of labelled joints.
        bbox: Left, top, width and height.
        area: Area of the person in pixels, which normalizes distances in COCO's metric.
        crowd: Whether it is a group of people.
        score: Detection score of the box; 1 for an annotated box.
    """

    image: int
    joints: np.ndarray
    labelled: int
    bbox: list[float]
    area: float
    crowd: bool
    score: float = 1.0


class COCOPersons(Annotated):
    """Persons with joints, in COCO's layout, except for crowds and persons without a labelled joint.

    Args:
        folder: The folder that contains `annotations` and one image folder per split.
        split: Name of the split, such as train2017.

    Attributes:
        images: File, width and height of each image.
        annotations: All annotations; COCO's evaluation also needs crowds and persons without joints.
        persons: The samples.
        found: Whether the samples are a detector's boxes.
        image_ids: COCO's id of each image.
        category_id: COCO's id of the category of persons.
        turns: Transpositions that made annotations for stored pixels upright, by image.

    Raises:
        InputError: An annotation is invalid, or an image is missing.
    """

    samples = "persons"

    def __init__(self, folder: Path, split: str) -> None:
        path = folder / "annotations" / f"person_keypoints_{split}.json"
        if not path.is_file():
            files = sorted(path.parent.glob("person_keypoints_*.json"))
            there = ", ".join(file.stem.removeprefix("person_keypoints_") for file in files) or "none"
            raise InputError(f"{path}, as in COCO's layout, is missing; available splits: {there}")
        content = checked.read_coco(path, "categories", "images", "annotations")
        self.category_id, self.classes = category_of_joints(path, content["categories"])
        images = checked.coco_images(path, content["images"])
        self.images = [
            (checked.path_inside(folder, folder / split, name, path), w, h) for name, w, h in images.values()
        ]
        self.image_ids = list(images)
        self.turns: dict[int, Turn] = {}
        self._seen: set[int] = set()
        numbers = {number: i for i, number in enumerate(images)}
        self.annotations = []
        records = progress_bar(None, content["annotations"], desc="check the annotations", unit="annotation")
        for place, record in enumerate(records, 1):
            try:
                self.annotations.append(self._person(record, numbers))
            except ValueError as error:
                raise InputError(f"{path}, {checked.annotation_name(record, place)}: {error}") from error
        self.found = False
        self.persons = [person for person in self.annotations if person.labelled and not person.crowd]
        if not self.persons:
            raise InputError(f"{path} has no person with a labelled joint")
        self._check_images(path)

    def take_boxes(self, path: Path) -> None:
        """Replace the samples by a detector's boxes in COCO's results format (image_id, category_id, bbox, score).

        Boxes of other categories or images are skipped, and boxes are clipped to their image.

        Raises:
            InputError: The file is not such a list, or a box is invalid.
        """
        records = read_json(path, checked.LARGEST_JSON)
        if not isinstance(records, list):
            raise InputError(f"cannot read boxes from {path}: it must be a JSON list in COCO's results format")
        numbers, self.persons, self.found = {number: i for i, number in enumerate(self.image_ids)}, [], True
        for place, record in enumerate(records, 1):
            try:
                ids = [
                    checked.identifier(checked.require_field(record, key), key) for key in ("category_id", "image_id")
                ]
                if ids[0] == self.category_id and ids[1] in numbers:
                    self.persons.append(self._box(record, numbers[ids[1]]))
            except ValueError as error:
                raise InputError(f"{path}, box {place}: {error}") from error
        if not self.persons:
            raise InputError(f"{path} has no box of category {self.category_id} (persons) in these images")
        self._check_images(path)

    def _box(self, record: dict[str, Any], i: int) -> Person:
        """Read a detector's box; raises ValueError if it is invalid."""
        _, width, height = self.images[i]
        if i in self.turns:
            width, height = height, width  # size of the stored pixels
        x, y, w, h = checked.numbers(checked.require_field(record, "bbox"), "bbox", 4)
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if not (right > left and bottom > top):
            raise ValueError(f"the box {record['bbox']} is empty or not within its image, {width} x {height}")
        score = checked.number(checked.require_field(record, "score"), "score")
        if not 0 <= score <= 1:
            raise ValueError(f"its score {score} must be from 0 to 1")
        box, joints = [left, top, right - left, bottom - top], np.zeros((len(self.classes), 3))
        if i in self.turns:
            box = transpose_box(box, self.turns[i], width, height)
        return Person(i, joints, 0, box, box[2] * box[3], crowd=False, score=score)

    def _check_images(self, path: Path) -> None:
        """Check the persons' images, and make annotations for stored pixels upright."""
        frames = Frames()
        new = sorted({person.image for person in self.persons} - self._seen)
        turns = {}
        for i in progress_bar(None, new, desc="check", unit="image"):
            file, width, height = self.images[i]
            turn = frames.turn(file, (width, height), path, "its annotations are for")
            self._seen.add(i)
            if turn is not None:
                turns[i] = turn
        frames.warn()
        every = self.annotations + self.persons if self.found else self.annotations
        for person in every if turns else ():
            if (turn := turns.get(person.image)) is not None:
                _, width, height = self.images[person.image]
                person.bbox = transpose_box(person.bbox, turn, width, height)
                person.joints = transpose_joints(person.joints, turn, width, height)
        for i in turns:
            file, width, height = self.images[i]
            self.images[i] = (file, height, width)
        self.turns |= turns

    def as_annotated(self, i: int, joints: list[float]) -> list[float]:
        """Transpose joints back to the stored pixels if the annotations of their image refer to them."""
        if (turn := self.turns.get(i)) is None:
            return joints
        _, width, height = self.images[i]
        places = np.asarray(joints).reshape(-1, 3)
        return transpose_joints(places, BACK.get(turn, turn), width, height).flatten().tolist()

    def _person(self, record: dict[str, Any], numbers: dict[Any, int]) -> Person:
        """Read an annotation; raises ValueError if it is invalid."""
        category = checked.identifier(checked.require_field(record, "category_id"), "category_id")
        if category != self.category_id:
            one, other = checked.format_value(category), checked.format_value(self.category_id)
            raise ValueError(f"its category is {one}, but that of the joints is {other}")
        i = checked.find_by_id(numbers, record, "image_id", "image")
        values = checked.require_field(record, "keypoints")
        if not isinstance(values, list) or len(values) != 3 * len(self.classes):
            size = len(values) if isinstance(values, list) else "no"
            raise ValueError(f"it has {size} numbers for {len(self.classes)} joints, not 3 for each")
        if not set(map(type, values)) <= {int, float}:
            raise ValueError("its keypoints must be numbers")
        joints = np.array([min(max(value, -FAR), FAR) for value in values], dtype=np.float64).reshape(-1, 3)
        bbox = checked.numbers(checked.require_field(record, "bbox"), "bbox", 4)
        area = checked.number(checked.require_field(record, "area"), "area")
        labelled, crowd = joints[:, 2] > 0, checked.boolean(record.get("iscrowd", 0), "iscrowd")
        person = Person(i, joints, int(labelled.sum()), bbox, area, crowd)
        if not np.isin(joints[:, 2], (0, 1, 2)).all():
            raise ValueError("a joint's visibility must be 0, 1 or 2")
        if person.labelled and not person.crowd:
            check_person(person, *self.images[i][1:])
        if np.isnan(joints).any():
            raise ValueError("a joint is NaN")
        return person

    def __len__(self) -> int:
        return len(self.persons)

    def path(self, i: int) -> Path:
        """Return the path of a person's image."""
        return self.images[self.persons[i].image][0]

    def __getitem__(self, i: int) -> tuple[Image.Image, dict[str, Any]]:
        person = self.persons[i]
        x, y, w, h = person.bbox
        left, top = max(x, 0), max(y, 0)
        _, width, height = self.images[person.image]
        box = (left, top, min(x + w, width) - left, min(y + h, height) - top)
        joints = torch.from_numpy(person.joints).float()
        return read_rgb(self.path(i)), {"box": box, "joints": joints[:, :2] + 0.5, "visible": joints[:, 2] > 0}


def category_of_joints(path: Path, records: list[Any]) -> tuple[Any, list[str]]:
    """Return the id and the joint names of the only category with joints in a COCO annotation file.

    Raises:
        InputError: There is not exactly one such category, or joint names are invalid or repeated.
    """
    found = [record for record in records if isinstance(record, dict) and record.get("keypoints")]
    if len(found) != 1:
        raise InputError(f"{path} must have exactly one category with keypoints, not {len(found)}")
    try:
        names = found[0]["keypoints"]
        if not isinstance(names, list) or not all(type(name) in (str, int) for name in names):
            raise ValueError("its keypoints must be a list of names")
        classes = [str(name) for name in names]
        if twice := sorted({name for name in classes if classes.count(name) > 1}):
            raise ValueError(f"two of its keypoints have the name {twice[0]}")
        return checked.identifier(checked.require_field(found[0], "id"), "id"), classes
    except ValueError as error:
        raise InputError(f"{path}, category of the joints: {error}") from error


def check_person(person: Person, width: int, height: int) -> None:
    """Check that a person's box and labelled joints are within or near the image.

    Raises:
        ValueError: They are not.
    """
    x, y, w, h = person.bbox
    if not (x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1):
        raise ValueError(f"its box {person.bbox} is not within its image, {width} x {height}")
    if not (min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0) and person.area > 0):
        raise ValueError(f"its box {person.bbox} or its area {person.area} is empty")
    # Some data have joints slightly outside the image; wrong coordinates are further away.
    far, places = max(width, height) / 4, person.joints[person.joints[:, 2] > 0, :2]
    if not ((places >= -far) & (places <= np.array([width, height]) + far)).all():
        raise ValueError(f"a joint is far outside its image, {width} x {height}")


def transpose_joints(joints: np.ndarray, turn: Turn, width: int, height: int) -> np.ndarray:
    """Return joints (J, 3), in COCO's format, in an image of this size after the image's transposition."""
    places = transpose_points(joints[:, :2] + 0.5, turn, width, height) - 0.5
    return np.concatenate([places, joints[:, 2:]], 1)


def boxes_of(detector: Any, image: Image.Image) -> list[list[float]]:
    """Detect the persons in an image, and return their boxes (left, top, width, height).

    Args:
        detector: A detection model with a class `person` or with a single class.
        image: The image.

    Raises:
        InputError: The model does not detect persons.
    """
    classes = detector.settings["classes"]
    if detector.task != "detection" or (len(classes) > 1 and "person" not in classes):
        raise InputError(f"a {detector.task} model of {', '.join(classes)} does not detect persons")
    label = 1 + (classes.index("person") if "person" in classes else 0)
    pixels, _ = detector.transform(image, {}, False)
    with torch.inference_mode():
        (found,) = detector([pixels.to(detector.mean.device)])
    chosen = found["boxes"][(found["labels"] == label) & (found["scores"] >= SURE)]
    chosen[:, 2:] -= chosen[:, :2]
    return chosen.tolist()


def side_of(name: str) -> tuple[str, str] | None:
    """Return the side in a joint's name, `left` or `right`, and the rest of the name; None if it names no side.

    The side is a word or a letter of the name, in any position and case: left_eye, L_Eye, eye.r, RightEye, LEye.
    """
    words = [word.lower() for word in re.findall(WORDS, name)]
    places = [i for i, word in enumerate(words) if word in SIDES]
    if len(places) != 1:
        return None
    (place,) = places
    return SIDES[words[place]], " ".join([*words[:place], "/", *words[place + 1 :]])


def sigma_of(name: str) -> float:
    """Return the OKS sigma of COCO's joint of this name, in any of the usual spellings; SIGMA for other joints."""
    return {plain(joint): sigma for joint, sigma in COCO.items()}.get(plain(name), SIGMA)


def plain(name: str) -> str:
    """Return a joint's name in COCO's spelling: `left_eye` of L_Eye or eye.l."""
    side, rest = side_of(name) or ("", name)
    return "_".join([side] * bool(side) + re.findall(WORDS, rest)).lower()


def partners_by_name(names: Sequence[str]) -> list[list[str]]:
    """Return the pairs of left and right joints that mirroring swaps, by the usual spellings of their names.

    Raises:
        InputError: The partner of a left or right joint is missing or ambiguous.
    """
    sides: dict[tuple[str, str], str] = {}
    for name in names:
        if (key := side_of(name)) is not None and sides.setdefault(key, name) != name:
            raise InputError(
                f"the joints {sides[key]} and {name} are both {' '.join(key)}; {HOW_TO_PAIR}", "flip_pairs"
            )
    other = {"left": "right", "right": "left"}
    for (side, rest), name in sides.items():
        if (other[side], rest) not in sides:
            raise InputError(f"the joint {name} has no partner on the {other[side]}; {HOW_TO_PAIR}", "flip_pairs")
    pairs = [[name, sides["right", rest]] for (side, rest), name in sides.items() if side == "left"]
    # Names such as leye and reye, or lefteye and righteye, whose sides only the pair reveals.
    bare = {name.lower(): name for name in names if side_of(name) is None}
    for low, name in bare.items():
        mirrored = [low.replace("left", "right", 1)] + [f"r{low[1:]}"] * (low[:1] == "l" and len(low) > 2)
        pairs += [[name, bare[partner]] for partner in mirrored if partner in bare and partner != low][:1]
    return pairs


def flip_pairs(names: Sequence[str], given: Sequence[str] | None) -> list[list[str]]:
    """Return the pairs of joints that mirroring swaps.

    Args:
        names: The joints.
        given: Pairs in the format ONE:OTHER, or only `none` to mirror no images; None to infer pairs from names.

    Returns:
        The pairs; empty if images must not be mirrored.

    Raises:
        InputError: The names contain no pairs, or `given` contains unknown joints.
    """
    if given is None:
        pairs = partners_by_name(names)
        if not pairs:
            some = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
            raise InputError(
                f"the names of the joints {some} contain no left and right pairs; {HOW_TO_PAIR}", "flip_pairs"
            )
        return pairs
    if list(given) == ["none"]:
        return []
    pairs = []
    for text in given:
        splits = [(text[:i], text[i + 1 :]) for i, c in enumerate(text) if c == ":"]
        pair = next(([one, other] for one, other in splits if one in names and other in names), None)
        if pair is None or pair[0] == pair[1]:
            raise InputError(f"{text} is not a pair of joints ONE:OTHER; joints: {', '.join(names)}")
        pairs.append(pair)
    check_pairs(names, pairs)
    return pairs


def check_pairs(names: Sequence[str], pairs: Any) -> None:
    """Check pairs of joints.

    Raises:
        InputError: They are not pairs of these joints, or a joint is in more than one pair.
    """
    whole = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    joints = [joint for pair in pairs for joint in pair] if whole else []
    if not whole or any(joint not in names for joint in joints) or len(set(joints)) < len(joints):
        raise InputError(f"flip_pairs {checked.format_value(pairs)} must be pairs of joints, each joint in at most one")


def crop_matrix(
    box: Sequence[float], size: Sequence[int], scale: float = 1, turn: float = 0, mirror: bool = False
) -> torch.Tensor:
    """Return the affine map (2, 3) from positions in a person's crop to positions in the image.

    Args:
        box: Left, top, width and height.
        size: Width and height of the crop; the box is enlarged to its aspect ratio, and by `MARGIN`.
        scale: Further factor by which the box is enlarged.
        turn: Rotation of the crop in radians.
        mirror: Whether to mirror the crop.
    """
    x, y, w, h = box
    unit = scale * MARGIN * max(w / size[0], h / size[1])
    cos, sin = unit * math.cos(turn), unit * math.sin(turn)
    linear = torch.tensor([[-cos if mirror else cos, -sin], [-sin if mirror else sin, cos]])
    offset = torch.tensor([x + w / 2, y + h / 2]) - linear @ torch.tensor([size[0] / 2, size[1] / 2])
    return torch.cat([linear, offset[:, None]], 1)


def to_image(places: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Map positions (..., 2) in a crop to the image."""
    # Not a matrix product, which autocast would compute in bfloat16.
    return (places[..., None, :] * matrix[:, :2]).sum(-1) + matrix[:, 2]


def to_crop(places: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Map positions (..., 2) in an image to the crop."""
    return (places - matrix[:, 2]) @ torch.linalg.inv(matrix[:, :2]).T


def encode(places: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return heatmaps (..., h, w) with a Gaussian at each position (..., 2), in cells.

    Sigma is 2 cells for a heatmap of height 64, as in SimpleBaseline's configuration, and proportional to the height.
    """
    h, w = size
    centres = torch.arange(max(h, w), device=places.device) + 0.5
    columns, rows = (torch.exp(-((centres - places[..., axis, None]) ** 2) / (2 * (h / 32) ** 2)) for axis in (0, 1))
    return rows[..., :h, None] * columns[..., None, :w]


def decode(heatmaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions (J, 2) and heights (J,) of the peaks of heatmaps (J, h, w), in cells.

    A position is the centre of the highest cell, shifted by a quarter cell to its higher neighbour in x and in y.
    """
    joints, _, w = heatmaps.shape
    scores, best = heatmaps.flatten(1).max(1)
    x, y, j = best % w, best // w, torch.arange(joints, device=best.device)
    # With reflection, both neighbours of a cell at the edge are equal, and the position is not shifted.
    around = F.pad(heatmaps[None], (1, 1, 1, 1), mode="reflect")[0]
    dx = around[j, y + 1, x + 2] - around[j, y + 1, x]
    dy = around[j, y + 2, x + 1] - around[j, y, x + 1]
    return torch.stack([x, y], 1) + 0.5 + 0.25 * torch.stack([dx, dy], 1).sign(), scores


class OKSAP(Score):
    """COCO's average precision and recall by object keypoint similarity in percent, by faster_coco_eval.

    A person's score is the mean height of the joints' peaks above `SEEN`, times the score of the box. With a
    detector's boxes, persons similar to one of higher score are removed, as in SimpleBaseline (OKS-NMS). Metrics
    without any person in the data, such as those of large persons, are omitted.
    """

    def __init__(self, data: COCOPersons) -> None:
        self.data = data
        self.predictions: list[tuple[int, list[float], float]] = []
        self.gathered: list[tuple[int, list[float], float]] = []
        self.sigmas: Any = [sigma_of(name) for name in data.classes]

    def update(self, i: int, target: dict[str, Any], prediction: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add the joints of a person."""
        places, scores = (tensor.double().cpu() for tensor in prediction)
        seen = scores[scores > SEEN]
        joints = torch.cat([places, torch.ones_like(scores)[:, None]], 1)
        score = seen.mean().item() * self.data.persons[i].score if len(seen) else 0.0
        self.predictions.append((i, joints.flatten().tolist(), score))

    def compute(self, accelerator: Accelerator) -> Figures:
        """Return AP, AP50, AP75, AP_medium, AP_large and AR."""
        from faster_coco_eval import COCO as Persons
        from faster_coco_eval import COCOeval_faster

        data = self.data
        self.gathered = sorted(gather_object(self.predictions))
        if data.found:
            self.gathered = self._without_duplicates(self.gathered)
        truth = Persons(
            {
                "images": [{"id": i, "width": w, "height": h} for i, (_, w, h) in enumerate(data.images)],
                "categories": [{"id": 1, "name": "person"}],
                "annotations": [
                    {
                        **{"id": i, "image_id": person.image, "category_id": 1, "bbox": person.bbox},
                        **{"area": person.area, "iscrowd": int(person.crowd), "num_keypoints": person.labelled},
                        "keypoints": person.joints.flatten().tolist(),
                    }
                    for i, person in enumerate(data.annotations, 1)  # COCO's code treats 0 as missing
                ],
            }
        )
        found = [
            {"image_id": data.persons[i].image, "category_id": 1, "keypoints": joints, "score": score}
            for i, joints, score in self.gathered
        ]
        measured = COCOeval_faster(truth, truth.loadRes(found), "keypoints", kpt_oks_sigmas=self.sigmas)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
        names = ("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR")
        return {name: 100 * float(x) for name, x in zip(names, measured.all_stats, strict=False) if x >= 0}

    def results(self) -> list[dict[str, Any]]:
        """Return the persons in COCO's results format."""
        found = []
        for i, joints, score in self.gathered:
            image = self.data.persons[i].image
            about = {"image_id": self.data.image_ids[image], "category_id": self.data.category_id}
            found.append({**about, "keypoints": self.data.as_annotated(image, joints), "score": score})
        return found

    def _without_duplicates(
        self, predictions: list[tuple[int, list[float], float]]
    ) -> list[tuple[int, list[float], float]]:
        """Remove persons that are similar to one of higher score in the same image."""
        kept: dict[int, list[tuple[int, np.ndarray, float]]] = {}
        for i, joints, _ in sorted(predictions, key=lambda person: -person[2]):
            person = self.data.persons[i]
            # SimpleBaseline normalizes distances by the area of the crop, whose aspect ratio is 3/4.
            area = MARGIN**2 * max(person.bbox[2], 0.75 * person.bbox[3]) ** 2 / 0.75
            places = np.asarray(joints).reshape(-1, 3)[:, :2]
            surer = kept.setdefault(person.image, [])
            if all(self._similarity(places, other, (area + size) / 2) <= ALIKE for _, other, size in surer):
                surer.append((i, places, area))
        chosen = {i for persons in kept.values() for i, _, _ in persons}
        return [person for person in predictions if person[0] in chosen]

    def _similarity(self, one: np.ndarray, other: np.ndarray, area: float) -> float:
        distances = np.square(one - other).sum(1) / (2 * area * np.square(2 * np.asarray(self.sigmas)))
        return float(np.exp(-distances).mean())


class SimpleBaseline(nn.Module):
    """Three deconvolutions on a backbone's last features, and one heatmap per joint (Xiao et al., Section 2).

    Args:
        backbone: timm's `features_only` model.
        joints: Number of joints.

    Attributes:
        stride: Pixels per heatmap cell: 4 for a backbone of stride 32.
    """

    def __init__(self, backbone: Any, joints: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.stride: float = backbone.feature_info.reduction()[-1] / 8
        layers: list[nn.Module] = []
        channels = backbone.feature_info.channels()[-1]
        for inputs in (channels, 256, 256):
            layers += [nn.ConvTranspose2d(inputs, 256, 4, 2, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
        layers.append(nn.Conv2d(256, joints, 1))
        for layer in layers:
            if isinstance(layer, nn.ConvTranspose2d | nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.001)
        nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
        self.head = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return heatmaps (N, J, H / stride, W / stride) for images (N, 3, H, W)."""
        return self.head(self.backbone(images)[-1])


class Keypoints(TaskModel):
    """Keypoint estimation: `classes` are the joints; `img_size` is the height of a crop, and its width is 3/4 of it."""

    task = "keypoints"
    threshold = SEEN
    hub_task = "keypoint-detection"
    heads = ("simplebaseline",)
    img_size = 256
    scales = (0.7, 1.3)
    best = "AP"
    requires: ClassVar = ("faster-coco-eval",)

    @classmethod
    def open(cls, data: str, split: str, head: str, classes: Sequence[str] | None = None) -> COCOPersons:
        """Open a folder in COCO's layout."""
        found = COCOPersons(Path(data), split)
        if classes is not None and list(classes) != found.classes:
            raise InputError(
                f"the joints of {data} ({', '.join(found.classes)}) differ from the model's ({', '.join(classes)})"
            )
        return found

    def __init__(
        self, model: str, classes: Sequence[str], *args: Any, flip_pairs: list[list[str]] | None = None, **kwargs: Any
    ) -> None:
        """Build the model; `flip_pairs` are the pairs of joints that mirroring swaps, by default inferred from names.

        An empty list means that the sides of joints are unknown: no image is mirrored.
        """
        names = list(classes)
        if flip_pairs is None:
            # Joint names of models from earlier versions or other sources may contain no pairs.
            with contextlib.suppress(InputError):
                flip_pairs = partners_by_name(names) or None
        else:
            check_pairs(names, flip_pairs)
        self.mirrors = flip_pairs != []
        other = {one: two for a, b in flip_pairs or () for one, two in ((a, b), (b, a))}
        self.partners = [names.index(other.get(name, name)) for name in names]
        super().__init__(model, classes, *args, **kwargs)
        self.settings["flip_pairs"] = flip_pairs

    @classmethod
    def options(cls, data: Any, given: Sequence[str] | None) -> dict[str, Any]:
        """Return the pairs of the data's joints."""
        return {"flip_pairs": flip_pairs(data.classes, given)}

    def about(self) -> dict[str, str]:
        """Return the pairs of joints that mirroring swaps, and the joints without a pair."""
        if not self.mirrors:
            return {"mirrored": "no"}
        pairs = self.settings["flip_pairs"] or []
        paired = {name for pair in pairs for name in pair}
        alone = [name for name in self.settings["classes"] if name not in paired]
        shown = {"mirrored pairs": ", ".join(" and ".join(pair) for pair in pairs)}
        return shown | ({"without a pair": ", ".join(alone)} if alone else {})

    def build(self, features: Any, **kwargs: Any) -> nn.Module:
        """Build SimpleBaseline on the backbone."""
        height, stride = self.settings["img_size"], features.feature_info.reduction()[-1]
        if height % (4 * stride):
            raise InputError(
                f"keypoints with features of stride {stride} need an image size that is a multiple of {4 * stride}, "
                f"not {height}: the width is 3/4 of it"
            )
        self.size = (3 * height // 4, height)
        check_options(SimpleBaseline, kwargs)
        return SimpleBaseline(features, len(self.partners), **kwargs)

    @property
    def features(self) -> nn.Module:
        """The backbone below the deconvolutions."""
        network: Any = self.network
        return network.backbone

    @property
    def stride(self) -> float:
        """Pixels of a crop per heatmap cell."""
        network: Any = self.network
        return network.stride

    def transform(self, image: Image.Image, target: dict[str, Any], train: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """Crop the person, or the whole image without a box; rotate, scale and mirror at random in training."""
        scale, turn, mirror = 1.0, 0.0, False
        if train:
            scale = float(torch.empty(()).uniform_(*self.scales))
            turn = math.radians(float(torch.empty(()).uniform_(-40, 40)))
            mirror = bool(torch.rand(()) < 0.5) and self.mirrors
        matrix = crop_matrix(target.get("box", (0, 0, *image.size)), self.size, scale, turn, mirror)
        numbers: Any = matrix.flatten().tolist()
        crop = image.transform(self.size, Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR)
        pixels = TF.to_dtype(TF.pil_to_tensor(crop), scale=True)
        if not train:
            return pixels, {"matrix": matrix}
        order = self.partners if mirror else list(range(len(self.partners)))
        places = to_crop(target["joints"][order], matrix) / self.stride
        return pixels, {"matrix": matrix, "places": places, "visible": target["visible"][order]}

    def collate(self, samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> tuple[Any, list[dict[str, Any]]]:
        """Stack the crops and the affine maps from each crop to its image."""
        targets = [target for _, target in samples]
        matrices = torch.stack([target["matrix"] for target in targets])
        return {"crops": torch.stack([crop for crop, _ in samples]), "matrices": matrices}, targets

    def forward(self, images: dict[str, torch.Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        """Return the mean squared error of the heatmaps, or joints (J, 2) and scores (J,) per person.

        Joints are in pixels of the person's image. Joints that are not labelled, or outside the crop, are ignored.
        """
        if targets is not None and self.training:
            heatmaps = self.heatmaps(images["crops"])
            places, visible = (torch.stack([target[key] for target in targets]) for key in ("places", "visible"))
            h, w = heatmaps.shape[2:]
            inside = ((places >= 0) & (places < places.new_tensor([w, h]))).all(-1)
            errors = (heatmaps - encode(places, (h, w))).square().mean((2, 3))
            return {"loss": (errors * (visible & inside)).mean()}
        # One person at a time, so that joints do not depend on the rest of the batch, even by rounding.
        return [self._joints(*person) for person in zip(images["crops"], images["matrices"], strict=True)]

    def heatmaps(self, crops: torch.Tensor) -> torch.Tensor:
        """Return the joints' heatmaps (N, J, h, w) for crops (N, 3, H, W)."""
        return self.network(self.normalize(crops).contiguous(memory_format=torch.channels_last)).float()

    def _joints(self, crop: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mirrors:
            here, there = self.heatmaps(torch.stack([crop, crop.flip(2)]))
            places, scores = decode((here + there.flip(2)[self.partners]) / 2)
        else:
            places, scores = decode(self.heatmaps(crop[None])[0])
        return to_image(places * self.stride, matrix).cpu() - 0.5, scores.cpu()

    def score(self, data: Any) -> OKSAP:
        """Return average precision."""
        return OKSAP(data)

    def draw(self, image: Image.Image, prediction: Any, threshold: float | None = None) -> Image.Image:
        """Draw joints, and bones between joints with COCO's names; left in blue, right in orange."""
        least = self.threshold if threshold is None else threshold
        drawn = image.copy()
        draw, radius = ImageDraw.Draw(drawn), max(2, round(max(image.size) / 120))
        names, (places, scores) = self.settings["classes"], prediction
        seen = {names[j]: tuple(places[j].tolist()) for j in range(len(names)) if scores[j] > least}
        sides = {name: name.partition("_")[0] for name in seen}
        for one, other in BONES:
            if one in seen and other in seen:
                colour = COLOURS.get(sides[one], MIDDLE) if sides[one] == sides[other] else MIDDLE
                draw.line((seen[one], seen[other]), colour, max(1, radius // 2))
        for name, (x, y) in seen.items():
            around = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(around, COLOURS.get(sides[name], MIDDLE), (255, 255, 255))
        return drawn

    def to_records(self, prediction: Any, threshold: float | None = None) -> list[dict[str, Any]]:
        """Return a person's `keypoints`: each one's `label`, `x`, `y` and `score`, regardless of the threshold."""
        places, scores = prediction
        rows = zip(self.settings["classes"], places.tolist(), scores.tolist(), strict=True)
        return [{"keypoints": [{"label": name, "x": x, "y": y, "score": score} for name, (x, y), score in rows]}]
