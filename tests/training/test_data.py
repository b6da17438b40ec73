"""Order, augmentation, held-out splits and streams of training images; invalid data."""

import io
import itertools
import resource
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from res2net_zoo.data.images import Samples
from res2net_zoo.data.sources import hold_out, labels_of, open_source
from res2net_zoo.training.data import TrainingData, corrupt_images, open_training_data, steps_of
from res2net_zoo.training.loader import Order, batches, share_of_stream, training_loader
from res2net_zoo.training.loss import Criterion, balanced
from res2net_zoo.utils.errors import InputError
from tests.conftest import SHIPPED_DATA, save_images


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return Accelerator()


def keys(order: Order, epoch: int = 0, first: int = 0) -> list[list[tuple[int, int, int]]]:
    order.start(epoch, first)
    return list(order)


@given(
    images=st.integers(1, 200), batch=st.integers(1, 8), world=st.integers(1, 4), seed=st.integers(0, 9), data=st.data()
)
def test_several_processes_get_the_images_of_one_with_larger_batches(images, batch, world, seed, data):
    steps = images // (batch * world)
    first = data.draw(st.integers(0, steps))
    one = keys(Order(range(images), batch * world, 0, 1, seed, None, 1, steps), 3)
    shares = [keys(Order(range(images), batch, rank, world, seed, None, 1, steps), 3, first) for rank in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == one[first:]
    seen = [index for part in one for _, _, index in part]
    assert len(set(seen)) == len(seen) == steps * batch * world


def test_each_epoch_has_a_different_order():
    order = Order(range(100), 10, 0, 1, 0, None, 1, 10)
    first, second = ([index for part in keys(order, epoch) for _, _, index in part] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(100)) and first != second != sorted(second)
    assert keys(order) == keys(Order(range(100), 10, 0, 1, 0, None, 1, 10))


def test_repeated_augmentation_uses_fewer_images_more_often():
    order = Order(range(99), 9, 0, 1, 0, None, 3, 11)
    for part in keys(order):
        assert sorted(np.unique([index for _, _, index in part], return_counts=True)[1]) == [3, 3, 3]


def test_balanced_sampling_draws_all_classes_equally():
    labels = torch.tensor([0] * 900 + [1] * 100)
    weights = balanced([900, 100])[labels]
    order = Order(range(1000), 100, 0, 1, 0, weights, 1, 10)
    drawn = labels[[index for part in keys(order) for _, _, index in part]]
    assert 0.4 < drawn.float().mean() < 0.6


def test_class_weights_do_not_depend_on_batches():
    """They balance two classes, independent of which one is rare."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 2, generator=generator)
    target = torch.tensor([0, 0, 0, 0, 0, 0, 1, 0])
    loss = Criterion("ce", 0.1, balanced([7, 1]))
    whole = loss(logits, target)
    parts = (loss(logits[:4], target[:4]) + loss(logits[4:], target[4:])) / 2
    torch.testing.assert_close(whole, parts)
    plain = Criterion("ce", 0.0, balanced([7, 1]))
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(plain(logits, target), (each[target == 0].mean() + each[target == 1].mean()) / 2)


def to_tensor(image) -> torch.Tensor:
    """Return the image in uint8, followed by a random number."""
    pixels = torch.from_numpy(np.array(image.resize((4, 4)).convert("RGB"))).permute(2, 0, 1).float()
    return torch.cat([pixels, torch.rand(1, 4, 4)])


def load(data, accelerator, workers=0, batch=4, epoch=0, first=0, count=None, **options):
    samples = Samples(to_tensor, "RGB", lambda label, path: [label], data.train.read)
    number = (data.num_images or 0) // batch
    loader = training_loader(data, samples, accelerator, batch, workers, 0, batches=number, **options)
    return list(itertools.islice(batches(loader, epoch, first), count))


def same(some, others) -> bool:
    return len(some) == len(others) > 0 and all(
        torch.equal(a, b) for pair, other in zip(some, others, strict=True) for a, b in zip(pair, other, strict=True)
    )


def test_augmentation_does_not_depend_on_workers_or_first_batch(accelerator, tmp_path):
    save_images(tmp_path / "train", ["a", "b"], 12)
    save_images(tmp_path / "val", ["a", "b"], 2)
    data = open_training_data(str(tmp_path), accelerator)
    whole = load(data, accelerator)
    assert len(whole) == 6
    assert same(whole, load(data, accelerator, workers=2))
    assert same(whole[4:], load(data, accelerator, first=4, workers=1))
    other = load(data, accelerator, epoch=1)
    assert not same(whole, other)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Parquet data with 4 training files of 10 images, and one evaluation file."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # a wait at the end of each pass
    rows = open_source(str(SHIPPED_DATA), "train").rows.select(range(40)).cast_column("image", datasets.Image())
    for i in range(4):
        rows.select(range(10 * i, 10 * i + 10)).to_parquet(tmp_path / f"train-{i}-of-4.parquet", batch_size=5)
    rows.select(range(10)).to_parquet(tmp_path / "validation-0-of-1.parquet")
    return tmp_path


def images_in(loaded) -> list[bytes]:
    return [image[:3].numpy().tobytes() for images, _ in loaded for image in images]


def test_stream_is_shuffled_repeated_and_resumable(accelerator, shards):
    data = open_training_data(str(shards), accelerator, streaming=True)
    assert data.num_images == 40 and len(data.names) == 10 and data.valid.num_rows == 10
    whole = load(data, accelerator, workers=2, count=10, buffer=20)
    ordered = images_in(load(open_training_data(str(shards), accelerator), accelerator, count=10))
    seen = images_in(whole)
    assert sorted(seen) == sorted(ordered) and len(set(seen)) > 30 and seen != ordered
    assert same(whole[7:], load(data, accelerator, workers=2, first=7, count=3, buffer=20))
    assert images_in(load(data, accelerator, workers=2, epoch=1, count=10, buffer=20)) != seen
    around = images_in(load(data, accelerator, workers=0, count=20, buffer=20))
    assert sorted(around) == sorted(2 * ordered) and around[:40] != around[40:]


@pytest.mark.full
def test_stream_order_does_not_depend_on_worker_speed(accelerator, tmp_path):
    """Over many passes, so that workers are in different passes."""
    save_images(tmp_path / "train", ["a", "b"], 5)
    save_images(tmp_path / "val", ["a", "b"], 1)
    data = open_training_data(str(tmp_path), accelerator, streaming=True)
    first = load(data, accelerator, workers=2, batch=3, count=40, buffer=4)
    for _ in range(4):
        assert same(first, load(data, accelerator, workers=2, batch=3, count=40, buffer=4))


def test_processes_read_different_files(shards):
    rows = open_source(str(shards), "train", streaming=True).rows
    shares = [share_of_stream(rows, rank, 4, 1) for rank in range(4)]
    assert all(alone for _, alone in shares)
    seen = [{row["image"]["bytes"] for row in share} for share, _ in shares]
    assert sum(map(len, seen)) == len(set().union(*seen))
    # Each file has two row groups, so there is one for each of eight processes.
    assert all(alone for _, alone in (share_of_stream(rows, rank, 8, 1) for rank in range(8)))
    # With more processes than row groups, each reads everything and uses its share.
    shares = [share_of_stream(rows, rank, 9, 1) for rank in range(9)]
    assert not any(alone for _, alone in shares)
    assert sum(sum(1 for _ in share) for share, _ in shares) == 40


@settings(deadline=None)  # the first example converts the shipped data
@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=5),
    fraction=st.integers(5, 50).map(lambda percent: percent / 100),
    seed=st.integers(0, 5),
)
def test_held_out_part_is_stratified(sizes, fraction, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = datasets.Dataset.from_dict({"label": labels, "number": np.arange(len(labels))})
    source = open_source(str(SHIPPED_DATA))
    source.rows, source.split = rows, "train"
    rest, held = hold_out(source, fraction, seed)
    assert sorted([*rest.rows["number"], *held.rows["number"]]) == list(range(len(labels)))
    counts = np.bincount(labels_of(held), minlength=len(sizes))
    assert counts.tolist() == [max(1, round(fraction * size)) for size in sizes]
    assert hold_out(source, fraction, seed)[1].rows["number"][:] == held.rows["number"][:]


def test_held_out_part_is_reproduced_by_its_name(accelerator, tmp_path):
    pictures = save_images(tmp_path / "pictures", ["a", "b"], 10)
    data = open_training_data(str(pictures), accelerator, fraction=0.3, seed=7)
    assert data.valid.split == "train/held-out-0.3-7" and (data.num_images, data.valid.num_rows) == (14, 6)
    again = open_source(str(pictures), data.valid.split)
    assert [row["path"] for row in again.rows["image"]] == [row["path"] for row in data.valid.rows["image"]]
    assert not {row["path"] for row in again.rows["image"]} & {row["path"] for row in data.train.rows["image"]}
    assert again.split == data.valid.split
    # A held-out part given by name is excluded from training.
    same = open_training_data(str(pictures), accelerator, eval_split=data.valid.split, seed=1)
    assert (same.num_images, same.valid.split) == (14, data.valid.split)
    # Also by another name of the split; a part used for training can be split again.
    same = open_training_data(str(pictures), accelerator, "training", "training/held-out-0.3-7")
    assert same.num_images == 14
    part = open_training_data(str(pictures), accelerator, "train/held-out-0.5-0")
    assert (part.num_images, part.valid.split) == (8, "train/held-out-0.5-0/held-out-0.2-0")
    assert labels_of(open_source(str(pictures), part.valid.split)).tolist() == [0, 1]
    with pytest.raises(InputError, match="would both be on train"):
        open_training_data(str(pictures), accelerator, "train/held-out-0.5-0", "train")
    with pytest.raises(InputError, match=r"too few to hold 0\.9 of them out") as error:
        save_images(tmp_path / "few", ["a", "b"], 1)
        open_training_data(str(tmp_path / "few"), accelerator, fraction=0.9)
    assert error.value.parameters == ("eval_split", "split")


def test_invalid_training_data(accelerator, tmp_path, shards):
    def refused(folder: str, **options) -> str:
        with pytest.raises(InputError) as error:
            open_training_data(str(tmp_path / folder), accelerator, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    save_images(tmp_path / "one", ["a"], 5)
    assert "has only one class in train" in refused("one")
    save_images(tmp_path / "empty" / "train", ["a", "b"], 3)
    save_images(tmp_path / "empty" / "val", ["a", "b"], 1)
    (tmp_path / "empty" / "train" / "none").mkdir()
    assert "has no image of none in train" in refused("empty")
    save_images(tmp_path / "more" / "train", ["a", "b"], 3)
    save_images(tmp_path / "more" / "test", ["a", "c"], 3)
    assert "has classes in test that are missing in train: c" in refused("more")
    rows = datasets.Dataset.from_dict({"image": [None] * 4, "label": [0, 1, 5, None]})
    rows = rows.cast_column("image", datasets.Image())
    (tmp_path / "odd").mkdir()
    rows.to_parquet(tmp_path / "odd" / "test.parquet")
    rows.select([0, 1]).to_parquet(tmp_path / "odd" / "train.parquet")
    assert "image 2 of test in odd has label 5; labels go from 0 to 1" in refused("odd")
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(shards / "train-0-of-4.parquet", only / "train.parquet")
    assert "images of a stream cannot be held out" in refused("only", streaming=True)


def test_batch_size_larger_than_the_data(accelerator):
    source = open_source(str(SHIPPED_DATA))
    data = TrainingData(source, source, list("ab"), [1, 1], np.arange(100))
    assert steps_of(data, 33, None) == 3 and steps_of(data, 33, 2) == 2
    with pytest.raises(InputError, match="has 100 training images, fewer than a batch of 101"):
        steps_of(data, 101, None)
    with pytest.raises(InputError, match="fewer than 4 steps of 33"):
        steps_of(data, 33, 4)
    source.num_rows = data.indices = None
    with pytest.raises(InputError, match="set the steps per epoch") as error:
        steps_of(data, 33, None)
    assert error.value.parameters == ("steps_per_epoch",)
    assert steps_of(data, 33, 4) == 4


def test_undecodable_images_are_reported_or_skipped(accelerator, tmp_path, capsys):
    save_images(tmp_path / "train", ["a", "b"], 5)
    save_images(tmp_path / "val", ["a", "b"], 2)
    whole = (tmp_path / "train" / "a" / "1.jpg").read_bytes()
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "b" / "2.jpg").write_bytes(b"nothing")
    data = open_training_data(str(tmp_path), accelerator)
    with pytest.raises(InputError, match=r"2 images of train cannot be decoded: .*a/1.jpg .*truncated.*b/2.jpg"):
        corrupt_images(data, accelerator, 1, skip=False)
    data.leave_out(corrupt_images(data, accelerator, 0, skip=True))
    assert "2 images of train cannot be decoded and are skipped" in capsys.readouterr().err
    assert data.num_images == 8 and data.counts == [4, 4]
    assert len(load(data, accelerator, batch=2)) == 4


def test_pixels_of_unknown_range_are_refused_before_training(accelerator, tmp_path):
    """Pillow converts floating-point pixels to 0 and 1, and 32-bit pixels to 255."""
    save_images(tmp_path / "train", ["a", "b"], 5)
    save_images(tmp_path / "val", ["a", "b"], 2)
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "train" / "a" / "f.tif")
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(tmp_path / "train" / "b" / "i.tif")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "train" / "b" / "u.tif")
    data = open_training_data(str(tmp_path), accelerator)
    words = (
        r"2 images of train .*a/f.tif \(floating-point pixels are unsupported.*b/i.tif \(signed or 32-bit pixels are"
    )
    with pytest.raises(InputError, match=words):
        corrupt_images(data, accelerator, 0, skip=False)
    data.leave_out(corrupt_images(data, accelerator, 0, skip=True))
    assert data.counts == [5, 6]


@pytest.mark.parametrize(
    ("kind", "labels", "words"),
    [
        (
            pa.int64(),
            [0, 2**40],
            "image 1 of train in data has label 1099511627776; labels go from 0 to 999999 at most",
        ),
        (pa.uint64(), [0, 2**63 + 5], "image 1 of train in data has label 9223372036854775813"),
        (pa.int32(), [0, 999_999], "no image of 2, 3, 4, 5, 6 in train|1 image of class 999999, too few"),
        (pa.int64(), [0, -(2**63)], "image 1 of train in data has label -9223372036854775808"),
        (pa.int8(), [1, -2], "image 1 of train in data has label -2"),
        (pa.int64(), [0, -1], "image 1 of train in data has no label"),
        (pa.uint8(), [0, None], "image 1 of train in data has no label"),
        (pa.uint64(), [0, None], "image 1 of train in data has no label"),
        (pa.float32(), [0, 1], "column label of .* has no integer class labels"),
        (pa.float64(), [0, float("nan")], "column label of .* has no integer class labels"),
        (pa.bool_(), [False, True], "column label of .* has no integer class labels"),
        (pa.string(), ["a", "b"], "column label of .* has no integer class labels"),
    ],
)
def test_large_labels_are_refused_before_memory_is_allocated(accelerator, tmp_path, kind, labels, words):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    others = [0, 1] * 9 if pa.types.is_integer(kind) else labels * 9
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        table = pa.table({"image": [image] * 20, "label": pa.array([*labels, *others], kind)})
        pq.write_table(table, tmp_path / "data" / f"{split}.parquet")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=words):
        open_training_data(str(tmp_path / "data"), accelerator)
    (tmp_path / "data" / "validation.parquet").unlink()
    with pytest.raises(InputError, match=words):  # also with a held-out part
        open_training_data(str(tmp_path / "data"), accelerator)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # kB


def test_skipped_files_are_reported_once(accelerator, tmp_path, capsys):
    data = save_images(tmp_path / "data", ["a", "b"], 5)
    (data / "a" / "x.heic").touch()
    open_training_data(str(data), accelerator)
    assert capsys.readouterr().err == f"warning: skipped in {data}: .heic files: 1 (such as {data}/a/x.heic)\n"
