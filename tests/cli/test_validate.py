"""scripts/validate.py as a program: accuracies, comparison, bad input, many models, interruption."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import timm
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from res2net_zoo.data.labels import imagenet_synsets, real_labels, subset_synsets
from res2net_zoo.utils.files import locked
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
from res2net_zoo.weights.published import published_accuracies
from tests.conftest import ROOT, SHIPPED_DATA, SHIPPED_MODEL, full_disk, input_error, save_images, spread
from tests.hub_server import serve

VALIDATE = "scripts/validate.py"
CPU_BACKENDS = ("native", "openvino", "onnxruntime", "eager")
SHIPPED = f"local-dir:{SHIPPED_MODEL}"


def table(result: subprocess.CompletedProcess) -> list[list[str]]:
    """Return the cells of the printed rows."""
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def results(path: Path) -> list[dict]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def imagenet_folder(tmp_path_factory) -> Path:
    """A folder of res2net_tiny with ImageNet's 1000 classes and random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny1000"
    write_model_folder(folder, spread(timm.create_model("res2net_tiny")), model_card("tiny1000", "# tiny", None))
    return folder


def test_first_readme_command_on_one_and_two_processes(program, tmp_path):
    """One and two processes measure the same accuracy of the shipped model, which is that of its card."""
    rows, files = [], []
    for processes in (1, 2):
        result = program(VALIDATE, "--check", "--output", tmp_path / f"{processes}.json", processes=processes)
        assert result.returncode == 0, result.stderr
        rows.append(table(result))
        files.append(results(tmp_path / f"{processes}.json")[0])
    assert rows[0][0][:8] == rows[1][0][:8] and len(rows[0]) == 1
    one, two = files
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["samples"] == two["samples"] == 360
    assert (one["correct1"], one["correct5"]) == (two["correct1"], two["correct5"])
    assert one["top1"] == one["published_top1"] >= 98.5 and one["top5"] == one["published_top5"]
    assert one["passed"] is True and "model card" in one["published_source"]
    assert one["images_per_second"] > 0
    assert {"model", "data", "split", "samples", "top1", "top5", "published_top1", "published_top5"} <= one.keys()
    assert {"published_source", "passed", "images_per_second", "num_processes"} <= one.keys()


def test_streaming_in_bf16(in_process, tmp_path):
    for args in (["--streaming"], ["--mixed-precision", "bf16"], ["--batch-size", "7", "--workers", "0"]):
        result = in_process(VALIDATE, "--check", "--output", tmp_path / "r.json", *args)
        assert result.returncode == 0, result.stderr
    assert results(tmp_path / "r.json")[0]["samples"] == 360


@pytest.mark.first_case
@pytest.mark.parametrize("backend", ["native", "eager", "auto"])
def test_backends_count_the_same(in_process, tmp_path, backend):
    """With any backend and batch size; the results contain the backend that ran the model."""
    args = ["--backend", backend, "--batch-size", "47", "--check", "--output", tmp_path / "r.json"]
    result = in_process(VALIDATE, *args)
    assert result.returncode == 0, result.stderr
    (entry,) = results(tmp_path / "r.json")
    assert (entry["samples"], entry["correct1"], entry["correct5"]) == (360, 360, 360)
    assert entry["backend"] == backend or (backend == "auto" and entry["backend"] in CPU_BACKENDS)
    assert f"{entry['backend']}, float32" in table(result)[0]
    assert "is already done" in in_process(VALIDATE, *args, "--resume").stdout
    assert "is already done" not in in_process(VALIDATE, *args, "--resume", "--backend", "torch").stdout


def test_profile_measures_data_loading_and_model_alone(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr("res2net_zoo.utils.throughput.SECONDS", 0.2)
    result = in_process(VALIDATE, "--profile", "--check", "--output", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    (entry,) = results(tmp_path / "r.json")
    assert entry["loader_images_per_second"] > 0 and entry["model_images_per_second"] > 0 and entry["workers"] == 0
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("images/s: "))
    assert f"data loading alone {entry['loader_images_per_second']} (0 workers per process)" in line
    assert f"together {entry['images_per_second']};" in line


@pytest.mark.full
def test_profile_sums_over_processes(program, tmp_path):
    result = program(VALIDATE, "--profile", "--output", tmp_path / "r.json", processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("images/s: data loading alone") == 1 and results(tmp_path / "r.json")[0]["workers"] == 1


@pytest.mark.full
def test_processes_share_a_backend(program, tmp_path):
    args = [VALIDATE, "--backend", "auto", "--precision", "bfloat16", "--output", tmp_path / "r.json"]
    result = program(*args, processes=2)
    assert result.returncode == 0, result.stderr
    (entry,) = results(tmp_path / "r.json")
    assert (entry["samples"], entry["num_processes"]) == (360, 2) and entry["top1"] >= 99.5


@pytest.mark.full
@pytest.mark.parametrize("backend", ["onnxruntime", "auto", "native"])
def test_int8(in_process, tmp_path, backend):
    """Calibrated on the training split, with any batch size; the results contain precision and backend."""
    args = ["--precision", "int8", "--backend", backend, "--batch-size", "47", "--output", tmp_path / "r.json"]
    result = in_process(VALIDATE, *args)
    assert result.returncode == 0, result.stderr
    (entry,) = results(tmp_path / "r.json")
    assert (entry["precision"], entry["calibration_images"], entry["samples"]) == ("int8", 300, 360)
    assert entry["correct1"] >= 358 and entry["correct5"] == 360
    assert f"{entry['backend']}, int8" in table(result)[0]
    assert entry["backend"] == backend or "another is used" in result.stderr or backend == "auto"


@pytest.mark.full
def test_int8_is_measured_again_with_other_calibration_images(in_process, tmp_path):
    args = ["--precision", "int8", "--backend", "onnxruntime", "--output", tmp_path / "r.json"]
    assert in_process(VALIDATE, *args).returncode == 0
    assert "is already done" in in_process(VALIDATE, *args, "--resume").stdout
    calibrate = ["--calibrate", f"{SHIPPED_DATA}/data/validation*.parquet"]
    assert "is already done" not in in_process(VALIDATE, *args, *calibrate, "--resume").stdout
    assert len(results(tmp_path / "r.json")) == 2


@pytest.mark.full
def test_processes_share_a_quantized_network(program, tmp_path):
    found = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        result = program(VALIDATE, "--precision", "int8", "--output", output, processes=processes)
        assert result.returncode == 0, result.stderr
        found += results(output)
    assert [entry["num_processes"] for entry in found] == [1, 2]
    assert all((entry["samples"], entry["precision"]) == (360, "int8") for entry in found)
    assert all(entry["correct1"] >= 358 for entry in found)
    assert found[0]["calibration_sha256"] == found[1]["calibration_sha256"] is not None


def test_int8_needs_calibration_images(in_process, tmp_path):
    data = save_images(tmp_path / "data", [str(i) for i in range(10)], 4)
    args = [VALIDATE, "--data", data, "--precision", "int8"]
    assert "data has no training split besides the measured images; name" in input_error(in_process(*args))
    few = save_images(tmp_path / "few", ["a"], 3)
    line = input_error(in_process(*args, "--calibrate", few))
    assert "there are 3 calibration images; int8 needs at least 32, better 300 (--calibrate)" in line
    line = input_error(in_process(VALIDATE, "--streaming", "--precision", "int8"))
    assert "digits is a stream; name the images that calibrate int8 (--calibrate)" in line
    line = input_error(in_process(*args, "--calibrate", tmp_path / "nowhere"))
    assert "nowhere" in line


def copy_with_card(tmp_path: Path, top1: float) -> Path:
    """Copy the shipped model with a card that states another top-1."""
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / f"claims_{top1}")
    card = (folder / "README.md").read_text()
    changed = re.sub(r"(type: accuracy\n\s+value: )[\d.]+", rf"\g<1>{top1}", card)
    assert changed != card
    (folder / "README.md").write_text(changed)
    return folder


def test_check_fails_if_the_published_accuracy_differs(in_process, tmp_path):
    measured = json.loads((in_process(VALIDATE, "--output", tmp_path / "r.json"), (tmp_path / "r.json").read_text())[1])
    claim = measured[0]["top1"] - 0.2
    model = f"local-dir:{copy_with_card(tmp_path, claim)}"
    result = in_process(VALIDATE, "--model", model, "--check")
    assert result.returncode == 1
    assert table(result)[0][-1] == "FAILED" and f"{claim:.3f}" in table(result)[0]
    assert in_process(VALIDATE, "--model", model).returncode == 0  # without --check
    assert in_process(VALIDATE, "--model", model, "--check", "--tolerance", "0.25").returncode == 0


@pytest.mark.full
def test_a_difference_equal_to_the_tolerance_passes(in_process, tmp_path):
    """In floating-point numbers, 100 - 99.9 is more than 0.1."""
    top1 = published_accuracies(SHIPPED)[0].top1
    for claim, code in ((round(top1 - 0.1, 3), 0), (round(top1 - 0.101, 3), 1)):
        folder = copy_with_card(tmp_path, claim)
        assert in_process(VALIDATE, "--model", f"local-dir:{folder}", "--check").returncode == code


@pytest.mark.first_case
@pytest.mark.parametrize(
    "front_matter",
    ["model-index: {", "model-index: 7", "license: 3", "model-index:\n- name: x\n  results:\n  - task: {type: t}"],
)
def test_unreadable_cards_have_no_published_accuracy(in_process, tmp_path, front_matter):
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# A model")
    result = in_process(VALIDATE, "--model", f"local-dir:{folder}")
    assert result.returncode == 0, result.stderr
    assert table(result)[0][-1] == "nothing published"


def test_invalid_accuracies_on_cards_are_ignored(tmp_path):
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    card = (folder / "README.md").read_text()
    for value in ("null", "'99 %'", "150", "[1]"):
        (folder / "README.md").write_text(re.sub(r"value: [\d.]+", f"value: {value}", card))
        assert published_accuracies(f"local-dir:{folder}") == []
    (folder / "README.md").unlink()
    assert published_accuracies(f"local-dir:{folder}") == []


def test_check_needs_a_published_accuracy(in_process, tiny_folder, tmp_path):
    result = in_process(VALIDATE, "--model", f"local-dir:{tiny_folder}", "--check", "--output", tmp_path / "r.json")
    assert "no published accuracy" in input_error(result)
    assert not (tmp_path / "r.json").exists()  # nothing was measured


def test_resume_repeats_measurements_after_changes(in_process, tmp_path):
    """Resuming with --check must not pass without a measurement."""
    images = save_images(tmp_path / "digits", [str(i) for i in range(10)], 1)
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    args = ["--model", f"local-dir:{folder}", "--data", images, "--output", tmp_path / "r.json", "--resume"]

    def resumed(*more: object) -> str:
        result = in_process(VALIDATE, *args, *more)
        assert len(results(tmp_path / "r.json")) == 1
        return "already done" if "is already done" in result.stdout else result.stdout

    resumed()
    first = results(tmp_path / "r.json")[0]
    assert re.fullmatch("[0-9a-f]{64}", first["weights_sha256"])
    assert resumed() == "already done"
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "because of changed or missing records: weights" in resumed()
    assert resumed() == "already done"
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert "because of changed or missing records: crop_pct" in resumed()
    Image.new("RGB", (50, 60)).save(images / "3" / "0.jpg")
    assert "because of changed or missing records: data" in resumed()
    # A file of an earlier version has no hash.
    old = [{k: v for k, v in results(tmp_path / "r.json")[0].items() if k != "weights_sha256"}]
    (tmp_path / "r.json").write_text(json.dumps(old))
    assert "because of changed or missing records: weights" in resumed()


def test_results_file_is_locked(in_process, tmp_path):
    with locked(tmp_path / "r.json"):
        for options in ([], ["--resume"]):
            line = input_error(in_process(VALIDATE, "--output", tmp_path / "r.json", *options))
            assert "another run (process" in line and "r.json" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("key", "value"),
    [("top1", "100"), ("top5", None), ("published_top1", []), ("samples", {}), ("images_per_second", math.nan),
     ("model", 3), ("options", []), ("benchmark", 1)],
)  # fmt: skip
def test_invalid_results_files_are_refused(in_process, tmp_path, key, value):
    result = dict.fromkeys(("model", "data", "split", "precision"), "")
    result |= dict.fromkeys(("samples", "skipped", "images_per_second", "top1", "top5"), 1)
    result |= {"options": {}, "benchmark": None, "published_top1": None, "published_top5": None, key: value}
    (tmp_path / "r.json").write_text(json.dumps([result]))
    line = input_error(in_process(VALIDATE, "--resume", "--output", tmp_path / "r.json"))
    assert f"r.json was not written by this program: {key} of result 1 cannot be" in line


def test_full_disk_does_not_stop_measurements(in_process, tmp_path):
    other = dict.fromkeys(("model", "data", "split", "precision"), "other" * 200)
    other |= dict.fromkeys(("samples", "skipped", "images_per_second", "top1", "top5"), 1)
    other |= {"options": {}, "benchmark": None, "published_top1": None, "published_top5": None}
    before = json.dumps([other] * 10)
    (tmp_path / "r.json").write_text(before)
    with full_disk(len(before)):  # sufficient for the output, which is also written to a file here
        result = in_process(VALIDATE, "--output", tmp_path / "r.json", "--resume", "--workers", 0)
    line = input_error(result)
    assert "cannot write" in line and "r.json: File too large; the results are in the table above" in line
    assert table(result)[0][3] == "360"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"] and (tmp_path / "r.json").read_text() == before


@pytest.mark.full
def test_full_disk_on_stdout_is_reported_on_one_line(program):
    for args in (["scripts/validate.py"], ["-m", "res2net_zoo", "list"]):
        command = " ".join(f"'{word}'" for word in (sys.executable, *args))
        result = program("-c", f"import os; os._exit(os.system({command + ' > /dev/full'!r}) >> 8)")
        assert "cannot write the output: No space left on device" in input_error(result)


def test_warning_about_training_images(in_process, tmp_path):
    images = save_images(tmp_path / "digits", [str(i) for i in range(10)], 2)
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    card = (folder / "README.md").read_text().replace("split: validation", "split: train/held-out-0.5-0")
    (folder / "README.md").write_text(card)
    args = ["--model", f"local-dir:{folder}", "--data", images]
    result = in_process(VALIDATE, *args)
    assert result.returncode == 0 and "it was trained on images of train of digits" in result.stderr
    assert "of the split train/held-out-0.5-0 (--split)" in result.stderr
    line = input_error(in_process(VALIDATE, *args, "--check"))
    assert "no published accuracy" in line and "of the split train/held-out-0.5-0 (--split)" in line
    assert "trained on" not in in_process(VALIDATE, *args, "--split", "train/held-out-0.5-0").stderr


class TestBadInput:
    """One line with the problem and a hint, exit code 2, and no result."""

    def refused(self, run, tmp_path, *args) -> str:
        output = tmp_path / "results.json"
        line = input_error(run(VALIDATE, *args, "--output", output))
        assert not output.exists()
        return line

    def test_unknown_model(self, in_process, tmp_path):
        line = self.refused(in_process, tmp_path, "--model", "res2net50_26w_5s")
        assert "did you mean" in line and "res2net50_26w_4s" in line

    def test_unknown_tag_and_model_without_weights(self, in_process, tmp_path):
        line = self.refused(in_process, tmp_path, "--model", "res2net50_48w_2s.in22k")
        assert "did you mean res2net50_48w_2s.in1k?" in line
        assert "no published weights" in self.refused(in_process, tmp_path, "--model", "res2net_tiny")

    def test_model_name_that_is_a_path(self, in_process, tmp_path):
        assert "local-dir:" in self.refused(in_process, tmp_path, "--model", "hub/models/res2net_tiny.digits")

    def test_missing_folders(self, in_process, tmp_path):
        assert "no model folder" in self.refused(in_process, tmp_path, "--model", f"local-dir:{tmp_path / 'gone'}")
        assert "there is no folder or file" in self.refused(in_process, tmp_path, "--data", tmp_path / "gone" / "away")
        line = input_error(in_process(VALIDATE, "--output", tmp_path / "gone" / "r.json"))
        assert "create it first" in line

    def test_missing_split(self, in_process, tmp_path):
        line = self.refused(in_process, tmp_path, "--split", "dev_test")
        assert "no split dev_test; it has train, validation" in line

    def test_fewer_classes_than_labels(self, in_process, tmp_path):
        images = save_images(tmp_path / "images", [f"class {c}" for c in "abcdefghijk"], 1)
        line = self.refused(in_process, tmp_path, "--data", images)
        assert "11 classes and the model only 10" in line

    @pytest.mark.first_case
    @pytest.mark.parametrize("place", [b"1/\xff.jpg", b"\xfe/0.jpg"])
    def test_names_that_are_not_utf8(self, in_process, tmp_path, place):
        images = save_images(tmp_path / "images", ["0", "1"], 1)
        path = Path(os.fsdecode(os.fsencode(images) + b"/" + place))
        path.parent.mkdir(exist_ok=True)
        shutil.copy(images / "1" / "0.jpg", path)
        line = self.refused(in_process, tmp_path, "--data", images)
        assert "is not UTF-8; rename it" in line and r"\udcf" in line

    def test_a_folder_that_is_not_utf8(self, in_process, tmp_path):
        images = save_images(tmp_path / os.fsdecode(b"\xff"), ["0", "1"], 1)
        assert "is not UTF-8; rename it" in self.refused(in_process, tmp_path, "--data", images)
        for options in (["--data", images, "--output", tmp_path / "m"], ["--output", images / "m"]):
            line = input_error(in_process("scripts/finetune.py", *options))
            assert "is not UTF-8; rename it" in line

    def test_label_out_of_range(self, in_process, tmp_path):
        import datasets

        rows = datasets.load_dataset("parquet", data_files=str(SHIPPED_DATA / "data/validation-*"), split="train")
        labels = [*rows["label"][:9], 10]
        rows = rows.select(range(10)).remove_columns("label").add_column("label", labels)
        rows.to_parquet(tmp_path / "val.parquet")
        line = self.refused(in_process, tmp_path, "--data", tmp_path / "val.parquet")
        assert "image 9" in line and "label 10 is out of range" in line

    def test_corrupt_image(self, in_process, tmp_path):
        images = save_images(tmp_path / "images", ["0", "1"], 3)
        (images / "1" / "0.jpg").write_bytes((images / "1" / "0.jpg").read_bytes()[:300])
        line = self.refused(in_process, tmp_path, "--data", images)
        assert "image 3 (" in line and "1/0.jpg" in line and "--skip-corrupt" in line

    def test_truncated_and_foreign_weights(self, in_process, tmp_path):
        folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "cut")
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 2])
        assert "not a complete safetensors" in self.refused(in_process, tmp_path, "--model", f"local-dir:{folder}")
        weights.write_bytes(b"not safetensors at all")
        assert "not a complete safetensors" in self.refused(in_process, tmp_path, "--model", f"local-dir:{folder}")
        weights.write_bytes(content)
        config = (folder / "config.json").read_text().replace("res2net_tiny", "res2net50_26w_4s")
        (folder / "config.json").write_text(config)
        assert "cannot load" in self.refused(in_process, tmp_path, "--model", f"local-dir:{folder}")
        (folder / "config.json").write_text("{")
        assert "cannot load" in self.refused(in_process, tmp_path, "--model", f"local-dir:{folder}")

    @pytest.mark.first_case
    @pytest.mark.parametrize(
        ("key", "value"),
        [("input_size", "abc"), ("mean", "abc"), ("mean", [0.5] * 4), ("crop_pct", "x"), ("interpolation", "wild")],
    )
    def test_config_with_wrong_values(self, in_process, tmp_path, key, value):
        folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"][key] = value
        (folder / "config.json").write_text(json.dumps(config))
        assert "cannot load" in self.refused(in_process, tmp_path, "--model", f"local-dir:{folder}")

    def test_invalid_label_names(self, in_process, tmp_path):
        folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        names = config["label_names"]
        for value in ([["a"]], "abc", ["one more", *names], names[1:], [*names[1:], names[1]]):
            (folder / "config.json").write_text(json.dumps(config | {"label_names": value}))
            assert "label_names" in self.refused(in_process, tmp_path, "--model", f"local-dir:{folder}")

    @pytest.mark.full
    def test_files_with_wrong_content(self, program, tmp_path):
        """Two libraries also log the errors that they raise; there must be only one line."""
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        (tmp_path / "val.parquet").write_text(pointer)
        assert "val.parquet" in self.refused(program, tmp_path, "--data", tmp_path / "val.parquet")
        folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").mkdir()
        assert "cannot load" in self.refused(program, tmp_path, "--model", f"local-dir:{folder}")

    def test_unwritable_output_is_refused_before_work(self, in_process, tmp_path):
        assert "is a folder" in input_error(in_process(VALIDATE, "--output", tmp_path))
        assert "is a folder" in input_error(in_process(VALIDATE, "--output", ""))
        assert "cannot write into /proc" in input_error(in_process(VALIDATE, "--output", "/proc/results.json"))

    def test_pickles_run_no_code(self, in_process, tmp_path):
        import pickle

        class Attack:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "was_here",))

        folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "pickled")
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Attack()}))
        assert "it would call pathlib.Path.touch" in self.refused(
            in_process, tmp_path, "--model", f"local-dir:{folder}"
        )
        assert not (tmp_path / "was_here").exists()

    def test_no_network(self, in_process, tmp_path):
        """Offline mode replaces a missing network: the same error without retries."""
        line = self.refused(in_process, tmp_path, "--model", "res2net50_26w_4s")
        assert "not reachable" in line and "`hf download timm/res2net50_26w_4s.in1k`" in line
        assert "not reachable" in self.refused(in_process, tmp_path, "--model", "hf-hub:some/model")
        assert "reach" in self.refused(in_process, tmp_path, "--data", "some/data")

    def test_unreachable_hub(self, in_process, monkeypatch, hub):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert "not reachable" in input_error(in_process(VALIDATE, "--model", "hf-hub:some/model"))

    def test_file_truncated_during_streaming(self, in_process, tmp_path):
        """A Parquet file with a valid footer and a damaged middle."""
        import datasets

        rows = datasets.load_dataset("parquet", data_files=str(SHIPPED_DATA / "data/validation-*"), split="train")
        path = tmp_path / "val.parquet"
        rows.to_parquet(path, batch_size=60)
        content = bytearray(path.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 4000] = b"\xff" * 4000
        path.write_bytes(content)
        line = self.refused(in_process, tmp_path, "--data", path, "--streaming")
        assert "stream" in line

    def test_wrong_options(self, in_process, tmp_path):
        assert "needs --output" in input_error(in_process(VALIDATE, "--resume"))
        assert "--batch-size" in input_error(in_process(VALIDATE, "--batch-size", "0"))
        for tolerance in ("-1", "nan"):
            assert "is not 0 or more" in input_error(in_process(VALIDATE, "--tolerance", tolerance))
        for content in ('{"not": "results"}', "{}", "[1]", '[{"model": "x"}]', "half of"):
            (tmp_path / "r.json").write_text(content)
            line = input_error(in_process(VALIDATE, "--resume", "--output", tmp_path / "r.json"))
            assert "was not written by this program" in line or "is not JSON" in line
            assert (tmp_path / "r.json").read_text() == content

    @pytest.mark.full
    def test_two_processes_print_one_error_line(self, program, tmp_path):
        """Only the second process reads the image; both stop, and one line is printed."""
        images = save_images(tmp_path / "images", ["0", "1"], 3)
        (images / "1" / "0.jpg").write_bytes(b"")
        result = program(VALIDATE, "--data", images, processes=2)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.returncode != 0
        assert len(lines) == 1 and "image 3 (" in lines[0]


@pytest.mark.first_case
@pytest.mark.parametrize("streaming", [False, True])
def test_corrupt_images_can_be_skipped(in_process, tmp_path, streaming):
    images = save_images(tmp_path / "images", ["0", "1"], 5)
    for name in ("0/1.jpg", "1/3.jpg"):
        (images / name).write_bytes(b"\xff\xd8 broken")
    args = ["--data", images, "--skip-corrupt", "--output", tmp_path / "r.json"]
    result = in_process(VALIDATE, *args, *(["--streaming"] if streaming else []))
    assert result.returncode == 1
    measured = results(tmp_path / "r.json")[0]
    assert (measured["samples"], measured["skipped"]) == (8, 2)
    assert "2 corrupt images skipped" in result.stderr and "0/1.jpg" in result.stderr and "1/3.jpg" in result.stderr


def test_other_models_are_measured_after_a_failure(in_process, tmp_path):
    output = tmp_path / "r.json"
    args = ["--model", SHIPPED, "res2net_nonsense", f"local-dir:{copy_with_card(tmp_path, 50.0)}", "--output", output]
    result = in_process(VALIDATE, *args)
    assert "res2net_nonsense" in input_error(result)
    assert [r["passed"] for r in results(output)] == [True, False]
    again = in_process(VALIDATE, *args, "--resume")
    assert again.returncode == 2 and again.stdout.count("is already done") == 2
    assert len(results(output)) == 2


@pytest.mark.full
def test_resume_depends_on_all_options(in_process, tmp_path):
    """Resuming keeps a result only for the same options, and checks only the requested models."""
    images = save_images(tmp_path / "images", ["0", "1"], 2)
    wrong = f"local-dir:{copy_with_card(tmp_path, 99.5)}"
    args = ["--output", tmp_path / "r.json", "--resume"]
    assert in_process(VALIDATE, "--model", wrong, *args, "--check", "--tolerance", "1").returncode == 0
    stricter = in_process(VALIDATE, "--model", wrong, *args, "--check")
    assert "is already done" in stricter.stdout and stricter.returncode == 1
    assert results(tmp_path / "r.json")[0]["passed"] is False
    shipped = in_process(VALIDATE, *args, "--check")
    assert shipped.returncode == 0 and len(table(shipped)) == 1
    other = in_process(VALIDATE, "--data", images, *args)
    assert "is already done" not in other.stdout
    skipping = in_process(VALIDATE, "--data", images, *args, "--skip-corrupt")
    assert "is already done" not in skipping.stdout
    assert len(results(tmp_path / "r.json")) == 4


def restore_sigint() -> None:
    """Restore the SIGINT handler, because background jobs of a shell ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.full
def test_interruption_by_ctrl_c(tmp_path):
    images = save_images(tmp_path / "images", [str(i) for i in range(10)], 60)
    args = [VALIDATE, "--model", SHIPPED, "local-dir:hub/models/res2net_tiny.digits", "--data", str(images)]
    args += ["--batch-size", "1", "--workers", "0", "--output", str(tmp_path / "r.json")]
    process = subprocess.Popen(
        [sys.executable, *args],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_sigint,
    )
    while not (tmp_path / "r.json").exists():  # the first model is done, the second in progress
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    lines = [
        line for line in stderr.splitlines() if line.strip() and " elapsed" not in line
    ]  # progress on a slow machine
    assert lines == ["error: interrupted"]


@pytest.mark.full
def test_resume_after_sigkill(tmp_path):
    """After kill -9 between two models, no result is lost and none is measured twice."""
    images = save_images(tmp_path / "images", [str(i) for i in range(10)], 40)
    slow = shutil.copytree(SHIPPED_MODEL, tmp_path / "slow")
    output = tmp_path / "r.json"
    args = [
        "--model",
        SHIPPED,
        f"local-dir:{slow}",
        "--data",
        str(images),
        "--batch-size",
        "1",
        "--output",
        str(output),
    ]
    process = subprocess.Popen([sys.executable, VALIDATE, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not output.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results(output)
    assert len(before) == 1
    again = subprocess.run([sys.executable, VALIDATE, *args, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is already done") == 1
    assert results(output)[0] == before[0] and len(results(output)) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"images", "slow", "r.json"}


class TestImageNet:
    """The labels of the ImageNet benchmarks, on generated images in the original layouts."""

    def test_imagenet_a_chooses_among_its_200_classes(self, in_process, imagenet_folder, tmp_path):
        images = save_images(tmp_path / "imagenet-a", subset_synsets("imagenet-a"), 1)
        args = ["--model", f"local-dir:{imagenet_folder}", "--data", images, "--output"]
        in_process(VALIDATE, *args, tmp_path / "a.json")
        measured = results(tmp_path / "a.json")[0]
        assert (measured["benchmark"], measured["samples"]) == ("imagenet-a", 200)
        # With an additional folder it is not ImageNet-A, and all 1000 classes are predicted.
        save_images(images, [next(s for s in imagenet_synsets() if s not in subset_synsets("imagenet-a"))], 1)
        in_process(VALIDATE, *args, tmp_path / "b.json")
        other = results(tmp_path / "b.json")[0]
        assert (other["benchmark"], other["samples"]) == (None, 201)
        assert measured["correct5"] > other["correct5"]  # among 200 instead of 1000 classes

    @pytest.mark.full
    def test_imagenet_v2_uses_numeric_folder_names(self, in_process, imagenet_folder, tmp_path):
        images = save_images(tmp_path / "v2", [str(i) for i in range(1000)], 1)
        args = ["--model", f"local-dir:{imagenet_folder}", "--data", images, "--batch-size", "100"]
        result = in_process(VALIDATE, *args, "--benchmark", "imagenet-v2", "--output", tmp_path / "r.json")
        assert result.returncode == 0, result.stderr
        assert results(tmp_path / "r.json")[0]["samples"] == 1000

    @pytest.mark.full
    def test_imagenet_real_uses_labels_by_file_name(self, in_process, imagenet_folder, tmp_path):
        images = save_images(tmp_path / "all" / "val", ["n01440764"], 30)
        for i, path in enumerate(sorted((images / "n01440764").iterdir()), start=1):
            path.rename(path.with_name(f"ILSVRC2012_val_{i:08d}.JPEG"))
        args = ["--model", f"local-dir:{imagenet_folder}", "--data", images, "--benchmark", "imagenet-real"]
        result = in_process(VALIDATE, *args, "--output", tmp_path / "r.json")
        assert result.returncode == 0, result.stderr
        labelled = [name for name in list(real_labels())[:30] if real_labels()[name]]
        assert results(tmp_path / "r.json")[0]["samples"] == len(labelled) < 30

    def test_benchmark_needs_a_model_of_1000_classes(self, in_process):
        line = input_error(in_process(VALIDATE, "--benchmark", "imagenet-1k"))
        assert "imagenet-1k needs a model with ImageNet's 1000 classes, this one has 10" in line


@pytest.mark.full
def test_model_and_data_from_the_hub(program, tmp_path):
    """Model and data by their Hub ids, with the real clients over HTTP."""
    repositories = {"models/zoo/digits-model": SHIPPED_MODEL, "datasets/zoo/digits": SHIPPED_DATA}
    with serve(repositories) as hub:
        hub.tag("models/zoo/digits-model", "v1.0")
        requests = hub.requests
        env = dict(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"))
        args = ["--model", "hf-hub:zoo/digits-model@v1.0", "--data", "zoo/digits", "--check"]
        result = program(VALIDATE, *args, "--output", tmp_path / "r.json", **env)
        assert result.returncode == 0, result.stderr
        assert results(tmp_path / "r.json")[0]["samples"] == 360
        assert not any("train-00000" in request for request in requests)
        # Weights, config and card are those of the revision.
        files = [r for r in requests if "digits-model/resolve" in r]
        assert files and all("resolve/v1.0/" in r or hub.sha("models/zoo/digits-model") in r for r in files), files
        line = input_error(program(VALIDATE, "--model", "hf-hub:zoo/nothing", **env))
        assert "there is no model zoo/nothing on the Hub" in line


@pytest.mark.full
@pytest.mark.parametrize("streaming", [False, True])
def test_image_files_from_the_hub(program, tmp_path, streaming):
    """A dataset of image files, with a dot in its name, which are read over the network when streaming."""
    save_images(tmp_path / "repository" / "validation", ["0", "1"], 4)
    with serve({"datasets/zoo/images.v2": tmp_path / "repository"}) as hub:
        env = dict(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"))
        args = ["--data", "zoo/images.v2", "--output", tmp_path / "r.json", *(["--streaming"] if streaming else [])]
        result = program(VALIDATE, *args, **env)
        assert result.returncode == 0, result.stderr
        assert results(tmp_path / "r.json")[0]["samples"] == 8


def test_skipped_files_in_class_folders_are_reported(in_process, tmp_path):
    save_images(tmp_path / "val", ["crash test", "wheel"], 2)
    save_images(tmp_path / "val" / "wheel", ["@eaDir"], 3)
    (tmp_path / "val" / "metadata.txt").write_text("by a camera")
    (tmp_path / "val" / "wheel" / "up").symlink_to(tmp_path / "val")
    result = in_process(VALIDATE, "--data", tmp_path / "val", "--output", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    assert results(tmp_path / "r.json")[0]["samples"] == 4
    line = result.stderr.splitlines()[0]
    assert line.startswith(f"warning: skipped in {tmp_path / 'val'}: hidden or system folders: 1 (such as ")
    assert "links to parent folders or folders already included: 1 (such as " in line


@pytest.mark.first_case
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("kind", "label"), [(pa.int64(), 2**40), (pa.uint64(), 2**63 + 5), (pa.int64(), -3)])
def test_labels_out_of_range(in_process, tmp_path, streaming, kind, label):
    image = {"bytes": next(save_images(tmp_path, ["a"], 1).rglob("*.jpg")).read_bytes(), "path": None}
    table = pa.table({"image": [image] * 2, "label": pa.array([0, label], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "val.parquet")
    line = input_error(in_process(VALIDATE, "--data", tmp_path / "val.parquet", *["--streaming"] * streaming))
    limit = "9" if streaming else "999999 at most"  # labels of files are checked before the model is loaded
    assert "image 1" in line and f"label {label}" in line and f"labels go from 0 to {limit}" in line


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_several_image_formats_on_two_processes(program, tmp_path, streaming):
    images = sorted(save_images(tmp_path, ["a"], 8).rglob("*.jpg"))
    for shard in range(2):
        with tarfile.open(tmp_path / f"val-{shard}.tar", "w") as tar:
            for i, path in enumerate(images):
                if i > 5:
                    Image.open(path).save(path.with_suffix(".png"))
                    path = path.with_suffix(".png")
                tar.add(path, f"{i}{path.suffix}")
                label = tarfile.TarInfo(f"{i}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(b"1"))
    args = ["--data", tmp_path / "val-*.tar", "--output", tmp_path / "r.json", *["--streaming"] * streaming]
    result = program(VALIDATE, *args, processes=2)
    assert result.returncode == 0, result.stderr
    assert results(tmp_path / "r.json")[0]["samples"] == 16


@pytest.mark.parametrize("path", ["scripts/validate.py", "scripts/finetune.py", "hub/datasets/make_digits.py"])
def test_help_and_option_errors_are_fast(path):
    for args, code in ((["--help"], 0), (["--frobnicate"], 2)):
        before = os.times().children_user
        result = subprocess.run([sys.executable, path, *args], cwd=ROOT, capture_output=True, text=True)
        assert os.times().children_user - before < 1  # CPU seconds, independent of other load
        assert result.returncode == code
    assert len(result.stderr.splitlines()) == 1 and "--frobnicate" in result.stderr
