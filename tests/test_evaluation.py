"""Exact counting: properties over sizes, batches and processes, and prediction-for-prediction agreement with timm."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from torch import nn

from res2net_zoo.data.labels import Classes, match_classes
from res2net_zoo.data.sources import Source, open_source
from res2net_zoo.evaluation import Counts, count_correct, evaluate
from res2net_zoo.evaluation import create_loader as zoo_loader
from res2net_zoo.utils.errors import InputError
from tests.conftest import SHIPPED_DATA, SHIPPED_MODEL

NUM_CLASSES = 7


class ReadsItsAnswer(nn.Module):
    """Predicts the class encoded in the grey value of an image, followed by the next four classes."""

    num_classes = NUM_CLASSES
    pretrained_cfg: ClassVar = dict(
        input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0, interpolation="bilinear"
    )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        prediction = (x.mean((1, 2, 3)) * 255 / 10).round().long()
        order = (torch.arange(NUM_CLASSES) - prediction[:, None]) % NUM_CLASSES
        return -order.float()


def answers_and_labels(n: int, seed: int = 0) -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, NUM_CLASSES, n).tolist(), rng.integers(0, NUM_CLASSES, n).tolist()


def make_source(answers: list[int], labels: list[int], shards: int = 0) -> Source:
    """Return images for which ReadsItsAnswer gives these answers; a stream of shards, or map-style for 0 shards."""
    images = []
    for answer in answers:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (answer * 10,) * 3).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    if not shards:
        return Source("made", "test", rows, None, len(rows))
    return Source("made", "test", rows.to_iterable_dataset(num_shards=shards), None, None)


def truth(answers: list[int], labels: list[int]) -> Counts:
    distances = [(label - answer) % NUM_CLASSES for answer, label in zip(answers, labels, strict=True)]
    return Counts(len(labels), sum(d == 0 for d in distances), sum(d < 5 for d in distances))


def process(rank: int, world: int) -> Accelerator:
    """Return a substitute for the Accelerator of one of several processes, sufficient for counting."""
    autocast = Accelerator(cpu=True).autocast
    stand_in = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"), autocast=autocast)
    return stand_in  # type: ignore[return-value]


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 45),
    world=st.integers(1, 3),
    shards=st.sampled_from([0, 1, 2, 3, 5]),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_every_image_is_counted_once(n, batch_size, world, shards, seed):
    answers, labels = answers_and_labels(n, seed)
    source = make_source(answers, labels, min(shards, n))
    model, classes = ReadsItsAnswer(), Classes(NUM_CLASSES)
    shares = [
        count_correct(
            model, zoo_loader(source, model, classes, process(rank, world), batch_size, 0), process(rank, world)
        )
        for rank in range(world)
    ]
    total = sum(shares, Counts())
    expected = truth(answers, labels)
    assert (total.samples, total.top1, total.top5) == (expected.samples, expected.top1, expected.top5)
    if not shards:
        assert max(s.samples for s in shares) - min(s.samples for s in shares) <= 1


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_result_does_not_depend_on_workers(shards, workers):
    answers, labels = answers_and_labels(23)
    counts = evaluate(
        ReadsItsAnswer(), make_source(answers, labels, shards), Classes(NUM_CLASSES), Accelerator(cpu=True), 4, workers
    )
    expected = truth(answers, labels)
    assert (counts.samples, counts.top1, counts.top5) == (expected.samples, expected.top1, expected.top5)


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_result_does_not_depend_on_processes(program, processes):
    """The same property with real processes: one launch, many sizes and batches, map-style and streaming."""
    result = program("tests/count_in_processes.py", processes=processes)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 24
    for line in lines:
        expected = truth(*answers_and_labels(line["n"]))
        assert line["num_processes"] == processes
        assert (line["samples"], line["top1"], line["top5"]) == (expected.samples, expected.top1, expected.top5), line


def test_a_subset_of_fewer_than_five_classes():
    """Among classes 4, 5 and 6, predictions are 5, 6, 4 for an image of class 5, and 4, 5, 6 for class 0."""
    classes = Classes(NUM_CLASSES, of_label=[4, 5, 6], subset=[4, 5, 6])
    source = make_source([5, 5, 0, 0], [1, 0, 0, 2])
    counts = evaluate(ReadsItsAnswer(), source, classes, Accelerator(cpu=True), 3, 0)
    assert (counts.samples, counts.top1, counts.top5) == (4, 2, 4)


def test_images_without_a_correct_class():
    class Some(Classes):
        def targets(self, label, path):
            return {0: [], 1: [1], 2: [2, 3]}[label % 3]

    answers, labels = [0, 1, 3, 2, 5], [0, 1, 2, 2, 1]
    counts = evaluate(ReadsItsAnswer(), make_source(answers, labels), Some(NUM_CLASSES), Accelerator(cpu=True), 2, 0)
    assert (counts.samples, counts.top1, counts.unlabelled, counts.num_rows) == (4, 3, 1, 5)


def test_nan_output_is_refused():
    class Broken(ReadsItsAnswer):
        def forward(self, x):
            return super().forward(x) * float("nan")

    with pytest.raises(InputError, match="NaN or infinite"):
        evaluate(Broken(), make_source([1], [1]), Classes(NUM_CLASSES), Accelerator(cpu=True), 2, 0)


# Agreement with timm's loader and loop


def save_in_many_modes(folder: Path) -> list[str]:
    """Save digits as JPEG and PNG in many sizes, modes and EXIF orientations."""
    rows = datasets.load_dataset("parquet", data_files=str(SHIPPED_DATA / "data" / "validation-*"), split="train")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    names = []
    for i, row in enumerate(rows.select(range(120))):
        width, height = (int(side) for side in rng.integers(30, 300, 2))
        image = row["image"].resize((width, height), Image.Resampling.BICUBIC)
        kind = ("RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "exif")[i % 8]
        name = f"{i:03}_{kind}.{'png' if kind in ('P', 'RGBA', 'LA', '1') else 'jpg'}"
        options = {}
        if kind == "exif":
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(2, 9))
            options = dict(exif=exif)
        image.convert("RGB" if kind == "exif" else kind).save(folder / "images" / name, **options)
        names.append(name)
    return names


@pytest.fixture(scope="module")
def agreement(tmp_path_factory):
    """Images of many modes, and the predictions of timm's validation loop."""
    folder = tmp_path_factory.mktemp("modes")
    names = save_in_many_modes(folder)
    model = timm.create_model(f"local-dir:{SHIPPED_MODEL}", pretrained=True).eval()
    config = resolve_model_data_config(model)
    loader = create_loader(
        create_dataset("", root=str(folder)),
        batch_size=16,
        is_training=False,
        num_workers=0,
        device=torch.device("cpu"),
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")},
    )
    batches, answers = [], []
    with torch.inference_mode():
        for images, _ in loader:
            batches.append(images)
            answers.append(model(images).topk(5)[1])
    return folder, names, model, torch.cat(batches), torch.cat(answers)


def labelled(folder: Path, labels: list[int]) -> Source:
    """Open the images with labels that differ from their folders."""
    source = open_source(str(folder))
    rows = source.rows.remove_columns("label").add_column("label", labels)
    return Source("modes", "test", rows, None, len(rows), source.read)


@pytest.mark.full
def test_agrees_with_timm_prediction_for_prediction(agreement):
    folder, names, model, images, answers = agreement
    assert len(answers[:, 0].unique()) >= 8  # or agreement would say little
    classes = match_classes(None, 10)
    source = labelled(folder, answers[:, 0].tolist())
    assert [Path(row["image"]["path"]).name for row in source.rows] == names
    counts = evaluate(model, source, classes, Accelerator(cpu=True), batch_size=32, workers=1)
    assert (counts.samples, counts.top1) == (len(names), len(names))
    # Our top five predictions are exactly timm's.
    for rank in range(5):
        counts = evaluate(model, labelled(folder, answers[:, rank].tolist()), classes, Accelerator(cpu=True), 32, 0)
        assert (counts.top5, counts.top1) == (len(names), len(names) if rank == 0 else 0)
    with torch.inference_mode():
        sixth = model(images).topk(6)[1][:, 5].tolist()
    assert evaluate(model, labelled(folder, sixth), classes, Accelerator(cpu=True), 32, 0).top5 == 0


def test_loads_the_same_pixels_as_timm(agreement):
    folder, names, model, images, _ = agreement
    source = labelled(folder, [0] * len(names))
    loader = zoo_loader(source, model, match_classes(None, 10), process(0, 1), 16, 0)
    ours = torch.cat([batch for batch, _, _ in loader]).float()
    config = resolve_model_data_config(model)
    mean, std = (255 * torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    assert torch.allclose((ours - mean) / std, images, atol=1e-6)


def test_applying_the_exif_orientation_changes_predictions(agreement):
    """The comparison above is sensitive: with the decoding of `datasets`, which rotates images, it fails."""
    folder, _, model, _, answers = agreement
    rows = open_source(str(folder)).rows.cast_column("image", datasets.Image())
    config = resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    turned = torch.stack([transform(row["image"].convert("RGB")) for row in rows])
    with torch.inference_mode():
        assert (model(turned).argmax(1) != answers[:, 0]).sum() >= 3
