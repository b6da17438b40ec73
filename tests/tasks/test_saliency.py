"""Tests of salient object detection: DSS as in the paper, data layouts, and metrics by their definitions."""

import csv
import json
import re
import shutil
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
from PIL import Image

from res2net_zoo import tasks
from res2net_zoo.tasks.saliency import DSS, Masks, MaxFAndMAE, Saliency
from tests.conftest import SMALL, input_error, spread
from tests.scenes import save_saliency
from tests.training.test_survival import Running

TRAIN, VALIDATE, PREDICT = (f"scripts/{name}_task.py" for name in ("train", "validate", "predict"))
TINY = ["--task", "saliency", "--model", "res2net_tiny", "--workers", 1]
CLASSES = ["salient object"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return save_saliency(tmp_path_factory.mktemp("data") / "scenes", train=8, val=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes) -> Path:
    """The folder of a briefly trained model."""
    folder = tmp_path_factory.mktemp("trained") / "dss"
    args = ["--data", scenes, "--img-size", 64, "--epochs", 1, "--batch-size", 4, "--threads", 1]
    done = Running(folder, *TINY, *args, script=TRAIN).end()
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wild() -> Saliency:
    """A model with random logits of large magnitude."""
    model = spread(Saliency("res2net_tiny", CLASSES, img_size=32)).eval()
    with torch.no_grad():
        for branch in model.network.branches:
            branch[-1].weight.mul_(100)
    return model


def figures_by_definition(maps: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    """Return the metrics of maps and masks from 0 to 255 by their definitions."""
    curves, errors = [], []
    for saliency, mask in zip(maps, masks, strict=True):
        stretched = (saliency - saliency.min()) / max(1, np.ptp(saliency.astype(int)))
        if saliency.min() == saliency.max():
            stretched = saliency / 255
        errors.append(np.abs(stretched - (mask > 128)).mean())
        curve = []
        for threshold in range(256):
            predicted = np.floor(stretched * 255) >= threshold
            both = (predicted & (mask > 128)).sum()
            precision, recall = both / max(predicted.sum(), 1), both / max((mask > 128).sum(), 1)
            curve.append(1.3 * precision * recall / (0.3 * precision + recall) if both else 0)
        curves.append(curve)
    return {"F-measure": np.mean(curves, axis=0).max(), "MAE": np.mean(errors)}


def test_validation_reproduces_training_metrics(trained, scenes, in_process, tmp_path):
    """Training, validation and the written maps have the same metrics."""
    (row,) = csv.DictReader((trained / "metrics.csv").open())
    done = in_process(VALIDATE, trained, "--data", scenes, "--check", "--output", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())[0]["figures"]
    assert figures == {name: pytest.approx(float(row[name]), abs=1e-4) for name in ("F-measure", "MAE")}
    done = in_process(PREDICT, trained, scenes / "val" / "images", "--output", tmp_path / "maps")
    assert done.returncode == 0, done.stderr
    masks = [np.asarray(Image.open(path)) for path in sorted((scenes / "val" / "masks").iterdir())]
    pictures = [Image.open(path) for path in sorted((tmp_path / "maps").glob("*.png"))]
    assert {picture.mode for picture in pictures} == {"L"}
    assert figures == pytest.approx(figures_by_definition([np.asarray(picture) for picture in pictures], masks))


@pytest.mark.full
def test_evaluation_on_two_processes(trained, scenes, program, in_process, tmp_path):
    found = []
    for number, start in ((1, in_process), (2, partial(program, processes=2))):
        output = tmp_path / f"{number}.json"
        args = ["--data", scenes, "--batch-size", 2, "--threads", 1, "--output", output]
        done = start(VALIDATE, trained, *args)
        assert done.returncode == 0, done.stderr
        (result,) = json.loads(output.read_text())
        assert (result["num_processes"], result["samples"]) == (number, 5)
        found.append(result["figures"])
    assert found[0] == found[1]


def test_saved_model_predicts_the_same_map(wild, tmp_path):
    wild.save(tmp_path / "dss", ModelCard("---\n---\n"))
    image = torch.rand(3, 70, 50)
    loaded = tasks.load(str(tmp_path / "dss"))
    assert torch.equal(loaded([image])[0], wild([image])[0])
    # Bit-identical in a batch too.
    assert torch.equal(loaded([torch.rand(3, 33, 90), image])[1], wild([image])[0])


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_figures_by_definition(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    score, maps, masks = MaxFAndMAE(), [], []
    for i in range(data.draw(st.integers(1, 4))):
        shape = tuple(rng.integers(1, 9, 2))
        maps.append(rng.integers(0, data.draw(st.sampled_from([1, 2, 256])), shape).astype(np.uint8))
        masks.append((rng.random(shape) < data.draw(st.sampled_from([0, 0.3, 1]))).astype(np.uint8) * 255)
        score.update(i, {"mask": torch.from_numpy(masks[-1] > 0)}, torch.from_numpy(maps[-1]) / 255)
    assert score.compute(Accelerator(cpu=True)) == pytest.approx(figures_by_definition(maps, masks))


def test_short_connections_lead_from_deep_to_shallow_outputs():
    network = Saliency("res2net_tiny", CLASSES).network.eval()
    assert isinstance(network, DSS)
    network.backbone.requires_grad_(False)
    *sides, fused = network(torch.rand(1, 3, 32, 32))
    assert len(sides) == len(network.branches) == 5
    for m, output in enumerate([*sides, fused]):
        network.zero_grad(set_to_none=True)
        output.sum().backward(retain_graph=True)
        reached = [i for i, branch in enumerate(network.branches) if branch[0].weight.grad is not None]
        assert reached == list(range(0 if output is fused else m, 5))
        assert all(network.branches[i][-1].weight.grad.abs().sum() > 0 for i in reached)


def test_side_outputs_are_weighted_sums():
    network = spread(Saliency("res2net_tiny", CLASSES)).network.eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        *sides, fused = network(image)
        own = [branch(feature) for branch, feature in zip(network.branches, network.backbone(image), strict=True)]
        up = torch.nn.functional.interpolate
        # The second deepest: the weighted sum of its branch's map and the deepest one.
        side = own[3] + network.short[3].weight.item() * up(own[4], size=(4, 4), mode="bilinear")
        assert torch.allclose(sides[3], up(side, size=(64, 64), mode="bilinear"), atol=1e-4)
        weights = network.fuse.weight.flatten()
        mean = sum(weight * side for weight, side in zip(weights, sides, strict=True))
        assert torch.allclose(fused, mean, atol=1e-4)


def test_map_is_the_mean_of_the_selected_outputs():
    """The fused output and the side outputs of strides 2, 4 and 8 are averaged; none is resized here."""
    model = spread(Saliency("res2net_tiny", CLASSES, img_size=64)).eval()
    image = torch.rand(3, 64, 64)
    with torch.inference_mode():
        *sides, fused = model.network(model.normalize(image[None]))
        by_hand = sum(output.sigmoid() for output in (*sides[:3], fused)) / 4
        assert torch.allclose(model([image])[0], by_hand[0, 0], atol=1e-5)


@pytest.mark.first_case
@pytest.mark.parametrize("model", SMALL)
def test_every_family(model):
    backbone: Any = timm.create_model(model, features_only=True, **SMALL[model])
    network = DSS(backbone)
    outputs = network(torch.rand(2, 3, 64, 64))
    assert len(outputs) == len(backbone.feature_info.channels()) + 1
    assert {output.shape for output in outputs} == {(2, 1, 64, 64)}
    sum(output.mean() for output in outputs).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_losses_match_definition():
    network = Saliency("res2net_tiny", CLASSES, img_size=64)
    network.freeze("all", batch_norm=True)
    images, masks = torch.rand(2, 3, 64, 64), (torch.rand(2, 1, 64, 64) < 0.2).double()
    losses = network.train()(list(images), [{"mask": mask.float()} for mask in masks])
    assert list(losses) == ["side 1", "side 2", "side 3", "side 4", "side 5", "fused"]
    outputs = network.network(network.normalize(images))
    for loss, output in zip(losses.values(), outputs, strict=True):
        p = output.double().sigmoid()
        by_hand = -(masks * p.log() + (1 - masks) * (1 - p).log()).mean()
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3))
def test_maps_have_the_size_of_images(wild, sizes):
    images = [torch.rand(3, *size) for size in sizes]
    with torch.inference_mode():
        maps = wild(images)
    for size, saliency in zip(sizes, maps, strict=True):
        assert saliency.shape == size
        assert saliency.min() >= 0 and saliency.max() <= 1
        picture = wild.draw(Image.new("RGB", size[::-1]), saliency)
        assert picture.mode == "L" and picture.size == size[::-1]


def test_masks_are_augmented_like_images(scenes):
    """Random augmentation is the same for image and mask, and applies to some of the images."""
    network, left = Saliency("res2net_tiny", CLASSES, img_size=64), []
    mask = torch.zeros(96, 128, dtype=torch.bool)
    mask[20:50, 10:40] = True
    flat = Image.fromarray(mask.numpy().astype(np.uint8) * 255).convert("RGB")
    for seed in range(8):
        torch.manual_seed(seed)
        image, target = network.transform(flat, {"mask": mask}, train=True)
        assert image.shape == (3, 64, 64) and target["mask"].shape == (1, 64, 64)
        assert torch.equal((image[:1] > 0.5).float(), target["mask"])
        left.append(bool(target["mask"][0, :, :32].any()))
    assert set(left) == {True, False}


@pytest.mark.parametrize(("images", "masks"), [("images", "ground_truth_mask"), ("imgs", "gt"), ("Imgs", "GT")])
def test_layouts(scenes, tmp_path, images, masks):
    folder = tmp_path / "ECSSD"
    shutil.copytree(scenes / "val" / "images", folder / images)
    shutil.copytree(scenes / "val" / "masks", folder / masks)
    found = Saliency.open(str(tmp_path), "ECSSD", "dss")
    assert len(found) == 5 and found.classes == CLASSES
    # The same folder with two lists: one of images and masks, as in some benchmarks, and one of names.
    (folder / "train.txt").write_text(f"{images}/val_00003.jpg {masks}/val_00003.png\n\n{images}/val_00001.jpg\n")
    (folder / "test.txt").write_text("val_00004\n")
    listed = Masks(folder, "train")
    assert [listed.path(i).name for i in range(len(listed))] == ["val_00003.jpg", "val_00001.jpg"]
    right = np.asarray(Image.open(folder / masks / "val_00003.png")) > 0
    assert np.array_equal(listed[0][1]["mask"].numpy(), right)
    assert Masks(folder, "test").path(0).stem == "val_00004"


def test_image_without_object(scenes, tmp_path):
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    path = data / "train/masks/train_00002.png"
    Image.new("1", Image.open(path).size).save(path)
    assert not Masks(data, "train")[2][1]["mask"].any()


def remove_the_split(data: Path) -> None:
    shutil.rmtree(data / "train")


def remove_the_masks(data: Path) -> None:
    shutil.rmtree(data / "train/masks")


def remove_the_images(data: Path) -> None:
    for path in (data / "train/images").iterdir():
        path.unlink()


def remove_a_mask(data: Path) -> None:
    (data / "train/masks/train_00002.png").unlink()


def shrink_a_mask(data: Path) -> None:
    path = data / "train/masks/train_00002.png"
    Image.open(path).resize((9, 7)).save(path)


def cut_a_mask(data: Path) -> None:
    path = data / "train/masks/train_00002.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_over_an_image(data: Path) -> None:
    (data / "train/images/train_00002.jpg").write_text("no image")


def cut_an_image(data: Path) -> None:
    path = data / "train/images/train_00002.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def copy_an_image(data: Path) -> None:
    path = data / "train/images/train_00002.jpg"
    Image.open(path).save(path.with_suffix(".png"))


def write_ones(data: Path) -> None:
    for path in (data / "train/masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 255).save(path)


def write_ones_all_over(data: Path) -> None:
    for path in (data / "train/masks").iterdir():
        Image.new("L", Image.open(path).size, 255).save(path)


def list_another(data: Path) -> None:
    shutil.copytree(data / "train", data / "all")
    shutil.move(data / "all/images", data / "images")
    shutil.move(data / "all/masks", data / "masks")
    shutil.rmtree(data / "train")
    (data / "train.txt").write_text("train_00002.jpg\ntrain_99999.jpg\n")


def list_in_latin1(data: Path) -> None:
    list_another(data)
    (data / "train.txt").write_bytes("Gänse.jpg".encode("latin-1"))


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_the_split, "data must have a folder train or a list train.txt"),
        (remove_the_masks, r"train has no folder masks \(or mask, ground_truth_mask, gt\)"),
        (remove_the_images, "train has no images"),
        (remove_a_mask, "the mask for .*images/train_00002.jpg is missing"),
        (shrink_a_mask, "train_00002.jpg is 128 x 96; its mask .*masks/train_00002.png is 9 x 7"),
        (cut_a_mask, "cannot read the mask .*masks/train_00002.png"),
        (write_over_an_image, "cannot read .*images/train_00002.jpg"),
        (cut_an_image, "cannot decode .*images/train_00002.jpg"),
        (copy_an_image, "train_00002.png has the same name as train_00002.jpg; remove one"),
        (write_ones, "all masks, such as .*train_00000.png, are empty: no value is over 128"),
        (write_ones_all_over, "all masks, such as .*train_00000.png, are full: no value is 128 or less"),
        (list_in_latin1, "cannot read .*train.txt: it is not UTF-8 text"),
        (list_another, "cannot find the image train_99999.jpg, which .*train.txt names"),
    ],
)
def test_invalid_data(scenes, tmp_path, in_process, damage, expected):
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    damage(data)
    line = input_error(in_process(TRAIN, *TINY, "--data", data, "--img-size", 32, "--output", tmp_path / "out"))
    assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--head", "u2net"], "does not support the head u2net; supported: dss"),
        (["--output-stride", 16], "dss needs features of stride 32, not 16"),
        (["--img-size", 50], "dss needs an image size that is a multiple of 32, not 50"),
    ],
)
def test_invalid_commands(scenes, tmp_path, in_process, args, expected):
    line = input_error(in_process(TRAIN, *TINY, "--data", scenes, "--output", tmp_path / "out", *args))
    assert expected in line


@pytest.mark.slow
def test_training_reaches_high_f_measure(tmp_path):
    """Under a minute on two idle cores: 120 rendered scenes."""
    data = save_saliency(tmp_path / "scenes")
    settings = ["--img-size", 96, "--epochs", 6, "--lr", 1e-3]
    done = Running(tmp_path / "out", *TINY, "--data", data, *settings, script=TRAIN).end(1200)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows = list(csv.DictReader((tmp_path / "out/metrics.csv").open()))
    best = max(rows, key=lambda row: float(row["F-measure"]))
    assert float(best["F-measure"]) > 0.9 and float(best["MAE"]) < 0.06
