"""Images for calibration, and held-out images that it does not use."""

import datasets
import pytest
import timm
import torch
from PIL import Image

from res2net_zoo.inference.calibration import calibration_and_held_out, calibration_images, load_images
from res2net_zoo.utils.errors import InputError
from tests.conftest import SHIPPED_DATA, SHIPPED_MODEL


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return timm.create_model(f"local-dir:{SHIPPED_MODEL}", pretrained=True).eval()


def class_folders(folder, split: str, per_class: int):
    for name in "ab":
        (folder / split / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("L", (8, 8), 3 * i).save(folder / split / name / f"{i:03}.png")
    return folder


def test_the_training_split_calibrates(tiny):
    images = calibration_images(tiny, str(SHIPPED_DATA))
    assert images.shape == (300, 3, 64, 64) and images.dtype == torch.float32 and -2 < images.mean() < 2
    used, held_out = calibration_and_held_out(str(SHIPPED_DATA), 32)
    assert (str(used), str(held_out)) == (
        "300 of 1437 images of digits, split train",
        "360 images of digits, split validation",
    )
    assert used.indices[0] == 0 and {b - a for a, b in zip(used.indices, used.indices[1:], strict=False)} == {4, 5}
    assert torch.equal(load_images(tiny, used), images)


def test_one_split_is_divided(tmp_path, tiny):
    source = str(class_folders(tmp_path, "photos", 50) / "photos")
    used, held_out = calibration_and_held_out(source, 32)
    assert len(used.indices) == len(held_out.indices) == 50
    assert sorted(used.indices + held_out.indices) == list(range(100))
    assert [row["label"] for row in used.source.rows.select(used.indices)].count(0) == 25
    assert calibration_images(tiny, source).shape[0] == 100
    few = str(class_folders(tmp_path, "few", 18) / "few")
    assert [len(part.indices) for part in calibration_and_held_out(few, 32)] == [32, 4]
    with pytest.raises(InputError, match=r"has 36 images in split train; at least 41 are needed"):
        calibration_and_held_out(few, 40)


def test_splits(tmp_path):
    for split, number in (("train", 20), ("test", 3)):
        class_folders(tmp_path, split, number)
    used, held_out = calibration_and_held_out(str(tmp_path), 32)
    assert (used.source.split, held_out.source.split) == ("train", "test")
    assert (len(used.indices), len(held_out.indices)) == (40, 6)
    with pytest.raises(InputError, match=r"has 40 images in split train; at least 50 are needed$"):
        calibration_and_held_out(str(tmp_path), 50)


def test_unreadable_images(tmp_path, tiny):
    source = class_folders(tmp_path, "photos", 20) / "photos"
    (source / "a" / "003.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"image 3 \(.*003\.png\) is corrupt \(not an image of a supported format"):
        calibration_images(tiny, str(source))
    rows = datasets.Dataset.from_dict({"image": [], "label": []})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(InputError, match=r"empty\.parquet"):
        calibration_images(tiny, str(tmp_path / "empty.parquet"))
