"""Untrusted data: files cannot start programs or network requests."""

import base64
import http.server
import io
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import timm
from PIL import Image

from res2net_zoo.data.images import FORMATS, open_image
from res2net_zoo.data.sources import open_source
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
from tests.conftest import input_error, save_images

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop % a program\nshowpage\n%%EOF\n"


def picture(format: str = "PNG", size: tuple[int, int] = (16, 16), **options) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(content, format, **options)
    return content.getvalue()


def image_table(path: Path, paths: list[str], labels: list[int] | None = None) -> Path:
    """Write a Parquet file with paths of images instead of content."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": path} for path in paths], kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table({"image": images, "label": labels or [0] * len(paths)}), path)
    return path


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A fake Ghostscript on PATH, and the file in which it logs its calls."""
    log = tmp_path / "gs.log"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory) -> Path:
    """A model folder of classes a and b."""
    folder = tmp_path_factory.mktemp("models") / "two"
    model = timm.create_model("res2net_tiny", num_classes=2)
    write_model_folder(folder, model, model_card("two", "# two", None), ["a", "b"])
    return folder


@pytest.fixture
def requests_made():
    """The port of a server, and the requested paths."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port, paths
        server.shutdown()


@pytest.mark.first_case
@pytest.mark.parametrize(
    "program",
    [
        ("scripts/predict.py", "{folder}"),
        ("scripts/cam.py", "{folder}", "--model", "local-dir:hub/models/res2net_tiny.digits"),
        ("scripts/validate.py", "--data", "{folder}", "--model", "{model}"),
        ("scripts/finetune.py", "--data", "{folder}", "--batch-size", "2", "--hold-out", "0.5", "--tracker", "none",
         "--output", "{out}"),
        ("scripts/export.py", "--format", "onnx", "--model", "local-dir:hub/models/res2net_tiny.digits",
         "--images", "{folder}", "--output", "{out}.onnx"),
    ],
    ids=lambda program: Path(program[0]).stem,
)  # fmt: skip
def test_programs_do_not_run_postscript_files(in_process, ghostscript, tmp_path, two_classes, program):
    for name in ("a/holiday.jpg", "a/sea.png", "b/holiday.jpg", "b/sea.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(EPS)
    places = {"folder": tmp_path / "data", "out": tmp_path / "out", "model": f"local-dir:{two_classes}"}
    message = input_error(in_process(*(word.format(**places) for word in program)))
    assert "not an image of a supported format" in message and "gs" not in message.split()
    assert not ghostscript.exists()


@pytest.mark.first_case
@pytest.mark.parametrize("task", ["segmentation", "saliency", "detection", "keypoints"])
def test_tasks_do_not_run_postscript_files(in_process, ghostscript, tmp_path, task):
    """As an image and as a mask."""
    data = tmp_path / "data"
    size = picture("JPEG", (100, 100))
    if task in ("segmentation", "saliency"):
        files = {
            "segmentation": ("JPEGImages/0.jpg", "SegmentationClass/0.png"),
            "saliency": ("train/images/0.jpg", "train/masks/0.png"),
        }[task]
        cases = [(EPS, picture(size=(100, 100))), (size, EPS)]
        if task == "segmentation":
            (data / "ImageSets" / "Segmentation").mkdir(parents=True)
            for split in ("train", "val"):
                (data / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("0\n")
    else:
        split = "instances_train.json" if task == "detection" else "person_keypoints_train.json"
        category = {"id": 1, "name": "person", "keypoints": ["left_eye", "right_eye"], "skeleton": []}
        record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
        record |= {"keypoints": [20, 20, 2, 30, 20, 2], "num_keypoints": 2}
        image = {"id": 1, "file_name": "0.jpg", "width": 100, "height": 100}
        content = {"images": [image], "annotations": [record], "categories": [category]}
        (data / "annotations").mkdir(parents=True)
        for name in (split, split.replace("train", "val")):
            (data / "annotations" / name).write_text(json.dumps(content))
        files, cases = ("train/0.jpg", "val/0.jpg"), [(EPS, EPS)]
    for case in cases:
        for file, content in zip(files, case, strict=True):
            for place in {file, file.replace("train", "val")}:
                (data / place).parent.mkdir(parents=True, exist_ok=True)
                (data / place).write_bytes(content)
        args = ("--task", task, "--model", "res2net_tiny", "--data", data, "--output", tmp_path / "out")
        input_error(in_process("scripts/train_task.py", *args))
    assert not ghostscript.exists()


@pytest.mark.parametrize("format", [*FORMATS, "MPO", "TIFF-LZW"])
def test_common_image_formats_are_read(tmp_path, format):
    kind, _, packing = format.partition("-")
    content = picture(kind, **({"compression": "tiff_lzw"} if packing else {}))
    (tmp_path / "image.jpg").write_bytes(content)
    for source in (content, tmp_path / "image.jpg"):
        with open_image(source) as image:
            assert image.convert("RGB").size == (16, 16)


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_only_regular_files_are_read(in_process, tmp_path, kind):
    (tmp_path / "a").mkdir()
    if kind == "fifo":
        os.mkfifo(tmp_path / "a" / "0.png")
    else:
        (tmp_path / "a" / "0.png").symlink_to("/dev/zero")
    message = input_error(in_process("scripts/predict.py", tmp_path / "a" / "0.png"))
    assert "it is a device, a pipe or a socket, not a regular file" in message
    source = open_source(str(image_table(tmp_path / "b" / "0.parquet", ["x.png"])))
    (tmp_path / "a" / "0.png").rename(tmp_path / "b" / "x.png")
    with pytest.raises(InputError, match=r"not a (regular file|relative path below)"):
        source.read(source.rows[0]["image"])


HOSTILE_PATHS = {
    "template": "reference://k::file://{folder}/spec.json",
    "template in the path": "reference://k::data:application/json;base64,{spec}",
    "http": "http://127.0.0.1:{port}/x.png",
    "ftp": "ftp://127.0.0.1:{port}/x.png",
    "chain": "simplecache::http://127.0.0.1:{port}/x.png",
    "zip over http": "zip://x.png::http://127.0.0.1:{port}/a.zip",
    "zip elsewhere": "zip://x.png::{folder}/a.zip",
    "file": "file://{folder}/secret.png",
    "local": "local://{folder}/secret.png",
    "absolute": "{folder}/secret.png",
    "up": "../secret.png",
    "link": "link/secret.png",
    "data": "data:image/png;base64,{image}",
}


def hostile_path(kind: str, folder: Path, port: int) -> str:
    """Return a path out of a dataset, and create its target."""
    (folder / "secret.png").write_bytes(picture())
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("x.png", picture())
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(folder / "ran") + "') }}"
    references = [{"key": "k", "url": template, "dimensions": {"i": [0]}}]
    spec = json.dumps({"version": 1, "templates": {}, "gen": references, "refs": {}})
    (folder / "spec.json").write_text(spec)
    encoded = {
        name: base64.b64encode(content).decode() for name, content in (("spec", spec.encode()), ("image", picture()))
    }
    return HOSTILE_PATHS[kind].format(folder=folder, port=port, **encoded)


@pytest.mark.first_case
@pytest.mark.parametrize("kind", HOSTILE_PATHS)
@pytest.mark.parametrize("streaming", [False, True])
def test_paths_in_a_dataset_must_stay_inside(tmp_path, requests_made, kind, streaming):
    port, paths = requests_made
    data = image_table(tmp_path / "data" / "validation.parquet", [hostile_path(kind, tmp_path, port)]).parent
    (data / "link").symlink_to(tmp_path)
    source = open_source(str(data), streaming=streaming)
    is_name = kind == "data"  # a valid file name
    with pytest.raises(InputError, match="No such file" if is_name else "not a relative path below the data's folder"):
        source.read(next(iter(source.rows))["image"])
    assert not paths and not (tmp_path / "ran").exists()


def test_programs_do_not_follow_paths_out_of_a_dataset(in_process, tmp_path, requests_made):
    """Also with --skip-corrupt, because the image is not corrupt."""
    port, paths = requests_made
    data = image_table(tmp_path / "data" / "train.parquet", [f"http://127.0.0.1:{port}/x.png"] * 4, [0, 1, 0, 1])
    train = ("--batch-size", "2", "--output", tmp_path / "out", "--tracker", "none", "--hold-out", "0.5")
    for words in (
        ("scripts/validate.py",),
        ("scripts/finetune.py", *train),
        ("scripts/finetune.py", *train, "--no-check"),
    ):
        for more in ((), ("--skip-corrupt",)):
            message = input_error(in_process(*words, "--data", data, *more))
            assert "is not a relative path below the data's folder" in message
    assert not paths


@pytest.mark.parametrize("streaming", [False, True])
def test_relative_paths_next_to_a_parquet_file_are_read(tmp_path, streaming):
    data = image_table(tmp_path / "data" / "deep" / "validation.parquet", ["images/0.png", "./images/../images/0.png"])
    (data.parent / "images").mkdir()
    (data.parent / "images" / "0.png").write_bytes(picture())
    for src in (data, data.parent):
        source = open_source(str(src), streaming=streaming)
        assert [source.read(row["image"]) for row in source.rows] == [picture()] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_images_with_metadata_are_read(tmp_path, streaming, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes(picture())
    (tmp_path / "data" / "metadata.csv").write_text("file_name,label\n0.png,1\n")
    monkeypatch.chdir(tmp_path)
    source = open_source("data", streaming=streaming)
    assert [(source.read(row["image"]), row["label"]) for row in source.rows] == [(picture(), 1)]


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml", "README.md with CRLF"])
@pytest.mark.parametrize(
    "pattern",
    ["http://127.0.0.1:{port}/x.parquet", "reference://k::http://127.0.0.1:{port}/spec.json", "../other/*.parquet",
     "/{tmp}/other/*.parquet", "zip://*.parquet::http://127.0.0.1:{port}/a.zip"],
)  # fmt: skip
def test_cards_cannot_refer_to_files_elsewhere(tmp_path, requests_made, name, pattern):
    port, paths = requests_made
    image_table(tmp_path / "other" / "train.parquet", ["x.png"])
    data = save_images(tmp_path / "data", ["a", "b"], 1)
    found = pattern.format(port=port, tmp=tmp_path)
    content = json.dumps({"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": found}]}]})
    name, _, crlf = name.partition(" ")
    text = f"---\n{content[1:-1]}\n---\n" if name == "README.md" else content
    (data / name).write_text(f"\ufeff{text}" if crlf else text, newline="\r\n" if crlf else None)
    (data / "x.parquet").write_bytes(b"")  # so that `datasets` is used
    with pytest.raises(InputError, match="only files of the dataset itself are read"):
        open_source(str(data))
    assert not paths


def test_jpegs_with_a_false_size(in_process, tmp_path):
    content = picture("JPEG", (1600, 1600))
    with open_image(content) as image:  # a single colour, which maximizes the pixels per byte
        assert image.convert("RGB").getpixel((800, 800))[0] > 190
    height = content.index(b"\xff\xc0") + 5
    claimed = content[:height] + (12_000).to_bytes(2, "big") * 2 + content[height + 4 :]
    (tmp_path / "huge.jpg").write_bytes(claimed)
    message = input_error(in_process("scripts/predict.py", tmp_path / "huge.jpg"))
    assert f"it declares 12000 x 12000 pixels, more than its {len(claimed):,} bytes can hold" in message


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["../other.arrow", "/other.arrow", "pipe.arrow", "zero.arrow", 7, "https://x/y.arrow"])
def test_saved_datasets_refer_only_to_their_own_files(tmp_path, name):
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "label": [0]}).save_to_disk(folder)
    shutil.copy(next(folder.glob("*.arrow")), tmp_path / "other.arrow")
    os.mkfifo(folder / "pipe.arrow")
    (folder / "zero.arrow").symlink_to("/dev/zero")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
    with pytest.raises(InputError, match=r"outside of their folder|not a regular file|list of files is invalid"):
        open_source(str(folder))


@pytest.mark.parametrize("split", ["../other", "/tmp", "https://x/y", ".."])
def test_saved_datasets_refer_only_to_their_own_splits(tmp_path, split):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    with pytest.raises(InputError, match="outside of their folder"):
        open_source(str(tmp_path))
