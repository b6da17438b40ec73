"""Tests of detection: COCO's metrics, augmentation of boxes and masks, invalid data in both layouts."""

import csv
import itertools
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from faster_coco_eval.core import mask as rle
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image
from torch import nn

from res2net_zoo import catalog, tasks
from res2net_zoo.tasks import base
from res2net_zoo.tasks.detection import FIGURES, VOC07, COCOFigures, Detection
from res2net_zoo.tasks.drawing import covered, draw_labels
from res2net_zoo.tasks.instances import Instances
from res2net_zoo.utils.errors import InputError
from tests.conftest import SMALL, input_error, spread
from tests.scenes import KINDS, run_lengths, save_coco, save_voc_boxes
from tests.training.test_survival import Running

TRAIN, VALIDATE, PREDICT = (f"scripts/{name}_task.py" for name in ("train", "validate", "predict"))
TINY = ["--task", "detection", "--model", "res2net_tiny", "--img-size", 64, "--workers", 0, "--threads", 1]
VAL = "annotations/instances_val.json"


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they save on tiny images."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return save_coco(tmp_path_factory.mktemp("data") / "shapes", train=4, val=5)


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    return save_voc_boxes(tmp_path_factory.mktemp("data") / "voc", train=4, val=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes) -> Path:
    """The folder of a briefly trained model."""
    folder = tmp_path_factory.mktemp("trained") / "masks"
    args = ["--data", shapes, "--head", "maskrcnn", "--epochs", 1, "--batch-size", 2, "--license", "apache-2.0"]
    done = Running(folder, *TINY, *args, script=TRAIN).end()
    assert done.returncode == 0, done.stderr
    return folder


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def found_as_true(model: Any, shapes: Path, folder: Path) -> Path:
    """Copy the data and use some predictions as annotations, so that even a bad model has true positives."""
    data = Path(shutil.copytree(shapes, folder))
    opened, annotations = model.open(str(shapes), "val", "maskrcnn"), []
    numbers = [image["id"] for image in json.loads((data / VAL).read_text())["images"]]
    for i in range(len(opened)):
        with torch.inference_mode():
            (found,) = model([model.transform(*opened[i], False)[0]])
        for j in range(0, len(found["boxes"]), 7):
            left, top, right, bottom = found["boxes"][j].tolist()
            about = {"image_id": numbers[i], "category_id": 3 * found["labels"][j].item() - 1, "iscrowd": 0}
            about |= {"bbox": [left, top, right - left, bottom - top], "id": len(annotations) + 1}
            about["area"] = about["bbox"][2] * about["bbox"][3]
            annotations.append({**about, "segmentation": run_lengths(found["masks"][j].numpy())})
    assert len(annotations) > 20
    edit(data / VAL, lambda content: content.update(annotations=annotations))
    return data


def test_validation_reproduces_training_metrics(trained, shapes, in_process, tmp_path):
    """Training and validation have the same metrics, and pictures have the size of their images."""
    (row,) = csv.DictReader((trained / "metrics.csv").open())
    args = ["--threads", 1, "--workers", 0]
    done = in_process(VALIDATE, trained, *args, "--data", shapes, "--check", "--output", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "figures.json").read_text())
    assert {name: float(row[name]) for name in result["figures"]} == result["figures"]
    assert {"AP", "AR", "AP_medium", "box AP", "box AP50"} <= set(result["figures"]) and result["samples"] == 5
    done = in_process(PREDICT, trained, shapes / "val", "--threads", 1, "--output", tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    assert {Image.open(path).size for path in (tmp_path / "seen").glob("*.png")} == {(128, 96)}


@pytest.mark.full
def test_evaluation_on_two_processes(trained, shapes, program, in_process, tmp_path):
    """The written results also have the same metrics by pycocotools."""
    data, found = found_as_true(tasks.load(str(trained)), shapes, tmp_path / "shapes"), []
    for number, start in ((1, in_process), (2, partial(program, processes=2))):
        output = tmp_path / f"{number}.json"
        args = ["--data", data, "--batch-size", 2, "--threads", 1, "--output", output]
        done = start(VALIDATE, trained, *args, "--results", tmp_path / f"found{number}.json")
        assert done.returncode == 0, done.stderr
        assert "Average" not in done.stdout
        (result,) = json.loads(output.read_text())
        assert result["num_processes"] == number
        found.append(result["figures"])
    assert found[0] == found[1] and 1 < found[0]["AP"] < 100
    one, two = (json.loads((tmp_path / f"found{number}.json").read_text()) for number in (1, 2))
    assert one == two and len(one) > 20
    theirs = {f"box {name}": value for name, value in pycocotools_figures(data / VAL, two, "bbox").items()}
    # Given both, pycocotools computes the areas of masks from the boxes.
    masks = [{key: value for key, value in one.items() if key != "bbox"} for one in two]
    theirs |= pycocotools_figures(data / VAL, masks, "segm")
    assert {name: theirs[name] for name in found[0]} == pytest.approx(found[0], abs=1e-9)


def test_saved_model_predicts_the_same_objects(trained, shapes):
    """Bit-identical in a batch with another size too."""
    model, again = tasks.load(str(trained)), tasks.load(str(trained))
    data = model.open(str(shapes), "val", "maskrcnn", list(KINDS))
    images = [model.transform(*data[i], False)[0] for i in range(2)]
    images[1] = images[1][:, :50]
    with torch.inference_mode():
        for image, found in zip(images, model(images), strict=True):
            (alone,) = again([image])
            assert list(found) == list(alone) and all(torch.equal(found[name], alone[name]) for name in found)
            assert len(found["boxes"]) > 0 and found["masks"].shape[1:] == image.shape[1:]
            assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


@pytest.mark.full
def test_publish_verify_and_load(trained, shapes, hub, in_process):
    """A detector from the Hub has the same metrics, and its backbone initializes other tasks."""
    done = in_process("hub/publish.py", trained, "--repo-id", "zoo/masks")
    assert done.returncode == 0 and "published: " in done.stdout, done.stderr
    done = in_process("hub/verify.py", "zoo/masks")
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout
    done = in_process(VALIDATE, "hf-hub:zoo/masks", "--threads", 1, "--data", shapes, "--check")
    assert done.returncode == 0, done.stdout
    ours, theirs = tasks.load(str(trained)), tasks.load("hf-hub:zoo/masks")
    with torch.inference_mode():
        (one,), (two,) = (model([torch.rand(3, 70, 90, generator=torch.manual_seed(0))]) for model in (ours, theirs))
    assert len(one["boxes"]) and all(torch.equal(one[name], two[name]) for name in one)
    folder = snapshot_download("zoo/masks")
    assert ModelCard.load(Path(folder) / "README.md").data.pipeline_tag == "object-detection"
    for task in ("segmentation", "keypoints", "saliency"):
        model = tasks.task_class(task)(f"local-dir:{folder}/backbone", ["a"], img_size=128, pretrained=True)
        weights = ours.features.state_dict()
        found = model.features.state_dict()
        assert set(found) <= set(weights) and len(found) > 100
        assert all(torch.equal(weights[name], value) for name, value in found.items())


@pytest.mark.first_case
@pytest.mark.parametrize("head", Detection.heads)
def test_every_head_trains(head, shapes):
    """A step changes all weights except for frozen ones; images without objects are supported."""
    torch.manual_seed(0)
    model = Detection("res2net_tiny", KINDS, head, 64)
    spread(model.features)  # initial BatchNorm weights of 0 block gradients if frozen
    data = model.open(str(shapes), "train", head)
    model.freeze("2", batch_norm=True)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = [model.transform(*data[i], True) for i in range(2)]
    empty = {name: value[:0] for name, value in samples[0][1].items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for targets in ([target for _, target in samples], [samples[0][1], empty], [empty, empty]):
        losses = model([image for image, _ in samples], targets)
        loss = sum(losses.values())
        assert len(losses) >= 2 and torch.isfinite(loss)
        loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    kept = {name for name, value in model.state_dict().items() if torch.equal(before[name], value)}
    prefix = "network.backbone.backbone."
    inside = [name.removeprefix(prefix) for name in before if name.startswith(prefix)]
    assert inside == list(model.features.state_dict())
    norms = {name for name, module in model.features.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name in inside:
        fixed = name.startswith(("conv1", "bn1", "layer1")) or name.rpartition(".")[0] in norms
        assert (prefix + name in kept) == fixed, name


@pytest.mark.first_case
@pytest.mark.parametrize("head", Detection.heads)
@pytest.mark.parametrize("name", SMALL)
def test_every_family(name, head, monkeypatch):
    small = lambda model, pretrained, **options: timm.create_model(model, **options, **SMALL[model])  # noqa: E731
    monkeypatch.setattr(base, "create_model", small)
    size = 32 if "next29" in name else 64
    model: Any = Detection(name, KINDS, head, size)
    finest = 1 if "next29" in name else 8 if head == "retinanet" else 4
    strides = model.network.backbone.strides
    assert strides == [finest * 2**i for i in range(len(strides))]
    levels = model.network.backbone(torch.rand(1, 3, 64, 64))
    assert [level.shape[-1] for level in levels.values()] == [max(1, 64 // stride) for stride in strides]
    target = {"boxes": torch.tensor([[3.0, 5, 30, 28]]), "labels": torch.tensor([2])}
    target["masks"] = torch.ones(1, size, size, dtype=torch.uint8)
    losses = model.train()([torch.rand(3, size, size)], [target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    (found,) = model.eval()([torch.rand(3, 50, 41)])
    assert found["boxes"].shape == (len(found["scores"]), 4)


def test_anchors_are_exact_in_mixed_precision():
    """In bfloat16 a coordinate near 1000 is off by up to 4 pixels."""
    torch.manual_seed(0)
    model: Any = Detection("res2net_tiny", KINDS, "maskrcnn", 64).eval()
    image = torch.rand(3, 64, 90)
    with torch.inference_mode():
        (before,) = model([image])
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = model([image])
            assert {value.dtype for value in model.network.backbone(image[None]).values()} == {torch.float32}
        (after,) = model([image])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_objects_are_augmented_like_images(shapes):
    model = Detection("res2net_tiny", KINDS, "maskrcnn", 64)
    data, mirrored = model.open(str(shapes), "train", "maskrcnn"), set()
    image, target = data[0]
    pixels = model.transform(image, target, False)[0]
    for seed in range(8):
        torch.manual_seed(seed)
        seen, found = model.transform(image, target, True)
        mirrored.add(turned := not torch.equal(seen, pixels))
        assert torch.equal(seen, pixels.flip(2) if turned else pixels)
        assert torch.equal(found["masks"], target["masks"].flip(2) if turned else target["masks"])
        for box, shape in zip(found["boxes"], found["masks"], strict=True):
            rows, columns = shape.nonzero().T
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert mirrored == {True, False}


def crowd_in(content: dict[str, Any]) -> None:
    """Change areas, remove one, and add a crowd to each image."""
    rng, records = np.random.default_rng(0), content["annotations"]
    for record in records:
        record["area"] *= float(rng.choice([0.2, 1, 30]))
    for image in content["images"]:
        shape = np.zeros((96, 128), dtype=bool)
        shape[5:60, 10:90] = True
        about = {"image_id": image["id"], "category_id": 5, "iscrowd": 1, "area": 4400, "bbox": [10, 5, 80, 55]}
        records.append({**about, "id": len(records) + 1, "segmentation": run_lengths(shape)})


def pycocotools_figures(path: Path, found: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Return the metrics of objects by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(path))
    measured = COCOeval(truth, truth.loadRes(found), kind)
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    return {name: 100 * value for name, value in zip(FIGURES, measured.stats, strict=True) if value >= 0}


def test_metrics_match_pycocotools(shapes, tmp_path):
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    edit(data / VAL, crowd_in)
    content, rng = json.loads((data / VAL).read_text()), np.random.default_rng(1)
    numbers = [image["id"] for image in content["images"]]
    for masks in (False, True):
        instances = Instances(data, "val", masks)
        for noise in (0, 2, 6):
            score, of_boxes, of_masks = COCOFigures(instances), [], []
            for i in rng.permutation(len(instances)).tolist():
                there = [record for record in content["annotations"] if record["image_id"] == numbers[i]]
                there = [record for record in there if not noise or rng.random() < 0.9]
                boxes = torch.tensor([record["bbox"] for record in there]).reshape(-1, 4).float()
                boxes[:, 2:] += boxes[:, :2]
                boxes += noise * torch.from_numpy(rng.normal(0, 1, boxes.shape)).float()
                labels = torch.tensor([(record["category_id"] + 1) // 3 for record in there], dtype=torch.long)
                labels[rng.random(len(labels)) < 0.02 * noise] = 1
                shown = torch.zeros(len(there), 96, 128, dtype=torch.bool)
                for shape, (left, top, right, bottom) in zip(shown, boxes.round().long().clamp(min=0), strict=True):
                    shape[top:bottom, left:right] = True
                scores = torch.from_numpy(rng.uniform(0.05, 1, len(there))).float()
                predicted = {"boxes": boxes, "labels": labels, "scores": scores, "masks": shown}
                score.update(i, {}, predicted)
                for k in range(len(there)):
                    about = {"image_id": numbers[i], "category_id": 3 * labels[k].item() - 1}
                    about["score"] = float(scores[k].double())
                    left, top, right, bottom = boxes[k].double().tolist()
                    of_boxes.append({**about, "bbox": [left, top, right - left, bottom - top]})
                    packed = rle.encode(np.asfortranarray(shown[k].numpy(), dtype=np.uint8))
                    of_masks.append({**about, "segmentation": packed})
            figures = score.compute(Accelerator(cpu=True))
            theirs = pycocotools_figures(data / VAL, of_boxes, "bbox")
            if masks:
                theirs = {f"box {name}": value for name, value in theirs.items()}
                theirs |= pycocotools_figures(data / VAL, of_masks, "segm")
            theirs = {name: value for name, value in theirs.items() if not re.search("AR1", name)}
            assert figures == pytest.approx(theirs, abs=1e-9) and len(figures) == len(theirs) >= 10
            best = "box AP" if masks else "AP"
            assert figures[best] == pytest.approx(100) if noise == 0 else 0 < figures[best] < 100


def test_class_missing_from_the_data(shapes):
    """Its predictions do not affect the metrics, and are omitted from the results."""
    data = Instances(shapes, "val", masks=False, classes=["egg", *KINDS])
    score = COCOFigures(data)
    for i, instances in enumerate(data.instances):
        boxes = torch.tensor([one.bbox for one in instances] * 2)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([*(one.label for one in instances), *(1 for _ in instances)])
        score.update(i, {}, {"boxes": boxes, "labels": labels, "scores": torch.linspace(1, 0.5, len(labels))})
    assert score.compute(Accelerator(cpu=True))["AP"] == pytest.approx(100)
    assert [one["category_id"] for one in score.results()] == [3 * one.label - 4 for x in data.instances for one in x]


def test_metrics_without_predictions(shapes):
    for masks in (False, True):
        score = COCOFigures(Instances(shapes, "val", masks))
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
        score.update(0, {}, {**nothing, "masks": torch.zeros(0, 96, 128, dtype=torch.bool)})
        assert set(score.compute(Accelerator(cpu=True)).values()) == {0}


def test_published_metrics_have_known_names():
    targets = [target for target in catalog.load().targets if target.task == "detection"]
    assert targets and all(set(target.figures) <= {*FIGURES, VOC07} for target in targets)


def test_difficult_objects_are_ignored(voc, tmp_path):
    """They affect neither metrics nor training."""
    data = Path(shutil.copytree(voc, tmp_path / "voc"))
    for path in (data / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<difficult>1", "<difficult>0"))
    hard = next(path for path in sorted((data / "Annotations").glob("val*")) if path.read_text().count("<object>") > 1)
    hard.write_text(hard.read_text().replace("<difficult>0", "<difficult>1", 1))
    instances = Instances(data, "val", masks=False)
    i = [instances.path(i).stem for i in range(len(instances))].index(hard.stem)
    assert len(instances[i][1]["boxes"]) == len(instances.instances[i]) - 1
    for also in (False, True):
        score = COCOFigures(instances)
        for k in range(len(instances)):
            there = [one for one in instances.instances[k] if one.trained_on or also]
            boxes = torch.tensor([one.bbox for one in there]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor([one.label for one in there], dtype=torch.long)
            # The difficult object has the highest score, which would affect the metrics most.
            scores = torch.tensor([0.5 if one.trained_on else 0.9 for one in there])
            score.update(k, {}, {"boxes": boxes, "labels": labels, "scores": scores})
        assert score.compute(Accelerator(cpu=True))["AP"] == pytest.approx(100)


def test_region_pooling_does_not_depend_on_the_first_image():
    """By default torchvision infers the levels' scales from the first image, which fails for this one."""
    model = spread(Detection("res2net_tiny", KINDS, "maskrcnn", 64)).eval()
    image = torch.rand(3, 64, 64)
    with torch.inference_mode():
        model([torch.rand(3, 40, 107)])
        (one,) = model([image])
        again = Detection("res2net_tiny", KINDS, "maskrcnn", 64).eval()
        again.load_state_dict(model.state_dict())
        (other,) = again([image])
    assert len(one["boxes"]) and all(torch.equal(one[name], other[name]) for name in one)
    assert model.network.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_very_narrow_boxes_are_not_trained_on(shapes, tmp_path):
    """Such boxes become empty in float32, and torchvision rejects empty boxes."""
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    edit(data / VAL, lambda content: content["annotations"][0].update(bbox=[100, 10, 1e-6, 20]))
    edit(data / VAL, lambda content: content["annotations"][1].update(bbox=[-1, 10, 1.000001, 20]))
    instances = Instances(data, "val", masks=True)
    for i, there in enumerate(instances.instances):
        target = instances[i][1]
        thin = sum(one.bbox[2] < 2 for one in there)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == len(there) - thin
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    assert sum(one.bbox[2] < 2 for there in instances.instances for one in there) == 2


def voc07(truth: list[tuple[int, int, list[float]]], found: list[tuple[int, int, list[float], float]]) -> float:
    """Return VOC07's average precision of (image, class, box) and (image, class, box, score) by its definition."""
    averages = []
    for label in {label for _, label, _ in truth}:
        left = [(image, box) for image, kind, box in truth if kind == label]
        number, right = len(left), []
        every = list(left)
        for image, _, box, _ in sorted((one for one in found if one[1] == label), key=lambda one: -one[3]):
            like = [other for other in every if other[0] == image and overlap(box, other[1]) >= 0.5]
            nearest = max(like, key=lambda other: overlap(box, other[1]), default=None)
            right.append(nearest in left)
            if nearest in left:
                left.remove(nearest)
        hits = np.cumsum(right)
        recalls, precisions = hits / number, hits / np.arange(1, len(right) + 1)
        highest = [
            max((p for r, p in zip(recalls, precisions, strict=True) if r > t / 10 - 1e-9), default=0)
            for t in range(11)
        ]
        averages.append(np.mean(highest))
    return 100 * float(np.mean(averages))


def overlap(one: list[float], other: list[float]) -> float:
    """Return the intersection over union of two boxes (left, top, width, height)."""
    sides = [max(0, min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i])) for i in (0, 1)]
    both = sides[0] * sides[1]
    return both / (one[2] * one[3] + other[2] * other[3] - both)


def test_average_precision_of_voc07(tmp_path):
    data, rng = (
        Instances(save_voc_boxes(tmp_path / "voc", train=1, val=20), "val", masks=False),
        np.random.default_rng(3),
    )
    for difficult in (one for image in data.instances for one in image if not one.trained_on):
        difficult.area = 9.0
    score, truth, all_found = COCOFigures(data), [], []
    for i, instances in enumerate(data.instances):
        truth += [(i, one.label, one.bbox) for one in instances]
        found = [one for one in instances if rng.random() < 0.9] * 2
        boxes = torch.tensor([one.bbox for one in found]).reshape(-1, 4) + torch.from_numpy(
            rng.normal(0, 3, (len(found), 4))
        )
        boxes[:, 2:] = boxes[:, 2:].clamp(min=1)
        scores = torch.from_numpy(rng.random(len(found)))
        labels = [one.label if rng.random() < 0.8 else 1 for one in found]
        all_found += [(i, *one) for one in zip(labels, boxes.tolist(), scores.tolist(), strict=True)]
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        score.update(i, {}, {"boxes": corners, "labels": torch.tensor(labels), "scores": scores})
    figures = score.compute(Accelerator(cpu=True))
    assert figures[VOC07] == pytest.approx(voc07(truth, all_found), abs=1e-6)
    # Images in VOC's layout have names as ids.
    (first, *_), result = all_found, score.results()[0]
    assert result["bbox"] == pytest.approx(first[2]) and list(result) == ["image_id", "category_id", "bbox", "score"]
    assert (result["image_id"], result["category_id"], result["score"]) == ("val_00000", first[1], first[3])
    assert 20 < figures[VOC07] < 90 and abs(figures[VOC07] - figures["AP50"]) > 0.1


def test_detections_of_difficult_objects_are_ignored(voc, tmp_path):
    """VOC07's metric ignores any number of them; the other object has the lowest score."""
    data = Path(shutil.copytree(voc, tmp_path / "voc"))
    (name,) = (data / "ImageSets/Main/val.txt").read_text().split()[:1]
    (data / "ImageSets/Main/val.txt").write_text(name)
    about = data / f"Annotations/{name}.xml"
    size = about.read_text()[: about.read_text().index("<object>")]
    one = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>{}</xmax>"
    one += "<ymax>40</ymax></bndbox></object>"
    about.write_text(f"{size}{one.format(KINDS[0], 0, 1, 40)}{one.format(KINDS[0], 1, 61, 100)}</annotation>")
    score = COCOFigures(Instances(data, "val", masks=False))
    boxes = torch.tensor([[60.0, 0, 100, 40], [61, 0, 100, 40], [62, 0, 100, 40], [0, 0, 40, 40]])
    labels, scores = torch.ones(4, dtype=torch.long), torch.tensor([0.9, 0.8, 0.7, 0.6])
    score.update(0, {}, {"boxes": boxes, "labels": labels, "scores": scores})
    figures = score.compute(Accelerator(cpu=True))
    assert figures[VOC07] == 100 and figures["AP50"] < 50


def test_voc_and_coco_have_the_same_boxes(shapes, voc):
    ours, theirs = Instances(shapes, "val", masks=False), Instances(voc, "val", masks=False)
    assert ours.classes == theirs.classes == list(KINDS)
    for one, other in zip(ours.instances, theirs.instances, strict=True):
        assert [(x.label, x.bbox) for x in one] == [(x.label, x.bbox) for x in other]


def test_training_on_voc(voc, in_process, tmp_path):
    args = ["--data", voc, "--head", "retinanet", "--epochs", 1, "--batch-size", 2]
    done = in_process(TRAIN, *TINY, *args, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader((tmp_path / "out/metrics.csv").open())
    assert float(row["AP50"]) >= float(row["AP"]) >= 0


def test_drawing():
    """Objects over the threshold are drawn in the colours of their classes on a copy of the image."""
    model = Detection("res2net_tiny", KINDS, "maskrcnn", 64)
    image = Image.new("RGB", (200, 150))
    masks = torch.zeros(2, 150, 200, dtype=torch.bool)
    masks[:, 60:100, 60:100] = True
    found = {"boxes": torch.tensor([[50.0, 50, 110, 110], [5, 5, 20, 20]]), "labels": torch.tensor([2, 1])}
    drawn = model.draw(image, {**found, "scores": torch.tensor([0.9, 0.4]), "masks": masks})
    assert drawn.getpixel((50, 80)) == (0, 128, 0) and drawn.getpixel((80, 80)) == (0, 64, 0)
    assert drawn.getpixel((5, 12)) == (0, 0, 0) and image.getextrema() == ((0, 0),) * 3
    both = {"boxes": found["boxes"][[0, 0]], "labels": torch.tensor([2, 1]), "masks": masks}
    assert model.draw(image, {**both, "scores": torch.tensor([0.9, 0.6])}).getpixel((50, 80)) == (0, 128, 0)
    lit = Image.new("RGB", (200, 150), "white")
    over = model.draw(lit, {**both, "scores": torch.tensor([0.9, 0.6]), "masks": masks | masks.flip(0)})
    assert over.getpixel((80, 80)) == (127, 191, 127)  # overlapping masks have the first one's colour
    unsure = model.draw(image, {**found, "scores": torch.tensor([0.1, 0.1]), "masks": masks})
    assert unsure.tobytes() == image.tobytes()


@pytest.mark.parametrize("seed", range(3))
def test_labels_of_a_crowded_image_do_not_overlap(seed):
    """Labels of twenty overlapping boxes do not overlap, and are within the image."""
    boxes = (
        torch.rand(20, 4, generator=torch.Generator().manual_seed(seed)) * 200 + torch.tensor([0, 0, 200, 200])
    ).tolist()
    image = Image.new("RGB", (480, 400))
    placed = draw_labels(image, boxes, [f"thing {i}" for i in range(20)], [(255, 255, 0)] * 20)
    assert not any(covered(one, [other]) for one, other in itertools.combinations(placed, 2))
    assert all(x0 >= 0 and y0 >= 0 and x1 < 480 and y1 < 400 for x0, y0, x1, y1 in placed)
    colours = {colour for _, colour in image.getcolors(100_000)}
    assert (255, 255, 0) in colours and (0, 0, 0) in colours and (255, 255, 255) not in colours  # black on yellow


def test_prediction_records(trained, shapes, in_process, tmp_path):
    """Objects over the threshold are written in COCO's results format, with masks that pycocotools can read."""
    model, found = tasks.load(str(trained)).eval(), {}
    for threshold in (0.0, 0.2, 1.0):
        args = ["--threads", 1, "--threshold", threshold, "--output", tmp_path / "seen"]
        done = in_process(PREDICT, trained, shapes / "val/val_00000.jpg", *args)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "seen/val_00000.json").read_text())
        assert record["threshold"] == threshold and record["image"] == str(shapes / "val/val_00000.jpg")
        found[threshold] = record["objects"]
    pixels, _ = model.transform(Image.open(shapes / "val/val_00000.jpg").convert("RGB"), {}, False)
    with torch.inference_mode():
        (expected,) = model([pixels])
    assert len(found[0.0]) == len(expected["scores"]) > 0 and found[1.0] == []
    assert found[0.2] == [one for one in found[0.0] if one["score"] >= 0.2]
    for i, one in enumerate(found[0.0]):
        left, top, right, bottom = expected["boxes"][i].tolist()
        assert one["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=0.01)
        assert one["label"] == model.settings["classes"][expected["labels"][i] - 1]
        packed = rle.frPyObjects(one["segmentation"], *one["segmentation"]["size"])
        assert np.array_equal(rle.decode(packed), expected["masks"][i].numpy())


def first(**changes: Any) -> Callable[[Path], None]:
    """Change fields of the first object; None removes a field."""

    def damage(content: dict[str, Any]) -> None:
        record = content["annotations"][0]
        record.update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del record[name]

    return lambda data: edit(data / VAL, damage)


def content(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Change the content of the annotation file."""
    return lambda data: edit(data / VAL, change)


def null(key: str) -> Callable[[Path], None]:
    """Set a field of the first object to null."""
    return content(lambda x: x["annotations"][0].update({key: None}))


OBJECT = "val.json, annotation 1: its"


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda data: (data / VAL).unlink(),
            r"instances_val.json, as in COCO's layout \(found: .*train",
        ),
        (
            lambda data: (data / VAL).write_text('{"images": ['),
            "cannot read .*val.json: it is not JSON: Expecting value",
        ),
        (lambda data: (data / VAL).write_text("[" * 100_000), "cannot read .*val.json: its JSON is nested too deeply"),
        (
            lambda data: (data / VAL).write_text("[]"),
            "val.json is not a COCO annotation file: it must be a JSON object with",
        ),
        (content(lambda x: x.pop("categories")), "val.json is not a COCO annotation file: categories is missing"),
        (content(lambda x: x.update(images={})), "val.json is not a COCO annotation file: images is not a list"),
        (content(lambda x: x["images"].append(3)), "val.json, image 6: it must be a JSON object, not 3"),
        (content(lambda x: x["images"][0].pop("width")), "val.json, image 1: its width is missing"),
        (content(lambda x: x["images"][0].update(width="128")), "image 1: its width '128' is not a finite number"),
        (content(lambda x: x["images"][0].update(width=True)), "image 1: its width true is not a finite number"),
        (content(lambda x: x["images"][0].update(width=0.5)), "image 1: its width 0.5 is not a positive whole number"),
        (content(lambda x: x["images"][0].update(width=10**400)), "image 1: its width 10+.* is not a finite number"),
        (content(lambda x: x["images"][0].update(id=[1])), r"image 1: its id \[1\] must be a whole number or a string"),
        (content(lambda x: x["images"][0].update(file_name=None)), "image 1: its file_name null must be a string"),
        (content(lambda x: x["images"][0].update(file_name="/etc/passwd")), "names /etc/passwd, which is outside"),
        (content(lambda x: x["images"][1].update(file_name="../../a.jpg")), "names ../../a.jpg, which is outside"),
        (content(lambda x: x["categories"][0].update(name=None)), "category 1: its name null must be a string"),
        (content(lambda x: x.update(annotations=[])), "val.json has no objects to train on or evaluate"),
        (content(lambda x: x["images"].append(x["images"][0])), "val.json, image 6: another image has the same id 7"),
        (
            content(lambda x: x["categories"][1].update(name="egg")),
            r"the category egg \(id 5\), which is not a class of the model",
        ),
        (lambda data: (data / "val/val_00002.jpg").unlink(), "cannot read .*val_00002.jpg, which .*val.json names"),
        (lambda data: (data / "val/val_00002.jpg").write_bytes(b"no"), "cannot read .*val_00002.jpg"),
        (content(lambda x: x["images"][3].update(width=130)), "val_00003.jpg is 128 x 96; .* for 130 x 96"),
        (
            content(lambda x: x["categories"].append(x["categories"][0])),
            "val.json, category 4: another category has the same id 2 or name disc",
        ),
        (
            first(image_id="7"),
            f"{OBJECT} image '7' is not in the list: image_id is a string and the id there a number",
        ),
        (first(image_id=True), f"{OBJECT} image_id true must be a whole number or a string"),
        (first(image_id=99), f"{OBJECT} image 99 is not in the list"),
        (first(category_id=1), f"{OBJECT} category 1 is not in the list"),
        (first(bbox=[5, 5, 0, 0]), rf"{OBJECT} box \[5.0, 5.0, 0.0, 0.0\] is empty"),
        (first(bbox=[5, 5, -3, 4]), f"{OBJECT} box .* is empty"),
        (first(bbox=[-0.9, 5, 0.8, 9]), f"{OBJECT} box .* is empty"),
        (first(bbox=[100, 5, 30, 9]), f"{OBJECT} box .* is not within its image, 128 x 96"),
        (first(bbox=[float("nan"), 5, 30, 9]), f"{OBJECT} bbox nan is not a finite number"),
        (first(bbox=["5", 5, 30, 9]), f"{OBJECT} bbox '5' is not a finite number"),
        (first(bbox=[1, 2]), rf"{OBJECT} bbox \[1, 2\] must be 4 numbers"),
        (first(bbox=None), f"{OBJECT} bbox is missing"),
        (first(area=-1), f"{OBJECT} area -1.0 is negative"),
        (first(area=10**400), f"{OBJECT} area 10+.* is not a finite number"),
        (null("area"), f"{OBJECT} area null is not a finite number"),
        (first(iscrowd="no"), f"{OBJECT} iscrowd 'no' must be 0 or 1"),
        (first(iscrowd=2), f"{OBJECT} iscrowd 2 must be 0 or 1"),
        (first(segmentation=None), f"{OBJECT} segmentation is missing"),
        (first(segmentation="abc"), f"{OBJECT} segmentation 'abc' must be a list of polygons, or run lengths"),
        (first(segmentation=[[1, 2, "3", 4, 5, 6]]), f"{OBJECT} polygon must contain only numbers"),
        (first(segmentation=[[1, 2, True, 4, 5, 6]]), f"{OBJECT} polygon must contain only numbers"),
        (
            first(segmentation={"size": [96, 128], "counts": [2**40, 96 * 128]}),
            "val.json, annotation 1: the run lengths of its mask are invalid: they must be whole numbers whose sum",
        ),
        (
            first(segmentation={"size": [96, 128], "counts": 5}),
            "val.json, annotation 1: the run lengths of its mask are invalid",
        ),
        (first(segmentation={"size": 96, "counts": [9]}), f"{OBJECT} mask's size 96 must be 2 numbers"),
        (first(segmentation=[]), f"{OBJECT} mask must have a polygon of at least three points"),
        (first(segmentation=[[1, 2, 3]]), f"{OBJECT} mask must have a polygon of at least three points"),
        (first(segmentation=[[1, 2, 300, 4, 5, 6]]), f"{OBJECT} polygon is not within its image, 128 x 96"),
        (first(segmentation=[[1, 2, float("nan"), 4, 5, 6]]), f"{OBJECT} polygon is not within its image"),
        (
            first(segmentation={"size": [128, 96], "counts": [9]}),
            f"{OBJECT} mask is 96 x 128, but its image is 128 x 96",
        ),
        (
            first(segmentation={"size": [96, 128], "counts": [9]}),
            "val.json, annotation 1: the run lengths of its mask are invalid",
        ),
        (
            first(segmentation={"size": [96, 128], "counts": [-9, 3]}),
            "val.json, annotation 1: the run lengths of its mask are invalid",
        ),
        (
            first(segmentation={"size": [96, 128], "counts": "abc"}),
            "val.json, annotation 1: the run lengths of its mask are invalid",
        ),
        (first(segmentation={"size": [96, 128]}), f"{OBJECT} counts is missing"),
    ],
)
def test_invalid_data(shapes, tmp_path, damage, message):
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    damage(data)
    with pytest.raises(InputError) as error:
        Instances(data, "val", masks=True, classes=KINDS)
    assert re.search(message, str(error.value)), error.value


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;">]><annotation>&c;</annotation>'


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<annotation>", "<annotation", "val_00000.xml is not a VOC annotation: "),
        ("<width>128", "<width>wide", "val_00000.xml is not a VOC annotation: its width 'wide' is not a finite"),
        ("<width>128", "<width>0", "val_00000.xml is not a VOC annotation: its width 0.0 is not a positive"),
        ("<width>128</width>", "", "val_00000.xml is not a VOC annotation: its width is missing"),
        ("<xmin>", "<xmin>-100", "val_00000.xml, object 1: its box .* is not within its image, 128 x 96"),
        ("<xmax>", "<xmax>.", "val_00000.xml, object 1: its box .* is empty"),
        ("<ymax>", "<ymax>n", "val_00000.xml, object 1: its ymax 'n[0-9]+' is not a finite number"),
        ("<name>", "<name>egg", "val_00000.xml, object 1: its class egg.* is unknown; known: disc, square"),
        ("<name>square", "<name>", "val_00000.xml, object 1: its name is missing"),
        ("<difficult>", "<difficult>x", "val_00000.xml, object 1: its difficult 'x[01]' must be 0 or 1"),
        ("<difficult>0", "<difficult>", "val_00000.xml, object 1: its difficult '' must be 0 or 1"),
        (None, BOMB, "val_00000.xml is not a VOC annotation: it declares a document type"),
        (None, '<?xml version="1.0" encoding="bogus"?><annotation/>', "a VOC annotation: unknown encoding: bogus"),
        (None, "<a>" * 9_000_000, "val_00000.xml is not a VOC annotation: it is larger than the limit"),
        (None, BOMB.encode("utf-16"), "val_00000.xml is not a VOC annotation: it declares a document type"),
    ],
)
def test_invalid_voc(voc, tmp_path, old, new, message):
    data = Path(shutil.copytree(voc, tmp_path / "voc"))
    path = data / "Annotations/val_00000.xml"
    text = new if old is None else path.read_text().replace(old, new, 1)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        Instances(data, "val", masks=False)
    assert re.search(message, str(error.value)), error.value


def test_boxes_are_clipped_after_rounding(shapes, tmp_path):
    """Boxes and polygons can exceed the image by a pixel; flat boxes, of which COCO has two, are not trained on."""
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    first(bbox=[-1, 0, 130, 96.5], segmentation=[[-1, 0, 129, 0, 129, 96.5, -1, 96.5]])(data)
    before = len(Instances(data, "val", masks=True)[0][1]["boxes"])
    target = Instances(data, "val", masks=True)[0][1]
    assert target["boxes"][0].tolist() == [0, 0, 128, 96] and target["masks"][0].float().mean() > 0.97
    first(bbox=[5, 5, 10, 0], area=0)(data)
    assert len(Instances(data, "val", masks=True)[0][1]["boxes"]) == before - 1


@pytest.mark.parametrize("layout", ["train2017", "images/train2017", "images", "."])
def test_image_folders(shapes, tmp_path, layout):
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    for path in (shapes / "train").iterdir():
        shutil.copy(path, tmp_path / layout)
    shutil.copy(shapes / "annotations/instances_train.json", tmp_path / "train2017.json")
    instances = Instances(tmp_path, "train2017" if "/" in layout else "train", masks=False)
    assert len(instances) == 4 and instances[3][1]["boxes"].shape[1] == 4


def test_invalid_commands(trained, shapes, voc, tmp_path, in_process):
    out = ["--output", tmp_path / "out"]
    line = input_error(in_process(TRAIN, *TINY, "--data", voc, "--head", "maskrcnn", *out))
    assert "VOC's layout, which has no masks" in line
    line = input_error(in_process(TRAIN, *TINY, "--data", shapes, "--output-stride", 16, *out))
    assert "stride 32, not 16" in line
    line = input_error(in_process(VALIDATE, trained, "--data", shapes, "--boxes", tmp_path / "boxes.json"))
    assert "--boxes is for keypoints" in line
    line = input_error(in_process(PREDICT, trained, shapes / "val", "--detector", trained, *out))
    assert "--detector is for keypoints" in line
    Image.new("RGB", (900, 3)).save(tmp_path / "narrow.png")
    line = input_error(in_process(PREDICT, trained, tmp_path / "narrow.png", *out))
    assert "narrow.png: an image of 900 x 3 is too narrow" in line
    line = input_error(in_process(TRAIN, *TINY, "--data", shapes, "--head", "yolo", *out))
    assert "does not support the head yolo; supported: fasterrcnn, retinanet, maskrcnn" in line


FEW = ["--epochs", 12, "--lr", 1e-3, "--head-kwargs", "box_batch_size_per_image=64"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "how"),
    [("fasterrcnn", FEW), ("maskrcnn", FEW), ("retinanet", ["--epochs", 24, "--lr", 2e-3, "--clip-grad", 5])],
)
def test_training_reaches_high_ap(tmp_path, head, how):
    """Six to ten minutes each on one core: 400 scenes of shapes."""
    data = save_coco(tmp_path / "shapes", train=400, val=40)
    common = ["--img-size", 128, "--batch-size", 4, "--warmup-epochs", 1]
    done = Running(tmp_path / "out", *TINY, "--data", data, "--head", head, *common, *how, script=TRAIN).end(3600)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    best = max(csv.DictReader((tmp_path / "out/metrics.csv").open()), key=lambda row: float(row["AP"]))
    assert float(best["AP"]) > 60 and float(best["AP50"]) > 80
