"""Tests of `predict-task --backend`: a task's model whose backbone runs on a backend of `optimize`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from res2net_zoo.inference import optimization
from res2net_zoo.inference.forward import accelerate_features
from res2net_zoo.inference.quantization import rms_error
from res2net_zoo.kernels.cpu_network import Network
from res2net_zoo.tasks import task_class
from res2net_zoo.tasks.prediction import calibration_crops, read_image
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.card import model_card
from tests.conftest import input_error, relative_error, save_images, spread

PREDICT = "scripts/predict_task.py"
CASES = [
    ("segmentation", "deeplabv3plus"),
    *(("segmentation", "unet"), ("segmentation", "fpn")),
    *(("detection", "fasterrcnn"), ("detection", "retinanet"), ("detection", "maskrcnn")),
    *(("saliency", "dss"), ("keypoints", "simplebaseline")),
]
SIZES = ((96, 64), (64, 96), (80, 80), (160, 60), (60, 130), (64, 64), (96, 64))  # more than are cached


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    torch.set_num_threads(1)  # with small maps, threads mostly wait for each other


def model_of(task: str, head: str) -> Any:
    """Return a model on the smallest backbone with random weights, the same in each call."""
    classes = ["nose", "left eye", "right eye"] if task == "keypoints" else ["background", "disc", "square"]
    torch.manual_seed(0)
    img_size = 128 if task == "keypoints" else 64
    model: Any = task_class(task)("res2net_tiny", classes[:1] if task == "saliency" else classes, head, img_size)
    spread(model.features)
    return model.eval()


@torch.inference_mode()
def raw(model: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """Return the raw outputs from which a task's predictions are computed."""
    match model.task:
        case "segmentation":
            return [model.logits(image[None])]
        case "keypoints":
            return [model.heatmaps(torch.nn.functional.interpolate(image[None], model.size[::-1]))]
        case "saliency":
            return model([image])
        case _:
            batch, _ = model.network.transform([image])
            return list(model.network.backbone(batch.tensors).values())


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, h, w, generator=generator) for h, w in SIZES]


@pytest.mark.first_case
@pytest.mark.parametrize("backend", ["native", "auto"])
@pytest.mark.parametrize(("task", "head"), CASES)
def test_predictions_of_a_backend_equal_torchs(task, head, backend, capsys):
    """For images of many sizes, whose networks are not all kept."""
    model, fast = model_of(task, head), model_of(task, head)
    accelerate_features(fast.features, backend, Accelerator(cpu=True))
    for image in images():
        for one, other in zip(raw(fast, image), raw(model, image), strict=True):
            assert one.shape == other.shape and relative_error(one, other) < 1e-3
    assert "cannot run" not in capsys.readouterr().err


def test_few_networks_are_kept(monkeypatch):
    made = []
    init = Network.__init__
    monkeypatch.setattr(
        Network, "__init__", lambda self, *args, **more: (init(self, *args, **more), made.append(self))[0]
    )
    model = model_of("segmentation", "unet")
    accelerate_features(model.features, "native", Accelerator(cpu=True))
    for image in images():
        raw(model, image)
    (network,) = made
    assert len(network.programs) <= 4 < len({image.shape for image in images()})


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    return save_images(tmp_path_factory.mktemp("data") / "calibration", ["a", "b"], 20)


@pytest.mark.first_case
@pytest.mark.parametrize(("task", "head"), CASES)
def test_int8(task, head, calibration):
    """Calibrated on crops of the backbone's inputs, and run at many sizes."""
    accelerator, model, fast = Accelerator(cpu=True), model_of(task, head), model_of(task, head)
    paths = sorted(calibration.rglob("*.jpg"))
    crops = calibration_crops(fast, paths, accelerator)
    assert len(crops) == 40 and max(crops.shape[2:]) <= 224 and not any(side % 32 for side in crops.shape[2:])
    accelerate_features(fast.features, "native", accelerator, crops)
    for path in paths[::8]:
        image = TF.to_dtype(TF.pil_to_tensor(read_image(path)), scale=True)
        for one, other in zip(raw(fast, image), raw(model, image), strict=True):
            assert 1e-6 < rms_error(one.float(), other.float()) < 0.2


def test_program_in_int8(pictures, calibration, in_process, tmp_path):
    model_of("segmentation", "unet").save(tmp_path / "model", model_card("tiny", "# tiny", None))
    args = [PREDICT, tmp_path / "model", pictures / "0.png", "--precision", "int8", "--output", tmp_path / "seen"]
    done = in_process(*args, "--calibrate", calibration)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "seen").iterdir())) == 2
    assert "--precision int8 needs --calibrate DATA" in input_error(in_process(*args))
    line = input_error(in_process(*args, "--calibrate", f"{calibration}/a"))
    assert "there are 20 calibration images; int8 needs at least 32" in line
    line = input_error(in_process(*args, "--calibrate", tmp_path / "nowhere"))
    assert "there is no file or folder" in line
    line = input_error(in_process(*args, "--backend", "torch", "--calibrate", calibration))
    assert "replace --backend torch by --backend auto" in line


def test_weights_that_are_nan(tmp_path):
    model = model_of("segmentation", "unet")
    with torch.no_grad():
        next(model.features.parameters()).fill_(float("nan"))
    accelerate_features(model.features, "auto", Accelerator(cpu=True))
    with pytest.raises(InputError, match="NaN or infinite values; load other weights"):
        raw(model, images()[0])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(images()):
        Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


@pytest.mark.first_case
@pytest.mark.parametrize(("task", "head"), [CASES[0], CASES[3], *CASES[-2:]])
def test_program(task, head, pictures, in_process, tmp_path):
    model_of(task, head).save(tmp_path / "model", model_card("tiny", "# tiny", None))
    found: dict[str, list[dict[str, Any]]] = {}
    for backend in ("torch", "native"):
        args = ["--backend", backend, "--threads", 1, "--output", tmp_path / backend]
        done = in_process(PREDICT, tmp_path / "model", pictures, *args)
        assert done.returncode == 0, done.stderr
        found[backend] = [json.loads(path.read_text()) for path in sorted((tmp_path / backend).glob("*.json"))]
    assert len(found["torch"]) == len(SIZES)
    for one, other in zip(found["native"], found["torch"], strict=True):
        assert [item.get("label") for item in one["objects"]] == [item.get("label") for item in other["objects"]]
        for item, same in zip(one["objects"], other["objects"], strict=True):
            numbers = [np.array(x[key]) for key in ("bbox", "score", "area") if key in item for x in (item, same)]
            assert all(np.allclose(*pair, rtol=0.01, atol=0.01) for pair in zip(*[iter(numbers)] * 2, strict=True))


def test_precision_is_that_of_the_program(pictures, in_process, tmp_path, monkeypatch):
    seen, build = [], optimization._build
    monkeypatch.setattr(
        optimization, "_build", lambda name, **kwargs: seen.append(kwargs["precision"]) or build(name, **kwargs)
    )
    model_of("segmentation", "unet").save(tmp_path / "model", model_card("tiny", "# tiny", None))
    args = [PREDICT, tmp_path / "model", pictures / "0.png", "--backend", "eager", "--output", tmp_path / "seen"]
    for precision in ("float32", "bfloat16"):
        done = in_process(*args, "--precision", precision)
        assert done.returncode == 0, done.stderr
    assert seen == ["float32", "bfloat16"]


def test_unavailable_backend_is_replaced_with_a_warning(pictures, in_process, tmp_path):
    model_of("segmentation", "unet").save(tmp_path / "model", model_card("tiny", "# tiny", None))
    args = [PREDICT, tmp_path / "model", pictures / "0.png", "--output", tmp_path / "seen"]
    done = in_process(*args, "--backend", "cudagraphs")
    assert done.returncode == 0 and "cudagraphs cannot run this model here" in done.stderr
    assert "invalid choice: 'fastest'" in input_error(in_process(*args, "--backend", "fastest"))
