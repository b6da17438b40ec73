"""`export --precision int8`, its card, and `verify` of exported files."""

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

from res2net_zoo.data.images import decode
from res2net_zoo.data.labels import Classes
from res2net_zoo.inference import export, int8_export
from res2net_zoo.inference.calibration import Selection, calibration_and_held_out, load_images
from res2net_zoo.inference.exported_file import read
from res2net_zoo.inference.file_verification import verify
from res2net_zoo.inference.quantization import float_layers, quantize_onnx, quantize_openvino
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.provenance import of_folder
from tests.conftest import SHIPPED_DATA, SHIPPED_MODEL, SMALL, full_disk, input_error, read_tree, spread

pytestmark = pytest.mark.first_case

EXPORT, VERIFY = "scripts/export.py", "hub/verify.py"
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


@pytest.fixture(scope="module")
def tiny() -> Any:
    return timm.create_model(f"local-dir:{SHIPPED_MODEL}", pretrained=True).eval()


@pytest.fixture(scope="module")
def digits() -> tuple[Selection, Selection]:
    return calibration_and_held_out(str(SHIPPED_DATA), 32)


@pytest.fixture(scope="module")
def few(digits) -> tuple[Selection, Selection]:
    """Images for calibration and held-out ones, fewer than by default."""
    return Selection(digits[0].source, digits[0].indices[::8]), Selection(digits[1].source, digits[1].indices[:100])


def facts_of(model: Any) -> dict[str, str]:
    return export.export_metadata(model, f"local-dir:{SHIPPED_MODEL}", origin=of_folder(SHIPPED_MODEL))


@pytest.fixture(scope="module")
def graph(tiny) -> onnx.ModelProto:
    return export.to_onnx(tiny, torch.zeros(2, 3, 64, 64))


def exports(patch: pytest.MonkeyPatch, graph: onnx.ModelProto) -> None:
    """Replace the export of the shipped model by a copy of its graph."""

    def to_onnx(*args: object, facts: dict[str, str] | None = None, **kwargs: object) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(graph)
        export.set_metadata(copy, facts or {})
        return copy

    for module in (export, int8_export):
        patch.setattr(module, "to_onnx", to_onnx)


@pytest.fixture
def quick(monkeypatch, graph) -> None:
    exports(monkeypatch, graph)


@pytest.fixture(scope="module")
def made(tmp_path_factory, graph, tiny, few) -> dict[str, Path]:
    """Quantized files of each format, each in a folder with its card, and a float one."""
    files = {}
    with pytest.MonkeyPatch.context() as patch:
        exports(patch, graph)
        for export_format, suffix in SUFFIXES.items():
            files[export_format] = tmp_path_factory.mktemp(export_format) / f"digits-int8{suffix}"
            int8_export.export_int8(tiny, *few, files[export_format], export_format, facts=facts_of(tiny))
        files["float"] = tmp_path_factory.mktemp("float") / "digits.onnx"
        export.export(tiny, load_images(tiny, few[0])[:2], files["float"], "onnx", facts=facts_of(tiny))
    return files


@pytest.fixture
def copied(made, tmp_path):
    """Copies the files of one format into an empty folder, and returns the main one."""

    def copy(export_format: str) -> Path:
        shutil.copytree(made[export_format].parent, tmp_path / "copy")
        return tmp_path / "copy" / made[export_format].name

    return copy


def failed(file: Path) -> list[str]:
    return [check.what for check in verify(file) if check.passed is False]


def accuracy(file: Path, images: np.ndarray, labels: np.ndarray) -> float:
    run = export.run_onnx(file) if file.suffix == ".onnx" else export.run_openvino(file)
    right = sum((run(images[i : i + 1]).argmax(1) == labels[i : i + 1]).sum() for i in range(len(images)))
    return 100 * float(right) / len(images)


@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_the_shipped_model(in_process, tiny, digits, tmp_path, export_format):
    output = tmp_path / f"digits-int8{SUFFIXES[export_format]}"
    result = in_process(EXPORT, "--precision", "int8", "--format", export_format, "--output", output)
    assert (result.returncode, result.stderr) == (0, "")
    weights = {"digits-int8.bin"} if export_format == "openvino" else set()
    assert {path.name for path in tmp_path.iterdir()} == {output.name, f"{output.name}.md"} | weights
    printed = dict(re.split(r"(?<=\S) {1,}", line, maxsplit=1) for line in result.stdout.splitlines())
    assert "int8)" in printed["file"] and "300 of 1437 images of digits, split train" in printed["calibrated"]
    found = re.search(r"float32 ([\d.]+) %, int8 ([\d.]+) %: loss (-?[\d.]+) points", result.stdout)
    assert found is not None
    before, after, loss = map(float, found.groups())
    assert loss <= 0.5 and before - after == pytest.approx(loss, abs=1e-3)

    # Measured again, one image at a time, on the images that did not calibrate.
    labels = np.array([row["label"] for row in digits[1].source.rows])
    assert len(labels) == 360 and accuracy(output, load_images(tiny, digits[1]).numpy(), labels) == after
    facts = read(output).metadata
    assert {facts["precision"], facts["top1_int8"]} == {"int8", f"{after:.3f}"}
    assert (facts["calibration_images"], facts["evaluation_images"]) == ("300", "360")
    card = ModelCard.load(output.with_name(f"{output.name}.md"))
    assert card.data.license == "apache-2.0" and "int8" in card.text.split("\n## ")[0]
    for text in (f"{after:.3f}", "res2net_tiny.digits", "300 images of digits, split train", "licence apache-2.0"):
        assert text in card.text
    assert card.data.eval_results[0].metric_value == after and str(tmp_path) not in str(card)
    result = in_process(VERIFY, output)
    assert result.returncode == 0 and "| int8, 38 of 38 layers" in result.stdout and "FAILED" not in result.stdout


@pytest.mark.full
@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_fixed_batch_and_size(in_process, tmp_path, export_format):
    output = tmp_path / f"m-INT8{SUFFIXES[export_format]}"
    args = ["--format", export_format, "--output", output, "--batch-size", 3, "--img-size", 48]
    result = in_process(EXPORT, "--precision", "int8", *args)
    assert result.returncode == 0, result.stderr
    run = export.run_onnx(output) if export_format == "onnx" else export.run_openvino(output)
    assert run(np.zeros((3, 3, 48, 48), np.float32)).shape == (3, 10)
    assert json.loads(read(output).metadata["input_size"]) == [3, 48, 48]
    if export_format == "onnx":
        assert onnxruntime.InferenceSession(output).get_inputs()[0].shape == [3, 3, 48, 48]


def blunted(proto: onnx.ModelProto, images: torch.Tensor, half_range: bool = False) -> onnx.ModelProto:
    """Quantize a model, and make it prefer the digit 3."""
    made = quantize_onnx(proto, images, half_range)
    bias = next(tensor for tensor in made.graph.initializer if tensor.name == "fc.bias_quantized")
    values = np.where(np.arange(10) == 3, 2**24, onnx.numpy_helper.to_array(bias)).astype(np.int32)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    return made


def test_a_large_loss_is_not_written(in_process, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(int8_export, "quantize_onnx", blunted)
    output = tmp_path / "m-int8.onnx"
    args = ["--precision", "int8", "--format", "onnx", "--output", output]
    result = in_process(EXPORT, *args)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert re.search(r"int8 loses [\d.]+ points of top-1 on 360 images .*more than the limit of 1; .*not written", line)
    assert not list(tmp_path.iterdir())
    result = in_process(EXPORT, *args, "--force")
    assert result.returncode == 0 and result.stderr.startswith("warning: int8 loses")
    assert "**Written by `--force`: int8 loses" in (tmp_path / "m-int8.onnx.md").read_text()
    assert "more than the limit of 1" in read(output).metadata["warning"] and failed(output) == []
    assert "| warning " in in_process(VERIFY, output).stdout


def test_the_limit_is_inclusive(tmp_path):
    ten = Classes(10)
    for loss, limit, fits in ((1, 1, True), (2, 1, False), (0, 0, True), (1, 0, False), (-1, 0, True)):
        measured = int8_export.Measured(100, {"float32": (90, 99), "int8": (90 - loss, 99)}, 90)
        assert measured.loss() == loss
        if fits:
            int8_export.check_loss(measured, ten, limit, False, tmp_path / "m")
        else:
            with pytest.raises(
                export.CheckError, match=rf"int8 loses {loss}\.000 points .* limit of {limit}; .*/m is not"
            ):
                int8_export.check_loss(measured, ten, limit, False, tmp_path / "m")


def test_layers_in_float_are_named(quick, tiny, few, tmp_path, monkeypatch):
    def quantize(proto: onnx.ModelProto, images: torch.Tensor, half_range: bool = False) -> onnx.ModelProto:
        whole = quantize_onnx(proto, images)
        bypassed = next(node for node in whole.graph.node if node.op_type == "Gemm")
        (weight,) = (tensor for tensor in proto.graph.initializer if tensor.name == "fc.weight")
        whole.graph.initializer.append(weight)
        bypassed.input[1] = "fc.weight"
        return whole

    monkeypatch.setattr(int8_export, "quantize_onnx", quantize)
    output = tmp_path / "m-int8.onnx"
    exported = int8_export.export_int8(tiny, *few, output, "onnx", facts=facts_of(tiny))
    assert exported.file.float_layers == ["fc"] == float_layers(onnx.load(output))
    assert json.loads(exported.file.metadata["float_layers"]) == ["fc"]
    assert re.search(r"layers in float +\| `fc` +\|", exported.card.read_text())
    assert failed(output) == []


@pytest.mark.full
@pytest.mark.parametrize("name", ["seres2next29_6c_24w_4s", "res2next50", "dla60_res2net"])
def test_the_file_shows_which_layers_are_in_float(tmp_path, name):
    model = spread(timm.create_model(name, num_classes=6, **SMALL[name])).eval()
    coarse = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    proto = export.to_onnx(model, images[:2])
    quantized = quantize_onnx(proto, images)
    onnx.save(quantized, tmp_path / "m.onnx")
    network = quantize_openvino(export.openvino_core().read_model(proto.SerializeToString()), images)
    export.save_ir(network, tmp_path / "m.xml", "float32")
    found = read(tmp_path / "m.onnx"), read(tmp_path / "m.xml")
    assert [file.precision for file in found] == ["int8", "int8"] and len({len(file.layers) for file in found}) == 1
    assert [file.float_layers for file in found] == [float_layers(quantized), float_layers(network)]
    assert bool(found[1].float_layers) == name.startswith("se")  # NNCF leaves the gates in float


@pytest.mark.full
def test_accuracy_at_chance_level_is_refused(in_process, tiny_folder, tmp_path):
    args = ["--precision", "int8", "--format", "onnx", "--output", tmp_path / "m-int8.onnx"]
    result = in_process(EXPORT, "--model", f"local-dir:{tiny_folder}", "--calibrate", SHIPPED_DATA, *args)
    assert result.returncode == 1 and "no better than chance" in result.stderr and not list(tmp_path.iterdir())


def save_digits(folder: Path, per_class: int, names: Sequence[str] = "0123456789") -> Path:
    """Write digits into class folders."""
    rows = calibration_and_held_out(str(SHIPPED_DATA), 32)[1].source.rows
    for name in names:
        (folder / name).mkdir(parents=True)
        chosen = [row for row in rows if str(row["label"]) == name[-1]][:per_class]
        for i, row in enumerate(chosen):
            decode(row["image"]["bytes"], "L").save(folder / name / f"{i}.png")
    return folder


@pytest.mark.full
def test_one_folder_calibrates_and_measures(in_process, tmp_path):
    data = save_digits(tmp_path / "data", 8)
    output = tmp_path / "m-int8.onnx"
    result = in_process(EXPORT, "--precision", "int8", "--format", "onnx", "--output", output, "--calibrate", data)
    assert result.returncode == 0, result.stderr
    assert "the loss is measured on only 40 images, each of 2.5 points" in result.stderr
    assert "on 40 of 80 images of data, split train" in result.stdout


@pytest.mark.full
def test_dark_images_are_reported(in_process, quick, tmp_path):
    data = save_digits(tmp_path / "data", 6)
    for path in data.rglob("*.png"):
        with Image.open(path) as image:
            image.point(lambda value: value // 8).save(path)
    args = ["--precision", "int8", "--format", "onnx", "--output", tmp_path / "m-int8.onnx", "--calibrate", data]
    result = in_process(EXPORT, *args)
    assert result.returncode == 1, result.stderr
    assert re.match(r"warning: the pixels of the calibration images are from .* \(--calibrate\)\n", result.stderr)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--output", "m.onnx"], "the name of a quantized file must contain int8; use m-int8.onnx (--output)"),
        (["--precision", "float32"], "m-int8.onnx names a quantized file, but the weights are in float32"),
        (["--model", "res2net_tiny"], "--precision int8 needs --calibrate DATA"),
        (["--precision", "float32", "--max-loss", 2], "--max-loss needs --precision int8"),
        (["--precision", "float32", "--calibrate", "x"], "--calibrate needs --precision int8"),
        (["--precision", "float32", "--force"], "--force needs --precision int8"),
        (["--max-loss", -1], "--max-loss"),
        (["--images", "README.md"], "--images"),
        (["--calibrate", "no/such"], "there is no folder or file no/such"),
    ],
)
def test_bad_options(in_process, args, words):
    before = set(Path.cwd().iterdir())
    options = ["--precision", "int8", "--format", "onnx", "--output", "m-int8.onnx"]
    line = input_error(in_process(EXPORT, *options, *args))
    assert words in line and set(Path.cwd().iterdir()) == before


@pytest.mark.parametrize("kind", ["few", "empty", "unlabelled", "no labels", "other classes", "noise", "corrupt"])
def test_bad_images(in_process, tmp_path, kind):
    data = tmp_path / "data"
    if kind == "empty":
        data.mkdir()
    elif kind == "unlabelled":
        save_digits(tmp_path / "labelled", 4)
        data.mkdir()
        for i, path in enumerate((tmp_path / "labelled").rglob("*.png")):
            path.rename(data / f"{i}.png")
    else:
        save_digits(data, 3 if kind == "few" else 4, [*"0123456789", *["x0", "y1"] * (kind == "other classes")])
    if kind == "noise":
        rng = np.random.default_rng(0)
        for path in data.rglob("*.png"):
            Image.fromarray(rng.integers(0, 256, (73, 73), dtype=np.uint8)).save(path)
    if kind == "corrupt":
        next(data.rglob("7/*.png")).write_bytes(b"no image")
    words = {
        "few": "has 30 images in split train; at least 33 are needed",
        "empty": "data",
        "unlabelled": "the accuracy is measured on labelled images, such as a folder for each class (--label-column)",
        "no labels": "image 1 of data, split train: its label is missing (--calibrate)",
        "other classes": "the data has 12 classes and the model only 10",
        "noise": "random noise",
        "corrupt": "is corrupt (not an image of a supported format)",
    }[kind]
    if kind == "no labels":
        rows = calibration_and_held_out(str(SHIPPED_DATA), 32)[0].source.rows.select(range(80))
        shutil.rmtree(data)
        data.mkdir()
        labels = [-1] * 80
        rows.remove_columns("label").add_column("label", labels).to_parquet(data / "train.parquet")
    output = tmp_path / "m-int8.onnx"
    args = ["--precision", "int8", "--format", "onnx", "--output", output, "--calibrate", data]
    assert words in input_error(in_process(EXPORT, *args)) and not output.exists()


@pytest.mark.full
def test_model_without_classifier(tmp_path, digits):
    model = timm.create_model("res2net_tiny", num_classes=0)
    with pytest.raises(InputError, match="has no classifier"):
        int8_export.export_int8(model, *digits, tmp_path / "m-int8.onnx", "onnx", facts={})


@pytest.mark.full
def test_a_processor_without_int8_instructions(quick, tiny, few, tmp_path, monkeypatch, capsys):
    ranges = []
    monkeypatch.setattr(int8_export, "has_int8_instructions", lambda: False)
    monkeypatch.setattr(
        int8_export, "quantize_onnx", lambda *args, half_range: ranges.append(half_range) or quantize_onnx(*args)
    )
    exported = int8_export.export_int8(tiny, *few, tmp_path / "m-int8.onnx", "onnx", facts=facts_of(tiny))
    assert "is hardly faster" in capsys.readouterr().err and ranges == [True]
    assert exported.file.metadata["processor"].endswith("without int8 instructions")


@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_file_and_card_are_replaced_together(quick, copied, tiny, few, monkeypatch, export_format):
    file = copied(export_format)
    before = read_tree(file.parent)
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.parent != file.parent and target == file:  # the last step: the main file
            monkeypatch.undo()
            raise OSError("no more")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match=r"cannot write .*no more"):
        int8_export.export_int8(tiny, *few, file, export_format, facts=facts_of(tiny))
    assert read_tree(file.parent) == before


@pytest.mark.full
@pytest.mark.parametrize("export_format", ["openvino", "onnx"])
def test_full_disk(in_process, quick, copied, export_format):
    file = copied(export_format)
    before = read_tree(file.parent)
    with full_disk(100_000):
        line = input_error(in_process(EXPORT, "--precision", "int8", "--format", export_format, "--output", file))
    assert "cannot" in line and read_tree(file.parent) == before


def test_an_unrelated_file_is_kept(in_process, tmp_path):
    (tmp_path / "m-int8.onnx.md").write_text("mine")
    args = ["--precision", "int8", "--format", "onnx", "--output", tmp_path / "m-int8.onnx"]
    assert "m-int8.onnx.md exists without its model" in input_error(in_process(EXPORT, *args))
    assert (tmp_path / "m-int8.onnx.md").read_text() == "mine"


def test_verify_a_float_file(in_process, made, tmp_path):
    result = in_process(VERIFY, made["float"])
    assert result.returncode == 0 and "| float32, 38 layers" in result.stdout
    assert "random initialization, trained, licence apache-2.0" in result.stdout
    assert "SHA-256 of digits.onnx" in result.stdout and "hash of its weights is unknown" in result.stdout
    # Of an earlier version, which did not record the precision.
    proto = onnx.load(made["float"])
    (entry,) = (entry for entry in proto.metadata_props if entry.key == "precision")
    proto.metadata_props.remove(entry)
    onnx.save(proto, tmp_path / "old.onnx")
    assert failed(tmp_path / "old.onnx") == []


def test_a_quantized_file_never_passes_for_a_float_one(copied):
    file = copied("onnx")
    proto = onnx.load(file)
    (entry,) = (entry for entry in proto.metadata_props if entry.key == "precision")
    entry.value = "float32"
    onnx.save(proto, file)
    assert failed(file) == ["precision", "SHA-256 of digits-int8.onnx", "card"]
    proto.metadata_props.remove(entry)
    onnx.save(proto, file)
    assert failed(file) == ["precision", "SHA-256 of digits-int8.onnx", "card"]
    renamed = file.with_name("digits.onnx")
    file.rename(renamed)
    assert failed(renamed) == ["precision", "name"]


def test_a_float_file_never_passes_for_a_quantized_one(copied, made):
    file = copied("onnx")
    shutil.copy(made["float"], file)
    assert failed(file) == ["name", "SHA-256 of digits-int8.onnx", "card"]
    proto = onnx.load(file)
    (entry,) = (entry for entry in proto.metadata_props if entry.key == "precision")
    entry.value = "int8"
    onnx.save(proto, file)
    assert "precision" in failed(file)


@pytest.mark.full
def test_quantized_weights_alone_are_not_int8(made, tmp_path):
    proto = onnx.load(made["float"])
    (weight,) = (tensor for tensor in proto.graph.initializer if tensor.name == "fc.weight")
    values = onnx.numpy_helper.to_array(weight)
    scale = np.float32(np.abs(values).max() / 127)
    proto.graph.initializer.remove(weight)
    proto.graph.initializer.append(onnx.numpy_helper.from_array((values / scale).round().astype(np.int8), "q"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(scale, "s"))
    proto.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["fc.weight"]))
    onnx.save(proto, tmp_path / "w.onnx")
    assert read(tmp_path / "w.onnx").precision == "float32 and int8 weights" and failed(tmp_path / "w.onnx")


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("top1_int8: '100.000'", "top1_int8: '99.000'", ["card"]),
        ("precision: int8", "precision: float32", ["card"]),
        ("license: apache-2.0", "license: mit", ["card"]),
        ("# digits-int8 (int8)", "# digits", ["card"]),
        ("| top-1 (%)  | 100.000 | 100.000 |", "| top-1 (%)  | 100.000 | 100.100 |", ["card"]),
        ("  sha256:\n", "  sha256: 1\n  other:\n", ["SHA-256 of digits-int8.onnx", "card"]),
        ("## Files", "## Own notes\n\nMine.\n\n## Files", []),
        ("---\nlibrary_name", "--\nlibrary_name", ["card"]),
        ("license: apache-2.0", "license: &a [*a]", ["card"]),
    ],
)
def test_card_disagrees(copied, old, new, wrong):
    file = copied("onnx")
    card = file.with_name(f"{file.name}.md")
    text = card.read_text()
    assert old in text
    card.write_text(text.replace(old, new, 1))
    assert failed(file) == wrong


@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_without_card(copied, export_format):
    file = copied(export_format)
    file.with_name(f"{file.name}.md").unlink()
    (card,) = (check for check in verify(file) if check.what == "card")
    assert card.passed is None and failed(file) == []


def test_hostile_files(in_process, copied, tmp_path):
    xml = copied("openvino")
    weights = xml.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert re.search(
        r"digits-int8.bin is truncated, or of another IR: it has [\d,]+ of", input_error(in_process(VERIFY, xml))
    )
    weights.unlink()
    assert "cannot read" in input_error(in_process(VERIFY, xml))
    weights.touch()
    contents = {
        "<!DOCTYPE net [<!ENTITY a 'x'>]><net>&a;</net>": "it has a document type",
        "<net><layers>": "is not a complete OpenVINO IR",
        "<html/>": "it starts with <html> instead of <net>",
        "<net/>": "has no convolution",
        "": "is not a complete OpenVINO IR",
    }
    for content, words in contents.items():
        xml.write_text(content)
        assert words in input_error(in_process(VERIFY, xml)), content
    file = tmp_path / "m.onnx"
    for content, words in ((b"", "it has no graph"), (b"\x80\x04pickle", "is not a complete ONNX file")):
        file.write_bytes(content)
        assert words in input_error(in_process(VERIFY, file))
    assert "there is no file" in input_error(in_process(VERIFY, tmp_path / "no.onnx"))
    assert "is a file, which has no revisions" in input_error(in_process(VERIFY, file, "--revision", "v1"))


def test_hostile_onnx(made, tmp_path):
    content = made["onnx"].read_bytes()
    file = tmp_path / "m-int8.onnx"
    for end in (1, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:end])
        with pytest.raises(InputError, match="is not a complete ONNX file"):
            read(file)
    proto = onnx.load(made["onnx"])
    proto.graph.initializer[5].data_location = onnx.TensorProto.EXTERNAL
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="are in another file, which is not read"):
        read(file)
    proto = onnx.load(made["onnx"])
    proto.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"]))
    onnx.save(proto, file)
    with pytest.raises(InputError, match="has an operation with a graph of its own"):
        read(file)


def test_a_folder_with_a_quantized_file(in_process, copied, tmp_path):
    file = copied("onnx")
    assert "is not a model folder; name one of its exported files" in input_error(in_process(VERIFY, file.parent))
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED_MODEL, folder)
    for path in file.parent.iterdir():
        shutil.copy(path, folder)
    result = in_process(VERIFY, folder)
    assert result.returncode == 0 and re.search(r"digits-int8\.onnx +\| int8, ONNX opset 18", result.stdout)
    card = folder / "digits-int8.onnx.md"
    card.write_text(card.read_text().replace("top1_int8: '100.000'", "top1_int8: '100.100'"))
    result = in_process(VERIFY, folder)
    assert result.returncode == 1 and "1 of " in result.stdout
    line = input_error(in_process("hub/publish.py", folder, "--repo-id", "org/mine", "--dry-run"))
    assert "does not verify: digits-int8.onnx: card: top1_int8 100.100" in line


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files(made, tmp_path, seed):
    """A changed file fails to verify or is refused with one line; a changed card raises no other error."""
    rng = random.Random(seed)
    for _ in range(100):
        main = made[rng.choice(["onnx", "openvino"])]
        for path in main.parent.iterdir():
            shutil.copy(path, tmp_path)
        damaged = tmp_path / rng.choice([main.name, f"{main.name}.md"])
        before = damaged.read_bytes()
        content, at = bytearray(before), rng.randrange(len(before))
        match rng.randrange(3):
            case 0:
                del content[at:]
            case 1:
                content[at : at + 3] = rng.randbytes(3)
            case 2:
                del content[at : at + rng.randrange(1, 2000)]
        damaged.write_bytes(content)
        try:
            problems = failed(tmp_path / main.name)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            assert problems or damaged.suffix == ".md" or bytes(content) == before
