"""Tests of `scripts/cam.py`: target layer, maps, picture, and classes."""

import itertools
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from res2net_zoo.analysis import cam
from res2net_zoo.cli.cam import classes_of
from res2net_zoo.utils.errors import InputError
from tests.conftest import ROOT, SHIPPED_DATA, SHIPPED_MODEL, SMALL, full_disk, input_error, spread

CAM = "scripts/cam.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    files = sorted(str(path) for path in SHIPPED_DATA.rglob("*validation*"))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    (folder / "images").mkdir()
    for i in range(3):
        rows[i]["image"].save(folder / "images" / f"{i}_{rows[i]['label']}.png")
    return folder / "images"


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return timm.create_model(f"local-dir:{SHIPPED_MODEL}", pretrained=True).eval()


@pytest.mark.first_case
@pytest.mark.parametrize("name", [*SMALL, "res2net_tiny", "resnet18"])
def test_target_layer_returns_the_pooled_features(name):
    model = spread(timm.create_model(name, num_classes=7, **SMALL.get(name, {}))).eval()
    seen = []
    cam.target_layer(model).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), seen[0])


@pytest.mark.first_case
@pytest.mark.parametrize("name", [*SMALL, "resnet18"])
def test_grad_cam_equals_cam(name):
    """With one linear layer after average pooling, Grad-CAM is CAM (Selvaraju et al., Section 3.1)."""
    model = spread(timm.create_model(name, num_classes=7, **SMALL.get(name, {}))).eval()
    x, classes = torch.randn(3, 3, 96, 96), [6, 0, 3]
    found, logits = cam.activation_maps(model, x, classes)
    with torch.no_grad():
        assert torch.equal(logits, model(x))
        features, weight = model.forward_features(x), model.get_classifier().weight.flatten(1)
        expected = torch.einsum("nchw,nc->nhw", features, weight[classes]).clamp(min=0)
        # The package resizes with OpenCV, which corresponds to align_corners=False.
        expected = F.interpolate(expected[:, None], x.shape[2:], mode="bilinear")[:, 0]
        expected = expected / expected.amax((1, 2), keepdim=True).clamp(min=1e-7)
    for one, other in zip(found, expected.numpy(), strict=True):
        # The package normalizes each map to its range before and after resizing.
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.99 if other.any() else not one.any()
    assert found.shape == (3, 96, 96) and found.min() >= 0 and found.max() <= 1


@pytest.mark.first_case
@pytest.mark.parametrize("name", [*SMALL, "res2net_tiny", "resnet18"])
def test_class_maps_equal_grad_cam(name):
    model = spread(timm.create_model(name, num_classes=7, **SMALL.get(name, {}))).eval()
    x, classes = torch.randn(3, 3, 64, 96), [6, 0, 3]
    expected, _ = cam.activation_maps(model, x, classes)
    cam.check_linear_head(model, x[:1])
    with torch.no_grad():
        found = cam.class_maps(model, cam.LastMap(model)(x), classes, x.shape[2:])
    assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-3


@pytest.mark.full
def test_int8(in_process, digits, tmp_path):
    result = in_process(CAM, digits, "--precision", "int8", "--output", tmp_path / "a.png")
    assert result.returncode == 0, result.stderr
    found = [line.split("|")[2:4] for line in result.stdout.splitlines()[2:-1]]
    plain = [
        line.split("|")[2:4]
        for line in in_process(CAM, digits, "--output", tmp_path / "b.png").stdout.splitlines()[2:-1]
    ]
    for (label, score), (same, exact) in zip(found, plain, strict=True):
        assert label == same and float(score) == pytest.approx(float(exact), abs=3)


@pytest.mark.first_case
@pytest.mark.parametrize("backend", ["native", "auto"])
def test_backends_draw_the_same_picture(in_process, digits, tmp_path, backend):
    shown = []
    for name in ("torch", backend):
        result = in_process(CAM, digits, "--backend", name, "--output", tmp_path / f"{name}.png")
        assert result.returncode == 0, result.stderr
        shown.append((result.stdout.splitlines()[:-1], np.asarray(Image.open(tmp_path / f"{name}.png"), np.int16)))
    (lines, picture), (same, other) = shown
    assert lines == same and np.abs(picture - other).max() <= 8


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--backend", "native", "--method", "layercam"], "--method layercam needs plain PyTorch; remove --backend"),
        (["--precision", "int8", "--method", "eigencam"], "--method eigencam needs plain PyTorch; remove"),
        (["--precision", "int8", "--backend", "torch"], "--precision int8 needs a backend"),
        (["--precision", "int8", "--model", "resnet18"], "--precision int8 needs --calibrate DATA"),
        (["--precision", "bfloat16"], "in float32; add --backend auto or remove --precision"),
        (["--backend", "auto", "--model", "mobilenetv3_small_050"], "MobileNetV3 has a head other than average pool"),
        (["--backend", "fastest"], "invalid choice: 'fastest'"),
    ],
)
def test_a_backend_is_refused_where_gradients_are_needed(in_process, digits, args, words, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "res2net_zoo.weights.pretrained.create_model", lambda name: timm.create_model(name, num_classes=10)
    )
    assert words in input_error(in_process(CAM, digits, *args, "--output", tmp_path / "a.png"))
    assert not (tmp_path / "a.png").exists()


def test_transformer_is_unsupported():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    with pytest.raises(InputError, match="the last layer of VisionTransformer does not return a map"):
        cam.activation_maps(model, torch.randn(1, 3, 32, 32), [0])


@pytest.mark.first_case
@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "eigencam"])
def test_picture_of_two_models(in_process, digits, tmp_path, tiny, method):
    output, model = tmp_path / "a.png", f"local-dir:{SHIPPED_MODEL}"
    result = in_process(CAM, digits, "--model", model, model, "--method", method, "--output", output)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == f"wrote {output}" and [path.name for path in tmp_path.iterdir()] == ["a.png"]
    for line, path in zip(lines[2:-1], sorted(digits.iterdir()), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        with torch.no_grad():
            score = 100 * tiny(cam.load_image(tiny, str(path))).softmax(1).max().item()
        assert (
            cells[:2] == [str(path), path.stem[-1]]
            and [float(cell) for cell in cells[2:]] == [pytest.approx(score, abs=0.06)] * 2
        )
    width, height = Image.open(output).size
    assert width == pytest.approx(3 * 390 + 90, abs=2) and height == pytest.approx(3 * 465, abs=2)


@pytest.mark.parametrize("rows", [1, 3])
def test_titles_are_inside_the_picture(rows):
    """Long names are wrapped; maps are interpolated, with a colour bar."""
    names = ("a_photograph_from_a_camera_with_a_long_name.jpg", "Egyptian cat, a domestic cat, or another of its names")
    small = cam.Activation("local-dir_a_model_folder_with_a_long_name", np.ones((8, 8, 3)), np.eye(8), 0.9)
    figure = cam.figure([(*names, [small, small])] * rows)
    figure.draw_without_rendering()
    *axes, bar = figure.axes
    boxes = [axis.title.get_window_extent() for axis in axes]
    assert all(figure.bbox.count_contains(box.corners()) == 4 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(axis.images[-1].get_interpolation() == "bicubic" for axis in axes if len(axis.images) == 2)
    assert bar.get_ylabel() and bar.get_ylim() == (0, 1)


def test_class_option(in_process, digits, tmp_path):
    def classes(*words: str) -> list[str]:
        result = in_process(CAM, digits, "--class", *words, "--output", tmp_path / "a.png")
        assert result.returncode == 0, result.stderr
        return [line.split("|")[2].strip() for line in result.stdout.splitlines()[2:-1]]

    assert classes("7") == ["7", "7", "7"]
    assert classes("1", "2", "3") == ["1", "2", "3"]


def test_find_class():
    names = ["tench, Tinca tinca", "crane", "7", "goldfish", "crane"]
    assert [cam.find_class(word, names) for word in ("Tinca tinca", "tench, tinca TINCA", "7", "0", "GoldFish")] == [
        *(0, 0, 2, 0, 3)
    ]
    for word, words in {"crane": "classes 1, 4", "goldfisch": "did you mean goldfish", "9": "there are 5"}.items():
        with pytest.raises(InputError, match=words):
            cam.find_class(word, names)


def test_error_of_an_unknown_class_names_the_command_that_lists_all():
    names = [f"kind {i}" for i in range(100)]
    with pytest.raises(
        InputError, match=r"0 \(kind 0\) to 99 \(kind 99\); `res2net-zoo predict --topk 100` lists them$"
    ):
        classes_of(["otter"], names)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--class", "three"], "there is no class three"),
        (["--class", "1", "2"], "there are 3 images and 2 classes"),
        (["--output", "cam.txt"], "cam.txt must end in one of .avif"),
        (["--output", "nowhere/cam.png"], "nowhere"),
        (["--model", "res2net50"], "res2net50"),
        (["--method", "magic"], "invalid choice: 'magic'"),
    ],
)
def test_invalid_input(in_process, digits, args, words):
    assert words in input_error(in_process(CAM, digits, *args))


def test_models_must_have_the_same_classes(in_process, digits, tmp_path):
    from res2net_zoo.weights.card import model_card
    from res2net_zoo.weights.model_folder import write_model_folder

    other = timm.create_model("res2net_tiny", num_classes=2)
    write_model_folder(tmp_path / "other", other, model_card("other", "# other", None), ["cat", "dog"])
    result = in_process(CAM, digits, "--model", f"local-dir:{SHIPPED_MODEL}", f"local-dir:{tmp_path / 'other'}")
    assert "have different classes; choose models with the same classes" in input_error(result)


@pytest.mark.full
def test_invalid_images(program, in_process, digits, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    result = program(CAM, tmp_path, "--output", tmp_path / "a.svg")
    assert f"{tmp_path / 'broken.png'} is corrupt (not an image of a supported format)" in input_error(result)
    assert "there is no image in" in input_error(in_process(CAM, ROOT / "tests" / "models" / "parity"))
    line = input_error(in_process(CAM, tmp_path, "--output", tmp_path / "broken.png"))
    assert "is one of the images, which the picture would replace" in line
    assert (tmp_path / "broken.png").read_bytes() == b"nothing"


def test_full_disk_keeps_the_existing_picture(in_process, digits, tmp_path):
    output = tmp_path / "a.png"
    output.write_bytes(b"old")
    with full_disk(1000):
        result = in_process(CAM, digits, "--output", output)
    assert "cannot write" in input_error(result) and output.read_bytes() == b"old"


def test_missing_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need grad-cam and matplotlib; pip install 'res2net-zoo\[cam\]'"):
        cam.require()
