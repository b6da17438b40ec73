"""Tests of keypoint estimation: crops, heatmaps, COCO's metrics, and invalid data."""

import csv
import json
import math
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
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from res2net_zoo import tasks
from res2net_zoo.tasks import keypoints
from res2net_zoo.tasks.detection import Detection
from res2net_zoo.tasks.keypoints import OKSAP, COCOPersons, Keypoints, SimpleBaseline
from res2net_zoo.utils.errors import InputError
from tests.conftest import SMALL, input_error, spread
from tests.scenes import JOINTS, save_keypoints, save_saliency
from tests.training.test_survival import Running

TRAIN, VALIDATE, PREDICT = (f"scripts/{name}_task.py" for name in ("train", "validate", "predict"))
TINY = ["--task", "keypoints", "--model", "res2net_tiny", "--img-size", 128, "--workers", 1]
VAL = "annotations/person_keypoints_val.json"
LEFT, RIGHT = JOINTS.index("left_wrist"), JOINTS.index("right_wrist")


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return save_keypoints(tmp_path_factory.mktemp("data") / "people", train=6, val=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, people) -> Path:
    """The folder of a briefly trained model."""
    folder = tmp_path_factory.mktemp("trained") / "joints"
    args = ["--data", people, "--epochs", 1, "--batch-size", 2, "--threads", 1]
    done = Running(folder, *TINY, *args, script=TRAIN).end()
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wild(tmp_path_factory) -> Path:
    """The folder of a model with random heatmaps."""
    folder = tmp_path_factory.mktemp("wild") / "joints"
    spread(Keypoints("res2net_tiny", JOINTS, img_size=128)).save(folder, ModelCard("---\n---\n"))
    return folder


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def lenient(people: Path, folder: Path) -> Path:
    """Copy the data with areas so large that even random joints are close enough to some annotations."""
    data = Path(shutil.copytree(people, folder))
    edit(data / VAL, lambda content: [person.update(area=3e5) for person in content["annotations"]])
    return data


def test_validation_reproduces_training_metrics(trained, people, in_process, tmp_path):
    """Training and validation have the same metrics, and pictures have the size of their images."""
    (row,) = csv.DictReader((trained / "metrics.csv").open())
    done = in_process(VALIDATE, trained, "--data", people, "--check", "--output", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "figures.json").read_text())
    # Stick figures are never large, so AP_large is omitted.
    assert list(result["figures"]) == ["AP", "AP50", "AP75", "AP_medium", "AR"]
    assert {name: float(row[name]) for name in result["figures"]} == result["figures"]
    assert result["samples"] == len(json.loads((people / VAL).read_text())["annotations"])
    done = in_process(PREDICT, trained, people / "val", "--output", tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    assert {Image.open(path).size for path in (tmp_path / "seen").glob("*.png")} == {(160, 120)}
    records = [json.loads(path.read_text()) for path in (tmp_path / "seen").glob("*.json")]
    assert all([joint["label"] for joint in record["objects"][0]["keypoints"]] == [*JOINTS] for record in records)
    assert all({"x", "y", "score"} <= joint.keys() for joint in records[0]["objects"][0]["keypoints"])


@pytest.mark.full
def test_evaluation_on_two_processes(wild, people, program, in_process, tmp_path):
    data, found = lenient(people, tmp_path / "people"), []
    for number, start in ((1, in_process), (2, partial(program, processes=2))):
        output = tmp_path / f"{number}.json"
        args = ["--data", data, "--batch-size", 3, "--threads", 1, "--output", output]
        done = start(VALIDATE, wild, *args)
        assert done.returncode == 0, done.stderr
        assert "Average" not in done.stdout
        (result,) = json.loads(output.read_text())
        assert result["num_processes"] == number
        found.append(result["figures"])
    assert found[0] == found[1] and 0 < found[0]["AP"] < 100


def boxes_in(data: Path) -> list[dict[str, Any]]:
    """Return the boxes of all persons as results of a perfect detector."""
    persons = json.loads((data / VAL).read_text())["annotations"]
    return [{key: person[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0} for person in persons]


@pytest.mark.full
def test_boxes_of_a_detector(wild, people, program, in_process, tmp_path):
    """Annotated boxes and their duplicates give the same metrics."""
    data = lenient(people, tmp_path / "people")
    boxes = boxes_in(data)
    again = [{**box, "score": 0.5} for box in boxes]
    others = [{**boxes[0], "category_id": 2}, {**boxes[0], "image_id": 999}]
    found = {}
    two = partial(program, processes=2)
    for name, some, start in (
        ("none", None, in_process),
        ("true", boxes, in_process),
        ("twice", again + boxes + others, two),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(some))
        args = [] if some is None else ["--boxes", path]
        output = ["--output", tmp_path / "figures.json", "--results", tmp_path / "joints.json"]
        done = start(VALIDATE, wild, "--data", data, "--threads", 1, *args, *output)
        assert done.returncode == 0, done.stderr
        (figures,) = json.loads((tmp_path / "figures.json").read_text())
        found[name] = json.loads((tmp_path / "joints.json").read_text())
        assert len(found[name]) == len(boxes)
        theirs = pycocotools_figures(data / VAL, found[name], JOINTS)
        assert figures["figures"] == pytest.approx(theirs, abs=1e-9) and 0 < theirs["AP"] < 100
        assert figures.get("boxes") == (None if some is None else str(path))
    assert found["none"] == found["true"]
    assert sorted(found["twice"], key=str) == sorted(found["true"], key=str)


def test_score_of_a_person_is_scaled_by_that_of_the_box(people, tmp_path):
    persons, path = COCOPersons(people, "val"), tmp_path / "boxes.json"
    path.write_text(json.dumps([{**box, "score": 0.25} for box in boxes_in(people)]))
    persons.take_boxes(path)
    score = OKSAP(persons)
    score.update(0, {}, (torch.zeros(len(JOINTS), 2), torch.full((len(JOINTS),), 0.5)))
    score.compute(Accelerator(cpu=True))
    assert [person["score"] for person in score.results()] == [0.125]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda boxes: boxes.clear(), r"has no box of category 1 \(persons\) in these images"),
        (lambda boxes: boxes[1].pop("score"), "box 2: its score is missing"),
        (lambda boxes: boxes[1].update(bbox=[200, 5, 10, 10]), "box 2: .* is empty or not within its image, 160 x 120"),
        (lambda boxes: boxes[1].update(bbox=[20, 5, 0, 10]), "box 2: .* is empty or not within its image"),
        (lambda boxes: boxes[1].update(bbox=[float("nan"), 5, 9, 9]), "box 2: its bbox nan is not a finite number"),
        (lambda boxes: boxes[1].update(bbox=None), "box 2: its bbox null must be 4 numbers"),
        (lambda boxes: boxes[1].update(image_id=None), "box 2: its image_id null must be a whole number or a string"),
        (lambda boxes: boxes[1].update(score="1"), "box 2: its score '1' is not a finite number"),
        (lambda boxes: boxes[1].update(score=7), "box 2: its score 7.0 must be from 0 to 1"),
        (lambda boxes: boxes.append(3), "box [0-9]+: it must be a JSON object, not 3"),
        (None, "cannot read .*boxes.json: it is not JSON: Expecting value"),
    ],
)
def test_invalid_boxes(people, tmp_path, change, expected):
    path, boxes = tmp_path / "boxes.json", boxes_in(people)
    if change is not None:
        change(boxes)
    path.write_text("no" if change is None else json.dumps(boxes))
    with pytest.raises(InputError) as error:
        COCOPersons(people, "val").take_boxes(path)
    assert re.search(expected, str(error.value)), error.value


def test_prediction_with_a_detector(wild, people, in_process, tmp_path):
    """A detector with three boxes gives three persons; without boxes the picture is the image."""
    image = people / "val/val_00000.jpg"
    for bias in (30, -30):
        detector = Detection("res2net_tiny", ["dog", "person"], img_size=64, head_kwargs={"box_detections_per_img": 3})
        torch.nn.init.zeros_(detector.network.roi_heads.box_predictor.cls_score.weight)
        detector.network.roi_heads.box_predictor.cls_score.bias.data = torch.tensor([0.0, 0.0, bias])
        detector.save(tmp_path / "detector", ModelCard("---\n---\n"))
        out = ["--output", tmp_path / "seen"]
        done = in_process(PREDICT, wild, image, "--detector", tmp_path / "detector", *out)
        assert done.returncode == 0, done.stderr
        seen, plain = Image.open(tmp_path / "seen/val_00000.png"), Image.open(image)
        assert (seen.tobytes() == plain.tobytes()) == (bias < 0)
        found = keypoints.boxes_of(tasks.load(str(tmp_path / "detector")), plain)
        assert len(found) == (3 if bias > 0 else 0)
        record = json.loads((tmp_path / "seen/val_00000.json").read_text())
        assert [one["bbox"] for one in record["objects"]] == [pytest.approx(box, abs=1e-3) for box in found]
        assert all(x >= 0 and y >= 0 and x + w <= 160.01 and y + h <= 120.01 for x, y, w, h in found)
    model = Detection("res2net_tiny", ["dog", "cat"], img_size=64)
    with pytest.raises(InputError, match="a detection model of dog, cat does not detect persons"):
        keypoints.boxes_of(model, plain)


def test_saved_model_predicts_the_same_joints(wild, people):
    """Bit-identical in a batch too."""
    model, again = tasks.load(str(wild)), tasks.load(str(wild))
    data = model.open(str(people), "val", "simplebaseline", JOINTS)
    samples = [model.transform(*data[i], False) for i in range(3)]
    with torch.inference_mode():
        many = model(model.collate(samples)[0])
        for sample, (places, scores) in zip(samples, many, strict=True):
            assert places.shape == (len(JOINTS), 2) and scores.shape == (len(JOINTS),)
            ((alone, heights),) = again(again.collate([sample])[0])
            assert torch.equal(alone, places) and torch.equal(heights, scores)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_joints_survive_the_round_trip_through_heatmaps(data):
    """From image to crop to heatmap and back, a joint moves by at most half a cell."""
    number = lambda low, high: data.draw(st.floats(low, high))  # noqa: E731
    box = (number(0, 300), number(0, 300), number(5, 400), number(5, 400))
    size, stride = data.draw(st.sampled_from([((96, 128), 4), ((192, 256), 4), ((48, 64), 2), ((24, 32), 0.5)]))
    mirror, turn = data.draw(st.booleans()), math.radians(number(-180, 180))
    matrix = keypoints.crop_matrix(box, size, number(0.7, 1.3), turn, mirror)
    place = torch.tensor([[number(0, size[0] - 1e-3), number(0, size[1] - 1e-3)]])
    joint = keypoints.to_image(place, matrix)
    there = keypoints.to_crop(joint, matrix)
    assert (there - place).abs().max() < 0.01
    shape = (round(size[1] / stride), round(size[0] / stride))
    heatmaps = keypoints.encode(there / stride, shape)
    assert heatmaps.shape == (1, *shape)
    back, (height,) = keypoints.decode(heatmaps)
    assert (back * stride - place).abs().max() <= 0.501 * stride
    assert 0.77 < height <= 1  # lowest for a joint at the corner of four cells


def test_positions_are_exact_in_mixed_precision():
    matrix = keypoints.crop_matrix((10, 20, 310, 420), (192, 256), turn=0.3)
    places = 192 * torch.rand(50, 2)
    with torch.autocast("cpu", torch.bfloat16):
        there = keypoints.to_image(places, matrix)
    assert torch.equal(there, keypoints.to_image(places, matrix)) and there.dtype == torch.float32


def test_crop_is_the_enlarged_box():
    """Without augmentation a crop is upright, and the box is in its centre with a margin of a quarter."""
    for box in ((10, 20, 60, 200), (10, 20, 300, 40)):
        matrix = keypoints.crop_matrix(box, (96, 128))
        low, high = keypoints.to_image(torch.tensor([[0.0, 0.0], [96.0, 128.0]]), matrix)
        width, height = (high - low).tolist()
        assert height / width == pytest.approx(4 / 3)
        assert ((low + high) / 2).tolist() == pytest.approx([box[0] + box[2] / 2, box[1] + box[3] / 2])
        assert min(width / box[2], height / box[3]) == pytest.approx(1.25)


def test_joints_are_augmented_like_images():
    """Random augmentation is the same for image and joints; mirroring swaps left and right."""
    model = Keypoints("res2net_tiny", JOINTS, img_size=128)
    image, joints = Image.new("RGB", (200, 150)), torch.zeros(len(JOINTS), 2)
    joints[LEFT], joints[RIGHT] = torch.tensor([130.0, 60.0]), torch.tensor([70.0, 90.0])
    draw = ImageDraw.Draw(image)
    for joint, colour in ((LEFT, (255, 0, 0)), (RIGHT, (0, 0, 255))):
        x, y = joints[joint].tolist()
        draw.rectangle((x - 4, y - 4, x + 3, y + 3), colour)  # its edges are 4 pixels away
    visible = torch.zeros(len(JOINTS), dtype=torch.bool)
    visible[[LEFT, RIGHT]] = True
    target, swapped = {"box": (40, 20, 120, 110), "joints": joints, "visible": visible}, set()
    for seed in range(12):
        torch.manual_seed(seed)
        crop, found = model.transform(image, target, True)
        assert crop.shape == (3, 128, 96) and found["visible"].equal(visible)
        rows, columns = torch.arange(128) + 0.5, torch.arange(96) + 0.5
        spots = {}
        for channel in (0, 2):
            light = crop[channel] / crop[channel].sum()
            spots[channel] = torch.stack([(light.sum(0) * columns).sum(), (light.sum(1) * rows).sum()])
        left, right = (found["places"][joint] * 4 for joint in (LEFT, RIGHT))
        mirrored = bool((left - spots[0]).norm() > 10)
        swapped.add(mirrored)
        assert (left - spots[2 if mirrored else 0]).norm() < 0.3
        assert (right - spots[0 if mirrored else 2]).norm() < 0.3
    assert swapped == {True, False}


def test_mirrored_image_has_mirrored_joints(wild):
    """Evaluation averages over each crop and its mirror image."""
    model: Any = tasks.load(str(wild))
    image = Image.effect_noise((150, 120), 90).convert("RGB")
    mirror = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with torch.inference_mode():
        (one,), (two,) = (model(model.collate([model.transform(x, {}, False)])[0]) for x in (image, mirror))
    places = two[0][model.partners]
    places[:, 0] = 149 - places[:, 0]
    assert torch.allclose(one[0], places, atol=1e-2) and torch.allclose(one[1], two[1][model.partners], atol=1e-4)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        *(("left_eye", "right_eye"), ("L_Eye", "R_Eye"), ("l_eye", "r_eye"), ("LEye", "REye"), ("lEye", "rEye")),
        *(("eye_l", "eye_r"), ("eye.L", "eye.R"), ("eyeLeft", "eyeRight"), ("LEFT EYE", "RIGHT EYE"), ("leye", "reye")),
        *(("left-eye", "right-eye"), ("front_left_paw", "front_right_paw"), ("lefteye", "righteye"), ("eyeL", "eyeR")),
        *(("Left_eye", "right_Eye"), ("LBigToe", "RBigToe"), ("LEYE", "REYE"), ("l_eye_2", "r_eye_2"), ("Lft", "Rft")),
    ],
)
def test_partners_by_their_names(left, right):
    names = [right, "nose", left]
    assert keypoints.flip_pairs(names, None) == [[left, right]]
    model = Keypoints("res2net_tiny", names, img_size=128)
    assert model.partners == [2, 1, 0] and model.mirrors
    assert model.about() == {"mirrored pairs": f"{left} and {right}", "without a pair": "nose"}


def test_training_does_not_depend_on_the_spelling_of_names(trained, people, tmp_path, in_process):
    """The loss, which depends on mirroring, and the metrics are identical."""
    data = Path(shutil.copytree(people, tmp_path / "people"))
    names = [re.sub("^(left|right)_(.)", lambda found: found[1][0].upper() + found[2].upper(), name) for name in JOINTS]
    for split in ("train", "val"):
        path = data / f"annotations/person_keypoints_{split}.json"
        edit(path, lambda content: content["categories"][0].update(keypoints=names))
    args = ["--data", data, "--epochs", 1, "--batch-size", 2, "--threads", 1]
    done = in_process(TRAIN, *TINY, *args, "--output", tmp_path / "out")
    assert done.returncode == 0 and "LElbow and RElbow" in done.stdout, done.stderr
    assert (tmp_path / "out/metrics.csv").read_text() == (trained / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (["left_ear", "nose"], None, "the joint left_ear has no partner on the right; name the pairs as ONE:OTHER"),
        (["L1", "L2", "left_a", "right_a"], None, "the joint L1 has no partner"),
        (["left_ear", "ear_left", "L_ear"], None, "the joints left_ear and L_ear are both left / ear"),
        (
            ["kpt-0", "kpt-1"],
            None,
            r"the names of the joints kpt-0, kpt-1 contain no left and right pairs; .* or none to mirror no images",
        ),
        (["LShoulder left", "a"], None, "contain no left and right pairs"),
        (["a", "b"], ["a:c"], "a:c is not a pair of joints ONE:OTHER; joints: a, b"),
        (["a", "b"], ["a:a"], "a:a is not a pair of joints"),
        (["a", "b", "c"], ["a:b", "b:c"], "each joint in at most one"),
    ],
)
def test_invalid_pairs(names, given, expected):
    with pytest.raises(InputError, match=expected) as error:
        keypoints.flip_pairs(names, given)
    assert error.value.parameters == (("flip_pairs",) if given is None else ())


def test_explicit_pairs(people, tmp_path, in_process):
    """They are saved with the model, as is `none`; training fails if pairs are neither given nor in the names."""
    data = Path(shutil.copytree(people, tmp_path / "people"))
    for name in ("train", "val"):
        names = [f"kpt:{i}" for i in range(len(JOINTS))]
        path = data / f"annotations/person_keypoints_{name}.json"
        edit(path, lambda content: content["categories"][0].update(keypoints=names))  # noqa: B023
    args = [*TINY, "--data", data, "--epochs", 1, "--batch-size", 2, "--threads", 1, "--output", tmp_path / "out"]
    line = input_error(in_process(TRAIN, *args))
    assert "the names of the joints kpt:0, kpt:1, kpt:2, kpt:3, kpt:4, ... contain no left and right pairs" in line
    done = in_process(TRAIN, *args, "--flip-pairs", "kpt:1:kpt:2", "kpt:4:kpt:3")
    assert done.returncode == 0, done.stderr
    line = "mirrored pairs: kpt:1 and kpt:2, kpt:4 and kpt:3\nwithout a pair: kpt:0, kpt:5, "
    assert done.stdout.count(line) == 1
    assert "kpt:1 and kpt:2" in (tmp_path / "out/README.md").read_text()
    model: Any = tasks.load(str(tmp_path / "out"))
    assert model.partners == [0, 2, 1, 4, 3, *range(5, len(JOINTS))]
    done = in_process(TRAIN, *args, "--overwrite", "--flip-pairs", "none")
    assert done.returncode == 0 and "mirrored: no" in done.stdout, done.stderr
    model = tasks.load(str(tmp_path / "out"))
    assert not model.mirrors and model.partners == list(range(len(JOINTS)))
    image, target = model.open(str(data), "val", "simplebaseline")[0]
    model.scales = (1, 1)
    crops = [model.transform(image, target, True)[1]["matrix"] for _ in range(20)]
    assert all(matrix[:, :2].det() > 0 for matrix in crops)  # negative for mirroring
    config = json.loads((tmp_path / "out/config.json").read_text())
    for pairs, expected in (([["kpt:1"]], "must be pairs"), ([["kpt:1", 3]], "must be pairs"), (3, "must be pairs")):
        (tmp_path / "out/config.json").write_text(json.dumps({**config, "flip_pairs": pairs}))
        with pytest.raises(InputError, match=expected):
            tasks.load(str(tmp_path / "out"))
    # Folders of earlier versions do not store pairs.
    del config["flip_pairs"]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    old: Any = tasks.load(str(tmp_path / "out"))
    assert old.mirrors and old.partners == list(range(len(JOINTS)))


def test_pairs_are_for_keypoints_only(people, tmp_path, in_process):
    data = save_saliency(tmp_path / "data", train=1, val=1)
    args = ["--task", "saliency", "--data", data, "--output", tmp_path / "out", "--flip-pairs", "a:b"]
    assert "pairs of joints are for keypoints, not for saliency (--flip-pairs)" in input_error(in_process(TRAIN, *args))


def test_losses_match_definition():
    model = spread(Keypoints("res2net_tiny", ["a", "b"], img_size=128))
    model.freeze("all", batch_norm=True)
    model.train()
    for module in model.network.head:
        module.eval()
    crops = torch.rand(2, 3, 128, 96)
    places = torch.tensor([[[3.2, 9.9], [40.0, 5.0]], [[20.5, 30.5], [7.0, 8.0]]])
    visible = torch.tensor([[True, True], [True, False]])  # the second visible joint is outside the crop
    targets = [{"places": p, "visible": v} for p, v in zip(places, visible, strict=True)]
    (loss,) = model({"crops": crops}, targets).values()
    errors = []
    with torch.inference_mode():
        heatmaps = model.heatmaps(crops)
        assert heatmaps.shape == (2, 2, 32, 24)
        for i, joint in ((0, 0), (1, 0)):
            x, y = places[i, joint].tolist()
            right = [
                [math.exp(-((c + 0.5 - x) ** 2 + (r + 0.5 - y) ** 2) / 2) for c in range(24)]  # sigma 1 at this size
                for r in range(32)
            ]
            errors.append(((heatmaps[i, joint] - torch.tensor(right)) ** 2).mean().item())
    assert loss.item() == pytest.approx(sum(errors) / 4, rel=1e-4)


@pytest.mark.first_case
@pytest.mark.parametrize("model", SMALL)
def test_every_family(model):
    backbone: Any = timm.create_model(model, features_only=True, **SMALL[model])
    network = SimpleBaseline(backbone, 5)
    size = (32, 24) if network.stride < 1 else (128, 96)
    heatmaps = network(torch.rand(2, 3, *size))
    assert heatmaps.shape == (2, 5, int(size[0] / network.stride), int(size[1] / network.stride))
    assert network.stride == (0.5 if "next29" in model else 4)
    heatmaps.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_output_stride():
    model = Keypoints("res2net_tiny", ["a"], img_size=64, output_stride=16)
    assert model.stride == 2 and model.heatmaps(torch.rand(1, 3, 64, 48)).shape == (1, 1, 32, 24)


def test_sigmas_match_coco():
    from pycocotools.cocoeval import Params

    assert list(keypoints.COCO.values()) == pytest.approx(Params(iouType="keypoints").kpt_oks_sigmas.tolist())
    spelled = {"left_eye": ("L_Eye", "LEye", "eye.l", "LEFT EYE"), "right_hip": ("RHip", "hip_r"), "nose": ("Nose",)}
    assert all(keypoints.sigma_of(x) == keypoints.COCO[name] for name, names in spelled.items() for x in (name, *names))
    assert keypoints.sigma_of("joint 3") == keypoints.sigma_of("left_foot") == keypoints.sigma_of("eye") == 0.05
    assert all(name in keypoints.COCO for bone in keypoints.BONES for name in bone)


def crowd_in(content: dict[str, Any]) -> None:
    """Add a crowd and a person without labelled joints to each image, and change areas."""
    rng = np.random.default_rng(0)
    persons = content["annotations"]
    for person in persons:
        person["area"] *= float(rng.choice([0.2, 1, 30]))
    for image in content["images"]:
        for crowd in (0, 1):
            place = [float(value) for value in rng.uniform(0, 60, 4)]
            about = {"area": place[2] * place[3], "iscrowd": crowd, "num_keypoints": 0, "category_id": 1}
            nothing = {"keypoints": [0] * 3 * len(JOINTS), "bbox": place, "image_id": image["id"], **about}
            persons.append({"id": len(persons) + 1, **nothing})


def pycocotools_figures(path: Path, found: list[dict[str, Any]], names: list[str]) -> dict[str, float]:
    """Return the metrics of joints by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(path))
    measured = COCOeval(truth, truth.loadRes(found), "keypoints")
    measured.params.kpt_oks_sigmas = np.array([keypoints.COCO.get(name, 0.05) for name in names])
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    figures = zip(("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR"), measured.stats, strict=False)
    return {name: 100 * value for name, value in figures if value >= 0}


@pytest.mark.parametrize("names", [JOINTS, [f"joint {i}" for i in range(len(JOINTS))]])
def test_metrics_match_pycocotools(people, tmp_path, names):
    data = Path(shutil.copytree(people, tmp_path / "people"))
    edit(data / VAL, crowd_in)
    edit(data / VAL, lambda content: content["categories"][0].update(keypoints=list(names)))
    persons, rng = COCOPersons(data, "val"), np.random.default_rng(1)
    records = json.loads((data / VAL).read_text())["annotations"]
    labelled = [record for record in records if record["num_keypoints"]]
    assert len(persons) == len(labelled) < len(records)
    for noise in (0, 2, 5):
        score, found = OKSAP(persons), []
        for i in rng.permutation(len(persons)).tolist():
            _, target = persons[i]
            places = target["joints"] - 0.5 + noise * torch.from_numpy(rng.normal(0, 1, (len(names), 2))).float()
            heights = torch.from_numpy(rng.uniform(0.1, 1, len(names))).float()
            score.update(i, target, (places, heights))
            joints = torch.cat([places, torch.ones(len(names), 1)], 1).double().flatten().tolist()
            mean = heights[heights > 0.2].double().mean().item()
            person = {"image_id": labelled[i]["image_id"], "category_id": 1}
            found.append({**person, "keypoints": joints, "score": mean})
        figures = score.compute(Accelerator(cpu=True))
        assert figures == pytest.approx(pycocotools_figures(data / VAL, found, names), abs=1e-9)
        assert len(figures) == 6 and (figures["AP"] == pytest.approx(100) if noise == 0 else 0 < figures["AP"] < 100)


def test_drawing():
    """Joints over the threshold are drawn in the colour of their side on a copy of the image."""
    model = Keypoints("res2net_tiny", JOINTS, img_size=128)
    image = Image.new("RGB", (200, 150))
    places = torch.full((len(JOINTS), 2), 75.0)
    places[LEFT], places[JOINTS.index("left_elbow")] = torch.tensor([150.0, 30.0]), torch.tensor([150.0, 90.0])
    scores = torch.zeros(len(JOINTS))
    scores[[LEFT, JOINTS.index("left_elbow")]] = 0.9
    drawn = model.draw(image, (places, scores))
    assert drawn.getpixel((150, 30)) == drawn.getpixel((150, 60)) == keypoints.COLOURS["left"]
    assert drawn.getpixel((75, 75)) == (0, 0, 0) and image.getbbox() is None


def first(**changes: Any) -> Callable[[Path], None]:
    """Return a function that changes the first annotation."""

    def damage(data: Path) -> None:
        def change(content: Any) -> None:
            content["annotations"][0].update(changes)
            for key in [key for key, value in changes.items() if value is None]:
                del content["annotations"][0][key]

        edit(data / VAL, change)

    return damage


def joint(index: int, value: Any) -> Callable[[Path], None]:
    """Return a function that changes a value of the first person's joints and labels all of them."""

    def change(content: Any) -> None:
        person = content["annotations"][0]
        person["keypoints"] = [20, 20, 2] * len(JOINTS)
        person["keypoints"][index] = value

    return lambda data: edit(data / VAL, change)


def cut_the_list(data: Path) -> None:
    (data / VAL).write_text((data / VAL).read_text()[:100])


def write_something_else(data: Path) -> None:
    (data / VAL).write_text("[]")


def remove_the_list(data: Path) -> None:
    (data / VAL).unlink()


def remove_an_image(data: Path) -> None:
    (data / "val/val_00000.jpg").unlink()


def shrink_an_image(data: Path) -> None:
    path = data / "val/val_00000.jpg"
    Image.open(path).resize((80, 60)).save(path)


def remove_a_joint(data: Path) -> None:
    edit(data / VAL, lambda content: content["categories"][0]["keypoints"].pop())


def rename_a_joint(data: Path) -> None:
    edit(data / VAL, lambda content: content["categories"][0]["keypoints"].__setitem__(0, "snout"))


def repeat_an_image(data: Path) -> None:
    edit(data / VAL, lambda content: content["images"].append(content["images"][0]))


def repeat_a_joint(data: Path) -> None:
    edit(data / VAL, lambda content: content["categories"][0]["keypoints"].__setitem__(0, "left_shoulder"))


def remove_all_joints(data: Path) -> None:
    edit(data / VAL, lambda content: content["categories"][0].pop("keypoints"))


def label_nothing(data: Path) -> None:
    nothing = {"keypoints": [0] * 3 * len(JOINTS), "num_keypoints": 0}
    edit(data / VAL, lambda content: [person.update(nothing) for person in content["annotations"]])


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut_the_list, "cannot read .*person_keypoints_val.json: it is not JSON: "),
        (
            write_something_else,
            "person_keypoints_val.json is not a COCO annotation file: it must be a JSON object with",
        ),
        (lambda data: (data / VAL).write_text("[" * 100_000), "cannot read .*val.json: its JSON is nested too deeply"),
        (repeat_a_joint, "val.json, category of the joints: two of its keypoints have the name left_shoulder"),
        (remove_all_joints, "val.json must have exactly one category with keypoints, not 0"),
        (remove_the_list, "person_keypoints_val.json, as in COCO's layout, is missing; available splits: train"),
        (remove_an_image, "cannot read .*val_00000.jpg, which .*person_keypoints_val.json names"),
        (shrink_an_image, "val_00000.jpg is 80 x 60; its annotations are for 160 x 120"),
        (remove_a_joint, "val.json, annotation 1: it has 39 numbers for 12 joints, not 3 for each"),
        (rename_a_joint, r"joints of .* \(snout, .* differ from the model's \(nose, "),
        (label_nothing, "person_keypoints_val.json has no person with a labelled joint"),
        (first(image_id=99), "val.json, annotation 1: its image 99 is not in the list"),
        (
            first(image_id="1"),
            "annotation 1: its image '1' is not in the list: image_id is a string and the id there",
        ),
        (first(iscrowd="yes"), "val.json, annotation 1: its iscrowd 'yes' must be 0 or 1"),
        (first(bbox=[5, 5, 0, 9]), r"val.json, annotation 1: its box \[5.0, 5.0, 0.0, 9.0\] or its area .* is empty"),
        (first(bbox=[-0.9, 5, 0.8, 9]), "val.json, annotation 1: its box .* or its area .* is empty"),
        (first(bbox=[100, 5, 62, 9]), "val.json, annotation 1: its box .* is not within its image, 160 x 120"),
        (first(bbox=[1, 2]), r"val.json, annotation 1: its bbox \[1, 2\] must be 4 numbers"),
        (first(bbox=[], iscrowd=1), r"val.json, annotation 1: its bbox \[\] must be 4 numbers"),
        (first(area=math.inf, iscrowd=1), "val.json, annotation 1: its area inf is not a finite number"),
        (repeat_an_image, "val.json, image 6: another image has the same id 1"),
        (first(area=None), "val.json, annotation 1: its area is missing"),
        (first(keypoints=5), "val.json, annotation 1: it has no numbers for 13 joints"),
        (joint(0, "20"), "val.json, annotation 1: its keypoints must be numbers"),
        (joint(0, 10**400), "val.json, annotation 1: a joint is far outside its image, 160 x 120"),
        (first(category_id="1"), "val.json, annotation 1: its category is '1', but that of the joints is 1"),
        (first(category_id=2), "val.json, annotation 1: its category is 2, but that of the joints is 1"),
        (first(keypoints=[3, 4, 2]), "val.json, annotation 1: it has 3 numbers for 13 joints, not 3 for each"),
        (joint(2, 3), "val.json, annotation 1: a joint's visibility must be 0, 1 or 2"),
        (joint(0, 500), "val.json, annotation 1: a joint is far outside its image, 160 x 120"),
        (joint(0, math.nan), "val.json, annotation 1: a joint is far outside its image, 160 x 120"),
    ],
)
def test_invalid_data(wild, people, tmp_path, in_process, damage, expected):
    data = Path(shutil.copytree(people, tmp_path / "people"))
    damage(data)
    line = input_error(in_process(VALIDATE, wild, "--data", data))
    assert re.search(expected, line), line


def test_boxes_are_clipped_after_rounding(people, tmp_path):
    """A box can exceed the image by a pixel."""
    data = Path(shutil.copytree(people, tmp_path / "people"))
    first(bbox=[-1, 0, 162, 120.5])(data)
    assert COCOPersons(data, "val")[0][1]["box"] == (0, 0, 160, 120)


def test_published_metrics_need_a_detectors_boxes(wild, people, in_process):
    line = input_error(in_process(VALIDATE, wild, "--data", people, "--published", "COCO"))
    assert "published keypoint figures are measured in a detector's boxes" in line and "--boxes" in line


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--head", "hrnet"], "does not support the head hrnet; supported: simplebaseline"),
        (["--img-size", 192], "stride 32 need an image size that is a multiple of 128, not 192"),
    ],
)
def test_invalid_commands(people, tmp_path, in_process, args, expected):
    line = input_error(in_process(TRAIN, *TINY, "--data", people, "--output", tmp_path / "out", *args))
    assert expected in line


@pytest.mark.slow
def test_training_reaches_high_ap(tmp_path):
    """Five to ten minutes on two cores: 320 images of stick figures. The mean pose in each box has AP 33."""
    data = save_keypoints(tmp_path / "people", train=320, val=30)
    how = ["--epochs", 8, "--batch-size", 8, "--opt", "adam", "--lr", 1e-3, "--weight-decay", 0]
    done = Running(tmp_path / "out", *TINY, "--data", data, *how, script=TRAIN).end(1800)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    best = max(float(row["AP"]) for row in csv.DictReader((tmp_path / "out/metrics.csv").open()))
    assert best > 70
