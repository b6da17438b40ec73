"""`scripts/predict.py`: predictions in every format, on one and two processes."""

import csv
import io
import json
import os
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

from res2net_zoo.cli import predict
from res2net_zoo.inference import optimization
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
from tests.conftest import SHIPPED_DATA, SHIPPED_MODEL, full_disk, input_error, spread

PREDICT = "scripts/predict.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Ten digits in two folders, named by their class."""
    folder = tmp_path_factory.mktemp("digits")
    files = sorted(str(path) for path in SHIPPED_DATA.rglob("*validation*"))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    for i in range(10):
        (folder / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        rows[i]["image"].save(folder / "images" / "ab"[i % 2] / f"{i}_{rows[i]['label']}.png")
    return folder / "images"


def timms(paths: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return timm's scores and pooled features, one image at a time."""
    model = timm.create_model(f"local-dir:{SHIPPED_MODEL}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    scores, pooled = [], []
    with torch.no_grad():
        for path in paths:
            image = transform(Image.open(path).convert("RGB")).unsqueeze(0)
            scores.append(model(image).softmax(1)[0])
            pooled.append(model.forward_features(image).mean((2, 3))[0])
    return torch.stack(scores), torch.stack(pooled)


@pytest.mark.first_case
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_format_agrees_with_timm(in_process, digits, tmp_path, batch_size):
    args = [digits, "--topk", 3, "--batch-size", batch_size, "--embeddings", tmp_path / "e.parquet"]
    paths = sorted(str(path) for path in digits.rglob("*.png"))
    scores, pooled = timms(paths)
    best = scores.topk(3)
    result = in_process(PREDICT, *args, "--format", "jsonl")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == paths
    for line, values, indices in zip(lines, best.values.tolist(), best.indices.tolist(), strict=True):
        assert [p["class"] for p in line["predictions"]] == indices
        assert [p["name"] for p in line["predictions"]] == [str(i) for i in indices]
        assert [p["score"] for p in line["predictions"]] == pytest.approx(values, abs=1e-5)
        assert f"_{line['predictions'][0]['name']}.png" in line["path"]
    table = pyarrow.parquet.read_table(tmp_path / "e.parquet")
    assert table["path"].to_pylist() == paths
    assert torch.allclose(torch.tensor(table["embedding"].to_pylist()), pooled, atol=1e-5)

    assert in_process(PREDICT, *args, "--format", "csv", "--output", tmp_path / "p.csv").stdout == ""
    rows = list(csv.DictReader(io.StringIO((tmp_path / "p.csv").read_text())))
    assert [(row["path"], int(row["class"])) for row in rows if row["rank"] == "1"] == [
        (path, indices[0]) for path, indices in zip(paths, best.indices.tolist(), strict=True)
    ]
    assert len(rows) == 30
    shown = in_process(PREDICT, *args).stdout.splitlines()
    assert len(shown) == 12 and all(path in line for path, line in zip(paths, shown[2:], strict=True))
    assert f"{best.indices[0, 0]} {100 * best.values[0, 0]:.1f}" in shown[2]


@pytest.mark.first_case
@pytest.mark.parametrize("backend", ["native", "openvino", "onnxruntime", "eager"])
def test_backends_agree_with_timm(in_process, digits, backend):
    scores, _ = timms(sorted(map(str, digits.rglob("*.png"))))
    result = in_process(PREDICT, digits, "--backend", backend, "--batch-size", 4, "--format", "jsonl", "--topk", 1)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line)["predictions"][0] for line in result.stdout.splitlines()]
    assert [answer["class"] for answer in found] == scores.argmax(1).tolist()
    assert [answer["score"] for answer in found] == pytest.approx(scores.amax(1).tolist(), abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["native", "openvino"])
def test_int8(in_process, program, digits, backend):
    """The shipped model is calibrated on the shipped digits; two processes quantize it identically."""
    scores, _ = timms(sorted(map(str, digits.rglob("*.png"))))
    args = [digits, "--precision", "int8", "--backend", backend, "--batch-size", 3, "--format", "jsonl", "--topk", 1]
    found = []
    for result in (in_process(PREDICT, *args), program(PREDICT, *args, processes=2)):
        assert result.returncode == 0, result.stderr
        found.append([json.loads(line)["predictions"][0] for line in result.stdout.splitlines() if line[0] == "{"])
        assert [answer["class"] for answer in found[-1]] == scores.argmax(1).tolist()
    one, two = ([answer["score"] for answer in answers] for answers in found)
    assert one == pytest.approx(two, abs=1e-4)
    assert scores.amax(1).tolist() == pytest.approx(one, abs=0.05) != pytest.approx(one, abs=1e-6)


def test_many_images_use_the_fastest_backend(in_process, digits, monkeypatch):
    used = []
    real = optimization.optimize

    def optimize(model, example, precision, backend, calibration):
        used.append((backend, len(example)))
        return real(model, example, precision, "eager")

    monkeypatch.setattr(optimization, "optimize", optimize)
    assert in_process(PREDICT, digits).returncode == 0 and not used
    monkeypatch.setattr(predict, "MANY", 10)
    assert in_process(PREDICT, digits, "--batch-size", 8).returncode == 0 and used == [("auto", 8)]
    assert in_process(PREDICT, digits, "--backend", "torch").returncode == 0 and len(used) == 1


@pytest.mark.full
def test_two_processes_print_the_same_in_the_same_order(program, in_process, digits, tmp_path):
    (digits / "b" / "3_broken.png").write_bytes(b"nothing")
    try:
        args = [f"{digits}/*/*.png", "--format", "csv", "--batch-size", 2, "--skip-corrupt"]
        one = in_process(PREDICT, *args, "--embeddings", tmp_path / "1.parquet", "--output", tmp_path / "1.csv")
        two = program(
            PREDICT, *args, "--embeddings", tmp_path / "2.parquet", "--output", tmp_path / "2.csv", processes=2
        )
    finally:
        (digits / "b" / "3_broken.png").unlink()
    assert (one.returncode, two.returncode) == (1, 1), two.stderr
    for result in (one, two):
        assert result.stderr.count("3_broken.png is skipped: not an image of a supported format") == 1
    a, b = (list(csv.DictReader((tmp_path / f"{n}.csv").open())) for n in (1, 2))
    assert [(row["path"], row["rank"], row["name"]) for row in a] == [(r["path"], r["rank"], r["name"]) for r in b]
    assert [float(row["score"]) for row in a] == pytest.approx([float(row["score"]) for row in b], abs=1e-5)
    e, f = (pyarrow.parquet.read_table(tmp_path / f"{n}.parquet") for n in (1, 2))
    assert e["path"].to_pylist() == f["path"].to_pylist() and len(e) == 10


def test_imagenet_class_names(in_process, digits, tmp_path):
    model = spread(timm.create_model("res2net_tiny"))
    write_model_folder(tmp_path / "m", model, model_card("m", "# m", None))
    file = digits / "a" / next(path.name for path in (digits / "a").iterdir())
    args = [file, file, "--model", f"local-dir:{tmp_path / 'm'}", "--format", "jsonl", "--topk", 2000]
    (line,) = in_process(PREDICT, *args).stdout.splitlines()  # given twice, reported once
    answers = json.loads(line)["predictions"]
    assert sorted(a["class"] for a in answers) == list(range(1000))
    info = ImageNetInfo()
    assert all(answer["name"] == info.index_to_description(answer["class"]) for answer in answers)
    assert sum(a["score"] for a in answers) == pytest.approx(1, abs=1e-3)


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no/such.jpg"], "there is no file or folder no/such.jpg"),
        (["tests/*.jpg"], "there is no file that matches the pattern tests/*.jpg"),
        (["res2net_zoo"], "there is no image in res2net_zoo"),
        (["README.md"], "README.md is corrupt (not an image of a supported format)"),
        (["README.md", "--skip-corrupt"], "none of the 1 images can be decoded"),
        (["README.md", "--topk", "0"], "--topk"),
        (["README.md", "--topk", "x"], "--topk"),
        (["README.md", "--output", "no/such/folder/x.csv"], "cannot write into"),
        (["README.md", "--output", "tests"], "tests is a folder"),
        (["README.md", "--output", "x", "--embeddings", "x"], "name two files"),
        (["README.md", "--backend", "native", "--embeddings", "x"], "--embeddings needs plain PyTorch"),
        (["README.md", "--model", "local-dir:no/such"], "no model folder"),
        ([], "IMAGE"),
    ],
)
def test_bad_input(in_process, args, words):
    lines = (
        input_error(in_process(PREDICT, *args)) if "--skip-corrupt" not in args else in_process(PREDICT, *args).stderr
    )
    assert words in lines


def test_failure_keeps_the_old_files(in_process, digits, tmp_path):
    (tmp_path / "p.csv").write_text("old")
    (digits / "b" / "9_broken.png").write_bytes(b"nothing")
    try:
        line = input_error(in_process(PREDICT, digits, "--output", tmp_path / "p.csv", "--embeddings", tmp_path / "e"))
    finally:
        (digits / "b" / "9_broken.png").unlink()
    assert "9_broken.png is corrupt" in line and (tmp_path / "p.csv").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
    with full_disk(2000):  # also applies to data from workers
        args = ["--output", tmp_path / "p.csv", "--embeddings", tmp_path / "e", "--workers", 0]
        line = input_error(in_process(PREDICT, digits, *args))
    assert "cannot write" in line and [path.name for path in tmp_path.iterdir()] == ["p.csv"]


@pytest.mark.first_case
@pytest.mark.parametrize("form", ["jsonl", "csv", "table"])
def test_predictions_of_file_names_that_are_not_utf8(in_process, digits, tmp_path, form):
    folder = tmp_path / "images"
    folder.mkdir()
    source = next(digits.rglob("*.png")).read_bytes()
    name = b"\xff\xfe.png"
    for other in (b"a.png", name):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + other)).write_bytes(source)
    args = [folder, "--format", form, "--output", tmp_path / "out", "--embeddings", tmp_path / "e.parquet"]
    result = in_process(PREDICT, *args)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "out").read_text("utf-8")
    assert "a.png" in text and r"\udcff\udcfe.png" in text
    if form == "jsonl":
        assert os.fsencode(json.loads(text.splitlines()[1])["path"]).endswith(name)
    paths = pyarrow.parquet.read_table(tmp_path / "e.parquet")["path"].to_pylist()
    assert [Path(path).name for path in paths] == ["a.png", r"\udcff\udcfe.png"]
    assert r"\udcff\udcfe.png" in in_process(PREDICT, folder, "--format", form).stdout


def test_predict_does_not_import_datasets(program, tmp_path):
    """Importing it takes half a second."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = "import runpy, sys; sys.path.insert(0, 'scripts'); sys.argv = ['predict.py', sys.argv[1]]\n"
    code += "try:\n    runpy.run_path('scripts/predict.py', run_name='__main__')\nexcept SystemExit as end:\n"
    code += "    print(end.code, {'datasets', 'pandas', 'onnx', 'matplotlib'} & {*sys.modules})"
    assert program("-c", code, tmp_path / "a.png").stdout.splitlines()[-1] == "0 set()"


def test_skipped_files_are_reported(in_process, tmp_path):
    for name in ("a/0.png", "a/@eaDir/1.png", "a/.x/2.png", "b/3.GIF"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "b" / "notes.txt").touch()
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    for args in ([tmp_path], [tmp_path / "a", tmp_path / "b"], [f"{tmp_path}/*"], [f"{tmp_path}/**/*.[pG]*"]):
        result = in_process(PREDICT, *args, "--format", "jsonl")
        paths = [json.loads(line)["path"] for line in result.stdout.splitlines()]
        assert paths == [f"{tmp_path}/a/0.png", f"{tmp_path}/b/3.GIF"]
        (line,) = result.stderr.splitlines()
        assert line.startswith("warning: skipped: hidden or system folders: 2 (such as ")
        assert ".txt files: 1 (such as" in line or "**" in args[0]


def test_pixels_with_more_than_eight_bits(in_process, tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "16.png")
    Image.fromarray(np.round(values / 257).astype(np.uint8)).save(tmp_path / "8.png")
    result = in_process(PREDICT, tmp_path / "16.png", tmp_path / "8.png", "--format", "jsonl")
    one, other = (json.loads(line)["predictions"] for line in result.stdout.splitlines())
    assert one == other
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tiff")
    line = input_error(in_process(PREDICT, tmp_path / "float.tiff"))
    assert "float.tiff" in line and "floating-point pixels are unsupported" in line


def test_very_large_images(in_process, tmp_path):
    """Up to 179 million pixels are read, without Pillow's warning; files too small for their claimed size are not."""
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")
    result = in_process(PREDICT, tmp_path / "large.png")
    assert (result.returncode, result.stderr) == (0, "")
    Image.new("1", (13_500, 13_500)).save(tmp_path / "larger.png")
    assert "exceeds limit of 178956970 pixels" in input_error(in_process(PREDICT, tmp_path / "larger.png"))
    for kind in ("png", "bmp"):
        Image.new("1", (8, 8)).save(tmp_path / f"lies.{kind}")
        content = (tmp_path / f"lies.{kind}").read_bytes()
        place, order = (16, "big") if kind == "png" else (18, "little")
        header = content[:place] + (12_000).to_bytes(4, order) * 2 + content[place + 8 :]
        if kind == "png":
            header = header[:29] + zlib.crc32(header[12:29]).to_bytes(4, "big") + header[33:]
        (tmp_path / f"lies.{kind}").write_bytes(header)
        line = input_error(in_process(PREDICT, tmp_path / f"lies.{kind}"))
        assert f"it declares 12000 x 12000 pixels, more than its {len(header):,} bytes can hold" in line
