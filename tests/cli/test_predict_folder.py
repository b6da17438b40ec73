"""`predict --output DIR`: shards of Parquet and a manifest, resumed after a kill, on one to three processes."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from PIL import Image

from res2net_zoo.inference import prediction_folder
from res2net_zoo.inference.prediction import Images, Prediction
from res2net_zoo.utils.console import progress_bar
from tests.conftest import ROOT, SHIPPED_DATA, SHIPPED_MODEL, full_disk, input_error
from tests.hub_server import serve

PREDICT = "scripts/predict.py"
MANIFEST = "_manifest.json"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Twenty digits in class folders, and the same rows as Parquet files and a WebDataset."""
    folder = tmp_path_factory.mktemp("digits")
    files = sorted(str(path) for path in SHIPPED_DATA.rglob("*validation*"))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    chosen = sorted(range(len(rows)), key=lambda i: ([*rows["label"]][:i].count(rows["label"][i]), i))[:20]
    for i, row in enumerate(rows.select(chosen)):  # two of each class
        (folder / "classes" / str(row["label"])).mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / "classes" / str(row["label"]) / f"{i:02}.png")
    (folder / "plain").mkdir()
    paths = sorted((folder / "classes").rglob("*.png"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    for path in paths:
        shutil.copy(path, folder / "plain")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    labels = [int(path.parent.name) for path in paths]
    (folder / "parquet").mkdir()
    for name, some in ("a", slice(0, 13)), ("b", slice(13, None)):
        part = datasets.Dataset.from_dict({"image": images[some], "label": labels[some]}, features=features)
        part.to_parquet(folder / "parquet" / f"{name}.parquet")
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def rows_of(folder: Path) -> list[dict]:
    """Return the rows of all shards, in their order, as any reader of Parquet sees them."""
    return pa.concat_tables([pq.read_table(path) for path in shards(folder)]).to_pylist()


def test_a_folder_has_the_rows_of_one_file(in_process, digits, tmp_path):
    out = tmp_path / "out"
    result = in_process(PREDICT, digits / "classes", "--output", out, "--shard-size", 8, "--batch-size", 3)
    assert (result.returncode, result.stdout) == (0, f"{out}: 20 images in 3 shards\n"), result.stderr
    lines = in_process(PREDICT, digits / "classes", "--format", "jsonl").stdout.splitlines()
    for index, (row, line) in enumerate(zip(rows_of(out), map(json.loads, lines), strict=True)):
        answers = line["predictions"]
        assert (row["index"], row["path"]) == (index, line["path"])
        assert row["classes"] == [answer["class"] for answer in answers]
        assert row["names"] == [answer["name"] for answer in answers]
        assert row["scores"] == pytest.approx([answer["score"] for answer in answers], abs=1e-5)
    found = manifest(out)
    assert found["complete"] and (found["images"], found["rows"], found["skipped"]) == (20, 20, 0)
    assert [(s["file"], s["first"], s["images"]) for s in found["shards"]] == [
        ("part-000000.parquet", 0, 8),
        ("part-000001.parquet", 8, 8),
        ("part-000002.parquet", 16, 4),
    ]
    assert found["settings"]["topk"] == 5 and found["settings"]["precision"] == "float32"
    # Names that begin with _ are skipped.
    assert (
        len(pq.read_table(out))
        == len(datasets.load_dataset("parquet", data_files=f"{out}/*.parquet", split="train"))
        == 20
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.first_case
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize("kind", ["parquet", "classes", "plain", "parquet/*.parquet"])
def test_every_source(in_process, digits, tmp_path, kind, streaming):
    args = ["--data", digits / kind, *streaming, "--output", f"{tmp_path}/out/", "--shard-size", 6, "--batch-size", 4]
    args += ["--backend", "torch"]  # for an unknown number of images, predict searches for a faster one
    result = in_process(PREDICT, *args)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "out")
    assert [row["index"] for row in rows] == list(range(20))
    names = [path.name for path in sorted((digits / ("plain" if kind == "plain" else "classes")).rglob("*.png"))]
    assert [Path(row["path"]).name for row in rows] == names
    if kind == "plain":
        assert "label" not in rows[0]
    else:
        assert sum(row["label"] == row["classes"][0] for row in rows) >= 18
    found = manifest(tmp_path / "out")["settings"]
    assert found["split"] == "train" and found["data_sha256"] and found["streaming"] == bool(streaming)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_data_in_one_file(in_process, digits, tmp_path, streaming):
    args = ["--data", digits / "parquet", *streaming, "--topk", 1]
    lines = [json.loads(line) for line in in_process(PREDICT, *args, "--format", "jsonl").stdout.splitlines()]
    assert [line["index"] for line in lines] == list(range(20))
    assert [line["label"] for line in lines] == sorted(line["label"] for line in lines)
    table = tmp_path / "out.csv"
    assert in_process(PREDICT, *args, "--format", "csv", "--output", table).returncode == 0
    rows = list(csv.DictReader(table.open()))
    assert list(rows[0]) == ["index", "path", "label", "rank", "class", "name", "score"]
    assert [int(row["class"]) for row in rows] == [line["predictions"][0]["class"] for line in lines]


def test_images_without_path_or_label(in_process, digits, tmp_path):
    rows = datasets.load_dataset("parquet", data_dir=str(digits / "parquet"), split="train").select(range(3))
    images = [
        {"bytes": image["bytes"], "path": None}
        for image in rows.cast_column("image", datasets.Image(decode=False))["image"]
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": images, "label": ["a"] * 3}, features=features).to_parquet(
        tmp_path / "x.parquet"
    )
    args = ["--data", tmp_path / "x.parquet", "--embeddings", "--output", tmp_path / "out"]
    assert in_process(PREDICT, *args).returncode == 0
    found = rows_of(tmp_path / "out")
    assert [row["path"] for row in found] == [None] * 3 and "label" not in found[0]
    assert all(len(row["embedding"]) == 256 or row["embedding"] for row in found)
    shown = in_process(PREDICT, "--data", tmp_path / "x.parquet").stdout.splitlines()
    assert [line.split()[1] for line in shown[2:]] == ["0", "1", "2"]


def test_a_label_that_does_not_fit(in_process, digits, tmp_path):
    image = {"bytes": next(digits.rglob("*.png")).read_bytes(), "path": None}
    pq.write_table(pa.table({"image": [image], "label": pa.array([2**63 + 5], pa.uint64())}), tmp_path / "x.parquet")
    line = input_error(in_process(PREDICT, "--data", tmp_path / "x.parquet", "--output", tmp_path / "out"))
    assert "image 0 of x.parquet has label 9223372036854775813, which does not fit into 64 bits" in line


@pytest.mark.full
def test_a_stream_from_the_hub(program, digits, tmp_path):
    """Its revision is part of the manifest."""
    with serve({"datasets/zoo/digits": digits / "parquet"}) as hub:
        env = dict(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"))
        args = ["--data", "zoo/digits", "--streaming", "--backend", "torch", "--output", tmp_path / "out"]
        result = program(PREDICT, *args, "--shard-size", 6, **env)
        assert result.returncode == 0, result.stderr
        assert [row["index"] for row in rows_of(tmp_path / "out")] == list(range(20))
        assert manifest(tmp_path / "out")["settings"]["data_sha256"] == hub.sha("datasets/zoo/digits")
        assert program(PREDICT, *args, "--resume", **env).returncode == 0


def test_resume_predicts_only_what_is_missing(in_process, digits, tmp_path):
    out = tmp_path / "out"
    args = [PREDICT, digits / "plain", "--output", out, "--batch-size", 4]
    assert in_process(*args, "--shard-size", 4).returncode == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards(out)}
    complete = (out / MANIFEST).read_bytes()
    assert "has predictions; continue them, or name another folder (--resume)" in input_error(in_process(*args))
    assert in_process(*args, "--resume").returncode == 0  # finished already
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards(out)} == before

    (out / "part-000000.parquet").unlink()
    truncated = out / "part-000001.parquet"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    damaged = bytearray((out / "part-000003.parquet").read_bytes())
    damaged[200] ^= 1
    (out / "part-000003.parquet").write_bytes(damaged)
    for without in (False, True):  # the shards' own metadata and checksums suffice
        if without:
            shutil.copytree(out, tmp_path / "without")
            args[3] = out = tmp_path / "without"
            (out / MANIFEST).unlink()
        copy = tmp_path / f"copy{without}"
        shutil.copytree(out, copy)
        args[3] = copy
        result = in_process(*args, "--resume")
        assert result.returncode == 0 and result.stdout.endswith("20 images in 5 shards\n"), result.stderr
        assert result.stderr.count("is truncated or damaged") == 2
        assert {path.name: path.read_bytes() for path in shards(copy)} == {
            name: data for name, (data, _) in before.items()
        }
        assert (copy / MANIFEST).read_bytes() == complete
        kept = [
            name for name, (_, at) in before.items() if (out / name).exists() and (out / name).stat().st_mtime_ns == at
        ]
        assert kept == ["part-000002.parquet", "part-000004.parquet"] or without


def test_resume_takes_the_backend_of_the_first_run(in_process, digits, tmp_path):
    out = tmp_path / "out"
    args = [PREDICT, digits / "plain", "--output", out, "--shard-size", 4]
    assert in_process(*args, "--backend", "eager").returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert manifest(out)["settings"]["backend"] == "eager"
    for options in [], ["--backend", "auto"]:  # without --resume, 20 images are predicted by plain PyTorch
        (out / "part-000001.parquet").unlink()
        result = in_process(*args, "--resume", *options)
        assert result.returncode == 0, result.stderr
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--topk", 3], "topk was 5, is 3"),
        (["--shard-size", 5], "shard_size was 4, is 5"),
        (["--precision", "bfloat16"], "precision was float32, is bfloat16"),
        (["--backend", "eager"], "backend was torch, is eager"),
        (["--embeddings"], "embeddings was False, is True"),
        (["--model", "TINY"], "other weights"),
        (["DATA"], "other data"),
    ],
)
def test_resume_with_other_settings_is_refused(in_process, digits, tiny_folder, tmp_path, changed, words):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(digits / "plain", data)
    args = [PREDICT, data, "--output", out]
    assert in_process(*args, "--shard-size", 4).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if changed == ["DATA"]:
        Image.new("RGB", (8, 8)).save(data / "00.png")
        changed = []
    changed = [f"local-dir:{tiny_folder}" if word == "TINY" else word for word in changed]
    line = input_error(in_process(*args, "--resume", *changed))
    assert f"{out} was made with other settings" in line and words in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--output", "tests"], "tests is a folder with other files"),
        (["--output", "README.md", "--format", "parquet"], "README.md is a file; name a folder"),
        (["--format", "parquet"], "--format parquet needs --output DIR"),
        (["--output", "x.csv", "--resume"], "--resume needs a folder"),
        (["--output", "x", "--embeddings"], "--embeddings needs a FILE"),  # x is a file without --data
        (["--shard-size", "5"], "--shard-size needs a folder"),
        (["--output", "x/", "--embeddings", "e"], "embeddings are a column"),
        (["--embeddings"], "--embeddings needs a FILE"),
        (["--data", "x"], "choose one"),
        (["--streaming"], "--streaming needs --data"),
        (["--split", "train"], "--split needs --data"),
        (["--output", ""], "--output is empty"),
        (["--embeddings", ""], "--embeddings is empty"),
    ],
)
def test_bad_input(in_process, args, words):
    assert words in input_error(in_process(PREDICT, "README.md", *args))


def test_the_output_must_not_change_a_stream(in_process, digits):
    args = ["--data", digits / "classes", "--streaming", "--output", digits / "classes" / "out"]
    assert "is in the folder --data" in input_error(in_process(PREDICT, *args))


def test_corrupt_images(in_process, digits, tmp_path):
    shutil.copytree(digits / "plain", tmp_path / "data")
    (tmp_path / "data" / "03_x.png").write_bytes(b"nothing")
    args = [PREDICT, "--data", tmp_path / "data", "--output", tmp_path / "out", "--shard-size", 3, "--batch-size", 3]
    line = input_error(in_process(*args))
    assert "image 4 of data" in line and "03_x.png" in line and "(--skip-corrupt)" in line
    assert len(shards(tmp_path / "out")) == 1 and not manifest(tmp_path / "out")["complete"]
    for again in ([], ["--resume"]):  # a finished folder is still one with a skipped image
        result = in_process(*args, "--skip-corrupt", "--resume", *again)
        assert result.returncode == 1 and "21 images in 7 shards, 1 skipped" in result.stdout
    assert [row["index"] for row in rows_of(tmp_path / "out")] == [0, 1, 2, 3, *range(5, 21)]
    found = manifest(tmp_path / "out")
    assert (found["images"], found["rows"], found["skipped"]) == (21, 20, 1)


def test_none_of_the_images_can_be_decoded(in_process, tmp_path):
    (tmp_path / "a.png").touch()
    line = input_error_after_warnings(in_process(PREDICT, tmp_path, "--skip-corrupt", "--output", f"{tmp_path}/out/"))
    assert "none of the 1 images can be decoded" in line and not manifest(tmp_path / "out")["complete"]


def test_a_run_that_failed_in_its_first_shard_can_be_started_again(in_process, digits, tmp_path):
    images = Path(shutil.copytree(digits / "plain", tmp_path / "images"))
    (images / "00.png").write_bytes(b"")
    args = [PREDICT, images, "--output", f"{tmp_path}/out/"]
    assert "is corrupt" in input_error(in_process(*args))
    assert in_process(*args, "--skip-corrupt").returncode == 1 and manifest(tmp_path / "out")["complete"]


def input_error_after_warnings(result: subprocess.CompletedProcess) -> str:
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and all(line.startswith("warning: ") for line in lines[:-1]), result.stderr
    return lines[-1]


def test_a_full_disk_loses_no_finished_shard(in_process, digits, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = [PREDICT, digits / "plain", "--output", out, "--shard-size", 4, "--workers", 0]
    write = prediction_folder.shard_table
    written = []

    def shard_table(*args):
        written.append(len(written))
        if len(written) == 3:
            stack.enter_context(full_disk(1000))
        return write(*args)

    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(prediction_folder, "shard_table", shard_table)
        line = input_error(in_process(*args))
    assert "cannot write the result" in line and len(shards(out)) == 2
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, *(path.name for path in shards(out))]
    assert in_process(*args, "--resume").returncode == 0 and len(rows_of(out)) == 20


@pytest.mark.full
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_rows_are_the_same_on_any_number_of_processes(in_process, program, digits, tmp_path, streaming):
    args = [PREDICT, "--data", digits / "parquet", *streaming, "--shard-size", 3, "--threads", 1, "--output"]
    assert in_process(*args, tmp_path / "1").returncode == 0
    for processes in (2, 3):
        result = program(*args, tmp_path / str(processes), processes=processes)
        assert result.returncode == 0, result.stderr
        for path in (tmp_path / "1").iterdir():
            assert path.read_bytes() == (tmp_path / str(processes) / path.name).read_bytes()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.full
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_resume_after_a_kill_on_another_number_of_processes(program, tmp_path, streaming):
    out = tmp_path / "out"
    args = ["--data", SHIPPED_DATA, "--split", "train", *streaming, "--backend", "torch", "--output", out]
    # Without a launcher, which would start each process in a session of its own.
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    command = [sys.executable, PREDICT, *map(str, args), "--shard-size", "16", "--batch-size", "2"]
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for rank in (0, 1)
    ]
    runs = [subprocess.Popen(command, cwd=ROOT, env=env | rank, start_new_session=True) for rank in ranks]
    while len(shards(out)) < 10:
        assert all(run.poll() is None for run in runs)
        time.sleep(0.01)
    for run in runs:
        os.killpg(run.pid, signal.SIGKILL)  # its loader as well
        run.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in shards(out)}
    assert 10 <= len(finished) < 90 and not manifest(out)["complete"]
    result = program(PREDICT, *args, "--batch-size", 2, "--resume", processes=3)
    assert result.returncode == 0, result.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert [row["index"] for row in rows_of(out)] == list(range(1437)) and manifest(out)["complete"]
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, *(path.name for path in shards(out))]


@pytest.mark.full
def test_a_full_disk_in_one_process(program, digits, tmp_path):
    """A folder with the name of a shard makes the second process fail."""
    out = tmp_path / "out"
    (out / "part-000003.parquet").mkdir(parents=True)
    args = [PREDICT, digits / "plain", "--output", out, "--shard-size", 2, "--resume"]
    result = program(*args, processes=2)
    assert result.returncode == 1 and result.stderr.count("error: cannot write the result: Is a directory") == 1
    assert "[rank0]" not in result.stderr
    assert [path.name for path in shards(out) if path.is_file()] == [f"part-00000{n}.parquet" for n in range(3)], (
        result.stderr
    )
    assert not manifest(out)["complete"]
    (out / "part-000003.parquet").rmdir()
    assert program(*args, processes=2).returncode == 0 and len(rows_of(out)) == 20


@pytest.mark.full
def test_two_machines_with_folders_of_their_own(in_process, digits, tmp_path):
    """Each launcher has its own working folder; combined, the folders that they write are complete."""
    args = [
        ROOT / PREDICT,
        digits / "plain",
        "--model",
        f"local-dir:{SHIPPED_MODEL}",
        "--shard-size",
        3,
        "--threads",
        1,
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
    command += ["--num_processes", "2", "--main_process_ip", "localhost", "--main_process_port", str(free_port())]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--machine_rank"]
    runs = []
    for machine in ("0", "1"):
        (tmp_path / machine).mkdir()
        run = [*command, machine, *map(str, args), "--output", "out"]
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        runs.append(subprocess.Popen(run, cwd=tmp_path / machine, env=env, stderr=subprocess.PIPE, text=True))
    for run in runs:
        assert run.wait(timeout=120) == 0, run.stderr.read()
    out, other = tmp_path / "0" / "out", tmp_path / "1" / "out"
    assert (len(shards(out)), len(shards(other))) == (4, 3) and manifest(out) == manifest(other)
    assert in_process(PREDICT, *args[1:], "--output", tmp_path / "all").returncode == 0
    for path in other.iterdir():
        shutil.copy2(path, out)
    assert [path.read_bytes() for path in shards(out)] == [path.read_bytes() for path in shards(tmp_path / "all")]
    result = in_process(PREDICT, *args[1:], "--output", out, "--resume")
    assert (result.returncode, result.stderr) == (0, "") and "20 images in 7 shards" in result.stdout


@pytest.mark.full
def test_memory_does_not_grow(tmp_path):
    def resident() -> int:
        return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024

    def batches() -> Iterator[list[Prediction]]:
        for first in range(0, number, 50):
            if first in (20_000, number - 50):
                used.append(resident())
            yield [Prediction(i, f"{i}.png", 0, None, [0.5] * 5, [1, 2, 3, 4, 5]) for i in range(first, first + 50)]

    used: list[int] = []
    number = 100_000
    folder = prediction_folder.PredictionFolder(tmp_path / "out", Accelerator(cpu=True))
    folder.find({"shard_size": 1000, "embeddings": False}, folder.open(resume=False))
    images = Images(None, number, "x", labelled=True)
    with progress_bar(None, total=number) as progress:
        folder.write(batches(), list("0123456789"), images, progress)
    assert manifest(tmp_path / "out")["rows"] == number and used[1] - used[0] < 10, used  # megabytes
