"""Tests of lists and annotations: names with spaces, pairs, byte-order marks, flags and EXIF orientations."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from res2net_zoo.tasks.detection import COCOFigures
from res2net_zoo.tasks.instances import Instances
from res2net_zoo.tasks.keypoints import OKSAP, COCOPersons
from res2net_zoo.tasks.prediction import predict
from res2net_zoo.tasks.saliency import Masks, read_mask
from res2net_zoo.tasks.segmentation import Segmentation, VOCMasks
from res2net_zoo.tasks.upright import TURNS, transpose_points
from res2net_zoo.utils.errors import InputError
from tests.scenes import JOINTS, save_coco, save_keypoints, save_saliency, save_voc, save_voc_boxes

MARK = "\ufeff"  # a byte-order mark, as written by Windows editors


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return save_coco(tmp_path_factory.mktemp("data") / "shapes", train=1, val=4)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return save_keypoints(tmp_path_factory.mktemp("data") / "people", train=1, val=3)


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    return save_voc(tmp_path_factory.mktemp("data") / "voc", train=6, val=4)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> Path:
    return save_voc_boxes(tmp_path_factory.mktemp("data") / "boxes", train=3, val=1)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Return a folder for one list, with images/train_00000.jpg, masks/train_00000.png and so on."""
    data = save_saliency(tmp_path_factory.mktemp("data") / "scenes", train=4, val=1)
    return data / "train"


def copied(data: Path, folder: Path) -> Path:
    return Path(shutil.copytree(data, folder / data.name))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def names_of(data: Any) -> list[str]:
    return [data.path(i).name for i in range(len(data))]


# Each layout: list, folders of images and of annotations, and suffix of annotations; and its loader.
SEGMENTATION = ("ImageSets/Segmentation/train.txt", "JPEGImages", "SegmentationClass", ".png")
DETECTION = ("ImageSets/Main/train.txt", "JPEGImages", "Annotations", ".xml")
SALIENCY = ("train.txt", "images", "masks", ".png")
OPEN: dict[tuple[str, ...], Callable[[Path], Any]] = {
    SEGMENTATION: lambda data: VOCMasks(data, "train"),
    DETECTION: lambda data: Instances(data, "train", masks=False),
    SALIENCY: lambda data: Masks(data, "train"),
}


@pytest.fixture(params=[SEGMENTATION, DETECTION, SALIENCY], ids=["segmentation", "detection", "saliency"])
def layout(request, voc, boxes, scenes, tmp_path) -> tuple[Path, tuple[str, ...]]:
    data = {SEGMENTATION: voc, DETECTION: boxes, SALIENCY: scenes}[request.param]
    return copied(data, tmp_path), request.param


def rename(data: Path, layout: tuple[str, ...], one: str, other: str) -> None:
    _, images, abouts, suffix = layout
    (data / images / f"{one}.jpg").rename(data / images / f"{other}.jpg")
    (data / abouts / f"{one}{suffix}").rename(data / abouts / f"{other}{suffix}")


def listed(data: Path, layout: tuple[str, ...], text: str | bytes) -> list[str]:
    (data / layout[0]).write_bytes(text if isinstance(text, bytes) else text.encode())
    return names_of(OPEN[layout](data))


def test_names_with_spaces(layout):
    """A file named like the first word exists too, but must not be used."""
    data, kind = layout
    for i, name in enumerate(("photo", "photo 1", "photo  -1")):
        rename(data, kind, f"train_0000{i}", name)
    assert listed(data, kind, "photo 1\nphoto\nphoto  -1\n") == ["photo 1.jpg", "photo.jpg", "photo  -1.jpg"]
    _, images, abouts, suffix = kind
    pair = f"{images}/photo 1.jpg {abouts}/photo 1{suffix}"
    assert listed(data, kind, f"{pair}\n") == ["photo 1.jpg"]
    with pytest.raises(InputError, match=r"cannot find the image photo 3, which .*train.txt names$"):
        listed(data, kind, "photo 3\n")


@pytest.mark.parametrize(
    "text",
    [
        "train_00001\ntrain_00000\n",
        "train_00001.jpg\r\n\r\n  train_00000.jpg  \r\n",
        MARK + "train_00001\rtrain_00000",
        "{images}/train_00001.jpg {abouts}/train_00001{suffix}\n"
        "/{images}/train_00000.jpg\t/{abouts}/train_00000{suffix}",
        "/{images}/train_00001.jpg\n{images}/train_00000.jpg",
        "{data}/{images}/train_00001.jpg\n{images}/../{images}/train_00000.jpg",
    ],
)
def test_lists(layout, text):
    data, kind = layout
    _, images, abouts, suffix = kind
    text = text.format(images=images, abouts=abouts, suffix=suffix, data=data)
    assert listed(data, kind, text) == ["train_00001.jpg", "train_00000.jpg"]


def test_pair_uses_the_named_mask(voc, scenes, tmp_path):
    for data, kind, folder in ((voc, SEGMENTATION, "SegmentationClassAug"), (scenes, SALIENCY, "other")):
        data = copied(data, tmp_path)
        _, images, masks, _ = kind
        (data / folder).mkdir()
        shutil.move(data / masks / "train_00001.png", data / folder / "one.png")
        before = np.asarray(Image.open(data / folder / "one.png"))
        assert listed(data, kind, f"/{images}/train_00001.jpg /{folder}/one.png") == ["train_00001.jpg"]
        after = OPEN[kind](data)[0][1]["mask"].numpy()
        assert np.array_equal(after, before > 0 if kind == SALIENCY else before)
        with pytest.raises(InputError, match=r"cannot find the image .* names, alone or as a pair of files"):
            listed(data, kind, f"/{images}/train_00001.jpg /{folder}/two.png")


def test_repeated_lines(layout, capfd):
    """Each image is used once, with a warning."""
    data, kind = layout
    assert listed(data, kind, "train_00001\ntrain_00000\ntrain_00001.jpg\n") == ["train_00001.jpg", "train_00000.jpg"]
    line = f"train.txt has a line that repeats {data}/{kind[1]}/train_00001.jpg; each image is used once"
    assert capfd.readouterr().err.count(line) == 1
    assert len(listed(data, kind, "train_00000\n" * 3)) == 1
    assert "train.txt has 2 lines that repeat images, such as" in capfd.readouterr().err
    _, images, abouts, suffix = kind
    two = "\n".join(f"{images}/train_00000.jpg {abouts}/train_0000{i}{suffix}" for i in (0, 1))
    with pytest.raises(InputError, match=r"train.txt lists .*train_00000.jpg with both .*00000\.\w+ and .*00001"):
        listed(data, kind, two)


@pytest.mark.first_case
@pytest.mark.parametrize("kind", [SEGMENTATION, DETECTION], ids=["segmentation", "detection"])
def test_ambiguous_line(voc, boxes, tmp_path, kind):
    """The whole line is a file name, but also a pair of files."""
    data = copied(voc if kind == SEGMENTATION else boxes, tmp_path)
    _, images, abouts, suffix = kind
    shutil.copy(data / images / "train_00000.jpg", data / images / "train_00000.jpg.jpg")
    with pytest.raises(InputError, match=r"train_00000.jpg, which matches .*; add the suffix"):
        listed(data, kind, "train_00000.jpg\n")
    (data / f"train_00000.jpg {abouts}").mkdir()
    shutil.copy(data / images / "train_00001.jpg", data / f"train_00000.jpg {abouts}" / f"train_00002{suffix}.jpg")
    with pytest.raises(InputError, match=r"which matches .* or .*; "):
        listed(data, kind, f"train_00000.jpg {abouts}/train_00002{suffix}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("../../etc/passwd", "names ../../etc/passwd, which is outside the data folder"),
        ("a\0b", r"names a\\x00b, which is outside|names a.b, which is outside"),
        ("{images}/../../../x.jpg {abouts}/train_00000{suffix}", "which is outside the data folder"),
        ("fifo.jpg", "(cannot find the image fifo.jpg|the mask for .*fifo.jpg is missing)"),
        ("n" * 300, "cannot find the image nnn"),
        ("word " * 10_000, "train.txt has a line of more than 8,200 characters"),
        ("", "lists no images"),
        (b"G\xe4nse", "cannot read .*train.txt: it is not UTF-8 text"),
    ],
)
def test_invalid_lists(layout, text, expected):
    data, kind = layout
    _, images, abouts, suffix = kind
    os.mkfifo(data / images / "fifo.jpg")
    if isinstance(text, str):
        text = text.format(images=images, abouts=abouts, suffix=suffix)
    with pytest.raises(InputError, match=expected):
        listed(data, kind, text)


def test_flags_of_a_class(boxes, tmp_path):
    """VOC's lists of a class have flags."""
    data = copied(boxes, tmp_path)
    assert listed(data, DETECTION, "train_00000 -1\ntrain_00001  1\ntrain_00002  0\n") == [
        f"train_0000{i}.jpg" for i in range(3)
    ]
    assert Instances(data, "train", masks=False).image_ids == [f"train_0000{i}" for i in range(3)]


def test_byte_order_marks_and_alternative_values(boxes, tmp_path):
    """A byte-order mark in classes.txt and in an annotation, a width of 128.0, a boolean as a word."""
    data = copied(boxes, tmp_path)
    before = Instances(data, "train", masks=False)
    for path in (data / "classes.txt", data / "Annotations/train_00000.xml"):
        path.write_text(MARK + path.read_text())
    path = data / "Annotations/train_00001.xml"
    text = path.read_text().replace("<width>128", "<width>128.0").replace("<difficult>0", "<difficult>False")
    path.write_text(text.replace("<difficult>1", "<difficult> True "))
    after = Instances(data, "train", masks=False)
    assert (after.classes, after.instances) == (before.classes, before.instances)
    (data / "classes.txt").write_text("disc\nsquare\ndisc\ntriangle\n")
    with pytest.raises(InputError, match=r"classes.txt lists the class disc twice"):
        Instances(data, "train", masks=False)


@pytest.mark.parametrize(
    ("value", "crowd"), [("0", False), ("1", True), (False, False), (True, True), ("false", False)]
)
def test_booleans(shapes, people, tmp_path, value, crowd):
    for data, name, read in (
        (shapes, "instances", lambda data: [y for x in Instances(data, "val", False).instances for y in x]),
        (people, "person_keypoints", lambda data: COCOPersons(data, "val").annotations),
    ):
        data = copied(data, tmp_path)
        path = data / f"annotations/{name}_val.json"
        edit(path, lambda content: content["annotations"][0].update(iscrowd=value))
        path.write_text(MARK + path.read_text())
        assert [one.crowd for one in read(data)][:2] == [crowd, False]


def test_large_and_string_ids(shapes, tmp_path):
    """Results use the same ids as the data."""
    data = copied(shapes, tmp_path)

    def change(content: Any) -> None:
        for record in content["annotations"]:
            record.update(image_id=f"image {record['image_id']}", category_id=2**70 + record["category_id"])
        for record in content["images"]:
            record.update(id=f"image {record['id']}", width=128.0)
        for record in content["categories"]:
            record.update(id=2**70 + record["id"])

    edit(data / "annotations/instances_val.json", change)
    found = Instances(data, "val", masks=False)
    assert found.instances == Instances(shapes, "val", masks=False).instances
    assert found.image_ids[0] == "image 7" and found.category_ids[0] == 2**70 + 2


def test_symbolic_link_to_another_folder(shapes, tmp_path):
    data = copied(shapes, tmp_path)
    shutil.move(data / "val", tmp_path / "elsewhere")
    (data / "val").symlink_to(tmp_path / "elsewhere")
    edit(data / "annotations/instances_val.json", lambda x: x["images"][0].update(file_name="./val_00000.jpg"))
    assert len(Instances(data, "val", masks=False)) == 4


def tag(path: Path, orientation: int) -> None:
    """Store an image with an EXIF orientation that restores the original."""
    image = Image.open(path)
    stored = image.transpose({v: k for k, v in BACK.items()}.get(TURNS[orientation], TURNS[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, quality=100, subsampling=0)


BACK = {TURNS[6]: TURNS[8], TURNS[8]: TURNS[6]}


@pytest.mark.parametrize("orientation", range(2, 9))
def test_points_follow_transposition(orientation):
    pixels = np.zeros((5, 7), dtype=np.uint8)
    pixels[1, 5] = 255
    turned = np.asarray(Image.fromarray(pixels).transpose(TURNS[orientation]))
    ((y, x),) = np.argwhere(turned)
    assert transpose_points(np.array([5.5, 1.5]), TURNS[orientation], 7, 5).tolist() == [x + 0.5, y + 0.5]


def alike(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).mean() < 6


def stored_frame(content: Any, orientation: int) -> None:
    """Rewrite annotations for the stored pixels of images with this orientation."""
    turn = TURNS[orientation]
    back = BACK.get(turn, turn)
    for record in content["annotations"]:
        x, y, w, h = record["bbox"]
        (one, other) = transpose_points(
            np.array([[x, y], [x + w, y + h]]), back, *SIZES[len(record.get("keypoints", ())) > 0]
        )
        record["bbox"] = [*np.minimum(one, other).tolist(), *np.abs(one - other).tolist()]
        size = SIZES["keypoints" in record]
        if "keypoints" in record:
            joints = np.array(record["keypoints"], dtype=float).reshape(-1, 3)
            joints[:, :2] = transpose_points(joints[:, :2] + 0.5, back, *size) - 0.5
            record["keypoints"] = joints.flatten().tolist()
        elif isinstance(record["segmentation"], list):
            record["segmentation"] = [
                transpose_points(np.array(p).reshape(-1, 2), back, *size).flatten().tolist()
                for p in record["segmentation"]
            ]
        else:
            record["segmentation"] = [[0, 0, 9, 0, 9, 9]]
    for record in content["images"]:
        record.update(width=record["height"], height=record["width"])


SIZES = {False: (128, 96), True: (160, 120)}


@pytest.mark.first_case
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("stored", [False, True])
def test_boxes_and_masks_of_turned_images(shapes, tmp_path, capfd, orientation, stored):
    """Images and objects are upright, whether annotations are for the upright or for the stored pixels."""
    data, name = copied(shapes, tmp_path), "annotations/instances_val.json"
    only_polygons = lambda x: x.update(annotations=[y for y in x["annotations"] if isinstance(y["segmentation"], list)])  # noqa: E731
    edit(data / name, only_polygons)
    before = Instances(data, "val", masks=True)
    plain = [before[i] for i in range(4)]
    for path in (data / "val").iterdir():
        tag(path, orientation)
    if stored:
        edit(data / name, lambda content: stored_frame(content, orientation))
    after = Instances(data, "val", masks=True)
    warned = capfd.readouterr().err
    assert ("4 images such as" in warned and "annotations for the stored pixels" in warned) == stored
    for i, (image, target) in enumerate(plain):
        seen, found = after[i]
        assert alike(image, seen)
        assert torch.allclose(found["boxes"], target["boxes"]) and torch.equal(found["labels"], target["labels"])
        assert (found["masks"] != target["masks"]).float().mean() < 0.01
    # Results refer to the same pixels as the annotations.
    score = COCOFigures(after)
    target = after[0][1]
    score.update(0, {}, {**target, "scores": torch.ones(len(target["labels"])), "masks": target["masks"].bool()})
    score.found = score.predictions[0][1]
    records = [x for x in json.loads((data / name).read_text())["annotations"] if x["image_id"] == 7]
    for result, record in zip(score.results(), records, strict=True):
        assert result["bbox"] == pytest.approx(record["bbox"])
        size = result["segmentation"]["size"]
        assert size == ([128, 96] if stored else [96, 128])


@pytest.mark.parametrize("stored", [False, True])
def test_joints_of_turned_images(people, tmp_path, stored):
    data, name = copied(people, tmp_path), "annotations/person_keypoints_val.json"
    before = COCOPersons(data, "val")
    for path in (data / "val").iterdir():
        tag(path, 6)
    if stored:
        edit(data / name, lambda content: stored_frame(content, 6))
    after = COCOPersons(data, "val")
    for i in range(len(before)):
        (image, target), (seen, found) = before[i], after[i]
        assert alike(image, seen) and found["box"] == pytest.approx(target["box"])
        assert torch.allclose(found["joints"][found["visible"]], target["joints"][target["visible"]])
    score, record = OKSAP(after), json.loads((data / name).read_text())["annotations"][0]
    score.update(0, {}, (after[0][1]["joints"] - 0.5, torch.ones(len(JOINTS))))
    score.gathered = score.predictions
    (result,) = score.results()
    right, there = (np.array(x["keypoints"]).reshape(-1, 3) for x in (record, result))
    assert there[right[:, 2] > 0, :2] == pytest.approx(right[right[:, 2] > 0, :2], abs=1e-3)
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{**{k: record[k] for k in ("image_id", "category_id", "bbox")}, "score": 1}]))
    after.take_boxes(boxes)
    assert after[0][1]["box"] == pytest.approx(before[0][1]["box"])


@pytest.mark.parametrize("turned_mask", [False, True])
def test_masks_of_turned_images(voc, scenes, tmp_path, turned_mask):
    for data, kind in ((voc, SEGMENTATION), (scenes, SALIENCY)):
        data = copied(data, tmp_path)
        _, images, masks, suffix = kind
        (data / kind[0]).write_text("train_00000\ntrain_00001")
        before = [OPEN[kind](data)[i] for i in range(2)]
        tag(data / images / "train_00000.jpg", 6)
        if turned_mask:
            path = data / masks / f"train_00000{suffix}"
            Image.open(path).transpose(TURNS[8]).save(path)
        after = OPEN[kind](data)
        for (image, target), (seen, found) in zip(before, (after[i] for i in range(2)), strict=True):
            assert alike(image, seen) and torch.equal(found["mask"], target["mask"])


def test_ambiguous_orientation(shapes, tmp_path, capfd):
    """Half a turn does not change the size: annotations are assumed to be upright, with a warning."""
    data = copied(shapes, tmp_path)
    before = Instances(data, "val", masks=False)[0][0]
    for i in (0, 1):
        tag(data / f"val/val_0000{i}.jpg", 3)
    after = Instances(data, "val", masks=False)[0][0]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: 2 images such as ") and "orientation that does not change the size" in line
    assert alike(before, after)


def test_prediction_and_training_decode_images_alike(shapes, tmp_path):
    path = copied(shapes, tmp_path) / "val/val_00000.jpg"
    before = Image.open(path).convert("RGB")
    tag(path, 6)
    seen = []
    model = Segmentation("res2net_tiny", ["a", "b"], "unet", 64).eval()
    model.transform = lambda image, target, train: (seen.append(image), (torch.zeros(3, 8, 8), target))[1]  # type: ignore

    class Here:
        device = torch.device("cpu")
        is_main_process = True

        def autocast(self) -> Any:
            return torch.inference_mode()

    model.draw = lambda image, prediction, threshold: image  # type: ignore
    ((picture, _),) = predict(model, [path], Here())  # type: ignore
    assert alike(seen[0], before) and alike(picture, before)
    trained = Instances(path.parents[1], "val", masks=False)[0][0]
    assert trained.tobytes() == seen[0].tobytes()


def test_sixteen_bits(scenes, tmp_path):
    """A 16-bit image is scaled to 8 bits, and a mask is thresholded at half of its range."""
    data = copied(scenes, tmp_path)
    (data / "train.txt").write_text("train_00000")
    path = data / "images/train_00000.jpg"
    grey = np.asarray(Image.open(path).convert("L"))
    path.unlink()
    Image.fromarray(grey.astype(np.uint16) * 257).save(path.with_suffix(".png"))
    mask = data / "masks/train_00000.png"
    right = np.asarray(Image.open(mask)) > 0
    Image.fromarray(np.where(right, 40_000, 9_000).astype(np.uint16)).save(mask)
    image, target = Masks(data, "train")[0]
    assert np.array_equal(np.asarray(image)[..., 0], grey) and np.array_equal(target["mask"].numpy(), right)
    Image.fromarray(grey.astype(np.float32)).save(path.with_suffix(".tiff"))
    path.with_suffix(".png").unlink()
    (data / "train.txt").write_text("images/train_00000.tiff")
    with pytest.raises(InputError, match=r"train_00000.tiff, which .*train.txt names: floating-point pixels"):
        Masks(data, "train")


RIGHT = np.zeros((20, 30), dtype=np.uint8)
RIGHT[5:15, 8:20] = 255
GREY = np.full_like(RIGHT, 200)


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("channels", "mode"),
    [
        ((RIGHT,), "L"),
        ((RIGHT, GREY * 0 + 255), "LA"),
        ((GREY, RIGHT), "LA"),
        ((RIGHT, RIGHT), "LA"),
        ((GREY * 0, GREY * 0, GREY * 0, RIGHT), "RGBA"),
        ((GREY, GREY, GREY, RIGHT), "RGBA"),
        ((RIGHT, RIGHT, RIGHT, GREY), "RGBA"),
        ((RIGHT, RIGHT, RIGHT, RIGHT), "RGBA"),
    ],
)
def test_masks_in_an_alpha_channel(tmp_path, channels, mode):
    path = tmp_path / "mask.png"
    bands = [Image.fromarray(channel) for channel in channels]
    (bands[0] if mode == "L" else Image.merge(mode, bands)).save(path)
    assert np.array_equal(read_mask(path), RIGHT > 0)
    Image.fromarray(RIGHT > 0).save(path)
    assert np.array_equal(read_mask(path), RIGHT > 0)
    palette = Image.fromarray(RIGHT // 255).convert("P")
    palette.putpalette([9, 9, 9, 9, 9, 9])
    palette.save(path, transparency=b"\0\xff")
    assert np.array_equal(read_mask(path), RIGHT > 0)


def test_contradicting_alpha_channel_and_colours(tmp_path):
    path = tmp_path / "mask.png"
    Image.merge("LA", [Image.fromarray(RIGHT), Image.fromarray(RIGHT.T.copy().reshape(RIGHT.shape))]).save(path)
    with pytest.raises(OSError, match=r"its colours and its alpha channel show different objects"):
        read_mask(path)
