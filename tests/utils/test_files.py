"""Atomic writes, locks, and the shipped model and data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors import safe_open

from res2net_zoo.catalog import Accuracy
from res2net_zoo.data.images import decode
from res2net_zoo.data.labels import match_classes
from res2net_zoo.data.sources import open_source
from res2net_zoo.evaluation import evaluate
from res2net_zoo.hub.publish import files_of
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import finish_replacing, locked, read_bytes, sweep, write_atomically
from res2net_zoo.utils.markdown import markdown_table
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import replaced_folder, write_model_folder
from res2net_zoo.weights.pretrained import create_model
from res2net_zoo.weights.published import published_accuracies
from tests.conftest import ROOT, SHIPPED_DATA, SHIPPED_MODEL, spread


def test_files_are_replaced_atomically(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, lambda new: new.write_text("old"))

    def fail(new):
        new.write_text("half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_lock_in_unwritable_folder_is_refused():
    with pytest.raises(InputError, match="cannot write into /proc"), locked(Path("/proc/model")):
        pass


def test_foreign_lock_files_are_not_overwritten(tmp_path):
    (tmp_path / "precious").write_text("text")
    os.link(tmp_path / "precious", tmp_path / ".linked.lock")
    os.mkfifo(tmp_path / ".piped.lock")
    for name in ("linked", "piped"):
        with locked(tmp_path / name):
            pass
    assert (tmp_path / "precious").read_text() == "text"


def test_devices_are_written_but_not_replaced(tmp_path):
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    with locked(null), locked(null):  # two programs may write to it
        write_atomically(null, lambda new: new.write_text("text"))
    assert null.is_symlink() and null.is_char_device()
    read, write = os.pipe()
    with os.fdopen(read) as reader:
        write_atomically(Path(f"/dev/fd/{write}"), lambda new: new.write_text("text"))
        os.close(write)
        assert reader.read() == "text"


def test_pipe_without_reader_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    write_atomically(tmp_path / "fifo", lambda new: new.write_text("text"))
    assert (tmp_path / "fifo").read_text() == "text"


def test_model_folders_are_replaced_atomically(tmp_path):
    folder = tmp_path / "model"
    model = spread(timm.create_model("res2net_tiny", num_classes=3))
    write_model_folder(folder, model, model_card("one", "# one", None))
    (folder / "metrics.csv").write_text("kept")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    class BadCard:
        def save(self, path):
            path.write_text("half a card")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_model_folder(folder, spread(model, 1), BadCard())  # type: ignore[arg-type]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    write_model_folder(folder, spread(model, 1), model_card("two", "# two", None))
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert after.keys() == before.keys() and after["metrics.csv"] == b"kept"
    assert after["model.safetensors"] != before["model.safetensors"] and b"# two" in after["README.md"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.full
def test_model_folder_is_complete_after_sigkill(tmp_path):
    """kill -9 while a folder is written repeatedly: it is always readable, with weights and card of the same write."""
    folder = tmp_path / "model"
    code = f"""
import sys, timm, torch, res2net_zoo
from pathlib import Path
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
model = timm.create_model("res2net_tiny", num_classes=3)
for i in range(10_000):
    torch.nn.init.constant_(model.fc.bias, i)
    write_model_folder(Path({str(folder)!r}), model, model_card("m", f"# {{i}}", None))
    print(i, flush=True)
"""
    for kill_after in (1, 3, 5):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(kill_after):
            assert process.stdout.readline()
        process.kill()
        process.wait()
        finish_replacing(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            number = int(file.get_tensor("fc.bias")[0])
            assert file.metadata() == {"format": "pt"}
        assert (folder / "README.md").read_text().endswith(f"# {number}")
        shutil.rmtree(tmp_path)
        folder = tmp_path / "model"


WRITER = """
import sys, time
from pathlib import Path
from res2net_zoo.utils.files import locked, temporary_file
path = Path(sys.argv[1])
with locked(path), temporary_file(path) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.mark.full
def test_locks_and_partial_files_of_killed_processes_are_removed(tmp_path):
    path = tmp_path / "file.txt"
    (tmp_path / ".notes-new-mine").mkdir()  # a folder of the user
    process = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    with pytest.raises(InputError, match=f"another run .process {process.pid} .* is writing .*file.txt"), locked(path):
        pass
    sweep(tmp_path)
    (temporary,) = tmp_path.glob(".file.txt-new-*")
    assert (temporary / "file.txt").read_text() == "half"
    process.kill()
    process.wait()
    with locked(path):
        write_atomically(path, lambda new: new.write_text("whole"))
    assert {p.name for p in tmp_path.iterdir()} == {"file.txt", ".notes-new-mine"}
    assert path.read_text() == "whole"


@pytest.mark.full
def test_child_processes_do_not_keep_locks(tmp_path):
    """Data-loading workers are forked, and may live some seconds longer."""
    code = """
import os, sys, time
from pathlib import Path
from res2net_zoo.utils.files import locked
with locked(Path(sys.argv[1])):
    heard, say = os.pipe()
    child = os.fork()
    if child:
        os.read(heard, 1)
        print(child, flush=True)
    else:
        os.write(say, b"1")
    time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "f"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with locked(tmp_path / "f"):
            os.kill(child, 0)  # it is alive
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.full
def test_replacement_is_completed_after_sigkill_between_renames(tmp_path):
    folder = tmp_path / "model"
    code = """
import os, pathlib, sys
from res2net_zoo.weights.model_folder import replaced_folder
rename = pathlib.Path.rename
def die(self, target):
    rename(self, target)
    if "-old-" in str(target):
        os.kill(os.getpid(), 9)
pathlib.Path.rename = die
for text in ("old", "new"):
    with replaced_folder(pathlib.Path(sys.argv[1])) as new:
        (new / "card").write_text(text)
"""
    assert subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT).returncode == -9
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 2
    sweep(tmp_path)  # must not remove the only complete folders
    finish_replacing(folder)
    assert (folder / "card").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["model"]
    # Temporary files in the folder are not kept.
    (folder / ".card-new-abcdefgh").mkdir()
    (folder / "mine").write_text("kept")
    with replaced_folder(folder) as new:
        (new / "card").write_text("newer")
    assert {p.name for p in folder.iterdir()} == {"card", "mine"}


def test_partial_files_are_not_published(tmp_path):
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    whole = files_of(folder)
    for name in (".README.md-new-abcdefgh", ".eval_results/.imagenet-1k.yaml-new-abcdefgh"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("half")
    assert files_of(folder) == whole


def test_model_folders_agree_with_timm(tmp_path):
    """timm alone loads weights and labels of our folders; published accuracies are read from the card."""
    accuracies = [Accuracy(dataset="digits", split="validation", top1=12.345, top5=67.8, source="here")]
    model = spread(timm.create_model("res2net_tiny", num_classes=3, in_chans=1)).eval()
    write_model_folder(tmp_path / "m", model, model_card("m", "# m", "mit", accuracies), ["x", "y", "z"])
    loaded = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    image = torch.randn(1, 1, 64, 64)
    assert torch.equal(loaded(image), model(image))
    assert loaded.pretrained_cfg["label_names"] == ["x", "y", "z"]
    published = published_accuracies(f"local-dir:{tmp_path / 'm'}")
    assert [(a.dataset, a.split, a.top1, a.top5) for a in published] == [("digits", "validation", 12.345, 67.8)]
    assert timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, num_classes=5, in_chans=3) is not None


def test_published_accuracies_of_the_catalogue():
    assert published_accuracies("res2net50d")[0].top1 == 80.28
    assert published_accuracies("res2net50d.in1k") == published_accuracies("res2net50d")
    assert published_accuracies("resnet50") == []


def test_tables_align():
    table = markdown_table(("name", "n"), [("a", "1.5"), ("long name", "-")])
    assert table.splitlines() == [
        "| name      |   n |",
        "| --------- | --: |",
        "| a         | 1.5 |",
        "| long name |   - |",
    ]


# Shipped files


def test_shipped_digits_match_scikit_learn():
    """Every image occurs once with the same pixels, and the split is stratified."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    expected = Counter(
        (np.rint(pixels * (255 / 16)).astype(np.uint8).tobytes(), int(label))
        for pixels, label in zip(digits.images, digits.target, strict=True)
    )
    found: Counter = Counter()
    shares = {}
    for split in ("train", "validation"):
        rows = open_source(str(SHIPPED_DATA), split).rows
        found += Counter((decode(row["image"]["bytes"], "L").tobytes(), row["label"]) for row in rows)
        shares[split] = np.bincount(rows["label"], minlength=10)
    assert found == expected
    assert (shares["train"].sum(), shares["validation"].sum()) == (1437, 360)
    assert np.abs(shares["validation"] - 0.2 * (shares["train"] + shares["validation"])).max() < 1
    # The splits have no image in common.
    assert max(found.values()) == 1


@pytest.mark.full
def test_make_digits_is_reproducible(tmp_path):
    subprocess.run([sys.executable, "hub/datasets/make_digits.py", "--output", tmp_path], cwd=ROOT, check=True)
    for split in ("train", "validation"):
        made, shipped = (open_source(str(folder), split).rows for folder in (tmp_path, SHIPPED_DATA))
        assert made[:] == shipped[:]


def test_shipped_model_reaches_the_accuracy_of_its_card():
    model = create_model(f"local-dir:{SHIPPED_MODEL}")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    source = open_source(str(SHIPPED_DATA))
    counts = evaluate(model, source, match_classes(source.class_names, 10), Accelerator(cpu=True))
    (published,) = published_accuracies(f"local-dir:{SHIPPED_MODEL}")
    assert (counts.percent(counts.top1), counts.percent(counts.top5)) == (published.top1, published.top5)
    assert published.top1 >= 98.5


def test_shipped_model_card_documents_its_training():
    card = (SHIPPED_MODEL / "README.md").read_text()
    assert "accelerate launch scripts/finetune.py --license apache-2.0 --output hub/models/res2net_tiny.digits" in card
    assert "| seed " in card and "license: apache-2.0" in card
    assert json.loads((SHIPPED_MODEL / "config.json").read_text())["architecture"] == "res2net_tiny"
    assert datasets.load_dataset_builder(str(SHIPPED_DATA)).config.data_files.keys() == {"train", "validation"}
    for path in (*SHIPPED_MODEL.iterdir(), *SHIPPED_DATA.rglob("*.md")):
        assert str(ROOT).encode() not in path.read_bytes() and str(Path.home()).encode() not in path.read_bytes()


def test_files_without_a_size_are_read_up_to_the_limit():
    assert read_bytes(Path("/proc/self/status"), 2**30).startswith(b"Name:")
    with pytest.raises(InputError, match="more bytes than its size of 0"):
        read_bytes(Path("/proc/self/pagemap"), 2**40)
