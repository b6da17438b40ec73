"""Tests of shared task code and of semantic segmentation: metrics, resumed training, model folders."""

import csv
import json
import re
import shutil
import signal
import struct
import tomllib
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from res2net_zoo import catalog, tasks
from res2net_zoo.tasks.segmentation import IGNORED, MeanIoU, Segmentation, voc_colour
from res2net_zoo.tasks.training import make_card
from res2net_zoo.training.checkpoints import Checkpoints
from res2net_zoo.training.optimization import Optimization, highest_rate
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import locked
from tests.conftest import input_error
from tests.scenes import KINDS, render, save_saliency, save_voc
from tests.training.test_survival import Running

TRAIN, VALIDATE, PREDICT = (f"scripts/{name}_task.py" for name in ("train", "validate", "predict"))
SMALL = ["--task", "segmentation", "--model", "res2net_tiny", "--img-size", 64, "--workers", 1, "--threads", 1]
CLASSES = ["background", *KINDS]


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    return save_voc(tmp_path_factory.mktemp("data") / "voc", train=16, val=7)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, voc) -> Path:
    """The folder of a briefly trained model."""
    folder = tmp_path_factory.mktemp("trained") / "unet"
    done = Running(folder, *SMALL, "--data", voc, "--head", "unet", "--epochs", 2, script=TRAIN).end()
    assert done.returncode == 0, done.stderr
    return folder


def figures_of(path: Path) -> dict[str, float]:
    (result,) = json.loads(path.read_text())
    return result["figures"]


def test_validation_reproduces_training_metrics(trained, voc, in_process, tmp_path):
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    best = max(rows, key=lambda row: float(row["mIoU"]))
    anyhow = f"{voc}/../{voc.name}/"  # the card names the data by the folder's name
    done = in_process(VALIDATE, trained, "--data", anyhow, "--check", "--output", tmp_path / "figures.json")
    assert done.returncode == 0 and "mIoU" in done.stdout, done.stderr
    assert figures_of(tmp_path / "figures.json")["mIoU"] == pytest.approx(float(best["mIoU"]), abs=1e-9)
    card = ModelCard.load(trained / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == {"mIoU", "pixel accuracy"}
    assert "a Res2Net" in card.text and "res2net" in card.data.tags and str(voc.parent) not in str(card.data)


def test_card_of_another_backbone_does_not_mention_res2net(tmp_path):
    model = Segmentation("resnet18", CLASSES, "unet", 64)
    row = {"epoch": 1, "lr": 0.1, "loss": 1.0, "mIoU": 50.0}
    card = make_card(model, row, Accelerator(cpu=True), tmp_path, {"data": "voc", "split": "val"})
    assert "by unet on resnet18." in card.text and "res2net" not in card.data.tags


def test_check_fails_if_card_metrics_are_higher(trained, voc, in_process, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "unet"))
    card = (folder / "README.md").read_text()
    value = next(line for line in card.splitlines() if "value:" in line)
    (folder / "README.md").write_text(card.replace(value, "      value: 99.9", 1))
    done = in_process(VALIDATE, folder, "--data", voc, "--check")
    assert done.returncode == 1 and re.search(r"mIoU .* 99.900 *\| no", done.stdout), done.stdout
    # A published metric that was not measured fails; half of the last printed digit is tolerated.
    value = float(value.split()[-1])
    for name, promised, code in (("mean error", value, 1), ("mIoU", value + 0.04, 0), ("mIoU", value + 0.06, 1)):
        (folder / "README.md").write_text(
            card.replace(f"value: {value}", f"value: {promised}", 1).replace("type: mIoU", f"type: {name}", 1)
        )
        done = in_process(VALIDATE, folder, "--data", voc, "--check")
        assert done.returncode == code, done.stdout + done.stderr
        assert not re.search(r"mean error +\|", done.stdout) or re.search(r"mean error +\| +- +\| .*no", done.stdout)
    line = input_error(in_process(VALIDATE, folder, "--data", voc, "--split", "train", "--check"))
    assert "no metrics for" in line and "train" in line


@pytest.mark.full
def test_evaluation_on_two_processes(trained, voc, program, in_process, tmp_path):
    for number, start in ((1, in_process), (2, partial(program, processes=2))):
        done = start(VALIDATE, trained, "--data", voc, "--batch-size", 2, "--output", tmp_path / f"{number}.json")
        assert done.returncode == 0, done.stderr
    assert figures_of(tmp_path / "1.json") == figures_of(tmp_path / "2.json")


@pytest.mark.full
def test_training_on_two_processes(tmp_path):
    """With frozen BatchNorm and a head without it, a step does not depend on how images are batched."""
    data = save_saliency(tmp_path / "data", train=16, val=2)
    common = ["--task", "saliency", "--model", "res2net_tiny", "--img-size", 64, "--threads", 1, "--data", data]
    common += ["--freeze-bn", "--epochs", 1, "--opt", "sgd", "--lr", 0.01]
    for number in (1, 2):
        folder = tmp_path / str(number)
        done = Running(folder, *common, "--batch-size", 8 // number, processes=number, script=TRAIN).end()
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    start = tasks.task_class("saliency")("res2net_tiny", ["salient object"], img_size=64).state_dict()
    moved = [name for name in one if not torch.allclose(one[name], start[name], atol=1e-3)]
    assert "network.fuse.weight" in moved


@pytest.mark.full
def test_programs_start_two_processes_themselves(program, tmp_path):
    data = save_saliency(tmp_path / "data", train=16, val=4)
    options = ["--task", "saliency", "--model", "res2net_tiny", "--img-size", 64, "--threads", 1, "--epochs", 1]
    done = Running(tmp_path / "out", *options, "--data", data, "--processes", 2, script=TRAIN).end()
    assert done.returncode == 0, done.stderr
    assert "2 processes of 1 threads" in (tmp_path / "out" / "README.md").read_text()
    options = ["--data", data, "--check", "--tolerance", 1e-4, "--processes", 2]
    done = program(VALIDATE, tmp_path / "out", *options, ACCELERATE_USE_CPU="true")
    assert (done.returncode, done.stderr) == (0, "") and "num_processes 2" in done.stdout


@pytest.mark.slow
def test_saved_model_of_two_processes_has_the_evaluated_statistics(voc, tmp_path, in_process):
    """BatchNorm statistics differ between processes until they are averaged."""
    args = [*SMALL, "--data", voc, "--head", "unet", "--epochs", 1, "--batch-size", 4]
    done = Running(tmp_path / "out", *args, processes=2, script=TRAIN).end()
    assert done.returncode == 0, done.stderr
    checked = in_process(VALIDATE, tmp_path / "out", "--data", voc, "--check", "--tolerance", 1e-4)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.full
def test_resume_after_kill_is_bit_identical(voc, tmp_path, trained):
    common = [*SMALL, "--data", voc, "--head", "unet", "--epochs", 2]
    running = Running(tmp_path / "unet", *common, "--save-minutes", 0, script=TRAIN)
    running.wait_for_step(3)  # of 4: in the second epoch
    running.signal(signal.SIGKILL)
    running.end()
    done = Running(tmp_path / "unet", "--resume", script=TRAIN).end()  # uses the saved settings
    assert done.returncode == 0 and "resuming after step" in done.stdout, done.stderr
    assert (trained / "metrics.csv").read_text() == (tmp_path / "unet/metrics.csv").read_text()
    one, two = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "unet"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_locked_folders_and_invalid_checkpoints(trained, voc, in_process, tmp_path):
    with locked(trained):
        assert "another run (process" in input_error(in_process(TRAIN, "--resume", "--output", trained))
    with locked(tmp_path / "figures.json"):
        args = ["--data", voc, "--output", tmp_path / "figures.json"]
        assert "another run (process" in input_error(in_process(VALIDATE, trained, *args))
    folder = Path(shutil.copytree(trained, tmp_path / "unet"))
    shutil.copytree(trained.with_name("unet.run"), tmp_path / "unet.run")
    last = Checkpoints(tmp_path / "unet.run" / "checkpoints").paths()[-1]
    state = Checkpoints(tmp_path / "unet.run" / "checkpoints").load()
    for changed, words in (
        ([1], "it contains a list"),
        ({**state, "metrics": [{}]}, "its metrics is invalid"),
        ({**state, "done": -1}, "its done is invalid"),
        ({**state, "model": {}}, "is not a checkpoint of this run"),
        ({**state, "optimizer": [1]}, "its optimizer is invalid"),
        ({k: v for k, v in state.items() if k != "plan"}, "plan missing"),
    ):
        torch.save(changed, last)
        line = input_error(in_process(TRAIN, "--resume", "--epochs", 3, "--output", folder))
        assert str(last) in line and words in line, line
    # The format of earlier versions.
    earlier = {key: value for key, value in state.items() if key not in ("losses", "rates", "ema")}
    torch.save({**earlier, "sums": state["losses"]}, last)
    done = in_process(TRAIN, "--resume", "--epochs", 3, "--output", folder)
    assert done.returncode == 0 and "resuming after step 4 of 6" in done.stdout, done.stderr


def test_unreadable_evaluation_image_is_found_before_training(voc, in_process, tmp_path):
    data = Path(shutil.copytree(voc, tmp_path / "voc"))
    for name in (data / "ImageSets" / "Segmentation" / "val.txt").read_text().split():
        (data / "JPEGImages" / f"{name}.jpg").write_bytes(b"no image")
    args = [*SMALL, "--workers", 0, "--data", data, "--head", "unet", "--epochs", 1, "--output", tmp_path / "unet"]
    line = input_error(in_process(TRAIN, *args))
    assert "cannot" in line and "JPEGImages/val_" in line
    assert not list((tmp_path / "unet.run").rglob("*.pt"))


def test_saved_backbone_initializes_another_task_and_a_classifier(trained, voc):
    weights = load_file(trained / "model.safetensors")
    name = f"local-dir:{trained / 'backbone'}"
    classifier = timm.create_model(name, pretrained=True, num_classes=5)
    other = Segmentation(name, CLASSES, "fpn", 64, pretrained=True)
    for found in (classifier.state_dict(), other.features.state_dict()):
        same = [
            torch.equal(weights[f"network.encoder.model.{key}"], value)
            for key, value in found.items()
            if "fc" not in key
        ]
        assert len(same) > 50 and all(same)
    assert other.settings["model"] == "res2net_tiny" and classifier.num_classes == 5


def test_upload_and_load_from_hub(trained, hub, voc):
    api = HfApi()
    api.create_repo("zoo/shapes")
    api.upload_folder(repo_id="zoo/shapes", folder_path=trained)
    ours, theirs = tasks.load(str(trained)), tasks.load("hf-hub:zoo/shapes")
    image = torch.rand(3, 70, 50)
    assert torch.equal(ours([image])[0], theirs([image])[0])
    with pytest.raises(InputError, match="cannot read zoo/nothing"):
        tasks.load("hf-hub:zoo/nothing")


@pytest.mark.first_case
@pytest.mark.parametrize("damage", ["none", "backbone", "weights", "cut", "lost"])
def test_verify(trained, tmp_path, damage, in_process):
    """hub/verify.py checks the folder of a task model, and hub/publish.py rejects a damaged one."""
    folder = Path(shutil.copytree(trained, tmp_path / "unet"))
    own, backbone = folder / "model.safetensors", folder / "backbone/model.safetensors"
    if damage == "backbone":
        save_file({name: value + 1 for name, value in load_file(backbone).items()}, backbone)
    elif damage == "weights":
        save_file({name: value / 0 for name, value in load_file(own).items()}, own)
    elif damage == "cut":
        own.write_bytes(own.read_bytes()[:1000])
    elif damage == "lost":
        shutil.rmtree(folder / "backbone")
    done = in_process("hub/verify.py", folder)
    assert done.returncode == (0 if damage == "none" else 1), done.stdout
    rows = [line for line in done.stdout.splitlines() if "FAILED" in line]
    expected = {"backbone": "backbone", "weights": "values", "cut": "strict load", "lost": "backbone"}
    # The bill of materials lists the weights, too.
    assert damage == "none" or any(line.startswith(f"| {expected[damage]}") for line in rows), rows
    if damage != "none":
        line = input_error(in_process("hub/publish.py", folder, "--repo-id", "zoo/unet"))
        assert "does not verify" in line and "nothing was uploaded" in line


def test_prediction_writes_pictures_and_records(trained, voc, in_process, tmp_path):
    images = voc / "JPEGImages"
    done = in_process(
        PREDICT, trained, images / "val_00000.jpg", images / "val_00001.jpg", "--output", tmp_path / "seen"
    )
    assert done.returncode == 0
    assert len(list((tmp_path / "seen").iterdir())) == 4
    pictures = sorted((tmp_path / "seen").glob("*.png"))
    assert [path.name for path in pictures] == ["val_00000.png", "val_00001.png"]
    record = json.loads((tmp_path / "seen/val_00000.json").read_text())
    assert record["image"] == str(images / "val_00000.jpg") and (record["height"], record["width"]) == (96, 128)
    assert record["classes"] == CLASSES and {one["label"] for one in record["objects"]} <= {*KINDS}
    assert all(sum(one["segmentation"]["counts"][1::2]) == one["area"] > 0 for one in record["objects"])
    line = input_error(in_process(PREDICT, trained, images, "--threshold", 0.5, "--output", tmp_path / "x"))
    assert "predictions of segmentation have no scores" in line
    before = pictures[0].read_bytes()
    line = input_error(in_process(PREDICT, trained, f"{tmp_path}/seen/*.png", "--output", f"{tmp_path}/./seen"))
    assert "contains some of the images, which the pictures would replace" in line
    assert pictures[0].read_bytes() == before
    assert Image.open(pictures[0]).size == Image.open(images / "val_00000.jpg").size


def test_prediction_of_unusual_images(trained, voc, in_process, tmp_path):
    """EXIF orientation is applied, and any mode and size is supported."""
    image = Image.open(voc / "JPEGImages/val_00000.jpg")
    images = tmp_path / "odd"
    images.mkdir()
    for mode in ("L", "RGBA", "P"):
        image.convert(mode).save(images / f"{mode}.png")
    image.resize((1, 1)).save(images / "one.png")
    turned = image.getexif()
    turned[0x0112] = 6  # orientation: a quarter turn to the right
    image.save(images / "turned.jpg", exif=turned)
    done = in_process(PREDICT, trained, images, "--output", tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / "seen").glob("*.png")}
    assert sizes["one"] == (1, 1) and sizes["turned"] == image.size[::-1] != image.size
    assert {sizes[mode] for mode in ("L", "RGBA", "P")} == {image.size}


def test_voc_colours():
    assert [voc_colour(number) for number in (0, 1, 2, 15, 20)] == [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (192, 128, 128),
        (0, 64, 128),
    ]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_mean_iou_matches_definition(data):
    classes, images = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    score, rights, predictions = MeanIoU([str(i) for i in range(classes)]), [], []
    for i in range(images):
        shape = tuple(rng.integers(1, 9, 2))
        right, predicted = rng.integers(0, classes, shape), rng.integers(0, classes, shape)
        right[rng.random(shape) < 0.2] = IGNORED
        right.flat[0] = 0
        score.update(i, {"mask": torch.from_numpy(right)}, torch.from_numpy(predicted))
        kept = right != IGNORED
        rights, predictions = [*rights, *right[kept]], [*predictions, *predicted[kept]]
    pairs = list(zip(rights, predictions, strict=True))
    ious = []
    for number in range(classes):
        either = [pair for pair in pairs if number in pair]
        if either:
            ious.append(100 * sum(a == b for a, b in either) / len(either))
    figures = score.compute(Accelerator(cpu=True))
    assert figures["mIoU"] == pytest.approx(np.mean(ious))
    assert figures["pixel accuracy"] == pytest.approx(100 * np.mean([a == b for a, b in pairs]))


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("model", "head"), [("res2net50_26w_4s", "deeplabv3plus"), ("dla60_res2net", "unet"), ("blres2net50", "fpn")]
)
def test_every_head_and_family(model, head):
    network = Segmentation(model, CLASSES, head, 64)
    assert network.settings["output_stride"] == (16 if head == "deeplabv3plus" else None)
    images, target = [torch.rand(3, 64, 64)] * 2, {"mask": torch.randint(0, 4, (64, 64))}
    losses = network.train()(images, [target, target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.features.parameters())
    (mask,) = network.eval()([torch.rand(3, 50, 41)])
    assert mask.shape == (50, 41)


def test_frozen_layers_do_not_change():
    network = Segmentation("res2net_tiny", CLASSES, "unet", 64)
    network.freeze("2", batch_norm=True)
    network.train()
    before = {name: value.clone() for name, value in network.features.state_dict().items()}
    network([torch.rand(3, 64, 64)] * 2, [{"mask": torch.zeros(64, 64, dtype=torch.long)}] * 2)["loss"].backward()
    torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1).step()
    after = network.features.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(("conv1", "bn1", "layer1")) or "bn" in name for name in changed)


def test_masks_are_augmented_like_images():
    """Random augmentation is the same for image and mask."""
    network = Segmentation("res2net_tiny", CLASSES, "unet", 64)
    scene = render(3)
    mask = torch.zeros(scene.image.size[::-1], dtype=torch.long)
    for thing in scene.things:
        mask[torch.from_numpy(thing.mask)] = 1
    flat = Image.fromarray((np.asarray(mask) * 255).astype(np.uint8)).convert("RGB")
    for seed in range(5):
        torch.manual_seed(seed)
        image, target = network.transform(flat, {"mask": mask}, train=True)
        assert image.shape == (3, 64, 64) and target["mask"].shape == (64, 64)
        kept = target["mask"] != IGNORED
        assert ((image[0] > 0.5) == (target["mask"] == 1))[kept].float().mean() > 0.97


def test_transforms_do_not_use_model_tensors():
    """Loader processes cannot access tensors on a GPU; here, the model is on the meta device."""
    masks = {"mask": torch.zeros(96, 128, dtype=torch.long)}
    objects = {"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.tensor([1])}
    joints = {"box": (0, 0, 90, 90), "joints": torch.zeros(1, 2), "visible": torch.ones(1, dtype=torch.bool)}
    targets = {"segmentation": masks, "saliency": masks, "detection": objects, "keypoints": joints}
    for task, target in targets.items():
        model = tasks.task_class(task)("res2net_tiny", ["a"], img_size=128).to("meta")
        for train in (True, False):
            samples = [model.transform(Image.new("RGB", (128, 96)), target, train) for _ in range(2)]
            model.collate(samples)


def list_nothing(voc: Path) -> None:
    (voc / "ImageSets/Segmentation/train.txt").unlink()


def remove_a_mask(voc: Path) -> None:
    (voc / "SegmentationClass/train_00002.png").unlink()


def shrink_a_mask(voc: Path) -> None:
    path = voc / "SegmentationClass/train_00002.png"
    Image.open(path).resize((9, 9)).save(path)


def name_a_class_less(voc: Path) -> None:
    (voc / "classes.txt").write_text("background\ndisc\n")


def paint_a_mask(voc: Path) -> None:
    path = voc / "SegmentationClass/train_00002.png"
    Image.open(path).convert("RGB").save(path)


def cut_an_image(voc: Path) -> None:
    path = voc / "JPEGImages/train_00002.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_a_mask(voc: Path) -> None:
    path = voc / "SegmentationClass/train_00002.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_in_latin1(voc: Path) -> None:
    (voc / "ImageSets/Segmentation/train.txt").write_bytes("Gänse".encode("latin-1"))


def renumber(voc: Path, change: Callable[[np.ndarray], Any], name: str = "*") -> None:
    """Change the class indices of masks."""
    for path in (voc / "SegmentationClass").glob(f"{name}.png"):
        numbers = np.asarray(Image.open(path))
        Image.fromarray(np.asarray(change(numbers)).astype(np.uint8)).save(path)


def write_255_for_all(voc: Path) -> None:
    (voc / "classes.txt").write_text("background\nthing\n")
    renumber(voc, lambda numbers: 255 * (numbers > 0))


def write_255_for_one(voc: Path) -> None:
    renumber(voc, lambda numbers: np.where(numbers == 3, 255, numbers))


def write_nothing_but_the_background(voc: Path) -> None:
    renumber(voc, lambda numbers: 0 * numbers)


def pack_a_mask(voc: Path) -> None:
    """Store a mask as a 2-bit grey PNG, whose values 0 to 3 Pillow scales to 0, 85, 170 and 255."""
    path = voc / "SegmentationClass/train_00002.png"
    numbers = np.asarray(Image.open(path))
    packed = np.where(numbers == 255, 0, numbers).reshape(len(numbers), -1, 4) @ np.array([64, 16, 4, 1])
    rows = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", *numbers.shape[::-1], 2, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    whole = (struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(whole))


def widen_a_mask(voc: Path) -> None:
    path = voc / "SegmentationClass/train_00002.png"
    Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16)).save(path)


def compress_a_mask(voc: Path) -> None:
    path = voc / "SegmentationClass/train_00002.png"
    Image.open(path).convert("L").save(path, format="JPEG")


def name_a_class_twice(voc: Path) -> None:
    (voc / "classes.txt").write_text("background\ndisc\nsquare\ndisc\n")


def ignore_all_pixels(voc: Path) -> None:
    for path in (voc / "SegmentationClass").iterdir():
        Image.new("L", Image.open(path).size, IGNORED).save(path)


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut_a_mask, "cannot read the mask .*train_00002.png: "),
        (write_in_latin1, "cannot read .*train.txt: it is not UTF-8 text"),
        (ignore_all_pixels, "all pixels of all masks, such as .*train_.*png, are 255, which is ignored"),
        (list_nothing, "no ImageSets/Segmentation/train.txt, as in VOC's layout; available lists: val"),
        (remove_a_mask, "the mask .*train_00002.png of .*train_00002.jpg, .* is missing"),
        (shrink_a_mask, "train_00002.jpg is 128 x 96; its mask .*train_00002.png is 9 x 9"),
        (name_a_class_less, "train_.*png contains the class index [23], but the 2 classes are"),
        (write_255_for_all, "has a pixel of the class thing; 255 is ignored: .*by the index of the class.* 1"),
        (
            write_255_for_one,
            "has a pixel of the class triangle; 255 is ignored: .*replace it by the index of the class.* 3",
        ),
        (write_nothing_but_the_background, "has a pixel of the classes disc, square, triangle; correct the masks or"),
        (pack_a_mask, "cannot read the mask .*train_00002.png: it is 2-bit grey; class indices must be"),
        (widen_a_mask, "cannot read the mask .*train_00002.png: its mode is I;16; class indices must be"),
        (
            compress_a_mask,
            "cannot read the mask .*train_00002.png: its format is JPEG, whose lossy compression changes class",
        ),
        (name_a_class_twice, "classes.txt lists the class disc twice"),
        (paint_a_mask, "cannot read the mask .*train_00002.png: its mode is RGB; class indices must be"),
        (cut_an_image, "cannot decode .*train_00002.jpg"),
    ],
)
def test_invalid_annotations(voc, tmp_path, in_process, damage, expected):
    data = Path(shutil.copytree(voc, tmp_path / "voc"))
    damage(data)
    line = input_error(in_process(TRAIN, *SMALL, "--data", data, "--head", "unet", "--output", tmp_path / "out"))
    assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()


def test_classes_absent_from_all_masks(trained, voc, tmp_path, in_process):
    """They cannot be learned or evaluated, which a warning, the card and the results report."""
    data = Path(shutil.copytree(voc, tmp_path / "voc"))
    renumber(data, lambda numbers: np.where(numbers >= 2, 0, numbers), "val*")
    done = in_process(VALIDATE, trained, "--data", data, "--output", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    expected = "classes without a pixel in val"
    assert (
        "val.txt has a pixel of the classes square, triangle; mIoU skips them unless the model predicts them"
        in done.stderr
    )
    assert f"{expected}: square, triangle" in done.stdout
    (result,) = json.loads((tmp_path / "figures.json").read_text())
    assert result[expected] == "square, triangle" and list(result["IoU"]) == CLASSES
    there = [value for value in result["IoU"].values() if value is not None]
    assert result["figures"]["mIoU"] == pytest.approx(np.mean(there))
    # The IoU of a class that is only predicted is 0, not null.
    data2 = Segmentation.open(str(data), "val", "unet", CLASSES)
    score = MeanIoU(CLASSES)
    score.update(0, {"mask": torch.tensor([[0, 1]])}, torch.tensor([[0, 2]]))
    assert score.compute(Accelerator(cpu=True))["mIoU"] == pytest.approx(100 / 3)
    assert score.details() == {"IoU": {"background": 100, "disc": 0, "square": 0, "triangle": None}}
    assert data2.remarks() == {expected: "square, triangle"}
    args = [*SMALL, "--data", data, "--head", "unet", "--epochs", 1, "--output", tmp_path / "out"]
    done = in_process(TRAIN, *args)
    assert done.returncode == 0 and f"{expected}: square, triangle" in done.stdout, done.stderr
    assert f"| {expected} | square, triangle" in re.sub(" +", " ", (tmp_path / "out/README.md").read_text())


def test_subset_of_voc(voc, tmp_path, capfd):
    """With VOC's own classes 255 marks borders, and a few images do not contain all classes."""
    data = Path(shutil.copytree(voc, tmp_path / "voc"))
    (data / "classes.txt").unlink()
    assert len(Segmentation.open(str(data), "train", "unet")) == 16
    assert "has a pixel of the classes boat, bottle, bus, car, cat, ...; the model cannot learn it" in (
        capfd.readouterr().err
    )


def test_decompression_bomb(voc, trained, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "could be decompression bomb" in input_error(in_process(VALIDATE, trained, "--data", voc))
    images = [voc / "JPEGImages/val_00000.jpg", "--output", tmp_path / "seen"]
    assert "cannot decode" in input_error(in_process(PREDICT, trained, *images))


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--head", "unnet"], "does not support the head unnet; supported: deeplabv3plus, unet, fpn"),
        (["--head", "unet", "--batch-size", 17], "16 images to train on, but a step needs 17"),
        (["--head", "fpn", "--output-stride", 8], "fpn needs features of stride 32, not 8"),
        (["--model", "dla60_res2net"], "DLA supports only 32"),
        (["--recipe", "segmentation_vok"], "did you mean segmentation_voc"),
        (["--model", "res2net50_26w"], "did you mean"),
        (
            ["--freeze", "9", "--head", "unet"],
            "cannot freeze 9 stages: this model has 5 with its stem; `all` freezes them (--freeze)",
        ),
        (["--batch-size", 1], "increase the batch size or the image size (--batch-size, --img-size)"),
        (["--model", "convnext_atto", "--head", "unet"], "convnext_atto is unsupported as the backbone of a task: its"),
        (["--freeze", "some", "--head", "unet"], "some is neither a number of stages nor all"),
        (["--opt", "sgdd", "--head", "unet"], "timm has no optimizer sgdd"),
        (["--sched", "polly", "--head", "unet"], "no schedule polly; did you mean poly?"),
        (["--output", "docs"], "docs is not empty and not a model folder; name another folder"),
        (
            ["--head-kwargs", "decoder_chanels=8"],
            "DeepLabV3Plus does not support the option decoder_chanels; did you mean decoder_ch",
        ),
        (["--head-kwargs", "decoder_channels=many"], "decoder_channels must be a number, such as 256, not many"),
        (["--head-kwargs", "classes=3"], "cannot be built on res2net_tiny with classes=3; correct these"),
        (["--head-kwargs", "decoder_channels"], "decoder_channels is not NAME=VALUE"),
    ],
)
def test_invalid_commands(voc, tmp_path, in_process, args, expected):
    line = input_error(in_process(TRAIN, *SMALL, "--data", voc, "--output", tmp_path / "out", *args))
    assert expected in line


def test_network_options(voc, tmp_path, in_process):
    """A recipe can set them as a table; they are saved with the model and with the run."""
    recipe = tmp_path / "narrow.toml"
    recipe.write_text("freeze_bn = true\n[head_kwargs]\ndecoder_channels = 8\ndecoder_atrous_rates = [1, 2, 3]\n")
    args = [*SMALL, "--data", voc, "--recipe", recipe, "--epochs", 1, "--sched", "none", "--clip-grad", 0]
    done = in_process(TRAIN, *args, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "warning: BatchNorm is frozen without pretrained weights" in done.stderr
    assert "(--freeze-bn, --pretrained)" in done.stderr
    done = in_process(TRAIN, "--resume", "--epochs", 2, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "out/metrics.csv").open()))
    assert [row["lr"] for row in rows] == ["0.0005", "0.0005"]
    settings = tomllib.loads((tmp_path / "out/recipe.toml").read_text())
    assert settings["sched"] == "none" and "clip_grad" not in settings
    model = tasks.load(str(tmp_path / "out"))
    assert model.network.decoder.aspp[0].project[0].out_channels == 8
    assert model.settings["head_kwargs"] == {"decoder_channels": 8, "decoder_atrous_rates": [1, 2, 3]}


def test_output_of_another_run_is_kept(trained, voc, in_process):
    again = [*SMALL, "--data", voc, "--output", trained]
    assert "contains another run" in input_error(in_process(TRAIN, *again, "--head", "unet"))
    resumed = ["--resume", "--output", trained]
    assert "was started with --head unet, not fpn" in input_error(in_process(TRAIN, *resumed, "--head", "fpn"))
    line = input_error(in_process(TRAIN, *resumed, "--batch-size", 4))
    assert "was started with images a step 8, but now has 4" in line
    line = input_error(in_process(TRAIN, *resumed, "--epochs", 1))
    assert "has completed 1 of 1 epochs; increase their number (--epochs)" in line


def test_data_with_different_classes(trained, tmp_path, in_process):
    other = save_voc(tmp_path / "voc", train=1, val=2)
    (other / "classes.txt").write_text("ground\n" + "\n".join(KINDS))
    assert "differ from the model's" in input_error(in_process(VALIDATE, trained, "--data", other))


@pytest.mark.first_case
@pytest.mark.parametrize("damage", ["cut", "lost", "other", "no task"])
def test_damaged_model_folder(trained, tmp_path, damage):
    folder = Path(shutil.copytree(trained, tmp_path / "unet"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "lost":
        weights.unlink()
    elif damage == "other":
        config.write_text(config.read_text().replace("unet", "fpn"))
    else:
        config.write_text("{}")
    with pytest.raises(InputError) as error:
        tasks.load(str(folder))
    assert str(folder) in str(error.value)


def test_published_targets_refer_to_existing_tasks_and_models(trained):
    targets = catalog.load().targets
    assert len(targets) == 32
    assert all(timm.is_model(target.model) for target in targets)
    for target in targets:
        if target.task in tasks.TASKS:
            assert target.head in tasks.task_class(target.task).heads
    assert catalog.load().target("segmentation", "deeplabv3plus", "res2net50_26w_4s", "VOC12").figures == {"mIoU": 79.2}
    with pytest.raises(InputError, match="no published result of unet on res2net_tiny with VOC12"):
        catalog.load().target("segmentation", "unet", "res2net_tiny", "VOC12")


def test_recipes_are_valid(in_process, voc, tmp_path):
    """Each recipe names an existing task and existing settings."""
    for path in sorted(Path("scripts/recipes/tasks").glob("*.toml")):
        line = input_error(in_process(TRAIN, "--recipe", path.stem, "--data", tmp_path / "nowhere"))
        assert "nowhere" in line, line


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        # Learning rate by epoch, as in the publications that the recipes name.
        ("detection_coco", {0.068: 0.02, 7.9: 0.02, 8.1: 0.002, 10.9: 0.002, 11.1: 0.0002}),
        ("instance_coco", {0.068: 0.02, 7.9: 0.02, 8.1: 0.002, 10.9: 0.002, 11.1: 0.0002}),
        ("detection_voc", {1: 0.008, 9.9: 0.008, 10.1: 0.0008}),
        ("keypoints_coco", {0: 1e-3, 89: 1e-3, 91: 1e-4, 119: 1e-4, 121: 1e-5}),
        ("saliency_msrab", {0: 1.2e-3, 29: 1.2e-3, 31: 1.2e-4}),
        ("segmentation_voc", {epoch: 0.007 * (1 - epoch / 46) ** 0.9 for epoch in (0, 10, 23, 45)}),
    ],
)
def test_learning_rates_of_recipes(recipe, rates):
    settings = tomllib.loads(Path(f"scripts/recipes/tasks/{recipe}.toml").read_text())
    optimizer, scheduler = Optimization.of(settings).create(torch.nn.Linear(1, 1), steps=1000)
    for epoch, rate in rates.items():
        scheduler.step_update(round(1000 * epoch))
        assert highest_rate(optimizer) == pytest.approx(rate)
    assert not optimizer.defaults.get("nesterov")


@pytest.mark.slow
def test_training_reaches_high_miou(tmp_path):
    """Five minutes on an idle core: 400 rendered scenes of shapes that differ in their corners, not in colour."""
    data = save_voc(tmp_path / "voc", train=400, val=60)
    how = [
        "--img-size",
        128,
        "--scales",
        0.8,
        1.3,
        "--epochs",
        20,
        "--batch-size",
        4,
        "--lr",
        2e-3,
        "--warmup-epochs",
        1,
    ]
    done = Running(tmp_path / "out", *SMALL[:4], "--threads", 1, "--data", data, *how, script=TRAIN).end(1800)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    best = max(float(row["mIoU"]) for row in csv.DictReader((tmp_path / "out/metrics.csv").open()))
    assert best > 75
