"""Tests of `scripts/export.py`: files run without this package, and match the model or are not written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch

from res2net_zoo import catalog
from res2net_zoo.inference import export
from res2net_zoo.utils.errors import InputError
from tests.conftest import (
    FEW,
    SHIPPED_DATA,
    SHIPPED_MODEL,
    SMALL,
    full_disk,
    input_error,
    read_tree,
    relative_error,
    spread,
)

pytestmark = pytest.mark.first_case

EXPORT = "scripts/export.py"


def images(n: int, size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return timm.create_model(f"local-dir:{SHIPPED_MODEL}", pretrained=True).eval()


@pytest.fixture(scope="module")
def tiny_proto(tiny) -> onnx.ModelProto:
    return export.to_onnx(tiny, images(2, 64))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Six digits, each in a file named after its class."""
    folder = tmp_path_factory.mktemp("digits")
    files = sorted(str(path) for path in SHIPPED_DATA.rglob("*validation*"))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    (folder / "images").mkdir()
    for i in range(6):
        rows[i]["image"].save(folder / "images" / f"{rows[i]['label']}_{i}.png")
    return folder / "images"


@pytest.mark.parametrize("name", SMALL)
def test_runtimes_match_the_model_for_any_batch_size(name):
    model, x = spread(timm.create_model(name, num_classes=6, **SMALL[name])).eval(), images(3, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    proto = export.to_onnx(model, x, facts={"model": name})
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert str(Path(timm.__file__).parent) not in str(proto)  # torch stores paths of source files
    ir = export.openvino_core().read_model(proto.SerializeToString())
    assert str(ir.inputs[0].partial_shape) == "[?,3,32,32]"
    for run in (export.run_onnx(proto, threads=1), export.run_openvino(ir, threads=1)):
        for n in (1, 3):
            with torch.no_grad():
                assert relative_error(torch.from_numpy(run(x[:n].numpy())), model(x[:n])) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.full
@pytest.mark.parametrize("rule", ["timm", "mmdet"])
def test_a_dilated_model_of_the_third_wiring(rule):
    kwargs = dict(output_stride=16, dilation_rule=rule, num_classes=6)
    model = spread(timm.create_model("res2net50_v1d_26w_4s", **FEW, **kwargs)).eval()
    x = images(2, 64)
    proto = export.to_onnx(model, x)
    with torch.no_grad():
        assert relative_error(torch.from_numpy(export.run_onnx(proto, threads=1)(x.numpy())), model(x)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("export_format", export.FORMATS)
@pytest.mark.parametrize("name", catalog.load().architectures)
def test_every_model(name, export_format, tmp_path):
    model = spread(timm.create_model(name)).eval()
    output = tmp_path / f"model{export.FORMATS[export_format]}"
    exported = export.export(model, images(2, catalog.load().architectures[name].input_size[-1]), output, export_format)
    assert exported.error < 1e-4 and exported.same_top1 == 2


# Code of a user without this package, timm and torch.
STANDALONE = """
import json, sys
import numpy as np
from PIL import Image

sys.modules["openvino_telemetry"] = None
model, *images = sys.argv[1:]
if model.endswith(".onnx"):
    import onnxruntime

    session = onnxruntime.InferenceSession(model)
    facts = session.get_modelmeta().custom_metadata_map
    run = lambda x: session.run(None, {"images": x})[0]
else:
    import openvino

    read = openvino.Core().read_model(model)
    facts = read.get_rt_info("res2net_zoo").value
    compiled = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run = lambda x: compiled(x)["logits"]
(_, size, _), mean, std = (json.loads(facts[key]) for key in ("input_size", "mean", "std"))
assert facts["crop_mode"] == "center"
resized = int(size / json.loads(facts["crop_pct"]))
cut = round((resized - size) / 2)
batch = []
for image in images:
    image = Image.open(image).convert(facts["color"])
    image = image.resize((resized, resized), Image.Resampling[facts["interpolation"].upper()])
    pixels = np.asarray(image.crop((cut, cut, cut + size, cut + size)), np.float32) / 255
    batch.append(((pixels - mean) / std).transpose(2, 0, 1).astype(np.float32))
logits = run(np.stack(batch))
assert not {"torch", "timm", "res2net_zoo"} & sys.modules.keys()
names = json.loads(facts["class_names"])
print(json.dumps({"facts": facts, "names": [names[i] for i in logits.argmax(1)], "logits": logits.tolist()}))
"""


@pytest.mark.parametrize("export_format", export.FORMATS)
def test_file_is_self_contained(in_process, tiny, digits, tmp_path, export_format):
    output = tmp_path / f"digits{export.FORMATS[export_format]}"
    result = in_process(EXPORT, "--format", export_format, "--output", output)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {output.name} | (
        {"digits.bin"} if export_format == "openvino" else set()
    )
    printed = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert printed["file"].startswith(str(output)) and ("opset 18" in printed["file"] or "IR 11" in printed["file"])
    assert (printed["input"], printed["output"]) == ("images: batch x 3 x 64 x 64", "logits: batch x 10")
    assert printed["top-1"] == "the same for 16 of 16" and float(printed["error"].split()[0]) < 1e-5

    files = sorted(map(str, digits.iterdir()))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", STANDALONE, str(output), *files]
    alone = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert alone.returncode == 0, alone.stderr
    answer = json.loads(alone.stdout)
    assert answer["names"] == [Path(file).name[0] for file in files]
    assert answer["facts"]["model"] == "res2net_tiny.digits" and str(tmp_path) not in str(answer["facts"])
    with torch.no_grad():
        expected = tiny(export.load_images(tiny, [{"image": {"bytes": None, "path": file}} for file in files]))
    assert relative_error(torch.tensor(answer["logits"]), expected) < 1e-5


SIGNAL = """
import faulthandler, os, signal, sys
from pathlib import Path

from res2net_zoo.inference.export import run_openvino

faulthandler.enable()  # as in pytest: Python's handlers now use an alternate stack
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))  # as a loader handles SIGCHLD
first, second = run_openvino(Path(sys.argv[1])), run_openvino(Path(sys.argv[1]))
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.full
def test_signals_are_handled_after_openvino(program, tiny, tmp_path):
    file = tmp_path / "tiny.xml"
    export.save_ir(export.to_openvino(tiny, images(1, 64)), file, "float32")
    result = program("-c", SIGNAL, file)
    assert (result.returncode, result.stdout) == (0, "handled\n"), result.stderr


@pytest.mark.full
def test_options_of_onnx(in_process, digits, tmp_path):
    output = tmp_path / "m.onnx"
    args = ["--format", "onnx", "--output", output, "--img-size", 40, "--batch-size", 4, "--opset", 20]
    result = in_process(EXPORT, *args, "--images", digits)
    assert result.returncode == 0, result.stderr
    assert "opset 20" in result.stdout and "on 6 images in batches of 4" in result.stdout
    session = onnxruntime.InferenceSession(output)
    assert session.get_inputs()[0].shape == [4, 3, 40, 40] and session.get_outputs()[0].shape == [4, 10]
    assert json.loads(session.get_modelmeta().custom_metadata_map["input_size"]) == [3, 40, 40]
    assert {entry.version for entry in onnx.load(output).opset_import} == {20}


def test_float16_weights(in_process, tmp_path):
    args = ["--format", "openvino", "--output", tmp_path / "m.xml"]
    result = in_process(EXPORT, *args, "--precision", "float16", "--batch-size", 3)
    assert result.returncode == 0, result.stderr
    assert "images: 3 x 3 x 64 x 64" in result.stdout and "the same for 16 of 16" in result.stdout
    parameters = catalog.load().architectures["res2net_tiny"].parameters
    assert (tmp_path / "m.bin").stat().st_size < 2.2 * parameters


@pytest.mark.full
def test_model_without_classifier_returns_features(tmp_path):
    model = spread(timm.create_model("res2net_tiny", num_classes=0, in_chans=1, layers=(1, 1, 1, 1))).eval()
    exported = export.export(model, images(1, 33, 1), tmp_path / "f.onnx", "onnx")
    assert (exported.inputs, exported.outputs) == ("images: batch x 1 x 33 x 33", "features: batch x 384")
    assert exported.same_top1 is None and exported.error < 1e-5 and exported.images == 1


@pytest.mark.parametrize("wrong", ["other", "not a number", "cannot run"])
@pytest.mark.parametrize("export_format", export.FORMATS)
def test_wrong_results_are_not_written(in_process, tiny_proto, tmp_path, monkeypatch, export_format, wrong):
    proto = onnx.ModelProto()
    proto.CopyFrom(tiny_proto)
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "fc.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[3] += np.nan if wrong == "not a number" else 0.01
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    if wrong == "cannot run":
        monkeypatch.setattr(export, "run_onnx", lambda path: lambda x: 1 / 0)
        monkeypatch.setattr(export, "run_openvino", lambda path: lambda x: x)
    monkeypatch.setattr(export, "to_onnx", lambda *args, **kwargs: proto)
    old = tmp_path / f"m{export.FORMATS[export_format]}"
    for path in (old, old.with_suffix(".bin")):
        path.write_text("old")
    result = in_process(EXPORT, "--format", export_format, "--output", old)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert ("cannot run" if wrong == "cannot run" else "differs from the model's") in line
    assert set(read_tree(tmp_path).values()) == {b"old"} and len(read_tree(tmp_path)) == 2


@pytest.mark.parametrize("export_format", export.FORMATS)
def test_full_disk(in_process, tiny_proto, tmp_path, monkeypatch, export_format):
    monkeypatch.setattr(export, "to_onnx", lambda *args, **kwargs: tiny_proto)
    old = tmp_path / f"m{export.FORMATS[export_format]}"
    for path in (old, old.with_suffix(".bin")):
        path.write_text("old")
    with full_disk(100_000):
        line = input_error(in_process(EXPORT, "--format", export_format, "--output", old))
    assert "cannot write" in line and str(old) in line
    assert set(read_tree(tmp_path).values()) == {b"old"} and len(read_tree(tmp_path)) == 2


def test_files_of_different_irs_are_never_mixed(tmp_path, monkeypatch):
    """The .bin of one IR is never next to the .xml of another, even after a failure at any step."""
    path = tmp_path / "m.xml"
    replace, states, fail_at = Path.replace, [], 0

    def state() -> tuple[str, ...]:
        return tuple(p.read_text() if p.exists() else "-" for p in (path, path.with_suffix(".bin")))

    def watched(self: Path, target: Path) -> Path:
        states.append(state())
        if len(states) == fail_at:
            raise OSError("no more")
        return replace(self, target)

    def write() -> None:
        with export.temporary_ir(path) as temporary:
            for file in (temporary, temporary.with_suffix(".bin")):
                file.write_text("new")

    monkeypatch.setattr(Path, "replace", watched)
    for fail_at in (1, 2, 3, 4):  # noqa: B007  read by `watched`
        for file in (path, path.with_suffix(".bin")):
            file.write_text("old")
        states.clear()
        with pytest.raises(OSError, match="no more"):
            write()
        assert state() == ("old", "old")
        assert all(xml in ("-", other) for xml, other in states)
    states.clear()
    fail_at = 0
    write()
    assert state() == ("new", "new") and all(xml in ("-", other) for xml, other in states)
    assert {file.name for file in tmp_path.iterdir()} == {"m.xml", "m.bin"}
    # Killed after moving one of the new files: the next export moves the other one.
    monkeypatch.undo()
    left = tmp_path / ".m.xml-new-abcdefgh"
    (left / "old").mkdir(parents=True)
    path.rename(left / "m.xml")
    export.check_output(path, "openvino")
    assert path.read_text() == "new"
    write()
    assert {file.name for file in tmp_path.iterdir()} == {"m.xml", "m.bin"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "res2net50_26w_5s"], "there is no model res2net50_26w_5s"),
        (["--model", "local-dir:no/such"], "no model folder"),
        (["--output", "model.pt"], "use model.onnx instead of model.pt"),
        (["--output", "no/such/model.onnx"], "cannot write into"),
        (["--format", "openvino"], "openvino files end in .xml"),
        (["--format", "tflite"], "--format"),
        (["--img-size", "0"], "--img-size"),
        (["--batch-size", "0"], "--batch-size"),
        (["--opset", "17"], "opset 17 is unsupported; use one from 18"),
        (["--opset", "99"], "opset 99 is unsupported"),
        (["--format", "openvino", "--output", "m.xml", "--opset", "18"], "--opset needs --format onnx"),
        (["--precision", "float16"], "needs --format openvino"),
        (["--images", "no/such.png"], "there is no file or folder"),
        (["--images", "README.md"], "README.md) is corrupt (not an image of a supported format)"),
    ],
)
def test_bad_input(in_process, args, words):
    before = set(Path.cwd().iterdir())
    line = input_error(in_process(EXPORT, "--format", "onnx", "--output", "model.onnx", *args))
    assert words in line and set(Path.cwd().iterdir()) == before


def test_unrelated_files_are_kept(in_process, tmp_path):
    (tmp_path / "m.bin").write_text("unrelated")
    line = input_error(in_process(EXPORT, "--format", "openvino", "--output", tmp_path / "m.xml"))
    assert "m.bin exists without its IR" in line
    (tmp_path / "m.onnx").mkdir()
    line = input_error(in_process(EXPORT, "--format", "onnx", "--output", tmp_path / "m.onnx"))
    assert "m.onnx is a folder" in line and (tmp_path / "m.bin").read_text() == "unrelated"


@pytest.mark.parametrize(("export_format", "package"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_missing_packages(in_process, tmp_path, monkeypatch, export_format, package):
    monkeypatch.setitem(sys.modules, package, None)
    output = tmp_path / f"m{export.FORMATS[export_format]}"
    line = input_error(in_process(EXPORT, "--format", export_format, "--output", output))
    assert f"exporting needs {package}; pip install 'res2net-zoo[export]'" in line


def test_unsupported_sizes():
    model = timm.create_model("dla60_res2net", **SMALL["dla60_res2net"])
    with pytest.raises(InputError, match=r"does not support images of 3x40x40: .*multiples of 32"):
        export.to_onnx(model, images(1, 40))
