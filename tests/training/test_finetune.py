"""scripts/finetune.py: short training runs and their output, and bad input. Long runs are marked slow."""

import csv
import json
import re
import shlex
import shutil
import tomllib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from res2net_zoo.data.sources import open_source
from tests.conftest import ROOT, SHIPPED_DATA, SHIPPED_MODEL, input_error, save_images
from tests.pictures import save_mnist, save_shapes

FINETUNE = "scripts/finetune.py"


def test_training_on_two_processes_writes_a_model_folder(program, in_process, tmp_path):
    folder = tmp_path / "model"
    args = ["--epochs", 2, "--batch-size", 16, "--workers", 1, "--threads", 1, "--output", folder]
    result = program(FINETUNE, *args, processes=2)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "fingerprint.json", "recipe.toml", "metrics.csv",
        "learning_curve.png", "learning_rate.png", "mistakes.png", "bom.cdx.json",
    }  # fmt: skip
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[1]["top1"]) > 60  # far above chance, 10 percent
    card = (folder / "README.md").read_text()
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m res2net_zoo finetune" in card
    with Image.open(folder / "learning_curve.png") as picture:
        assert picture.size == (840, 480)
    # validate.py reproduces the accuracy on the card after training on two processes.
    assert in_process("scripts/validate.py", "--model", f"local-dir:{folder}", "--check").returncode == 0


def test_fine_tuning_on_a_folder_of_images(in_process, tmp_path):
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
    assert "license: apache-2.0\n" in (folder / "README.md").read_text()  # that of the initial weights
    # With such a small learning rate, only the new classifier changes.
    start, end = (load_file(f / "model.safetensors") for f in (SHIPPED_MODEL, folder))
    assert (end["layer1.0.conv1.weight"] - start["layer1.0.conv1.weight"]).abs().max() < 1e-6
    assert end["fc.weight"].shape[0] == 3


@pytest.mark.full
def test_profile_does_not_change_the_model(in_process, program, tmp_path, monkeypatch):
    monkeypatch.setattr("res2net_zoo.utils.throughput.SECONDS", 0.2)
    args = ["--epochs", 1, "--batch-size", 32, "--accumulate", 2, "--ema", 0.9, "--threads", 1, "--tracker", "none"]
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert in_process(FINETUNE, *args, "--output", plain).returncode == 0
    result = in_process(FINETUNE, *args, "--output", profiled, "--profile")
    assert result.returncode == 0, result.stderr
    assert (plain / "model.safetensors").read_bytes() == (profiled / "model.safetensors").read_bytes()
    assert (plain / "recipe.toml").read_bytes() == (profiled / "recipe.toml").read_bytes()
    line = re.search(
        r"^images/s: data loading alone ([\d.]+) .*, model alone ([\d.]+), together ([\d.]+);", result.stdout, re.M
    )
    assert line and all(float(rate) > 0 for rate in line.groups())
    # Steps contain collective operations, which all processes must repeat equally often.
    result = program(FINETUNE, *args, "--output", tmp_path / "two", "--profile", processes=2)
    assert result.returncode == 0 and result.stdout.count("images/s: ") == 1, result.stderr


@pytest.mark.full
def test_options_override_the_recipe(in_process, tmp_path):
    (tmp_path / "mine.toml").write_text("epochs = 1\nlr = 0.5\nbatch_size = 32\nscale = [0.9, 1.0]\nworkers = 0\n")
    args = ["--recipe", tmp_path / "mine.toml", "--lr", "0.01", "--output", tmp_path / "model"]
    result = in_process(FINETUNE, *args)
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "model" / "README.md").read_text()
    for setting, value in (("lr", "0.01"), ("epochs", "1"), ("scale", "[0.9, 1.0]"), ("batch_size", "32")):
        assert re.search(rf"^\| {setting} +\| {re.escape(value)} +\|$", card, re.M), setting


@pytest.mark.full
def test_card_has_the_licence_of_the_initial_weights(in_process, tmp_path):
    """Independent of the recipe; only --license changes it."""
    start = shutil.copytree(SHIPPED_MODEL, tmp_path / "start")
    config = json.loads((start / "config.json").read_text())
    config["pretrained_cfg"] |= dict(
        license="other", tag="in1k", hf_hub_id="zoo/other"
    )  # values that timm may leave there
    config["provenance"] |= dict(license="cc-by-nc-sa-4.0", base_model="zoo/base")
    (start / "config.json").write_text(json.dumps(config))
    (tmp_path / "short.toml").write_text("epochs = 1\nworkers = 0\nbatch_size = 128\npretrained = true\n")
    args = ["--model", f"local-dir:{start}", "--recipe", tmp_path / "short.toml", "--output"]
    for license, options in (("cc-by-nc-sa-4.0", []), ("mit", ["--license", "mit"])):
        result = in_process(FINETUNE, *args, tmp_path / license, *options)
        assert result.returncode == 0, result.stderr
        card = (tmp_path / license / "README.md").read_text()
        assert f"license: {license}\n" in card and "trained from pretrained weights" in card
        assert "base_model: zoo/base\n" in card
        # It is no longer identified as the checkpoint of that tag, for example by `hub/verify.py`.
        assert "tag" not in json.loads((tmp_path / license / "config.json").read_text())["pretrained_cfg"]
        assert in_process("hub/verify.py", tmp_path / license).returncode == 0


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("epochs = 'many'", "--epochs: invalid int value: 'many'"),
        ("epoch = 3", "sets epoch, which is not a setting; did you mean epochs?"),
        ("epochs 3", "is not TOML"),
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

    assert "no recipe nonsense; available: cifar" in refused("--recipe", "nonsense")
    assert "no recipe finetun; did you mean finetune?" in refused("--recipe", "finetun")
    assert "did you mean" in refused("--model", "res2net_tinny")
    assert "no split holdout" in refused("--eval-split", "holdout")
    line = refused("--eval-split", "train")
    assert "would both be on train" in line and "(--train-split, --eval-split)" in line
    assert "fewer than a batch of 5000" in refused("--batch-size", "5000")
    assert "timm has no optimizer nonsense" in refused("--opt", "nonsense")
    for option, value in (
        ("--drop-path", "2"),
        ("--smoothing", "5"),
        ("--workers", "-1"),
        ("--seed", "-1"),
        ("--seed", "5000000000"),
        ("--lr", "nan"),
    ):
        assert f"argument {option}: {value} is not" in refused(option, value)
    line = refused("--auto-augment", "nonsense")
    assert "nonsense is not a policy of timm's" in line and "(--auto-augment)" in line
    assert "distillation needs a teacher" in refused("--recipe", "distill")
    assert "distillation needs a teacher" in refused("--task-weight", 0.1)
    assert "would both be on train" in refused("--eval-split", "training")
    assert "no split train/held-out-1.5-0" in refused("--eval-split", "train/held-out-1.5-0")
    assert "has 10 classes, not 7" in refused("--num-classes", 7)
    assert "cannot be trained with batches of 1 images of 3 x 8 x 8" in refused("--batch-size", 1, "--img-size", 8)
    for folder in (".", "/", "tests/.."):
        assert "contains the current folder" in input_error(in_process(FINETUNE, "--output", folder))
    (tmp_path / "file").touch()
    assert "is a file" in input_error(in_process(FINETUNE, "--output", tmp_path / "file"))
    assert "cannot write into" in input_error(in_process(FINETUNE, "--output", "/proc/model"))
    assert "need an even --batch-size" in refused("--mixup", "0.2", "--batch-size", "31")
    folder = tmp_path / "photos"
    save_images(folder, ["0", "1"], 1)
    assert "is not empty and not a model folder" in input_error(in_process(FINETUNE, "--output", folder))
    assert sorted(p.name for p in folder.iterdir()) == ["0", "1"]
    images = save_images(tmp_path / "images" / "train", ["a", "b"], 3)
    save_images(tmp_path / "images" / "val", ["a", "b"], 1)
    save_images(tmp_path / "images" / "test", ["a", "c"], 1)
    assert "classes in test that are missing in train: c" in refused(
        "--data", tmp_path / "images", "--eval-split", "test"
    )
    (images / "b" / "1.jpg").write_bytes(b"no image")
    args = ("--data", tmp_path / "images", "--batch-size", "2", "--workers", "0")
    assert "b/1.jpg" in refused(*args)


def test_images_skipped_during_training_are_counted(in_process, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "model"
    save_images(data / "train", ["a", "b"], 8)
    save_images(data / "val", ["a", "b"], 3)
    for name in ("train/a/1.jpg", "train/a/5.jpg", "train/b/2.jpg", "val/b/0.jpg"):
        (data / name).write_bytes(b"no image")
    args = ["--data", data, "--skip-corrupt", "--no-check", "--epochs", 2, "--batch-size", 4, "--workers", 0]
    result = in_process(FINETUNE, *args, "--tracker", "none", "--output", folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("3 images of train cannot be decoded and are skipped") == 1
    assert result.stderr.count("1 images of validation cannot be decoded and are skipped") == 1
    card = (folder / "README.md").read_text()
    assert "Trained on 13 images, 6 to 7 of each class, of the split `train`; evaluated on 5 of" in " ".join(
        card.split()
    )
    result = in_process(FINETUNE, "--resume", "--epochs", 3, "--output", folder)
    assert result.returncode == 0, result.stderr
    assert "Trained on 13 images" in " ".join((folder / "README.md").read_text().split())


@pytest.mark.first_case
@pytest.mark.parametrize("options", [[], ["--no-check"], ["--no-check", "--streaming"]])
def test_evaluation_split_without_readable_images_is_refused(in_process, tmp_path, options):
    data, folder = tmp_path / "data", tmp_path / "model"
    save_images(data / "train", ["a", "b"], 4)
    save_images(data / "val", ["a", "b"], 1)
    for path in (data / "val").rglob("*.jpg"):
        path.write_bytes(b"no image")
    args = ["--data", data, "--skip-corrupt", "--epochs", 1, "--batch-size", 4, "--workers", 0, "--tracker", "none"]
    result = in_process(FINETUNE, *args, *options, "--output", folder)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert ("of 2 images of validation" in line or "no image to evaluate in split validation: 2 cannot" in line) or (
        "none of the 2 images of validation in data can be decoded" in line
    )
    assert not (folder / "config.json").exists()


@pytest.mark.full
def test_a_constant_learning_rate(in_process, tmp_path):
    args = ["--sched", "none", "--lr", "1e-3", "--epochs", 2, "--batch-size", 256, "--workers", 0]
    result = in_process(FINETUNE, *args, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    assert [float(row["lr"]) for row in rows] == [1e-3, 1e-3]


@pytest.mark.slow
def test_shipped_model_is_reproducible(program, tmp_path):
    """Takes 2 minutes. Bit-identical weights on the same machine and versions, elsewhere the same accuracy."""
    result = program(FINETUNE, "--license", "apache-2.0", "--output", tmp_path / "again", processes=1, timeout=1800)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "again" / "metrics.csv").open()))
    assert max(float(row["top1"]) for row in rows) >= 98.5
    again, shipped = (load_file(f / "model.safetensors") for f in (tmp_path / "again", SHIPPED_MODEL))
    print("bit for bit:", all((again[key] == shipped[key]).all() for key in shipped))


QUICK = ["--epochs", 1, "--batch-size", 16, "--workers", 0, "--tracker", "none"]
SHIPPED = ["--model", f"local-dir:{SHIPPED_MODEL}", "--pretrained"]


def settings_of(folder):
    return tomllib.loads((folder / "recipe.toml").read_text())


@pytest.mark.first_case
@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "scripts" / "recipes").glob("*.toml")))
def test_every_recipe_trains_and_is_saved(in_process, tmp_path, recipe):
    folder = tmp_path / "model"
    args = [*QUICK, "--steps-per-epoch", 2, "--no-check", "--recipe", recipe, "--output", folder]
    args += ["--teacher", f"local-dir:{SHIPPED_MODEL}"] if recipe == "distill" else []
    args += SHIPPED if recipe in ("finetune", "linear_probe") else []
    result = in_process(FINETUNE, *args)
    assert result.returncode == 0, result.stderr
    assert f"recipe {recipe}, 1 epochs of 2 steps of 16 images" in result.stdout
    stored, asked = settings_of(folder), tomllib.loads((ROOT / f"scripts/recipes/{recipe}.toml").read_text())
    for key in asked.keys() - {"epochs", "batch_size", "workers"}:
        assert stored[key] == asked[key], key
    # The saved recipe reproduces the run.
    again = in_process(FINETUNE, "--recipe", folder / "recipe.toml", "--output", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.full
def test_learning_rate_scales_with_the_global_batch_size(in_process, tmp_path):
    args = [*QUICK, "--steps-per-epoch", 1, "--no-check", "--lr", 0.1, "--lr-base-size", 64, "--accumulate", 2]
    for opt, rate in (("sgd", "0.05"), ("adamw", "0.0707")):
        result = in_process(FINETUNE, *args, "--opt", opt, "--output", tmp_path / opt)
        assert f"{opt}, learning rate {rate}" in result.stdout, result.stderr


def test_frozen_stages_and_linear_probe(in_process, tmp_path):
    start = load_file(SHIPPED_MODEL / "model.safetensors")
    for stages, moving in (("2", ("layer2", "layer3", "layer4", "fc")), ("all", ("fc",))):
        folder = tmp_path / stages
        args = [*QUICK, *SHIPPED, "--recipe", "linear_probe", "--freeze", stages, "--steps-per-epoch", 3, "--no-check"]
        result = in_process(FINETUNE, *args, "--output", folder)
        assert result.returncode == 0, result.stderr
        end = load_file(folder / "model.safetensors")
        for name, tensor in end.items():
            moved = not torch.equal(tensor, start[name])
            assert moved or name.split(".")[0] not in moving or name.endswith("num_batches_tracked"), name
            assert not moved or name.split(".")[0] in moving, name
    line = input_error(in_process(FINETUNE, *QUICK, "--freeze", 9, "--output", tmp_path / "nine"))
    assert "cannot freeze 9 stages: this model has 5 with its stem; `all` freezes them (--freeze)" in line


@pytest.mark.full
def test_layer_decay_reduces_changes_of_early_layers(in_process, tmp_path):
    folder = tmp_path / "model"
    args = [*QUICK, *SHIPPED, "--layer-decay", 0.5, "--opt", "sgd", "--lr", 0.1, "--weight-decay", 0]
    args += ["--warmup-epochs", 0]
    result = in_process(FINETUNE, *args, "--steps-per-epoch", 5, "--no-check", "--output", folder)
    assert result.returncode == 0, result.stderr
    start, end = (load_file(f / "model.safetensors") for f in (SHIPPED_MODEL, folder))
    near, far = ((end[name] - start[name]).norm() / start[name].norm() for name in ("conv1.0.weight", "fc.weight"))
    assert 0 < near < far / 20, (near, far)


@pytest.mark.full
def test_distillation_without_labels(in_process, tmp_path):
    """Labels are shuffled, so that only the teacher provides information."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        rows = open_source(str(SHIPPED_DATA), split).rows.cast_column("image", datasets.Image())
        if split == "train":
            rows = rows.remove_columns("label").add_column("label", np.random.default_rng(0).permutation(rows["label"]))
            rows = rows.cast_column("label", datasets.ClassLabel(names=[str(i) for i in range(10)]))
        rows.to_parquet(data / f"{split}.parquet")
    args = ["--data", data, "--recipe", "distill", "--teacher", f"local-dir:{SHIPPED_MODEL}", "--opt", "adamw"]
    args += [
        "--lr",
        2e-3,
        "--warmup-epochs",
        0,
        "--scale",
        0.7,
        1,
        "--hflip",
        0,
        "--tracker",
        "none",
        "--batch-size",
        32,
    ]
    result = in_process(FINETUNE, *args, "--epochs", 3, "--output", tmp_path / "model")
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "model" / "metrics.csv").open()))
    assert float(rows[-1]["top1"]) > 75
    save_images(tmp_path / "other", ["a", "b"], 5)
    args = ["--data", tmp_path / "other", "--teacher", f"local-dir:{SHIPPED_MODEL}", "--output", tmp_path / "bad"]
    assert "has 10 classes, not these 2" in input_error(in_process(FINETUNE, *QUICK, "--batch-size", 2, *args))


@pytest.mark.full
def test_folder_without_splits_with_a_corrupt_image(in_process, tmp_path):
    """Without splits, with an unbalanced class and a corrupt image; the printed command reproduces the accuracy."""
    data, folder = save_shapes(tmp_path / "shapes", 20), tmp_path / "model"
    for path in sorted((data / "ring").iterdir())[8:]:
        path.unlink()
    (data / "star" / "0000.jpg").write_bytes(b"no picture")
    args = ["--data", data, *QUICK, "--output", folder, "--balance", "loss", "--img-size", 48]
    assert "1 image of" in input_error(in_process(FINETUNE, *args))
    result = in_process(FINETUNE, *args, "--skip-corrupt", "--epochs", 2, "--mixed-precision", "bf16", "--ema", 0.9)
    assert result.returncode == 0, result.stderr
    assert "evaluated on 14 of train/held-out-0.2-0, 0.2 of each class held out" in result.stdout
    card = (folder / "README.md").read_text()
    assert "4 classes: `cross`, `ring`, `star`, `triangle`" in card and "| class" in card
    assert "Input: 3 x 48 x 48" in card and "![Mistakes](mistakes.png)" in card
    command = result.stdout.splitlines()[-1].removeprefix("to reproduce: res2net-zoo ")
    checked = in_process("res2net_zoo/__main__.py", *shlex.split(command))
    assert "passed" in checked.stdout, (checked.stdout, checked.stderr)
    with Image.open(folder / "mistakes.png") as picture:
        assert picture.width > 200


@pytest.mark.full
def test_streaming_on_two_processes(program, in_process, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    for split in ("train", "validation"):
        rows = open_source(str(SHIPPED_DATA), split).rows.cast_column("image", datasets.Image())
        for i in range(2):
            rows.shard(2, i).to_parquet(data / f"{split}-{i}-of-2.parquet")
    args = ["--data", data, "--streaming", *QUICK, "--workers", 1, "--threads", 1, "--warmup-epochs", 0, "--lr", 2e-3]
    result = program(FINETUNE, *args, "--hflip", 0, "--output", folder, processes=2)
    assert result.returncode == 0, result.stderr
    assert "1437 images of train; evaluated on 360 of validation" in result.stdout
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert float(rows[-1]["top1"]) > 60
    checked = in_process("scripts/validate.py", "--model", f"local-dir:{folder}", "--data", data, "--check")
    assert checked.returncode == 0, checked.stdout
    args = ["--resume", "--output", folder, "--epochs", 2, "--batch-size", 32, "--workers", 0]
    result = in_process(FINETUNE, *args)
    assert result.returncode == 0, result.stderr
    assert "order: some images are repeated" in result.stderr


@pytest.mark.full
def test_trackers_and_early_stopping(in_process, tmp_path):
    folder = tmp_path / "model"
    args = [*QUICK[:-2], "--batch-size", 128, "--lr", 0, "--epochs", 6, "--patience", 2, "--output", folder]
    args += ["--steps-per-epoch", 2, "--no-check"]
    result = in_process(FINETUNE, *args)
    assert result.returncode == 0, result.stderr
    # Nothing changes at a learning rate of 0; on ties, the latest epoch is the best.
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    best = max((float(row["top1"]), int(row["epoch"])) for row in rows)[1]
    assert len(rows) == min(6, best + 2)
    (events,) = (tmp_path / "model.run" / "trackers" / "model").glob("events.*")
    content = events.read_bytes()
    assert b"top1" in content and b"loss" in content
    line = input_error(in_process(FINETUNE, *args, "--overwrite", "--tracker", "wandb"))
    assert "the tracker wandb is not installed; available: tensorboard, none (--tracker)" in line
    assert "is unknown to Accelerate" in input_error(in_process(FINETUNE, *args, "--overwrite", "--tracker", "x"))


@pytest.mark.full
def test_accumulation_checkpointing_and_memory_format_are_equivalent(in_process, tmp_path):
    args = [*QUICK, "--steps-per-epoch", 4, "--no-check", "--opt", "sgd", "--lr", 0.01, "--freeze-bn"]
    weights = []
    for name, options in (
        ("plain", ["--batch-size", 32]),
        ("checkpointing", ["--batch-size", 32, "--grad-checkpointing"]),
        ("accumulated", ["--batch-size", 8, "--accumulate", 4]),
        ("channels first", ["--batch-size", 32, "--no-channels-last"]),
    ):
        result = in_process(FINETUNE, *args, *options, "--output", tmp_path / name)
        assert result.returncode == 0, result.stderr
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_training_a_compiled_model(in_process, tmp_path):
    """Marked slow: inductor takes a minute."""
    args = [*QUICK, "--steps-per-epoch", 4, "--opt", "sgd", "--lr", 0.01, "--freeze-bn"]
    for name in ("plain", "compile"):
        result = in_process(FINETUNE, *args, *(["--compile"] if name == "compile" else []), "--output", tmp_path / name)
        assert result.returncode == 0, result.stderr
    plain, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compile"))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_training_on_mnist(program, in_process, tmp_path):
    """Marked slow: real data, with 4,000 training images."""
    data, folder = save_mnist(tmp_path / "mnist"), tmp_path / "model"
    args = ["--data", data, "--recipe", "digits", "--epochs", 20, "--output", folder]
    result = program(FINETUNE, *args, processes=1, timeout=3600)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert max(float(row["top1"]) for row in rows) >= 98.5


@pytest.mark.slow
def test_training_on_coloured_shapes(program, in_process, tmp_path):
    """Marked slow: 2,000 training and 400 evaluation images of four shapes."""
    save_shapes(tmp_path / "data" / "train", 500)
    save_shapes(tmp_path / "data" / "val", 100, seed=1)
    folder = tmp_path / "model"
    args = ["--data", tmp_path / "data", "--epochs", 20, "--batch-size", 32, "--lr", 2e-3, "--output", folder]
    result = program(FINETUNE, *args, processes=1, timeout=3600)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert max(float(row["top1"]) for row in rows) >= 95
