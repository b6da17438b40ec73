"""scripts/finetune.py: a short real training and what it leaves, bad input; the shipped model's training by hand."""

import csv
import json
import re
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import SHIPPED_MODEL, input_error, save_images

FINETUNE = "scripts/finetune.py"


def test_trains_in_two_processes_and_leaves_a_model_folder(program, in_process, tmp_path):
    folder = tmp_path / "model"
    args = ["--epochs", 2, "--batch-size", 16, "--workers", 1, "--threads", 1, "--output", folder]
    result = program(FINETUNE, *args, processes=2)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "fingerprint.json", "recipe.toml", "metrics.csv",
        "learning_curve.png", "learning_rate.png", "mistakes.png",
    }  # fmt: skip
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[1]["top1"]) > 60  # ten classes: it has learnt
    card = (folder / "README.md").read_text()
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 scripts/finetune.py" in card
    with Image.open(folder / "learning_curve.png") as picture:
        assert picture.size == (840, 480)
    # The card publishes what validate.py finds, though two processes trained it.
    assert in_process("scripts/validate.py", "--model", f"local-dir:{folder}", "--check").returncode == 0


def test_fine_tunes_a_folder_of_images_from_given_weights(in_process, tmp_path):
    save_images(tmp_path / "data" / "train", ["cat", "dog", "eel"], 8)
    save_images(tmp_path / "data" / "val", ["cat", "dog", "eel"], 2, seed=1)
    folder = tmp_path / "model"
    args = ["--model", f"local-dir:{SHIPPED_MODEL}", "--pretrained", "--data", tmp_path / "data", "--output", folder]
    args += ["--epochs", 1, "--batch-size", 4, "--workers", 0, "--mixup", 0.2, "--cutmix", 1, "--clip-grad", 1]
    args += ["--drop-path", 0.1, "--auto-augment", "rand-m5", "--reprob", 0.2, "--lr", "1e-12", "--warmup-epochs", 0]
    args += ["--weight-decay", 0]
    result = in_process(FINETUNE, *args)
    assert result.returncode == 0, result.stderr
    assert '"cat",' in (folder / "config.json").read_text()
    assert "license:" not in (folder / "README.md").read_text()  # nobody has said what it is
    # So small a learning rate leaves the weights where they started, but for the new classifier.
    start, end = (load_file(f / "model.safetensors") for f in (SHIPPED_MODEL, folder))
    assert (end["layer1.0.conv1.weight"] - start["layer1.0.conv1.weight"]).abs().max() < 1e-6
    assert end["fc.weight"].shape[0] == 3


def test_a_recipes_values_stand_behind_the_command_lines(in_process, tmp_path):
    (tmp_path / "mine.toml").write_text("epochs = 1\nlr = 0.5\nbatch_size = 32\nscale = [0.9, 1.0]\nworkers = 0\n")
    args = ["--recipe", tmp_path / "mine.toml", "--lr", "0.01", "--output", tmp_path / "model"]
    result = in_process(FINETUNE, *args)
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "model" / "README.md").read_text()
    for setting, value in (("lr", "0.01"), ("epochs", "1"), ("scale", "[0.9, 1.0]"), ("batch_size", "32")):
        assert re.search(rf"^\| {setting} +\| {re.escape(value)} +\|$", card, re.M), setting


def test_the_card_has_the_licence_of_the_weights_it_started_from(in_process, tmp_path):
    """Whatever the recipe; only the command line can say another."""
    start = shutil.copytree(SHIPPED_MODEL, tmp_path / "start")
    config = json.loads((start / "config.json").read_text())
    config["pretrained_cfg"] |= dict(license="cc-by-nc-sa-4.0", tag="in1k", hf_hub_id="zoo/base")
    (start / "config.json").write_text(json.dumps(config))
    (tmp_path / "short.toml").write_text("epochs = 1\nworkers = 0\nbatch_size = 128\npretrained = true\n")
    args = ["--model", f"local-dir:{start}", "--recipe", tmp_path / "short.toml", "--output"]
    for license, options in (("cc-by-nc-sa-4.0", []), ("mit", ["--license", "mit"])):
        result = in_process(FINETUNE, *args, tmp_path / license, *options)
        assert result.returncode == 0, result.stderr
        card = (tmp_path / license / "README.md").read_text()
        assert f"license: {license}\n" in card and "trained from its published weights" in card
        assert "base_model: zoo/base\n" in card
        # It is no longer the checkpoint of that tag, for `hub/verify.py` among others.
        assert "tag" not in json.loads((tmp_path / license / "config.json").read_text())["pretrained_cfg"]
        assert in_process("hub/verify.py", tmp_path / license).returncode == 0


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("epochs = 'many'", "--epochs: invalid int value: 'many'"),
        ("epoch = 3", "sets epoch, which is no setting; did you mean epochs?"),
        ("epochs 3", "is no TOML"),
        ("scale = [0.5]", "--scale"),
    ],
)
def test_wrong_recipes(in_process, tmp_path, recipe, words):
    (tmp_path / "bad.toml").write_text(recipe)
    assert words in input_error(in_process(FINETUNE, "--recipe", tmp_path / "bad.toml"))


def test_bad_input(in_process, tmp_path):
    def refused(*args) -> str:
        line = input_error(in_process(FINETUNE, "--output", tmp_path / "out", *args))
        assert not (tmp_path / "out").exists()
        return line

    assert "no recipe nonsense; there are cifar" in refused("--recipe", "nonsense")
    assert "no recipe finetun; did you mean finetune?" in refused("--recipe", "finetun")
    assert "did you mean" in refused("--model", "res2net_tinny")
    assert "no split holdout" in refused("--eval-split", "holdout")
    assert "would both be on train" in refused("--eval-split", "train")
    assert "less than a batch of 5000" in refused("--batch-size", "5000")
    assert "timm makes no optimizer nonsense" in refused("--opt", "nonsense")
    for option, value in (
        ("--drop-path", "2"),
        ("--smoothing", "5"),
        ("--workers", "-1"),
        ("--seed", "-1"),
        ("--seed", "5000000000"),
        ("--lr", "nan"),
    ):
        assert f"argument {option}: {value} is not" in refused(option, value)
    assert "--auto-augment nonsense" in refused("--auto-augment", "nonsense")
    (tmp_path / "file").touch()
    assert "is a file" in input_error(in_process(FINETUNE, "--output", tmp_path / "file"))
    assert "cannot write into" in input_error(in_process(FINETUNE, "--output", "/proc/model"))
    assert "is odd" in refused("--mixup", "0.2", "--batch-size", "31")
    folder = tmp_path / "photos"
    save_images(folder, ["0", "1"], 1)
    assert "holds other things than a model" in input_error(in_process(FINETUNE, "--output", folder))
    assert sorted(p.name for p in folder.iterdir()) == ["0", "1"]
    images = save_images(tmp_path / "images" / "train", ["a", "b"], 3)
    save_images(tmp_path / "images" / "val", ["a", "b"], 1)
    save_images(tmp_path / "images" / "test", ["a", "c"], 1)
    assert "classes in test that train has not: c" in refused("--data", tmp_path / "images", "--eval-split", "test")
    (images / "b" / "1.jpg").write_bytes(b"no image")
    args = ("--data", tmp_path / "images", "--batch-size", "2", "--workers", "0")
    assert "b/1.jpg" in refused(*args)


def test_a_constant_learning_rate(in_process, tmp_path):
    args = ["--sched", "none", "--lr", "1e-3", "--epochs", 2, "--batch-size", 256, "--workers", 0]
    result = in_process(FINETUNE, *args, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    assert [float(row["lr"]) for row in rows] == [1e-3, 1e-3]


@pytest.mark.slow
def test_the_shipped_models_command_makes_it_again(program, tmp_path):
    """By hand, 2 minutes: the same weights to the bit on the same machine and versions, elsewhere as good."""
    result = program(FINETUNE, "--license", "apache-2.0", "--output", tmp_path / "again", processes=1, timeout=1800)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "again" / "metrics.csv").open()))
    assert max(float(row["top1"]) for row in rows) >= 98.5
    again, shipped = (load_file(f / "model.safetensors") for f in (tmp_path / "again", SHIPPED_MODEL))
    print("bit for bit:", all((again[key] == shipped[key]).all() for key in shipped))
